"""Filters: samples to leave out on purpose, by the numbers and words in their JSON.

filters = parse_filters(["aesthetic>=5", "meta.language=en"], max_pwatermark=0.5)
filters[0].passes({"aesthetic": 4.2})        # False; without that key in its JSON a sample passes
filters[0].not_compared({"aesthetic": "?"})  # "the value is text": it passes, and is counted

A word compares with text, a number with a number or the text of one. A boolean, or the text "true" or "false", compares
with the words true and false, and as 1 or 0 with a number from 0 to 1: no other number separates the two.
"""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lcm_distill.data.sizes import as_number
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


_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class Filter:
    """A sample passes if its JSON's value, compared with `value`, satisfies this, or cannot be compared with it."""

    flag: str  # as the user gave it
    keys: tuple[str, ...]
    comparison: str
    value: float | str | bool

    @property
    def reason(self) -> str:
        return f"{FILTERED} {self.flag}"

    def passes(self, meta: dict) -> bool:
        """Whether a sample with this JSON passes; a missing key or a value of another kind never rejects it."""
        operand = self._operand(self._find(meta))
        return operand is None or _COMPARISONS[self.comparison](operand, self.value)

    def not_compared(self, meta: dict) -> str | None:
        """The kind of a value that this cannot compare ("the value is text"); None if it can, or there is none."""
        found = self._find(meta)
        if found is None or self._operand(found) is not None:
            return None
        kinds = {bool: "true or false", str: "text", list: "a list", dict: "an object"}
        number = "a number" if as_number(found) is not None else "not finite"
        return f"the value is {kinds.get(type(found), number)}"

    def finds_nothing(self, meta: dict) -> bool:
        """Whether this JSON has none of the keys, or null there."""
        return self._find(meta) is None

    def _find(self, meta: dict) -> object:
        return next((value for key in self.keys if (value := look_up(meta, key)) is not None), None)

    def _operand(self, found: object) -> float | str | bool | None:
        """What to compare with `value`; None if `found` is of another kind."""
        boolean = _BOOLEANS.get(found.strip().lower()) if isinstance(found, str) else found
        if isinstance(boolean, bool) and (isinstance(self.value, bool) or _is_share(self.value)):
            return boolean
        if isinstance(self.value, bool):
            number = as_number(found)
            if number in (0, 1):  # how tables write booleans
                return number
        if isinstance(self.value, (bool, str)):
            return found.strip() if isinstance(found, str) else None
        return as_number(found)


def _is_share(value: float | str) -> bool:
    return not isinstance(value, str) and 0 <= value <= 1


def look_up(meta: dict, key: str) -> object:
    """The value of `key` in a JSON object, or, if there is no such key, of the path `a.b`; None if there is neither."""
    if key in meta:
        return meta[key]
    value: object = meta
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def parse_filters(
    texts: Sequence[str] | None = None, *, max_pwatermark: float | None = None, min_aesthetic: float | None = None
) -> list[Filter]:
    """The filters of `--filter`, `--max_pwatermark` and `--min_aesthetic`.

    Args:
        texts: conditions such as `aesthetic>=5`: a key of the JSON (or a path, `meta.score`), one of
            `>= <= > < = !=`, and a number, or, with = and !=, a word, or true or false.

    Raises:
        UsageError: a condition cannot be parsed.
    """
    filters = []
    for text in texts or ():
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise UsageError(f"--filter {text!r} cannot be parsed; write KEY>=NUMBER in quotes, like 'aesthetic>=5'.")
        key, comparison, word = match["key"], match["comparison"].replace("==", "="), match["value"]
        if len(word) > 1 and word[0] == word[-1] and word[0] in "\"'":  # as in SQL; no shell has taken them
            word = word[1:-1].strip()
        number = as_number(word)
        if number is None and comparison not in ("=", "!="):
            raise UsageError(f"--filter {text!r}: {word!r} is not a number; compare words by = or !=.")
        value = _BOOLEANS.get(word.lower(), word) if number is None else number
        filters.append(Filter(f"--filter '{text.strip()}'", (key,), comparison, value))
    if max_pwatermark is not None:
        filters.append(Filter(f"--max_pwatermark {max_pwatermark:g}", WATERMARK_KEYS, "<=", max_pwatermark))
    if min_aesthetic is not None:
        filters.append(Filter(f"--min_aesthetic {min_aesthetic:g}", AESTHETIC_KEYS, ">=", min_aesthetic))
    return filters


def is_filtered(reason: str) -> bool:
    """Whether a sample with this reason is left out on purpose, rather than bad."""
    return reason.startswith(FILTERED)
