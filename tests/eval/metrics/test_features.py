"""Pictures from files, features, their statistics and the files that keep them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pilotage.eval.metrics.extractors import load_extractor
from pilotage.eval.metrics.features import (
    Features,
    FeatureStatistics,
    folder_features,
)
from pilotage.eval.pictures import batches, load_pictures, picture_files, prompt_of


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


def test_pictures_in_order_and_batches(tmp_path):
    arrays = write(tmp_path)
    (tmp_path / "notes.txt").write_text("not a picture")
    expected = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(load_pictures(tmp_path), expected)
    parts = list(batches(picture_files(tmp_path), 2))
    assert [len(part) for part in parts] == [2, 2, 1] and torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".PNG"])
def test_kinds_of_files(tmp_path, suffix):
    write(tmp_path, 2, suffix=suffix)
    assert load_pictures(tmp_path).shape == (2, 3, 8, 8)


def test_no_pictures(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no pictures"):
        picture_files(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        picture_files(tmp_path / "missing")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("keep", [0, 20, 0.6])
def test_damaged_file_is_named(tmp_path, suffix, keep):
    write(tmp_path, 3, size=(32, 32), suffix=suffix)
    path = tmp_path / f"01{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(ValueError, match=f"01{suffix} is damaged"):
        folder_features(tmp_path, Means(), progress=False)


def test_mixed_sizes(tmp_path):
    write(tmp_path, 3)
    Image.new("RGB", (8, 9)).save(tmp_path / "03.png")
    with pytest.raises(ValueError, match=r"03.png is 8x9, but 00.png is 8x8"):
        folder_features(tmp_path, Means(), batch_size=2, progress=False)
    found = folder_features(tmp_path, Means(), resize=8, progress=False)
    assert found.statistics.count == 4 and "bicubic to 8x8" in found.preprocessing


def test_nan_features_name_the_file(tmp_path):
    write(tmp_path)

    class Broken(Means):
        def __call__(self, images):
            features = super().__call__(images)
            return features.where(features[:, :1] != features[1 % len(features), 0], torch.nan)

    with pytest.raises(ValueError, match=r"the features of .*01.png contain NaN"):
        folder_features(tmp_path, Broken(), batch_size=3, progress=False)


def test_statistics_are_numpys_and_merge_to_the_whole(tmp_path):
    write(tmp_path, 11)
    found = folder_features(tmp_path, Means(), batch_size=4, progress=False)
    rows = found.rows().double().numpy()
    np.testing.assert_allclose(found.statistics.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        found.statistics.covariance, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-15
    )


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
    one, all_ = (folder_features(tmp_path / "a", Means(), b, progress=False) for b in (1, 7))
    assert one.data == all_.data and torch.equal(one.rows(), all_.rows())
    torch.testing.assert_close(
        one.statistics.covariance, all_.statistics.covariance, rtol=1e-10, atol=1e-15
    )


def test_data_identity(tmp_path):
    """Names and contents count; where the folder lies does not."""
    for name in "abc":
        write(tmp_path / name)
    write(tmp_path / "c", 1, seed=1)  # another first picture
    a, b, c = (folder_features(tmp_path / n, Means(), progress=False).data for n in "abc")
    assert a == b != c
    (tmp_path / "b" / "04.png").rename(tmp_path / "b" / "05.png")
    assert folder_features(tmp_path / "b", Means(), progress=False).data != a


@pytest.mark.parametrize("keep", [True, False])
def test_files(tmp_path, keep):
    write(tmp_path / "a")
    made = folder_features(tmp_path / "a", Means(), keep=keep, progress=False)
    path = tmp_path / "new" / "stats.npz"
    made.save(path)
    read = Features.load(path, Means())
    assert read.data == made.data and read.statistics.count == 5
    assert torch.equal(read.statistics.mean, made.statistics.mean)
    assert torch.equal(read.statistics.covariance, made.statistics.covariance)
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
    folder_features(tmp_path / "a", Means(), progress=False).save(path)
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
    np.savez(path, **{k: v for k, v in arrays.items() if k != "tags"})
    with pytest.raises(ValueError, match="no 'tags'"):
        Features.load(path)
    np.savez(path, **arrays | {"mean": arrays["mean"][:2]})
    with pytest.raises(ValueError, match="disagree"):
        Features.load(path)
    np.savez(path, **arrays | {"mean": arrays["mean"] * np.nan})
    with pytest.raises(ValueError, match="NaN"):
        Features.load(path)
    np.savez(path, **arrays | {"tags": np.array({"pickled": 1}, dtype=object)})
    with pytest.raises(ValueError, match="damaged or not a statistics file"):
        Features.load(path)
    with pytest.raises(FileNotFoundError):
        Features.load(tmp_path / "none.npz")


@pytest.mark.parametrize("field", ["extractor", "preprocessing"])
def test_other_tags_are_refused(tmp_path, field):
    path = made(tmp_path)
    other = Means()
    setattr(other, {"extractor": "name"}.get(field, field), "other")
    with pytest.raises(ValueError, match=f"stats.npz.*{field} is .*'other'"):
        Features.load(path, other)
    with pytest.raises(ValueError, match="preprocessing is 'none' in one and 'bicubic"):
        Features.load(path, Means(), resize=4)
    own = {"extractor": "means", "preprocessing": "none"}
    with pytest.raises(ValueError, match=field):
        Features.load(path).require(**own | {field: "x"})
    Features.load(path).require(**own)


@pytest.mark.parametrize("name", ["resnet", "clip", "dinov2:", "efficientnet-lite0:x"])
def test_unknown_extractor(name):
    with pytest.raises(ValueError, match="there are: efficientnet-lite0, inception"):
        load_extractor(name)


def test_no_prompt(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(ValueError, match="00.png does not carry its prompt"):
        prompt_of(tmp_path / "00.png")
