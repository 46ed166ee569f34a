"""Formulas in docstrings, written for readers of the source, as the site's own."""

import re
import textwrap

import griffe

DISPLAYED = re.compile(r"^( *)\.\. math::[ \t]*(.*)\n((?:\1 +.*\n|[ \t]*\n)*)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]+)`")


def with_formulas(text: str) -> str:
    """A docstring whose ``.. math::`` blocks and :math: roles are TeX between dollars."""

    def displayed(match: re.Match) -> str:
        indent, first, rest = match.groups()
        formula = f"{first}\n{textwrap.dedent(rest)}".strip()
        if "&" in formula and r"\begin" not in formula:
            formula = f"\\begin{{aligned}}\n{formula}\n\\end{{aligned}}"
        return "\n" + textwrap.indent(f"$$\n{formula}\n$$", indent) + "\n\n"

    return INLINE.sub(r"$\1$", DISPLAYED.sub(displayed, text + "\n"))


class Formulas(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Formulas of one module, class or function."""
        if obj.docstring:
            obj.docstring.value = with_formulas(obj.docstring.value)
