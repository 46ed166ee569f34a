"""Names that are not known, and what may have been meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(what: str, name: str, known: Iterable[str], more: str = "") -> ValueError:
    """The error that refuses a name; it lists the known ones, and first those that look like it.

    Args:
        what: What it should be the name of.
        name: As it came.
        known: All names.
        more: What else would do, to be added.
    """
    names = list(known)
    similar = get_close_matches(str(name).lower(), names)
    meant = f" (did you mean {' or '.join(map(repr, similar))}?)" if similar else ""
    return ValueError(f"unknown {what} {name!r}{meant}: known are {', '.join(names)}{more}")
