"""The descent against its formulas, known words, and searches that continue exactly."""

import math

import pytest
import torch

from pilotage.guidance.zeroth_order import (
    Descent,
    GradientSearch,
    WordSearch,
    candidate_words,
    forward_difference,
    perturbations,
)

from .test_subspace import oracle

D = 12


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TARGET = draw(D, seed=9)
INITIAL = draw(D, seed=8)
SCALES = torch.linspace(1, 4, D)


def losses(points):
    return ((points - TARGET).square() * SCALES).sum(1)


SETTINGS = {
    "zoodip": Descent(rate=0.05, subspace_tau=8),
    "average": Descent(3, 0.1, 0.1, subspace_tau=20, average=8.0),
    "words": Descent(directions=3, rate=0.05, warmup=5, subspace_tau=0, average=8.0),
}


def made(name):
    """A new search."""
    if name == "words":
        return WordSearch(INITIAL, draw(9, D, seed=5), SETTINGS[name])
    return GradientSearch(INITIAL, SETTINGS[name])


def advance(search, steps):
    for _ in range(steps):
        search.tell(losses(search.ask()))


def copied(state):
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_descends_and_continues_exactly(name):
    whole, first, second = (made(name) for _ in range(3))
    advance(whole, 60)
    advance(first, 23)
    second.state |= copied(first.state)
    advance(second, 37)
    assert torch.equal(whole.value, second.value)
    assert torch.equal(whole.ask(), second.ask())
    assert losses(whole.value[None]) < 0.7 * losses(INITIAL[None])


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_that_are_not_finite(name):
    search = made(name)
    values = losses(search.ask())
    values[0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        search.tell(values)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("tau", [0, 8])
def test_a_step_is_estimate_projection_and_torchs_adam(warmup, tau):
    """A transcription with torch.optim.Adam, and the covariance's eigenvectors for the noise."""
    settings = Descent(3, 0.1, 5e-3, warmup=warmup, subspace_tau=tau, subspace_nu=0.2)
    search, tokens = GradientSearch(INITIAL, settings, seed=4), []
    token = torch.nn.Parameter(INITIAL.clone())
    reference = torch.optim.Adam([token])
    for i in range(20):
        points = search.ask()
        directions = perturbations(D, 4, i, 3)
        torch.testing.assert_close(
            points, search.value + torch.cat([torch.zeros(1, D), 0.1 * directions])
        )
        values = losses(points)
        search.tell(values)
        gradient = forward_difference(values[1:], values[0], directions, 0.1)
        if tau and i >= tau:  # noise of the last full window of tau tokens
            window = torch.stack(tokens[i // tau * tau - tau : i // tau * tau])
            projector, rank = oracle(window, 0.2)
            assert rank > 0
            gradient = gradient - torch.from_numpy(projector).float() @ gradient
        token.grad = gradient
        reference.param_groups[0]["lr"] = 5e-3 * min(1, (i + 1) / max(1, warmup))
        reference.step()
        tokens.append(token.detach().clone())
        torch.testing.assert_close(search.value, tokens[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta", [0, 4])
def test_the_average_weighs_late_tokens(eta):
    """Weights proportional to the rising factorial i (i + 1) ... (i + eta - 1), i = 1, 2, ..."""
    search, tokens = GradientSearch(INITIAL, Descent(subspace_tau=0, average=eta)), []
    for _ in range(30):
        advance(search, 1)
        tokens.append(search.state["iterate"].double())
    i = torch.arange(1, 31, dtype=torch.float64)
    weights = torch.stack([i + k for k in range(eta)]).prod(0) if eta else torch.ones_like(i)
    expected = (weights / weights.sum()) @ torch.stack(tokens)
    torch.testing.assert_close(search.value.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"directions": 0}, "directions must be at least 1"),
        ({"mu": 0.0}, "mu must be a positive"),
        ({"mu": math.nan}, "mu must be a positive"),
        ({"rate": 0.0}, "rate must be a positive"),
        ({"epsilon": 0.0}, "epsilon must be a positive"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"subspace_tau": 1}, "subspace_tau"),
        ({"subspace_nu": 1.0}, "subspace_nu"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Descent(**settings)


def noisy_losses(points, batch):
    """Losses of a batch: all of them are shifted by a lot, each by a little."""
    shift, own = draw(1, seed=batch).item(), draw(len(points), seed=1000 + batch)
    return losses(points) + 1000 * shift + 0.5 * own


def test_words_are_compared_with_the_class_word_on_the_same_batch():
    """The few better words are found though batches differ by far more than words do."""
    words = draw(35, D, seed=5)
    better = losses(words).argsort()[:3]
    search, calls = WordSearch(INITIAL, words, Descent(directions=7)), []
    while not search.done:
        points = search.ask()
        assert torch.equal(points[0], INITIAL)
        search.tell(noisy_losses(points, len(calls)))
        calls.append(len(points))
    # 35 words once, 14 twice, 7 six times, in groups of seven: always eight points.
    assert calls == [8] * (5 + 2 * 2 + 6)
    expected = (INITIAL + words[better].sum(0)) / 4
    torch.testing.assert_close(search.value, expected)


def test_the_class_word_stays_if_no_word_is_better():
    search = WordSearch(TARGET, draw(20, D, seed=5), Descent(directions=4))
    assert torch.equal(search.value, TARGET)
    while not search.done:
        search.tell(losses(search.ask()))
        assert torch.equal(search.value, TARGET)


def test_descent_begins_where_the_words_end():
    search = made("words")
    while not search.done:
        search.tell(losses(search.ask()))
    assert torch.equal(search.ask()[0], search.value)
    assert losses(search.value[None]) < losses(INITIAL[None])


@pytest.mark.parametrize("stop", [0, 2, 8, 30])
def test_words_continue_exactly_in_every_round(stop):
    whole, first, second = (made("words") for _ in range(3))
    advance(whole, 40)
    advance(first, stop)
    second.state |= copied(first.state)
    advance(second, 40 - stop)
    assert torch.equal(whole.value, second.value)


def test_candidates_are_the_nearest_words_and_others():
    tables = [draw(60, 4, seed=1), draw(64, 3, seed=2)]
    both = torch.cat([tables[0], tables[1][:60]], 1)
    centre = both[17]
    cosine = torch.nn.functional.cosine_similarity(both, centre[None])
    nearest = cosine.argsort(descending=True)[1:6]
    found = candidate_words(tables, centre, 11, seed=0)
    torch.testing.assert_close(found[:5], both[nearest], rtol=0, atol=0)
    rows = [(both == word).all(1).nonzero().item() for word in found]
    assert len(set(rows)) == 11 and 17 not in rows
    assert torch.equal(found, candidate_words(tables, centre, 11, seed=0))
    assert not torch.equal(found, candidate_words(tables, centre, 11, seed=1))
    every = candidate_words(tables, centre, 59, seed=0)
    assert len(every) == 59
    for count in (60, 61, 900):  # more than there are
        assert torch.equal(candidate_words(tables, centre, count, seed=0), every)
