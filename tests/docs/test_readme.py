"""The README: its size, its counts, its links, and that its example runs."""

import re

import pytest
import torch

from pilotage.guidance import resolve

from .counts import PAGES, ROOT, with_counts

README = (ROOT / "README.md").read_text()
PAGES_WITH_LINKS = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]
SITE = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))


def test_it_is_short():
    assert len(README.splitlines()) <= 150
    assert len(README.encode()) <= 10_000


@pytest.mark.parametrize("page", PAGES)
def test_counts_are_those_of_the_package(page):
    assert (ROOT / page).read_text() == with_counts(page), "run: python -m tests.docs.counts"


@pytest.mark.parametrize("page", PAGES_WITH_LINKS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", (ROOT / page).read_text()):
        assert "://" in target or (ROOT / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", [*PAGES_WITH_LINKS, *SITE])
def test_modules_that_are_run_exist(page):
    for name in re.findall(r"python -m ([\w.]+)", (ROOT / page).read_text()):
        package, _, rest = name.partition(".")
        path = ROOT / (rest if package == "pilotage" else name).replace(".", "/")
        if package in ("pilotage", "examples", "tests"):
            assert path.with_suffix(".py").is_file() or path.is_dir(), f"{page}: python -m {name}"


def test_the_commands_are_there():
    for command in (
        "pip install -c constraints.txt -e . && python examples/quickstart.py",
        'pip install -c constraints.txt -e ".[test]" && pytest -n 2 --dist loadfile',
    ):
        assert command in README.splitlines()


def test_the_rule_of_the_example_works():
    (code,) = re.findall(r"<!-- tested -->\n```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 15
    exec(code, {"__name__": "readme"})
    from pilotage.guidance import Predictions, Step

    cond, uncond = torch.randn(2, 3, 4, 4, 4).double()
    rule = resolve("ramp+ag").rule
    for index, share in ((0, 0.25), (3, 1.0)):
        step = Step(index, total=4)
        predictions = Predictions({"cond": cond, "uncond": uncond}, step)
        guided, state = rule.combine(predictions, step, 5.0, None)
        torch.testing.assert_close(guided, cond + share * 4 * (cond - uncond))
        assert state is None
