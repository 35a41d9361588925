"""How much GPU memory does a training step take? Computed from the shapes, on any machine: nothing is allocated.

    python -m benchmarks.memory                       # the tables of docs/reference.md: up to half an hour
    python -m benchmarks.memory --program lora_sdxl --teacher sdxl --gradient_checkpointing --train_batch_size 2
    python -m benchmarks.memory --flops               # the arithmetic of a step on one picture
    python -m benchmarks.memory --check               # the method against a real step's resident memory, here

The parts that the programs are made of (`Lora`, `guided_prediction`, `update_ema`, …) run on PyTorch's fake tensors,
which have shapes and no memory, in the order of the programs' step; what each operation makes is counted from when it
is made until nothing refers to it. Attention keeps what PyTorch's fused kernels keep. Not counted: the CUDA context,
workspaces of kernels, gaps between tensors; leave a gigabyte or two for them. Gigabytes are 10⁹ bytes.
"""

import argparse
import gc
import json
import sys
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.fake_step import Case, add_flags, build, fake_networks
from benchmarks.measuring import alone, flop_counter, write
from benchmarks.provenance import provenance

GB = 1e9


class Tally(TorchDispatchMode):
    """Bytes of the tensors made inside: `now`, and at most in each part of the step, `peaks`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peaks: dict[str, int] = {}
        self._part = ""
        self._known: set[int] = set()

    def begin(self, part: str) -> None:
        self._part = part
        self.peaks[part] = self.now

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peaks[self._part] = max(self.peaks.get(self._part, 0), self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def compute(case: Case) -> dict[str, Any]:
    """Gigabytes: `rest` between steps (weights and the optimizer's state), and at most in each part of a step."""
    with fake_networks(), Tally() as tally:
        step = build(case, tally.begin)
        rest = tally.now
        tally.peaks.clear()
        step()
    parts = {part: round(size / GB, 2) for part, size in tally.peaks.items()}
    return {"peak": max(parts.values()), "rest": round(rest / GB, 2), "parts": parts}


def count_flops(case: Case) -> dict[str, float]:
    """TFLOP of each part of a step, by the same fake networks."""
    counter, totals = flop_counter(), dict[str, int]()

    def begin(part: str) -> None:
        totals[part] = counter.get_total_flops()

    with fake_networks():
        step = build(case, begin)
        with counter:
            step()
    names, ends = list(totals), [*totals.values(), counter.get_total_flops()]
    return {name: round((ends[i + 1] - ends[i]) / 1e12, 4) for i, name in enumerate(names) if name != "optimizer"}


def measure(case: Case) -> float:
    """Gigabytes that a real step takes at most on this machine's CPU, what was there before aside. Linux."""
    before = psutil.Process().memory_info().rss
    step = build(case, lambda part: None)
    step()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the greatest size so far
    step()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round((int(line.split()[1]) * 1024 - before) / GB, 2)


_SDXL = Case("lora_sdxl", "sdxl", gradient_checkpointing=True)
_SD = Case("lora_sd", "sd15", gradient_checkpointing=True)
TABLE = [
    *(replace(_SDXL, gradient_checkpointing=on) for on in (False, True)),
    replace(_SDXL, use_8bit_adam=True),
    replace(_SDXL, use_8bit_adam=True, cast_teacher_unet=False),
    *(replace(_SDXL, train_batch_size=8, vae_float32=True, vae_encode_batch_size=size) for size in (1, 8)),
    *(replace(_SDXL, train_batch_size=size) for size in (4, 12)),
    *(replace(_SDXL, train_batch_size=size, gradient_checkpointing=False) for size in (4, 6)),
    replace(_SDXL, train_batch_size=12, use_8bit_adam=True),
    replace(_SDXL, train_batch_size=12, teacher_batch_size=8),
    *(replace(_SDXL, train_batch_size=size, dm_steps=1) for size in (1, 4, 8)),
    replace(_SDXL, train_batch_size=4, dm_steps=1, gradient_checkpointing=False),
    *(replace(_SDXL, program="sdxl", gradient_checkpointing=on) for on in (False, True)),
    replace(_SDXL, program="sdxl", train_batch_size=12),
    replace(_SDXL, program="sdxl", cast_teacher_unet=False),
    replace(_SDXL, program="sdxl", use_8bit_adam=True),
    replace(_SDXL, program="sdxl", use_8bit_adam=True, train_batch_size=12),
    replace(_SDXL, program="sdxl", use_8bit_adam=True, train_batch_size=4, gradient_checkpointing=False),
    replace(_SDXL, program="sdxl", use_8bit_adam=True, dm_steps=1),
    replace(_SDXL, program="sdxl", teacher="ssd1b", use_8bit_adam=True),
    *(replace(_SD, gradient_checkpointing=on) for on in (False, True)),
    *(replace(_SD, train_batch_size=12, gradient_checkpointing=on) for on in (False, True)),
    *(replace(_SD, program="sd", gradient_checkpointing=on) for on in (False, True)),
    replace(_SD, program="sd", use_8bit_adam=True),
    replace(_SD, program="sd", use_8bit_adam=True, train_batch_size=16),
    replace(_SD, program="sd", use_8bit_adam=True, train_batch_size=16, dm_steps=1),
    *(replace(_SD, program="sd", train_batch_size=16, gradient_checkpointing=on) for on in (False, True)),
    *(
        replace(_SD, program="sd", train_batch_size=size, use_8bit_adam=True, gradient_checkpointing=False)
        for size in (1, 16)
    ),
]
FLOPS = [replace(c, gradient_checkpointing=False) for c in (_SDXL, replace(_SDXL, program="sdxl"), _SD)]
FLOPS += [replace(FLOPS[0], dm_steps=1)]
FLOPS += [replace(FLOPS[1], teacher="ssd1b"), replace(FLOPS[2], program="sd")]
CHECKED = [  # in float32, and small enough to be taken for real
    Case("lora_sd", "half", 256, mixed_precision="no", train_batch_size=2),
    Case("lora_sd", "half", 256, mixed_precision="no", train_batch_size=2, gradient_checkpointing=True),
    Case("sd", "half", 256, mixed_precision="no", train_batch_size=2),
]


def describe(case: Case) -> str:
    """What differs from the defaults, as flags."""
    plain, words = asdict(Case()), []
    for name, value in asdict(case).items():
        if name in ("program", "teacher", "resolution", "mixed_precision") or value == plain[name]:
            continue
        word = (f"--{name}" if value else f"--no-{name}") if isinstance(value, bool) else f"--{name} {value}"
        words.append("(VAE in float32)" if name == "vae_float32" else word)
    return " ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, Case())
    parser.add_argument("--check", action="store_true", help="compare with real steps on the CPU")
    parser.add_argument("--flops", action="store_true", help="count FLOPs instead")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = vars(parser.parse_args())
    check, output, flops = args.pop("check"), args.pop("output"), args.pop("flops")
    chosen, origin = Case(**args), provenance("benchmarks.memory", sys.argv[1:])
    rows: list[dict[str, Any]] = []
    for case in CHECKED if check else [chosen] if chosen != Case() else FLOPS if flops else TABLE:
        row: dict[str, Any] = {"case": asdict(case)}
        rows.append(row)
        if flops:
            row["tflops"] = count_flops(case)
            parts = ", ".join(f"{part} {value}" for part, value in row["tflops"].items())
            print(f"{case.program}, {case.teacher}: {sum(row['tflops'].values()):.4g} TFLOP: {parts}", flush=True)
            continue
        if check:
            row["measured"] = alone(measure, case)
        row |= compute(case)
        parts = ", ".join(f"{part} {size}" for part, size in row["parts"].items())
        measured = f" (measured {row['measured']})" if check else ""
        summary = f"{case.program} {describe(case)}: {row['peak']} GB{measured}; at rest {row['rest']}; {parts}"
        print(summary, flush=True)
    if output:
        earlier = json.loads(output.read_text()) if output.exists() else {}
        part = "check" if check else "flops" if flops else "table"
        write(output, json.dumps(earlier | {part: origin | {"rows": rows}}, indent=2) + "\n")


if __name__ == "__main__":
    main()
