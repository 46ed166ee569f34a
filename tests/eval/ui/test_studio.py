"""What the buttons of the page do, and that copied lines make the same picture."""

import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from pilotage.eval.cli import main
from pilotage.eval.embedded import load_on
from pilotage.eval.ui.comparing import comparison
from pilotage.eval.ui.denoising import sample
from pilotage.eval.ui.learning import learn
from pilotage.eval.ui.lines import command
from pilotage.eval.ui.studio import Studio, Wish
from pilotage.pipelines import guided
from pilotage.pipelines.personalization import save_token

from ...families import FAMILIES
from .test_background import result

PROMPT = "noto style cat face"


def make(studio, guidance, scale=7.5, steps=4, prompt=PROMPT, negative="", seed=3, seen=None):
    return result(studio.picture(Wish(prompt, negative, seed, guidance, scale, steps)), seen)


def run(monkeypatch, line):
    """Run a copied command line."""
    program, *arguments = shlex.split(line)
    monkeypatch.setattr("sys.argv", [program, *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0


WISHES = {
    "settings": {"guidance": "apg(eta=0.5, space=native)+ag(threshold=0.9)"},
    "negative": {"guidance": "cfg", "negative": "it's blue"},
    "none": {"guidance": "apg", "scale": 1.0},
    "skipped": {"guidance": "forecast", "scale": 3.1},
    "dash": {"guidance": "cfg", "prompt": "--noto style 'fox'"},
}


@pytest.mark.parametrize("name", WISHES)
def test_copied_lines_make_the_same_picture(studio, monkeypatch, tmp_path, name):
    made = make(studio, **WISHES[name])
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, made.command)
    assert (tmp_path / "picture.png").read_bytes() == made.samples.paths[0].read_bytes()
    (tmp_path / "picture.png").unlink()
    exec(made.python, {})
    assert np.array_equal(Image.open(tmp_path / "picture.png"), made.image)


def test_copied_lines_say_the_precision(monkeypatch, tmp_path):
    studio = Studio(load_on("cpu", None, "bf16"), tmp_path, dtype="bf16")
    made = make(studio, "cfg", steps=2)
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, made.command)
    assert (tmp_path / "picture.png").read_bytes() == made.samples.paths[0].read_bytes()
    (tmp_path / "picture.png").unlink()
    exec(made.python, {})
    assert np.array_equal(Image.open(tmp_path / "picture.png"), made.image)


def test_steps_are_told_with_previews(studio):
    seen = []
    make(studio, "cfg", steps=4, seen=seen)
    assert [(step.done, step.total) for step in seen] == [(i, 4) for i in range(5)]
    previews = [step.preview for step in seen if step.preview is not None]
    assert previews and all(preview.size == (64, 64) for preview in previews)


def test_the_trace_counts_what_was_evaluated(studio):
    made = make(studio, "ag(threshold=0.5)", steps=6)
    assert sum(row["evaluations"] for row in made.trace) == made.samples.nfe[0] < 12
    assert [row["step"] for row in made.trace] == [1, 2, 3, 4, 5, 6]
    assert [row["cosine"] is None for row in made.trace] == [
        row["evaluations"] == 1 for row in made.trace
    ]


def test_norms_of_updates_are_those_of_denoised_images(studio):
    """CFG, in the space of the network's output, moves as far as APG that damps nothing."""
    plain = make(studio, "cfg")
    neutral = make(studio, "apg(eta=1, norm_threshold=0, momentum=0)")
    ours, theirs = ([row["update"] for row in made.trace] for made in (plain, neutral))
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_effective_guidance_needs_plain_guidance_beside(studio):
    damped = make(studio, "apg(norm_threshold=0.02)", seed=11)
    assert studio.effective(damped) is None
    plain = make(studio, "cfg", seed=11)
    assert studio.effective(plain) == 7.5
    neutral = make(studio, "apg(eta=1, norm_threshold=0, momentum=0)", seed=11)
    assert studio.effective(neutral) == pytest.approx(7.5, rel=1e-3)
    assert 1 < studio.effective(damped) < 7.5
    assert studio.effective(make(studio, "apg", seed=12)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"seed": None}, "seed: expected a whole number"),
        ({"guidance": "agp"}, "unknown guidance 'agp'"),
        ({"guidance": "cfg-pp"}, "this rule is for DDIMScheduler"),
        ({"scale": 0.0}, "scale must be finite and > 0"),
    ],
)
def test_bad_inputs_are_errors_in_words(studio, changes, message):
    with pytest.raises(ValueError, match=message):
        make(studio, **({"guidance": "cfg"} | changes))


def test_a_comparison_and_its_report(studio, monkeypatch, tmp_path):
    prompts = f"{PROMPT}\n\nnoto style fox"
    report = result(comparison(studio, prompts, ["cfg", "apg(eta=0.5)"], "3; 7.5", 2, 1))
    page = report.page.read_text()
    assert "apg(eta=0.5)" in page and "noto style fox" in page
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text(prompts)
    run(monkeypatch, report.command)
    for theirs in (tmp_path / "outputs" / "compare" / "pictures").rglob("*.png"):
        ours = report.page.parent / theirs.relative_to(tmp_path / "outputs" / "compare")
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "\n"}, "no prompts"),
        ({"scales": "3, much"}, "scales must be numbers"),
        ({"scales": ""}, "needs guidances, scales and steps"),
        ({"guidances": []}, "needs guidances, scales and steps"),
        ({"guidances": ["cfg", "agp"]}, "unknown guidance 'agp'"),
        ({"seeds": 500}, "more than the 400"),
    ],
)
def test_comparisons_that_are_refused(studio, changes, message):
    settings = {"prompts": PROMPT, "guidances": ["cfg"], "scales": "3", "steps": 2, "seeds": 1}
    with pytest.raises(ValueError, match=message):
        result(comparison(studio, **(settings | changes)))


def test_a_word_is_learned_and_known(studio, squares, monkeypatch, tmp_path):
    file, seen = tmp_path / "old.safetensors", []
    save_token(file, [torch.ones(1, 192)], "<a-square>")
    studio.know(file)  # what is learned takes the place of it
    word = result(learn(studio, squares, "<a-square>", "star", 45, "noto style {}"), seen)
    assert seen[0].done == 0 and seen[-1].done == word.last.done == 45
    assert len(word.last.losses) > 1 and word.last.curve is not None
    assert word.last.previews[0][1] == "step 0"
    assert word.file.name == "a-square.safetensors"
    assert studio.words == {"<a-square>": word.file}
    made = make(studio, "cfg", prompt="noto style <a-square>")
    assert not np.array_equal(made.image, make(studio, "cfg", prompt="noto style star").image)
    monkeypatch.chdir(tmp_path)
    shutil.copy(word.file, tmp_path)
    run(monkeypatch, made.command)
    assert (tmp_path / "picture.png").read_bytes() == made.samples.paths[0].read_bytes()
    exec(made.python, {})
    assert np.array_equal(Image.open(tmp_path / "picture.png"), made.image)


def test_a_word_that_cannot_be_learned_anew_stays(studio, squares, tmp_path):
    file = tmp_path / "old.safetensors"
    save_token(file, [torch.ones(1, 192)], "<stays>")
    studio.know(file)
    before = make(studio, "cfg", prompt="noto style <stays>")
    assert f"--token {file}" in before.command  # not of this page: by its path
    with pytest.raises(ValueError, match="choose a word that is one token"):
        result(learn(studio, squares, "<stays>", "", 10, "noto style {}"))
    assert np.array_equal(make(studio, "cfg", prompt="noto style <stays>").image, before.image)
    assert studio.forget("<stays>") == file and studio.forget("<stays>") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pictures": []}, "no pictures"),
        ({"word": "two words"}, "one word without spaces"),
        ({"initializer": ""}, "choose a word that is one token"),
        ({"template": "no braces"}, r"exactly one \{\}"),
    ],
)
def test_words_that_are_refused(studio, squares, changes, message):
    settings = {
        "pictures": squares,
        "word": "<b>",
        "initializer": "star",
        "steps": 10,
        "template": "{}",
    }
    with pytest.raises(ValueError, match=message):
        result(learn(studio, **(settings | changes)))
    assert "<b>" not in studio.words


def test_denoised_pictures_are_those_of_the_command(studio, squares, monkeypatch, tmp_path):
    seen = []
    made = result(sample(studio, squares, "", "local", 12, 2, 3, 5), seen)
    assert [(step.done, step.total) for step in seen] == [(0, 3), (1, 3), (2, 3)]
    assert [image.size for image in made.made.images] == [(12, 12)] * 2
    folder = tmp_path / "pictures"
    shutil.copytree(squares[0].parent, folder)
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, made.command)
    for i, image in enumerate(made.made.images):
        assert np.array_equal(Image.open(tmp_path / f"picture-{i}.png"), image)
    named = result(sample(studio, None, str(folder), "local", 12, 2, 3, 5))
    assert np.array_equal(named.made.images[1], made.made.images[1])


def test_pictures_to_denoise_that_are_refused(studio, squares, tmp_path):
    with pytest.raises(ValueError, match="no pictures"):
        sample(studio, None, "", "local", None, 1, 2, 0)
    with pytest.raises(ValueError, match="seed: expected a whole number, got None"):
        sample(studio, squares, "", "local", None, 1, 2, None)
    with pytest.raises(FileNotFoundError, match="no folder"):
        sample(studio, squares, str(tmp_path / "none"), "local", None, 1, 2, 0)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=re.escape("text.png")):
        result(sample(studio, [tmp_path / "text.png"], "", "local", None, 1, 2, 0))


def test_models_without_prompts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="DiTPipeline takes no prompt"):
        Studio(guided(FAMILIES["dit"].build()), tmp_path)


def test_command_lines_are_quoted():
    line = command("generate", "-a 'b'\n", {"-g": "apg(eta=1)", "-w": [1.0, 0.1 + 0.2], "-x": None})
    expected = ["-g", "apg(eta=1)", "-w", "1", "-w", repr(0.1 + 0.2), "--", "-a 'b'\n"]
    assert shlex.split(line) == ["pilotage", "generate", *expected]
