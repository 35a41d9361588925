"""Show that two checkouts of this repository are the same programs: the same results, bit for bit.

    git worktree add BEFORE_CHECKOUT COMMIT                           # the code as it was
    python -m benchmarks.compare_commits BEFORE_CHECKOUT              # against this checkout: 5 minutes
    python -m benchmarks.compare_commits BEFORE_CHECKOUT AFTER_CHECKOUT --work_dir DIR

For a change that is to change nothing. Both checkouts run the same commands on the toy teachers and the same toy
shards: each of the four programs as a whole; resumed from a copy of one checkpoint, which BEFORE wrote; with SDXL's
sizes fixed; from encoded shards; in bfloat16; with data workers; and the commands for shards, drawing, evaluation,
timing and the report. All that they write is compared: weights, optimizers and the rest of the checkpoints, pictures'
pixels, JSON, cards and logged values to the last bit, and the lists of files. Times, dates and versions are
left out, as are files that hold nothing else.

A line for each comparison says `same`, or what differs first; the last line has the counts. Exit status 1 if
something differs or a command fails; what was written and the commands' logs are kept then, and with --work_dir.

Every command has a process of its own with the checkout as its folder and the source of its modules. It is forked
from this one, where the libraries are loaded already, since that takes longer than the toy's training; with --fresh
each starts a Python of its own, as in a shell (10 minutes).
"""

import argparse
import importlib
import json
import logging
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: the order of sums depends on it

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

# The package and the toy world are not imported here: each command imports those of its own checkout.

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("sd", "sdxl", "lora_sd", "lora_sdxl")
OUT = "OUT"  # in a command: the folder that it writes
PROMPT = "a small red circle on a black background"

# What no two runs have in common: the names of such values, wherever they are in a JSON file or the journal.
PASSING = frozenset(
    "time started folder versions date seconds median_seconds times_as_fast seconds_per_picture peak_gpu_bytes "
    "samples_per_second data_wait modelspec.date".split()
)
MINUTE = r"\d{4}-\d\d-\d\d \d\d:\d\d"

# What the commands need, loaded once.
LIBRARIES = {
    "accelerate": "Accelerator",
    "diffusers": "AutoencoderKL DDIMScheduler DPMSolverMultistepScheduler LCMScheduler UNet2DConditionModel "
    "StableDiffusionPipeline StableDiffusionXLPipeline",
    "peft": "LoraConfig",
    "torch.utils.tensorboard": "SummaryWriter",
    "torchdata.stateful_dataloader": "StatefulDataLoader",
    "transformers": "CLIPTextModel CLIPTextModelWithProjection CLIPTokenizer",
    "webdataset": "TarWriter",
}


@dataclass(frozen=True)
class Job:
    """A command of both checkouts, or of BEFORE alone: what is typed after `python`, OUT for the folder it writes.

    `begun` is a folder whose copy OUT is at the start; `only` is the one file that is compared, where it is not all.
    """

    name: str
    words: list[str]
    begun: Path | None = None
    only: str | None = None
    before_alone: bool = False


# ------------------------------------------------------------------------------------------------ the commands


def jobs(before: Path, work: Path) -> list[Job]:
    """What to run, in order; what BEFORE wrote in a job is in `work/before/NAME` for later ones."""
    done = work / "before"
    made, encoded = str(done / "toy shards"), str(done / "encode_shards")
    teachers = {family: str(before / "toy" / "teachers" / family) for family in ("sd", "sdxl")}
    command = partial(training, teachers, made)
    found = [
        Job("toy shards", split(f"-m toy.make_shards {OUT} --shards 2 --samples_per_shard 24 --seed 3 --varied_sizes")),
        Job(
            "encode_shards",
            [
                *("-m", "lcm_distill.encode_shards", made, OUT, "--pretrained_teacher_model", teachers["sdxl"]),
                *split("--resolution 64 --random_flip --captions --batch_size 4 --num_workers 1"),
            ],
        ),
        Job(
            "pack_shards",
            [
                *("-m", "lcm_distill.pack_shards", str(work / "images"), OUT),
                *split("--max_size 24 --samples_per_shard 4 --num_workers 1"),
            ],
        ),
    ]
    everything = (
        "--gradient_accumulation_steps 2 --lr_scheduler cosine --lr_warmup_steps 2 --random_flip --ema_decay 0.9 "
        "--keep_best --checkpointing_steps 2 --validation_steps 3 --validation_inference_steps 1 2 "
        "--proportion_empty_prompts 0.1 --report_to tensorboard "
    )
    resumed = f"{everything} --max_train_steps 6 --resume_from_checkpoint latest"
    for kind in KINDS:
        found += [
            Job(f"{kind} whole", command(kind, f"{everything} --max_train_steps 6")),
            Job(f"{kind} stopped", command(kind, f"{everything} --max_train_steps 3"), before_alone=True),
            Job(f"{kind} resumed", command(kind, resumed), begun=done / f"{kind} stopped"),
        ]
    short = "--max_train_steps 2 --validation_inference_steps 1 --report_to none"
    found += [
        Job("sdxl fixed sizes", command("sdxl", f"{short} --use_fix_crop_and_size")),
        Job(
            "lora_sdxl encoded shards",
            command("lora_sdxl", f"{short} --random_flip --proportion_empty_prompts 0.1", shards=encoded),
        ),
        Job("sd bfloat16", command("sd", f"{short} --mixed_precision bf16")),
        Job("lora_sd data workers", command("lora_sd", f"{short} --dataloader_num_workers 2 --shuffle_window 8")),
    ]
    students = {family: [str(done / f"{kind}{family} whole") for kind in ("", "lora_")] for family in teachers}
    drawing = {
        family: ["--pretrained_teacher_model", teachers[family], "--student", *students[family]] for family in teachers
    }
    found += [
        Job(
            "sample",
            [
                *("-m", "lcm_distill.sample", *drawing["sd"], "--output_dir", OUT, "--prompts", PROMPT),
                *("--lora", str(done / "lora_sd stopped") + "=0.5", "--negative_prompt", "blue"),
                *split("--seeds 3 7 --steps 1 2 --teacher_steps 2 --guidance_scale 4 --lora_guidance_scale 1 1.5"),
            ],
        ),
        Job(
            "sample, img2img",
            [
                *("-m", "lcm_distill.sample", *drawing["sdxl"], "--output_dir", OUT, "--prompts", PROMPT),
                *("--init_image", str(work / "images" / "0.png"), "--steps", "1", "--teacher_steps", "2"),
            ],
        ),
        Job(
            "evaluate",
            [
                *("-m", "lcm_distill.evaluate", *drawing["sdxl"], "--output_dir", OUT, "--real", made),
                *split("--num_pictures 4 --steps 1 2 --reference_steps 3 --metrics latents --shown 2"),
            ],
        ),
        Job(
            "bench_inference",
            [
                *("-m", "lcm_distill.bench_inference", *drawing["sd"], "--output_dir", OUT),
                *split("--steps 1 --teacher_steps 2 --batch_sizes 1 2 --repeats 1 --warmup 0"),
            ],
        ),
        Job("report", ["-m", "lcm_distill.report", OUT], begun=done / "sd resumed", only="report.html"),
    ]
    return found


def training(teachers: Mapping[str, str], made: str, kind: str, flags: str, *, shards: str | None = None) -> list[str]:
    """A program's command line."""
    return [
        f"train_lcm_distill_{kind}_wds.py",
        *("--pretrained_teacher_model", teachers[kind.removeprefix("lora_")]),
        *("--train_shards_path_or_url", shards or made, "--output_dir", OUT, "--validation_prompts", PROMPT),
        *split(
            "--resolution 64 --train_batch_size 2 --learning_rate 1e-3 --loss_type huber --seed 7 --logging_steps 1"
        ),
        *split("--num_validation_images 1 --validation_teacher_steps 2"),
        *split("--lora_rank 4" if kind.startswith("lora_") else ""),
        *split(flags),
    ]


def split(text: str) -> list[str]:
    return text.split()


def make_images(folder: Path) -> None:
    """Noise of several sizes for pack_shards, captioned by texts, by metadata, not at all; and a damaged file."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(9):
        width, height = (int(side) for side in rng.integers(16, 64, 2))
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        picture.save(folder / f"{number}.{'png' if number % 2 == 0 else 'jpg' if number % 4 == 1 else 'bmp'}")
        if number < 5 or number == 7:
            (folder / f"{number}.txt").write_text(f"picture {number}")
    rows = [{"file_name": f"{number}.{'png' if number == 6 else 'jpg'}", "text": ["a", "b"], "licence": "CC0"}
            for number in (5, 6)]  # fmt: skip
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "damaged.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "damaged.txt").write_text("half of a picture")


# ------------------------------------------------------------------------------------------------- running them


def run(job: Job, checkout: Path, work: Path, side: str, *, fresh: bool) -> bool:
    """Runs the job's command; what it wrote is in `work/SIDE/NAME`, its log beside it. Whether it ended well.

    While it runs its folder is `work/NAME` on both sides: paths are among what is written.
    """
    out, log = work / job.name, work / side / f"{job.name}.log"
    log.parent.mkdir(exist_ok=True)
    if job.begun:
        shutil.copytree(job.begun, out)
    words = [str(out) if word == OUT else word for word in job.words]
    status = (start_fresh if fresh else fork)(words, checkout, log)
    if out.exists():
        out.rename(work / side / job.name)
    if status == 0:
        return True
    print(f"FAILED     {job.name}, {side.upper()}: exit status {status} of python {shlex.join(words)}")
    print(*(f"           {line}" for line in log.read_text(errors="replace").splitlines()[-20:]), sep="\n", flush=True)
    return False


def start_fresh(words: Sequence[str], checkout: Path, log: Path) -> int:
    with open(log, "wb") as file:
        environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONHASHSEED": "0"}
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=checkout, env=environment, stdout=file, stderr=file).returncode


def fork(words: Sequence[str], checkout: Path, log: Path) -> int:
    """What `python WORDS` does in the checkout, in a fork of this process; its exit status."""
    sys.stdout.flush()
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status: Any = 1
    try:
        with open(log, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(checkout)
        os.environ["PYTHONPATH"] = str(checkout)  # for processes that it starts
        sys.path = [str(checkout), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
        importlib.invalidate_caches()
        for name in [name for name in sys.modules if name.partition(".")[0] == "lcm_distill"]:
            del sys.modules[name]  # of this checkout, for the libraries' notices
        package = importlib.import_module("lcm_distill").__file__
        if package is None or not Path(package).is_relative_to(checkout):
            raise ImportError(f"lcm_distill is {package}, not that of {checkout}")
        if words[0] == "-m":
            sys.argv = list(words[1:])
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


# ---------------------------------------------------------------------------------------------------- comparing


def read_weights(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return {"metadata": lasting(file.metadata()), **{name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118


def read_state(path: Path) -> Any:
    from accelerate.utils.other import load  # torch.load with weights_only, which knows NumPy's random state

    return load(path, map_location="cpu", weights_only=True)


def read_json(path: Path) -> Any:
    return lasting(json.loads(path.read_text(encoding="utf-8")))


def read_lines(path: Path) -> list[Any]:
    return [lasting(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def lasting(value: Any) -> Any:
    """`value` without times, dates and versions, however deep."""
    if isinstance(value, dict):
        return {name: lasting(inner) for name, inner in value.items() if name not in PASSING}
    return [lasting(inner) for inner in value] if isinstance(value, list) else value


def read_picture(path: Path) -> dict[str, Any]:
    with Image.open(path) as picture:
        return {"mode": picture.mode, "pixels": np.asarray(picture), "texts": dict(picture.info)}


def read_events(path: Path) -> dict[str, Any]:
    """The numbers and pictures of a tensorboard file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    numbers = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"] if tag not in PASSING}
    pictures = {tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)] for tag in tags["images"]}
    return {"tags": sorted([*tags["scalars"], *tags["images"]]), "numbers": numbers, "pictures": pictures}


def read_text(path: Path) -> list[str]:
    """Its lines; the flags in a model card's table are in the order of their names."""
    lines = re.sub(MINUTE, "MINUTE", path.read_text(encoding="utf-8")).splitlines()
    flags = iter(sorted(line for line in lines if line.startswith("| `--")))
    return [next(flags) if line.startswith("| `--") else line for line in lines]


def read_timings(path: Path) -> list[str]:
    """bench_inference.md without the two columns that were measured."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [re.sub(r"( [^|]+ \|){2}$", "", line) for line in lines if not line.startswith("- date:")]


def nothing(path: Path) -> None:
    """For files of which only the name is compared."""


# What is compared, and how; the first pattern that a file's path has decides.
READERS: list[tuple[str, str, Callable[[Path], Any]]] = [
    (r"\.safetensors$", "weights", read_weights),
    (r"optimizer\.bin$", "optimizers", read_state),
    (r"\.(pt|pkl)$", "the checkpoints' other state", read_state),
    (r"(^|/)training\.jsonl$", "logged values and launches", read_lines),
    (r"\.jsonl$", "manifests", read_lines),
    (r"\.png$", "pictures", read_picture),
    (r"(^|/)scheduler_config\.json$", "scheduler_config.json", read_json),
    (r"\.json$", "JSON files", read_json),
    (r"\.tar$", "shards", Path.read_bytes),
    (r"tfevents$", "tensorboard", read_events),
    (r"bench_inference\.md$", "tables", read_timings),
    (r"(^|/)report\.html$", "reports", nothing),  # a run's has its speed in its curves: `report` writes another
    (r"\.(md|yml|html|txt)$", "texts", read_text),
    (r"", "other files", Path.read_bytes),
]


def compare(job: Job, work: Path) -> tuple[int, int]:
    """Prints a line for each kind of file of the two folders; returns how many are the same, and how many differ."""
    before, after = (
        [(name, path) for name, path in listing(work / side / job.name) if job.only in (None, name)]
        for side in ("before", "after")
    )
    names = [[name for name, _ in files] for files in (before, after)]
    lines = [("list of files", f"{len(before)} files", difference(*names))]
    kinds: dict[str, list[str | None]] = {}
    ours, theirs = group(before), group(after)
    for name in sorted(ours.keys() & theirs.keys()):
        what, read = next((what, read) for pattern, what, read in READERS if re.search(pattern, name))
        if name == job.only:
            read = read_text
        for one, other in zip(ours[name], theirs[name], strict=False):
            differs = None
            if read is not nothing:
                differs = difference(read(one), read(other))
                kinds.setdefault(what, []).append(differs and f"{name}: {differs}")
    for what, found in kinds.items():
        others = [differs for differs in found if differs]
        first = f"{len(others)} of {len(found)} files, first {others[0]}" if others else None
        lines.append((what, f"{len(found)} file{'s' * (len(found) != 1)}", first))
    for what, count, differs in lines:
        print(f"DIFFERENT  {job.name}: {what}: {differs}" if differs else f"same       {job.name}: {what} ({count})")
    sys.stdout.flush()
    differing = sum(differs is not None for _, _, differs in lines)
    return len(lines) - differing, differing


def listing(folder: Path) -> list[tuple[str, Path]]:
    """(name, path) of each file below `folder`; the name has no times and process ids in it."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = re.sub(r"(?<=tfevents)\.[^/]*", "", path.relative_to(folder).as_posix())
        found.append((re.sub(r"(?<=/)\d{10}\.\d+(?=/)", "TIME", name), path))
    return sorted(found)


def group(files: Sequence[tuple[str, Path]]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for name, path in files:
        found.setdefault(name, []).append(path)
    return found


def difference(before: Any, after: Any) -> str | None:
    """What differs first, in words, between two values, lists, dictionaries, arrays or tensors; None if nothing."""
    if type(before) is not type(after):
        return f"{shortly(before)} before, {shortly(after)} after"
    if isinstance(before, Mapping):
        if missing := [name for name in before if name not in after]:
            return f"{shortly(missing[0])} is missing after"
        if further := [name for name in after if name not in before]:
            return f"{shortly(further[0])} is there after alone"
        return first_inside((name, before[name], after[name]) for name in before)
    if isinstance(before, (list, tuple)):
        rows = enumerate(zip_longest(before, after, fillvalue="(nothing)"))
        return first_inside((number, one, other) for number, (one, other) in rows)
    if isinstance(before, np.ndarray):
        return difference(torch.from_numpy(before.copy()), torch.from_numpy(after.copy()))
    if isinstance(before, torch.Tensor):
        return tensor_difference(before, after)
    if isinstance(before, bytes) and before != after:
        place = len(os.path.commonprefix([before, after]))
        return f"{len(before)} bytes before, {len(after)} after, the first others at {place}"
    same = before == after or (before != before and after != after)
    return None if same else f"{shortly(before)} before, {shortly(after)} after"


def first_inside(rows: Any) -> str | None:
    for name, one, other in rows:
        if differs := difference(one, other):
            return f"{name}: {differs}"
    return None


def tensor_difference(before: torch.Tensor, after: torch.Tensor) -> str | None:
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return f"{before.dtype} {list(before.shape)} before, {after.dtype} {list(after.shape)} after"
    bits = [tensor.reshape(-1, 1).view(torch.uint8) for tensor in (before, after)]  # a row for each number
    count = int((bits[0] != bits[1]).any(1).sum())
    apart = (before.double() - after.double()).abs()
    return f"{count} of {len(bits[0])} numbers differ, by {float(apart.max()):.3g} at most" if count else None


def shortly(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}…"


# ------------------------------------------------------------------------------------------------- command line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", metavar="BEFORE_CHECKOUT", type=Path)
    parser.add_argument("after", metavar="AFTER_CHECKOUT", type=Path, nargs="?", default=ROOT, help="default: this one")
    parser.add_argument("--work_dir", type=Path, help="keep what is written here: a new or empty folder")
    parser.add_argument("--fresh", action="store_true", help="start each command as a shell would, which is slower")
    args = parser.parse_args()
    sides = {"before": args.before.resolve(), "after": args.after.resolve()}
    for side, checkout in sides.items():
        if not (checkout / "lcm_distill" / "__init__.py").is_file():
            parser.error(f"{side.upper()}_CHECKOUT: {checkout} is no checkout of this repository")
    if args.work_dir and args.work_dir.exists() and any(args.work_dir.iterdir()):
        parser.error(f"--work_dir {args.work_dir} is not empty")
    work = args.work_dir.resolve() if args.work_dir else Path(tempfile.mkdtemp(prefix="compare_commits-"))
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if not args.fresh:
        logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)  # as the package does
        for module, names in LIBRARIES.items():
            for name in names.split():
                getattr(importlib.import_module(module), name)

    make_images(work / "images")
    same = different = 0
    failed: set[str] = set()  # jobs that BEFORE could not do
    for job in jobs(sides["before"], work):
        needed = [name for name in failed if str(work / "before" / name) in " ".join([*job.words, str(job.begun)])]
        if needed:
            print(f"NOT RUN    {job.name}: it needs what failed, {needed[0]}", flush=True)
            different += 1
            continue
        good = {
            side: run(job, checkout, work, side, fresh=args.fresh)
            for side, checkout in sides.items()
            if side == "before" or not job.before_alone
        }
        if not good["before"]:
            failed.add(job.name)
        if not all(good.values()):
            different += 1
        elif not job.before_alone:
            counts = compare(job, work)
            same, different = same + counts[0], different + counts[1]
    print(f"{same} comparisons are the same, {different} are not")
    if args.work_dir or different:
        print(f"what was written, and the logs: {work}")
    else:
        shutil.rmtree(work)
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
