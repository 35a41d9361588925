"""Text of any script in a picture: the fonts that have its characters, lines of a given width, directions.

Pillow's own font has ASCII, DejaVu Sans in `fonts/` the scripts of Europe, Arabic and Hebrew. Other characters come
from the fonts of the system, found by fontconfig or in the usual folders; if none has them, one warning names the
script, and they are drawn as boxes. Where Pillow has Raqm, Arabic letters are joined and lines read from right to left.
"""

import functools
import logging
import os
import shutil
import subprocess
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ImageDraw, ImageFont, features

from lcm_distill.errors import shown

logger = logging.getLogger(__name__)

_LONGEST = 2000  # characters of a text that are looked at
_NO_CHARACTER = "\uffff"  # no font has it, so this is how a font draws what it does not have
_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
    "C:/Windows/Fonts",
)


class _Face(NamedTuple):
    """A font at any size: a file, and its number in a collection; Pillow's own font without a file."""

    path: str | None = None
    number: int = 0


_PILLOW = _Face()
_DEJAVU = _Face(str(Path(__file__).with_name("fonts") / "DejaVuSans.ttf"))


class Letters:
    """The fonts of all `texts` of a picture, in a `size` in pixels, so that the picture has no more than it needs."""

    def __init__(self, texts: Iterable[str], size: int):
        self.size = size
        # Beside their characters, those that `wrap` may add.
        self._faces = _faces(frozenset(filter(_is_drawn, "".join(["?…", *(text[:_LONGEST] for text in texts)]))))

    def measure(self, text: str) -> float:
        """The width of a line in pixels."""
        return sum(_font(face, self.size).getlength(run) for run, face in _runs(text, self._faces))

    def draw(self, pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str) -> None:
        """Draws a line in black; `place` is its upper left corner."""
        x, y = place
        baseline = y + _font(_PILLOW, self.size).getmetrics()[0]  # the same for all fonts
        runs = _runs(text, self._faces)
        for run, face in reversed(runs) if is_right_to_left(text) else runs:
            font = _font(face, self.size)
            pen.text((x, baseline), run, fill="black", font=font, anchor="ls")
            x += font.getlength(run)

    def wrap(self, text: str, width: float, max_lines: int) -> list[str]:
        """`text` in at most `max_lines` lines of at most `width` pixels; a longer word is cut, the rest becomes "…".

        Control characters become question marks, other white space single blanks.
        """
        lines: list[str] = []
        for word in shown(text[:_LONGEST]).split():
            if lines and self.measure(f"{lines[-1]} {word}") <= width:
                lines[-1] += f" {word}"
                continue
            for piece in self._pieces(word, width):
                lines.append(piece)
                if len(lines) > max_lines:
                    return [*lines[: max_lines - 1], self._shorten(lines[max_lines - 1], width)]
        return lines

    def _pieces(self, word: str, width: float) -> Iterator[str]:
        """`word`, or, if it is wider than `width`, pieces that are not; at least a character each."""
        if self.measure(word) <= width:
            yield word
            return
        piece = ""
        for cluster in _clusters(word):
            if piece and self.measure(piece + cluster) > width:
                yield piece
                piece = ""
            piece += cluster
        yield piece

    def _shorten(self, line: str, width: float) -> str:
        clusters = _clusters(line)
        while clusters and self.measure(f"{''.join(clusters).rstrip()} …") > width:
            clusters.pop()
        return f"{''.join(clusters).rstrip()} …".strip()


def is_right_to_left(text: str) -> bool:
    """Whether its first character with a direction is of a script that is written from right to left."""
    directions = (unicodedata.bidirectional(char) for char in text)
    return next((direction != "L" for direction in directions if direction in ("L", "R", "AL")), False)


def _clusters(text: str) -> list[str]:
    """Its characters, each with the marks and joiners that belong to it."""
    found: list[str] = []
    for char in text:
        joined = unicodedata.category(char)[0] == "M" or char in "\u200c\u200d" or (found and found[-1][-1] == "\u200d")
        if joined and found:
            found[-1] += char
        else:
            found.append(char)
    return found


# ---------------------------------------------------------------------------------------------------- the fonts


@functools.cache
def _font(face: _Face, size: int) -> Any:
    """`OSError` for a file that is no font, or has pictures of other sizes in place of outlines (coloured emoji)."""
    return ImageFont.load_default(size) if face.path is None else ImageFont.truetype(face.path, size, face.number)


@functools.cache
def _glyph(face: _Face, char: str) -> tuple[Any, bytes] | None:
    """How a font draws a character alone; None if it cannot be loaded."""
    try:
        font = ImageFont.load_default(32)
        if face.path is not None:
            font = ImageFont.truetype(face.path, 32, face.number, layout_engine=ImageFont.Layout.BASIC)
        mask = font.getmask(char)
    except (OSError, ValueError):
        return None
    return mask.size, bytes(mask)


def _has(face: _Face, char: str) -> bool:
    glyph = _glyph(face, char)
    return glyph is not None and glyph != _glyph(face, _NO_CHARACTER)


def _is_drawn(char: str) -> bool:
    """Whether a font needs a glyph for it: not for blanks, control characters, joiners and choices of a variant."""
    return unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zs", "Zl", "Zp") and not "\ufe00" <= char <= "\ufe0f"


def _runs(text: str, faces: Sequence[_Face]) -> list[tuple[str, _Face]]:
    """The parts of a line that have one of the fonts each, in the order of the text."""
    runs: list[tuple[str, _Face]] = []
    for char in text:
        own = [face for face in faces if not _is_drawn(char) or _has(face, char)] or [faces[0]]
        if runs and (runs[-1][1] in own or unicodedata.category(char)[0] == "M"):
            runs[-1] = (runs[-1][0] + char, runs[-1][1])
        else:
            runs.append((char, own[0]))
    return runs


@functools.cache
def _faces(needed: frozenset[str]) -> tuple[_Face, ...]:
    """Fonts that have all these characters, as far as there are any: one, if one has all."""
    if any(unicodedata.bidirectional(char) in ("R", "AL") for char in needed) and not features.check("raqm"):
        _warn(
            "labels of pictures: Pillow finds no FriBiDi (libfribidi), so text that is written from right to left is "
            "drawn from left to right, and Arabic letters are not joined"
        )
    for face in (_PILLOW, _DEJAVU):
        if all(_has(face, char) for char in needed):
            return (face,)
    rest = {char for char in needed if not _has(_DEJAVU, char)}
    faces = [_DEJAVU]
    while rest:
        char = min(rest)
        found = [face for face in _system_faces("".join(sorted(rest))) if _has(face, char)]
        found = found or [face for face in _system_faces(char) if _has(face, char)]
        if not found:
            script = unicodedata.name(char, "UNKNOWN").partition(" ")[0]
            _warn(
                f"labels of pictures: no font of this machine has {script} characters such as {char}; boxes are drawn "
                "in their place. Install one that has them, such as Noto Sans (Debian, Ubuntu: fonts-noto-core, "
                "fonts-noto-cjk)",
                about=script,
            )
            rest.remove(char)
            continue
        whole = [face for face in found if all(_has(face, char) for char in needed)]
        if whole:
            return (whole[0],)
        best = max(found, key=lambda face: sum(_has(face, char) for char in rest))
        faces.append(best)
        rest = {char for char in rest if not _has(best, char)}
    return tuple(faces)


@functools.cache
def _system_faces(characters: str) -> tuple[_Face, ...]:
    """The fonts of the system that may have these characters, the best first."""
    program = shutil.which("fc-match")
    if program:
        wanted = " ".join(f"{ord(char):x}" for char in characters)
        command = [program, "-s", "-f", "%{file}\t%{index}\n", f"sans-serif:charset={wanted}"]
        try:
            listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
            listed = ""
        lines = [line.rpartition("\t") for line in listed.splitlines()]
        # A variable font's number has the instance in its upper half.
        faces = [_Face(path, int(index) & 0xFFFF) for path, _, index in lines if path and index.isdigit()]
        found = tuple(face for face in faces if _has(face, characters[0]))
        if found:
            return found
    return tuple(face for face in _installed() if _has(face, characters[0]))


@functools.cache
def _installed() -> tuple[_Face, ...]:
    """The fonts in the usual folders, upright ones without serifs first."""
    paths = []
    for folder in _FOLDERS:
        for where, _, names in os.walk(os.path.expanduser(folder)):
            paths += [os.path.join(where, name) for name in names if name.lower().endswith((".ttf", ".otf", ".ttc"))]

    def rank(path: str) -> tuple[int, str]:
        name = os.path.basename(path).lower()
        unusual = ("bold", "italic", "oblique", "black", "thin", "light", "mono", "serif", "condensed")
        return sum(word in name for word in unusual) - ("regular" in name) - ("sans" in name), path

    return tuple(map(_Face, sorted(paths, key=rank)))


_warned: set[str] = set()


def _warn(message: str, about: str = "") -> None:
    """Logs a warning, once for each thing that it is about."""
    if (about or message) not in _warned:
        _warned.add(about or message)
        logger.warning("%s", message)
