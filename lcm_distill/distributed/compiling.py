"""Networks compiled by torch.compile, in place: their names on the disk, gradients and hooks stay what they were.

A network has a compiled form for each way that it is called: each shape, with and without gradients, and as a LoRA's
student, teacher and target. They are few, since a run's shapes never change.
"""

import os
import shutil
from pathlib import Path

import torch

from lcm_distill.errors import UsageError

BACKEND = "inductor"
BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")  # what U-Nets are made of, over and over


def compile_networks(mode: str | None, *networks: torch.nn.Module) -> None:
    """Has each network compiled when it is first called: its repeated blocks ("regional"), or all of it ("whole").

    None does nothing. What was compiled is kept in the user's cache folder, or where TORCHINDUCTOR_CACHE_DIR says, so
    that the next run begins quickly. `UsageError` where there is nothing to compile with.
    """
    if mode is None:
        return
    # On a GPU Triton builds its launchers in C, on a CPU everything is C++.
    gpu = torch.cuda.is_available()
    compilers = (os.environ.get("CC") or "gcc", "clang") if gpu else (os.environ.get("CXX") or "g++", "clang++")
    if not any(shutil.which(compiler) for compiler in compilers):
        raise UsageError(f"--compile needs a compiler ({compilers[0]}, or the package clang); or leave it out.")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lcm_distill" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    # By default PyTorch goes back to uncompiled code after the eighth form of a block. An SDXL network has 15 of its
    # residual blocks alone, each as student, teacher and target.
    torch._dynamo.config.recompile_limit = 128
    torch._dynamo.config.accumulated_recompile_limit = 1024
    for network in networks:
        parts = [network] if mode == "whole" else [m for m in network.modules() if type(m).__name__ in BLOCKS]
        for part in parts:
            part.compile(backend=BACKEND, dynamic=False)
