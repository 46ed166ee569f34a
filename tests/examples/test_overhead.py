"""The host cost study times what it says, and its figures are there."""

import json

import pytest

from examples.studies import overhead


@pytest.mark.parametrize("size", overhead.SIZES)
def test_every_setting_evaluates_what_it_says(size):
    pipe, call = overhead.pipeline(*overhead.SIZES[size])
    expected = {"cfg": 2, "apg": 2, "ag": 1}
    for name, (guidance, first) in overhead.SETTINGS.items():
        overhead.seconds(pipe, call, guidance, first)
        timed = pipe.unet.rows[first:]
        assert timed == [expected[name]] * len(timed)
        assert len(pipe.guidance_trace.steps) == overhead.STEPS


def test_the_branches_differ_and_are_guided():
    pipe, call = overhead.pipeline(*overhead.SIZES["small"])
    found = []
    for guidance in (None, "cfg", "apg"):
        pipe.unet.calls = []
        found.append(pipe(**call, guidance=guidance).images)
    assert (found[0] == found[1]).all() and not (found[0] == found[2]).all()


def test_the_figures_are_stored():
    stored = json.loads(overhead.OUTPUT.read_text())
    for size in overhead.SIZES:
        assert all(stored[size][name] > 0 for name in overhead.SETTINGS)
