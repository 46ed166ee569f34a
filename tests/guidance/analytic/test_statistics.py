"""Mean, covariance and their spectral functions; merging, resuming, files; images in."""

import itertools
import json
import warnings

import pytest
import torch
from PIL import Image

from examples.studies.analytic.baseline import (
    decoding,
    local_denoiser,
    optimal_denoiser,
    optimal_product,
    resident,
)
from pilotage.guidance.analytic import (
    DatasetStatistics,
    LocalDenoiser,
    OptimalDenoiser,
    accumulate,
    decode,
    images,
    load_images,
    size_for,
    statistics,
)
from pilotage.guidance.analytic.accumulate import Accumulator
from pilotage.guidance.analytic.schedules import CROPS, WINDOWS, nearest

from ...oracles import analytic as oracles
from .test_denoisers import LATENTS, data, noisy

X = data(120)
IMAGES = {"full": X, "low_rank": X[:40], "stationary": X}
KINDS = tuple(IMAGES)
UINT8 = torch.randint(
    0, 256, (50, 3, 4, 5), generator=torch.Generator().manual_seed(7), dtype=torch.uint8
)


def make(kind):
    """Few images of as many coordinates span a part of them, large images are stationary."""
    with pytest.MonkeyPatch.context() as patch:
        if kind == "stationary":
            patch.setattr(statistics, "LARGEST_DENSE", 0)
            patch.setattr(statistics, "LARGEST_SKETCH", 0)
            patch.setattr(statistics, "DIRECTIONS", 20)
            with pytest.warns(UserWarning, match="120 images of 60 .* stationary"):
                found = DatasetStatistics.from_images(IMAGES[kind], **LATENTS)
        else:
            found = DatasetStatistics.from_images(IMAGES[kind], **LATENTS)
    assert found.kind == kind
    return found


def dense(found):
    """The covariance that statistics stand for, through `apply` on unit vectors."""
    n = found.dimension
    unit = torch.eye(n, dtype=torch.float64).view(n, *found.shape)
    return found.apply(unit, lambda values: values).flatten(1)


def test_full_covariance_is_the_population_covariance():
    found, (mean, cov) = make("full"), oracles.covariance(X)
    torch.testing.assert_close(found.mean.flatten(), mean)
    torch.testing.assert_close(dense(found), cov, rtol=0, atol=1e-13)
    assert float(dense(found).trace()) == pytest.approx(float(cov.trace()), rel=1e-12)


@pytest.mark.parametrize("count", [2, 5, 40, 60])
@pytest.mark.parametrize("few", [True, False])
def test_no_more_images_than_coordinates_give_the_whole_covariance(monkeypatch, count, few):
    """All N - 1 directions, nothing outside them; as one block, and in blocks of rows."""
    if few:
        monkeypatch.setattr(statistics, "LARGEST_DENSE", 0)
    found = DatasetStatistics.from_images(list(X[:count]), **LATENTS)
    _, cov = oracles.covariance(X[:count])
    assert (found.kind, found.residual) == ("low_rank", 0)
    assert found.eigenvalues.shape == (count - 1,)
    torch.testing.assert_close(dense(found), cov, rtol=0, atol=1e-12)
    for sigma in (0.05, 1.0):
        y = noisy(X, sigma, 4)
        exact = oracles.wiener_matrix(X[:count], sigma)
        mean = X[:count].mean(0)
        wanted = mean + ((y - mean).flatten(1) @ exact.T).view_as(y)
        torch.testing.assert_close(found.wiener(y, sigma), wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("images", [X, X[:40]])
def test_a_rank_keeps_the_leading_directions_and_the_total_variance(images):
    _, cov = oracles.covariance(images)
    values, vectors = torch.linalg.eigh(cov)
    share = float(values[:-20].sum() / values.sum())
    with pytest.warns(UserWarning, match=f"keeps 20 directions and .* other {share:.1%}"):
        found = DatasetStatistics.from_images(images, rank=20, **LATENTS)
    values[:-20] = values[:-20].mean()
    torch.testing.assert_close(dense(found), (vectors * values) @ vectors.T, rtol=0, atol=1e-12)
    assert float(dense(found).trace()) == pytest.approx(float(cov.trace()), rel=1e-12)
    for rank in (0, 60):
        with pytest.raises(ValueError, match="between 1 and 59"):
            DatasetStatistics.from_images(images, rank=rank, **LATENTS)


def test_more_directions_than_the_limit_are_cut_and_said(monkeypatch):
    monkeypatch.setattr(statistics, "LARGEST_DENSE", 30)
    monkeypatch.setattr(statistics, "RANK", 20)
    monkeypatch.setattr(statistics, "DIRECTIONS", 50)
    with pytest.warns(UserWarning, match="120 images of 60 coordinates: .* keeps 20 directions"):
        found = DatasetStatistics.from_images(X, **LATENTS)
    _, cov = oracles.covariance(X)
    assert float(dense(found).trace()) == pytest.approx(float(cov.trace()), rel=1e-12)
    assert found.eigenvalues.shape == (20,)
    monkeypatch.setattr(statistics, "BASIS", 8 * 60 * 10)
    with pytest.raises(ValueError, match="between 1 and 10 for n = 60, got 11"):
        DatasetStatistics.from_images(X, rank=11, **LATENTS)


def test_of_few_images_the_unseen_directions_are_not_taken_to_be_explained():
    """The share of the score that few images explain is an estimate, as `rank` would make it."""
    few = DatasetStatistics.from_images(X[:40], **LATENTS)
    with pytest.warns(UserWarning, match="keeps 19"):
        cut = DatasetStatistics.from_images(X[:40], rank=19, **LATENTS)
    for sigma in (0.05, 0.3, 2.0):
        assert few.explained(sigma) == pytest.approx(cut.explained(sigma), rel=1e-12)
    assert few.explained(0.05) < 0.1  # of 60 directions 21 have no variance in these images


def test_stationary_covariance_is_the_mean_over_cyclic_shifts():
    _, cov = oracles.covariance(X)
    c, h, w = X.shape[1:]
    cov = cov.view(c, h, w, c, h, w)
    shifts = [
        cov.roll((i, j, i, j), (1, 2, 4, 5)).reshape(c * h * w, -1)
        for i in range(h)
        for j in range(w)
    ]
    expected = torch.stack(shifts).mean(0)
    found = make("stationary")
    torch.testing.assert_close(dense(found), expected, rtol=0, atol=1e-12)
    assert float(dense(found).trace()) == pytest.approx(float(expected.trace()), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_wiener_and_teleport(kind):
    found = make(kind)
    cov, mean = dense(found), found.mean.flatten()
    part = found.matrix_rows(lambda values: values, slice(7, 20))
    torch.testing.assert_close(part, cov[7:20], rtol=0, atol=1e-12)
    diagonal = found.matrix_diagonal(lambda values: values)
    torch.testing.assert_close(diagonal, cov.diagonal(), rtol=0, atol=1e-12)
    y = noisy(X, 1.0)
    for row, level in enumerate((0.3, 1.0, 7.0)):
        total = cov + level**2 * torch.eye(len(cov)).double()
        residual = y[row].flatten() - mean
        step = torch.linalg.solve(total, residual)
        wiener = found.wiener(y, level)[row].flatten()
        torch.testing.assert_close(wiener, mean + cov @ step, rtol=0, atol=1e-11)
        if kind != "low_rank":
            share = float(torch.linalg.inv(total).trace()) * level**2 / len(cov)
            assert found.explained(level) == pytest.approx(share, rel=1e-10)
        whole = found.teleport(y, (1.0, 50.0), (1.0, 0.2))
        half = found.teleport(y, (1.0, 50.0), (1.0, level))
        parts = found.teleport(half, (1.0, level), (1.0, 0.2))
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
        assert (whole - y).abs().max() > 0.1
    torch.testing.assert_close(found.wiener(y, torch.inf)[0], found.mean)
    near = y  # the nearest image of the span
    if kind == "low_rank":
        near = found.mean + found.apply(y - found.mean, lambda values: (values > 0).double())
    for level in (1e-8, 0.0):
        torch.testing.assert_close(found.wiener(y, level), near, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", (*KINDS, "rank"))
def test_rows_and_diagonal_of_a_function_of_the_covariance(kind):
    """f(0) is not 0, so that what lies outside the basis counts; where nothing does, infinite."""
    if kind == "rank":
        with pytest.warns(UserWarning, match="keeps 20 directions"):
            found = DatasetStatistics.from_images(X, rank=20, **LATENTS)
        assert found.residual > 0.01
    else:
        found = make(kind)
    least = 0.0 if kind == "full" else 0.1
    values, vectors = torch.linalg.eigh(dense(found))
    expected = vectors @ torch.diag(1 / (values + least)) @ vectors.T
    rows = found.matrix_rows(lambda v: 1 / (v + least), slice(7, 20))
    diagonal = found.matrix_diagonal(lambda v: 1 / (v + least))
    torch.testing.assert_close(rows, expected[7:20], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(diagonal, expected.diagonal(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_teleport_solves_the_probability_flow(kind):
    found = make(kind)
    x = found.mean + 5.0 * torch.randn(2, *found.shape, generator=torch.Generator().manual_seed(4))
    grid = torch.logspace(torch.log10(torch.tensor(5.0)), -0.5, 400).double()
    grid[0] = 5.0
    start = x
    for a, b in itertools.pairwise(grid.tolist()):  # Heun on dx = -sigma score dsigma
        slope = (x - found.wiener(x, a)) / a
        ahead = x + (b - a) * slope
        x = x + (b - a) / 2 * (slope + (ahead - found.wiener(ahead, b)) / b)
    exact = found.teleport(start, (1.0, 5.0), (1.0, float(grid[-1])))
    torch.testing.assert_close(exact, x, rtol=0, atol=1e-4)
    assert (exact - start).abs().max() > 1


@pytest.mark.parametrize("beyond", ["rows", "dense", "cut", "stationary"])
def test_blocks_are_one_pass(beyond):
    size = 200 if beyond == "rows" else 60
    one, parts = (Accumulator(X.shape[1:], size, beyond, 60) for _ in range(2))
    one.add(X)
    for block in X.split(11):
        parts.add(block)
    assert parts.form == one.form == beyond
    assert (parts.count, parts.hash) == (one.count, one.hash)
    assert parts.total == pytest.approx(one.total, rel=1e-12)
    torch.testing.assert_close(parts.mean, one.mean)
    a, b = (
        part.second.T @ part.second if beyond in ("rows", "cut") else part.second
        for part in (parts, one)
    )
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    if beyond != "stationary":
        a = a if beyond == "dense" else parts.second.T @ parts.second
        torch.testing.assert_close(a / 120, oracles.covariance(X)[1], rtol=0, atol=1e-12)


def test_a_cut_never_exceeds_the_covariance_and_its_total_is_exact():
    cut = Accumulator(X.shape[1:], 25, "cut", 15)
    for block in X.split(13):
        cut.add(block)
    _, cov = oracles.covariance(X)
    error = torch.linalg.eigvalsh(len(X) * cov - cut.second.T @ cut.second)
    assert error[0] > -1e-9 and error[-1] > 0.1
    assert cut.total == pytest.approx(float(len(X) * cov.trace()), rel=1e-12)


def test_a_cut_is_exact_where_the_rank_is_small(monkeypatch):
    monkeypatch.setattr(statistics, "LARGEST_DENSE", 30)
    monkeypatch.setattr(statistics, "RANK", 8)
    monkeypatch.setattr(statistics, "DIRECTIONS", 40)
    thin = data(300)
    thin.flatten(1)[:, :] = thin.flatten(1)[:, :8] @ torch.randn(
        8, 60, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    found = DatasetStatistics.from_images(thin, **LATENTS)
    assert found.kind == "low_rank"
    torch.testing.assert_close(dense(found), oracles.covariance(thin)[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_keep_everything(kind):
    found = make(kind)
    tensors, facts = found.parts()
    assert not any(tensor.is_complex() for tensor in tensors.values())
    again = DatasetStatistics.from_parts(tensors, json.loads(json.dumps(facts)))
    y = noisy(X, 1.0)
    assert torch.equal(again.wiener(y, 1.0), found.wiener(y, 1.0))
    for name in ("shape", "count", "kind", "identity"):
        assert getattr(again, name) == getattr(found, name)


def test_every_kind_of_source_gives_the_same_statistics(tmp_path):
    labels = torch.arange(len(UINT8)) % 2
    for number, (image, label) in enumerate(zip(UINT8, labels.tolist(), strict=True)):
        path = tmp_path / f"class{label}" / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in UINT8]
    floats = decode(UINT8, torch.float64)
    sources = {
        "tensor": UINT8,
        "iterator": iter(UINT8),
        "pairs": list(zip(pictures, labels, strict=True)),
        "pair": (UINT8, labels),
        "dicts": [{"image": picture, "label": 1} for picture in pictures],
        "folder": tmp_path,
        "torch": torch.utils.data.TensorDataset(UINT8, labels),
    }
    expected = DatasetStatistics.from_images(floats)
    for name, source in sources.items():
        found = DatasetStatistics.from_images(source)
        assert found.kind == "low_rank" and found.count == 50, name
        torch.testing.assert_close(found.mean, expected.mean, msg=name)
        torch.testing.assert_close(dense(found), dense(expected), rtol=0, atol=1e-12, msg=name)
    unit = DatasetStatistics.from_images(floats / 2 + 0.5, value_range=(0, 1))
    torch.testing.assert_close(unit.mean, expected.mean)
    images, classes = load_images(tmp_path)
    assert classes.tolist() == [0] * 25 + [1] * 25
    assert torch.equal(images, torch.cat([UINT8[labels == 0], UINT8[labels == 1]]))
    for source in ((UINT8, labels), [UINT8, labels.to(torch.uint8)]):
        images, classes = load_images(source)
        assert torch.equal(images, UINT8) and torch.equal(classes, labels)
    with pytest.raises(ValueError, match="49 labels for 50 images"):
        load_images((UINT8, labels[1:]))
    # Two pictures, the second of which is no list of labels.
    images, classes = load_images((UINT8[0], UINT8[1]))
    assert torch.equal(images, UINT8[:2]) and classes is None


def picture(mode, size=(5, 4)):
    return Image.new(mode, size)


NAN = X.clone()
NAN[17, 0, 0, 0] = torch.nan


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (X[:1], LATENTS, "at least two images, got 1"),
        (X[:1].expand(9, -1, -1, -1), LATENTS, "all 9 images are the same"),
        (NAN, LATENTS, "image 17 contains NaN"),
        (list(NAN), LATENTS, "image 17 contains NaN"),
        (X * 9, {"value_range": (-1, 1)}, "expected 1 or 3 channels, got 2: an alpha channel"),
        (X[:, :1] * 9, {}, r"pixels from .* declared as \[-1, 1\]"),
        ([picture("L"), picture("RGB")], {}, "mixed images: shape"),
        ([picture("L"), picture("L", (6, 4))], {}, "mixed images: shape"),
        ([picture("I;16")], {}, "mode 'I;16': convert it to 8 bits a channel first"),
        ([(X[0], 1), X[1]], LATENTS, "mixed images: with a label"),
        ([X[0], UINT8[0]], LATENTS, "mixed images"),
        ([{"text": "a"}], {}, "no image among"),
        ([], {}, "no images"),
        (UINT8.int(), {}, "expected uint8 or floating point"),
    ],
)
def test_bad_images_are_refused(source, options, message):
    with pytest.raises(ValueError, match=message):
        DatasetStatistics.from_images(source, **options)


def test_an_unreadable_picture_in_a_folder_is_named(tmp_path):
    picture("I;16").save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: mode 'I;16': convert it to 8 bits"):
        load_images(tmp_path)
    with pytest.raises(ValueError, match="no pictures in"):
        load_images(tmp_path / "nothing")


def photos(folder):
    """A user's folder: sizes, formats and modes as they come; what they are on white, in [0, 1]."""
    draw = torch.Generator().manual_seed(3)
    wanted = {}
    for name, mode, size in (
        ("a.jpg", "RGB", (64, 48)),
        ("b.png", "RGBA", (40, 60)),
        ("c.png", "L", (50, 50)),
        ("d.png", "LA", (33, 70)),
        ("e.gif", "P", (45, 45)),
        ("f.jpg", "CMYK", (52, 41)),
        ("g.png", "1", (47, 40)),
    ):
        bands = 1 if mode in ("P", "1") else len(mode)
        shape = (size[1], size[0], bands)
        noise = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
        plain = "L" if bands == 1 else mode
        image = Image.frombytes(plain, size, noise.numpy().tobytes()).convert(mode)
        image.save(folder / name)
        wanted[name] = image
    return wanted


def test_a_folder_of_photos_becomes_squares_on_white(tmp_path):
    made = photos(tmp_path)
    found, _ = load_images(tmp_path, size=20)
    assert found.shape == (7, 3, 20, 20) and found.dtype == torch.uint8
    # Transparency by hand, in floats, before the crop: rounding and resizing are all that differ.
    pixels = torch.frombuffer(bytearray(made["b.png"].tobytes()), dtype=torch.uint8)
    pixels = pixels.view(60, 40, 4).float()
    white = pixels[..., :3] * pixels[..., 3:] / 255 + 255 - pixels[..., 3:]
    image = Image.fromarray(white.round().to(torch.uint8).numpy())
    image = image.resize((20, 20), Image.Resampling.BICUBIC, box=(0, 10, 40, 50))
    wanted = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(20, 20, 3)
    assert (found[1].permute(1, 2, 0).int() - wanted.int()).abs().max() <= 2
    assert (found[2][0] == found[2][1]).all() and (found[2][0] == found[2][2]).all()
    with pytest.raises(ValueError, match="shape is .*pass size to crop"):
        load_images(tmp_path)
    grey = tmp_path / "grey"
    grey.mkdir()
    picture("LA", (30, 20)).save(grey / "a.png")
    assert torch.equal(load_images(grey)[0], torch.full((1, 1, 20, 30), 255, dtype=torch.uint8))
    for source in (UINT8, list(UINT8)):
        with pytest.raises(ValueError, match="size=20 is for files and PIL images"):
            load_images(source, size=20)


def test_the_size_of_a_folder(tmp_path, monkeypatch):
    def accept(shape):
        if shape[1] > 40:
            raise ValueError("too large")

    def side(channels, count):
        return 90 // (channels * count)

    picture("L", (31, 40)).save(tmp_path / "a.png")
    assert size_for(tmp_path, accept, side) == (None, "")
    monkeypatch.setattr(images, "MEMORY", 31 * 40 - 1)
    assert size_for(tmp_path, accept, side)[0] == 31  # never larger than the smallest
    monkeypatch.undo()
    picture("L", (30, 41)).save(tmp_path / "a.png")
    assert size_for(tmp_path, accept, side)[0] == 30
    picture("RGB", (50, 60)).save(tmp_path / "b.png")
    size, why = size_for(tmp_path, accept, side)
    assert size == 15 and "2 pictures of 30 x 41 to 50 x 60 pixels, cropped to" in why
    exif = Image.Exif()
    exif[0x0112] = 6
    picture("RGB", (60, 50)).save(tmp_path / "a.png", exif=exif)
    assert size_for(tmp_path, lambda shape: None, side) == (None, "")
    (tmp_path / "b.png").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"b\.png: "):
        size_for(tmp_path, accept, side)


@pytest.mark.parametrize("made", [OptimalDenoiser, LocalDenoiser])
def test_a_crop_that_nobody_asked_for_is_said_where_the_denoiser_is_made(tmp_path, made):
    photos(tmp_path)
    with pytest.warns(UserWarning, match="7 pictures of .* size sets another side") as said:
        found = made(tmp_path)
    files = [warning.filename for warning in said if "size sets" in str(warning.message)]
    assert files == [__file__]
    assert found.images.shape == (7, 3, 33, 33)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made(tmp_path, size=20)


def test_broken_and_odd_pictures_are_named(tmp_path):
    for name in ("a.png", "b.png"):
        picture("RGB", (40, 30)).save(tmp_path / name)
    noise = torch.randint(0, 256, (30, 40, 3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "c.jpg")
    whole = (tmp_path / "c.jpg").read_bytes()
    broken = {
        "half a picture": whole[: len(whole) // 2],
        "no picture": b"hello",
        "nothing": b"",
        "a header": (tmp_path / "a.png").read_bytes()[:20],
    }
    for content in broken.values():
        (tmp_path / "c.jpg").write_bytes(content)
        with pytest.raises(ValueError, match=r"c\.jpg: ") as caught:
            load_images(tmp_path)
        assert "\n" not in str(caught.value)
    picture("RGB", (41, 30)).save(tmp_path / "c.jpg")
    with pytest.raises(ValueError, match=r"shape is \(3, 30, 41\) at .*c\.jpg, \(3, 30, 40\)"):
        load_images(tmp_path)


def test_a_picture_too_large_for_pil_is_named(tmp_path, monkeypatch):
    picture("L", (40, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ValueError, match=r"a\.png: .*decompression bomb"):
        load_images(tmp_path)


def test_pictures_are_turned_as_their_camera_says(tmp_path):
    pixels = torch.arange(20, dtype=torch.uint8).view(4, 5)
    for orientation, expected in ((1, pixels), (3, pixels.flip(0, 1)), (6, pixels.rot90(-1))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels.numpy()).save(tmp_path / "a.png", exif=exif)
        found, _ = load_images(tmp_path)
        assert torch.equal(found[0, 0], expected)


def test_the_hash_of_images_does_not_depend_on_the_order():
    assert accumulate.hash_of_images(UINT8) == accumulate.hash_of_images(UINT8.flip(0))
    assert accumulate.hash_of_images(UINT8) != accumulate.hash_of_images(UINT8[1:])


def test_schedules_reach_their_ends():
    fashion, crops = WINDOWS["fashion_mnist"], CROPS["edm32"]
    assert [nearest(fashion, sigma) for sigma in (1e-4, 1e9, float("inf"))] == [3, 25, 25]
    assert [nearest(crops, sigma) for sigma in (1e-4, 80.0, float("inf"))] == [3, 32, 32]
    for sigma, size in fashion:
        assert nearest(fashion, sigma * 1.01) == size


def test_the_transcriptions_equal_the_denoisers():
    x, sigma = UINT8, 0.7
    kept = DatasetStatistics.from_images(x)
    unit = torch.eye(60).double().view(60, 3, 4, 5)
    wiener = kept.apply(unit, lambda values: values / (values + sigma**2)).flatten(1).float()
    y = noisy(decode(x), sigma)
    denoiser = LocalDenoiser(x, tau=0.05, minibatch=16, statistics=kept)
    for batches in (decoding(x, 16), resident(x, 16)):
        found = local_denoiser(batches, wiener, y, sigma, tau=0.05)
        torch.testing.assert_close(found, denoiser(y, sigma), rtol=0, atol=1e-5)
    optimal = OptimalDenoiser(x)(y.double(), sigma).float()
    for found in (
        optimal_denoiser(resident(x, 16), y, sigma),
        optimal_product(decode(x).flatten(1), y, sigma),
    ):
        torch.testing.assert_close(found, optimal, rtol=0, atol=1e-4)
