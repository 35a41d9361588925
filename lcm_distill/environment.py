"""The environment of a program: devices, package versions, writable folders, the libraries' messages."""

import contextlib
import itertools
import logging
import os
import platform
import stat
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from lcm_distill.errors import UsageError

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "torchdata")


def versions() -> dict[str, str]:
    """Python's version and those of the packages that a run depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def check_writable(output_dir: str) -> None:
    """`UsageError` unless files can be written into `output_dir`, or, if it does not exist, where it would be created.

    It is not created: a run that is refused for another reason leaves no empty folder.
    """
    try:
        path = Path(output_dir).absolute()
        existing = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UsageError(f"--output_dir {output_dir} cannot be written to ({error}); give another folder.") from None


def respect_umask(*paths: Path) -> None:
    """Gives files, and those in folders, the permissions that new files have: those that the umask leaves.

    safetensors makes files that only their owner may read, whatever the umask. Whoever writes some calls this, with
    what they wrote, itself or through Diffusers or PEFT. Other files keep theirs, and links are not followed.
    """
    for path in paths:
        files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
        files = [file for file in files if file.is_file() and not file.is_symlink()]
        if files:
            mode = _mode_of_new_files(files[0].parent)
            for file in files:
                file.chmod(mode)


def _mode_of_new_files(folder: Path) -> int:
    """That of a file which is made there and removed: the umask itself cannot be read without setting it."""
    for number in itertools.count():
        probe = folder / f".permissions-{os.getpid()}-{number}"
        try:
            descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue
        try:
            return stat.S_IMODE(os.fstat(descriptor).st_mode)
        finally:
            os.close(descriptor)
            probe.unlink()
    raise AssertionError


def choose_device(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of a finished model: `--device` and `--dtype`, or for None the best available.

    That is CUDA, else MPS, else the CPU; "fp16" on a GPU, "fp32" on a CPU. `UsageError` for a device or dtype that this
    machine does not have.
    """
    available = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()] + ["cpu"]
    try:
        chosen = torch.device(device or available[0])
    except RuntimeError:
        raise UsageError(f"--device {device} is not a device; available: {', '.join(available)}.") from None
    if chosen.type not in available:
        raise UsageError(
            f"--device {device}: PyTorch {torch.__version__} finds none; available: {', '.join(available)}."
        )
    if chosen.type == "cuda" and chosen.index is not None and chosen.index >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: the last GPU is cuda:{torch.cuda.device_count() - 1}.")
    if chosen.type == "cpu" and dtype == "fp16":
        raise UsageError("--dtype fp16 needs a GPU; on the CPU use fp32 or bf16.")
    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    return chosen, names[dtype or ("fp32" if chosen.type == "cpu" else "fp16")]


def device_name(device: torch.device) -> str:
    """A GPU's name, or "cpu" and the processor's name (which `platform.processor` does not have on Linux)."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{device.type}, {names[0] if names else platform.processor() or platform.machine()}"


def quiet_libraries() -> None:
    """For commands: silences the libraries' progress bars and the warnings that a user can do nothing about."""
    disable_progress_bar()  # transformers shows one for each network that it loads
    for name in ("configuration_utils", "loaders.lora_base", "loaders.peft"):
        logging.getLogger(f"diffusers.{name}").addFilter(_is_relevant)


@contextlib.contextmanager
def refused_lora() -> Iterator[None]:
    """Inside, Diffusers does not log the tensors of a LoRA that do not fit, hundreds of lines: it also raises them."""
    library = logging.getLogger("diffusers.loaders.peft")
    library.addFilter(_is_no_refusal)
    try:
        yield
    finally:
        library.removeFilter(_is_no_refusal)


def _is_no_refusal(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not (message.startswith("Loading ") and "was unsuccessful" in message)


def _is_relevant(record: logging.LogRecord) -> bool:
    """False for two intended cases: a sampler made from another's config, a LoRA without a text-encoder part."""
    return not record.getMessage().startswith(("The config attributes", "No LoRA keys associated to CLIPTextModel"))


@contextlib.contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Turns an out-of-memory error of the GPU into a `UsageError` with this `remedy`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(f"the GPU is out of memory ({str(error).splitlines()[0]:.200}): {remedy}") from None
