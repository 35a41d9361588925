"""Text of any script in pictures: the fonts that have its characters, lines that fit, directions."""

import logging
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, features

from lcm_distill.sampling import labels
from lcm_distill.sampling.labels import Letters, is_right_to_left

GERMAN, ARABIC, HEBREW, CHINESE, THAI = "größer als üblich", "ثعلب أحمر", "שועל אדום", "雪地里的狐狸", "ภาษาไทย"


@pytest.fixture()
def system(monkeypatch):
    """A system that has the given fonts alone; nothing is remembered of this one."""
    caches = (labels._faces, labels._system_faces, labels._installed, labels._glyph)

    def forget():
        for cache in caches:
            cache.cache_clear()

    def give(*paths: str):
        forget()
        monkeypatch.setattr(labels, "_warned", set())
        monkeypatch.setattr(labels.shutil, "which", lambda name: None)
        monkeypatch.setattr(labels, "_FOLDERS", paths)

    yield give
    monkeypatch.undo()
    forget()


def drawn(text: str, size: int = 24) -> np.ndarray:
    """The pixels of a line, black on white, cut to what is not white."""
    canvas = Image.new("L", (900, 80), 255)
    Letters([text], size).draw(ImageDraw.Draw(canvas), (10, 20), text)
    rows, columns = np.nonzero(np.asarray(canvas) < 128)
    return np.asarray(canvas)[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


@pytest.mark.parametrize("text", [GERMAN, "Лиса в снегу", "αλεπού", "a → b × 4 “c”", ARABIC, HEBREW])
def test_scripts_of_europe_arabic_and_hebrew_need_no_font_of_the_system(text, system, caplog):
    """In a container without fonts every umlaut was a box."""
    system()
    faces = labels._faces(frozenset(filter(labels._is_drawn, text)))
    assert faces == (labels._DEJAVU,) and not caplog.records
    assert all(labels._has(labels._DEJAVU, char) for char in text if not char.isspace())


def test_ascii_is_drawn_in_the_font_of_pillow():
    assert labels._faces(frozenset("teacher,50steps…")) == (labels._PILLOW,)
    canvas = Image.new("L", (900, 80), 255)
    ImageDraw.Draw(canvas).text((10, 20), "teacher, 50 steps", fill="black", font=ImageFont.load_default(24))
    rows, columns = np.nonzero(np.asarray(canvas) < 128)
    expected = np.asarray(canvas)[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert np.array_equal(drawn("teacher, 50 steps"), expected)


def test_a_script_without_a_font_is_named_once_and_drawn_as_boxes(system, caplog):
    system()
    for text in (CHINESE, CHINESE[:2], THAI):
        assert Letters([text], 16).measure(text) > 0
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "CJK" in caplog.text and "THAI" in caplog.text and "fonts-noto-cjk" in caplog.text


def font_of(folder, characters: str) -> str:
    """A font of the system here, DejaVu's mono face, under a name in `folder`; the test is skipped without one."""
    found = [face for face in labels._installed() if all(labels._has(face, char) for char in characters)]
    other = [face.path for face in found if "mono" in face.path.lower()]
    if not other:
        pytest.skip("no other font is installed here")
    shutil.copy(other[0], folder / "Some.ttf")
    return str(folder / "Some.ttf")


@pytest.mark.parametrize("known_to_fontconfig", [True, False])
def test_a_font_of_the_system_is_found_by_fontconfig_or_in_its_folder(
    known_to_fontconfig, system, tmp_path, monkeypatch, caplog
):
    path = font_of(tmp_path, "aб☃")
    (tmp_path / "Broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(labels, "_DEJAVU", labels._PILLOW)  # so that another font is needed
    system(*[] if known_to_fontconfig else [str(tmp_path)])
    if known_to_fontconfig:
        monkeypatch.setattr(labels.shutil, "which", lambda name: name)

        def fc_match(command, **_):
            assert command[0] == "fc-match" and command[-1] == "sans-serif:charset=2603"
            return subprocess.CompletedProcess(command, 0, f"{tmp_path / 'Broken.ttf'}\t0\n{path}\t65536\n")

        monkeypatch.setattr(labels.subprocess, "run", fc_match)
    assert labels._faces(frozenset("a☃")) == (labels._Face(path, 0),) and not caplog.records


def test_a_text_of_two_scripts_may_need_two_fonts(monkeypatch):
    monkeypatch.setattr(labels, "_has", lambda face, char: (face == labels._PILLOW) == char.isascii())
    faces = (labels._PILLOW, labels._DEJAVU)
    assert labels._runs("fox é, éé a", faces) == [
        ("fox ", faces[0]),
        ("é", faces[1]),
        (", ", faces[0]),
        ("éé ", faces[1]),
        ("a", faces[0]),
    ]
    assert labels._runs("e\u0301a", faces) == [("e\u0301a", faces[0])]  # a mark stays with its letter


@pytest.mark.parametrize(
    "text, expected",
    [(ARABIC, True), (HEBREW, True), (f"2024 {HEBREW}", True), (GERMAN, False), (f"狐 {ARABIC}", False), ("12", False)],
)  # fmt: skip
def test_the_first_letter_gives_the_direction(text, expected):
    assert is_right_to_left(text) is expected


@pytest.mark.skipif(not features.check("raqm"), reason="Pillow without Raqm")
def test_arabic_letters_are_joined_and_read_from_right_to_left():
    apart = " ".join("بيت")
    assert drawn("بيت").shape[1] < 0.7 * drawn(apart).shape[1]
    first, both = drawn("א"), drawn("אל")
    assert np.array_equal(both[-first.shape[0] :, -first.shape[1] :], first)  # the first letter is on the right


def test_without_raqm_a_warning_says_how_the_text_is_drawn(system, monkeypatch, caplog):
    system()
    monkeypatch.setattr(labels.features, "check", lambda name: False)
    for text in (ARABIC, HEBREW):
        Letters([text], 16)
    assert len(caplog.records) == 1 and "libfribidi" in caplog.text


@pytest.mark.parametrize(
    "text",
    ["a castle at dusk " * 30, "Donaudampfschifffahrtsgesellschaftskapitän" * 5, CHINESE * 20, f"ab {ARABIC * 20}",
     "https://example.com/" + "a/" * 3000, "e" + "\u0301" * 50],
)  # fmt: skip
@pytest.mark.parametrize("max_lines", [1, 6])
def test_lines_fit_and_what_is_left_out_is_marked(text, max_lines):
    """A long word, and every Chinese caption, ran over the pictures beside it."""
    letters = Letters([text], 14)
    lines = letters.wrap(text, 120, max_lines)
    assert 1 <= len(lines) <= max_lines and all(letters.measure(line) <= 120 for line in lines)
    kept = "".join(lines).replace(" ", "")
    whole = text.replace(" ", "")
    assert kept == whole or (kept.endswith("…") and whole.startswith(kept[:-1]) and len(lines) == max_lines)
    assert not any(line.startswith("\u0301") for line in lines)


def test_a_text_that_fits_is_kept_and_its_words_stay_whole():
    letters = Letters(["a"], 14)
    assert letters.wrap("a castle\n at\tdusk", 1000, 1) == ["a castle at dusk"]
    lines = letters.wrap("a castle at dusk in the mountains", 90, 6)
    assert " ".join(lines) == "a castle at dusk in the mountains" and len(lines) > 1
    assert letters.wrap("", 90, 6) == [] and letters.wrap("a\x1b[2Jb\ud800", 900, 1) == ["a?[2Jb?"]
    assert len(letters.wrap("W" * 50, 3, 2)) == 2  # narrower than any letter
