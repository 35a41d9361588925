"""Filters: samples to leave out on purpose, by the numbers and words in their JSON.

filters = parse_filters(["aesthetic>=5", "meta.language=en"], max_pwatermark=0.5)
filters[0].passes({"aesthetic": 4.2})        # False; without that key in its JSON a sample passes
"""

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lcm_distill.errors import UsageError

FILTERED = "filtered out by"  # prefix of the reasons of samples that are left out on purpose, rather than bad

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    "=": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"\s*(?P<key>[^<>=!]+?)\s*(?P<comparison>>=|<=|!=|==?|>|<)\s*(?P<value>[^<>=!]+?)\s*")

# Names in public datasets; the first of these keys that a JSON has is used.
WATERMARK_KEYS = ("pwatermark", "p_watermark", "watermark")
AESTHETIC_KEYS = ("aesthetic", "aesthetic_score", "aesthetics_score", "AESTHETIC_SCORE", "aesthetics")


@dataclass(frozen=True)
class Filter:
    """A sample passes if its JSON's value, compared with `value`, satisfies this, or does not exist."""

    flag: str  # as the user gave it
    keys: tuple[str, ...]
    comparison: str
    value: float | str

    @property
    def reason(self) -> str:
        return f"{FILTERED} {self.flag}"

    def passes(self, meta: dict) -> bool:
        """Whether a sample with this JSON passes; a missing key or a value of another type never rejects it."""
        found = next((value for key in self.keys if (value := look_up(meta, key)) is not None), None)
        if isinstance(self.value, str):
            return not isinstance(found, str) or _COMPARISONS[self.comparison](found.strip(), self.value)
        number = _number(found)
        return number is None or _COMPARISONS[self.comparison](number, self.value)


def look_up(meta: dict, key: str) -> object:
    """The value of `key` in a JSON object, or, if there is no such key, of the path `a.b`; None if there is neither."""
    if key in meta:
        return meta[key]
    value: object = meta
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _number(value: object) -> float | None:
    """A finite number, also from a string (as in datasets made from tables); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def parse_filters(
    texts: Sequence[str] | None = None, *, max_pwatermark: float | None = None, min_aesthetic: float | None = None
) -> list[Filter]:
    """The filters of `--filter`, `--max_pwatermark` and `--min_aesthetic`.

    Args:
        texts: conditions such as `aesthetic>=5`: a key of the JSON (or a path, `meta.score`), one of
            `>= <= > < = !=`, and a number, or, with = and !=, a word.

    Raises:
        UsageError: a condition cannot be parsed.
    """
    filters = []
    for text in texts or ():
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise UsageError(f"--filter {text!r} cannot be parsed; write KEY>=NUMBER in quotes, like 'aesthetic>=5'.")
        key, comparison, word = match["key"], match["comparison"].replace("==", "="), match["value"]
        value: float | str | None = _number(word)
        if value is None:
            if comparison not in ("=", "!="):
                raise UsageError(f"--filter {text!r}: {word!r} is not a number; compare words by = or !=.")
            value = word
        filters.append(Filter(f"--filter '{text.strip()}'", (key,), comparison, value))
    if max_pwatermark is not None:
        filters.append(Filter(f"--max_pwatermark {max_pwatermark:g}", WATERMARK_KEYS, "<=", max_pwatermark))
    if min_aesthetic is not None:
        filters.append(Filter(f"--min_aesthetic {min_aesthetic:g}", AESTHETIC_KEYS, ">=", min_aesthetic))
    return filters


def is_filtered(reason: str) -> bool:
    """Whether a sample with this reason is left out on purpose, rather than bad."""
    return reason.startswith(FILTERED)
