"""Kernels compiled without a GPU: what the stored file says, and what is a complaint."""

import copy
import json

from examples.studies.kernels import CAPABILITIES, OUTPUT, complaints
from tests.structure import ROOT

TARGET = {"variants": 3, "max_registers": 99, "spills": 0, "vector_loads": True}
FIGURES = {"triton": "3.9.0", "targets": {name: dict(TARGET) for name in CAPABILITIES}}


def test_the_stored_file_is_without_complaint():
    stored = json.loads((ROOT / OUTPUT).read_text())
    assert set(stored["targets"]) == set(CAPABILITIES)
    assert complaints(stored, stored) == []


def test_what_is_worse_or_other_is_named():
    assert complaints(FIGURES, FIGURES) == []
    for name, value, message in (
        ("spills", 1, "sm_90: 1 kernels spill registers"),
        ("vector_loads", False, "less than 128 bits"),
        ("variants", 4, "sm_90: 4 variants, 3 stored"),
        ("max_registers", 120, "sm_90: 120 registers, 99 stored"),
    ):
        found = copy.deepcopy(FIGURES)
        found["targets"]["sm_90"][name] = value
        (line,) = complaints(found, FIGURES)
        assert message in line
    found["triton"] = "3.10.0"  # another compiler may need other registers
    assert complaints(found, FIGURES) == []
