"""``pilotage personalize`` on the embedded model."""

import contextlib
import json
from types import SimpleNamespace

import pytest
from PIL import Image
from safetensors.torch import load_file

from pilotage.eval.cli import main
from pilotage.pipelines.personalization import Personalizer

WORD = "<my-square>"


def run(monkeypatch, *arguments):
    """Exit status of ``pilotage personalize ARGUMENTS``."""
    monkeypatch.setattr("sys.argv", ["pilotage", "personalize", *map(str, arguments)])
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
    assert [p.name for p in (output / "previews").iterdir()] == ["step-000002.png"]
    assert not list(output.rglob("*.partial*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--preset": "best"}, "unknown preset 'best'"),
        ({"--template": "no braces"}, "exactly one {}"),
        ({"images": "gone"}, "gone is not a folder"),
    ],
)
def test_errors_are_one_line(monkeypatch, tmp_path, pictures, capsys, change, message):
    options = {"--token": WORD, "--initializer": "star", "-o": tmp_path / "out"} | change
    images = options.pop("images", pictures)
    assert run(monkeypatch, images, *(x for pair in options.items() for x in pair)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()
