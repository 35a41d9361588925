"""The whole story on a laptop: shards, a distillation of the toy SD teacher, the comparison.

    make demo          or: python -m toy.demo

Draws a few thousand captioned pictures as WebDataset shards, runs `train_lcm_distill_sd_wds.py` on them through
`accelerate launch` as a user would, then draws teacher, untrained control and student side by side. Everything
lands in runs/demo: `comparison.png`, `comparison.md` and the model, in `lcm/`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from toy import compare
from toy.make_shards import make_shards

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of the distillation")
    parser.add_argument("--count", type=int, default=192, help="pictures in each row of the comparison")
    args = parser.parse_args(argv)
    started = time.perf_counter()

    if args.output_dir.exists():
        shutil.rmtree(args.output_dir)
    shards = args.output_dir / "shards"
    model = args.output_dir / "lcm"
    print("1/3 drawing captioned pictures into shards", flush=True)
    make_shards(shards, shards=8, samples_per_shard=512, seed=0)

    print(f"2/3 distilling the toy teacher: {args.steps} steps", flush=True)
    threads = str(os.cpu_count() or 1)
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", threads),
        str(ROOT / "train_lcm_distill_sd_wds.py"),
        *("--pretrained_teacher_model", str(compare.TEACHER)),
        *("--train_shards_path_or_url", str(shards)),
        *("--output_dir", str(model)),
        *("--resolution", "64", "--train_batch_size", "32", "--max_train_steps", str(args.steps)),
        *("--w_min", "1", "--w_max", "5"),
        *("--learning_rate", "5e-4", "--lr_scheduler", "cosine", "--lr_warmup_steps", "20"),
        *("--loss_type", "huber", "--huber_c", "0.01", "--adam_weight_decay", "0"),
        *("--num_validation_images", "2", "--validation_steps", "100", "--checkpointing_steps", "1000"),
        *("--seed", "0", "--report_to", "tensorboard"),
    ]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": threads})

    print(f"3/3 drawing the comparison, {args.count} pictures a row", flush=True)
    compare.main(["--student", str(model), "--output_dir", str(args.output_dir), "--count", str(args.count)])
    print(f"{time.perf_counter() - started:.0f} s in all; the model is in {model}")


if __name__ == "__main__":
    main()
