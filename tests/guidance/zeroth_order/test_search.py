"""Adam, averaging, timesteps, known words, and searches that continue exactly."""

import pytest
import torch
from scipy.stats import chisquare

from pilotage.guidance.zeroth_order import (
    AdamStep,
    Estimator,
    FromWords,
    GradientSearch,
    IterateAverage,
    PartialUniformTimesteps,
    SubspaceGradient,
    WordSearch,
    candidate_words,
    generator,
)

D = 12


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TARGET = draw(D, seed=9)
INITIAL = draw(D, seed=8)
SCALES = torch.linspace(1, 4, D)


def losses(points):
    return ((points - TARGET).square() * SCALES).sum(1)


def searches():
    """One of each, made anew."""
    return {
        "zoodip": GradientSearch(
            INITIAL, Estimator(), AdamStep(0.05), subspace=SubspaceGradient(8)
        ),
        "average": GradientSearch(
            INITIAL,
            Estimator(3, 0.1),
            AdamStep(0.1),
            average=IterateAverage(),
            subspace=SubspaceGradient(20),
        ),
        "words": FromWords(
            WordSearch(INITIAL, draw(9, D, seed=5), 3),
            GradientSearch(
                INITIAL, Estimator(directions=3), AdamStep(0.05, warmup=5), average=IterateAverage()
            ),
        ),
    }


def advance(search, steps):
    for _ in range(steps):
        search.tell(losses(search.ask()))


@pytest.mark.parametrize("name", searches())
def test_descends_and_continues_exactly(name):
    whole, first, second = (searches()[name] for _ in range(3))
    advance(whole, 60)
    advance(first, 23)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    advance(second, 37)
    assert torch.equal(whole.value, second.value)
    assert torch.equal(whole.ask(), second.ask())
    assert losses(whole.value[None]) < 0.7 * losses(INITIAL[None])


def test_losses_that_are_not_finite():
    for search in searches().values():
        values = losses(search.ask())
        values[0] = torch.nan
        with pytest.raises(FloatingPointError, match="not finite"):
            search.tell(values)


def test_adam_is_torchs():
    token = torch.nn.Parameter(INITIAL.clone())
    reference = torch.optim.Adam([token], lr=5e-3)
    mine, step = INITIAL.clone(), AdamStep()
    for i in range(5):
        token.grad = draw(D, seed=i)
        reference.step()
        mine = mine + step.update(draw(D, seed=i))
    torch.testing.assert_close(mine, token.detach(), rtol=1e-6, atol=1e-7)


def test_average_weighs_late_iterates():
    iterates = draw(30, D)
    mean, late = IterateAverage(0.0), IterateAverage(4.0)
    for iterate in iterates:
        mean.add(iterate)
        late.add(iterate)
    torch.testing.assert_close(mean.value, iterates.mean(0), rtol=1e-4, atol=1e-6)
    # Weights proportional to the rising factorial i (i + 1) (i + 2) (i + 3), i = 1, 2, ...
    i = torch.arange(1, 31, dtype=torch.float64)
    weights = i * (i + 1) * (i + 2) * (i + 3)
    expected = (weights / weights.sum()) @ iterates.double()
    torch.testing.assert_close(late.value.double(), expected, rtol=1e-4, atol=1e-5)


def test_timesteps_are_uniform_in_their_window():
    puts = PartialUniformTimesteps()
    times = puts.sample(40_000, generator(0))
    assert times.dtype == torch.int64
    assert (times.min(), times.max()) == (500, 899)
    assert chisquare(times.sub(500).bincount(minlength=400).numpy()).pvalue > 1e-3
    strata = puts.stratified(50, generator(0))
    assert torch.equal((strata - 500) // 8, torch.arange(50))
    pooled = torch.cat([puts.stratified(400, generator(i)) for i in range(3)])
    assert pooled.bincount()[500:].eq(3).all()


@pytest.mark.parametrize(("low", "high"), [(500, 500), (-1, 5)])
def test_bad_timesteps(low, high):
    with pytest.raises(ValueError, match="low"):
        PartialUniformTimesteps(low, high)


def noisy_losses(points, batch):
    """Losses of a batch: all of them are shifted by a lot, each by a little."""
    shift, own = draw(1, seed=batch).item(), draw(len(points), seed=1000 + batch)
    return losses(points) + 1000 * shift + 0.5 * own


def test_words_are_compared_with_the_class_word_on_the_same_batch():
    """The few better words are found though batches differ by far more than words do."""
    words = draw(35, D, seed=5)
    better = losses(words).argsort()[:3]
    search, calls = WordSearch(INITIAL, words, group=7), []
    while not search.done:
        points = search.ask()
        assert torch.equal(points[0], INITIAL)
        search.tell(noisy_losses(points, len(calls)))
        calls.append(len(points))
    # 35 words once, 14 twice, 7 six times, in groups of seven: always eight points.
    assert calls == [8] * (5 + 2 * 2 + 6)
    torch.testing.assert_close(search.value, words[better].mean(0))


def test_the_class_word_stays_if_no_word_is_better():
    search = WordSearch(TARGET, draw(20, D, seed=5), group=4)
    assert torch.equal(search.value, TARGET)
    while not search.done:
        search.tell(losses(search.ask()))
        assert torch.equal(search.value, TARGET)


def test_descent_begins_where_the_words_end():
    search = searches()["words"]
    while not search.words.done:
        assert torch.equal(search.value, search.words.value)
        search.tell(losses(search.ask()))
    assert torch.equal(search.ask()[0], search.words.value)
    assert losses(search.words.value[None]) < losses(INITIAL[None])


@pytest.mark.parametrize("stop", [0, 2, 8, 30])
def test_words_continue_exactly_in_every_round(stop):
    whole, first, second = (searches()["words"] for _ in range(3))
    advance(whole, 40)
    advance(first, stop)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
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
    with pytest.raises(ValueError, match="60"):
        candidate_words(tables, centre, 60, seed=0)


def test_warmup_raises_the_rate_in_equal_parts():
    plain, warm = AdamStep(0.1), AdamStep(0.1, warmup=4)
    for i in range(1, 7):
        gradient = draw(D, seed=i)
        expected = min(1, i / 4) * plain.update(gradient)
        torch.testing.assert_close(warm.update(gradient), expected)
    for settings in ({"warmup": -1}, {"rate": 0.0}, {"betas": (0.9, 1.0)}):
        with pytest.raises(ValueError, match="warmup|rate|betas"):
            AdamStep(**settings)
