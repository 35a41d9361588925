"""The original size in a JSON, against sizes worked out by hand."""

import pytest

from lcm_distill.data.sizes import ORIGINAL_SIZE, as_number, size_in_json

PORTRAIT, LANDSCAPE, SQUARE = (100, 60), (60, 100), (80, 80)  # (height, width)


@pytest.mark.parametrize(
    ("meta", "picture", "turned", "expected"),
    [
        ({"width": 100, "height": 60}, PORTRAIT, True, (100, 60)),  # as img2dataset writes them: before turning
        ({"width": 60, "height": 100}, PORTRAIT, True, (100, 60)),  # as seen
        ({"original_width": 3000, "original_height": 2000}, PORTRAIT, True, (3000, 2000)),
        ({"original_width": 2000, "original_height": 3000}, LANDSCAPE, True, (2000, 3000)),
        ({"original_width": 2000, "original_height": 3000, "width": 1, "height": 2}, PORTRAIT, True, (3000, 2000)),
        ({"width": 100, "height": 60}, PORTRAIT, False, (60, 100)),  # another crop, but nothing turned the picture
        ({"width": 500, "height": 500}, PORTRAIT, True, (500, 500)),
        ({"width": 300, "height": 200}, SQUARE, True, (200, 300)),
        ({"original_width": "3000", "original_height": "2000"}, LANDSCAPE, False, (2000, 3000)),
        ({"original_width": " 3000.0 ", "original_height": 2e3}, LANDSCAPE, False, (2000, 3000)),
        ({"width": "100", "height": "60"}, PORTRAIT, True, (100, 60)),
        ({"original_width": "?", "original_height": "2000", "width": "30", "height": "20"}, SQUARE, False, (20, 30)),
        ({"original_width": "1.5", "original_height": "2"}, SQUARE, False, None),
        ({"original_width": "-3", "original_height": "2"}, SQUARE, False, None),
        ({"original_width": "", "original_height": "nan"}, SQUARE, False, None),
        ({"original_width": "3000", "original_height": True}, SQUARE, False, None),
        ({"original_width": "9" * 20, "original_height": "9" * 400}, SQUARE, False, None),
        ({}, SQUARE, False, None),
    ],
)
def test_size_in_json(meta, picture, turned, expected):
    """Text was ignored, and SDXL was given the sides of turned pictures swapped."""
    assert size_in_json(meta, picture, turned=turned) == expected


def test_only_the_given_keys_count():
    assert size_in_json({"width": 3, "height": 2}, SQUARE, turned=False, keys=(ORIGINAL_SIZE,)) is None


@pytest.mark.hostile("shards")
@pytest.mark.parametrize(
    ("value", "number"),
    [(3, 3), ("3", 3), (" 3.5\n", 3.5), ("1e3", 1000), (True, None), ("true", None), ("inf", None), (None, None),
     ([3], None), (10**400, None), (float("nan"), None)],
)  # fmt: skip
def test_as_number(value, number):
    assert as_number(value) == number
