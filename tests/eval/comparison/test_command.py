"""Options of ``pilotage compare`` from a file, and the question before a long run."""

import json
import os
import pty
import subprocess
import sys

import pytest

from pilotage.eval import estimate
from pilotage.eval.cli import main
from pilotage.eval.embedded import load_embedded
from pilotage.eval.estimate import Speed, measured
from pilotage.pipelines.fitting.runs import Runs

PROMPT = "noto style cat face"


def run(monkeypatch, *arguments):
    """Exit status of ``pilotage ARGUMENTS``."""
    monkeypatch.setattr("sys.argv", ["pilotage", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_options_from_a_file(monkeypatch, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n")
    file = tmp_path / "compare.toml"
    file.write_text(
        f"""
        prompts = "{tmp_path}/prompts.txt"
        guidance = ["cfg", "apg"]
        scale = [2, 3.5]
        steps = 2
        first-seed = 7
        equal-nfe = false
        report = false
        output = "{tmp_path}/file"
        """
    )
    assert run(monkeypatch, "compare", "--config", file) == 0
    content = json.loads((tmp_path / "file" / "cells.json").read_text())
    assert [c["label"] for c in content["cells"]] == [
        f"{name} w={w}, 2 steps" for w in ("2", "3.5") for name in ("cfg", "apg")
    ]
    assert (content["prompts"], content["seeds"]) == ([PROMPT], [7])
    assert not (tmp_path / "file" / "report.html").exists()
    # What is given here counts more, a list as a whole, wherever the file is named.
    options = ["-w", 4, "-g", "cfg", "--report", "--config", file, "-o", tmp_path / "here"]
    assert run(monkeypatch, "compare", *options) == 0
    content = json.loads((tmp_path / "here" / "cells.json").read_text())
    assert [c["label"] for c in content["cells"]] == ["cfg w=4, 2 steps"]
    assert (tmp_path / "here" / "report.html").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", "compare.toml: unknown option 'stepz' (did you mean 'steps'"),
        ("first_seed = 3", "unknown option 'first_seed' (did you mean 'first-seed'"),
        ("config = 'x'", "unknown option 'config'"),
        ("[compare]\nsteps = 3", "unknown option 'compare'"),
        ("steps = ", "compare.toml is not a TOML file"),
        ("steps = 'many'", "Invalid value for '--steps'"),
        ("steps = 2.5", "Invalid value for '--steps'"),
        ("seeds = [1, 2]", "compare.toml: seeds = [1, 2], expected a text or a number"),
        ("scale = true", "compare.toml: scale = True, expected a text or a number"),
        ("report = 'yes'", "compare.toml: report = 'yes', expected true or false"),
        ("steps = 0", "--steps"),
        (None, "compare.toml: No such file"),
    ],
)
def test_files_that_are_refused(monkeypatch, tmp_path, capsys, text, message):
    file = tmp_path / "compare.toml"
    if text is not None:
        file.write_text(text)
    options = ["-p", PROMPT, "--model", tmp_path / "none", "-o", tmp_path / "out"]
    assert run(monkeypatch, "compare", "--config", file, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


class Terminal:
    """A terminal on which someone types."""

    def __init__(self, text):
        self.text = text

    def isatty(self):
        return True

    def readline(self):
        return self.text


LONG = ["-p", PROMPT, "-g", "cfg", "-w", 3, "--steps", 90, "--no-report", "--no-equal-nfe"]
LONG = ["compare", *LONG]
FIT = ["fit", "prompts.txt", "--steps", 90, "--scale", 3]
SEARCH = ["search", "prompts.txt", "--steps", 20, "--rounds", 3]
CALIBRATE = ["calibrate", "prompts.txt", "--steps", 20, "--nfe", 30]


@pytest.mark.parametrize("command", [LONG, FIT, SEARCH, CALIBRATE], ids=lambda c: c[0])
def test_a_long_run_is_asked_about(monkeypatch, tmp_path, capsys, command):
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "out"
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\nnoto style fox\n")
    model = load_embedded()
    monkeypatch.setattr("pilotage.eval.embedded.load_embedded", lambda *_: model)
    monkeypatch.setattr(estimate, "measured", lambda runs: Speed(step=100, picture=1))
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    asked = [*command, "-o", output if command is LONG else output / "x.json"]
    assert run(monkeypatch, *asked) == 1
    error = capsys.readouterr().err
    assert "about" in error and "Go on?" in error and "nothing was done" in error
    assert not [path for path in output.rglob("*") if path.is_file()]


def test_yes_and_no_terminal_ask_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(estimate, "measured", lambda runs: Speed(step=200, picture=40))
    monkeypatch.setattr(estimate, "SHARE", 1)
    command = [8 if word == 90 else word for word in LONG]
    # 8 steps of 200 s and a picture: 1640 s.
    assert run(monkeypatch, *command, "-o", tmp_path) == 0  # the tests' input is no terminal
    error = capsys.readouterr().err
    assert "about 27 min: 1 pictures, 8 steps" in error and "Go on?" not in error
    assert run(monkeypatch, *command, "-o", tmp_path) == 0  # everything is there already
    assert "about" not in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert run(monkeypatch, *command, "-o", tmp_path / "new", "--yes") == 0
    assert "Go on?" not in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("", 0), ("n", 1)])
def test_the_question_on_a_real_terminal(answer, code):
    main_end, end = pty.openpty()
    code_ = "from pilotage.eval.terminal import go_on; go_on(4000, False); print('went on')"
    child = subprocess.Popen([sys.executable, "-c", code_], stdin=end, stdout=end, stderr=end)
    os.close(end)
    os.write(main_end, f"{answer}\n".encode())
    said = b""
    try:
        while part := os.read(main_end, 1000):
            said += part
    except OSError:  # the child has ended
        pass
    child.wait()
    os.close(main_end)
    assert b"about 67 minutes. Go on? [Y/n]" in said
    assert (b"went on" in said) == (code == 0)


def test_speed_is_measured_on_a_batch_at_most(monkeypatch):
    pipe = load_embedded()
    made = []
    network = pipe.unet
    network.register_forward_pre_hook(
        lambda _, args, kwargs: made.append(len(kwargs.get("sample", args and args[0]))),
        with_kwargs=True,
    )
    speed = measured(Runs(pipe, [PROMPT] * 5, 3.0, 50, batch_size=2))
    assert made == [4] * (2 + 2 + 4)  # two prompts with both branches, three short runs
    assert speed.step >= 0 and speed.picture >= 0
    assert Speed(0.5, 2.0).seconds(3, 60) == 36
