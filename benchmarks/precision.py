"""Does the precision of the passes without gradients, or of the norms, change what a distillation reaches?

    python -m benchmarks.precision --output benchmarks/results/precision.json        # some hours of one core
    python -m benchmarks.precision --programs lora_sd --variants bf16 fp16 --seeds 0

Each variant distils a toy teacher with the program's own `main` for `--steps` steps, seed by seed, then generates
pictures. Teacher and target compute in the precision that the variant names, the student in bf16; group norms of
student and target are in float32. In "float32 norms" layer norms are, too, as autocast has them on GPUs; "before" is
that with PEFT's own LoRA layers. In "group norms too" all norms are in bf16; in "rounded statistics" group norms also
round mean and deviation, as CUDA's do in older PyTorch. Since a CPU lacks half of these precisions, passes without
gradients are emulated: weights, and what every operation of PyTorch returns, are rounded, the arithmetic inside is
float32, as it is in a GPU's kernels. The student runs under the CPU's own bf16 autocast.

For each run: the mean loss of the last fifty steps, the distance to the teacher's pictures in latents that validation
measures, and caption accuracy at 1, 2 and 4 steps.
"""

import argparse
import contextlib
import importlib
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers.models.embeddings import Timesteps
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from benchmarks.assess import assess
from benchmarks.measuring import alone, write
from benchmarks.provenance import provenance
from lcm_distill.models import lora, norms
from lcm_distill.objective import consistency
from toy.compare import TEACHERS
from toy.make_shards import make_shards
from toy.recipes import RECIPES

STEPS = (1, 2, 4)
_NORMS = (functional.group_norm, functional.layer_norm)
# The precision that is emulated in passes without gradients, and what is special.
VARIANTS: dict[str, dict[str, Any]] = {
    "before": {"dtype": torch.bfloat16, "float32": _NORMS},
    "float32 norms": {"dtype": torch.bfloat16, "float32": _NORMS},
    "bf16": {"dtype": torch.bfloat16},
    "group norms too": {"dtype": torch.bfloat16, "float32": ()},
    "rounded statistics": {"dtype": torch.bfloat16, "float32": (), "rounded_statistics": True},
    "fp16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
}


class Rounded(TorchFunctionMode):
    """Inside, PyTorch's functions take weights, and return values, rounded to `dtype`, in float32 tensors.

    The functions in `float32` are left as they are; with `rounded_statistics` group norms round mean and deviation.
    """

    def __init__(self, dtype: torch.dtype, *, float32: tuple[Any, ...], rounded_statistics: bool):
        super().__init__()
        self._dtype, self._float32, self._rounded_statistics = dtype, float32, rounded_statistics

    def round(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rounded values; `tensor` itself if they are its own, since it may be a view that is written to."""
        if tensor.dtype != torch.float32 or self._dtype == torch.float32:
            return tensor
        with torch._C.DisableTorchFunction():
            rounded = tensor.to(self._dtype).float()
            return tensor if torch.equal(rounded, tensor) else rounded

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if function in self._float32:
            return function(*args, **kwargs)
        args = tuple(self.round(value) if isinstance(value, torch.nn.Parameter) else value for value in args)
        if function is functional.group_norm and self._rounded_statistics:
            return self.round(self._group_norm(*args, **kwargs))
        result = function(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            rounded = self.round(result)
            in_place = getattr(function, "__name__", "").endswith("_") and rounded is not result
            return result.copy_(rounded) if in_place else rounded
        return tree_map_only(torch.Tensor, self.round, result)

    def _group_norm(self, x, groups, weight, bias, eps):  # type: ignore[no-untyped-def]
        with torch._C.DisableTorchFunction():
            grouped = x.reshape(len(x), groups, -1)
            variance, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
            scale, mean = self.round((variance + eps).rsqrt()), self.round(mean)
            normal = ((grouped - mean) * scale).reshape(x.shape)
            shape = (1, -1, *[1] * (x.dim() - 2))
            return normal * weight.view(shape) + bias.view(shape)


@contextlib.contextmanager
def rounding(
    dtype: torch.dtype, *, float32: tuple[Any, ...] = (functional.group_norm,), rounded_statistics: bool = False
) -> Iterator[None]:
    """Inside, U-Nets without gradients compute in `dtype`, but for sines of timesteps and the target's `float32`."""
    output, guided, embed = consistency.unet_output, consistency.guided_prediction, Timesteps.forward
    in_teacher: list[bool] = []  # the teacher, in half precision without autocast, always had its norms there too

    def guided_prediction(*given: Any, **options: Any) -> Any:
        in_teacher.append(True)
        try:
            return guided(*given, **options)
        finally:
            in_teacher.pop()

    def unet_output(unet: Any, *given: Any, **options: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            return output(unet, *given, **options)
        mode = Rounded(dtype, float32=() if in_teacher else float32, rounded_statistics=rounded_statistics)
        given, options = tree_map_only(torch.Tensor, mode.round, (given, options))
        with torch.autocast("cpu", enabled=False), mode:
            return output(unet, *given, **options | {"dtype": torch.float32})

    def in_float32(self: Timesteps, timesteps: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            return embed(self, timesteps)

    with (
        mock.patch.object(consistency, "unet_output", unet_output),
        mock.patch.object(consistency, "guided_prediction", guided_prediction),
        mock.patch.object(Timesteps, "forward", in_float32),
    ):
        yield


def distil(
    program: str, variant: str, seed: int, steps: int, batch: int, shards: Path, output: Path
) -> dict[str, float]:
    """One run; its loss at the end, and the distance of its pictures to the teacher's."""
    options = VARIANTS[variant]
    argv = [
        *("--pretrained_teacher_model", str(TEACHERS["sdxl" if "sdxl" in program else "sd"])),
        *("--train_shards_path_or_url", str(shards), "--output_dir", str(output), "--seed", str(seed)),
        *replace(RECIPES["plain"][0], steps=steps).argv(program),
        *("--train_batch_size", str(batch)),
        *("--num_validation_images", "4", "--validation_steps", str(steps)),
        *("--logging_steps", "1", "--report_to", "none", "--mixed_precision", "bf16", "--no-cast_teacher_unet"),
        *(["--float32_norms"] if options.get("float32") == _NORMS else []),
    ]
    low = (norms.Norm,) if options.get("float32") == () else norms.LOW_PRECISION
    with (
        mock.patch.object(lora, "LAYERS", {} if variant == "before" else lora.LAYERS),
        mock.patch.object(norms, "LOW_PRECISION", low),
        rounding(**options),
    ):
        importlib.import_module(f"train_lcm_distill_{program}_wds").main(argv)
    lines = [json.loads(line) for line in (output / "training.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    (distance,) = (line["distance/student"] for line in lines if "distance/student" in line)
    return {"loss": statistics.mean(losses[-50:]), "distance": distance}


def summary(runs: list[dict[str, Any]]) -> str:
    """A Markdown table: mean and spread over the seeds of each program and variant."""
    names = ["loss", "distance", *(f"accuracy at {steps}" for steps in STEPS)]
    lines = ["| program, variant | seeds | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for key in dict.fromkeys((run["program"], run["variant"]) for run in runs):
        own = [run for run in runs if (run["program"], run["variant"]) == key]
        cells = []
        for name in names:
            values = [run[name] for run in own]
            cells.append(f"{statistics.mean(values):.4g} ({min(values):.4g} to {max(values):.4g})")
        lines.append(f"| {', '.join(key)} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", nargs="+", default=["sd", "lora_sd"], help="(sd lora_sd)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="(all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--steps", type=int, default=300, help="(300)")
    parser.add_argument("--batch", type=int, default=32, help="(32)")
    parser.add_argument("--count", type=int, default=256, help="pictures for each caption accuracy (256)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/precision"), help="of shards and students (runs/precision)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    result = provenance("benchmarks.precision", sys.argv[1:]) | {"runs": []}
    shards = args.folder / "shards"
    if not shards.exists():
        make_shards(shards, shards=8, samples_per_shard=512, seed=0)
    for seed in args.seeds:  # a first seed of everything comes first
        for program in args.programs:
            for variant in args.variants:
                output = args.folder / f"{program}-{variant}-{seed}".replace(" ", "_")
                run = {"program": program, "variant": variant, "seed": seed}
                run |= alone(distil, program, variant, seed, args.steps, args.batch, shards, output)
                (metrics,) = alone(assess, program, [str(output)], args.count, STEPS)
                run |= {f"accuracy at {steps}": values["caption_accuracy"] for steps, values in metrics.items()}
                result["runs"].append(run)
                print(json.dumps(run), flush=True)
                if args.output:
                    write(args.output, json.dumps(result, indent=2) + "\n")
    print(summary(result["runs"]))


if __name__ == "__main__":
    main()
