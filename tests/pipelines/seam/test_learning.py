"""What one step tells of how a pipeline guides, on tensors alone."""

import math

import pytest
import torch

from pilotage.pipelines.seam.layouts import Layout
from pilotage.pipelines.seam.learning import by_token, learn, learn_norm, learn_sum
from pilotage.pipelines.seam.patterns import Pattern


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def branches(count, shape=(2, 4, 6, 6)):
    return [draw(*shape, seed=seed) for seed in range(count)]


def combined(weights, predictions):
    return sum(w * p for w, p in zip(weights, predictions, strict=True))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("weights", "main"),
    [
        ((-4.0, 5.0), 1),
        ((5.0, -4.0), 0),
        ((1.01, -0.01), 0),
        ((-3.0, 6.0, -2.0), 1),
        ((-3.0, -2.0, -1.0, 7.0), 3),
        ((0.5, 0.5), None),  # two that are guided towards
        ((2.0, -3.0, 2.0), None),
    ],
)
def test_the_branch_with_the_positive_share_is_the_conditional_one(weights, main, sign):
    preds = branches(len(weights))
    found = learn_sum(preds, sign * combined(weights, preds), (1,) * len(weights))
    assert (found.main, found.sign, found.reason) == (main, sign, "")
    assert found.residual < 1e-5 and not found.aside
    known = learn_sum(preds, sign * combined(weights, preds), (1,) * len(weights), main=1)
    assert known.main == 1


@pytest.mark.parametrize(("factor", "batch"), [(0.8, 1), (1.3, 1), (0.8, 2)])
def test_a_combination_that_is_rescaled(factor, batch):
    """One factor leaves nothing over, but weights that do not sum to one."""
    preds = branches(2, (batch, 4, 6, 6))
    found = learn_sum(preds, factor * combined((-4.0, 5.0), preds), (2,))
    assert found.main == 1 and f"which sum to {factor:.2g}" in found.reason
    if batch > 1:  # a factor for each sample leaves something over
        factors = torch.tensor([0.8, 1.1]).view(2, 1, 1, 1)
        found = learn_sum(preds, factors * combined((-4.0, 5.0), preds), (2,))
        assert "no sum of what its network returned" in found.reason


@pytest.mark.parametrize(("size", "main"), [(0.05, 1), (0.4, 1), (3.0, None), (30.0, None)])
def test_what_is_left_over_is_told_as_a_share(size, main):
    """With half of it unexplained, nothing is said of the branches any more."""
    preds = branches(2, (2, 4, 16, 16))
    mixed, other = combined((-4.0, 5.0), preds), draw(2, 4, 16, 16, seed=9)
    other = other * size * mixed.norm() / other.norm()
    found = learn_sum(preds, mixed + other, (2,))
    if found is None:  # so much noise that the weights could be anything
        assert size > 10
        return
    assert found.main == main and "a share of" in found.reason
    expected = size / math.sqrt(1 + size**2)
    assert found.residual == pytest.approx(expected, rel=0.15)


def test_what_a_step_cannot_tell():
    preds = branches(2)
    assert learn_sum([preds[0], preds[0].clone()], preds[0], (2,)) is None
    assert learn_sum([preds[0], preds[0] * math.nan], preds[0], (2,)) is None
    # One of two calls is stepped as it is: the other may be written for it, or guidance is off.
    assert learn_sum(preds, preds[1], (1, 1)) is None
    assert learn([preds[0]], preds[0], (1,), Layout(), preds[0], None) == Pattern((1,))


def test_a_call_that_takes_no_part():
    preds = branches(4)
    mixed = combined((-4.0, 5.0), preds[2:])
    found = learn_sum(preds, mixed, (2, 2))
    assert (found.main, found.aside, found.reason) == (3, True, "")
    assert not learn_sum(preds[2:], mixed, (1, 1)).aside


def test_frames_and_samples_that_are_added():
    preds = branches(2, (2, 5, 4, 6, 6))
    w = torch.linspace(1.5, 3.0, 5).view(1, 5, 1, 1, 1)
    found = learn_sum(preds, preds[0] + w * (preds[1] - preds[0]), (2,), frames=1)
    assert (found.main, found.reason) == (1, "")
    assert learn_sum(preds, preds[0] + w * (preds[1] - preds[0]), (2,)).reason
    sample = draw(2, 5, 4, 6, 6, seed=7)
    mixed = 0.3 * combined((-4.0, 5.0), preds) + 2.5 * sample
    found = learn_sum(preds, mixed, (2,), sample=sample)
    assert (found.main, found.reason) == (1, "")
    assert learn_sum(preds, mixed, (2,)).reason


@pytest.mark.parametrize("norm", ["match", "limit"])
@pytest.mark.parametrize("sign", [1, -1])
def test_norms_of_tokens(norm, sign):
    preds = branches(2, (2, 9, 6))
    guided = preds[1] + 4.0 * (preds[0] - preds[1])
    ratio = preds[0].norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
    mixed = sign * guided * (ratio if norm == "match" else ratio.clamp(max=1))
    found = learn_norm(preds, mixed, (1, 1), None)
    assert (found.main, found.sign, found.reason) == (0, sign, "")
    learned = learn(preds, mixed, (1, 1), Layout(), preds[0], None)
    assert learned.norm == found.norm and learned.main == 0
    assert learn_norm(preds, mixed + 0.01 * draw(2, 9, 6, seed=5), (1, 1), None) is None


# Parts


def calls_of(predictions, width):
    """What the network returned: of both branches in one call, with more channels than guided."""
    return [torch.cat([torch.cat([p, draw(*p.shape, seed=8)], 1)[:, :width] for p in predictions])]


def test_the_part_that_is_guided():
    preds = branches(2)
    mixed = combined((-4.0, 5.0), preds)
    for width in (4, 8):
        found = learn(calls_of(preds, width), mixed, (2,), Layout(), mixed, None)
        assert (found.part, found.main, found.reason) == ("", 1, "")
    behind = torch.cat([torch.cat([draw(2, 4, 6, 6, seed=8), p], 1) for p in preds])
    found = learn([behind], mixed, (2,), Layout(), mixed, None)
    assert (found.part, found.main, found.reason) == ("behind", 1, "")
    tokens = torch.cat([p.flatten(2).mT for p in preds])
    found = learn([tokens], mixed, (2,), Layout(), mixed, None)
    assert (found.part, found.main, found.reason) == ("pixels", 1, "")
    found = learn([torch.cat(preds)], mixed.flatten(2).mT, (2,), Layout(), mixed, None)
    assert (found.part, found.main, found.reason) == ("tokens", 1, "")


def test_shapes_that_say_nothing():
    preds = branches(2)
    found = learn([torch.cat(preds)], draw(2, 3, 7), (2,), Layout(main=1), draw(2, 3, 7), None)
    assert found.main == 1 and "it makes (2, 3, 7) of what its network returned" in found.reason
    alike = torch.cat([preds[0], preds[0]])
    assert learn([alike], preds[0], (2,), Layout(), preds[0], None) is None


def test_places_where_something_else_is_given():
    """What the network was given there is not what is stepped: nothing is guided there."""
    preds = branches(2, (2, 3, 5, 4, 4))
    mixed, sample = combined((-4.0, 5.0), preds), draw(2, 3, 5, 4, 4, seed=6)
    given = sample.clone()
    given[:, :, 0] += 1
    layout = Layout(given=2)
    found = learn([torch.cat(preds)], mixed, (2,), layout, sample, torch.cat([given, given]))
    assert found.kept == (2, (1, 2, 3, 4)) and not found.reason
    for seen in (sample, given + 1):  # everywhere the same, everywhere something else
        found = learn([torch.cat(preds)], mixed, (2,), layout, sample, torch.cat([seen, seen]))
        assert found.kept is None and not found.reason
    mixed[:, :, 1] = draw(2, 3, 4, 4, seed=4)  # which owes nothing to the network
    found = learn([torch.cat(preds)], mixed, (2,), layout, sample, None)
    assert found.kept == (2, (0, 2, 3, 4)) and found.main == 1 and not found.reason


@pytest.mark.parametrize(
    ("times", "kept", "part"),
    [
        ([[7, 7, 7], [7, 7, 7]], None, False),
        ([[0, 7, 7], [0, 7, 7]], (1, (1, 2)), False),
        ([[0, 7, 7, 7], [0, 7, 0, 7]], (1, (1, 3)), True),
        ([[0, 7, 3], [0, 7, 3]], (1, (1,)), True),
    ],
)
def test_a_time_for_every_token(times, kept, part):
    """0 is given, the largest is free; what is neither, or not for all samples, is so in part."""
    found = by_token(Pattern((2,), 1), torch.tensor(times))
    assert (found.kept, found.upward, found.main) == (kept, True, 1)
    assert ("in part only" in found.reason) == part
    assert by_token(Pattern((2,), 1, reason="why"), torch.tensor(times)).reason == "why"
