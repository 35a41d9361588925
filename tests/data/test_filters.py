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
        ("language='en'", {"language": "en"}, True),  # as in SQL
        ('language != "en"', {"language": "en"}, False),
        ("aesthetic>='5'", {"aesthetic": 4}, False),
        ("nsfw='false'", {"nsfw": True}, False),
        ("name='", {"name": "'"}, True),
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


FALSE_PASSES = ["x=false", "x=False", "x==0", "x=0", "x<0.5", "x<1", "x<=0", "x!=true", "x!=TRUE", "x!=1"]
TRUE_PASSES = ["x=true", "x=True", "x==1", "x=1", "x>0.5", "x>0", "x>=1", "x!=false", "x!=0"]


@pytest.mark.parametrize("text", FALSE_PASSES + TRUE_PASSES)
@pytest.mark.parametrize(
    ("value", "is_true"),
    [(True, True), ("true", True), (" TRUE", True), (1, True), ("1", True)]
    + [(False, False), ("false", False), ("False", False), (0, False), ("0", False), (0.0, False)],
)
def test_booleans_are_compared(text, value, is_true):
    """All samples passed: neither a word nor a number was compared with a JSON's true or false."""
    (condition,) = parse_filters([text])
    assert condition.passes({"x": value}) is (is_true == (text in TRUE_PASSES))
    assert condition.not_compared({"x": value}) is None


def test_a_boolean_score_is_compared():
    assert not parse_filters(max_pwatermark=0.5)[0].passes({"watermark": True})
    assert parse_filters(max_pwatermark=0.5)[0].passes({"watermark": False})


@pytest.mark.hostile("shards")
@pytest.mark.parametrize(
    ("text", "value", "kind"),
    [
        ("x>=5", True, "the value is true or false"),
        ("x>=5", "high", "the value is text"),
        ("x<0.5", "no", "the value is text"),
        ("x<0.5", [0.1], "the value is a list"),
        ("x<0.5", {"y": 0.1}, "the value is an object"),
        ("x<0.5", float("nan"), "the value is not finite"),
        ("x=en", 3, "the value is a number"),
        ("x=en", True, "the value is true or false"),
        ("x!=en", ["en"], "the value is a list"),
        ("x=false", 0.3, "the value is a number"),
        ("x=false", [], "the value is a list"),
        ("x=en", "de", None),
        ("x=false", "unknown", None),  # text that is not the word
        ("x>=5", "4", None),
        ("x>=5", None, None),
    ],
)
def test_a_value_of_another_kind_passes_and_is_named(text, value, kind):
    (condition,) = parse_filters([text])
    assert condition.not_compared({"x": value}) == kind
    assert condition.finds_nothing({"x": value}) is (value is None) and condition.finds_nothing({})
    if kind is not None:
        assert condition.passes({"x": value})


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
