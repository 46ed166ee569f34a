"""The command line on the embedded model."""

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import typer
from PIL import Image

import pilotage
from pilotage.eval.cli import COMMANDS, app, main
from pilotage.eval.embedded import embedded_folder, load_embedded
from pilotage.eval.metrics.extractors import load_extractor
from pilotage.eval.terminal import finish
from pilotage.pipelines import guided
from pilotage.pipelines.seam.layouts import LayoutError

from ..families import FAMILIES


def run(monkeypatch, *arguments):
    """Exit status of ``pilotage ARGUMENTS``."""
    monkeypatch.setattr("sys.argv", ["pilotage", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code


def test_generate_writes_a_picture_with_its_settings(monkeypatch, tmp_path, capsys):
    path = tmp_path / "new" / "apple.png"
    options = ["--guidance", "apg+ag", "--scale", 10, "--steps", 4, "--seed", 3, "-o", path]
    assert run(monkeypatch, "generate", "twemoji style red apple", *options) == 0
    image = Image.open(path)
    assert image.size == (64, 64)
    made = json.loads(image.text["pilotage"])
    assert made["prompt"] == "twemoji style red apple"
    assert made["guidance"].startswith("APG(") and "AdaptiveGuidance(" in made["guidance"]
    assert (made["guidance_scale"], made["steps"], made["seed"]) == (10, 4, 3)
    assert 4 < made["nfe"] <= 8
    assert str(path) in capsys.readouterr().out


def test_generate_several(monkeypatch, tmp_path):
    path = tmp_path / "a.png"
    options = ["-n", 2, "--steps", 2, "-o", path]
    assert run(monkeypatch, "generate", "noto style cat face", *options) == 0
    pictures = sorted(tmp_path.iterdir())
    assert [p.name for p in pictures] == ["a-0.png", "a-1.png"]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


def test_scale_one_is_no_guidance(monkeypatch, tmp_path):
    path = tmp_path / "a.png"
    prompt = "noto style cat face"
    assert run(monkeypatch, "generate", prompt, "-w", 1, "--steps", 2, "-o", path) == 0
    generator = torch.Generator().manual_seed(0)
    plain = load_embedded()(prompt, guidance_scale=1, num_inference_steps=2, generator=generator)
    image = Image.open(path)
    assert np.array_equal(np.asarray(image), np.asarray(plain.images[0]))
    made = json.loads(image.text["pilotage"])
    assert made["guidance"] is None and made["nfe"] == 2


def test_generate_guides_where_the_scale_has_another_name(monkeypatch, tmp_path):
    pipe = guided(FAMILIES["flux"].build())
    monkeypatch.setattr("pilotage.eval.embedded.load_pipeline", lambda *_: pipe)
    pixels = []
    for guidance, scale in (("cfg", 3), ("cfg", 30), ("apg", 3), ("apg", 30)):
        path = tmp_path / f"{guidance}-{scale}.png"
        options = ["--model", "flux", "-g", guidance, "-w", scale, "--steps", 1, "-o", path]
        assert run(monkeypatch, "generate", "a fox", *options) == 0
        image = Image.open(path)
        made = json.loads(image.text["pilotage"])
        assert (made["true_cfg_scale"], made["nfe"]) == (scale, 2)
        assert "guidance_scale" not in made
        pixels.append(np.asarray(image))
    assert not np.array_equal(*pixels[:2]) and not np.array_equal(*pixels[2:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance", "agp"], "unknown guidance 'agp'"),
        (["--scale", math.nan], "finite"),
        (["--device", "nothing"], "device 'nothing' cannot be used here"),
        (["--device", "meta"], "device 'meta' cannot be used here"),
    ],
)
def test_errors_are_one_line(monkeypatch, tmp_path, capsys, options, message):
    path = tmp_path / "x.png"
    assert run(monkeypatch, "generate", "noto style fox", *options, "-o", path) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "must end in .png") for name in ("x.jpg", "x", "x.xyz", "folder/")),
        ("folder.png/", "is a folder"),
        ("file/x.png", "is not a folder to write to"),
    ],
)
def test_names_that_cannot_be_written_fail_first(monkeypatch, tmp_path, capsys, name, message):
    for folder in ("folder", "folder.png"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").touch()
    options = ["--model", tmp_path / "none", "-o", f"{tmp_path}/{name}"]
    assert run(monkeypatch, "generate", "noto style fox", *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_truncated_weights(monkeypatch, tmp_path, capsys, part):
    model = tmp_path / "model"
    shutil.copytree(embedded_folder(), model)
    weights = max((model / part).glob("*.safetensors"), key=lambda f: f.stat().st_size)
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    arguments = ["noto style fox", "--model", model, "-o", tmp_path / "x.png"]
    assert run(monkeypatch, "generate", *arguments) == 2
    assert "damaged or incomplete" in capsys.readouterr().err


def test_info_lists_names_and_presets(monkeypatch, capsys):
    assert run(monkeypatch, "info") == 0
    out = capsys.readouterr().out
    for word in ("apg", "sdxl", "torch"):
        assert word in out
    assert run(monkeypatch, "info", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == pilotage.info()
    assert pilotage.info()["versions"]["pilotage"] == pilotage.__version__


@pytest.mark.parametrize("option", ["-h", "--help", "--version"])
def test_options_of_the_program(monkeypatch, capsys, option):
    assert run(monkeypatch, option) == 0
    expected = pilotage.__version__ if option == "--version" else "precision-recall"
    assert expected in capsys.readouterr().out


def test_every_command_explains_itself():
    for command in app.registered_commands:
        assert command.callback.__doc__


def test_every_command_has_one_name_and_the_common_options():
    names = [command.name for command in app.registered_commands]
    assert len(set(names)) == len(names) == len(set(COMMANDS.values()))
    for command in typer.main.get_command(app).commands.values():
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--quiet", "-q"} <= options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generat"], "No such command 'generat'. Did you mean 'generate'?"),
        (["generate", "fox", "--scal", 3], "--scale"),
        (["generate"], "('pilotage generate --help' tells more)"),
        (["generate", "fox", "--steps", "x"], "Invalid value for '--steps'"),
        (["generate", "fox", "-g", "apg+agg"], "unknown guidance 'agg' (did you mean 'ag'"),
        (["denoise", ".", "-m", "wienre"], "unknown method 'wienre' (did you mean 'wiener'?)"),
        (["export", "x", "--precision", "fp61"], "unknown precision 'fp61' (did you mean 'fp16'"),
        (["calibrate", "p", "--nfe", 3, "--then", "forcast"], "(did you mean 'forecast'?)"),
        (["personalize", ".", "--token", "x", "--initializer", "x", "--preset", "zodip"], "zoodip"),
    ],
)
def test_usage_errors_are_one_line_and_say_what_was_meant(monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not out


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("one\n  two"), 2, "error: one two"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), 2, "error: x.txt: No such"),
        (LayoutError("not to be guided"), 2, "error: not to be guided"),
        (OSError(28, "No space left on device", "x.png"), 1, "error: x.png: No space left"),
        (ModuleNotFoundError("needs scipy"), 1, "error: needs scipy"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: CUDA out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (typer.Abort(), 130, "interrupted"),
    ],
)
def test_exit_codes(capsys, error, code, line):
    def fail():
        raise error

    failing = typer.Typer()
    failing.command()(fail)
    failing.callback()(lambda: None)
    with pytest.raises(SystemExit) as end:
        finish(lambda **options: failing(["fail"], **options))
    out, err = capsys.readouterr()
    assert end.value.code == code and err.startswith(line) and err.count("\n") == 1 and not out


def test_an_extractor_that_may_have_been_meant():
    with pytest.raises(ValueError, match=r"'inceptoin' \(did you mean 'inception'"):
        load_extractor("inceptoin")


def test_a_bug_shows_where_it_is():
    def fail(**_):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        finish(fail)


@pytest.mark.parametrize("count", [1, 2])
def test_pictures_are_not_lost(monkeypatch, tmp_path, capsys, count):
    path, there = tmp_path / "a.png", tmp_path / ("a.png" if count == 1 else "a-1.png")
    there.write_bytes(b"mine")
    options = ["-n", count, "--steps", 1, "-o", path]
    refused = [*options, "--model", tmp_path / "none"]  # found before a model is loaded
    assert run(monkeypatch, "generate", "noto style cat face", *refused) == 2
    assert f"there is already {there}: name another" in capsys.readouterr().err
    assert run(monkeypatch, "denoise", tmp_path, *options) == 2
    assert f"there is already {there}: name another" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [there] and there.read_bytes() == b"mine"
    assert run(monkeypatch, "generate", "noto style cat face", *options, "--force") == 0
    assert Image.open(there).size == (64, 64)


def test_quiet_shows_results_only(monkeypatch, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("noto style cat face\n")
    compare = ["compare", tmp_path / "p.txt", "-w", 3, "--steps", 1, "--no-report"]
    for number, options in enumerate(([], ["-q"])):
        shown = []
        for command in (
            ["generate", "noto style cat face", "--steps", 2, "-o", tmp_path / f"{number}.png"],
            [*compare, "-o", tmp_path / f"compared{number}"],
        ):
            assert run(monkeypatch, *command, *options) == 0
            out, err = capsys.readouterr()
            assert str(number) in out
            shown.append(err)
        assert all(err == "" for err in shown) if options else all("%|" in err for err in shown)


def test_quiet_tells_nothing_of_the_folder_that_was_read(monkeypatch, tmp_path, capsys):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "b.txt").touch()
    assert run(monkeypatch, "saturation", tmp_path) == 0
    out, err = capsys.readouterr()
    assert "b.txt" in err
    assert run(monkeypatch, "saturation", "--quiet", tmp_path) == 0
    assert capsys.readouterr() == (out, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell):
    main = "from pilotage.eval.cli import main; main()"
    command = [sys.executable, "-c", main]
    script = subprocess.run([*command, "--show-completion", shell], **SHELL | SHELLS[shell][0])
    assert "_PILOTAGE_COMPLETE" in script.stdout and "complete" in script.stdout
    # What the script calls when "pilotage per<TAB>" is typed.
    asked = subprocess.run(command, **SHELL | SHELLS[shell][1])
    assert "personalize" in asked.stdout and "generate" not in asked.stdout
    assert not asked.stderr


TYPED = {"COMP_WORDS": "pilotage per", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "pilotage per"}
TYPED["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
SHELL = {"capture_output": True, "text": True}
SHELLS = {
    shell: (
        {"env": os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}},
        {"env": os.environ | TYPED | {"_PILOTAGE_COMPLETE": f"complete_{shell}"}},
    )
    for shell in ("bash", "zsh", "fish")
}
