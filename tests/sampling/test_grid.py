"""Labelled grids of pictures."""

from PIL import Image, ImageColor

from lcm_distill.sampling.grid import labelled_grid, resize_to_cell


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
