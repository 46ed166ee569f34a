"""The one reader of image files."""

import io

import pytest
import torch
from PIL import Image

from pilotage.guidance.images import (
    check_depth,
    image_files,
    on_white,
    read_head,
    read_image,
    to_tensor,
)


def test_files_are_sorted_and_of_known_kinds(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "folder.png").mkdir()
    names = ("b.PNG", "a.jpg", "c.txt", ".d-x.partial.png", "inner/a.png")
    for name in names:
        (tmp_path / name).touch()

    def found(**options):
        return [f.relative_to(tmp_path).as_posix() for f in image_files(tmp_path, **options)]

    assert found() == ["a.jpg", "b.PNG"]
    assert found(nested=True) == ["a.jpg", "b.PNG", "inner/a.png"]
    assert found(suffixes=(".png",)) == ["b.PNG"]
    assert image_files(tmp_path / "none") == []


def test_an_image_is_read_upright_or_as_stored(tmp_path):
    pixels = torch.arange(20, dtype=torch.uint8).view(4, 5)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(to_tensor(read_image(tmp_path / "a.png"))[0], pixels.rot90(-1))
    stored = read_image(io.BytesIO((tmp_path / "a.png").read_bytes()), upright=False)
    assert torch.equal(to_tensor(stored)[0], pixels)
    assert to_tensor(stored.convert("RGB")).shape == (3, 4, 5)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n"])
def test_what_is_no_image(content):
    with pytest.raises(ValueError, match="cannot identify"):
        read_image(io.BytesIO(content))


def test_deep_images_are_refused():
    with pytest.raises(ValueError, match="mode 'I;16': convert it to 8 bits"):
        check_depth(Image.new("I;16", (2, 2)))


def test_a_head_says_what_reading_gives(tmp_path):
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (5, 4)).save(tmp_path / "a.png", exif=exif)
        height, width, colour = read_head(tmp_path / "a.png")
        assert (width, height) == read_image(tmp_path / "a.png").size and colour
    Image.new("LA", (3, 4)).save(tmp_path / "a.png")
    assert read_head(tmp_path / "a.png") == (4, 3, False)
    (tmp_path / "a.png").write_bytes(b"hello")
    with pytest.raises(ValueError, match="cannot identify"):
        read_head(tmp_path / "a.png")


def test_transparency_lies_on_white():
    half = Image.new("RGBA", (1, 1), (10, 20, 30, 51))  # a fifth
    assert on_white(half).getpixel((0, 0)) == (206, 208, 210)
    assert on_white(Image.new("LA", (1, 1), (100, 51)), colour=False).getpixel((0, 0)) == 224
    grey = Image.new("L", (1, 1), 77)
    assert on_white(grey).getpixel((0, 0)) == (77, 77, 77)
    keyed = Image.new("L", (1, 1), 77)
    keyed.info["transparency"] = 77
    assert on_white(keyed, colour=False).getpixel((0, 0)) == 255
    with pytest.raises(ValueError, match="mode 'F'"):
        on_white(Image.new("F", (1, 1)))
    halves = Image.new("L", (4, 2))
    halves.paste(255, (2, 0, 4, 2))
    assert list(on_white(halves, False, 2).tobytes()) == [0, 255, 0, 255]
