"""Does a program run on the real architecture? SD 1.5 with random weights, a few steps, wherever you are.

    python -m benchmarks.real_size_run                       # LoRA, 256 pixels, 2 steps, bf16: fits a CPU with 16 GB
    python -m benchmarks.real_size_run --program sd --resolution 512 --steps 10 --train_batch_size 4   # on a GPU

Writes a Stable Diffusion 1.5 pipeline of the published shapes (860 M parameters in the U-Net), drawn at random, into a
temporary folder, runs the program on toy shards through `accelerate launch` as a user would, and prints a JSON line
with the time and the most main memory that a process took. Pictures and losses mean nothing here.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.architectures import write_teacher
from benchmarks.measuring import alone
from lcm_distill.environment import versions
from toy.make_shards import make_shards

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", choices=["sd", "lora_sd"], default="lora_sd")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--train_batch_size", type=int, default=1)
    parser.add_argument("--mixed_precision", default="bf16", choices=["no", "fp16", "bf16"])
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="keep the line there too")
    args, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print("writing a random teacher of the real size", flush=True)
        alone(write_teacher, "sd15", folder / "teacher")  # what it takes of a GPU goes with the process
        make_shards(folder / "shards", shards=1, samples_per_shard=16, resolution=args.resolution)
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"),
            *("--mixed_precision", args.mixed_precision, "--dynamo_backend", "no"),
            *(() if torch.cuda.is_available() else ("--cpu",)),
            str(ROOT / f"train_lcm_distill_{args.program}_wds.py"),
            *("--pretrained_teacher_model", str(folder / "teacher")),
            *("--train_shards_path_or_url", str(folder / "shards"), "--output_dir", str(folder / "out")),
            *("--resolution", str(args.resolution), "--max_train_steps", str(args.steps), "--logging_steps", "1"),
            *("--train_batch_size", str(args.train_batch_size), "--mixed_precision", args.mixed_precision),
            *("--num_validation_images", "1", "--validation_inference_steps", "1", "--validation_prompts", "a circle"),
            *("--seed", "0", "--report_to", "none", *more),
        ]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
        written = sorted(path.name for path in (folder / "out").iterdir())
    result = {
        "program": args.program,
        "resolution": args.resolution,
        "steps": args.steps,
        "train_batch_size": args.train_batch_size,
        "mixed_precision": args.mixed_precision,
        "flags": more,
        "seconds": round(seconds),
        "peak_main_memory_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 1),  # Linux: KiB
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "written": written,
        "versions": versions(),
    }
    print(json.dumps(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
