"""The state of the house: what the stored file says, the limits, and the code as it is now."""

import ast
import json

import pytest

from examples.studies import house

LIMITS = {
    "circles": 0,
    "type_errors": 0,
    "readme_lines": 150,
    "readme_bytes": 10 * 1024,
    "public_names_without_docstring": 0,
}


@pytest.fixture(scope="module")
def stored():
    return json.loads((house.ROOT / house.OUTPUT).read_text())


@pytest.fixture(scope="module")
def now():
    return house.counted()


@pytest.mark.parametrize("name", LIMITS)
def test_limits_hold_in_the_file_and_in_the_code(name, stored, now):
    assert stored[name] <= LIMITS[name]
    # What mypy finds is another step of CI.
    assert now.get(name, 0) <= LIMITS[name]


def test_the_file_is_of_this_code(stored, now):
    """A small change need not be measured again; a file of another house must."""
    for name in ("lines", "readme_lines", "readme_bytes", "docs_pages", "type_ignores"):
        assert now[name] == pytest.approx(stored[name], rel=0.02, abs=2), (
            f"{name}: run python -m examples.studies.house"
        )
    assert sum(stored["lines_by_folder"].values()) == stored["lines"]


def test_settings_give_what_they_gave_before(stored):
    found = stored["settings"]["max_abs_difference"]
    assert set(found) == set(house.SETTINGS)
    assert max(found.values()) <= 1e-4 * stored["settings"]["largest_latent"]


def test_names_without_docstring_are_found():
    code = '''
class Public:
    def __init__(self): ...
    @property
    def size(self): ...
    @size.setter
    def size(self, value): ...
    def _own(self): ...
class _Private:
    def method(self): ...
def documented():
    """Is."""
    def inner(): ...
'''
    assert house.undocumented(ast.parse(code), "m") == ["m", "m.Public", "m.Public.size"]
