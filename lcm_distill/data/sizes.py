"""A picture's original size, for SDXL, from its sample's JSON or its row of a table: in the picture's own orientation.

size_in_json({"original_width": "3000", "original_height": 2000}, (600, 400), turned=True)      # (3000, 2000)
"""

import math

ORIGINAL_SIZE = ("original_height", "original_width")  # before the author of the dataset shrank the picture
STORED_SIZE = ("height", "width")
MAX_SIDE = 2**31 - 1


def as_number(value: object) -> float | None:
    """A finite number, also from text (as in datasets made from tables); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def size_in_json(
    meta: dict,
    picture_size: tuple[int, int],
    *,
    turned: bool,
    keys: tuple[tuple[str, str], ...] = (ORIGINAL_SIZE, STORED_SIZE),
) -> tuple[int, int] | None:
    """(height, width), whole pixels, under the first pair of `keys` that is complete in `meta`; None if none is.

    Args:
        meta: the JSON; sizes may be text.
        picture_size: (height, width) of the upright picture.
        turned: the EXIF orientation turned the picture by 90 degrees. Then some programs (img2dataset) note its sides
            as they are stored and others as they are seen: a landscape's size for an upright portrait, or the reverse,
            is one as it is stored, and is swapped.
    """
    for pair in keys:
        height, width = (_side(meta.get(key)) for key in pair)
        if height and width:
            across = (height - width) * (picture_size[0] - picture_size[1]) < 0
            return (width, height) if turned and across else (height, width)
    return None


def _side(value: object) -> int:
    """Pixels; 0 for what is not a whole number of them."""
    number = as_number(value)
    return int(number) if number is not None and 0 < number <= MAX_SIDE and number == int(number) else 0
