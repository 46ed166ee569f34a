"""Pictures of real folders: every kind of file gives the values of the picture it shows."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from pilotage.eval.metrics.images import colourfulness, contrast, saturation
from pilotage.eval.metrics.per_picture import measure
from pilotage.eval.pictures import Pictures, Reading, load_pictures


def made(size=(20, 12), seed=0):
    """Smooth colours, which survive compression."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def write(folder, count=5, size=(8, 8), suffix=".png", seed=0):
    folder.mkdir(exist_ok=True)
    arrays = np.random.default_rng(seed).integers(0, 256, (count, *size[::-1], 3), dtype=np.uint8)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i:02d}{suffix}")
    return arrays


def test_in_order_and_batches(tmp_path):
    arrays = write(tmp_path)
    (tmp_path / "notes.txt").write_text("not a picture")
    expected = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(load_pictures(tmp_path), expected)
    parts = list(Pictures.of(tmp_path).batches(2))
    assert [len(part) for part in parts] == [2, 2, 1] and torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".bmp", ".tif", ".TIFF", ".webp"])
def test_kinds_without_loss(tmp_path, suffix):
    image = made()
    image.save(tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    assert torch.equal(load_pictures(tmp_path), tensor(image))


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".jfif", ".webp", ".avif", ".heic"])
def test_kinds_with_loss(tmp_path, suffix):
    image = made((40, 32))
    if suffix == ".heic":
        from pillow_heif import from_pillow

        from_pillow(image).save(tmp_path / "a.heic", quality=95)
    else:
        image.save(tmp_path / f"a{suffix}", quality=95)
    assert (load_pictures(tmp_path) - tensor(image)).abs().mean() < 0.02


def test_the_first_picture_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (12, 12), colour) for colour in ("red", "blue", "lime")]
    options = {"save_all": True, "append_images": frames[1:]}
    for name in ("a.gif", "b.png", "c.tif"):
        frames[0].save(tmp_path / name, **options)
    frames[0].save(tmp_path / "d.webp", lossless=True, **options)
    frames[0].save(tmp_path / "e.png")
    pictures = Pictures.of(tmp_path)
    (batch,) = pictures.batches()
    assert torch.equal(batch, tensor(frames[0]).expand(5, -1, -1, -1))
    assert pictures.first_only == ["a.gif", "b.png", "c.tif", "d.webp"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_has_the_values_of_its_upright_copy(tmp_path, orientation):
    """All eight orientations of EXIF: stored so, shown upright."""
    turned = made()
    ways = [*[None] * 2, *(Image.Transpose(i) for i in (0, 3, 1, 5, 4, 6, 2))]  # undo: 2, 3, 4, ...
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("turned", "upright"):
        (tmp_path / name).mkdir()
    turned.save(tmp_path / "turned" / "a.jpg", exif=exif, quality=95, subsampling=0)
    stored = Image.open(tmp_path / "turned" / "a.jpg").convert("RGB")
    upright = stored if orientation == 1 else stored.transpose(ways[orientation])
    upright.save(tmp_path / "upright" / "a.png")
    assert torch.equal(load_pictures(tmp_path / "turned"), load_pictures(tmp_path / "upright"))


def values(folder, **options):
    found = measure(Pictures.of(folder, Reading(**options)))
    return {name: value.tolist() for name, value in found.items()}


def test_hidden_colours_do_not_count(tmp_path):
    """What full transparency hides is not measured; half of it is mixed with the background."""
    shown, hidden = tmp_path / "shown", tmp_path / "hidden"
    for folder in (shown, hidden):
        folder.mkdir()
    image = Image.new("RGBA", (16, 16), (0, 255, 0, 0))  # saturated green that nobody sees
    image.paste((255, 0, 0, 255), (0, 0, 8, 16))
    image.paste((0, 0, 255, 51), (8, 0, 12, 16))  # a fifth
    image.save(hidden / "a.png")
    image.quantize(4).save(hidden / "b.png")
    seen = Image.new("RGB", (16, 16), "white")
    seen.paste((255, 0, 0), (0, 0, 8, 16))
    seen.paste((204, 204, 255), (8, 0, 12, 16))
    for name in "ab":
        seen.save(shown / f"{name}.png")
    assert values(hidden) == values(shown)
    assert values(shown)["saturation"] == pytest.approx([0.55, 0.55])
    assert saturation(tensor(image.convert("RGB"))).item() > 0.9
    pictures = Pictures.of(hidden, Reading(background="black"))
    (batch,) = pictures.batches()
    assert batch[:, :, 0, 15].unique().tolist() == [0] and batch[0, 2, 0, 8] == pytest.approx(0.2)
    assert pictures.transparent == ["a.png", "b.png"]


def test_modes(tmp_path):
    """Grey, palettes, CMYK and an opaque alpha channel show what they are."""
    grey = made().convert("L")
    grey.save(tmp_path / "a.png")
    grey.convert("LA").save(tmp_path / "b.png")
    grey.convert("RGBA").save(tmp_path / "c.png")
    grey.convert("P").save(tmp_path / "d.gif")
    pictures = Pictures.of(tmp_path)
    (batch,) = pictures.batches()
    assert torch.equal(batch, tensor(grey.convert("RGB")).expand(4, -1, -1, -1))
    assert pictures.transparent == []
    (tmp_path / "print").mkdir()
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "print" / "a.tif")
    assert load_pictures(tmp_path / "print")[0, :, 0, 0].tolist() == [1, 0, 0]
    (tmp_path / "press").mkdir()  # JPEG, whose CMYK is stored inverted
    Image.new("CMYK", (8, 8), (255, 0, 0, 51)).save(tmp_path / "press" / "a.jpg", quality=95)
    found = load_pictures(tmp_path / "press")[0, :, 4, 4]
    torch.testing.assert_close(found, torch.tensor([0, 0.8, 0.8]), rtol=0, atol=0.02)
    (tmp_path / "bits").mkdir()
    Image.new("1", (4, 4), 1).save(tmp_path / "bits" / "a.png")
    assert load_pictures(tmp_path / "bits").unique().tolist() == [1]


def test_class_folders(tmp_path):
    for i, name in enumerate(("fox", "owl")):
        write(tmp_path / name, 2, seed=i)
    with pytest.raises(ValueError, match=r"holds no pictures.*subfolders \(--recursive\): 2 \(fox"):
        Pictures.of(tmp_path)
    pictures = Pictures.of(tmp_path, Reading(recursive=True))
    names = [pictures.name(file) for file in pictures.files]
    assert names == ["fox/00.png", "fox/01.png", "owl/00.png", "owl/01.png"]
    expected = torch.cat([load_pictures(tmp_path / name) for name in ("fox", "owl")])
    assert torch.equal(torch.cat(list(pictures.batches(3))), expected)


def test_no_pictures(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no pictures"):
        Pictures.of(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        Pictures.of(tmp_path / "missing")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tif", ".avif"])
@pytest.mark.parametrize("keep", [0, 20, 0.6])
def test_damaged_file_is_named(tmp_path, suffix, keep):
    write(tmp_path, 3, size=(32, 32), suffix=suffix)
    path = tmp_path / f"01{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(ValueError, match=f"01{suffix} cannot be read"):
        list(Pictures.of(tmp_path).batches())


def test_a_look_finds_what_cannot_be_read(tmp_path):
    write(tmp_path, 2)
    Pictures.of(tmp_path).check()
    (tmp_path / "02.png").symlink_to("nowhere.png")
    with pytest.raises(ValueError, match="02.png cannot be read"):
        Pictures.of(tmp_path).check()
    (tmp_path / "02.png").unlink()
    Image.new("RGB", (8, 9)).save(tmp_path / "02.png")
    for read in (Pictures.check, lambda pictures: list(pictures.batches(1))):
        with pytest.raises(ValueError, match="02.png is 8x9, but 00.png is 8x8.*--resize"):
            read(Pictures.of(tmp_path))
    Pictures.of(tmp_path, Reading(resize="8")).check()


@pytest.mark.parametrize("size", [(40, 24), (24, 61), (9, 7), (16, 16)])
def test_shorter_side_and_middle(tmp_path, size):
    """As CLIP's image processor in transformers does it."""
    image = made(size)
    image.save(tmp_path / "a.png")
    reference = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=16, resample=3, do_normalize=False
    )
    expected = reference(images=image, return_tensors="pt")["pixel_values"]
    found = load_pictures(tmp_path, Reading(resize="16"))
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-7)


def test_the_middle_of_an_odd_rest(tmp_path):
    """(39 - 16) / 2 becomes 12 in torchvision's CenterCrop, which rounds halves to even numbers."""
    image = made((25, 61))
    image.save(tmp_path / "a.png")
    resized = image.resize((16, 39), Image.Resampling.BICUBIC)
    found = load_pictures(tmp_path, Reading(resize="16"))
    assert torch.equal(found, tensor(resized.crop((0, 12, 16, 28))))


@pytest.mark.parametrize("size", [(40, 24), (25, 61), (9, 7)])
def test_clean_fids_resizing(tmp_path, size):
    """Bicubic, antialiased, not rounded: PyTorch's in float64 is the same to PIL's float32."""
    image = made(size)
    image.save(tmp_path / "a.png")
    expected = torch.nn.functional.interpolate(
        tensor(image).double(), (16, 16), mode="bicubic", antialias=True
    ).clamp(0, 1)
    found = load_pictures(tmp_path, Reading(resize="clean:16"))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


def test_mixed_sizes_become_one(tmp_path):
    for i, size in enumerate([(40, 24), (25, 61), (16, 16)]):
        made(size).save(tmp_path / f"{i}.png")
    found = load_pictures(tmp_path, Reading(resize="16"))
    assert found.shape == (3, 3, 16, 16)
    assert torch.equal(found[2:], tensor(made((16, 16))))  # of that size already: as it is


@pytest.mark.parametrize("resize", ["", "0", "-3", "16x16", "squash:16", "clean:"])
def test_no_form_of_resizing(resize):
    with pytest.raises(ValueError, match="a side in pixels or clean:SIDE"):
        Reading(resize=resize)


@pytest.mark.parametrize("background", ["whitish", "#ffffff80", ""])
def test_no_background(background):
    with pytest.raises(ValueError, match="unknown color|cannot be transparent"):
        Reading(background=background)


def test_metrics_of_what_is_read(tmp_path):
    image = made()
    image.save(tmp_path / "a.png")
    expected = {
        m.__name__: m(tensor(image)).tolist() for m in (saturation, contrast, colourfulness)
    }
    assert values(tmp_path).items() >= expected.items()
