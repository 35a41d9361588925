"""Samples to leave out on purpose: by the numbers and words in their JSON.

filters = parse_filters(["aesthetic>=5", "meta.language=en"], max_pwatermark=0.5)
filters[0].passes({"aesthetic": 4.2})        # False; a JSON without that key passes
"""

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lcm_distill.errors import UsageError

FILTERED = "filtered out by"  # how the reason of a sample begins that is left out on purpose, and is not a bad one

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    "=": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_FILTER = re.compile(r"\s*(?P<key>[^<>=!]+?)\s*(?P<compare>>=|<=|!=|==?|>|<)\s*(?P<value>[^<>=!]+?)\s*")

# What datasets call them; the first of these keys that a JSON has is taken.
WATERMARK_KEYS = ("pwatermark", "p_watermark", "watermark")
AESTHETIC_KEYS = ("aesthetic", "aesthetic_score", "aesthetics_score", "AESTHETIC_SCORE", "aesthetics")


@dataclass(frozen=True)
class Filter:
    """Lets a sample pass if `value of the key` `compare` `value` holds, or there is no such value."""

    flag: str  # as the user gave it
    keys: tuple[str, ...]
    compare: str
    value: float | str

    @property
    def reason(self) -> str:
        return f"{FILTERED} {self.flag}"

    def passes(self, meta: dict) -> bool:
        """Whether a sample with this JSON passes. A key that is missing, or of another kind, never rejects."""
        found = next((value for key in self.keys if (value := look_up(meta, key)) is not None), None)
        if isinstance(self.value, str):
            return not isinstance(found, str) or _COMPARE[self.compare](found.strip(), self.value)
        number = _number(found)
        return number is None or _COMPARE[self.compare](number, self.value)


def look_up(meta: dict, key: str) -> object:
    """The value of `key` in a JSON; of the path `a.b` in the object `a`, if no key is spelled so. None for nothing."""
    if key in meta:
        return meta[key]
    value: object = meta
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _number(value: object) -> float | None:
    """A finite number, or one in a string (datasets made from tables have those); None for anything else."""
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
        texts: such as `aesthetic>=5`: a key of the JSON (or a path, `meta.score`), one of `>= <= > < = !=`, and a
            number, or with = and != a word.

    Raises:
        UsageError: one cannot be read.
    """
    filters = []
    for text in texts or ():
        match = _FILTER.fullmatch(text)
        if match is None:
            raise UsageError(f"--filter {text!r} cannot be read; write KEY>=NUMBER in quotes, such as 'aesthetic>=5'.")
        key, compare, word = match["key"], match["compare"].replace("==", "="), match["value"]
        value: float | str | None = _number(word)
        if value is None:
            if compare not in ("=", "!="):
                raise UsageError(f"--filter {text!r}: {word!r} is not a number; words compare by = and != only.")
            value = word
        filters.append(Filter(f"--filter '{text.strip()}'", (key,), compare, value))
    if max_pwatermark is not None:
        filters.append(Filter(f"--max_pwatermark {max_pwatermark:g}", WATERMARK_KEYS, "<=", max_pwatermark))
    if min_aesthetic is not None:
        filters.append(Filter(f"--min_aesthetic {min_aesthetic:g}", AESTHETIC_KEYS, ">=", min_aesthetic))
    return filters


def is_filtered(reason: str) -> bool:
    """Whether a sample with this reason was left out on purpose, and is not a bad one."""
    return reason.startswith(FILTERED)
