"""What a device can do at most, in the shapes of a training step: a quarter of a minute on a GPU.

    python -m benchmarks.ceilings --output benchmarks/results/gpu-ceilings.json
    python -m benchmarks.ceilings --tiny                # the same measurements in shapes for a CPU

Matrix products by precision; memory bandwidth by a large copy (bytes read and written); convolutions of SD 1.5's U-Net
and of the VAE by memory format, with and without cuDNN's own search (`torch.backends.cudnn.benchmark`); attention by
head size: which kernel PyTorch chooses, the rate of its forward pass and of both passes, and that of each other kernel.
Each is printed and saved when it is measured. Rates are medians.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv2d, scaled_dot_product_attention

from benchmarks.measuring import free, keep, matrix_rate, say, wait
from benchmarks.provenance import provenance

# (batch, channels, side): 3 × 3 convolutions of SD 1.5's U-Net at batch size 16, and of a VAE that takes 4 at 512.
CONVOLUTIONS = [(16, 320, 64), (16, 640, 32), (16, 1280, 16), (4, 128, 512)]
# (batch, heads, tokens, head size): the self-attention of SD 1.5 at batch size 16 and of SDXL at 4, and the head size
# that kernels are made for.
ATTENTION = [(16, 8, 4096, 40), (4, 10, 4096, 64), (16, 8, 1024, 80), (4, 20, 1024, 64), (16, 8, 1024, 128)]
ATTENTION += [(16, 8, 256, 160)]
KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def seconds(function: Callable[[], Any], enough: float) -> float:
    """What a call of `function` takes: the median of five runs of as many calls as take `enough` seconds in all."""

    def run(calls: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        wait()
        return (time.perf_counter() - start) / calls

    run(2)
    calls = max(1, min(200, round(enough / 5 / run(1))))
    return statistics.median(run(calls) for _ in range(5))


class Ceilings:
    """Measures one after another; `result` has what is measured so far."""

    def __init__(self, tiny: bool, output: Path | None):
        self._cuda, self._tiny, self._output = torch.cuda.is_available(), tiny, output
        self._device = "cuda" if self._cuda else "cpu"
        self._dtype = torch.bfloat16 if self._cuda else torch.float32
        self._enough = 0.01 if tiny else 0.2
        self.title = torch.cuda.get_device_name() if self._cuda else "CPU"
        self.result: dict[str, Any] = provenance("benchmarks.ceilings", sys.argv[1:]) | {"rates": []}

    def add(self, what: str, rate: float, unit: str, **more: Any) -> None:
        self.result["rates"].append({"what": what, "rate": round(rate, 3), "unit": unit, **more})
        say(f"{what}: {rate:.4g} {unit}" + "".join(f", {key} {value}" for key, value in more.items()))
        if self._output:
            keep(self._output, {self.title: self.result}, table)

    def _random(self, *shape: int, **options: Any) -> torch.Tensor:
        return torch.randn(*shape, device=self._device, dtype=self._dtype, **options)

    def products(self) -> None:
        precisions = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
        for name in precisions if self._cuda else ("float32",):
            self.add(f"matrix product, {name}", matrix_rate(precisions[name]) / 1e12, "TFLOP/s")
        if self._cuda:
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = True
            self.add("matrix product, TF32", matrix_rate(torch.float32) / 1e12, "TFLOP/s")
            torch.backends.cuda.matmul.allow_tf32 = before

    def memory(self) -> None:
        source = torch.ones(2**31 if self._cuda else 2**24, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        rate = 2 * source.numel() / seconds(lambda: target.copy_(source), self._enough)
        self.add("memory, copy", rate / 1e12, "TB/s")

    def convolutions(self) -> None:
        for batch, channels, side in CONVOLUTIONS:
            if self._tiny:
                batch, channels, side = 1, channels // 16, side // 8
            flops = 2 * 9 * batch * channels**2 * side**2
            for name, layout in FORMATS.items():
                x = self._random(batch, channels, side, side).to(memory_format=layout)
                weight = self._random(channels, channels, 3, 3).to(memory_format=layout)
                for search in (False, True) if self._cuda else (False,):
                    torch.backends.cudnn.benchmark = search
                    with torch.no_grad():
                        rate = flops / seconds(lambda x=x, w=weight: conv2d(x, w, padding=1), self._enough)  # type: ignore
                    what = f"convolution, {batch} × {channels} × {side}²"
                    self.add(what, rate / 1e12, "TFLOP/s", format=name, search="on" if search else "off")

    def attention(self) -> None:
        for batch, heads, tokens, size in ATTENTION:
            if self._tiny:
                batch, tokens = 1, tokens // 16
            q, k, v, gradient = (self._random(batch, heads, tokens, size) for _ in range(4))
            flops = 4 * batch * heads * tokens**2 * size
            what = f"attention, {batch} × {heads} heads of {size}, {tokens} tokens"
            chosen = SDPBackend(torch._fused_sdp_choice(q, k, v))

            def forward(q=q, k=k, v=v):  # type: ignore
                return scaled_dot_product_attention(q, k, v)

            def both(q=q, k=k, v=v, gradient=gradient, forward=forward):  # type: ignore
                inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
                torch.autograd.grad(forward(*inputs), inputs, gradient)

            kernel = f"{chosen.name.lower()} (chosen)"
            with torch.no_grad():
                self.add(what, flops / seconds(forward, self._enough) / 1e12, "TFLOP/s", kernel=kernel)
            q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
            chosen = SDPBackend(torch._fused_sdp_choice(q, k, v))
            kernel = f"{chosen.name.lower()} (chosen)"
            rate = 3.5 * flops / seconds(both, self._enough) / 1e12
            self.add(f"{what}, forward and backward", rate, "TFLOP/s", kernel=kernel)
            for other in KERNELS if self._cuda else ():
                if other == chosen:
                    continue
                try:
                    with sdpa_kernel(other), torch.no_grad():
                        rate = flops / seconds(forward, self._enough) / 1e12
                except RuntimeError as error:
                    say(f"{what}: not with {other.name.lower()}: {str(error).partition(chr(10))[0]}")
                else:
                    self.add(what, rate, "TFLOP/s", kernel=other.name.lower())


def table(results: dict[str, Any]) -> str:
    """Markdown of everything in a results file."""
    lines = ["# Ceilings", "", "Made by `python -m benchmarks.ceilings`."]
    for title, result in results.items():
        versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        lines += ["", f"## {title}", "", f"{result['date']}, commit {result['commit'] or 'unknown'}; {versions}.", ""]
        lines += ["| what | rate | |", "|---|---|---|"]
        for row in result["rates"]:
            more = ", ".join(f"{key} {value}" for key, value in row.items() if key not in ("what", "rate", "unit"))
            lines.append(f"| {row['what']} | {row['rate']:.4g} {row['unit']} | {more} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ceilings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that everything runs")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="and a table beside it")
    args = parser.parse_args()
    ceilings = Ceilings(args.tiny, args.output)
    for measure in (ceilings.products, ceilings.memory, ceilings.attention, ceilings.convolutions):
        measure()
        free()


if __name__ == "__main__":
    main()
