"""What guidance composes with: every cell of docs/how-to/composing.md."""

import functools

import pytest
import torch

from pilotage.pipelines import LayoutError, guided

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
from .seam.test_faults import CACHES, STEPS, cached_pipe

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


# Refused because they would be wrong without an error


def test_first_block_cache_and_one_call_for_all_branches():
    """One row's residual, kept when branches were evaluated in turn, would go to both rows."""
    for cache in CACHES:
        pipe = guided(cached_pipe("wan", cache, True))
        with pytest.raises(LayoutError, match=f"{cache}.*leave out batch_branches=True"):
            latents(pipe, "wan", 1, guidance="cfg", batch_branches=True, **EXTRA)


def test_a_cache_that_takes_turns():
    """As soon as one branch is left out, the other would be served from what was kept of it."""
    pipe = guided(FAMILIES["wan"].build())
    CountsCalls(pipe.transformer).put_on()
    for column, (_, guidance) in COLUMNS.items():
        if column == "apg":
            assert latents(pipe, "wan", 1, guidance=guidance, **EXTRA).isfinite().all()
            continue
        with pytest.raises(LayoutError, match="cache-dit or ParaAttention.*leave out"):
            latents(pipe, "wan", 1, guidance=guidance, **EXTRA)


def test_a_cache_that_counts_steps_of_the_scheduler():
    """Where the steps at which it computes are those that are skipped, it would compute no more."""
    pipe = guided(FAMILIES["sdxl"].build())
    CountsSteps(pipe).put_on()
    for guidance in ("ag", "forecast"):
        with pytest.raises(LayoutError, match="DeepCache.*leave out"):
            latents(pipe, "sdxl", 1, guidance=guidance, **EXTRA)
    assert latents(pipe, "sdxl", 1, guidance="apg", **EXTRA).isfinite().all()
