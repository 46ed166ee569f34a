"""Features, their statistics and the files that keep them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pilotage.eval.metrics.extractors import load_extractor
from pilotage.eval.metrics.feature_files import Features
from pilotage.eval.metrics.features import FeatureStatistics, finite_features, folder_features
from pilotage.eval.pictures import Pictures, Reading


class Means:
    """An extractor: mean colours and the top left pixel."""

    name, preprocessing = "means", "none"

    def __call__(self, images):
        return torch.cat([images.mean((2, 3)), images[:, :, 0, 0]], 1)


def write(folder, count=5, size=(8, 8), suffix=".png", seed=0):
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)
    arrays = generator.integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i:02d}{suffix}")
    return arrays


def features_of(folder, extractor=None, reading=None, **options):
    pictures = Pictures.of(folder, reading)
    return folder_features(pictures, extractor or Means(), progress=False, **options)


def test_preprocessing_says_how_pictures_were_read(tmp_path):
    write(tmp_path, 3)
    Image.new("RGB", (8, 9)).save(tmp_path / "03.png")
    with pytest.raises(ValueError, match=r"03.png is 8x9, but 00.png is 8x8"):
        features_of(tmp_path, batch_size=2)
    found = features_of(tmp_path, reading=Reading(resize="8"))
    assert found.count == 4
    assert found.preprocessing == "shorter side to 8 (bicubic), middle 8x8, then none"
    found = features_of(tmp_path, reading=Reading(resize="clean:8", background="black"))
    assert found.preprocessing == "transparency on black, clean-fid's bicubic to 8x8, then none"


def test_features_that_are_not_finite_are_named():
    features = torch.zeros(9, 2)
    features[2:] = torch.nan
    with pytest.raises(ValueError, match=r"in rows \[2, 3, 4, 5, 6\]"):
        finite_features(features)


def test_nan_features_name_the_file(tmp_path):
    write(tmp_path)

    class Broken(Means):
        def __call__(self, images):
            features = super().__call__(images)
            return features.where(features[:, :1] != features[1 % len(features), 0], torch.nan)

    with pytest.raises(ValueError, match=r"the features of .*01.png contain NaN"):
        features_of(tmp_path, Broken(), batch_size=3)


def test_statistics_are_numpys_and_merge_to_the_whole(tmp_path):
    write(tmp_path, 11)
    found = features_of(tmp_path, batch_size=4)
    rows = found.rows().double().numpy()
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-15)


def test_merging_far_from_zero():
    """A mean of 1e6 and a spread of 1: sums of squares would lose the spread."""
    x = torch.randn(101, 3, generator=torch.Generator().manual_seed(0)).double() + 1e6
    parts = [FeatureStatistics.of(part) for part in x.split([1, 2, 40, 58])]
    forwards = parts[0].merged(parts[1]).merged(parts[2]).merged(parts[3])
    other = parts[3].merged(parts[0]).merged(parts[2].merged(parts[1]))
    for merged in (forwards, other):
        assert merged.count == 101
        torch.testing.assert_close(merged.mean, x.mean(0), rtol=1e-14, atol=0)
        torch.testing.assert_close(merged.covariance, torch.cov(x.T), rtol=1e-8, atol=1e-9)
    with pytest.raises(ValueError, match="3 and 2"):
        parts[0].merged(FeatureStatistics.of(x[:, :2]))


def test_batch_size_does_not_matter(tmp_path):
    write(tmp_path / "a", 7)
    one, all_ = (features_of(tmp_path / "a", batch_size=b) for b in (1, 7))
    assert one.data == all_.data and torch.equal(one.rows(), all_.rows())
    torch.testing.assert_close(one.covariance, all_.covariance, rtol=1e-10, atol=1e-15)


def test_data_identity(tmp_path):
    """Names and contents count; where the folder lies does not."""
    for name in "abc":
        write(tmp_path / name)
    write(tmp_path / "c", 1, seed=1)  # another first picture
    a, b, c = (features_of(tmp_path / n).data for n in "abc")
    assert a == b != c
    (tmp_path / "b" / "04.png").rename(tmp_path / "b" / "05.png")
    assert features_of(tmp_path / "b").data != a


@pytest.mark.parametrize("keep", [True, False])
def test_files(tmp_path, keep):
    write(tmp_path / "a")
    made = features_of(tmp_path / "a", keep=keep)
    path = tmp_path / "new" / "stats.npz"
    made.save(path)
    read = Features.load(path, Means())
    assert read.data == made.data and read.count == 5
    assert torch.equal(read.mean, made.mean)
    assert torch.equal(read.covariance, made.covariance)
    assert [p.name for p in path.parent.iterdir()] == ["stats.npz"]
    if keep:
        assert torch.equal(read.rows(), made.rows())
    else:
        with pytest.raises(ValueError, match="statistics only"):
            read.rows()
    with np.load(path, allow_pickle=False) as file:
        tags = json.loads(str(file["tags"]))
    assert tags["n"] == 5 and tags["extractor"] == "means"


def made(tmp_path):
    write(tmp_path / "a")
    path = tmp_path / "stats.npz"
    features_of(tmp_path / "a").save(path)
    return path


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.99])
def test_truncated_file(tmp_path, share):
    path = made(tmp_path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="stats.npz is damaged"):
        Features.load(path)


def test_other_files(tmp_path):
    path = made(tmp_path)
    with np.load(path) as file:
        arrays = dict(file)
    tags = json.loads(str(arrays["tags"]))

    def refused(message, **changes):
        np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
        with pytest.raises(ValueError, match=f"stats.npz.*{message}"):
            Features.load(path)

    refused("no mu and no sigma", mu=None, sigma=None)
    refused(r"shapes \(2,\) and \(6, 6\)", mu=arrays["mu"][:2])
    refused("parts disagree", features=arrays["features"][:2])
    refused("NaN or infinity in its features", features=arrays["features"] * np.nan)
    refused("format 1, expected 2", tags=np.array(json.dumps(tags | {"format": 1})))
    refused("damaged: its tags have no data and no extractor", tags=np.array("{}"))
    refused("damaged or not a statistics file", tags=np.array({"pickled": 1}, dtype=object))
    with pytest.raises(FileNotFoundError):
        Features.load(tmp_path / "none.npz")


SPREAD = np.random.default_rng(0).normal(size=(6, 6))
MOMENTS = {"mu": np.arange(6.0), "sigma": SPREAD @ SPREAD.T}


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_mean_and_covariance_of_other_tools(tmp_path, write, dtype):
    """As pytorch-fid and clean-fid write them; what made them has to be said."""
    path = tmp_path / "theirs.npz"
    write(path, **{name: part.astype(dtype) for name, part in MOMENTS.items()})
    with pytest.raises(ValueError, match="theirs.npz.*do not say what made them.*--made-by"):
        Features.load(path, Means())
    with pytest.raises(ValueError, match="mu has 6 entries, those of pytorch-fid .* have 2048"):
        Features.load(path, Means(), made_by="pytorch-fid")
    with pytest.raises(ValueError, match="extractor is 'other' in one and 'means'"):
        Features.load(path, Means(), made_by="other")
    found = Features.load(path, Means(), made_by="means")
    assert found.count is None and found.preprocessing == "that of means"
    np.testing.assert_array_equal(found.mean, MOMENTS["mu"])
    np.testing.assert_allclose(found.covariance, MOMENTS["sigma"], rtol=1e-6)
    with pytest.raises(ValueError, match="statistics only"):
        found.rows()


def test_tools_with_inception_are_no_other_network(tmp_path):
    path = tmp_path / "theirs.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="extractor is 'inception' in one and 'means'"):
        Features.load(path, Means(), made_by="clean-fid")


def test_other_tools_read_ours(tmp_path):
    """pytorch-fid 0.3 and clean-fid 0.1.35 take ``mu`` and ``sigma`` out of a file like this."""
    with np.load(made(tmp_path)) as file:
        mean, covariance = file["mu"][:], file["sigma"][:]
    rows = features_of(tmp_path / "a").rows().double().numpy()
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": None}, "it has no sigma"),
        ({"mu": MOMENTS["mu"] + 0j}, "mu is complex"),
        ({"sigma": MOMENTS["sigma"] + 1e-3j}, "sigma is complex"),
        ({"sigma": np.eye(6, dtype=int)}, "sigma is of type int64"),
        ({"mu": np.full(6, np.nan)}, "NaN or infinity in mu"),
        ({"sigma": np.where(np.eye(6), np.inf, 0)}, "NaN or infinity in sigma"),
        ({"sigma": MOMENTS["sigma"] + np.eye(6, k=1)}, "sigma is not symmetric"),
        ({"sigma": np.diag([1, 1, 1, 1, 1, -0.01])}, "negative eigenvalue -0.01"),
        ({"sigma": np.eye(5)}, "shapes"),
        ({"mu": np.zeros((1, 6))}, "shapes"),
    ],
)
def test_what_is_no_mean_and_covariance(tmp_path, changes, message):
    path = tmp_path / "theirs.npz"
    np.savez(path, **{k: v for k, v in (MOMENTS | changes).items() if v is not None})
    with pytest.raises(ValueError, match=f"theirs.npz.*{message}"):
        Features.load(path, made_by="means")


@pytest.mark.parametrize("field", ["extractor", "preprocessing"])
def test_other_tags_are_refused(tmp_path, field):
    path = made(tmp_path)
    other = Means()
    setattr(other, {"extractor": "name"}.get(field, field), "other")
    with pytest.raises(ValueError, match=f"stats.npz.*{field} is .*'other'"):
        Features.load(path, other)
    with pytest.raises(ValueError, match="preprocessing is 'none' in one and 'shorter side to 4"):
        Features.load(path, Means(), Reading(resize="4"))
    own = {"extractor": "means", "preprocessing": "none"}
    with pytest.raises(ValueError, match=field):
        Features.load(path).require(**own | {field: "x"})
    Features.load(path).require(**own)


@pytest.mark.parametrize("name", ["resnet", "clip", "dinov2:", "efficientnet-lite0:x"])
def test_unknown_extractor(name):
    with pytest.raises(ValueError, match="known are efficientnet-lite0-native, eff"):
        load_extractor(name)
