"""Would the tests notice? A sample of small changes to the core, each tried against its tests.

    pip install -e ".[dev]"
    python -m examples.studies.mutants

Cosmic Ray's operators exchange one operation, comparison, number or word of Python at a time. The
sample is drawn from all places inside functions of `guidance`, the seam, the schedulers and the
metrics; texts of errors, annotations and assertions are left out. Every change is made in a copy
of the checkout, and the tests beside the file (`TESTS`) are run on it until one fails.

What no test notices is either a test that is missing or a change that makes no difference: those
are listed with the reason in ``mutants.toml`` beside this file. A change is drawn by its line, so
that the sample stays as it is where the code does; a result holds as long as the function that it
is in does not change. Results are kept in ``cache/mutants.json``: a run that was ended goes on, and
one elsewhere tries what the stored figures do not say.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from examples.studies.house import as_installed
from pilotage.eval.record import write_figures, write_json
from tests.structure import ROOT

OUTPUT = Path("eval/results/mutants.json")
CACHE = Path("cache/mutants.json")
REASONS = Path("examples/studies/mutants.toml")
SEED = 19
SHARE = 0.045  # of all places, by chance

GUIDANCE = (
    "tests/guidance",
    *(f"--ignore=tests/guidance/{name}" for name in ("analytic", "ops", "zeroth_order")),
)
RUN = tuple(f"tests/guidance/test_{name}.py" for name in ("run", "measured", "contracts"))
PAIRED = "tests/eval/comparison/test_paired.py"
ALIGNMENT = "tests/eval/metrics/test_alignment.py"  # one test needs the package as installed
SEAM = ("tests/pipelines/seam/test_guards.py", "tests/pipelines/seam/test_features.py")
# Code -> the tests beside it, as arguments of pytest: the longest name that a file begins with.
TESTS: dict[str, tuple[str, ...]] = {
    "guidance": GUIDANCE,
    "guidance/analytic": ("tests/guidance/analytic",),
    "guidance/fitting": ("tests/guidance/fitting",),
    "guidance/ops": ("tests/guidance/ops",),
    "guidance/policies": ("tests/guidance/policies", *RUN),
    "guidance/rules": ("tests/guidance/rules",),
    "guidance/zeroth_order": ("tests/guidance/zeroth_order",),
    "pipelines/schedulers": ("tests/pipelines/schedulers",),
    "guidance/run": (*RUN, "tests/guidance/policies"),
    "pipelines/seam": SEAM,
    "pipelines/seam/batched": ("tests/pipelines/seam/test_batched.py",),
    **dict.fromkeys(
        ("pipelines/seam/deferred", "pipelines/seam/exchange", "pipelines/seam/parallel"),
        ("tests/pipelines/seam/test_parallel.py", "tests/pipelines/seam/test_batched.py"),
    ),
    "pipelines/seam/learning": ("tests/pipelines/seam/test_learning.py", *SEAM[:1]),
    "pipelines/seam/noise_levels": (
        "tests/pipelines/seam/test_noise_levels.py",
        "tests/pipelines/seam/test_cfg_plus_plus.py",
    ),
    "pipelines/seam/patterns": ("tests/pipelines/seam/test_patterns.py", *SEAM[:1]),
    "eval/metrics": ("tests/eval/metrics", f"--deselect={ALIGNMENT}::test_similarity_beside_it"),
    "eval/metrics/bootstrap": ("tests/eval/metrics/test_frechet.py", PAIRED),
    "eval/metrics/resampled": (PAIRED,),
}

# What is exchanged for what, of Cosmic Ray's operators: what a slip might be. (A shift for a
# product of floats would be noticed by Python itself.)
ARITHMETIC = ("Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow")
SETS = ("BitOr", "BitAnd", "BitXor")
ORDER = ("Lt", "LtE", "Gt", "GtE")
EXCHANGED = (
    *(f"ReplaceBinaryOperator_{a}_{b}" for a in ARITHMETIC for b in ARITHMETIC[:4] if a != b),
    *(f"ReplaceBinaryOperator_{a}_{b}" for a in SETS for b in SETS if a != b),
    *(f"ReplaceComparisonOperator_{a}_{b}" for a in ORDER for b in ORDER if a != b),
    "ReplaceComparisonOperator_Eq_NotEq",
    "ReplaceComparisonOperator_NotEq_Eq",
    "ReplaceComparisonOperator_Is_IsNot",
    "ReplaceComparisonOperator_IsNot_Is",
    "ReplaceUnaryOperator_USub_UAdd",
    "ReplaceUnaryOperator_Delete_Not",
    "ReplaceUnaryOperator_Delete_Invert",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak",
    "AddNot",
    "NumberReplacer",
    "ZeroIterationForLoop",
)

# In the copy: one process imports what is not ours, and is forked for every run of the tests.
SERVER = """
import importlib, json, os, signal, sys, time

def run(arguments, seconds, log, names=None):
    child = os.fork()
    if not child:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.dont_write_bytecode = names is None  # a change must leave none behind
        import pytest
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments]))
        if names:
            with open(names, "w") as file:
                json.dump(sorted(sys.modules), file)
        sys.stdout.flush()
        os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None

import torch, pytest
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    task = json.loads(line)
    for name in task.pop("load", ()):
        try:
            importlib.import_module(name)
        except Exception:
            pass  # only to save time: the tests import it anew, and fail on it
    print(json.dumps(run(**task)), flush=True)
"""


@dataclass(frozen=True)
class Mutant:
    """A change of one place.

    Args:
        file: Path of the file within the checkout.
        function: The function that it is in, behind its class.
        line: The line or lines, as they are.
        change: What they become.
        operator: Cosmic Ray's name.
        text: Digest of the function's text: results hold as long as it does.
        key: Digest of everything, the tests' names included.
        code: The whole file, changed.
    """

    file: str
    function: str
    line: str
    change: str
    operator: str
    text: str
    key: str
    code: str

    @property
    def named(self) -> tuple[str, str, str, str]:
        """What it is, without where its line lies."""
        return self.file, self.function, self.line, self.change

    @property
    def tests(self) -> tuple[str, ...]:
        """Arguments of pytest for the tests beside its file."""
        return tests_of(self.file)


def place_of(file: str) -> str:
    """The name in `TESTS` that a file belongs to."""
    return max((name for name in TESTS if file.startswith(name)), key=len)


def tests_of(file: str) -> tuple[str, ...]:
    """Arguments of pytest for the tests beside a file."""
    return TESTS[place_of(file)]


def digest(*parts: Any) -> str:
    """Sixteen hexadecimal digits of some values."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def files() -> list[str]:
    """The files that changes are drawn from."""
    found = {path for name in TESTS for path in ROOT.glob(f"{name}/**/*.py")}
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def functions(source: str) -> Iterator[tuple[str, str]]:
    """(name behind its class, text without decorators) of the functions of a file, outer ones."""

    def within(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield prefix + child.name, ast.get_source_segment(source, child) or ""
            else:
                is_class = isinstance(child, ast.ClassDef)
                yield from within(child, f"{prefix}{child.name}." if is_class else prefix)

    return within(ast.parse(source), "")


# Drawing


def drawn(seed: int = SEED, share: float = SHARE) -> list[Mutant]:
    """The sample: `share` of all places, and one change of each."""
    return [mutant for file in files() for mutant in _drawn_of(file, seed, share)]


def _drawn_of(file: str, seed: int, share: float) -> Iterator[Mutant]:
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider

    source = (ROOT / file).read_text()
    lines, known = source.splitlines(), OperatorProvider()
    operators = {name: known[name]() for name in EXCHANGED}
    counts: Counter[str] = Counter()
    places: dict[tuple, list[tuple[str, int]]] = defaultdict(list)
    owners: dict[tuple, Any] = {}
    for node in ast_nodes(get_ast(source)):
        for name, operator in operators.items():
            for start, end in operator.mutation_positions(node):
                owner = _function_of(node, start)
                if owner is not None:
                    places[start, end].append((name, counts[name]))
                    owners[start, end] = owner
                counts[name] += 1
    repeats: Counter[tuple] = Counter()
    for (start, end), choices in sorted(places.items()):
        name, first, last = _described(owners[start, end])
        line = lines[start[0] - 1]
        column = start[1] - (len(line) - len(line.lstrip()))
        place = file, name, line.strip(), column, end[1] - start[1]
        repeats[place] += 1
        number = int(digest(seed, *place, repeats[place]), 16)
        if number / 16**16 >= share:
            continue
        operator, occurrence = choices[number % len(choices)]
        code = mutate_code(source, operators[operator], occurrence)
        assert code is not None
        before, after = _difference(source, code)
        text = digest("\n".join(lines[first - 1 : last]).strip())
        key = digest(file, name, text, start[0] - first, before, after)
        key = digest(key, *tests_of(file))
        yield Mutant(file, name, before, after, operator, text, key, code)


def _function_of(node: Any, start: tuple[int, int]) -> Any | None:
    """The outer function that a place is in; None if changes are not drawn there."""
    found, inner = None, node
    while (parent := inner.parent) is not None:
        if inner.type in ("raise_stmt", "assert_stmt", "decorator", "fstring"):
            return None
        if parent.type == "annassign" and inner is parent.children[1]:
            return None
        if parent.type == "tfpdef" or (parent.type == "funcdef" and inner is parent.annotation):
            return None
        if parent.type == "parameters":  # a star or slash among them
            return None
        if inner.type == "funcdef":
            found = inner
        inner = parent
    # The condition of an assertion is a place of the assertion itself.
    if node.type in ("assert_stmt", "raise_stmt") or found is None:
        return None
    return found if start > found.children[1].start_pos else None


def _described(function: Any) -> tuple[str, int, int]:
    """Name behind its class, first and last line of a function."""
    names, node = [], function
    while node is not None:
        if node.type in ("funcdef", "classdef"):
            names.append(node.name.value)
        node = node.parent
    last, column = function.end_pos
    return ".".join(reversed(names)), function.start_pos[0], last if column else last - 1


def _difference(source: str, code: str) -> tuple[str, str]:
    """The lines that differ, before and after, each without indentation."""
    before, after = source.splitlines(), code.splitlines()
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    parts = [op[1:] for op in matcher.get_opcodes() if op[0] != "equal"]
    first, last = parts[0], parts[-1]
    pair = before[first[0] : last[1]], after[first[2] : last[3]]
    return "\n".join(map(str.strip, pair[0])), "\n".join(map(str.strip, pair[1]))


# Trying


class Copy:
    """A copy of the checkout, changed one file at a time, and the tests run on it."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.log = folder / "tree", folder / "log.txt"
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name)
        self.stack = contextlib.ExitStack()
        path = self.stack.enter_context(as_installed(self.tree))
        own = {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=self.tree,
            env={**os.environ, **own},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.server.stdout is not None
        self.server.stdout.readline()
        self.seconds: dict[tuple[str, ...], float] = {}

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.kill()
        self.server.wait()
        self.stack.close()

    def ask(self, **task: Any) -> int | None:
        """Exit code of pytest; None: it took too long."""
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(task) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def pass_unchanged(self, tests: tuple[str, ...]) -> None:
        """Run tests on the code as it is, and find out how long they take.

        Raises:
            RuntimeError: one of them fails.
        """
        if tests in self.seconds:
            return
        names, begun = self.tree.parent / "modules.json", time.monotonic()
        code = self.ask(arguments=tests, seconds=3600, log=str(self.log), names=str(names))
        if code:
            raise RuntimeError(f"{' '.join(tests)} fails as it is:\n{self.log.read_text()[-3000:]}")
        self.seconds[tests] = time.monotonic() - begun
        print(f"{self.seconds[tests]:5.0f} s  {' '.join(tests)}", flush=True)
        ours = ("pilotage", "tests", "examples", "conftest", "__main__")
        load = [n for n in json.loads(names.read_text()) if n.partition(".")[0] not in ours]
        nothing = ("--version",)
        self.ask(load=load, arguments=nothing, seconds=600, log=str(self.log))

    def outcome(self, mutant: Mutant) -> str:
        """ "caught", "timeout" or "survived"."""
        self.pass_unchanged(mutant.tests)
        path = self.tree / mutant.file
        source, status = path.read_text(), path.stat()
        path.write_text(mutant.code)
        os.utime(path, (status.st_atime, status.st_mtime + 10_000))  # what is compiled is older
        try:
            allowed = 60 + 5 * self.seconds[mutant.tests]
            code = self.ask(arguments=mutant.tests, seconds=allowed, log=str(self.log))
        finally:
            path.write_text(source)
            os.utime(path, (status.st_atime, status.st_mtime))
        return "timeout" if code is None else "caught" if code else "survived"


def reasons() -> dict[tuple[str, str, str, str], str]:
    """Why changes make no difference, by what they are."""
    listed = tomllib.loads((ROOT / REASONS).read_text()).get("equivalent", [])
    return {(e["file"], e["function"], e["line"], e["change"]): e["reason"] for e in listed}


def held(sample: list[Mutant]) -> dict[str, str]:
    """Outcomes that the stored figures tell: of functions and tests that are the same."""
    if not (ROOT / OUTPUT).is_file():
        return {}
    stored = json.loads((ROOT / OUTPUT).read_text())
    told: dict[tuple, set[str]] = defaultdict(set)
    for row in stored["mutants"]:
        told[row["file"], row["function"], row["line"], row["change"], row["text"]].add(
            row["outcome"]
        )
    found = {}
    for mutant in sample:
        outcomes = told[*mutant.named, mutant.text]  # of lines that are there twice, of both
        if len(outcomes) == 1 and stored["tests"].get(place_of(mutant.file)) == list(mutant.tests):
            found[mutant.key] = outcomes.pop()
    return found


def main() -> int:
    """Try the sample; write the figures; 1 if a change is neither noticed nor explained."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the sample, try nothing")
    options = parser.parse_args()
    sample, known = drawn(), reasons()
    if options.list:
        for mutant in sample:
            print(f"{mutant.file} {mutant.function}\n  - {mutant.line}\n  + {mutant.change}")
        print(Counter(mutant.file.rpartition("/")[0] for mutant in sample), len(sample))
        return 0
    cache = held(sample) | (json.loads(CACHE.read_text()) if CACHE.is_file() else {})
    cached = {m.key: cache[m.key] for m in sample if cache.get(m.key) in ("caught", "timeout")}
    open_ = [m for m in sample if m.named not in known and m.key not in cached]
    print(f"{len(sample)} drawn, {len(open_)} to try")
    with contextlib.ExitStack() as stack:
        copy = None
        for number, mutant in enumerate(sorted(open_, key=lambda m: (m.key in cache, m.tests)), 1):
            if copy is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                copy = stack.enter_context(Copy(Path(folder)))
            begun = time.monotonic()
            cached[mutant.key] = outcome = copy.outcome(mutant)
            write_json(CACHE, cache | cached)
            seconds = time.monotonic() - begun
            print(
                f"{number:4}/{len(open_)} {outcome:8} {seconds:4.0f} s  {mutant.file}", flush=True
            )
            if outcome == "survived":
                print(f"  {mutant.function}\n  - {mutant.line}\n  + {mutant.change}", flush=True)
    figures = summary(sample, cached, known)
    write_figures(OUTPUT, figures)
    unused = set(known) - {m.named for m in sample}
    for named in sorted(unused):
        print(f"not drawn any more, remove it from {REASONS}: {named}")
    print({name: figures[name] for name in ("drawn", "caught", "equivalent", "survived")})
    return int(bool(figures["survived"] or unused))


def summary(
    sample: list[Mutant], outcomes: dict[str, str], known: dict[tuple[str, str, str, str], str]
) -> dict[str, Any]:
    """The figures: counts, by folder, and every change with what became of it."""
    rows = []
    for mutant in sample:
        row = {k: v for k, v in asdict(mutant).items() if k not in ("code", "key")}
        if mutant.named in known:
            row |= {"outcome": "equivalent", "reason": known[mutant.named]}
        else:
            row["outcome"] = outcomes[mutant.key]
        rows.append(row)
    counts = Counter("caught" if r["outcome"] == "timeout" else r["outcome"] for r in rows)
    folders: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        folders[row["file"].rpartition("/")[0]][row["outcome"]] += 1
    return {
        "seed": SEED,
        "share": SHARE,
        "drawn": len(rows),
        **{name: counts[name] for name in ("caught", "equivalent", "survived")},
        "by_folder": {name: dict(sorted(found.items())) for name, found in sorted(folders.items())},
        "tests": {name: list(arguments) for name, arguments in TESTS.items()},
        "mutants": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
