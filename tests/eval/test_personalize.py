"""``pilotage personalize`` on the embedded model, and commands that take its words."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
import typer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from pilotage.eval.cli import main
from pilotage.eval.embedded import load_embedded
from pilotage.pipelines.personalization import (
    DiffusionTokenLoss,
    Personalizer,
    add_token,
    save_token,
)

WORD = "<my-square>"


def run(monkeypatch, *arguments, command="personalize"):
    """Exit status of ``pilotage COMMAND ARGUMENTS``."""
    monkeypatch.setattr("sys.argv", ["pilotage", command, *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, colour in enumerate(("red", "orange")):
        image = Image.new("RGBA", (80, 60))
        image.paste(colour, (20, 10, 60, 50))
        image.save(folder / f"{i}.png")
    return folder


def test_writes_a_token_and_continues(monkeypatch, tmp_path, pictures, capsys):
    picture = SimpleNamespace(images=[Image.new("RGB", (8, 8))])  # not fifty steps of the model
    speaking = contextlib.nullcontext(lambda prompt, **options: picture)
    monkeypatch.setattr(Personalizer, "speaking", lambda self, word, vectors: speaking)
    output = tmp_path / "out"
    options = [pictures, "--token", WORD, "--initializer", "star", "-o", output]
    options += ["--template", "noto style {}", "--evaluate-every", 2, "--quantize", "int8"]
    assert run(monkeypatch, *options, "--steps", 1) == 0
    assert run(monkeypatch, *options, "--steps", 2, "--preview-every", 2) == 0
    out = capsys.readouterr().out
    assert "learned_embeds.safetensors" in out and "held-out loss" in out
    assert load_file(output / "learned_embeds.safetensors")[WORD].shape == (1, 192)
    assert json.loads((output / "personalization.json").read_text())["steps"] == 2
    assert json.loads((output / "personalization.json").read_text())["learned"]
    assert len(list((output / "previews").iterdir())) == 1
    made = {path.name for path in output.iterdir()}
    assert made >= {"curve.png", "losses.jsonl", "checkpoint.safetensors"}
    assert f"pipe.load_textual_inversion('{output / 'learned_embeds.safetensors'}'" in out
    assert not list(output.rglob("*.partial*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--preset": "best"}, "unknown preset 'best'"),
        ({"--template": "no braces"}, "exactly one {}"),
        ({"images": "gone"}, "gone is not a folder"),
        ({"--held-out": "gone"}, "gone is not a folder"),
        ({"--initializer": "gone.safetensors"}, "no token file gone.safetensors"),
        ({"--dtype": "int4"}, "dtype is one of auto, fp32, bf16, fp16, got 'int4'"),
    ],
)
def test_errors_are_one_line(monkeypatch, tmp_path, pictures, capsys, change, message):
    options = {"--token": WORD, "--initializer": "star", "-o": tmp_path / "out"} | change
    images = options.pop("images", pictures)
    assert run(monkeypatch, images, *(x for pair in options.items() for x in pair)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_captions_are_read_before_the_model(monkeypatch, tmp_path, pictures, capsys):
    (pictures / "0.txt").write_text("a picture of nothing")
    options = [pictures, "--token", WORD, "--initializer", "star", "-o", tmp_path / "out"]
    monkeypatch.setattr("pilotage.eval.embedded.load_on", None)
    assert run(monkeypatch, *options) == 2
    assert "1.png has no caption" in capsys.readouterr().err
    (pictures / "1.txt").write_text(WORD)
    assert run(monkeypatch, *options) == 2
    assert "0.txt: a prompt template needs exactly one {}" in capsys.readouterr().err


SHORT = ["--token", WORD, "--initializer", "star", "--template", "noto style {}", "--steps", 2]
SHORT += ["--preview-every", 0]


def test_a_run_that_learned_nothing_says_so(monkeypatch, tmp_path, pictures, capsys):
    flat = lambda self, embeddings, _batch: torch.ones(len(embeddings))  # noqa: E731
    monkeypatch.setattr(DiffusionTokenLoss, "__call__", flat)
    with pytest.warns(UserWarning, match="nothing was learned in 2 steps.*no token is written"):
        assert run(monkeypatch, pictures, *SHORT, "-o", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "error: nothing was learned, held-out loss 1.0000" in error and "Traceback" not in error
    assert not (tmp_path / "out" / "learned_embeds.safetensors").exists()


def test_a_long_run_is_asked_about_before_its_first_step(monkeypatch, tmp_path, pictures):
    asked = []

    def no(seconds, yes):
        asked.append((seconds, yes))
        raise typer.Exit(1)

    monkeypatch.setattr("pilotage.eval.personalize.go_on", no)
    output = tmp_path / "out"
    for more in ([], ["--yes", "--quiet"]):
        assert run(monkeypatch, pictures, *SHORT, *more, "-o", output) == 1
    (seconds, yes), (_, sure) = asked
    assert seconds > 0 and not yes and sure
    assert not list(output.iterdir())


def test_a_run_on_a_network_that_overflows_ends_in_one_line(
    monkeypatch, tmp_path, pictures, capsys
):
    infinite = lambda self, embeddings, _batch: torch.full((len(embeddings),), torch.inf)  # noqa: E731
    monkeypatch.setattr(DiffusionTokenLoss, "__call__", infinite)
    assert run(monkeypatch, pictures, *SHORT, "-o", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "error: the losses of 32 of 32 held-out rows are not finite" in error
    assert "0.png at timestep" in error and "Traceback" not in error


def test_precision_held_out_pictures_and_a_token_to_continue(monkeypatch, tmp_path, pictures):
    """What the options ask for is in the checkpoint; the second run begins at the first's token."""
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (64, 64), "blue").save(other / "a.png")
    (other / "a.txt").write_text(f"noto style {WORD}")
    output = tmp_path / "out"
    first = [pictures, *SHORT, "-o", output, "--dtype", "bf16", "--held-out", other]
    assert run(monkeypatch, *first) in (0, 1)
    with safe_open(output / "checkpoint.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["personalization"])["settings"]
        best = file.get_tensor("best")
    assert settings["dtype"] == "bfloat16"
    save_token(tmp_path / "t.safetensors", [best], WORD)
    again = [pictures, *SHORT, "-o", output / "2", "--dtype", "bf16", "--held-out", other]
    again[again.index("star")] = tmp_path / "t.safetensors"
    assert run(monkeypatch, *again) in (0, 1)
    losses = [
        json.loads((folder / "personalization.json").read_text())["evaluations"]
        for folder in (output, output / "2")
    ]
    assert losses[1][0][2] == min(e[2] for e in losses[0])


@pytest.fixture
def word_file(tmp_path):
    draw = torch.Generator().manual_seed(0)
    save_token(tmp_path / "t.safetensors", [0.5 * torch.randn(2, 192, generator=draw)], WORD)
    return tmp_path / "t.safetensors"


def test_generate_knows_the_word(monkeypatch, tmp_path, word_file):
    prompt = f"noto style {WORD}"
    options = [prompt, "-g", "cfg", "-w", 3, "--steps", 2]
    pixels = []
    for name, more in (("a.png", ["--token", word_file]), ("b.png", [])):
        output = tmp_path / name
        assert run(monkeypatch, *options, "-o", output, *more, command="generate") == 0
        with Image.open(output) as image:
            pixels.append(image.tobytes())
            made = json.loads(image.info["pilotage"])
        assert made.get("tokens") == ([WORD] if more else None)
    pipe = load_embedded()
    add_token(pipe, word_file)
    noise = [torch.Generator().manual_seed(0)]
    drawn = pipe([prompt], guidance_scale=3, num_inference_steps=2, generator=noise).images[0]
    assert pixels[0] == drawn.tobytes() != pixels[1]


def test_compare_knows_the_word(monkeypatch, tmp_path, word_file, capsys):
    """And its folder takes no pictures of a pipeline that does not know it."""
    output = tmp_path / "compare"
    options = ["-p", f"noto style {WORD}", "-g", "cfg", "-w", 3, "--steps", 1, "-o", output]
    options += ["--no-report", "--no-equal-nfe"]
    assert run(monkeypatch, *options, "--token", word_file, command="compare") == 0
    assert len(list(output.rglob("*.png"))) == 1
    assert run(monkeypatch, *options, command="compare") == 2
    assert "holds another plan: its model is" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_a_token_file_is_read_before_the_model(monkeypatch, tmp_path, capsys, command):
    monkeypatch.setattr("pilotage.eval.embedded.load_on", None)
    arguments = [WORD] if command == "generate" else ["-p", WORD]
    path = tmp_path / "t.safetensors"
    assert run(monkeypatch, *arguments, "--token", path, command=command) == 2
    assert "no token file" in capsys.readouterr().err
    path.write_bytes(b"nothing")
    assert run(monkeypatch, *arguments, "--token", path, command=command) == 2
    assert "not a whole safetensors file" in capsys.readouterr().err
