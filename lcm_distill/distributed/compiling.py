"""Networks compiled with torch.compile, in place: state-dict names, gradients and hooks stay as they are.

torch.compile makes a version of a network for each way it is called: for each input shape, with and without gradients,
and as a LoRA's student, teacher and target. There are few of them, since the shapes of a run never change.
"""

import os
import shutil
from pathlib import Path

import torch

from lcm_distill.errors import UsageError

BACKEND = "inductor"
BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")  # the repeated blocks of U-Nets and VAEs, by class


def compile_networks(mode: str | None, *networks: torch.nn.Module) -> None:
    """Compiles each network on its first call: its repeated blocks ("regional") or all of it ("whole"); None: neither.

    The compiled code is cached in the user's cache folder, or in TORCHINDUCTOR_CACHE_DIR, so that the next run starts
    faster. `UsageError` if there is no C/C++ compiler.
    """
    if mode is None:
        return
    # On a GPU Triton builds its launchers with a C compiler; on a CPU everything is compiled as C++.
    gpu = torch.cuda.is_available()
    compilers = (os.environ.get("CC") or "gcc", "clang") if gpu else (os.environ.get("CXX") or "g++", "clang++")
    if not any(shutil.which(compiler) for compiler in compilers):
        raise UsageError(f"--compile needs a compiler: install {compilers[0]} or clang, or leave out --compile.")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lcm_distill" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    # By default PyTorch falls back to uncompiled code after eight versions of a block. SDXL's residual blocks need 15,
    # for each of student, teacher and target; its VAE's encoder adds eight per batch size.
    torch._dynamo.config.recompile_limit = 128
    torch._dynamo.config.accumulated_recompile_limit = 1024
    for network in networks:
        parts = [network] if mode == "whole" else [m for m in network.modules() if type(m).__name__ in BLOCKS]
        for part in parts:
            part.compile(backend=BACKEND, dynamic=False)
