"""Labelled grids of pictures."""

from PIL import Image

from lcm_distill.sampling.grid import labelled_grid, shown


def test_grid_holds_every_picture_where_it_belongs():
    colours = [["red", "green"], ["blue", "black"]]
    rows = [(f"row {i}", [Image.new("RGB", (32, 32), c) for c in line]) for i, line in enumerate(colours)]
    grid = labelled_grid(rows, columns=["one", "a long heading of two lines"], size=48)
    found = {grid.getpixel((x, y)) for x in range(grid.width) for y in range(grid.height)}
    assert {(255, 0, 0), (0, 128, 0), (0, 0, 255)} <= found
    x, y = next((x, y) for y in range(grid.height) for x in range(grid.width) if grid.getpixel((x, y)) == (255, 0, 0))
    assert grid.getpixel((x + 60, y)) == (0, 128, 0) and grid.getpixel((x, y + 60)) == (0, 0, 255)


def test_a_smaller_picture_is_smoothed_and_a_larger_one_keeps_its_pixels():
    """Grids of large pictures left pixels out: a fine pattern came out black or white instead of grey."""
    stripes = Image.new("L", (64, 64))
    stripes.putdata([255 * (x % 2) for _ in range(64) for x in range(64)])
    assert {value // 16 for _, value in shown(stripes, 16).crop((2, 2, 14, 14)).getcolors()} <= {7, 8}
    large = shown(stripes, 256)
    assert {value for _, value in large.getcolors()} == {0, 255} and large.size == (256, 256)
    assert shown(stripes, 64) is stripes
