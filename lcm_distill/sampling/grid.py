"""Grids of pictures with labels."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def labelled_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], *, columns: Sequence[str] | None = None, size: int | None = None
) -> Image.Image:
    """One picture of rows of pictures, with each row's label on its left and the columns' labels above.

    `rows` holds (label, pictures), with the same number of pictures in each row. Each picture is `size` pixels wide and
    high (default: the first one's width). Long column labels are wrapped.
    """
    size = size or rows[0][1][0].width
    height = max(11, min(18, size // 6))
    font = ImageFont.load_default(size=height)
    line = height + 4
    margin, gap = 6, 4
    left = margin + max(int(font.getlength(label)) for label, _ in rows) + 10
    headings = [_wrap(text, font, size) for text in columns or []]
    top = margin + line * max((len(lines) for lines in headings), default=0) + (gap if headings else 0)
    width = left + len(rows[0][1]) * (size + gap) + margin
    canvas = Image.new("RGB", (width, top + len(rows) * (size + gap) + margin), "white")
    pen = ImageDraw.Draw(canvas)
    for column, lines in enumerate(headings):
        for number, text in enumerate(lines):
            pen.text((left + column * (size + gap), margin + number * line), text, fill="black", font=font)
    for row, (label, pictures) in enumerate(rows):
        y = top + row * (size + gap)
        pen.text((margin, y + (size - line) // 2), label, fill="black", font=font)
        for column, picture in enumerate(pictures):
            canvas.paste(resize_to_cell(picture, size), (left + column * (size + gap), y))
    return canvas


def resize_to_cell(picture: Image.Image, size: int) -> Image.Image:
    """`picture` at `size` × `size` pixels: smoothed if that is smaller, with hard pixels if it is larger."""
    if picture.size == (size, size):
        return picture
    smaller = size < max(picture.size)
    return picture.resize((size, size), Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, max_lines: int = 6) -> list[str]:
    """`text` in at most `max_lines` lines, each at most `width` pixels wide unless a single word is wider."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines if len(lines) <= max_lines else [*lines[: max_lines - 1], lines[max_lines - 1] + " …"]
