"""Grids of pictures with labels."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from lcm_distill.sampling.labels import Letters, is_right_to_left

_MOST_LINES = 6  # of a column's label


def labelled_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], *, columns: Sequence[str] | None = None, size: int | None = None
) -> Image.Image:
    """One picture of rows of pictures, with each row's label on its left and the columns' labels above.

    `rows` holds (label, pictures), with the same number of pictures in each row, all of the first one's shape. `size`
    is the longer side of a picture in the grid, in pixels (default: the first one's). Labels may be in any script
    (`labels`); long ones are wrapped, and what is more than six lines, or a picture's height, is left out.
    """
    first = rows[0][1][0]
    width, height = cell_size(first, size or max(first.size))
    margin, gap = 6, 4
    pixels = max(11, min(18, min(width, height) // 6))
    letters = _letters([label for label, _ in rows], columns or [], pixels, width - gap)
    pixels, line = letters.size, letters.size + 4
    names = [letters.wrap(label, max(2 * width, 18 * pixels), max(1, height // line)) for label, _ in rows]
    left = margin + max((int(letters.measure(text)) for lines in names for text in lines), default=0) + 10
    headings = [letters.wrap(text, width - gap, _MOST_LINES) for text in columns or []]
    top = margin + line * max((len(lines) for lines in headings), default=0) + (gap if headings else 0)
    whole = (left + len(rows[0][1]) * (width + gap) + margin, top + len(rows) * (height + gap) + margin)
    canvas = Image.new("RGB", whole, "white")
    pen = ImageDraw.Draw(canvas)
    for column, lines in enumerate(headings):
        for number, text in enumerate(lines):
            x: float = left + column * (width + gap)
            if is_right_to_left(" ".join(lines)):
                x += width - gap - letters.measure(text)
            letters.draw(pen, (x, margin + number * line), text)
    for row, (lines, (_, pictures)) in enumerate(zip(names, rows, strict=True)):
        y = top + row * (height + gap)
        for number, text in enumerate(lines):
            letters.draw(pen, (margin, y + (height - line * len(lines)) // 2 + number * line), text)
        for column, picture in enumerate(pictures):
            canvas.paste(_resize(picture, (width, height)), (left + column * (width + gap), y))
    return canvas


def _letters(names: Sequence[str], headings: Sequence[str], pixels: int, width: int) -> Letters:
    """Letters of `pixels`, or of up to two fewer if no word of a heading has to be cut then to fit `width`."""
    words = " ".join(headings).split()
    for size in range(pixels, pixels - 3, -1):
        letters = Letters([*names, *headings], size)
        if all(letters.measure(word) <= width for word in words):
            return letters
    return Letters([*names, *headings], pixels)


def cell_size(picture: Image.Image, size: int) -> tuple[int, int]:
    """(width, height) of `picture` where its longer side has `size` pixels."""
    longer = max(picture.size)
    return max(1, round(picture.width * size / longer)), max(1, round(picture.height * size / longer))


def resize_to_cell(picture: Image.Image, size: int) -> Image.Image:
    """`picture` with `size` pixels in its longer side: smoothed if that is smaller, with hard pixels if larger."""
    return _resize(picture, cell_size(picture, size))


def _resize(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    if picture.size == size:
        return picture
    smaller = max(size) < max(picture.size)
    return picture.resize(size, Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST)
