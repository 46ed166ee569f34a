"""Nothing is lost: the folder is tried first, checkpoints are whole, previews are made up for."""

import contextlib
import json
import resource
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pilotage.pipelines.personalization import Personalizer, load_token, personalizer
from pilotage.pipelines.personalization.output import Previews

from .tiny import SMALL, WORD, build, fit


@pytest.fixture(scope="module")
def pipe():
    return build()


def falling(embeddings, _batch):
    """A loss that every run lowers."""
    return (embeddings - 1).square().sum((1, 2))


def forbidden(*_args, **_kwargs):
    raise AssertionError("work began before the folder was tried")


@pytest.mark.parametrize(
    ("place", "error"),
    [
        (lambda f: f / "file" / "out", NotADirectoryError),
        (lambda f: Path("/proc/no/such/place"), OSError),
        (lambda f: (f / "out" / "learned_embeds.safetensors").mkdir(parents=True), OSError),
        (lambda f: (f / "out" / "personalization.json").mkdir(parents=True), OSError),
        (lambda f: (f / "out").mkdir() or (f / "out" / "previews").touch(), NotADirectoryError),
    ],
)
def test_the_folder_is_tried_before_the_work(place, error, pipe, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    output = place(tmp_path) or tmp_path / "out"
    monkeypatch.setattr(pipe.vae, "encode", forbidden)
    with pytest.raises(error, match="file|folder"):
        fit(pipe, output=output)


def test_a_full_disk_is_noticed_before_the_work(pipe, tmp_path, monkeypatch):
    """A limit on the size of files stands for it."""
    monkeypatch.setattr(pipe.vae, "encode", forbidden)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="output folder cannot be written to"):
            fit(pipe, output=tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_goes_away_does_not_take_the_token_with_it(pipe, tmp_path):
    output = tmp_path / "out"

    def vanish(trainer):
        if trainer.step == 2:
            shutil.rmtree(output)
            output.touch()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        token = fit(pipe, falling, output=output, callback=vanish, checkpoint_every=1)
    assert token.learned and token.steps == 6
    said = [str(warning.message) for warning in caught]
    assert any("the checkpoint cannot be written" in text for text in said)
    text = next(text for text in said if "the token is in" in text)
    refuge = Path(text.rpartition(" ")[2])
    name, (vectors,) = load_token(refuge)
    assert name == WORD and torch.equal(vectors, token.vectors)
    shutil.rmtree(refuge.parent)


def test_a_checkpoint_a_minute(pipe, tmp_path, monkeypatch):
    """Or at every step where a step takes longer."""
    seen = []

    def look(trainer):
        path = tmp_path / "checkpoint.safetensors"
        seen.append(len(load_file(path)["losses"]) if path.exists() else 0)

    options = {"output": tmp_path, "callback": look, "resume": False}
    fit(pipe, falling, **options)
    assert seen == [0] * 6  # a short run: only its end writes one
    assert len(load_file(tmp_path / "checkpoint.safetensors")["losses"]) == 6
    seen.clear()
    monkeypatch.setattr(personalizer, "CHECKPOINT_SECONDS", 0)
    fit(pipe, falling, **options)
    assert seen == [1, 2, 3, 4, 5, 6]


def checkpoint(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def changed(change):
    def damage(path):
        state, metadata = checkpoint(path)
        change(state, metadata)
        save_file(state, path, metadata=metadata)

    return damage


def edited(text):
    def change(state, metadata):
        record = json.loads(metadata["personalization"])
        del record["step"]
        metadata["personalization"] = text or json.dumps(record)

    return changed(change)


DAMAGES = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "empty": lambda path: path.write_bytes(b""),
    "a folder": lambda path: path.unlink() or path.mkdir(),
    "one bit": lambda path: path.write_bytes(
        (raw := path.read_bytes())[:-1] + bytes([raw[-1] ^ 1])
    ),
    "no metadata": changed(lambda state, metadata: metadata.clear()),
    "no checksum": changed(lambda state, metadata: metadata.pop("sha256")),
    "no field of the record": edited(""),
    "a record that is no record": edited("[]"),
    "no best token": changed(lambda state, metadata: state.pop("best")),
    "no state": changed(lambda state, metadata: state.pop("search.iterate")),
    "another shape": changed(lambda state, metadata: state.update(best=torch.zeros(2, 3))),
    "NaN": changed(lambda state, metadata: state["search.iterate"].fill_(torch.nan)),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    fit(build(), falling, output=folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoints_are_refused_in_one_line(damage, finished, pipe, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "out")
    path = tmp_path / "out" / "checkpoint.safetensors"
    damage(path)
    monkeypatch.setattr(pipe.vae, "encode", forbidden)
    with pytest.raises((ValueError, OSError)) as caught:
        fit(pipe, falling, output=tmp_path / "out")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.undo()
    if path.is_file():
        assert fit(pipe, falling, output=tmp_path / "out", resume=False).steps == 6


def test_previews_that_a_kill_took_are_made_up_for(pipe, tmp_path, monkeypatch):
    """Killed while drawing, after the checkpoint: the resumed run's pictures are the whole's."""
    options = {"preview_every": 2, "preview_options": SMALL, "checkpoint_every": 1}
    options |= {"evaluate_every": 1, "steps": 4}
    fit(pipe, falling, output=tmp_path / "whole", **options)

    def killed(self, *_):
        raise KeyboardInterrupt

    for step in (2, 4):  # the last step's too
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Personalizer, "speaking", killed)
            fit(pipe, falling, output=tmp_path / "parts", **options)
        assert len(load_file(tmp_path / "parts" / "checkpoint.safetensors")["losses"]) == step
        stop = {"callback": killed} if step == 2 else {}
        with pytest.raises(KeyboardInterrupt) if stop else contextlib.nullcontext():
            fit(pipe, falling, output=tmp_path / "parts", **options, **stop)
    whole, parts = (
        {p.name: p.read_bytes() for p in (tmp_path / name / "previews").iterdir()}
        for name in ("whole", "parts")
    )
    assert sorted(whole) == ["step-000002.png", "step-000004.png"] and whole == parts
    (tmp_path / "parts" / "previews" / "step-000004.png").unlink()
    fit(pipe, falling, output=tmp_path / "parts", **options)
    assert (tmp_path / "parts" / "previews" / "step-000004.png").exists()


def test_a_preview_is_of_the_best_token(pipe, tmp_path):
    """Not of the last one; and a run that stops early has one."""
    held_out = iter((3.0, 1.0, 2.0))

    def loss(embeddings, batch):
        if len(embeddings) > 1:
            return falling(embeddings, batch)
        return torch.tensor([next(held_out)])

    tokens = []
    options = {"preview_options": SMALL, "callback": lambda trainer: tokens.append(trainer.vectors)}
    fit(pipe, loss, output=tmp_path / "a", preview_every=6, **options)
    (path,) = (tmp_path / "a" / "previews").iterdir()
    assert path.name == "step-000003.png"
    drawn = []
    for vectors in (tokens[2], tokens[5]):
        with Personalizer(pipe).speaking(WORD, vectors) as speaking:
            noise = torch.Generator().manual_seed(0)
            drawn.append(speaking(WORD, generator=noise, **SMALL).images[0].tobytes())
    with Image.open(path) as image:
        assert image.tobytes() == drawn[0] != drawn[1]
    flat = lambda embeddings, _batch: torch.ones(len(embeddings))  # noqa: E731
    stop = {"patience": 1, "preview_every": 100, "steps": 50}
    fit(pipe, flat, output=tmp_path / "b", **options, **stop)
    assert [p.name for p in (tmp_path / "b" / "previews").iterdir()] == ["step-000000.png"]


def test_no_token_is_drawn_twice(tmp_path):
    drawn = []

    def draw():
        drawn.append(1)
        return Image.new("RGB", (4, 4))

    for _ in range(2):  # also by a run that goes on
        previews = Previews(draw, tmp_path, fresh=False)
        for step in (3, 3, 5):
            previews.write(step)
    assert len(drawn) == 2


def test_a_preview_that_fails_does_not_end_the_run(pipe, tmp_path):
    options = {"preview_every": 1, "evaluate_every": 1, "preview_options": SMALL | {"height": 5}}
    with pytest.warns(UserWarning, match=r"preview step-000001.png cannot be written .*divisible"):
        token = fit(pipe, falling, output=tmp_path, **options)
    assert token.steps == 6 and (tmp_path / "learned_embeds.safetensors").exists()


def test_pictures_of_another_run_do_not_stay(pipe, tmp_path):
    options = {"preview_every": 3, "preview_options": SMALL, "output": tmp_path, "resume": False}
    fit(pipe, falling, **options)
    first = {p.name: p.read_bytes() for p in (tmp_path / "previews").iterdir()}
    fit(pipe, falling, **(options | {"steps": 3, "initializer": torch.full((1, 16), 0.1)}))
    second = {p.name: p.read_bytes() for p in (tmp_path / "previews").iterdir()}
    assert list(second) == ["step-000003.png"] and len(first) == 2
    assert second["step-000003.png"] != first["step-000003.png"]
