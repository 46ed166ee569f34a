"""Sentences about a recommendation: why this setting, beside plain CFG, what to beware of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .verdicts import Found, Row, number

# Name, what the best is called, and by what the best comes first: low distances, high alignments.
QUALITY = {"fd": ("Fréchet distance", "lowest", 1), "alignment": ("alignment", "highest", -1)}
FEW = 20  # prompts below which standard errors are rough
LISTED = 3  # settings named in a sentence


class Sentences(NamedTuple):
    """Sentences by one metric.

    Args:
        names: Label -> how a setting is called.
        metric: A key of `QUALITY`.
        found: The metric's paired differences.
        resampled: What ``cells.json`` says under this name.
    """

    names: dict[str, str]
    metric: str
    found: Found
    resampled: dict[str, Any]

    def why(self, chosen: Row, best: Row, asked: Sequence[Row], as_good: Sequence[Row]) -> str:
        """The recommended setting among those asked for."""
        name, extreme, _ = QUALITY[self.metric]
        if len(asked) == 1:
            return f"It is the only setting asked for; its {name} is {self._value(chosen)}."
        if chosen is not best:
            return self._cheaper(chosen, best)
        lead = (
            f"It has the {extreme} {name} of the {len(asked)} settings asked for, "
            f"{self._value(chosen)}"
        )
        same: list[str] = []
        unknown: list[str] = []
        for row in as_good:
            if row is not chosen:
                one = self.found[chosen["label"], row["label"]]
                text = self.names[row["label"]] + one.would(" ({})")
                (same if one.direction == 0 else unknown).append(text)
        if not same and not unknown:
            return f"{lead}, and is clearly better than every other."
        if same:
            lead += f"; it gives the same as {_listed(same)}"
        if unknown:
            lead += f"; {self._units} cannot tell it from {_listed(unknown)}"
        return f"{lead}."

    def baselines(
        self, chosen: Row, plain: Row | None, equal: Row | None, added: Sequence[Row]
    ) -> str:
        """Plain CFG, CFG at the same cost, and an added baseline that is clearly better."""
        sign = QUALITY[self.metric][-1]
        parts = []
        if plain is not None and plain.get(self.metric) is not None:
            parts.append(f"plain CFG ({self.names[plain['label']]}) {self._beside(plain, chosen)}")
        if equal is not None:
            lead = f"CFG with {equal['steps']} steps, which costs as much,"
            parts.append(f"{lead} {self._beside(equal, chosen)}")
        above = [
            row
            for row in added
            if row is not plain
            and row is not equal
            and self.found[row["label"], chosen["label"]].verdict(sign) == "better"
        ]
        if above:
            top = min(above, key=lambda row: sign * row[self.metric])
            parts.append(
                f"{self.names[top['label']]}, added for comparison only, is clearly better "
                f"({number(top[self.metric])}) with {number(top['nfe'])} evaluations"
            )
        text = "; ".join(parts)
        return f"{text[0].upper()}{text[1:]}." if text else ""

    def warning(self) -> str:
        """What so few prompts cannot say."""
        if self.resampled["unit"] == "pictures":
            return "All pictures are of one prompt, and say nothing about others."
        if (count := self.resampled["count"]) < FEW:
            return (
                f"Only {count} prompts: intervals from fewer than {FEW} are rough, and prompts not "
                "tried may differ."
            )
        return ""

    @property
    def _units(self) -> str:
        """What was resampled, and how much of it."""
        one_prompt = self.resampled["unit"] == "pictures"
        return f"{self.resampled['count']} {'pictures of one prompt' if one_prompt else 'prompts'}"

    def _cheaper(self, chosen: Row, best: Row) -> str:
        """The recommended setting beside the best figure, which costs more."""
        name, extreme, _ = QUALITY[self.metric]
        one = self.found[chosen["label"], best["label"]]
        lead = (
            f"{self.names[best['label']]} has the {extreme} {name} "
            f"({number(best[self.metric])} against {number(chosen[self.metric])}), with "
            f"{number(best['nfe'])} network evaluations a picture instead of "
            f"{number(chosen['nfe'])}"
        )
        if one.direction == 0:
            return f"{lead}, and the two are the same in every resample."
        return f"{lead}, but {self._units} cannot tell the two apart{one.would()}."

    def _beside(self, row: Row, chosen: Row) -> str:
        """What a baseline is beside the recommended setting."""
        one = self.found[row["label"], chosen["label"]]
        values = f"{number(row[self.metric])} against {number(chosen[self.metric])}"
        match one.verdict(QUALITY[self.metric][-1]):
            case "cannot tell":
                return f"cannot be told from it ({values}{one.would()})"
            case "the same":
                return f"gives the same ({values})"
            case verdict:
                return f"is clearly {verdict} ({values})"

    def _value(self, row: Row) -> str:
        text = number(row[self.metric])
        if interval := row.get(f"{self.metric}_interval"):
            text += f" (95 % interval {number(interval[0])} to {number(interval[1])})"
        return text


def _listed(labels: Sequence[str]) -> str:
    more = len(labels) - LISTED
    return ", ".join(labels[:LISTED]) + (f" and {more} more" if more > 0 else "")
