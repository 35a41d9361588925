"""The golden curves: what each program logs in its first eight steps on the toy, kept in tests/golden/.

    python -m tests.golden_curves       # writes them anew, after a change that is meant to change numbers

A change without numerical intent must keep them (`tests/test_golden.py`).
"""

import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).parent / "golden"
KINDS = ("sd", "sdxl", "lora_sd", "lora_sdxl")
VALUES = ("loss", "grad_norm", "lr")


def command_line(kind: str, shards: str, output_dir: str) -> list[str]:
    """Eight steps of batches of two from seed 7, huber loss, learning rate 1e-3, an averaged target."""
    return [
        *("--pretrained_teacher_model", str(ROOT / "toy" / "teachers" / kind.removeprefix("lora_"))),
        *("--train_shards_path_or_url", shards, "--output_dir", output_dir, "--max_train_steps", "8"),
        *("--validation_prompts", "a small red circle on a black background"),
        *"--resolution 64 --train_batch_size 2 --checkpointing_steps 1000 --validation_steps 1000".split(),
        *"--num_validation_images 1 --validation_inference_steps 1 --validation_teacher_steps 2".split(),
        *"--logging_steps 1 --report_to none --seed 7".split(),
        *"--learning_rate 1e-3 --loss_type huber --ema_decay 0.9".split(),
        *("--lora_rank 4 --lora_alpha 64".split() if kind.startswith("lora_") else ()),
    ]


def read_curve(journal: Path) -> list[dict[str, float]]:
    """A row for each step of a training.jsonl."""
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    return [{name: line[name] for name in ("step", *VALUES)} for line in lines if "loss" in line]


def main() -> None:
    from toy.make_shards import make_shards

    if len(sys.argv) > 1:  # one program, in a process of its own
        kind, shards, output_dir = sys.argv[1:]
        importlib.import_module(f"train_lcm_distill_{kind}_wds").main(command_line(kind, shards, output_dir))
        return
    with tempfile.TemporaryDirectory() as work:
        make_shards(Path(work, "shards"), shards=2, samples_per_shard=24, seed=3)
        for kind in KINDS:
            command = [sys.executable, "-m", "tests.golden_curves", kind, f"{work}/shards", f"{work}/{kind}"]
            subprocess.run(["env", "OMP_NUM_THREADS=1", *command], cwd=ROOT, check=True)
            rows = ",\n".join(f"  {json.dumps(row)}" for row in read_curve(Path(work, kind, "training.jsonl")))
            (FOLDER / f"{kind}.json").write_text(f"[\n{rows}\n]\n")


if __name__ == "__main__":
    main()
