"""What paired differences say of two settings, and how settings and numbers are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]


class Beside(NamedTuple):
    """A setting's metric minus another's, its interval, and how many prompts would tell."""

    difference: float
    interval: list[float] | None
    needed: int | None

    @property
    def direction(self) -> int | None:
        """1: clearly higher, -1: clearly lower, 0: the same whatever is drawn; None: unclear."""
        if self.interval is None:
            return None
        low, high = self.interval
        return 1 if low > 0 else -1 if high < 0 else 0 if low == high == 0 else None

    def verdict(self, sign: int) -> str:
        """What it says of the first setting; `sign` is 1 if low values are good, else -1."""
        words = {None: "cannot tell", 0: "the same", sign: "worse", -sign: "better"}
        return words[self.direction]

    def would(self, form: str = "; {}") -> str:
        """How many prompts would tell, where that is known, put into `form`."""
        return form.format(f"about {self.needed:,} would") if self.needed else ""


Found = dict[tuple[str, str], Beside]


def found_by(comparisons: Iterable[Row], metric: str) -> Found:
    """(setting, other) -> the first's metric minus the second's; both orders of every pair."""
    found: Found = {}
    for one in comparisons:
        if one["metric"] == metric:
            ends = one["interval"]
            back = None if ends is None else [-ends[1], -ends[0]]
            found[one["setting"], one["other"]] = Beside(one["difference"], ends, one["needed"])
            found[one["other"], one["setting"]] = Beside(-one["difference"], back, one["needed"])
    return found


def short_labels(rows: Sequence[Row]) -> dict[str, str]:
    """Label -> the label without its steps, where all settings asked for have as many."""
    counts = {row["steps"] for row in rows if row["kind"] == "grid"}
    end = f", {counts.pop()} steps" if len(counts) == 1 else ""
    return {row["label"]: row["label"].removesuffix(end) for row in rows}


def number(value: float | None) -> str:
    """Three significant digits; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
