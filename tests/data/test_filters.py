"""What passes a filter: numbers, words, paths, and missing keys."""

import re

import pytest

from lcm_distill.data.filters import is_filtered, parse_filters
from lcm_distill.errors import UsageError


@pytest.mark.parametrize(
    ("text", "meta", "passes"),
    [
        ("aesthetic>=5", {"aesthetic": 5}, True),
        ("aesthetic >= 5", {"aesthetic": 4.9}, False),
        ("aesthetic>5", {"aesthetic": 5}, False),
        ("punsafe<0.2", {"punsafe": 0.2}, False),
        ("punsafe<=0.2", {"punsafe": "0.2"}, True),  # a table's number
        ("a.b>1", {"a": {"b": 1}}, False),
        ("a.b>1", {"a.b": 2, "a": {"b": 1}}, True),
        ("language=en", {"language": "en"}, True),
        ("language==en", {"language": "de"}, False),
        ("language!=en", {"language": "en"}, False),
        ("status=1", {"status": 2}, False),
        ("x>-1e3", {"x": -1001}, False),
        # nothing to compare: never rejected
        ("aesthetic>=5", {}, True),
        ("aesthetic>=5", {"aesthetic": None}, True),
        ("aesthetic>=5", {"aesthetic": "high"}, True),
        ("aesthetic>=5", {"aesthetic": float("nan")}, True),
        ("aesthetic>=5", {"aesthetic": True}, True),
        ("aesthetic>=5", {"aesthetic": [1]}, True),
        ("aesthetic>=5", {"aesthetic": 10**400}, True),
        ("language=en", {"language": 3}, True),
        ("a.b>1", {"a": 3}, True),
    ],
)
def test_a_filter_compares(text, meta, passes):
    (condition,) = parse_filters([text])
    assert condition.passes(meta) is passes
    assert is_filtered(condition.reason) and text.strip() in condition.reason


@pytest.mark.parametrize("key", ["aesthetic", "aesthetic_score", "AESTHETIC_SCORE"])
def test_the_usual_names_of_aesthetic_scores_are_known(key):
    (condition,) = parse_filters(min_aesthetic=5)
    assert not condition.passes({key: 4.9}) and condition.passes({key: 5})


@pytest.mark.parametrize("key", ["pwatermark", "p_watermark", "watermark"])
def test_the_usual_names_of_watermark_scores_are_known(key):
    (condition,) = parse_filters(max_pwatermark=0.5)
    assert condition.passes({key: 0.5}) and not condition.passes({key: 0.6})


@pytest.mark.parametrize("text", ["aesthetic", ">=5", "a>=", "a>b>c", "", "a=>5", "language<en"])
def test_a_filter_that_cannot_be_parsed_is_refused(text):
    with pytest.raises(UsageError, match=f"^--filter {re.escape(repr(text))}"):
        parse_filters([text])
