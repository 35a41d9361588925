"""Labelled grids of pictures."""

from PIL import Image, ImageColor

from lcm_distill.sampling.grid import labelled_grid, resize_to_cell
from lcm_distill.sampling.labels import Letters


def test_the_grid_has_every_picture_in_its_place():
    colours = [["red", "green"], ["blue", "black"]]
    rows = [(f"row {i}", [Image.new("RGB", (32, 32), c) for c in line]) for i, line in enumerate(colours)]
    grid = labelled_grid(rows, columns=["one", "a long heading of two lines"], size=48)
    x, y = next((x, y) for y in range(grid.height) for x in range(grid.width) if grid.getpixel((x, y)) == (255, 0, 0))
    for row in range(2):
        for column in range(2):
            left, top = x + column * 52, y + row * 52
            cell = grid.crop((left, top, left + 48, top + 48))
            assert cell.getcolors() == [(48 * 48, ImageColor.getrgb(colours[row][column]))], (row, column)
    assert x > 20 and y > 20  # room for the labels, which are drawn there
    white = (255, 255, 255)
    for labels in (grid.crop((0, y, x, y + 48)), grid.crop((0, y + 52, x, y + 100)), grid.crop((x, 0, x + 48, y))):
        assert len(labels.getcolors(10**6)) > 1 and labels.getpixel((0, 0)) == white


def test_a_smaller_picture_is_smoothed_and_a_larger_one_keeps_its_pixels():
    """Grids of large pictures skipped pixels: a fine pattern became black or white instead of grey."""
    stripes = Image.new("L", (64, 64))
    stripes.putdata([255 * (x % 2) for _ in range(64) for x in range(64)])
    assert {value // 16 for _, value in resize_to_cell(stripes, 16).crop((2, 2, 14, 14)).getcolors()} <= {7, 8}
    large = resize_to_cell(stripes, 256)
    assert {value for _, value in large.getcolors()} == {0, 255} and large.size == (256, 256)
    assert resize_to_cell(stripes, 64) is stripes


def test_pictures_that_are_not_square_keep_their_shape():
    wide = Image.new("RGB", (96, 48), "red")
    assert resize_to_cell(wide, 32).size == (32, 16)
    assert resize_to_cell(wide.rotate(90, expand=True), 32).size == (16, 32)
    grid = labelled_grid([("a", [wide, wide]), ("b", [wide, wide])], size=64)
    red = [(x, y) for y in range(grid.height) for x in range(grid.width) if grid.getpixel((x, y)) == (255, 0, 0)]
    assert len(red) == 4 * 64 * 32
    assert max(x for x, _ in red) - min(x for x, _ in red) == 2 * 64 + 4 - 1
    assert max(y for _, y in red) - min(y for _, y in red) == 2 * 32 + 4 - 1


def test_no_label_runs_over_a_picture_or_another_label():
    """The label of a row was as wide as its model's name; a long word of a caption went on over its neighbour's."""
    picture = Image.new("RGB", (64, 64), "red")
    word = "Donaudampfschifffahrtsgesellschaft" * 3
    grid = labelled_grid([(f"{word}, 4 steps", [picture] * 3)], columns=[word, "", "雪地里的狐狸" * 9])
    letters = Letters([word], 11)
    left = next(x for x in range(grid.width) if grid.getpixel((x, grid.height - 20)) == (255, 0, 0))
    assert left <= 18 * 11 + 16 < letters.measure(word)
    top = next(y for y in range(grid.height) if grid.getpixel((left, y)) == (255, 0, 0))
    assert set(grid.crop((left + 64, 0, left + 64 + 4 + 64 + 4, top)).getdata()) == {(255, 255, 255)}
    assert len(grid.crop((left, 0, left + 64, top)).getcolors()) > 1
    beside = grid.crop((left, top, grid.width, top + 64)).getcolors()
    assert {colour: count for count, colour in beside}[(255, 0, 0)] == 3 * 64 * 64 and len(beside) == 2


def test_letters_are_smaller_where_a_word_of_a_heading_would_be_cut():
    """In the README's own picture the captions ended in "backgroun" and "d"."""
    word, rows = "background", [("a", [Image.new("RGB", (64, 64), "red")])]
    plain, fitted, cut = (labelled_grid(rows, columns=[words]).height for words in ("a red", word, f"{word}s" * 3))
    assert Letters([word], 10).measure(word) <= 64 - 4 < Letters([word], 11).measure(word)
    assert fitted == plain - 1  # a line each, a pixel less
    assert cut == plain + 3 * 15  # what is cut in any case is not made smaller, too
