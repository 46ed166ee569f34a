"""The recipe of the network to explain, and what is shipped of it."""

import json
from pathlib import Path

import torch

from examples.fashion_mnist import data as fashion_mnist
from examples.fashion_mnist import train

ROOT = Path(__file__).resolve().parents[2]


def test_train_resume_and_export(tmp_path, monkeypatch):
    images = torch.randint(0, 256, (40, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(40, dtype=torch.int64)
    monkeypatch.setattr(train, "load_images", lambda *_: (images.to(torch.uint8), labels))
    monkeypatch.setattr(train, "BATCH", 4)
    monkeypatch.setattr(train, "sheet", lambda *_: None)
    work, out = str(tmp_path / "work"), tmp_path / "model"
    call = ["train", "--work", work, "--precision", "no", "--minutes"]
    train.main([*call, "0.0001"])
    first = json.loads((tmp_path / "work" / "unet" / "state.json").read_text())
    train.main([*call, str(first["elapsed"] / 60 + 0.0001)])
    state = json.loads((tmp_path / "work" / "unet" / "state.json").read_text())
    assert state["step"] > first["step"] and state["elapsed"] > first["elapsed"]
    train.main(["export", "--work", work, "-o", str(out)])
    monkeypatch.setattr(fashion_mnist, "MODEL", out)
    pipe = fashion_mnist.load_unet()
    assert pipe.scheduler.config.beta_schedule == "linear" and not pipe.scheduler.config.clip_sample
    weights = out / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 6e6
    names = {type(module).__name__ for module in pipe.unet.modules()}
    assert not any("Attention" in name for name in names)
    assert "steps of" in (out / "README.md").read_text()
