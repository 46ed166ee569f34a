"""What guidance composes with: every cell of docs/how-to/composing.md."""

import functools

import pytest
import torch

from pilotage.guidance import Schedule
from pilotage.pipelines import guided

from ..families import FAMILIES
from .checks import latents
from .composition import (
    COLUMNS,
    PAGE,
    ROOT,
    TABLES,
    UNTESTED,
    WORKS,
    CountsCalls,
    CountsSteps,
    by_hand,
    page,
)
from .seam.test_faults import STEPS, cached_pipe

ROWS = {row.title: row for rows in TABLES.values() for row in rows}
RUN = [title for title, row in ROWS.items() if row.put_on is not None]
EXTRA = {"num_inference_steps": STEPS}


def guided_by_hand(row, put_on):
    """What the stock pipeline draws in every column, and without any."""
    pipe = FAMILIES[row.family].build()
    if put_on:
        row.put_on(pipe)
    arguments = EXTRA | dict(row.arguments)
    results, forward = {"plain": latents(pipe, row.family, 2, **arguments)}, pipe.unet.forward
    for column in COLUMNS:
        by_hand(pipe.unet, column, FAMILIES[row.family].call(2, False)["guidance_scale"])
        results[column] = latents(pipe, row.family, 2, **arguments)
        pipe.unet.forward = forward
    return results


@functools.cache
def without():
    """The same without anything put on: what changes no result is compared with it."""
    return guided_by_hand(ROWS["attention slicing"], put_on=False)


@pytest.mark.parametrize("title", RUN)
def test_what_is_run_here(title):
    """Rows are left out, reused and estimated as by hand, on a pipeline that evaluates them all."""
    row = ROWS[title]
    assert {row.cell(column) for column in COLUMNS} == {WORKS}
    expected = guided_by_hand(row, put_on=True) if row.part else without()
    pipe = guided(FAMILIES[row.family].build())
    row.put_on(pipe)
    for column, (_, guidance) in COLUMNS.items():
        found = latents(pipe, row.family, 2, guidance=guidance, **EXTRA, **row.arguments)
        if row.rounds:
            effect = (expected["plain"] - without()["plain"]).norm()
            assert (found - expected[column]).norm() < effect / 10, column
        else:
            torch.testing.assert_close(found, expected[column], rtol=1e-4, atol=1e-4)


def test_what_is_run_elsewhere_exists():
    for row in ROWS.values():
        cells = {row.cell(column) for column in COLUMNS}
        assert row.put_on or row.shown or cells == {UNTESTED}, row.title
        for shown in row.shown:
            file, _, name = shown.partition("::")
            assert f"def {name}(" in (ROOT / file).read_text(), f"{row.title}: {shown}"


def test_the_page_has_the_tables():
    assert (ROOT / PAGE).read_text() == page(), "run: python -m tests.pipelines.composition"


# Cells that are wrong: these fail once they are right, or refused, and the page is out of date


def far(found, expected, plain):
    """Whether a result is further from what was expected than that is from doing nothing."""
    return (found - expected).norm() > (plain - expected).norm()


def test_first_block_cache_and_one_call_for_all_branches():
    """One row's residual, kept when branches were evaluated in turn, is given to both rows."""
    plain = latents(FAMILIES["wan"].build(), "wan", 1, **EXTRA)
    expected = latents(cached_pipe("wan", "FirstBlockCache", True), "wan", 1, **EXTRA)
    pipe = guided(cached_pipe("wan", "FirstBlockCache", True))
    found = latents(pipe, "wan", 1, guidance="cfg", batch_branches=True, **EXTRA)
    assert far(found, expected, plain)


@pytest.mark.parametrize("what", COLUMNS)
def test_a_cache_that_takes_turns(what):
    """Branches change places as soon as one is left out; where all of a step is, they do not."""
    pipe = guided(FAMILIES["wan"].build())
    cache, served = CountsCalls(pipe.transformer), []
    cache.put_on()
    stock, texts = pipe.transformer.forward, []

    def forward(*args, **kwargs):
        text = kwargs["encoder_hidden_states"]
        if not any(text.equal(other) for other in texts):
            texts.append(text)
        served.append((cache.calls % 2, [text.equal(other) for other in texts].index(True)))
        return stock(*args, **kwargs)

    pipe.transformer.forward = forward
    latents(pipe, "wan", 1, guidance=COLUMNS[what][1], **EXTRA)
    assert all(kept == branch for kept, branch in served) == (what in ("apg", "forecast"))


def test_a_cache_that_counts_steps_of_the_scheduler():
    """Where the steps at which it computes are those that are skipped, it computes no more."""
    computed = {}
    for guidance in ("cfg", Schedule(("both", "both", *("forecast", "both") * 2))):
        pipe = guided(FAMILIES["sdxl"].build())
        cache = CountsSteps(pipe)
        cache.put_on()
        assert latents(pipe, "sdxl", 1, guidance=guidance, **EXTRA).isfinite().all()
        computed[str(guidance)] = cache.computed
    assert list(computed.values()) == [[0, 2, 4], [0]]
