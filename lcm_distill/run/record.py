"""run.json: what a checkpoint records of its run, and by which its files are known to be whole.

    write_record(folder, values, digests)     the last file of a checkpoint
    record = read_record(folder)              what a run resumes with
    check_files(folder, record)               whether every file is the one that was written

run.json holds the SHA-256 of each file of the checkpoint, as `sha256sum` prints it, and one of its own values. In a
checkpoint of an earlier version, which has none, every file that a run loads is opened, and its values are looked at.
"""

import hashlib
import json
import os
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate.utils import load as load_without_code
from safetensors import safe_open

from lcm_distill.distributed.finite import find_not_finite, tensors_in
from lcm_distill.machine import usable_cores

RECORD = "run.json"
_DIGESTS, _OWN = "files", "sha256"  # in run.json: of the other files by name, and of run.json's own values
_LARGEST = 2**26  # bytes of a run.json; real ones have a few thousand
_BLOCK = 2**22
_LOADED = (".safetensors", ".safetensors.index.json", ".pt")  # what a run looks for in the folders of a checkpoint


class DamageError(ValueError):
    """A checkpoint is not, or not any more, what a run wrote; the message is the reason, after "… is damaged: "."""


def shown(value: Any, length: int = 100) -> str:
    """A value from a file as one short line for a message, without the control characters that a terminal obeys."""
    text = str(value)
    cut = text if len(text) <= length else f"{text[:length]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


# ---------------------------------------------------------------------------------------------------- values


def _is_count(value: Any, least: int = 0, most: int = 2**53) -> bool:
    return type(value) is int and least <= value <= most


def _is_text_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "program": lambda value: isinstance(value, str),
    "architecture": lambda value: isinstance(value, dict),
    "flags": lambda value: isinstance(value, dict),
    "seed": lambda value: _is_count(value, 0, 2**32 - 1),
    "processes": lambda value: _is_count(value, 1, 2**20),
    "global_step": _is_count,
    "batches": _is_count,
    "trackers": _is_text_by_name,
    "versions": lambda value: isinstance(value, dict),
    _DIGESTS: lambda value: _is_text_by_name(value) and all(map(_is_inside, value)),
    _OWN: lambda value: isinstance(value, str),
}
_KINDS_OF_FLAGS: dict[str, Callable[[Any], bool]] = {  # those that a resume computes with
    "dataloader_num_workers": lambda value: value is None or _is_count(value, 0, 2**12),
    "w_min": _is_number,
    "w_max": _is_number,
}
_OF_EARLIER_VERSIONS = ("program", "architecture", "flags", "seed", "processes", "batches", "versions")


def _is_inside(name: str) -> bool:
    return "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def _is_deep(record: Mapping[str, Any], most: int = 32) -> bool:
    """Whether it is nested more than `most` levels; Python itself fails at some depth, which varies."""
    level: list[Any] = [record]
    for _ in range(most):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [item for values in inner for item in values if isinstance(item, (dict, list))]
    return bool(level)


def _own_digest(record: Mapping[str, Any]) -> str:
    others = {name: value for name, value in record.items() if name != _OWN}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def write_record(folder: Path, values: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Writes run.json with `values`, as JSON has them, and the `digests` of the checkpoint's other files."""
    record = json.loads(json.dumps({**values, _DIGESTS: dict(sorted(digests.items()))}, default=str))
    (folder / RECORD).write_text(json.dumps({**record, _OWN: _own_digest(record)}, indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """run.json; `DamageError` if it cannot be read, or if a value that a run needs is missing or of another kind.

    The values of one that has no digests may be others than those that were written; what is missing in one that no run
    has written is taken to be unknown.
    """
    try:
        file = folder / RECORD
        if not file.is_file():
            raise ValueError("it is not a file")
        if file.stat().st_size > _LARGEST:
            raise ValueError("it is too large")
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it holds no settings")
        if _is_deep(record):
            raise ValueError("it is nested too deeply")
        _check_kinds(record)
    except (OSError, ValueError, RecursionError) as error:
        raise DamageError(f"its {RECORD} cannot be read ({shown(error, 300)})") from None
    if has_digests(record) and record.get(_OWN) != _own_digest(record):
        raise DamageError(f"its {RECORD} has changed since it was written")
    return record


def _check_kinds(record: Mapping[str, Any]) -> None:
    for name, fits in _KINDS.items():
        if name in record and not fits(record[name]):
            raise ValueError(f'its "{name}" is {shown(record[name])}')
    for name, fits in _KINDS_OF_FLAGS.items():
        if name in record.get("flags", {}) and not fits(record["flags"][name]):
            raise ValueError(f'the "{name}" of its flags is {shown(record["flags"][name])}')
    needed = ["global_step"]
    if has_digests(record):
        needed += ["processes", _DIGESTS, _OWN]
    elif _was_written_by_a_run(record):
        needed += _OF_EARLIER_VERSIONS
    for name in needed:
        if name not in record:
            raise ValueError(f"it has no {name}")


def has_digests(record: Mapping[str, Any]) -> bool:
    """Whether the checkpoint was written with digests, which is also since when no value was written unseen."""
    return _DIGESTS in record or _OWN in record


def _was_written_by_a_run(record: Mapping[str, Any]) -> bool:
    return bool({"processes", "batches", "versions"} & record.keys())


# ---------------------------------------------------------------------------------------------------- files


def digests_of(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """The SHA-256 of the files in `folder`, at any depth (None: of all), by name. Several are read at once."""
    if names is None:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    chosen = sorted(names, key=lambda name: -os.path.getsize(folder / name))  # the largest first, to end at one time
    with ThreadPoolExecutor(max_workers=min(8, usable_cores())) as pool:
        return dict(zip(chosen, pool.map(lambda name: _digest(folder / name), chosen), strict=True))


def _digest(path: Path) -> str:
    found, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            found.update(block[:count])
    return found.hexdigest()


def check_files(folder: Path, record: Mapping[str, Any]) -> None:
    """`DamageError` unless every file of the checkpoint is the one that was written; `record` is its run.json.

    With digests that reads every byte, 1.5 to 2 GB/s for each of its large files. Without, what a run loads has to be
    there, readable without running anything, and finite; a checkpoint that no run has written is not looked at.
    """
    if has_digests(record):
        for name in record[_DIGESTS]:
            _check_regular(folder / name, shown(name))
        for path in folder.glob("*/*"):
            name = path.relative_to(folder).as_posix()
            if name.endswith(_LOADED) and name not in record[_DIGESTS]:
                raise DamageError(f"{shown(name)} was not written with it")
        try:
            found = digests_of(folder, record[_DIGESTS])
        except OSError as error:
            raise DamageError(f"a file cannot be read ({error})") from None
        for name, expected in record[_DIGESTS].items():
            if found[name] != expected:
                raise DamageError(f"{shown(name)} has changed since it was written")
    elif _was_written_by_a_run(record):
        for path in _loaded_by_earlier_versions(folder, record):
            name = path.relative_to(folder).as_posix()
            _check_regular(path, name)
            try:
                bad = find_not_finite(_values_in(path))
            except Exception as error:  # truncated, or no such file at all: a different exception in each reader
                raise DamageError(f"{name} cannot be read ({shown(error, 300)})") from None
            if bad is not None:
                raise DamageError(f"{name}: values in {bad} are not finite")


def _check_regular(path: Path, name: str) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise DamageError(f"{name} is missing") from None
    except OSError as error:
        raise DamageError(f"{name} cannot be read ({error})") from None
    if not stat.S_ISREG(mode):  # reading a pipe would wait for ever
        raise DamageError(f"{name} is not a file")


def _loaded_by_earlier_versions(folder: Path, record: Mapping[str, Any]) -> Iterator[Path]:
    """The files that a run resumes from, of a checkpoint without digests, whether they are there or not."""
    yield folder / "custom_checkpoint_0.pkl"  # the schedule of the learning rate
    for rank in range(record["processes"]):
        yield folder / f"stream-{rank}.pt"
        yield folder / f"random_states_{rank}.pkl"
    yield folder / "optimizer.bin"
    scaler, matching = folder / "scaler.pt", folder / "fake_score"
    if scaler.exists():
        yield scaler
    if matching.exists():
        yield matching / "fake_score.safetensors"
        yield matching / "training.pt"
    if (folder / "adapter").exists():
        averaged = record["architecture"].get("--ema_decay above 0") or (folder / "adapter_target").exists()
        names = ["adapter", "adapter_target"] if averaged else ["adapter"]
        yield from (folder / name / "adapter_model.safetensors" for name in names)
        return
    for name in ("unet", "unet_target"):
        weights = sorted((folder / name).glob("*.safetensors"))
        yield from weights or [folder / name / "diffusion_pytorch_model.safetensors"]


def _values_in(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix != ".safetensors":
        with zipfile.ZipFile(path) as file:  # PyTorch writes these checksums, and does not read them
            if bad := file.testzip():
                raise ValueError(f"{bad} has changed")
        # Tensors, numbers, text and NumPy's arrays alone: nothing that a pickle could call.
        yield from tensors_in(load_without_code(str(path), map_location="cpu", weights_only=True, mmap=True))
        return
    with safe_open(path, framework="pt") as weights:
        for name in weights.keys():
            yield name, weights.get_tensor(name)
