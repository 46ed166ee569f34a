"""Changes of the core that no test notices: what the stored file says, and if it is current."""

import json
from collections import defaultdict

import pytest

from examples.studies import mutants

COMMAND = 'run python -m examples.studies.mutants (pip install -e ".[dev]")'


@pytest.fixture(scope="module")
def stored():
    return json.loads((mutants.ROOT / mutants.OUTPUT).read_text())


@pytest.fixture(scope="module")
def texts(stored):
    """(file, function) -> its text, now; a setter has the name of its property."""
    found = defaultdict(list)
    for file in {row["file"] for row in stored["mutants"]}:
        for name, text in mutants.functions((mutants.ROOT / file).read_text()):
            found[file, name].append(text)
    return found


def test_every_change_is_caught_or_makes_no_difference(stored):
    rows = stored["mutants"]
    outcomes = [row["outcome"] for row in rows]
    caught = outcomes.count("caught") + outcomes.count("timeout")
    equivalent = outcomes.count("equivalent")
    assert len(rows) == stored["drawn"] >= 200
    assert (caught, equivalent) == (stored["caught"], stored["equivalent"])
    assert caught + equivalent == len(rows), [r for r in rows if r["outcome"] == "survived"]
    assert equivalent <= 0.15 * len(rows)
    assert sum(sum(found.values()) for found in stored["by_folder"].values()) == len(rows)


def test_what_makes_no_difference_has_a_reason(stored):
    known = mutants.reasons()
    for row in stored["mutants"]:
        named = row["file"], row["function"], row["line"], row["change"]
        assert (row["outcome"] == "equivalent") == (named in known)
        if named in known:
            assert row["reason"] == known[named] and len(known[named]) > 20
    assert len(known) <= stored["equivalent"], "a reason for a change that is not drawn"


def test_every_change_applies_to_the_code_as_it_is(stored, texts):
    for row in stored["mutants"]:
        lines = {
            line.strip()
            for text in texts[row["file"], row["function"]]
            for line in text.splitlines()
        }
        gone = [line for line in row["line"].splitlines() if line not in lines]
        assert not gone, f"{row['file']}, {row['function']}: {gone}: {COMMAND}"


def test_the_file_is_of_this_code(stored, texts):
    """A small change need not be tried again; many must."""
    now = {
        named: [mutants.digest(text.strip()) for text in found] for named, found in texts.items()
    }
    same = [row["text"] in now[row["file"], row["function"]] for row in stored["mutants"]]
    assert sum(same) >= 0.8 * len(same), COMMAND


def test_every_place_of_changes_has_tests():
    for file in mutants.files():
        assert mutants.tests_of(file)
    for arguments in mutants.TESTS.values():
        for argument in arguments:
            path = argument.rpartition("=")[2].partition("::")[0]
            assert (mutants.ROOT / path).exists(), argument
    assert mutants.tests_of("guidance/analytic/local.py") == ("tests/guidance/analytic",)
    assert mutants.tests_of("guidance/trace.py") == mutants.GUIDANCE
    assert mutants.tests_of("guidance/run.py")[0] == "tests/guidance/test_run.py"


def test_functions_of_a_file():
    code = """
LIMIT = 1
class A:
    @property
    def size(self):
        def inner(): ...
        return 1
    class B:
        def f(self): ...
def g(x: int = 3) -> int:
    return x
"""
    found = dict(mutants.functions(code))
    assert list(found) == ["A.size", "A.B.f", "g"]
    assert found["g"] == "def g(x: int = 3) -> int:\n    return x"
    assert found["A.size"].startswith("def size(self):") and "inner" in found["A.size"]
