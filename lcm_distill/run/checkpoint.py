"""Checkpoints `checkpoint-N`: everything that a run needs to continue exactly where it was.

    checkpoint-N/
      unet/ … or adapter/ …        each trained part: a U-Net as Diffusers saves it, an adapter as PEFT does
      fake_score/                  with distribution matching: the fake score and its optimizer
      optimizer.bin, …             Accelerate's state: optimizer, loss scaler, random state
      lr_scheduler.json            the steps of the learning rate's schedule
      stream-RANK.pt               the position of each rank's data stream
      run.json                     step, flags, seed, layout, versions, architecture; a digest of each other file
      rating.json                  its distance to the teacher, if it was ever the best (--keep_best), and whether it
                                   was saved only for that

A checkpoint is written under a temporary name and renamed once it is on the disk, and renamed again before it is
removed: one with its final name is complete. Older ones are removed only after the new one exists; the best is kept.
None is written of values that are not finite. Nothing in a checkpoint is executed: what is a pickle is read by PyTorch
as tensors, numbers and text alone.

Before a checkpoint is resumed its files are compared with their digests. If the newest is damaged, `latest` resumes the
newest that is whole, and renames the damaged one to `damaged-checkpoint-N`. What has a checkpoint's name, but is none,
is renamed so too when a checkpoint needs the name. Of links only the link is ever renamed or removed.
"""

import itertools
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial as partial_function
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils import load as load_without_code

from lcm_distill.distributed.finite import check_finite, tensors_in
from lcm_distill.distributed.fsdp import all_ranks_save
from lcm_distill.environment import versions
from lcm_distill.errors import DivergenceError, SaveError, UsageError, brief
from lcm_distill.run.best import RATING, changed_distance_flags, pick_best, read_rating
from lcm_distill.run.record import (
    RECORD,
    DamageError,
    check_files,
    digests_of,
    has_digests,
    read_record,
    shown,
    write_record,
)

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-([0-9]+)")
_LEFTOVER = re.compile(r"\.checkpoint-[0-9]+(-[0-9]+)?\.(partial|removed)")

T = TypeVar("T")


class CheckpointPart(Protocol):
    """Something trained that a checkpoint holds, in its own folder."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...  # `UsageError` if it is of other flags


class Checkpoints:
    """Writes and loads the checkpoints of one run. Every rank calls every method.

    `parts` are what trains, by folder name; `limit` is how many checkpoints to keep (None: all), besides the best. In a
    `dry_run` nothing is written, renamed or removed.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str,
        parts: Mapping[str, CheckpointPart],
        limit: int | None,
        *,
        dry_run: bool = False,
    ):
        self._accelerator = accelerator
        self._output_dir = Path(output_dir)
        self._parts = parts
        self._limit = limit
        self._dry_run = dry_run
        accelerator.register_save_state_pre_hook(self._save_parts)

    def save(
        self,
        global_step: int,
        run: Mapping[str, Any],
        stream_state: Mapping[str, Any],
        *,
        required: bool = False,
        last: bool = False,
        alone: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> Path | None:
        """Writes `checkpoint-{global_step}`, returns its path; `run` goes into run.json, `stream_state` is this rank's.

        If any rank cannot write it (a full disk), that is logged, older checkpoints are kept and the result is None; if
        it is `required`, because the run is about to stop, it is a `SaveError`. The `last` one of a run is followed by
        the export alone. `DivergenceError` if weights or states are not finite. A dry run writes none.

        With `alone` it is the main process that calls this, without the others, where each rank has all weights: these
        are the states of the streams that are known, by rank.
        """
        if self._dry_run:
            return None
        accelerator = self._accelerator
        final = self._output_dir / f"checkpoint-{global_step}"
        partial = final
        digests: dict[str, str] = {}

        def begin() -> None:
            nonlocal partial
            if accelerator.is_main_process:
                _clean(self._output_dir)
                partial = _free_name(self._output_dir, f".{final.name}", ".partial")
                partial.mkdir(parents=True)

        def write() -> None:
            nonlocal partial, digests
            if alone is None:
                partial = Path(broadcast_object_list([str(partial)])[0])
            accelerator.save_state(str(partial))
            rank = accelerator.process_index
            for number, state in (alone or {rank: stream_state}).items():
                torch.save(dict(state), partial / f"stream-{number}.pt")
            if not accelerator.is_main_process:  # by the rank itself: on a shared disk others may see them late
                digests = digests_of(partial, [f"stream-{rank}.pt", f"random_states_{rank}.pkl"])

        def finish() -> None:
            if not accelerator.is_main_process:
                return
            with ThreadPoolExecutor(max_workers=1) as pool:  # the processor's work, while the disk does its own
                reading = pool.submit(digests_of, partial)
                _sync_to_disk(partial)
                found = reading.result()
            record = dict(run) | {
                "global_step": global_step,
                "processes": accelerator.num_processes,
                "versions": versions(),
            }
            if alone is not None:  # the run continues without these ranks' positions
                record["missing_streams"] = sorted(set(range(accelerator.num_processes)) - alone.keys())
            write_record(partial, record, found | of_others)
            _sync_file(partial / RECORD)
            _sync_folder(partial)
            replaced = None
            if is_checkpoint(final):  # saved before
                replaced = _free_name(self._output_dir, f".{final.name}", ".removed")
                final.rename(replaced)
            elif os.path.lexists(final):
                aside = _set_aside(final, "damaged")
                logger.warning("%s is not a complete checkpoint: renamed to %s", final, aside.name)
            try:
                partial.rename(final)
            except OSError:
                if replaced:
                    replaced.rename(final)
                raise
            _sync_folder(self._output_dir)
            if replaced:
                _discard(replaced)

        check = partial_function(self._problem, alone=alone is not None)
        problem = check(begin) or check(write)
        of_others = {} if problem or alone is not None else self._digests_of_others(digests)
        if problem := problem or check(finish):
            diverged, reason = problem
            if accelerator.is_main_process and partial != final:
                shutil.rmtree(partial, ignore_errors=True)
            if diverged:
                raise DivergenceError(
                    f"checkpoint-{global_step} is not written: {reason}. {where_to_resume(self._output_dir)} with a "
                    "lower --learning_rate, a lower --max_grad_norm, or --mixed_precision bf16 instead of fp16."
                )
            kept = list_checkpoints(self._output_dir)
            message = (
                f"checkpoint-{global_step} could not be written ({reason}); the last complete one is "
                f"{kept[-1] if kept else 'none'}. Free disk space in {self._output_dir}"
            )
            if required:
                raise SaveError(
                    f"{message}, then resume from that one with --resume_from_checkpoint latest."
                    if kept
                    else f"{message}, then launch again: the run starts anew."
                )
            what_follows = "writes its result" if last else "continues and tries again at its next checkpoint"
            logger.error("%s: the run %s.", message, what_follows)
            return None
        if accelerator.is_main_process:
            logger.info("saved %s", final)
            try:
                self._prune(keep=final)
            except OSError as error:
                logger.error("an older checkpoint could not be removed (%s)", error)
        if alone is None:
            accelerator.wait_for_everyone()
        return final

    def _digests_of_others(self, own: dict[str, str]) -> dict[str, str]:
        """What the other ranks than the main one have found of the files that they have written, on every rank."""
        return {name: digest for of_rank in gather_object([own]) for name, digest in of_rank.items()}

    def keep_if_best(
        self, distance: float, global_step: int, run: Mapping[str, Any], stream_state: Mapping[str, Any]
    ) -> bool:
        """Keeps this step's checkpoint as the best if `distance` is smaller than any before; returns whether it did.

        If the step has no checkpoint yet, one is saved, which is removed when another becomes the best. `distance` is
        the same on every rank; one that is not finite is never the best. If the flags in `run` compare other pictures
        than those of the best so far, that one no longer counts. A dry run keeps nothing.
        """
        if self._dry_run:
            return False
        best = find_best(self._output_dir) if self._accelerator.is_main_process else None
        changed = [] if best is None else changed_distance_flags(best, run)
        least = math.inf if best is None or changed else read_rating(best)[0]
        if not broadcast_object_list([distance < least])[0]:
            return False
        path = self._output_dir / f"checkpoint-{global_step}"
        exists = broadcast_object_list([is_checkpoint(path)])[0]
        saved = exists or self.save(global_step, run, stream_state)
        if saved and self._accelerator.is_main_process:
            partial = path / ".rating.json"
            try:
                partial.unlink(missing_ok=True)  # of a run that was killed; a link would be written through
                partial.write_text(json.dumps({"distance": distance, "saved_for_it": not exists}) + "\n")
                partial.rename(path / RATING)
                if changed:
                    flags = ", ".join(f"--{name}" for name in changed)
                    logger.warning(
                        "%s is no longer the best: distances with another %s cannot be compared", best, flags
                    )
                    for other in set(list_checkpoints(self._output_dir)) - {path}:
                        (other / RATING).unlink(missing_ok=True)
                elif best is not None and read_rating(best)[1]:
                    _remove(best)
                self._prune(keep=path)
            except OSError as error:
                logger.error("%s could not be marked as the best (%s)", path, error)
        return bool(saved)

    def _problem(self, action: Callable[[], None], *, alone: bool = False) -> tuple[bool, str] | None:
        """Runs `action`; None, or what went wrong on any rank, the same on every rank; `alone`: on this rank.

        That is whether values are not finite, and a reason.
        """
        problem = None
        try:
            action()
        except DivergenceError as error:
            problem = (True, str(error))
        except Exception as error:  # noqa: BLE001 - a full disk is a different exception in each writer
            problem = (False, f"{type(error).__name__}: {error}")
        if alone:
            return problem
        return next(filter(None, gather_object([problem])), None)

    def load(self, path: Path) -> dict[str, Any]:
        """Loads networks, optimizer, learning rate and scaler; returns this rank's stream state.

        The state is {} for a rank that the checkpoint's run did not have. Checkpoints of later steps no longer belong
        to the run: they are renamed to `abandoned-checkpoint-N`, except in a dry run. `UsageError` if a part is missing
        or damaged.
        """
        rank = self._accelerator.process_index
        try:
            run = read_record(path)
            new = rank >= run["processes"]
            # A rank that did not answer when the others were saved continues in the epoch of the main process.
            known = 0 if rank in run.get("missing_streams", []) else rank
            random_states = path / f"random_states_{rank}.pkl"
            if not new and ("missing_streams" not in run or random_states.exists()):
                # Accelerate continues without those that it cannot read.
                load_without_code(random_states, map_location="cpu", weights_only=True)
            self._load_state(path)
            state = {} if new else torch.load(path / f"stream-{known}.pt", weights_only=True)
            if not isinstance(state, dict):
                raise ValueError(f"stream-{known}.pt holds no position")
        except UsageError:  # a part that is whole, but of other flags
            raise
        except Exception as error:  # a part is missing or truncated: a different exception in each reader
            raise UsageError(
                f"--resume_from_checkpoint {path} is damaged ({brief(error)}); resume from another checkpoint."
            ) from None
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process and not self._dry_run:
            for later in list_checkpoints(self._output_dir):
                if _step(later) > run["global_step"]:
                    self._abandon(later)
        return state

    def _load_state(self, path: Path) -> None:
        """What `Accelerator.load_state` loads, without unpickling: that runs the code in `custom_checkpoint_*.pkl`."""
        accelerator = self._accelerator
        for name, part in self._parts.items():
            part.load(path / name)
        on_device = accelerator.num_processes > 1 and accelerator.device.type not in ("cpu", "xpu")
        changed = load_accelerator_state(
            str(path),
            [],  # models and the learning rate are parts
            accelerator._optimizers,
            [],
            [],
            accelerator.process_index,
            accelerator.scaler,
            "on_device" if on_device else "cpu",
        )
        accelerator.step = changed.get("step", accelerator.step)

    def _abandon(self, later: Path) -> None:
        """Renames a checkpoint that no longer belongs to the run; one of that name is removed."""
        aside = later.with_name(f"abandoned-{later.name}")
        try:
            replaces = os.path.lexists(aside)
            if replaces:
                _remove(aside)
            later.rename(aside)
        except OSError as error:
            logger.error("%s is later than the resumed checkpoint, but cannot be renamed (%s)", later, error)
            return
        logger.warning(
            "%s is later than the resumed checkpoint: renamed to %s%s",
            later,
            aside.name,
            ", in place of an earlier one" if replaces else "",
        )

    def _save_parts(self, models: list[Any], weights: list[Any], output_dir: str) -> None:
        errors = []
        together = all_ranks_save(self._accelerator)
        if self._accelerator.is_main_process or together:
            for name, part in self._parts.items():
                try:
                    part.save(Path(output_dir) / name)
                except Exception as error:  # noqa: BLE001 - the other ranks gather the next part together with this one
                    errors.append(error)
        weights.clear()  # else Accelerate saves them once more
        if errors:
            raise errors[0]
        if self._accelerator.is_main_process:  # what Accelerate saves; split optimizers are parts
            for optimizer in self._accelerator._optimizers:
                check_finite("optimizer.bin", tensors_in(optimizer.state_dict()["state"]))

    def _prune(self, keep: Path) -> None:
        if self._limit is None:
            return
        found = list_checkpoints(self._output_dir)
        best = pick_best(found)
        older = [path for path in found if path not in (keep, best)]
        for path in older[: max(0, len(older) + 1 - self._limit)]:
            _remove(path)


def _remove(path: Path) -> None:
    """Removes a checkpoint; killed halfway, it leaves a hidden folder, not an incomplete checkpoint."""
    hidden = _free_name(path.parent, f".checkpoint-{_step(path)}", ".removed")
    path.rename(hidden)
    _discard(hidden)


def _discard(path: Path) -> None:
    """Removes a folder, file or link, of a link never what it leads to; what fails is logged."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:  # another user's file, one that is open on a network disk: it is tried again
        logger.warning("%s could not be removed (%s)", path, error)


def _clean(output_dir: Path) -> None:
    """Removes what runs that were killed while they wrote or removed a checkpoint have left, and nothing else."""
    if output_dir.is_dir():
        for path in sorted(output_dir.iterdir()):
            if _LEFTOVER.fullmatch(path.name):
                _discard(path)


def _free_name(folder: Path, stem: str, ending: str = "") -> Path:
    """The first of STEM, STEM-2, STEM-3, …, each with the `ending`, that nothing in `folder` has."""
    path, number = folder / f"{stem}{ending}", itertools.count(2)
    while os.path.lexists(path):
        path = folder / f"{stem}-{next(number)}{ending}"
    return path


def _set_aside(path: Path, prefix: str) -> Path:
    """Renames it to PREFIX-checkpoint-N, or PREFIX-checkpoint-N-2, …, names of which none is resumed or removed."""
    aside = _free_name(path.parent, f"{prefix}-{path.name}")
    path.rename(aside)
    return aside


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def is_checkpoint(path: Path) -> bool:
    """Whether a folder, or a link to one, holds a complete checkpoint: run.json is its last file."""
    return os.path.isfile(path / RECORD)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints in `output_dir`, oldest step first."""
    folder = Path(output_dir)
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    complete = [path for path in found if is_checkpoint(path)]
    for incomplete in sorted(set(found) - set(complete)):
        logger.warning("%s is not a complete checkpoint (no run.json): ignored", incomplete)
    return sorted(complete, key=_step)


def where_to_resume(output_dir: str | Path) -> str:
    """The newest checkpoint, and whether its values are known to be finite, for a message that ends "… resume"."""
    kept = list_checkpoints(output_dir)
    if not kept:
        return "There is no checkpoint yet: start again"
    try:
        good = has_digests(read_record(kept[-1]))
    except DamageError:
        good = False
    if good:  # none is written with values that are not finite
        return f"The last checkpoint, of finite values, is {kept[-1]}: resume"
    return f"The last checkpoint is {kept[-1]}, whose values have not been looked at: resume"


def find_best(output_dir: str | Path) -> Path | None:
    """The checkpoint in `output_dir` that was closest to the teacher; None if none was rated."""
    return pick_best(list_checkpoints(output_dir))


def find_checkpoint(resume_from_checkpoint: str | None, output_dir: str) -> Path | None:
    """The folder that `--resume_from_checkpoint` names; None for a new run ("latest" when there is none yet)."""
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint == "latest":
        return next(reversed(list_checkpoints(output_dir)), None)
    if resume_from_checkpoint == "best":
        if best := find_best(output_dir):
            return best
        raise UsageError(
            f"--resume_from_checkpoint best: no checkpoint in {output_dir} is rated; --keep_best rates them."
        )
    for path in (Path(resume_from_checkpoint).expanduser(), Path(output_dir) / resume_from_checkpoint):
        if os.path.isdir(path):
            if not is_checkpoint(path):
                raise UsageError(
                    f"--resume_from_checkpoint {path}: not a complete checkpoint of this project (it has no run.json); "
                    "give another folder, or 'latest'."
                )
            return path
    known = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none"
    raise UsageError(f"--resume_from_checkpoint {resume_from_checkpoint}: no such folder. In {output_dir}: {known}.")


def find_run(
    resume_from_checkpoint: str | None,
    output_dir: str,
    program: str,
    architecture: Mapping[str, Any],
    *,
    seed: int | None,
    flags: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    not_given: Collection[str] = (),
) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint that `--resume_from_checkpoint` names and its run.json; (None, {}) for a new run.

    `UsageError` unless it is of this `program`, this `architecture` (of flags that are `not_given`, of any value) and
    this `seed` (None: any), whole, and what it holds fits the `flags`, or if this run would mix its checkpoints with
    those of another run (a `dry_run` writes none). With "latest" it is the newest that is whole: those that are newer
    and damaged are renamed to `damaged-checkpoint-N`, except in a dry run, which is logged.
    """

    def read(path: Path) -> dict[str, Any]:
        run = read_record(path)
        if _NAME.fullmatch(path.name) and _step(path) != run["global_step"]:
            raise DamageError(f"its run.json is that of step {run['global_step']}")
        check_resumable(path, run, program=program, architecture=architecture, seed=seed, not_given=not_given)
        check_optimizers(path, run, flags or {})
        check_files(path, run)
        return run

    if resume_from_checkpoint == "latest":
        return _find_latest(output_dir, read, dry_run=dry_run)
    path = find_checkpoint(resume_from_checkpoint, output_dir)
    own = Path(output_dir).resolve()
    inside = path is not None and own in (path.resolve().parent, path.absolute().parent.resolve())  # a link, too
    if not inside and not dry_run and (earlier := list_checkpoints(output_dir)):
        # With two runs in one folder, `latest` could be either's.
        raise UsageError(
            f"--output_dir {output_dir} holds an earlier run ({earlier[-1].name}): resume it with "
            "--resume_from_checkpoint latest, give another folder, or remove that run's checkpoints."
        )
    if path is None:
        return None, {}
    try:
        return path, read(path)
    except DamageError as error:
        raise UsageError(
            f"--resume_from_checkpoint {path} is damaged: {error}; resume from another checkpoint."
        ) from None


def _find_latest(
    output_dir: str, read: Callable[[Path], dict[str, Any]], *, dry_run: bool
) -> tuple[Path | None, dict[str, Any]]:
    """The newest checkpoint that is whole, which `read` reads or else raises `DamageError`, and its run.json."""
    damaged: dict[Path, DamageError] = {}
    for path in reversed(list_checkpoints(output_dir)):
        try:
            run = read(path)
        except DamageError as error:
            damaged[path] = error
            continue
        for other, reason in damaged.items():
            kept = "it stays, as this is a dry run"
            if not dry_run:
                try:
                    kept = f"it is kept as {_set_aside(other, 'damaged').name}"
                except OSError as error:
                    kept = f"it cannot be renamed ({error})"
            logger.warning("%s is damaged: %s. Resuming from %s; %s.", other, reason, path.name, kept)
        return path, run
    if damaged:
        reasons = "; ".join(f"{path.name} is damaged: {reason}" for path, reason in damaged.items())
        raise UsageError(
            f"--resume_from_checkpoint latest: no checkpoint in {output_dir} is whole ({reasons}); resume from another "
            "checkpoint, or begin a new run in another --output_dir."
        )
    return None, {}


def on_main_process(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """What `action` returns on the main process, on every rank; if it raises a `UsageError`, all raise it."""
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer = [action(), None]
        except UsageError as error:
            answer = [None, str(error)]
    result, problem = broadcast_object_list(answer)
    if problem is not None:
        raise UsageError(problem)
    return result


def check_optimizers(path: Path, run: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """`UsageError` unless the optimizers' state in the checkpoint, and its fake score, if any, fit the `flags`.

    `run` is the checkpoint's run.json. A flag that it does not have counts as unchanged; for --use_8bit_adam the state
    itself decides.
    """
    saved = dict(run.get("flags", {}))
    if not isinstance(saved.get("use_8bit_adam"), bool) and (has_8_bits := _has_8_bits(path)) is not None:
        saved["use_8bit_adam"] = has_8_bits
    now = {**saved, **{name: value for name, value in flags.items() if name in saved}}
    if now.get("use_8bit_adam") != saved.get("use_8bit_adam"):
        given = "--use_8bit_adam: " if now["use_8bit_adam"] else "--use_8bit_adam is not given, but "
        before, remedy = ("float32", "leave it out") if now["use_8bit_adam"] else ("8-bit", "pass it")
        raise UsageError(
            f"{given}the checkpoint {path} holds AdamW's state in {before}, which cannot be converted; {remedy}, or "
            "begin a new run in another --output_dir."
        )
    if not (path / "fake_score").is_dir() or not now.get("dm_weight"):
        return

    def shape(of: Mapping[str, Any]) -> tuple[Any, bool]:
        # Only a full student's fake score takes a guidance embedding, and only if there is a range of w.
        return of.get("dm_rank"), "unet_time_cond_proj_dim" in of and of.get("w_min", 0) < of.get("w_max", 0)

    if shape(saved) != shape(now):
        trained = " ".join(f"--{name} {shown(saved.get(name))}" for name in ("dm_rank", "w_min", "w_max"))
        raise UsageError(
            "--dm_rank: the checkpoint's fake score has another rank, or whether it takes a guidance embedding "
            f"(--w_min below --w_max) has changed; give the flags that it was trained with ({trained}), or begin a new "
            "run in another --output_dir."
        )


def _has_8_bits(path: Path) -> bool | None:
    """Whether the optimizer's state in a checkpoint is 8-bit; None if there is none in one file, or it is damaged."""
    if not (path / "optimizer.bin").is_file():  # reading a pipe would wait for ever
        return None
    try:  # mapped, since it has twice the size of the weights
        state = torch.load(path / "optimizer.bin", map_location="cpu", weights_only=True, mmap=True)["state"]
        # PyTorch's moments have these names; bitsandbytes' have had others, on several levels.
        return not any("exp_avg" in of_parameter for of_parameter in state.values()) if state else None
    except Exception:  # noqa: BLE001 - loading it says what is wrong
        return None


def check_resumable(
    path: Path,
    run: Mapping[str, Any],
    *,
    program: str,
    architecture: Mapping[str, Any],
    seed: int | None,
    not_given: Collection[str] = (),
) -> None:
    """`UsageError` unless the checkpoint is of this program, this architecture and this seed.

    Of flags of the architecture that are `not_given`, which are counts, the checkpoint may have any value.
    """
    where = f"--resume_from_checkpoint {path}"
    if run.get("program") != program:
        writer = shown(run.get("program"))
        raise UsageError(f"{where} was written by {writer}, not by {program}; resume it with that program.")
    saved = run.get("architecture", {})
    expected = json.loads(json.dumps(dict(architecture), default=str))
    for name in (f"--{flag}" for flag in not_given):
        if type(saved.get(name)) is int and saved[name] > 0:
            expected[name] = saved[name]
    different = [
        f"{shown(key)}: {shown(saved.get(key))} in the checkpoint, {shown(expected.get(key))} now"
        for key in sorted({*saved, *expected})
        if saved.get(key) != expected.get(key)
    ]
    if different:
        raise UsageError(
            f"{where} has another architecture ({'; '.join(different[:4])}). Give the teacher and the "
            "flags that it was trained with (time_cond_proj_dim is --unet_time_cond_proj_dim), or another --output_dir."
        )
    if seed is not None and run.get("seed", seed) != seed:
        raise UsageError(
            f"--seed {seed}: the checkpoint {path} was trained with seed {run['seed']}; give that one, or no --seed."
        )


def changed_flags(run: Mapping[str, Any], flags: Mapping[str, Any]) -> list[str]:
    """The flags that differ from those of the checkpoint's run, as "name: before → now"."""
    before = run.get("flags", {})
    now = json.loads(json.dumps(dict(flags), default=str))
    skip = {"resume_from_checkpoint", "seed", "local_rank", "dry_run"}
    return [
        f"--{name}: {shown(before[name], 1000)} → {value}"
        for name, value in now.items()
        if name in before and name not in skip and before[name] != value
    ]


def _sync_to_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            _sync_file(path)
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
