"""What a run begins from and sees: captions, held-out pictures, embeddings to continue."""

import pytest
import torch

from pilotage.pipelines.personalization import DiffusionTokenLoss, Personalizer, save_token
from pilotage.pipelines.personalization.inputs import captions, list_images, picture_names

from .tiny import PROMPTS, SHORT, WORD, build, fit, pictures, word


@pytest.fixture(scope="module")
def pipe():
    return build()


def folder_of(path, texts=(), count=3):
    path.mkdir()
    for i, image in enumerate(pictures(count)):
        image.save(path / f"{i}.png")
    for i, text in enumerate(texts):
        (path / f"{i}.txt").write_text(text)
    return path


CAPTIONS = ["a {} on a hill", f"\n three {WORD} at dawn\n", "the {}"]
TEXTS = ["a {} on a hill", "three {} at dawn", "the {}"]
DEFAULT = {key: value for key, value in SHORT.items() if key != "templates"}


@pytest.mark.parametrize("vectors", [1, 2])
def test_captions_are_the_prompts_of_their_pictures(pipe, tmp_path, vectors):
    """As prompts that are given; also of held-out pictures."""
    folder, plain = folder_of(tmp_path / "a", CAPTIONS), folder_of(tmp_path / "b")
    listed = list_images(folder)
    assert captions(listed, WORD) == tuple(TEXTS)
    assert captions(list_images(plain), WORD) is captions(pictures(), WORD) is None
    assert picture_names(listed) == ("0.png", "1.png", "2.png")

    def learn(images, **options):
        options = DEFAULT | {"vectors": vectors} | options
        return Personalizer(pipe).fit(images, WORD, word(pipe), **options)

    given = learn(plain, prompts=TEXTS, held_out=plain, held_out_prompts=TEXTS)
    found = learn(folder, held_out=folder)
    assert (found.losses, found.evaluations) == (given.losses, given.evaluations)
    assert learn(folder, prompts=PROMPTS + PROMPTS[:1]).losses != found.losses
    assert learn(plain).losses != found.losses


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (CAPTIONS[:2], r"2.png has no caption \(.txt\) beside it"),
        (["a cat", *CAPTIONS[1:]], r"0.txt: .*exactly one \{\}.*'a cat', or <my-cat> once"),
        (["", *CAPTIONS[1:]], "0.txt: "),
        ([f"{WORD} and {WORD}", *CAPTIONS[1:]], "0.txt: .*exactly one"),
        ([f"{WORD} in {{x}}", *CAPTIONS[1:]], "0.txt: .*no other braces"),
    ],
)
def test_captions_that_cannot_be_used(pipe, tmp_path, texts, message):
    with pytest.raises(ValueError, match=message):
        captions(list_images(folder_of(tmp_path / "a", texts)), WORD)


def test_captions_that_are_no_text_or_beside_templates(pipe, tmp_path):
    folder = folder_of(tmp_path / "a", CAPTIONS)
    with pytest.raises(ValueError, match="captions beside them, and templates are given"):
        fit(pipe, images=folder)
    fit(pipe, images=folder, held_out=pictures(2), steps=1)  # here they have a use
    (folder / "1.txt").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"1.txt: .*decode"):
        captions(list_images(folder), WORD)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_run_continues_from_a_token_file(family, tmp_path):
    pipe = build(family)
    widths = DiffusionTokenLoss(pipe).widths
    rows = 0.3 * torch.randn(2, sum(widths), generator=torch.Generator().manual_seed(0))
    path = tmp_path / "t.safetensors"
    save_token(path, rows.split(widths, dim=1), "<other>")
    options = {"words": None, "steps": 3}
    compared = []
    note = {"callback": lambda trainer: compared.append(trainer.comparing_words)}
    token = fit(pipe, initializer=path, **options, **note)
    assert compared == [False] * 3
    fit(pipe, initializer=path, **(options | {"words": 7}), **note)
    assert compared[3:] == [True] * 3
    assert token.vectors.shape == rows.shape
    for start in (str(path), rows):
        other = fit(pipe, initializer=start, **options)
        assert torch.equal(other.vectors, token.vectors) and other.losses == token.losses
    still = fit(pipe, lambda e, _: (e - rows).square().sum((1, 2)), initializer=path, **options)
    assert still.evaluations[0][2] == 0 and torch.equal(still.vectors, rows)
    with pytest.raises(ValueError, match=r"must have shape \(1, \d+\)"):
        fit(pipe, initializer=path, vectors=1)
    with pytest.raises(FileNotFoundError, match="no token file"):
        fit(pipe, initializer="gone.safetensors")
    other = build("sdxl" if family == "sd" else "sd")
    with pytest.raises(ValueError, match="must have shape"):
        fit(other, initializer=path)
