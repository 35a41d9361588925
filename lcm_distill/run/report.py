"""Builds a run's report: one HTML file with its curves, pictures over time, flags and the command to resume it."""

import base64
import bisect
import contextlib
import functools
import html
import io
import json
import logging
import math
import os
import re
import stat
import string
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lcm_distill.data.decode import decode_picture
from lcm_distill.data.raw import BadSample
from lcm_distill.errors import UsageError
from lcm_distill.export import usage
from lcm_distill.models.code import loading_code
from lcm_distill.run import journal

logger = logging.getLogger(__name__)

NAME = "report.html"
MOST_POINTS = 1000  # of a curve; more cannot be seen on a screen
MOST_GRIDS = 40
GRID_WIDTH = 1600  # pixels
GRID_PIXELS = 1600 * 1600  # forty grids of this size are 50 MB of HTML if they are photographs, 1 to 20 MB in practice
GRID_QUALITY = 85

# What the programs always log comes last; the loss comes first, other values (of the validation) between.
_ALWAYS_LOGGED = ("grad_norm", "lr", "samples_per_second", "data_wait")
_TITLES = {
    "loss": "Loss",
    "dm_loss": "Distribution matching loss",
    "fake_score_loss": "Loss of the fake score",
    "distance/student": "Student's distance from the teacher",
    "distance/target": "Target's distance from the teacher",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "samples_per_second": "Pictures per second",
    "data_wait": "Time spent waiting for data",
}
_NOT_COMPARED = ("resume_from_checkpoint", "local_rank", "dry_run")

Steps = np.ndarray
Values = np.ndarray


def _title(name: str) -> str:
    spaced = name.replace("_", " ")
    return _TITLES.get(name, spaced[:1].upper() + spaced[1:])


class Grid(NamedTuple):
    """A grid of validation pictures: its step and its file."""

    step: int
    path: Path


# ------------------------------------------------------------------------------------------------------- curves


def collect_curves(entries: Iterable[Mapping[str, Any]]) -> dict[str, tuple[Steps, Values]]:
    """The (steps, values) of each name in the journal's lines, by ascending step; of two at one step the later.

    Values that are not finite numbers are left out.
    """
    found: dict[str, dict[int, float]] = {}
    for entry in entries:
        for name, value in entry.items():
            if name not in ("step", "time") and isinstance(value, (int, float)) and math.isfinite(value):
                found.setdefault(name, {})[entry["step"]] = value
    names = sorted(
        found, key=lambda name: (name != "loss", _ALWAYS_LOGGED.index(name) if name in _ALWAYS_LOGGED else -1)
    )
    return {name: _arrays(found[name]) for name in names}


def _arrays(points: Mapping[int, float]) -> tuple[Steps, Values]:
    steps = sorted(points)
    return np.array(steps), np.array([points[step] for step in steps], float)


def thin(steps: Steps, values: Values, most: int = MOST_POINTS) -> tuple[Steps, Values]:
    """At most `most` of the points: the first, the last, and the minimum and maximum of each interval between them."""
    if len(steps) <= most:
        return steps, values
    edges = np.linspace(1, len(steps) - 1, (most - 2) // 2 + 1).astype(int)
    kept = {0, len(steps) - 1}
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        kept |= {start + int(values[start:end].argmin()), start + int(values[start:end].argmax())}
    chosen = sorted(kept)
    return steps[chosen], values[chosen]


def smooth(steps: Steps, values: Values, most: int = 300) -> tuple[Steps, Values] | None:
    """A moving average over a twentieth of the points, at `most` of them; None for a curve that is not noisy.

    It averages all points, not the thinned ones, which are extremes.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # a foreign journal may hold any number
        return _smooth(steps, values, most)


def _smooth(steps: Steps, values: Values, most: int) -> tuple[Steps, Values] | None:
    travelled, span = np.abs(np.diff(values)).sum(), np.ptp(values) if len(values) else 0.0
    if len(values) < 30 or travelled < 4 * span or span == 0:
        return None
    middle = np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).astype(int))
    half = max(2, len(values) // 40)
    first, last = np.maximum(middle - half, 0), np.minimum(middle + half + 1, len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    means = (total[last] - total[first]) / (last - first)
    return (steps[middle], means) if np.isfinite(means).all() else None


def _points(steps: Steps, values: Values) -> dict[str, list]:
    return {"steps": steps.tolist(), "values": [float(f"{value:.5g}") for value in values]}


def _curve(name: str, steps: Steps, values: Values) -> dict[str, Any]:
    mean = smooth(steps, values)
    return {
        "name": name,
        "title": _title(name),
        "percent": name == "data_wait",
        **_points(*thin(steps, values)),
        "mean": mean and _points(*mean),
    }


# ------------------------------------------------------------------------------------------------------- grids


def find_grids(
    folder: Path, launches: Sequence[Mapping[str, Any]], entries: Sequence[Mapping[str, Any]] = ()
) -> list[Grid]:
    """The grids in a run's `validation/`, by step, without those of steps that a later launch repeats.

    A grid whose distances are among the `entries` is none of these. Of others the time decides, that of the file
    against that of the launch, unless the clock was set back since: then all are kept.
    """
    measured = {entry["step"] for entry in entries if any(name.startswith("distance/") for name in entry)}
    firsts = zip(launches, _first_times(launches, entries), strict=True)
    starts = [
        (launch.get("global_step", 0), launch["started"]) for launch, first in firsts if first == launch.get("started")
    ]
    grids = []
    for path in folder.glob("step-*.png"):
        if match := re.fullmatch(r"step-(\d{1,15})\.png", path.name, re.ASCII):
            step, written = int(match[1]), math.inf
            with contextlib.suppress(OSError):  # a broken link is reported later
                written = path.stat().st_mtime
            abandoned = any(step > start and written < started for start, started in starts)
            grids += [] if abandoned and step not in measured else [Grid(step, path)]
    return sorted(grids)


def _first_times(launches: Sequence[Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]) -> list[float]:
    """For each launch the least of the times since: its own, unless the clock was set back; infinite without any."""
    timed = sorted((entry["step"], entry["time"]) for entry in entries if "time" in entry)
    steps = [step for step, _ in timed]
    least = [*accumulate((moment for _, moment in reversed(timed)), min)][::-1] + [math.inf]
    found: list[float] = []
    later = math.inf  # the least time of this launch and those after it
    for launch in reversed(launches):
        ended = _mapping(launch, "end").get("time", math.inf)
        later = min(later, launch.get("started", math.inf), ended)
        first = min(later, least[bisect.bisect_right(steps, launch.get("global_step", 0))])
        found.append(first)
    return found[::-1]


def thin_grids(grids: Sequence[Grid], most: int = MOST_GRIDS) -> list[Grid]:
    """The first, the last, and every second, fourth, … grid between, so that there are at most `most`.

    By powers of two: as a run continues, it drops grids but never takes one back, so that none is encoded twice.
    """
    stride = 1
    while math.ceil((len(grids) - 1) / stride) + 1 > most:
        stride *= 2
    return list(dict.fromkeys([*grids[::stride], *grids[-1:]]))


@functools.lru_cache(maxsize=2 * MOST_GRIDS)  # the run's next report encodes only its newest grid
def _encoded(path: Path, written: int, size: int) -> tuple[str, int, int]:
    """(a grid as a JPEG in base64, its width, its height); `written` and `size` identify an overwritten file."""
    picture, _ = decode_picture(path.read_bytes())
    scale = min(1.0, GRID_WIDTH / picture.width, math.sqrt(GRID_PIXELS / (picture.width * picture.height)))
    if scale < 1:
        shape = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
        picture = picture.resize(shape, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=GRID_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode(), picture.width, picture.height


def _pictures(grids: Sequence[Grid]) -> tuple[str, list[int], list[str]]:
    """(the grids as <img>, all but the last hidden; their steps; the names of those that cannot be read)."""
    shown: list[tuple[int, str]] = []
    broken = []
    for grid in thin_grids(grids):
        try:
            status = grid.path.stat()
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
                raise OSError
            data, width, height = _encoded(grid.path, status.st_mtime_ns, status.st_size)
        except (OSError, BadSample):
            broken.append(grid.path.name)
            continue
        source = f'src="data:image/jpeg;base64,{data}" width="{width}" height="{height}"'
        shown.append((grid.step, f'<img {source} decoding="sync" alt="Pictures generated at step {grid.step:,}"'))
    images = [f"{tag}{'' if place == len(shown) - 1 else ' hidden'}>" for place, (_, tag) in enumerate(shown)]
    return "\n".join(images), [step for step, _ in shown], broken


# ------------------------------------------------------------------------------------------------------- the page


class _Page(string.Template):
    """A template with placeholders @@name: its CSS has percent signs and its script has dollar signs."""

    delimiter = "@@"


_text = html.escape


def _when(seconds: Any) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if isinstance(seconds, (int, float)) else "?"


def _long(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _mapping(launch: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = launch.get(name)
    return found if isinstance(found, dict) else {}


def _value(value: Any) -> str:
    """A flag's value as its user would write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " · ".join(map(str, value))
    return "–" if value is None else str(value)


def _changes(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The flags whose values in `now` and `before` differ, with the old values; none if `before` is empty."""
    names = [name for name in now if name not in _NOT_COMPARED] if before else []
    return {name: before.get(name) for name in names if before.get(name) != now[name]}


def _pairs(now: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """Names and values as <dt> and <dd>; those that differ from `before` are marked, with the old value."""
    changed = _changes(now, before)
    pairs = []
    for name, value in now.items():
        was = f' <span class="was">before: {_text(_value(changed[name]))}</span>' if name in changed else ""
        kind = ' class="changed"' if name in changed else ""
        pairs.append(
            f"<div{kind}><dt>{_text(name).replace('_', '_<wbr>')}</dt><dd>{_text(_value(value))}{was}</dd></div>"
        )
    return "\n".join(pairs)


def _last_seen(launches: Sequence[Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]) -> list[tuple[float, int]]:
    """The time and the step of each launch's last line in the journal."""
    last_seen = [(launch.get("started", 0.0), launch.get("global_step", 0)) for launch in launches]
    # By its step, since a clock may have been set back: of a step that is repeated only the last launch's line is left.
    order = sorted(range(len(launches)), key=lambda place: (launches[place].get("global_step", 0), place))
    starts, latest = [launches[place].get("global_step", 0) for place in order], [-1, *accumulate(order, max)]
    lines = [
        (latest[bisect.bisect_left(starts, entry["step"])], entry.get("time", 0.0), entry["step"]) for entry in entries
    ]
    ends = [_mapping(launch, "end") for launch in launches]
    lines += [(place, end["time"], end["global_step"]) for place, end in enumerate(ends) if end]
    for place, moment, step in lines:
        if place >= 0:
            last_seen[place] = (max(last_seen[place][0], moment), max(last_seen[place][1], step))
    return last_seen


def _launch_rows(launches: Sequence[Mapping[str, Any]], last_seen: Sequence[tuple[float, int]]) -> str:
    rows = []
    for number, launch in enumerate(launches):
        flags, machine, end = (_mapping(launch, name) for name in ("flags", "machine", "end"))
        before = _mapping(launches[number - 1], "flags") if number else {}
        changes = [f"{name}: {_value(was)} → {_value(flags[name])}" for name, was in _changes(flags, before).items()]
        last, step = last_seen[number]
        how = end.get("reason") if end else "killed" if number + 1 < len(launches) else None
        cells = [
            str(number + 1),
            _when(launch.get("started")),
            f"step {launch.get('global_step', 0):,}",
            f"step {step:,}" + (f", {how}" if how else ""),
            _long(last - launch.get("started", last)),
            f"{machine.get('processes', 1)} × {machine.get('device', '?')}",
            "; ".join(changes) or "–",
        ]
        rows.append("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    return "\n".join(rows)


def _state(
    launch: Mapping[str, Any], last_seen: Sequence[tuple[float, int]], entries: Sequence[Mapping[str, Any]]
) -> tuple[str, str, int, int | None]:
    """(the run's state in one word; a detail of it; its last known step; its planned steps, if known)."""
    end, steps = _mapping(launch, "end"), launch.get("steps")
    steps = steps if isinstance(steps, int) and steps > 0 else None
    moment = last_seen[-1][0] if last_seen else entries[-1].get("time")
    step = max([last_seen[-1][1] if last_seen else 0, *(entry["step"] for entry in entries)])
    if steps and step >= steps:
        return "Finished", _when(moment), step, steps
    if end:
        reason = f"{end['reason']}, " if end.get("reason") else ""
        return "Stopped", f"{reason}{_when(moment)}", step, steps
    return "Training", f"last value at {_when(moment)}", step, steps


def _teacher(flags: Mapping[str, Any]) -> str:
    """The teacher's name: a Hub id, or the last part of a path."""
    name = str(flags.get("pretrained_teacher_model", ""))
    return name if name.count("/") == 1 and name[0] not in "/.~" else Path(name).name


def _figures(curves: Mapping[str, tuple[Steps, Values]], seconds: float) -> str:
    """The latest values as <dt> and <dd>, which are shown also where scripts are blocked."""
    pairs = []
    for name, (_, values) in curves.items():
        if name in ("grad_norm", "lr"):
            continue
        # Over the last twentieth: a single value is mostly noise.
        with np.errstate(over="ignore"):
            mean = float(values[-max(1, len(values) // 20) :].mean())
        pairs.append((_title(name), f"{100 * mean:.3g} %" if name == "data_wait" else f"{mean:.4g}"))
    pairs = [*pairs[:5], ("Training time", _long(seconds))]
    return "\n".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in pairs)


def _left_out(grids: Sequence[Grid], shown: Sequence[int], broken: Sequence[str]) -> str:
    notes = []
    if len(shown) + len(broken) < len(grids):
        notes.append(f"{len(shown)} of {len(grids)} are shown here; all of them are in validation/.")
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        notes.append(f"Could not be read, and left out: {', '.join(broken[:3])}{more}.")
    return " ".join(notes)


def _command_note(launch: Mapping[str, Any]) -> str:
    notes = ["The launcher’s own options (accelerate launch --config_file …) are not recorded: add them as before."]
    if "…" in str(launch.get("command")):
        notes.append("A … stands for a command or the query of a URL, which may hold a secret.")
    if _mapping(launch, "flags").get("push_to_hub"):
        notes.append("It never has the Hub token: give it again, or log in with hf auth login.")
    return " ".join(notes)


_TEACHER_FLAGS = {  # of `loading_code`
    "revision": "teacher_revision",
    "variant": "variant",
    "config": "teacher_config",
    "vae": "pretrained_vae_model_name_or_path",
    "vae_revision": "revision",
}


def _usage(folder: Path, launch: Mapping[str, Any]) -> tuple[str, str]:
    """How to use the result: (code for Diffusers, HTML about other programs); empty if the run's flags are unknown."""
    flags, program = _mapping(launch, "flags"), str(launch.get("program", ""))
    model = flags.get("pretrained_teacher_model")
    if not isinstance(model, str) or not program:
        return "", ""
    is_lora = "lora" in program
    known = {name: flags[flag] for name, flag in _TEACHER_FLAGS.items() if isinstance(flags.get(flag), str)}
    pipeline = "StableDiffusionXLPipeline" if "sdxl" in program else "StableDiffusionPipeline"
    arguments = [] if is_lora else ["unet=unet"]
    teacher = loading_code(model, pipeline, *arguments, **known, **usage.CODE_OPTIONS)
    out = str(flags.get("output_dir") or folder)
    top = flags.get("top_timestep")
    lower = isinstance(top, int) and usage.starts_lower({"num_train_timesteps": top + 1})
    if is_lora:
        return usage.lora_code(out, teacher), _markdown(usage.lora_recipe(usage.KOHYA_FILE, lower_start=lower))
    scale = _guidance_scale(flags)
    recipe = usage.full_recipe(out, f"{folder.resolve().name}.safetensors", scale, lower_start=lower)
    return usage.full_code(out, teacher, scale), _markdown(recipe)


def _guidance_scale(flags: Mapping[str, Any]) -> float:
    """The guidance_scale of a full student's validation pictures, as its card has it."""
    given, low, high = (flags.get(name) for name in ("validation_guidance_scale", "w_min", "w_max"))
    if isinstance(given, (int, float)):
        return float(given)
    low, high = (float(w) if isinstance(w, (int, float)) else default for w, default in ((low, 0.0), (high, math.inf)))
    return min(max(8.0, low + 1), high + 1)


def _markdown(text: str) -> str:
    """The Markdown of `usage` as HTML: paragraphs, a block of code, bold words and code in lines."""
    parts = []
    for part in text.split("\n\n"):
        if part.startswith("```"):
            parts.append(f'<pre tabindex="0">{_text(part.partition(chr(10))[2].rpartition(chr(10))[0])}</pre>')
            continue
        line = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", _text(part))
        line = re.sub("`(.+?)`", r"<code>\1</code>", line)
        parts.append(f"<p>{line}</p>")
    return "\n".join(parts)


def build_report(output_dir: str | Path) -> Path:
    """Writes `output_dir/report.html`, under a temporary name until it is complete, and returns its path.

    Raises:
        UsageError: there is no training.jsonl, or it is empty.
        OSError: the journal cannot be read, or the report cannot be written.
    """
    folder = Path(output_dir)
    if not (folder / journal.NAME).is_file():
        raise UsageError(f"{folder} holds no {journal.NAME}; give the --output_dir of a run.")
    launches, entries = journal.read_journal(folder / journal.NAME)
    if not launches and not entries:
        raise UsageError(f"{folder / journal.NAME} holds no values and no launch: it is not the journal of a run.")
    launch = launches[-1] if launches else {}
    before = launches[-2] if len(launches) > 1 else {}
    flags, given = _mapping(launch, "flags"), _mapping(before, "flags")
    changed = _changes(flags, given)
    curves = collect_curves(entries)
    grids = find_grids(folder / "validation", launches, entries)
    images, shown, broken = _pictures(grids)
    last_seen = _last_seen(launches, entries)
    seconds = sum(last - each.get("started", last) for (last, _), each in zip(last_seen, launches, strict=True))
    state, more, step, steps = _state(launch, last_seen, entries)
    resumed_at = [each.get("global_step", 0) for each in launches]
    data = {
        "curves": [_curve(name, *points) for name, points in curves.items()],
        "grids": shown,
        # Curves have no points of a launch after the step that a later one resumed at.
        "resumed": sorted({start for place, start in enumerate(resumed_at) if 0 < start <= min(resumed_at[place:])}),
    }
    left_out = _left_out(grids, shown, broken)
    code, elsewhere = _usage(Path(str(output_dir)), launch)
    page = _Page(resources.files(__package__).joinpath("report_template.html").read_text(encoding="utf-8")).substitute(
        name=_text(folder.resolve().name),
        program=_text(str(launch.get("program", ""))),
        teacher=_text(_teacher(flags)),
        state=state,
        state_more=_text(more),
        step=f"{step:,}",
        of_steps=f" of {steps:,}" if steps else "",
        progress=f"{min(1.0, step / (steps or step or 1)):.4f}",
        figures=_figures(curves, seconds),
        images=images,
        no_grids="" if grids else " hidden",
        left_out=_text(left_out),
        nothing_left_out="" if left_out else " hidden",
        no_curves="" if curves else " hidden",
        command=_text(str(launch.get("command", ""))),
        command_note=_text(_command_note(launch)),
        folder=_text(str(launch.get("folder", ""))),
        usage=_text(code),
        elsewhere=elsewhere,
        no_usage="" if code else " hidden",
        usable="In" if state == "Finished" else "Once the run is finished, in",
        flags=_pairs({name: value for name, value in flags.items() if value is not None or name in changed}, given),
        unset=_text(", ".join(name for name, value in flags.items() if value is None and name not in changed)),
        versions=_pairs(_mapping(launch, "versions"), _mapping(before, "versions")),
        machine=_pairs(_mapping(launch, "machine"), _mapping(before, "machine")),
        launches=_launch_rows(launches, last_seen),
        written=_when(time.time()),
        # Only "<" can end a script element, and JSON does not need it.
        data=json.dumps(data).replace("<", "\\u003c"),
    )
    report, partial = folder / NAME, folder / f".{NAME}.partial"
    try:
        partial.unlink(missing_ok=True)  # a new file: not what a link of this name points to
        partial.write_bytes(page.encode(errors="replace"))
        os.replace(partial, report)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    return report


def write_report(output_dir: str | Path) -> Path | None:
    """`build_report` during a run: an error is logged, never raised. Only the main process calls it."""
    try:
        return build_report(output_dir)
    except Exception as error:  # noqa: BLE001 - a report must not end a run
        logger.error("the report could not be written (%s: %s); the run continues", type(error).__name__, error)
        return None
