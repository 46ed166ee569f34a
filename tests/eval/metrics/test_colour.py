"""Clipped pixels, chroma and its distance to real pictures."""

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from pilotage.eval.metrics.chroma import (
    WIDTH,
    chroma,
    chroma_distance,
    chroma_map,
    chroma_shares,
)
from pilotage.eval.metrics.clipping import clipped
from pilotage.eval.metrics.images import saturation


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def flat(*colour):
    """A picture of one colour, given in 8 bits."""
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 4, 5) / 255


# Lab of sRGB's corners and of two colours within, by the equations of CIE 15 in published tables
# (D65, 2 degrees): a*, b*.
LAB = {
    (255, 0, 0): (80.09, 67.20),
    (0, 255, 0): (-86.18, 83.18),
    (0, 0, 255): (79.19, -107.86),
    (255, 255, 0): (-21.55, 94.48),
    (0, 255, 255): (-48.09, -14.13),
    (255, 0, 255): (98.23, -60.83),
    (255, 255, 255): (0, 0),
    (0, 0, 0): (0, 0),
    (119, 119, 119): (0, 0),
}


@pytest.mark.parametrize("colour", LAB)
def test_chroma_is_that_of_tables(colour):
    a, b = LAB[colour]
    assert float(chroma(flat(*colour))) == pytest.approx((a * a + b * b) ** 0.5, abs=0.03)


def test_dark_colours_are_saturated_but_not_strong():
    dark, bright = flat(6, 0, 0), flat(255, 0, 0)
    assert saturation(dark) == saturation(bright) == 1
    assert chroma(dark) < 10 < chroma(bright)


def test_dark_colours_are_those_of_the_standard():
    """CIE 15 in its other constants (kappa, epsilon), below and above where the root begins."""
    for level in (1, 6, 12, 20, 28):
        colour = np.array([level, 0, level / 2]) / 255
        linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        matrix = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750]]
        matrix = np.array([*matrix, [0.0193339, 0.1191920, 0.9503041]])
        share = matrix @ linear / matrix.sum(1)
        f = np.where(share > 216 / 24389, np.cbrt(share), (24389 / 27 * share + 16) / 116)
        expected = np.hypot(500 * (f[0] - f[1]), 200 * (f[1] - f[2]))
        found = chroma(flat(level, 0, level / 2)).item()
        assert found == pytest.approx(expected, rel=1e-4)


def test_shares_and_their_distance():
    """Against scipy's Wasserstein distance of the pixels themselves."""
    real, fake = rand(3, 3, 20, 30), 0.5 + 0.3 * rand(4, 3, 24, 16, seed=1)
    shares = chroma_shares(real)
    torch.testing.assert_close(shares.sum(1), torch.ones(3).double())
    middle = (torch.arange(280) + 0.5) * WIDTH
    torch.testing.assert_close((shares @ middle.double()).float(), chroma(real), atol=0.1, rtol=0)
    expected = wasserstein_distance(chroma_map(real).flatten(), chroma_map(fake).flatten())
    one, other = chroma_shares(real).mean(0), chroma_shares(fake).mean(0)
    assert float(chroma_distance(one, other)) == pytest.approx(expected, abs=WIDTH)
    assert expected > 5
    assert float(chroma_distance(one, one)) == 0
    several = chroma_distance(one, torch.stack([one, other]))
    assert several.tolist() == [0, float(chroma_distance(one, other))]


def test_distance_sees_what_the_mean_does_not():
    """Half grey and half strong colours against medium ones of the same mean chroma."""
    medium = chroma_shares(flat(128, 100, 100)).mean(0)
    strength = float(chroma(flat(128, 100, 100)))
    strong = float(chroma(flat(160, 94, 94)))
    assert strong > 2 * strength * 0.9
    both = (chroma_shares(flat(90, 90, 90)) + chroma_shares(flat(160, 94, 94)))[0] / 2
    found = float(chroma_distance(medium, both))
    assert found == pytest.approx((strength + abs(strong - strength)) / 2, abs=WIDTH)


def test_clipped_counts_pixels_with_a_channel_at_an_end():
    picture = torch.full((1, 3, 2, 5), 0.5)
    assert clipped(picture) == 0
    picture[0, 0, 0, 0] = 1
    picture[0, 1, 0, 0] = 0  # the same pixel: once
    picture[0, 2, 1, 3] = 0.4 / 255  # rounds to 0
    picture[0, 2, 1, 4] = 0.6 / 255  # rounds to 1
    assert clipped(picture) == pytest.approx(0.2)
    assert clipped(flat(255, 255, 255)) == clipped(flat(0, 0, 0)) == clipped(flat(9, 9, 255)) == 1
    assert clipped(flat(254, 1, 9)) == 0
    with pytest.raises(ValueError, match="NaN"):
        clipped(picture.log())
    with pytest.raises(ValueError, match="expected RGB"):
        clipped(picture[:, :2])
