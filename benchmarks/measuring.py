"""What the benchmarks share: the time since the start, a device's clock, memory and matrix rate, a count of FLOPs,
processes of their own, results that are kept whatever ends the process."""

import gc
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def elapsed() -> float:
    """Seconds since this process began, or since BENCHMARK_STARTED (in seconds since 1970): a script around it did."""
    return time.time() - float(os.environ.get("BENCHMARK_STARTED") or psutil.Process().create_time())


def say(text: str) -> None:
    """Prints `text` after the seconds since the start: the time that a measurement leaves to the next is in view."""
    print(f"[{elapsed():3.0f} s] {text}", flush=True)


def write(file: Path, text: str) -> None:
    """Writes a file whole or not at all: who kills the process finds the old one or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(file)


def keep(output: Path, results: dict[str, Any], table: Callable[[dict[str, Any]], str]) -> None:
    """Puts `results` by their titles into the JSON file, and all that is in it as a table into the .md beside it."""
    everything = (json.loads(output.read_text()) if output.exists() else {}) | results
    write(output, json.dumps(everything, indent=2) + "\n")
    write(output.with_suffix(".md"), table(everything))


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    """Gives back the memory of what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_LINUX = sys.platform == "linux"
PEAK_OF = (
    "tensors on the GPU in the timed steps"
    if torch.cuda.is_available()
    else "the process in the timed steps"
    if _LINUX
    else "the process since its start"
)


def forget_peak() -> None:
    """Starts `peak_memory` anew, where the system can (not on macOS without a GPU)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _LINUX:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes, the most of what `PEAK_OF` says, since `forget_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if _LINUX:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large square product in `dtype`, the median of many."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Processors without bf16 products emulate them: one of 2048 takes them half a minute.
    size = 8192 if device == "cuda" else 2048 if dtype == torch.float32 else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < (40 if device == "cuda" else 8) and (len(seconds) < 4 or sum(seconds) < 10):
        wait()
        start = time.perf_counter()
        a @ b
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:])


def flop_counter() -> FlopCounterMode:
    """Counts products, convolutions and attention; also those that PyTorch's list of them lacks: the CPU's fused
    attention, and products that are added to a tensor in place."""

    def attention(query, key, *rest, out_shape=None, **options):  # type: ignore
        (*batch, heads, q, dim), k = query, key[-2]
        return 4 * torch.Size(batch).numel() * heads * q * k * dim

    def attention_backward(grad, query, key, *rest, out_shape=None, **options):  # type: ignore
        return 5 * attention(query, key) // 2  # two products again, of which one is recomputed, and three new ones

    def product(into, a, b, *rest, out_shape=None, **options):  # type: ignore
        return 2 * torch.Size(a).numel() * b[-1]

    names = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            names.addmm_: product,
            names.baddbmm_: product,
            names._scaled_dot_product_flash_attention_for_cpu: attention,
            names._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        },
    )


def alone(function: Callable[..., Any], *given: Any, start: str | None = None) -> Any:
    """What `function` returns, in a process of its own; `RuntimeError` with its message if it fails.

    A fork imports nothing twice, but cannot use a GPU that a library has looked at before, nor PyTorch's threads if
    this process has used them: then `start` has to be "spawn", as it is where there is a GPU.
    """
    context: Any = multiprocessing.get_context(start or ("spawn" if torch.cuda.is_available() else "fork"))
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("w+") as said:
        process = context.Process(target=_send, args=(theirs, said.name, function, given))
        process.start()
        theirs.close()
        try:
            good, result = ours.recv()
        except EOFError:
            good, result = False, "it ended without a message: killed, perhaps for its memory"
        process.join()
        if not good:
            print(said.read(), file=sys.stderr)
            raise RuntimeError(result)
    return result


def _send(connection: Connection, said: str, function: Callable[..., Any], given: tuple[Any, ...]) -> None:
    with open(said, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        connection.send((True, function(*given)))
    except BaseException as error:
        traceback.print_exc()
        connection.send((False, f"{type(error).__name__}: {error}"))
    connection.close()
    os._exit(0)  # a program that was left in the middle has threads and workers, which would be waited for
