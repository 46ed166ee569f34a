"""The one reader of image files."""

import io
import os
import struct
import subprocess
import sys
import zlib

import pytest
import torch
from PIL import Image

from pilotage.guidance.images import (
    check_depth,
    flattened,
    holds_several,
    is_transparent,
    listing,
    read_head,
    read_image,
    to_tensor,
)


def test_a_folder_is_listed_whole(tmp_path):
    """Every entry is in one list, those below a subfolder that is not entered excepted."""
    for folder in ("inner", "folder.png", ".git"):
        (tmp_path / folder).mkdir()
    names = ("b.PNG", "a.jpg", "c.txt", ".d-x.partial.png", "._b.PNG", "inner/a.png", "noend")
    for name in (*names, "folder.png/z.webp", ".git/x.png"):
        (tmp_path / name).touch()
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")

    def found(**options):
        lists = listing(tmp_path, **options)
        return [[f.relative_to(tmp_path).as_posix() for f in each] for each in lists]

    hidden, others = ["._b.PNG", ".d-x.partial.png", ".git"], ["c.txt", "noend", "pipe.png"]
    flat = ["a.jpg", "b.PNG", "gone.png"]
    assert found() == [flat, hidden, others, ["folder.png", "inner"]]
    below = [*flat[:2], "folder.png/z.webp", "gone.png", "inner/a.png"]
    assert found(nested=True) == [below, hidden, others, []]
    assert listing(tmp_path / "none") == ([], [], [], [])


def test_linked_folders_are_entered_unless_they_lead_up(tmp_path):
    for name in ("set/fox", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.png").touch()
    (tmp_path / "set" / "owl").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "fox" / "up").symlink_to("..")
    found = listing(tmp_path / "set", nested=True)
    assert [f.relative_to(tmp_path / "set").as_posix() for f in found.files] == [
        "fox/a.png",
        "owl/a.png",
    ]
    assert found.folders == [tmp_path / "set" / "fox" / "up"]


def test_an_image_is_read_upright(tmp_path):
    pixels = torch.arange(20, dtype=torch.uint8).view(4, 5)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(to_tensor(read_image(tmp_path / "a.png"))[0], pixels.rot90(-1))
    assert to_tensor(read_image(tmp_path / "a.png").convert("RGB")).shape == (3, 5, 4)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n"])
def test_what_is_no_image(content):
    with pytest.raises(ValueError, match="damaged, or no picture of a kind that is read"):
        read_image(io.BytesIO(content))


@pytest.mark.parametrize(
    ("module", "suffix", "content", "message"),
    [
        ("pillow_heif", ".heic", b"\0\0\0\x18ftypheic", "pip install pillow-heif"),
        ("PIL._avif", ".avif", b"\0\0\0\x18ftypavif", "need Pillow 11.3"),
    ],
)
def test_what_a_missing_plug_in_would_read(tmp_path, module, suffix, content, message):
    """Where the package is not installed; the head is of a real file, which the plug-in knows."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content + b"\0\0\0\0mif1")
    (text := tmp_path / "text.png").write_text("no picture of any kind")
    code = f"""
import sys
sys.modules["{module}"] = None
from pilotage.guidance.images import read_head, read_image
for read in (read_head, read_image):
    try: read("{path}")
    except ValueError as error: assert "{message}" in str(error), error
    else: raise AssertionError
try: read_image("{text}")
except ValueError as error: assert "damaged, or no picture" in str(error), error
else: raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def deep_png(kind, channels):
    """A PNG of 16 bits a channel, which PIL cannot write; of a type of colour of its standard."""
    rows = zlib.compress((b"\0" + bytes(range(8 * channels))) * 4)
    parts = {b"IHDR": struct.pack(">IIBBBBB", 4, 4, 16, kind, 0, 0, 0), b"IDAT": rows, b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts.items()
    )


@pytest.mark.parametrize(("kind", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_not_cut(tmp_path, kind, channels):
    path = tmp_path / "a.png"
    path.write_bytes(deep_png(kind, channels))
    for read in (read_head, read_image, holds_several):
        with pytest.raises(ValueError, match="convert it to 8 bits a channel first"):
            read(path)


def test_a_bitmap_of_five_bits_a_channel_is_none_of_sixteen(tmp_path):
    """BMP's 16 bits are those of a whole pixel."""
    pixels = struct.pack("<HH", 0b1111100000000000, 0b0000011111100000)  # red, green
    masks = struct.pack("<III", 0b1111100000000000, 0b0000011111100000, 0b11111)
    head = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0) + masks
    start = 14 + len(head)
    (tmp_path / "a.bmp").write_bytes(
        b"BM" + struct.pack("<IHHI", start + 4, 0, 0, start) + head + pixels
    )
    image = read_image(tmp_path / "a.bmp").convert("RGB")
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (0, 255, 0)]


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
    with pytest.raises(ValueError, match="damaged, or no picture"):
        read_head(tmp_path / "a.png")


def test_transparency_lies_flattened():
    half = Image.new("RGBA", (1, 1), (10, 20, 30, 51))  # a fifth
    assert flattened(half).getpixel((0, 0)) == (206, 208, 210)
    assert flattened(Image.new("LA", (1, 1), (100, 51)), colour=False).getpixel((0, 0)) == 224
    grey = Image.new("L", (1, 1), 77)
    assert flattened(grey).getpixel((0, 0)) == (77, 77, 77)
    keyed = Image.new("L", (1, 1), 77)
    keyed.info["transparency"] = 77
    assert flattened(keyed, colour=False).getpixel((0, 0)) == 255
    with pytest.raises(ValueError, match="mode 'F'"):
        flattened(Image.new("F", (1, 1)))
    assert flattened(half, background="black").getpixel((0, 0)) == (2, 4, 6)
    halves = Image.new("L", (4, 2))
    halves.paste(255, (2, 0, 4, 2))
    assert list(flattened(halves, False, 2).tobytes()) == [0, 255, 0, 255]


def test_what_is_transparent():
    clear = Image.new("RGBA", (2, 1), (1, 2, 3, 255))
    assert not is_transparent(clear) and not is_transparent(Image.new("CMYK", (2, 1)))
    clear.putpixel((1, 0), (1, 2, 3, 254))
    assert is_transparent(clear)
    keyed = Image.new("P", (2, 1), 3)
    keyed.info["transparency"] = 4
    assert not is_transparent(keyed)
    keyed.putpixel((1, 0), 4)
    assert is_transparent(keyed)
