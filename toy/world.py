"""The toy world: one coloured shape on a plain background, and the caption that says so.

A picture is a `Scene`: a shape, its colour, its size and its background are named in the caption ("a small
red circle on a black background"); its place and a slight turn are not, so that a caption has many pictures,
as real captions do. Sizes are fractions of the picture's shorter side: whatever the picture's size, a small
shape stays small.
"""

import dataclasses
import math

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
COLOURS = {
    "red": (220, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 230, 40),
    "green": (30, 160, 50),
    "cyan": (60, 220, 230),
    "blue": (30, 60, 220),
    "purple": (130, 30, 160),
    "pink": (255, 130, 190),
}
BACKGROUNDS = {"black": (10, 10, 10), "white": (245, 245, 245), "grey": (128, 128, 128), "brown": (95, 55, 20)}

# Radius of the shape as a fraction of the picture's shorter side; the gap keeps the two sizes apart.
_RADIUS = {"small": (0.13, 0.17), "large": (0.26, 0.32)}
_OVERSAMPLING = 4  # pictures are drawn this much larger and reduced, which smooths the edges

WORDS = ("a", "on", "background", *SHAPES, *SIZES, *COLOURS, *BACKGROUNDS)


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a caption says: the four attributes that `toy.score` reads back from a picture."""

    shape: str
    size: str
    colour: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"

    @classmethod
    def from_caption(cls, caption: str) -> "Scene":
        """The scene of a caption of this world; `ValueError` for any other text."""
        words = caption.split()
        if len(words) == 8:
            scene = cls(shape=words[3], size=words[1], colour=words[2], background=words[6])
            if scene in _SCENES and scene.caption == caption:
                return scene
        raise ValueError(f"not a caption of the toy world: {caption!r} (such as {ALL_SCENES[0].caption!r})")


ALL_SCENES = tuple(
    Scene(shape, size, colour, background)
    for shape in SHAPES
    for size in SIZES
    for colour in COLOURS
    for background in BACKGROUNDS
)
_SCENES = frozenset(ALL_SCENES)


def random_scene(rng: np.random.Generator) -> Scene:
    return ALL_SCENES[int(rng.integers(len(ALL_SCENES)))]


def _corners(shape: str, radius: float, angle: float) -> np.ndarray:
    """Corners `[n, 2]` of a polygon around the origin, y pointing down; angle in radians."""
    if shape == "square":
        points = [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    elif shape == "triangle":
        points = [(math.sin(a), -math.cos(a)) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    elif shape == "star":
        points = [
            (
                (1.0 if k % 2 == 0 else 0.42) * math.sin(k * math.pi / 5),
                -(1.0 if k % 2 == 0 else 0.42) * math.cos(k * math.pi / 5),
            )
            for k in range(10)
        ]
    elif shape == "cross":
        a = 0.3
        points = [
            (-a, -1),
            (a, -1),
            (a, -a),
            (1, -a),
            (1, a),
            (a, a),
            (a, 1),
            (-a, 1),
            (-a, a),
            (-1, a),
            (-1, -a),
            (-a, -a),
        ]
    else:
        raise ValueError(f"unknown shape {shape!r}; one of {', '.join(SHAPES)}")
    cos, sin = math.cos(angle), math.sin(angle)
    return radius * np.array(points) @ np.array([[cos, sin], [-sin, cos]])


def draw(scene: Scene, rng: np.random.Generator, width: int = 64, height: int = 64) -> Image.Image:
    """An RGB picture of `scene`, `width` × `height` pixels; place, turn and exact size come from `rng`."""
    short = min(width, height)
    radius = short * rng.uniform(*_RADIUS[scene.size])
    x = rng.uniform(radius + 1, width - radius - 1)
    y = rng.uniform(radius + 1, height - radius - 1)
    angle = rng.uniform(-0.2, 0.2)
    s = _OVERSAMPLING
    picture = Image.new("RGB", (width * s, height * s), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(picture)
    colour = COLOURS[scene.colour]
    if scene.shape == "circle":
        pen.ellipse([(x - radius) * s, (y - radius) * s, (x + radius) * s, (y + radius) * s], fill=colour)
    else:
        corners = (_corners(scene.shape, radius, angle) + (x, y)) * s
        pen.polygon([(float(px), float(py)) for px, py in corners], fill=colour)
    return picture.reduce(s)
