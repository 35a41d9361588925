"""Plants faults in the wiring of the programs, one by one, and checks that a test finds each.

    python -m tests.miswired               # some minutes a fault, for those that are found late
    python -m tests.miswired betas filter  # those whose names contain one of these words

Each fault is put into a copy of the repository, and `tests/test_wiring.py` is run there until its first failure. Before
the faults it is run without any: nothing may be found by a test that fails anyway. Exit status 1 if a fault is missed.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Fault:
    """In every one of `files` (a glob) that has it, `pattern` (a regular expression) becomes `instead`."""

    name: str
    files: str
    pattern: str
    instead: str

    def plant(self, root: Path) -> int:
        """Puts the fault into the files below `root`; in how many."""
        planted = 0
        for path in root.glob(self.files):
            text = path.read_text()
            changed, count = re.subn(self.pattern, self.instead, text)
            if count:
                path.write_text(changed)
                planted += 1
        return planted


PROGRAMS = "train_lcm_distill_*_wds.py"
FAULTS = (
    Fault(
        "AdamW's betas swapped",
        "lcm_distill/run/optim.py",
        r"\(flags\.adam_beta1, flags\.adam_beta2\)",
        "(flags.adam_beta2, flags.adam_beta1)",
    ),
    Fault("weight decay × 0", "lcm_distill/run/optim.py", r"=flags\.adam_weight_decay", "=0 * flags.adam_weight_decay"),
    Fault("ε × 1000", "lcm_distill/run/optim.py", r"=flags\.adam_epsilon", "=1000 * flags.adam_epsilon"),
    Fault("clipping × 1e6", PROGRAMS, r"args\.optimization\.max_grad_norm", "1e6 * args.optimization.max_grad_norm"),
    Fault(
        "max_bad_fraction 1",
        "lcm_distill/data/loader.py",
        r"max_bad_fraction=flags\.max_bad_fraction",
        "max_bad_fraction=1.0",
    ),
    Fault(
        "min_image_size 0",
        "lcm_distill/data/preparation.py",
        r"min_image_size=flags\.min_image_size",
        "min_image_size=0",
    ),
    Fault("--filter ignored", "lcm_distill/data/preparation.py", r"(parse_filters\(\s*)flags\.filter", r"\1None"),
    Fault(
        "--resampled_shards ignored",
        "lcm_distill/data/loader.py",
        r"resampled=flags\.resampled_shards",
        "resampled=False",
    ),
    Fault(
        "a resume takes the checkpoint's hyperparameters",
        "lcm_distill/run/run.py",
        r"with keeping_hyperparameters\(optimizer, lr_scheduler\):",
        "if True:",
    ),
    Fault(
        "the LoRA's teacher guided by nothing in validation",
        "train_lcm_distill_lora_*_wds.py",
        r"teacher_guidance_scale=1 \+ \(w_min \+ w_max\) / 2",
        "teacher_guidance_scale=1.0",
    ),
    Fault(
        "the weights of the two losses swapped",
        PROGRAMS,
        r"dm_consistency_weight \* loss \+ args\.matching\.dm_weight",
        "dm_weight * loss + args.matching.dm_consistency_weight",
    ),
    Fault(
        "--dm_guidance_w ignored",
        "lcm_distill/run/matching.py",
        r"w if flags\.dm_guidance_w is None else flags\.dm_guidance_w",
        "w",
    ),
    Fault(
        "the fake score is trained where the scores are compared",
        "lcm_distill/run/matching.py",
        r"draw_timesteps\(0, 1, ",
        "draw_timesteps(*self._flags.dm_timesteps, ",
    ),
)


def copy_repository(folder: Path) -> None:
    """The files that git knows or would add, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def failing_test(folder: Path) -> str | None:
    """The first test of the wiring that fails in a copy of the repository; None if all pass."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_wiring.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode and not found:
        raise SystemExit(f"the tests did not run:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return found[1] if found else None


def main(words: list[str]) -> int:
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    missed = 0
    with tempfile.TemporaryDirectory() as work:
        clean = Path(work) / "clean"
        copy_repository(clean)
        if failed := failing_test(clean):
            print(f"without any fault {failed} fails: nothing can be learnt")
            return 1
        for number, fault in enumerate(chosen):
            folder = Path(work) / str(number)
            copy_repository(folder)
            if not fault.plant(folder):
                print(f"{fault.name}: not planted, its place has changed", flush=True)
                missed += 1
                continue
            failed = failing_test(folder)
            missed += failed is None
            print(f"{fault.name}: {f'caught by {failed}' if failed else 'MISSED'}", flush=True)
            shutil.rmtree(folder)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
