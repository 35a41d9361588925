"""The report: what is in it, what cannot harm it, and, in a real browser, that it works."""

import base64
import html
import io
import json
import logging
import math
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, find_browser
from PIL import Image

from lcm_distill.errors import UsageError
from lcm_distill.report import main
from lcm_distill.run import journal, report
from lcm_distill.run.journal import Journal, read_journal
from lcm_distill.run.report import (
    Grid,
    build_report,
    collect_curves,
    find_grids,
    smooth,
    thin,
    thin_grids,
    write_report,
)

ROOT = Path(__file__).resolve().parents[2]
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;"


def launch(**flags):
    return {
        "program": "train_lcm_distill_sd_wds",
        "seed": 7,
        "flags": {"pretrained_teacher_model": "org/teacher", "learning_rate": 1e-4, "filter": None} | flags,
        "steps": 400,
        "command": "accelerate launch train.py --resume_from_checkpoint latest",
        "folder": "/somewhere",
        "versions": {"torch": "2.13.0"},
        "machine": {"host": "node7", "device": "cpu", "processes": 2},
    }


def add_grid(folder, step, colour, size=(96, 64)):
    path = Path(folder) / "validation" / f"step-{step:06d}.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def data_of(path):
    """The numbers that the page's script draws."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())[1])


# --- curves


def test_curves_are_collected_by_name_the_loss_first_what_the_programs_log_last():
    entries = [
        {"step": 20, "time": 1.0, "lr": 1e-4, "data_wait": 0.1, "loss": 2.0, "note": "text", "gap": None},
        {"step": 10, "time": 0.0, "lr": 2e-4, "data_wait": 0.2, "loss": 3.0, "gap": float("nan")},
        {"step": 20, "time": 2.0, "distance": 5.0, "loss": 1.0},
    ]
    curves = collect_curves(entries)
    assert list(curves) == ["loss", "distance", "lr", "data_wait"]
    assert {name: (steps.tolist(), values.tolist()) for name, (steps, values) in curves.items()} == {
        "loss": ([10, 20], [3.0, 1.0]),
        "distance": ([20], [5.0]),
        "lr": ([10, 20], [2e-4, 1e-4]),
        "data_wait": ([10, 20], [0.2, 0.1]),
    }


def test_a_thinned_curve_keeps_its_ends_and_every_peak():
    steps, values = np.arange(100_000), np.random.default_rng(0).standard_normal(100_000)
    values[[31_415, 92_653]] = [50.0, -50.0]
    few, kept = thin(steps, values, 1000)
    assert 900 <= len(few) <= 1000 and (np.diff(few) > 0).all()
    assert few[0] == 0 and few[-1] == 99_999 and kept.max() == 50 and kept.min() == -50
    assert (kept == values[few]).all()
    assert np.diff(few).max() < 1000  # spread over all of it
    same = thin(steps[:1000], values[:1000], 1000)
    assert same[0] is not None and (same[0] == steps[:1000]).all()


def test_smoothing_is_the_mean_around_each_point():
    steps, values = np.arange(0, 2000, 10), np.random.default_rng(0).random(200)
    middle, means = smooth(steps, values)
    half = 200 // 40
    expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(200)]
    assert (middle == steps).all() and np.allclose(means, expected)
    few, means = smooth(np.arange(100_000), np.random.default_rng(1).random(100_000))
    assert len(few) == 300 and np.abs(means - 0.5).max() < 0.03


@pytest.mark.parametrize(
    "values",
    [
        np.minimum(np.arange(400) / 50, 1.0),  # a learning rate that warms up: it has no noise, and keeps its corner
        np.cos(np.linspace(0, np.pi, 400)),
        np.full(400, 0.1),
        np.random.default_rng(0).random(20),  # few points
        np.array([]),
    ],
)
def test_what_is_not_noisy_is_not_smoothed(values):
    assert smooth(np.arange(len(values)), values) is None


# --- grids


def test_at_most_forty_grids_with_the_first_and_the_last_and_none_comes_back():
    """One that is left out once stays out as the run continues: each is encoded once."""
    before: set[int] = set()
    for count in range(1, 400):
        kept = [grid.step for grid in thin_grids([Grid(step, Path()) for step in range(count)])]
        assert len(kept) == min(count, len(kept)) <= 40 and (count <= 40) == (len(kept) == count)
        assert kept[0] == 0 and kept[-1] == count - 1 and kept == sorted(set(kept))
        assert len(set(np.diff(kept)[:-1])) <= 1  # evenly
        assert set(kept) - before <= {count - 1}
        before |= set(kept)
    assert thin_grids([]) == []


def test_grids_of_steps_that_are_repeated_are_left_out(tmp_path):
    """Resumed at 100 after validations at 200 and 300, the run has validated at 200 again."""
    paths = {step: add_grid(tmp_path, step, "white") for step in (100, 200, 300)}
    for step, written in {100: 1000, 200: 3000, 300: 1200}.items():
        os.utime(paths[step], (written, written))
    (tmp_path / "validation" / "step-last.png").touch()
    launches = [{"started": 900.0, "global_step": 0}, {"started": 2000.0, "global_step": 100}]
    assert [grid.step for grid in find_grids(tmp_path / "validation", launches)] == [100, 200]
    assert [grid.step for grid in find_grids(tmp_path / "validation", launches[:1])] == [100, 200, 300]
    assert find_grids(tmp_path / "nowhere", launches) == []


@pytest.mark.hostile("checkpoints")
@pytest.mark.parametrize("distances", [True, False])
def test_a_clock_that_was_set_back_drops_no_grid(tmp_path, monkeypatch, distances):
    """A valid grid was left out, since its file was older than the launch that wrote it."""
    clock = [5000.0]
    monkeypatch.setattr(journal.time, "time", lambda: clock[0])

    def trains(log, steps):
        for step in steps:
            clock[0] += 10
            log.log({"loss": 1.0}, step)
            os.utime(add_grid(tmp_path, step, "white"), (clock[0], clock[0]))
            if distances:
                log.log({"distance/student": 0.5}, step)

    def grids():
        return [grid.step for grid in find_grids(tmp_path / "validation", *read_journal(tmp_path / journal.NAME))]

    clock[0] = 5000.0
    log = Journal(tmp_path, launch())
    clock[0] = 1000.0  # set back while the models load
    trains(log, (100, 200, 300))
    assert grids() == [100, 200, 300]
    clock[0] = 9000.0
    log = Journal(tmp_path, launch(), global_step=100)
    assert grids() == [100]
    trains(log, (200,))
    assert grids() == [100, 200]  # that of step 300 is from before
    clock[0] = 2000.0
    trains(log, (300, 400))
    assert grids() == [100, 200, 300, 400]
    clock[0] = 10_000.0
    Journal(tmp_path, launch(), global_step=400)
    assert grids() == [100, 200, 300, 400]


@pytest.mark.hostile("checkpoints")
def test_grids_of_a_folder_whose_times_were_lost_are_shown(tmp_path, monkeypatch):
    """A copy of 1980: what the journal says counts, where it says that a step was validated."""
    log = Journal(tmp_path, launch())
    for step in (100, 200):
        log.log({"distance/student": 0.5}, step)
        os.utime(add_grid(tmp_path, step, "white"), (315532800, 315532800))
    launches, entries = read_journal(tmp_path / journal.NAME)
    assert [grid.step for grid in find_grids(tmp_path / "validation", launches, entries)] == [100, 200]


def shown_pictures(page):
    found = re.findall(r'<img src="data:image/jpeg;base64,([^"]*)" width="(\d+)" height="(\d+)"[^>]*?( hidden)?>', page)
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data, *_ in found]
    assert [picture.size for picture in pictures] == [(int(width), int(height)) for _, width, height, _ in found]
    return pictures, [bool(hidden) for *_, hidden in found]


def test_grids_are_embedded_at_a_limited_size_and_encoded_once(tmp_path, monkeypatch):
    decoded = []
    decode = report.decode_picture
    monkeypatch.setattr(report, "decode_picture", lambda content: decoded.append(1) or decode(content))
    Journal(tmp_path, launch()).log({"loss": 1.0}, 10)
    add_grid(tmp_path, 10, "red", (2000, 800))
    add_grid(tmp_path, 20, "lime", (700, 6000))
    add_grid(tmp_path, 30, "blue")
    pictures, hidden = shown_pictures(build_report(tmp_path).read_text())
    assert [picture.size for picture in pictures] == [(1600, 640), (546, 4684), (96, 64)]
    assert hidden == [True, True, False]  # without the script the last one is shown
    colours = [np.asarray(picture.convert("RGB")).mean((0, 1)).round().tolist() for picture in pictures]
    assert np.allclose(colours, np.eye(3) * 255, atol=3)
    add_grid(tmp_path, 40, "white")
    add_grid(tmp_path, 30, "black", (80, 64))  # again, by the resumed run
    pictures, hidden = shown_pictures(build_report(tmp_path).read_text())
    assert len(decoded) == 5 and len(pictures) == 4 and hidden == [True, True, True, False]
    assert pictures[2].size == (80, 64) and np.asarray(pictures[2]).max() < 3


@pytest.mark.hostile("pictures")
def test_pictures_that_cannot_be_read_are_left_out_and_named(tmp_path):
    Journal(tmp_path, launch())
    add_grid(tmp_path, 10, "red")
    whole = add_grid(tmp_path, 20, "red").read_bytes()
    (tmp_path / "validation" / "step-000020.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "validation" / "step-000030.png").write_text("<svg onload='alert(1)'/>")
    (tmp_path / "validation" / "step-000040.png").symlink_to("nowhere")
    path = build_report(tmp_path)
    pictures, hidden = shown_pictures(path.read_text())
    assert len(pictures) == 1 and hidden == [False] and data_of(path)["grids"] == [10]
    note = "Could not be read, and left out: step-000020.png, step-000030.png, step-000040.png."
    assert note in path.read_text()


# --- the page


def test_the_page_describes_the_run(tmp_path):
    folder = tmp_path / "lcm <b>"
    folder.mkdir()
    journal = Journal(folder, launch())
    journal.log({"loss": 0.5, "data_wait": 0.02}, 100)
    journal.end(200, "SIGTERM")
    Journal(folder, launch(learning_rate=5e-5, filter="punsafe<0.2"), global_step=200).log({"loss": 0.25}, 210)
    path = build_report(folder)
    assert path == folder / "report.html" and sorted(os.listdir(folder)) == ["report.html", "training.jsonl"]
    page = path.read_text()
    for text in (
        "<h1>lcm &lt;b&gt;</h1>",
        "<b>org/teacher</b> by train_lcm_distill_sd_wds",
        "step <b>210</b> of 400",
        '<progress value="0.5250"',
        '<div class="changed"><dt>learning_<wbr>rate</dt><dd>5e-05 <span class="was">before: 0.0001</span></dd></div>',
        '<div class="changed"><dt>filter</dt><dd>punsafe&lt;0.2 <span class="was">before: –</span></dd></div>',
        "<dt>torch</dt><dd>2.13.0</dd>",
        "<dt>host</dt><dd>node7</dd>",
        "accelerate launch train.py --resume_from_checkpoint latest</pre>",
        "<td>step 200, SIGTERM</td>",
        "<td>learning_rate: 0.0001 → 5e-05; filter: – → punsafe&lt;0.2</td>",
        "<dt>Time spent waiting for data</dt><dd>2 %</dd>",
    ):
        assert text in page, text
    assert "@@" not in page
    assert data_of(path)["resumed"] == [200]


def test_a_launch_whose_steps_are_repeated_is_not_marked(tmp_path):
    Journal(tmp_path, launch())
    for step in (100, 300, 200):
        Journal(tmp_path, launch(), global_step=step).log({"loss": 1.0}, step + 10)
    path = build_report(tmp_path)
    assert data_of(path)["resumed"] == [100, 200]
    assert path.read_text().count("killed") == 3


@pytest.mark.parametrize(
    ("last", "reason", "state"),
    [(390, None, "Training"), (390, "SIGTERM", "Stopped"), (400, None, "Finished"), (400, "SIGTERM", "Finished")],
)
def test_the_state_of_a_run(tmp_path, last, reason, state):
    journal = Journal(tmp_path, launch())
    journal.log({"loss": 1.0}, last)
    if reason:
        journal.end(last, reason)
    assert f'<span class="chip {state}">{state}</span>' in build_report(tmp_path).read_text()


BASE = [
    {"launch": {**launch(), "started": 1.7e9, "global_step": 0}},
    *({"step": 10 * n, "time": 1.7e9 + n, "loss": 1 / n, "lr": 1e-6, "distance/student": 0.5} for n in range(1, 36)),
    {"launch": {**launch(learning_rate=2e-4), "started": 1.7e9 + 100, "global_step": 200}},
    {"step": 210, "time": 1.7e9 + 110, "loss": 0.2},
    {"end": {"global_step": 210, "time": 1.7e9 + 120, "reason": "SIGTERM"}},
]
FOREIGN = [
    None, True, 0, -1, 1.5, 1e308, -1e308, float("nan"), float("inf"), 2**53, 2**64, 10**400, 10**4000, "", "text",
    "\ud800", "\x1b[31m\x07\u202e", EVIL, "/", "~", "\0", "x" * 10_000, [], [1], [[[]]], {}, {"a": {"b": [{}]}},
    {"global_step": "x"}, {"global_step": 5, "time": "y"}, {"global_step": 5}, -1e20, 1e11, 253402300799.0,
]  # fmt: skip
BROKEN = [
    "", "{", "null", "5", '{"step": 1', "[" * 200_000, '{"step": ' + "9" * 5000 + "}", "\0\0\0",
    *('{"step": 1, "a": ' + "[" * deep + "]" * deep + "}" for deep in (90, 500, 985, 5000)),
    *('{"launch": {"flags": {"a": ' + "[" * deep + "]" * deep + "}}}" for deep in (90, 500, 985, 5000)),
]  # fmt: skip


def foreign(value, rng):
    """A copy of `value` with a key or a part less, more, or of another kind."""
    if not isinstance(value, dict) or not value or rng.random() < 0.1:
        return rng.choice(FOREIGN)
    value, key = dict(value), rng.choice([*value, "step", "time", "end", "launch", "started", "global_step", EVIL])
    if rng.random() < 0.2:
        value.pop(key, None)
    else:
        value[key] = foreign(value[key], rng) if key in value and rng.random() < 0.7 else rng.choice(FOREIGN)
    return value


@pytest.mark.hostile("checkpoints")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(4))
def test_a_foreign_journal_makes_a_report_or_a_message(tmp_path, capsys, seed):
    """Of 720 of them 83 were tracebacks."""
    rng, reports = random.Random(seed), 0
    for _ in range(60):
        lines: list = list(BASE[rng.choice([0, 0, 0, 20, 37]) :])
        for place in rng.choices(range(len(lines)), k=rng.randint(1, 4)):
            lines[place] = foreign(lines[place], rng) if rng.random() < 0.8 else rng.choice(BROKEN)
        if rng.random() < 0.3:
            rng.shuffle(lines)
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (tmp_path / journal.NAME).write_bytes(text.encode("utf-8", "surrogatepass"))
        (tmp_path / report.NAME).unlink(missing_ok=True)
        try:
            main([str(tmp_path)])
        except UsageError as refused:
            assert "training.jsonl holds no values and no launch" in str(refused)
        else:
            page, data = (tmp_path / report.NAME).read_text(), data_of(tmp_path / report.NAME)
            reports += 1
            assert "\x1b" not in page and "alert(1)<" not in page
            assert all(math.isfinite(value) for curve in data["curves"] for value in curve["values"])
        Journal(tmp_path, launch(), global_step=rng.choice([0, 5, 205]))  # nor does a run that resumes it
    assert reports > 40


@pytest.mark.hostile("checkpoints")
def test_what_a_foreign_journal_says_right_is_in_the_report(tmp_path):
    """One wrong value costs itself alone."""
    lines = json.loads(json.dumps(BASE))
    lines[0]["launch"] |= {"started": "then", "steps": [400], "machine": 7, "seed": {}}
    lines[1] |= {"loss": "low", "time": None}
    lines[2] |= {"loss": 10**400}
    lines[3]["step"] = True
    (tmp_path / journal.NAME).write_text("\n".join(map(json.dumps, lines)))
    launches, entries = read_journal(tmp_path / journal.NAME)
    assert [launch["global_step"] for launch in launches] == [0, 200] and launches[1]["end"]["reason"] == "SIGTERM"
    assert (
        "started" not in launches[0]
        and "steps" not in launches[0]
        and launches[0]["flags"] == BASE[0]["launch"]["flags"]
    )
    assert entries[0] == {"step": 10, "loss": "low", "lr": 1e-6, "distance/student": 0.5} and "loss" not in entries[1]
    assert [entry["step"] for entry in entries] == [10, 20, *range(40, 201, 10), 210]
    data = data_of(build_report(tmp_path))
    assert {curve["name"]: len(curve["steps"]) for curve in data["curves"]} == {
        "loss": 18,
        "distance/student": 19,
        "lr": 19,
    }


@pytest.mark.hostile("folders")
def test_a_foreign_folder_is_neither_waited_for_nor_written_through(tmp_path):
    """The report of a folder that someone sent, with a link under the name of its temporary file."""
    run, mine = tmp_path / "run", tmp_path / "mine"
    mine.write_text("mine")
    Journal(run, launch()).log({"loss": 1.0}, 10)
    for name in (".report.html.partial", "report.html", ".training.jsonl.partial"):
        (run / name).symlink_to(mine)
    (run / "validation").mkdir()
    os.mkfifo(run / "validation" / "step-000010.png")
    (run / "validation" / "step-000020.png").symlink_to("step-000020.png")
    (run / "validation" / "step-000030.png").mkdir()
    (run / "validation" / f"step-{'9' * 200}.png").touch()
    (run / "validation" / "step-٣.png").touch()
    page = build_report(run).read_text()
    assert "Could not be read, and left out: step-000010.png, step-000020.png, step-000030.png." in page
    Journal(run, launch(), global_step=10)
    assert mine.read_text() == "mine" and not (run / "report.html").is_symlink()
    (run / journal.NAME).unlink()
    os.mkfifo(run / journal.NAME)
    with pytest.raises(UsageError, match="holds no training.jsonl"):
        build_report(run)


@pytest.mark.hostile("checkpoints")
def test_a_nearly_empty_journal_makes_a_report(tmp_path):
    """One launch and no value; a value and no launch; launches of another version, with less in them."""
    for lines in (
        ['{"launch": {}}'],
        ['{"step": 3}'],
        ['{"launch": {"flags": 3, "end": 4}}', '{"step": 3, "loss": 1}'],
    ):
        (tmp_path / "training.jsonl").write_text("\n".join(lines))
        assert "Training" in build_report(tmp_path).read_text()


def test_the_report_of_a_long_run_is_small(tmp_path):
    journal = Journal(tmp_path, launch())
    lines = "".join(
        json.dumps({"step": step, "time": 0.0, "loss": step % 97 / 97, "lr": 1e-6}) + "\n" for step in range(50_000)
    )
    with open(tmp_path / "training.jsonl", "a") as file:
        file.write(lines)
    journal.log({"loss": 0.5}, 50_000)
    path = build_report(tmp_path)
    assert path.stat().st_size < 100_000
    curve = data_of(path)["curves"][0]
    assert len(curve["steps"]) == len(curve["values"]) <= 1000 and curve["steps"][-1] == 50_000
    assert len(curve["mean"]["steps"]) == 300


# --- what goes wrong


@pytest.mark.hostile("disks")
def test_a_report_that_cannot_be_written_is_logged_and_leaves_the_old_one(tmp_path, monkeypatch, caplog):
    Journal(tmp_path, launch()).log({"loss": 1.0}, 10)
    old = write_report(tmp_path).read_text()

    def full(self, content):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert write_report(tmp_path) is None
    assert caplog.records[-1].levelno == logging.ERROR and "No space left on device" in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["report.html", "training.jsonl"]
    assert (tmp_path / "report.html").read_text() == old
    with pytest.raises(UsageError, match="could not be written .*No space left on device"):
        main([str(tmp_path)])


@pytest.mark.hostile("checkpoints")
def test_a_report_never_ends_a_run(tmp_path, caplog, monkeypatch):
    """Whatever is wrong with it."""
    (tmp_path / "training.jsonl").write_text('{"launch": {"started": "yesterday"}}\n{"step": 1, "time": 0.0}\n')
    assert write_report(tmp_path) == tmp_path / "report.html" and not caplog.text
    monkeypatch.setattr(report, "find_grids", lambda *_: 1 / 0)
    assert write_report(tmp_path) is None and "the run continues" in caplog.text


def test_the_command_line(tmp_path, capsys):
    with pytest.raises(UsageError, match="no training.jsonl; give the --output_dir of a run"):
        main([str(tmp_path / "nowhere")])
    (tmp_path / "training.jsonl").write_text("nothing of a journal\n")
    with pytest.raises(UsageError, match="not the journal of a run"):
        main([str(tmp_path)])
    Journal(tmp_path, launch()).log({"loss": 1.0}, 10)
    main([str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}: 0.0 MB\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "validation/step-*.png" in capsys.readouterr().out


def test_an_installed_package_has_the_page_and_the_font(tmp_path):
    """They are no Python files: a wheel has them only because pyproject.toml says so."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "lcm_distill", source / "lcm_distill", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    fonts = "lcm_distill/sampling/fonts"
    for name in ("lcm_distill/run/report_template.html", f"{fonts}/DejaVuSans.ttf", f"{fonts}/LICENSE_DEJAVU"):
        assert zipfile.ZipFile(wheel).read(name) == (ROOT / name).read_bytes()


# --- in a browser


@pytest.fixture(scope="module")
def browser():
    if find_browser() is None:
        reason = "no Chromium or Chrome is installed (Debian, Ubuntu: apt-get install chromium)"
        if os.environ.get("LCM_DISTILL_BROWSER_TESTS") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    with Browser() as browser:
        yield browser


COLOURS = {100: (220, 40, 40), 200: (40, 160, 60), 300: (50, 70, 200)}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The report of a run of two launches and three grids, with hostile values."""
    folder = tmp_path_factory.mktemp("run")
    journal = Journal(folder, launch(validation_prompts=[EVIL]))
    rng = np.random.default_rng(0)

    def log(step):
        journal.log({"loss": 2.0 ** (-step / 50) * (1 + rng.random()), "lr": 1e-4, EVIL: float(step)}, step)

    for step in range(5, 205, 5):
        log(step)
    journal.end(200, EVIL)
    journal = Journal(folder, launch(output_dir=EVIL) | {"command": EVIL, "folder": EVIL}, global_step=200)
    for step in range(205, 305, 5):
        log(step)
    for step, colour in COLOURS.items():
        add_grid(folder, step, colour, (1200, 500))
    return build_report(folder)


def quiet(page, path):
    """No error, no warning, and nothing was asked for but the file itself and what is in it."""
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith("data:")] == [path.as_uri()]
    return True


def test_the_harness_sees_errors_and_requests(browser, tmp_path):
    """Without this, a page without complaints might be one whose events are never received."""
    path = tmp_path / "loud.html"
    path.write_text(
        "<script>console.error('one'); setTimeout(() => { throw new Error('two'); })</script>"
        "<img src='http://127.0.0.1:9/three.png'>"
    )
    page = browser.open(path.as_uri())
    page.until("document.images[0].complete")
    text = "\n".join(page.complaints)
    assert "one" in text and "two" in text
    assert page.requests == [path.as_uri(), "http://127.0.0.1:9/three.png"]


def test_the_slider_moves_through_the_grids(browser, written):
    page = browser.open(written.as_uri())
    shown = "[...document.querySelectorAll('.stage img')].filter((image) => image.checkVisibility())"

    def seen():
        """(the label, what a screen reader reads, the step whose colour is on the screen)."""
        left, top, width, height = page.box(".stage")
        screen = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        colour = screen.getpixel((int(left + width / 2), int(top + height / 2)))
        step = min(COLOURS, key=lambda step: np.abs(np.subtract(COLOURS[step], colour)).sum())
        assert np.abs(np.subtract(COLOURS[step], colour)).max() < 12
        assert page.evaluate(f"{shown}.length") == 1
        label = page.evaluate("document.getElementById('drawn-at').textContent")
        return label, page.evaluate("document.getElementById('slider').getAttribute('aria-valuetext')"), step

    assert seen() == ("step 300", "step 300", 300)  # the last, before anything is touched
    page.evaluate("document.getElementById('slider').focus()")
    visited = []
    for key in ("ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowRight", "End", "Home"):
        page.press(key)
        visited.append(seen())
    assert visited == [(f"step {step}", f"step {step}", step) for step in (200, 100, 100, 200, 300, 100)]

    for place, step in ((0.5, 200), (0.99, 300), (0.01, 100)):
        left, top, width, height = page.box("#slider")
        page.click(left + place * width, top + height / 2)
        assert seen()[0] == f"step {step}"

    page.click_on("#play")
    page.until("document.getElementById('drawn-at').textContent === 'step 300'")
    page.until("document.getElementById('play').textContent === 'Play'")  # it stops at the end
    assert quiet(page, written)


def test_the_curves_show_values_and_change_their_scale(browser, written):
    page = browser.open(written.as_uri())
    assert page.evaluate("[...document.querySelectorAll('.chart')].map((chart) => chart.dataset.name)") == [
        "loss",
        EVIL,
        "lr",
    ]
    curve = data_of(written)["curves"][0]
    readout = "document.querySelector('.chart output').textContent"
    assert page.evaluate(readout) == f"{curve['values'][-1]:.4g} at step 300"

    left, top, width, height = page.box(".chart svg")
    steps = []
    for share in (0.3, 0.6, 0.9):
        page.hover(left + share * width, top + height / 2)
        value, step = re.fullmatch(r"([\d.]+) at step (\d+)", page.evaluate(readout)).groups()
        assert float(value) == pytest.approx(curve["values"][curve["steps"].index(int(step))], rel=1e-3)
        assert f"at step {step}" in page.evaluate("document.querySelectorAll('.chart output')[2].textContent")
        steps.append(int(step))
    assert steps == sorted(set(steps)) and abs(steps[1] - 0.6 * 300) < 25
    page.hover(5, 5)
    assert page.evaluate(readout).endswith("at step 300")

    def line(kind):
        """The y of the curve's points, in the order of the steps."""
        path = page.evaluate(f"document.querySelector('.chart .{kind}').getAttribute('d')")
        return np.array([float(point.split(",")[1]) for point in path[1:].split("L")])

    values = np.array(curve["values"])
    assert np.abs(np.corrcoef(line("raw"), values)[0, 1]) > 0.999
    page.click_on(".chart button")
    assert page.evaluate("document.querySelector('.chart button').getAttribute('aria-pressed')") == "true"
    assert np.abs(np.corrcoef(line("raw"), np.log(values))[0, 1]) > 0.999
    page.click_on(".chart button")
    assert np.abs(np.corrcoef(line("raw"), values)[0, 1]) > 0.999

    assert page.evaluate("document.querySelectorAll('.chart .resumed').length") == 3  # a mark in each
    page.evaluate("document.querySelector('.chart svg').focus()")
    for key in ("ArrowLeft", "ArrowLeft"):
        page.press(key)
    assert page.evaluate(readout).endswith("at step 295")
    assert quiet(page, written)


def test_noise_can_be_smoothed(browser, tmp_path):
    journal = Journal(tmp_path, launch())
    rng = np.random.default_rng(0)
    for step in range(1, 101):
        journal.log({"loss": 1 + rng.random(), "lr": 1e-4 * step}, step)
    path = build_report(tmp_path)
    page = browser.open(path.as_uri())
    lines = "[...document.querySelectorAll('.chart')].map((chart) => chart.querySelectorAll('.mean').length)"
    assert page.evaluate(lines) == [1, 0]
    page.click_on("#smooth")
    assert page.evaluate(lines) == [0, 0]
    assert quiet(page, path)


@pytest.mark.hostile("checkpoints")
def test_nothing_that_a_user_wrote_runs(browser, written):
    page = browser.open(written.as_uri())
    assert page.evaluate("document.scripts.length") == 2  # the data and the page's own
    assert page.evaluate("[...document.images].every((image) => image.src.startsWith('data:image/jpeg;base64,'))")
    assert page.evaluate("document.getElementById('command').textContent") == EVIL
    assert page.evaluate(
        "[...document.querySelectorAll('.pairs dd')].some((cell) => cell.textContent.includes('<script>'))"
    )
    # Even if something did get in, it could not load anything.
    page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    page.until("document.images[document.images.length - 1].complete")
    assert any("Content Security Policy" in text for text in page.complaints)


def test_the_command_is_copied(browser, written):
    page = browser.open(written.as_uri())
    page.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.click_on("#copy")
    page.until("document.getElementById('copy').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == EVIL
    assert quiet(page, written)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_window_and_the_reader_s_colours(browser, written, width, dark):
    page = browser.open(written.as_uri(), width=width, height=800, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(
        "[...document.querySelectorAll('.chart svg path')].every((line) => line.getBBox().width > 150)"
    )
    corner = Image.open(io.BytesIO(page.screenshot())).convert("L").getpixel((2, 2))
    assert corner < 40 if dark else corner > 230
    assert quiet(page, written)


def test_a_report_without_values_is_quiet(browser, tmp_path):
    Journal(tmp_path, launch())
    path = build_report(tmp_path)
    page = browser.open(path.as_uri())
    assert not page.evaluate("document.getElementById('curves').checkVisibility()")
    assert not page.evaluate("document.getElementById('pictures').checkVisibility()")
    assert page.evaluate("document.getElementById('resume').checkVisibility()")
    assert quiet(page, path)


@pytest.mark.parametrize("program", ["train_lcm_distill_sd_wds", "train_lcm_distill_lora_sdxl_wds"])
def test_the_report_says_how_to_use_the_result(program, tmp_path):
    """As the card does, escaped; not for a run whose flags are unknown."""
    out = tmp_path / "lcm"
    flags = {
        "pretrained_teacher_model": "a<b>.safetensors", "teacher_config": "org/configs", "output_dir": "runs/<lcm>",
        "w_min": 2.0, "w_max": 4.0,
    }  # fmt: skip
    out.mkdir()
    launch = {"program": program, "flags": flags, "steps": 2, "global_step": 0}
    lines = [{"launch": launch}, {"step": 1, "time": 1.7e9, "loss": 1.0}]
    (out / "training.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    page = build_report(out).read_text()
    found = page[page.index('<section id="use"') : page.index('<section id="configuration"')]
    assert "<lcm>" not in found and "<b>.safe" not in found and "Once the run is finished, in Diffusers" in found
    code = html.unescape(found.split('picture">')[1].split("</pre>")[0])
    compile(code, "report", "exec")
    is_lora = "lora" in program
    pipeline = "StableDiffusionXLPipeline" if is_lora else "StableDiffusionPipeline"
    assert f"{pipeline}.from_single_file('a<b>.safetensors', config='org/configs'" in code
    assert f"guidance_scale={1 if is_lora else 5}" in code  # 8, at most w_max + 1
    assert ("load_lora_weights('runs/<lcm>')" in code) == is_lora
    assert ("lcm_distill.export_model" in found) != is_lora and ("models/loras" in found) == is_lora
    lines.append({"step": 2, "time": 1.7e9, "loss": 1.0})
    (out / "training.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert "In Diffusers, from" in build_report(out).read_text()
    (out / "training.jsonl").write_text(json.dumps({"step": 1, "time": 1.7e9, "loss": 1.0}) + "\n")
    assert '<section id="use" hidden' in build_report(out).read_text()
