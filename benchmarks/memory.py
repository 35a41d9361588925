"""How much GPU memory does a training step take? Computed from the shapes, on any machine: nothing is allocated.

    python -m benchmarks.memory                       # the table of the README: some minutes
    python -m benchmarks.memory --program lora_sdxl --teacher sdxl --gradient_checkpointing --train_batch_size 2
    python -m benchmarks.memory --flops               # the arithmetic of a step on one picture
    python -m benchmarks.memory --check               # the method against a real step's resident memory, here

The parts that the programs are made of (`Lora`, `guided_prediction`, `update_ema`, …) run on PyTorch's fake tensors,
which have shapes and no memory, in the order of the programs' step; what each operation makes is counted from when it
is made until nothing refers to it. A GPU's autocast, which does norms in float32, is imitated, and attention keeps what
PyTorch's fused kernels keep. Not counted: the CUDA context, workspaces of kernels, gaps between tensors; leave a
gigabyte or two for them. Gigabytes are 10⁹ bytes.
"""

import argparse
import contextlib
import gc
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.architectures import RESOLUTIONS, UNETS, build_text_encoders, build_vae, is_sdxl
from benchmarks.provenance import provenance
from benchmarks.train_step import alone, flop_counter
from lcm_distill.models import unets
from lcm_distill.models.lora import Lora
from lcm_distill.models.vae import encode_pixels
from lcm_distill.objective.consistency import (
    ConsistencyFunction,
    consistency_loss,
    guided_prediction,
    unet_output,
    update_ema,
)
from lcm_distill.objective.schedule import DDIMSolver, NoiseSchedule

GB = 1e9


@dataclass(frozen=True)
class Case:
    """A program's run, as far as its memory goes; the fields are named like its flags."""

    program: str = "lora_sdxl"
    teacher: str = "sdxl"
    resolution: int = 0  # the teacher's own
    train_batch_size: int = 1
    mixed_precision: str = "bf16"
    gradient_checkpointing: bool = False
    cast_teacher_unet: bool = True
    use_8bit_adam: bool = False
    teacher_batch_size: int | None = None
    vae_encode_batch_size: int = 1
    vae_float32: bool = False  # as SDXL's own needs it; madebyollin/sdxl-vae-fp16-fix does not
    lora_rank: int = 64


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


@contextlib.contextmanager
def gpu_autocast() -> Iterator[None]:
    """Inside, autocast does norms in float32, as on GPUs; a CPU's would not."""

    def in_float32(norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapped(x: torch.Tensor, *given: Any, **options: Any) -> torch.Tensor:
            if not torch.is_autocast_enabled("cpu"):
                return norm(x, *given, **options)
            with torch.autocast("cpu", enabled=False):
                given = tuple(g.float() if isinstance(g, torch.Tensor) else g for g in given)
                return norm(x.float(), *given, **options)

        return wrapped

    functional = torch.nn.functional
    with (
        mock.patch.object(functional, "group_norm", in_float32(functional.group_norm)),
        mock.patch.object(functional, "layer_norm", in_float32(functional.layer_norm)),
    ):
        yield


def replacing(network: torch.nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """`nn.Module._apply` for fake tensors, which cannot take each other's place within a parameter."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    data = function(parameter)
                module._parameters[name] = torch.nn.Parameter(data.detach(), requires_grad=parameter.requires_grad)
        module._buffers |= {name: function(buffer) for name, buffer in module._buffers.items() if buffer is not None}
    return network


class State(torch.optim.Optimizer):
    """What a fused AdamW, or bitsandbytes' with 8-bit state, keeps; neither needs more while it works."""

    def __init__(self, parameters: list[torch.nn.Parameter], use_8bit: bool):
        super().__init__(parameters, {})
        for parameter in parameters:
            small = use_8bit and parameter.numel() >= 4096
            for name in ("exp_avg", "exp_avg_sq"):
                state = torch.zeros_like(parameter, dtype=torch.uint8 if small else torch.float32)
                self.state[parameter][name] = state, torch.zeros(parameter.numel() // 256 * small)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


def build(case: Case, begin: Callable[[str], None], device: str = "cpu") -> Callable[[], None]:
    """Builds the networks; what comes back takes a step on empty pictures, and calls `begin` with each part's name."""
    with torch.device(device):
        step = _build(case, begin, device)

    def on_device() -> None:
        with torch.device(device):
            step()

    return on_device


def _build(case: Case, begin: Callable[[str], None], device: str) -> Callable[[], None]:
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case.mixed_precision, torch.float32)
    weights = half if case.cast_teacher_unet else torch.float32
    lora: Lora | None = None
    unet = UNet2DConditionModel(**UNETS[case.teacher]).requires_grad_(False).eval()
    size = case.resolution or RESOLUTIONS[case.teacher]
    vae = build_vae(case.teacher).requires_grad_(False).eval()
    text_encoders = build_text_encoders(case.teacher)
    unets.cast(vae, torch.float32 if case.vae_float32 else half)
    for encoder in text_encoders:
        unets.cast(encoder.requires_grad_(False), half)
    target = None
    if case.program.startswith("lora"):
        unets.cast(unet, weights)
        lora, student = Lora(unet, rank=case.lora_rank, alpha=case.lora_rank), unet
        trained = lora.parameters()
    else:
        student, target = (UNet2DConditionModel(**UNETS[case.teacher], time_cond_proj_dim=256) for _ in range(2))
        target.requires_grad_(False).eval()
        unets.cast(unet, weights)
        trained = list(student.parameters())
    unets.to_channels_last(vae, unet, *([] if target is None or case.use_8bit_adam else [student, target]))
    if case.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    optimizer = State(trained, case.use_8bit_adam)
    schedule = NoiseSchedule.from_config({"beta_schedule": "scaled_linear", "num_train_timesteps": 1000}).to(device)
    solver, consistency = DDIMSolver(schedule, 50), ConsistencyFunction(schedule)
    batch, width = case.train_batch_size, UNETS[case.teacher]["cross_attention_dim"]

    def conditioning(rows: int) -> dict[str, Any]:
        given: dict[str, Any] = {"encoder_hidden_states": torch.zeros(rows, 77, width, dtype=half)}
        if is_sdxl(case.teacher):
            ids = torch.zeros(rows, 6, dtype=torch.int64)
            given["added_cond_kwargs"] = {"text_embeds": torch.zeros(rows, 1280, dtype=half), "time_ids": ids}
        return given

    def autocast(on: bool = True) -> torch.autocast:
        return torch.autocast(device, dtype=torch.bfloat16, enabled=on and half != torch.float32)

    def step() -> None:
        begin("text")
        with torch.no_grad():
            for encoder in text_encoders:
                encoder(torch.zeros(batch, 77, dtype=torch.int64), output_hidden_states=True)
        begin("VAE")
        pixels = torch.zeros(batch, 3, size, size, dtype=torch.uint8)
        latents = encode_pixels(vae, pixels, case.vae_encode_batch_size, torch.Generator(device))
        index = torch.zeros(batch, dtype=torch.int64)
        start, end = solver.timesteps[index], solver.previous_timesteps[index]
        noisy = schedule.add_noise(latents, torch.zeros_like(latents), start)
        given, w = conditioning(batch), torch.ones(batch)
        options: dict[str, Any] = {"dtype": weights}
        begin("teacher")
        with torch.no_grad(), autocast(weights == torch.float32), lora.off() if lora else contextlib.nullcontext():
            clean, epsilon = guided_prediction(
                unet, schedule, noisy, start, given, conditioning(1), w, batch_size=case.teacher_batch_size, **options
            )
        previous = solver.step(clean, epsilon, index)
        if not lora:
            options = {"timestep_cond": torch.zeros(batch, 256)}
        begin("target")
        with torch.no_grad(), autocast(), lora.target() if lora else contextlib.nullcontext():
            goal = consistency(unet_output(target or unet, previous, end, given, **options), previous, end)
        begin("student")
        with autocast():
            prediction = consistency(unet_output(student, noisy, start, given, **options), noisy, start)
        begin("backward")
        consistency_loss(prediction, goal).backward()
        begin("optimizer")
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if target is not None:
            update_ema(target.parameters(), student.parameters(), 0.95)

    return step


def compute(case: Case, autocast: Callable[[], Any] = gpu_autocast) -> dict[str, Any]:
    """Gigabytes: `rest` between steps (weights and the optimizer's state), and at most in each part of a step."""
    with FakeTensorMode(), autocast(), mock.patch.object(torch.nn.Module, "_apply", replacing), Tally() as tally:
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

    with FakeTensorMode(), mock.patch.object(torch.nn.Module, "_apply", replacing):
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
    *(replace(_SDXL, program="sdxl", gradient_checkpointing=on) for on in (False, True)),
    replace(_SDXL, program="sdxl", train_batch_size=12),
    replace(_SDXL, program="sdxl", cast_teacher_unet=False),
    replace(_SDXL, program="sdxl", use_8bit_adam=True),
    replace(_SDXL, program="sdxl", use_8bit_adam=True, train_batch_size=12),
    replace(_SDXL, program="sdxl", use_8bit_adam=True, train_batch_size=4, gradient_checkpointing=False),
    replace(_SDXL, program="sdxl", teacher="ssd1b", use_8bit_adam=True),
    *(replace(_SD, gradient_checkpointing=on) for on in (False, True)),
    *(replace(_SD, train_batch_size=12, gradient_checkpointing=on) for on in (False, True)),
    *(replace(_SD, program="sd", gradient_checkpointing=on) for on in (False, True)),
    replace(_SD, program="sd", use_8bit_adam=True),
    replace(_SD, program="sd", use_8bit_adam=True, train_batch_size=16),
    *(replace(_SD, program="sd", train_batch_size=16, gradient_checkpointing=on) for on in (False, True)),
    *(
        replace(_SD, program="sd", train_batch_size=size, use_8bit_adam=True, gradient_checkpointing=False)
        for size in (1, 16)
    ),
]
FLOPS = [replace(c, gradient_checkpointing=False) for c in (_SDXL, replace(_SDXL, program="sdxl"), _SD)]
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
        word = {True: f"--{name}", False: f"--no-{name}"}.get(value, f"--{name} {value}")
        words.append("(VAE in float32)" if name == "vae_float32" else word)
    return " ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in asdict(Case()).items():
        if isinstance(value, bool):
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(f"--{name}", type=str if isinstance(value, str) else int, default=value)
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
            told_parts = ", ".join(f"{part} {value}" for part, value in row["tflops"].items())
            print(f"{case.program}, {case.teacher}: {sum(row['tflops'].values()):.4g} TFLOP: {told_parts}", flush=True)
            continue
        if check:
            row["measured"] = alone(measure, case)
        row |= compute(case, contextlib.nullcontext if check else gpu_autocast)
        parts = ", ".join(f"{part} {size}" for part, size in row["parts"].items())
        measured = f" (measured {row['measured']})" if check else ""
        summary = f"{case.program} {describe(case)}: {row['peak']} GB{measured}; at rest {row['rest']}; {parts}"
        print(summary, flush=True)
    if output:
        earlier = json.loads(output.read_text()) if output.exists() else {}
        part = "check" if check else "flops" if flops else "table"
        output.write_text(json.dumps(earlier | {part: origin | {"rows": rows}}, indent=2) + "\n")


if __name__ == "__main__":
    main()
