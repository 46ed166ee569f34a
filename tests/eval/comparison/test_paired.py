"""Paired differences: what Student's paired t test says, and clear where intervals overlap."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from pilotage.eval.comparison.evaluation import (
    Resampled,
    distribution_metrics,
    paired_differences,
)
from pilotage.eval.comparison.paired import differences, two_digits
from pilotage.eval.metrics.bootstrap import Resamples, interval
from pilotage.eval.metrics.frechet import frechet_distance
from pilotage.eval.metrics.kid import kernel_distance


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_means(values, groups=None, pairs=((0, 1),), seed=0):
    """Differences of the means of settings' values, with shape (settings, N)."""
    groups = range(values.shape[1]) if groups is None else groups
    drawn = Resamples.of(groups, 4000, seed)
    draws = [drawn.means(row) for row in values]
    return differences(values.mean(1).tolist(), draws, list(pairs), len(set(groups)))


@pytest.mark.parametrize("count", [6, 12, 80])
def test_one_comparison_of_means_is_the_paired_t_interval(count):
    a, b = 3 * randn(count) + randn(2, count, seed=1)
    (found,) = of_means(torch.stack([a, b]))
    expected = scipy.stats.ttest_rel(a.numpy(), b.numpy())
    ends = expected.confidence_interval(0.95)
    assert found.value == pytest.approx(float((a - b).mean()), rel=1e-12)
    assert found.interval == pytest.approx(ends, abs=0.06 * (ends.high - ends.low))


def test_all_pairs_of_settings_without_common_noise_are_tukeys():
    """With equal variances and no shared noise, the largest |t| is the studentized range."""
    count, settings = 40, 5
    values = randn(settings, count)
    values = torch.linalg.qr((values - values.mean(1, keepdim=True)).T)[0].T
    pairs = [(i, j) for i in range(settings) for j in range(i)]
    found = of_means(values, pairs=pairs)
    half = [(one.interval[1] - one.interval[0]) / 2 / one.error for one in found]
    expected = scipy.stats.studentized_range.ppf(0.95, settings, count - 1) / math.sqrt(2)
    assert half == pytest.approx([expected] * len(pairs), rel=0.04)


def test_clear_although_the_intervals_overlap():
    """346.8 and 372.2, as Fréchet distances of 64 prompts were: 25.3 apart, known to within 10."""
    prompts = 150 * randn(64)
    a = 346.8 + prompts - prompts.mean()
    noise = 35 * randn(64, seed=1)
    b = a + 25.4 + noise - noise.mean()
    assert interval(a)[1] > interval(b)[0]
    (found,) = of_means(torch.stack([b, a]))
    assert found.clear and found.needed is None
    assert found.interval[0] > 10 and found.interval[1] < 41


def test_a_setting_differs_from_itself_by_nothing():
    real, fake = randn(30, 6), randn(24, 6, seed=1) + 0.3
    drawn = Resamples.of([i // 2 for i in range(24)], 50)
    found, other = distribution_metrics(real, fake, drawn), distribution_metrics(real, fake, drawn)
    assert set(found) == {"fd", "kid", "precision", "recall", "density", "coverage"}
    for row in paired_differences({"a": found, "b": other, "c": found}, 12):
        assert row["difference"] == 0 and row["interval"] == [0, 0] and row["needed"] is None


def test_the_sign_follows_the_order_and_a_constant_cancels():
    values = randn(2, 30) + torch.tensor([[0.0], [2.0]])
    one, other = of_means(values, pairs=[(0, 1), (1, 0)])
    assert one.value == -other.value and one.interval == pytest.approx(
        [-end for end in reversed(other.interval)]
    )
    (moved,) = of_means(values + 1000 * randn(30, seed=2))
    (alone,) = of_means(values)
    assert moved.interval == pytest.approx(alone.interval, rel=1e-9)


def test_seeds_of_a_prompt_are_no_prompts():
    """Copies of every picture say nothing new."""
    values = randn(2, 20)
    (alone,), (copied,) = of_means(values), of_means(values.repeat(1, 4), list(range(20)) * 4)
    assert copied.interval == pytest.approx(alone.interval)


def test_more_comparisons_need_more():
    values = randn(8, 40)
    (alone,) = of_means(values)
    among = of_means(values, pairs=[(0, j) for j in range(1, 8)])[0]
    assert among.error == alone.error
    widths = [one.interval[1] - one.interval[0] for one in (among, alone)]
    assert widths[0] > 1.2 * widths[1]


@pytest.mark.parametrize(("count", "shift"), [(25, 0.2), (6, 0.4)])
def test_the_number_of_prompts_that_would_tell_tells_four_times_in_five(count, shift):
    """By the non-central t distribution."""
    noise = randn(2, count)
    values = noise - noise.mean(1, keepdim=True) + torch.tensor([[shift], [0.0]])
    (found,) = of_means(values)
    assert not found.clear and found.needed > count
    freedom, sd = found.needed - 1, float((values[0] - values[1]).std())
    size = shift / (sd / math.sqrt(found.needed))  # the true difference in standard errors
    right = scipy.stats.nct.sf(scipy.stats.t.ppf(0.975, freedom), freedom, size)
    assert right == pytest.approx(0.8, abs=0.06)


def test_two_digits():
    assert [two_digits(x) for x in (7.2, 99.1, 101, 8765)] == [8, 100, 110, 8800]


def test_nothing_is_claimed_of_what_does_not_vary():
    constant = [torch.full((50,), 1.0), torch.full((50,), 0.5)]
    (found,) = differences([1.0, 0.5], constant, [(0, 1)], 10)
    assert not found.clear and found.interval is None and found.needed is None


def test_bad_input():
    draws = [torch.rand(50), torch.rand(50)]
    with pytest.raises(ValueError, match="1 groups"):
        differences([1.0, 2.0], draws, [(0, 1)], 1)
    with pytest.raises(ValueError, match="3 values"):
        differences([1.0, 2.0, 3.0], draws, [(0, 1)], 5)
    with pytest.raises(ValueError, match="NaN"):
        differences([1.0, math.nan], draws, [(0, 1)], 5)


def test_metrics_of_every_resample():
    """Those without repetition are the metrics; FD, KID are those of the pictures drawn."""
    real, fake = randn(40, 6), randn(24, 6, seed=1) + 0.3
    groups = [i // 2 for i in range(24)]
    drawn = Resamples.of(groups, 5)
    whole = Resamples(torch.ones(1, 12, dtype=torch.float64), drawn.group)
    for one in distribution_metrics(real, fake, whole).values():
        assert float(one.draws[0]) == pytest.approx(one.value, rel=1e-6)
    found = distribution_metrics(real, fake, drawn)
    for r, times in enumerate(drawn.counts().long()):
        copies = fake.repeat_interleave(times, 0)
        assert float(found["fd"].draws[r]) == pytest.approx(frechet_distance(real, copies))
        # By loops over the pictures drawn, pairs of copies left out.
        ids = torch.arange(24).repeat_interleave(times).tolist()
        pairs = [(i, j) for i in ids for j in ids if i != j]
        kernel = (fake @ fake.T / 6 + 1) ** 3
        own = sum(float(kernel[i, j]) for i, j in pairs) / len(pairs)
        cross = float(((copies @ real.T / 6 + 1) ** 3).mean())
        theirs = (real @ real.T / 6 + 1) ** 3
        theirs = float((theirs.sum() - theirs.trace()) / (40 * 39))
        assert float(found["kid"].draws[r]) == pytest.approx(theirs + own - 2 * cross)
    subset = torch.tensor([1.0] * 6 + [0.0] * 6).double()
    half = distribution_metrics(real, fake, Resamples(subset[None], drawn.group))
    assert float(half["kid"].draws[0]) == pytest.approx(kernel_distance(real, fake[:12]).value)


def test_precision_and_recall_of_the_pictures_drawn():
    """By loops, with the balls of the whole sets; recall and coverage to first order."""
    real, fake = randn(20, 3), randn(18, 3, seed=1) + 0.5
    groups = [i // 3 for i in range(18)]
    drawn = Resamples.of(groups, 4)
    found = distribution_metrics(real, fake, drawn)

    def ball(points, k):
        return [sorted(math.dist(p, q) for q in points)[k] for p in points]

    reals, fakes = real.tolist(), fake.tolist()
    r3, f3, r5 = ball(reals, 3), ball(fakes, 3), ball(reals, 5)
    near = [[math.dist(f, p) for p in reals] for f in fakes]

    def metrics(ids):
        return {
            "precision": np.mean([any(near[i][j] <= r3[j] for j in range(20)) for i in ids]),
            "recall": np.mean([any(near[i][j] <= f3[i] for i in ids) for j in range(20)]),
            "density": np.mean([sum(near[i][j] <= r5[j] for j in range(20)) / 5 for i in ids]),
            "coverage": np.mean([any(near[i][j] <= r5[j] for i in ids) for j in range(20)]),
        }

    whole = metrics(range(18))
    without = [metrics([i for i in range(18) if groups[i] != g]) for g in range(6)]
    for r, times in enumerate(drawn.counts().long().tolist()):
        expected = metrics([i for i in range(18) for _ in range(times[i])])
        for name in ("recall", "coverage"):
            steps = [
                (times[3 * g] - 1) * (whole[name] - without[g][name]) * 5 / 6 for g in range(6)
            ]
            expected[name] = whole[name] + sum(steps)
        for name, value in expected.items():
            assert float(found[name].draws[r]) == pytest.approx(value)


def test_only_settings_with_the_metric_are_compared():
    one = {"alignment": Resampled(0.0, torch.rand(20)), "fd": Resampled(1.0, torch.rand(20))}
    rows = paired_differences({"a": one, "b": {"fd": Resampled(2.0, torch.rand(20))}}, 9)
    assert [(row["metric"], row["setting"], row["other"]) for row in rows] == [("fd", "a", "b")]
