"""Captions' numbers of tokens, against the ids that the text encoder is given."""

import re

import pytest
from transformers import CLIPTokenizer

from lcm_distill.data.captions import describe_cut
from lcm_distill.models.families import FAMILIES
from lcm_distill.models.teacher import Teacher
from lcm_distill.models.tokens import count_tokens

CAPTIONS = ["", "a small red circle", "a " * 500, "no such words " * 3]


def ids(tokenizer, caption, **options):
    return tokenizer(caption, verbose=False, **options).input_ids


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_tokens_are_those_of_the_teacher_s_tokenizers(teachers, family):
    tokenizer = CLIPTokenizer.from_pretrained(teachers[family], subfolder="tokenizer")
    limit = tokenizer.model_max_length
    counted = FAMILIES[family].count_tokens(Teacher(teachers[family]), CAPTIONS)
    assert counted == [(len(ids(tokenizer, caption)), limit) for caption in CAPTIONS]
    for caption, (tokens, _) in zip(CAPTIONS, counted, strict=True):
        assert (tokens > limit) == (ids(tokenizer, caption) != ids(tokenizer, caption, truncation=True))


def test_of_two_tokenizers_the_one_that_cuts_more_counts(teacher):
    first, second = (CLIPTokenizer.from_pretrained(teacher, subfolder="tokenizer") for _ in range(2))
    second.model_max_length = 5
    tokens = len(ids(first, CAPTIONS[1]))
    assert tokens > 5 and count_tokens([first, second], [CAPTIONS[1]]) == [(tokens, 5)]
    assert count_tokens([first], []) == []


@pytest.mark.parametrize(
    ("counted", "expected"),
    [
        ([], None),
        ([(77, 77), (2, 77)], None),
        ([(78, 77), (2, 77)], "1 of 2 is longer than the 77 tokens .*the longest has 78"),
        ([(78, 77), (90, 77), (3, 77)], "2 of 3 are longer than the 77 tokens .*the longest has 90"),
    ],
)
def test_describe_cut(counted, expected):
    found = describe_cut(counted)
    assert found is None if expected is None else re.match(expected, found)
