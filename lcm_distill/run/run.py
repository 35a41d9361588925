"""One launch of a training program, and everything around its loop: `Run`.

    run = Run(PROGRAM, args.launch, args.streaming, architecture, args.flat(), argv=argv)
    preflight = run.inspect(shards, preparation, count_tokens)    # a first look into the shards
    plan = run.plan(...)                                      # length and learning rate
    run.connect()                                             # Hub and trackers
    run.start(parts, loader, optimizer, lr_scheduler, student, validation)
    for batch, generator in run.batches():
        ...                                                   # the training step is the program's
        if run.skipped():                                     # no optimizer step: accumulating, or an fp16 overflow
            continue
        due = run.step(grad_norm)
        if due.log: run.log()
        if due.save: run.save()
        if due.validate: run.validate()
    if run.finish(): ...                                      # the export
    run.end()

`Run` counts steps and batches. It does not train: networks, objective and loop are the program's.
"""

import atexit
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer

from lcm_distill.data.loader import Interrupted, ShardLoader, check_shared_memory
from lcm_distill.data.preflight import ShardReport, inspect_shards
from lcm_distill.data.preparation import Preparation
from lcm_distill.errors import UsageError, WorkerError, brief
from lcm_distill.export.hub import HubUpload, open_hub
from lcm_distill.flags import LaunchFlags, LengthFlags, OptimizationFlags, StreamingFlags
from lcm_distill.locks import FolderLock
from lcm_distill.redaction import hide_in_command_line, install, protect, public_flags
from lcm_distill.run.accelerator import choose_seed, choose_workers, end_training, processes_here, start_accelerator
from lcm_distill.run.checkpoint import CheckpointPart, Checkpoints, find_run, on_main_process
from lcm_distill.run.folder import check_folder, check_shards_apart, hold_folder
from lcm_distill.run.optim import LearningRateSteps, keeping_hyperparameters
from lcm_distill.run.plan import TrainingPlan, log_plan, plan_training
from lcm_distill.run.progress import start_progress
from lcm_distill.run.randomness import BatchGenerators
from lcm_distill.run.stopping import Stopping
from lcm_distill.run.trackers import finish_trackers, need_connection, parse_trackers, start_trackers
from lcm_distill.run.validation import Validation
from lcm_distill.run.watch import Watch

logger = logging.getLogger(__name__)


def _has_all_weights(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@dataclasses.dataclass(frozen=True)
class _BeforeStep:
    """What a step changes before it is done, apart from gradients: the state before it."""

    stream: Mapping[str, Any]
    batches: int
    accumulated: int  # batches, as Accelerate counts them
    random: Mapping[str, torch.Tensor]

    def restore(self, accelerator: Accelerator) -> None:
        """What a checkpoint holds besides the other two."""
        accelerator.step = self.accumulated
        if "cpu" in self.random:
            torch.set_rng_state(self.random["cpu"])
        if "cuda" in self.random:
            torch.cuda.set_rng_state(self.random["cuda"])


@dataclasses.dataclass(frozen=True)
class Due:
    """What to do after an optimizer step."""

    log: bool
    save: bool
    validate: bool


class Run:
    """One launch of `program`, new or resumed. Every rank has one and calls every method.

    Args:
        launch: the flags of the launch itself.
        streaming: those of the data.
        architecture: what must be equal in a checkpoint for its weights to fit.
        flags: all flags by name, to be recorded.
        argv: the arguments of the program's `main` (None: the shell's command line).
        can_split: the program can split what it trains over the ranks (FSDP, ZeRO).
        not_given: flags of the architecture that the user left out: if a checkpoint is resumed, its values count.

    Attributes:
        accelerator: Accelerate's.
        architecture: that of the run, with the checkpoint's values of what is `not_given`.
        seed: that of the checkpoint if one is resumed.
        streaming: the flags of the data, with the number of workers that --dataloader_num_workers leaves open.
        public_flags: all flags without secrets, as they may be written to files, with that number.
        global_step: optimizer steps done.
        output_dir: None in a dry run, which writes nothing.
        hub: the upload of the result; None without --push_to_hub and on other ranks than the main one.

    Raises:
        UsageError: unknown or missing trackers; a checkpoint of another program, architecture or seed; a folder that
            holds another run, or what no run has made, or that another run has; what `start_accelerator` refuses.
    """

    def __init__(
        self,
        program: str,
        launch: LaunchFlags,
        streaming: StreamingFlags,
        architecture: Mapping[str, Any],
        flags: Mapping[str, Any],
        *,
        argv: Sequence[str] | None = None,
        can_split: bool = False,
        not_given: Collection[str] = (),
    ):
        install()
        protect(tokens=[launch.hub_token])
        if argv is None:
            hide_in_command_line(streaming.train_shards_path_or_url, launch.hub_token)
        trackers = parse_trackers(launch.report_to)
        check_folder(launch.output_dir, flags)
        self.accelerator = start_accelerator(launch, trackers, can_split=can_split)
        self._program, self._launch, self._argv = program, launch, argv
        self._lock = self._hold_folder(create=False)  # before anything in it is read
        self._find_run = partial(
            find_run,
            launch.resume_from_checkpoint,
            launch.output_dir,
            program,
            architecture,
            seed=launch.seed,
            flags=flags,
            dry_run=launch.dry_run,
            not_given=not_given,
        )
        self._checkpoint, self._resumed = on_main_process(self.accelerator, self._find_run)
        self.seed = choose_seed(self._resumed.get("seed", launch.seed))
        workers = choose_workers(streaming.dataloader_num_workers, self.accelerator, self._resumed)
        self.streaming = dataclasses.replace(streaming, dataloader_num_workers=workers)
        before = self._resumed.get("architecture", {})
        kept = {name: before[f"--{name}"] for name in not_given if f"--{name}" in before}
        self.architecture = {**architecture, **{f"--{name}": value for name, value in kept.items()}}
        self.public_flags = public_flags({**flags, **kept, "dataloader_num_workers": workers})
        self.output_dir = None if launch.dry_run else launch.output_dir
        self.global_step: int = self._resumed.get("global_step", 0)
        self._batches_done: int = self._resumed.get("batches", 0)
        self._record = dict(program=program, architecture=self.architecture, seed=self.seed, flags=self.public_flags)
        self._stop = False
        self._first_step = self.global_step
        self._is_main = self.accelerator.is_main_process
        self._saved_at: int | None = None  # the step of the last checkpoint that this launch wrote
        self._between_steps = True  # no batch of the next step has been used
        self._before_step = _BeforeStep({}, self._batches_done, 0, {})
        self._failure: WorkerError | None = None
        self.hub: HubUpload | None = None

    def _hold_folder(self, *, create: bool) -> FolderLock | None:
        """The output folder's lock, None if there is none yet; a dry run, which writes nothing, takes none."""
        if self._launch.dry_run:
            return None
        lock = hold_folder(self.accelerator, self._launch.output_dir, self._program, create=create)
        if lock is not None and self.accelerator.num_processes == 1:
            atexit.register(lock.release)  # also after an error; of several processes another may still write
        return lock

    @property
    def resumed(self) -> bool:
        """Whether a checkpoint is resumed."""
        return self._checkpoint is not None

    def inspect(
        self,
        shards: list[str],
        preparation: Preparation,
        count_tokens: Callable[[list[str]], list[tuple[int, int]]] | None = None,
    ) -> ShardReport:
        """`inspect_shards`; logs its report.

        `UsageError` too if the shards are in the output folder, or the workers' batches do not fit into shared memory.
        """
        check_shards_apart(self._launch.output_dir, shards)
        report = inspect_shards(shards, preparation, count_tokens=count_tokens)
        logger.info("%s", report)
        check_shared_memory(self.streaming, report.preparation, processes_here())
        return report

    def plan(
        self,
        length: LengthFlags,
        optimization: OptimizationFlags,
        batch_size: int,
        count_samples: Callable[[], int | None],
    ) -> TrainingPlan:
        """Computes the run's length and learning rate.

        `batch_size` is that of one process. `count_samples` counts the samples of the shards, None if it cannot; it is
        called only if the flags do not give the length. A dry run takes one step. `UsageError` for an unknown length.
        """
        self._plan = plan_training(
            self.accelerator,
            length,
            optimization,
            batch_size=batch_size,
            count_samples=count_samples,
            last_step=self.global_step + 1 if self._launch.dry_run else None,
        )
        return self._plan

    def connect(self) -> None:
        """Creates the output folder, opens Hub and trackers, before weights are loaded.

        `UsageError` if another run has the folder by now, the Hub refuses or a tracker fails. Tensorboard alone waits
        for `start`: a run that is refused before leaves no files.
        """
        launch = self._launch
        if self._lock is None:
            self._lock = self._hold_folder(create=True)
            if self._lock is not None and self._find_run()[0] != self._checkpoint:
                raise UsageError(
                    f"--output_dir {launch.output_dir}: another run has saved a checkpoint there since this one began; "
                    "give another folder, or launch again."
                )
        if launch.push_to_hub and not launch.dry_run:
            self.hub = open_hub(self.accelerator, launch.hub_model_id, launch.hub_token, launch.output_dir)
        if need_connection(self.accelerator):
            self._start_trackers()

    def _start_trackers(self) -> None:
        self._record["trackers"] = start_trackers(
            self.accelerator, self._launch.tracker_project_name, self.public_flags, resumed=self._resumed
        )

    def start(
        self,
        parts: Mapping[str, CheckpointPart],
        loader: ShardLoader,
        optimizer: AcceleratedOptimizer,
        lr_scheduler: torch.optim.lr_scheduler.LambdaLR,
        student: torch.nn.Module,
        validation: Validation,
    ) -> None:
        """Loads the checkpoint that is resumed, if any, and logs the plan.

        `parts` are what a checkpoint holds, by folder name; `student` is the network that trains.
        """
        launch, accelerator = self._launch, self.accelerator
        self._loader, self._lr_scheduler, self._validation = loader, lr_scheduler, validation
        parts = {**parts, LearningRateSteps.FILE: LearningRateSteps(lr_scheduler)}
        self._checkpoints = Checkpoints(
            accelerator, launch.output_dir, parts, launch.checkpoints_total_limit, dry_run=launch.dry_run
        )
        if self._checkpoint:
            with keeping_hyperparameters(optimizer, lr_scheduler):
                position = self._checkpoints.load(self._checkpoint)
            try:
                loader.load_state_dict(position)
            except Exception as error:  # of another program: a different exception for each thing that is missing
                raise UsageError(
                    f"--resume_from_checkpoint {self._checkpoint} is damaged: its position in the shards cannot be "
                    f"read ({brief(error)}); resume from another checkpoint."
                ) from None
        if "trackers" not in self._record:
            self._start_trackers()
        log_plan(self._plan, accelerator, student, self._record, checkpoint=self._checkpoint, resumed=self._resumed)
        self._progress = start_progress(
            accelerator,
            launch.output_dir,
            self._record,
            steps=self._plan.steps,
            global_step=self.global_step,
            argv=self._argv,
            dry_run=launch.dry_run,
        )
        self._stopping = Stopping(accelerator, launch.max_train_time)
        loader.give_up = self._stopping.wanted
        self._watch = Watch(accelerator, self._stopping, loader, self)

    def batches(self) -> Iterator[tuple[dict[str, Any], torch.Generator]]:
        """The loader's batches until the run ends, each with the generator of its random draws.

        When the run has to stop before its last step, the state after the last step is saved, and there are no more.
        That is between two steps, also while a batch is waited for; what a step has done with the first of several
        batches is done anew when the run is resumed.

        If the loader's workers fail, this process reads what the step needs, a checkpoint is saved after it, and `end`
        raises the `WorkerError`. In one process, before the first step, it is raised at once: nothing is lost.
        """
        generators = BatchGenerators(self.seed, self.accelerator.process_index, self.accelerator.device)
        batches = self._progress.batches(self._loader, self._on_failure)
        with contextlib.closing(batches), self._watch:
            while not self.finished:
                if self._between_steps:
                    self._remember()
                batch = self._next_batch(batches)
                if batch is None:
                    batches.close()
                    self._leave()
                    return
                generator = generators.at(self._batches_done)
                self._batches_done += 1
                self._between_steps = False
                with self._watch.during("step", self.global_step + 1):
                    yield batch, generator

    def _next_batch(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        """The next batch; None if a rank wants to stop."""
        batch, stop = None, False
        try:
            with self._watch.during("data", self.global_step + 1), self._stopping.waiting():
                batch = next(batches)
        except Interrupted:
            stop = True
        with self._watch.during("agree", self.global_step + 1):
            stop = self._stopping.agree(stop)
        return None if stop else batch

    def _remember(self) -> None:
        """Remembers what has to be saved if the run stops before the next step is done."""
        if self.global_step == self._first_step:
            return  # then nothing is saved
        random = {}
        if self.accelerator.gradient_accumulation_steps > 1:  # dropout draws from these
            random["cpu"] = torch.get_rng_state()
            if self.accelerator.device.type == "cuda":
                random["cuda"] = torch.cuda.get_rng_state()
        self._before_step = _BeforeStep(self._loader.state_dict(), self._batches_done, self.accelerator.step, random)

    def _leave(self) -> None:
        """Saves the state after the last step, unless it is saved; the run is finished with that."""
        self._stop = True
        if self.global_step == self._first_step:
            return
        if self._progress.has_steps:
            self.log()  # refuses values that are not finite
        if self._saved_at != self.global_step:
            before = self._before_step
            if not self._between_steps:
                before.restore(self.accelerator)
            self._batches_done = before.batches
            self._save(before.stream)

    def position(self) -> tuple[int, Mapping[str, Any]] | str:
        """For `Watch`, while the main thread hangs: `Rescue.position`."""
        step = self.global_step
        if step == self._first_step:
            return "no step is done yet"
        if self._saved_at == step:
            return f"step {step}, the last one that is done, is saved"
        if not _has_all_weights(self.accelerator):
            return "the weights are split over the ranks"
        if self.accelerator.device.type != "cpu":
            return "the device is still waiting, with steps of which it is not known how far they are done"
        if self.public_flags.get("dm_weight"):
            return "the fake score may be further than the student"
        if self._between_steps and self._watch.doing[0] not in ("data", "agree"):
            return step, self._loader.state_dict()
        return step, self._before_step.stream

    def save_alone(self, streams: Mapping[int, Mapping[str, Any]]) -> Path | None:
        """For `Watch`, while the main thread hangs, with a `position`: `Rescue.save_alone`."""
        if not self._between_steps:
            self._before_step.restore(self.accelerator)
        if not self._between_steps or self._watch.doing[0] in ("data", "agree"):
            self._batches_done = self._before_step.batches
        return self._checkpoints.save(self.global_step, self._run_json(), {}, alone=streams)

    def _on_failure(self, failure: WorkerError) -> None:
        alone = self.accelerator.num_processes == 1
        if self.global_step == self._first_step and (alone or self._loader.position is None):
            raise failure
        self._failure = failure  # after the step every rank stops
        logger.error("the data workers have failed: this process reads what the step needs, then the run stops")

    @property
    def finished(self) -> bool:
        """Whether the last step is done or the run has to stop."""
        return self._stop or self.global_step >= self._plan.steps

    def add_loss(self, loss: torch.Tensor, pictures: int) -> None:
        """Counts one batch: its loss (a scalar on the device) and its number of pictures."""
        self._progress.add(loss, pictures)

    def add_values(self, **values: torch.Tensor) -> None:
        """Counts further losses of one batch (scalars on the device), by the names under which they are logged."""
        self._progress.add_values(values)

    def skipped(self) -> bool:
        """Whether this batch ended without an optimizer step: one of several to accumulate, or an overflow in fp16."""
        if not self.accelerator.sync_gradients:
            return True
        self._between_steps = True
        if self.accelerator.optimizer_step_was_skipped:
            self._progress.skip(self.global_step)
            return True
        return False

    def step(self, grad_norm: torch.Tensor) -> Due:
        """Counts an optimizer step, with the norm of its gradients before clipping; returns what is due after it."""
        self.global_step += 1
        self._progress.step(grad_norm)
        step, launch = self.global_step, self._launch
        last = step == self._plan.steps
        if self._failure is not None:
            self._stopping.stop("the data workers have failed")
        self._stop = self._stopping.requested() and not last
        save = last or self._stop or step % launch.checkpointing_steps == 0
        return Due(
            log=save or step % launch.logging_steps == 0,
            save=save,
            validate=not self._stop and (last or step % self._validation.every == 0),
        )

    def log(self) -> None:
        """Logs the values since the last time; `DivergenceError` if loss or gradients are not finite."""
        self._progress.log(self.global_step, self._lr_scheduler)

    def save(self) -> None:
        """Writes a checkpoint. `SaveError` if it cannot be written and the run is about to stop."""
        self._save(self._loader.state_dict())

    def _save(self, stream_state: Mapping[str, Any]) -> None:
        with self._progress.paused(), self._watch.during("saving", self.global_step):
            saved = self._checkpoints.save(
                self.global_step,
                self._run_json(),
                stream_state,
                required=self._stop,
                last=self.global_step == self._plan.steps,
            )
        if saved is not None:
            self._saved_at = self.global_step

    def validate(self) -> None:
        """Generates the validation pictures, logs the distances and, with --keep_best, keeps the closest checkpoint."""
        with self._progress.paused(), self._watch.during("validating", self.global_step):
            distances = self._validation(self.global_step)
            self._progress.record(distances, self.global_step)
            if self._launch.keep_best:
                distance = distances["distance/student"]
                self._checkpoints.keep_if_best(distance, self.global_step, self._run_json(), self._loader.state_dict())

    def _run_json(self) -> dict[str, Any]:
        return {**self._record, "batches": self._batches_done}

    def finish(self) -> bool:
        """Closes the progress bar, the journal and the data loader; returns whether there is a result to export."""
        self._progress.close(self.global_step, self._stopping.reason)
        self._stopping.close()
        if self._launch.dry_run and not self._failure and self.global_step >= self._plan.steps:
            logger.info("dry run: shards, models, a training step and validation all work; nothing was written")
        return self.global_step >= self._plan.steps and not self._launch.dry_run

    def end(self) -> None:
        """Waits for all ranks, closes trackers and process group, then uploads the result; every rank calls it last.

        The upload comes after that, since it takes longer than the other ranks could wait. `WorkerError` if the run
        has stopped since its data workers failed.
        """
        self.accelerator.wait_for_everyone()
        finish_trackers(self.accelerator)
        end_training(self.accelerator)
        if self.hub:
            self.hub.push()
        if self._lock is not None:
            self._lock.release(remove=self._is_main)
        if self._failure is None:
            return
        if self._launch.dry_run:
            raise self._failure
        if self.global_step == self._plan.steps:
            logger.warning("%s (The result is not affected.)", self._failure)
            return
        raise WorkerError(
            f"{self._failure} The run is saved at step {self.global_step}: resume with --resume_from_checkpoint latest."
        )
