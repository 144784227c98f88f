"""The name that was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The likest valid name, None where none is at least so like, 0..1.

    Letters do not say which depth of a network is near: of names that are alike, it is the one
    with the nearest number at its end.
    """
    likeness = {other: difflib.SequenceMatcher(None, other, name).ratio() for other in valid}
    close = [other for other, ratio in likeness.items() if ratio >= cutoff]
    return max(close, key=lambda one: (likeness[one], -_apart(name, one), one), default=None)


def _apart(one: str, other: str) -> int:
    first, second = (re.search(r"\d*$", name) for name in (one, other))
    assert first is not None
    assert second is not None
    return abs(int(first[0] or 0) - int(second[0] or 0))
