"""Distribution matching in a run: the fake score that trains beside the student, and the losses of both.

    matching = DistributionMatching(...)                 after the student was prepared; without a fake score it is off
    if matching.begun(run.global_step):                  from --dm_start_step on
        dm_loss = matching.loss(x, …)                    of x, the student's answer, with its gradient
    …the student's backward pass…
        matching.train_fake_score(x, …)

`objective.matching` has the equations. With gradients accumulated over several batches the fake score learns from all
of them in each of its steps. On several ranks its gradients are averaged, as the student's are.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast

from lcm_distill.distributed.finite import check_finite, tensors_in
from lcm_distill.distributed.fsdp import is_split
from lcm_distill.errors import UsageError
from lcm_distill.flags import MatchingFlags, OptimizationFlags
from lcm_distill.models.fake_score import FakeScore
from lcm_distill.objective import matching as dm
from lcm_distill.objective.consistency import Conditioning, unet_output
from lcm_distill.objective.schedule import NoiseSchedule
from lcm_distill.run.accelerator import autocast_over
from lcm_distill.run.optim import build_optimizer, match_parameters
from lcm_distill.run.run import Run

logger = logging.getLogger(__name__)

_STATE = "training.pt"


def check_matching(flags: MatchingFlags, accelerator: Accelerator) -> None:
    """`UsageError` if distribution matching is asked for in a run that splits its networks over the ranks."""
    if flags.dm_weight and is_split(accelerator):
        raise UsageError(
            "--dm_weight is not supported with FSDP, which would split the fake score together with the teacher that "
            "it is an adapter of; launch with --multi_gpu or configs/zero2.yaml."
        )


@dataclasses.dataclass(frozen=True)
class _Batch:
    """What the fake score learns from: the student's answers, with the noise and timesteps of each of its steps."""

    x: torch.Tensor
    conditioning: Conditioning
    w_embedding: torch.Tensor | None
    timesteps: list[torch.Tensor]
    noises: list[torch.Tensor]


class DistributionMatching:
    """The fake score of a run, its optimizer, and both losses. Every rank has one and calls every method.

    Args:
        flags: its own.
        optimization: the run's, for everything but the learning rate.
        fake_score: None without --dm_weight: then nothing is made, and `begun` is always false.
        guided: `guided_prediction` of the teacher, as (noisy, timesteps, conditioning, unconditional, w).
        teacher_context: a context in which the network that it calls is the teacher.
        dtype: of the teacher's weights.
    """

    def __init__(
        self,
        run: Run,
        flags: MatchingFlags,
        optimization: OptimizationFlags,
        fake_score: FakeScore | None,
        schedule: NoiseSchedule,
        guided: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        teacher_context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        *,
        dtype: torch.dtype,
    ):
        self._run, accelerator = run, run.accelerator
        self._accelerator, self._flags, self._schedule, self._dtype = accelerator, flags, schedule, dtype
        self._guided, self._teacher_context = guided, teacher_context
        self._start = 0 if run.output_dir is None else flags.dm_start_step  # a dry run tries it at once
        self._fake_score = fake_score
        if fake_score is None:
            return
        self._batches: list[_Batch] = []
        self._max_grad_norm = optimization.max_grad_norm
        parameters = fake_score.parameters()
        fake_score.train()
        _replace([parameter.data for parameter in parameters], broadcast)
        fp16 = accelerator.mixed_precision == "fp16"
        self._optimizer = build_optimizer(parameters, optimization, flags.dm_learning_rate, fused=not fp16)
        self._scaler = torch.amp.GradScaler(accelerator.device.type, enabled=fp16)

    def begun(self, global_step: int) -> bool:
        """Whether the student is matched at this step."""
        return self._fake_score is not None and global_step >= self._start

    def loss(
        self,
        x: torch.Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning,
        w: torch.Tensor | float,
        w_embedding: torch.Tensor | None,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """The matching loss of x, the student's answers `[B, C, h, w]`: a float32 scalar."""
        assert self._fake_score is not None
        flags, schedule = self._flags, self._schedule
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        low, high = flags.dm_timesteps
        timesteps = dm.draw_timesteps(low, high, len(schedule), len(x), generator, x.device)
        noisy = schedule.add_noise(x.detach(), noise, timesteps)
        real_w = w if flags.dm_guidance_w is None else flags.dm_guidance_w
        with torch.no_grad():
            with autocast_over(self._accelerator, self._dtype), self._teacher_context():
                real, _ = self._guided(noisy, timesteps, conditioning, unconditional, real_w)
            with self._fake_score.active():
                output = self._output(noisy, timesteps, conditioning, w_embedding)
        loss = dm.matching_loss(x, real, schedule.predict_x0(output, noisy, timesteps))
        self._run.add_values(dm_loss=loss)
        return loss

    def train_fake_score(
        self, x: torch.Tensor, conditioning: Conditioning, w_embedding: torch.Tensor | None, generator: torch.Generator
    ) -> None:
        """Trains the fake score on x, the student's answers: --dm_steps steps once the last accumulated batch is in."""
        steps = range(self._flags.dm_steps)
        x, total = x.detach(), len(self._schedule)
        timesteps = [dm.draw_timesteps(0, 1, total, len(x), generator, x.device) for _ in steps]
        noises = [torch.randn(x.shape, generator=generator, device=x.device) for _ in steps]
        self._batches.append(_Batch(x, conditioning, w_embedding, timesteps, noises))
        if self._accelerator.sync_gradients:
            for step in steps:
                self._run.add_values(fake_score_loss=self._step(step))
            self._batches.clear()

    def _step(self, step: int) -> torch.Tensor:
        """One optimizer step of the fake score on the batches that were collected; the mean of their losses."""
        assert self._fake_score is not None
        mean = torch.zeros((), device=self._accelerator.device)
        with self._fake_score.active():  # around the backward pass, too, which may recompute the forward pass
            for batch in self._batches:
                timesteps, noise = batch.timesteps[step], batch.noises[step]
                noisy = self._schedule.add_noise(batch.x, noise, timesteps)
                output = self._output(noisy, timesteps, batch.conditioning, batch.w_embedding)
                epsilon = self._schedule.predict_epsilon(output, noisy, timesteps)
                loss = dm.denoising_loss(epsilon, noise) / len(self._batches)
                self._scaler.scale(loss).backward()
                mean += loss.detach()
        parameters = self._fake_score.parameters()
        if self._accelerator.num_processes > 1:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            _replace(gradients, partial(self._accelerator.reduce, reduction="mean"))
        self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        return mean

    def _output(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, w_embedding: torch.Tensor | None
    ) -> torch.Tensor:
        assert self._fake_score is not None
        embedding = w_embedding if self._fake_score.takes_guidance else None
        with self._accelerator.autocast():
            return unet_output(self._fake_score.unet, noisy, timesteps, conditioning, embedding, dtype=self._dtype)

    def parts(self) -> dict[str, "DistributionMatching"]:
        """What a checkpoint holds of it, by folder name."""
        return {} if self._fake_score is None else {"fake_score": self}

    def save(self, folder: Path) -> None:
        """Saves the fake score and its optimizer; the main process writes."""
        assert self._fake_score is not None
        if PartialState().is_main_process:
            state = {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}
            check_finite(f"{folder.name}/{_STATE}", tensors_in(state["optimizer"]["state"]))
            self._fake_score.save(folder)
            torch.save(state, folder / _STATE)

    def load(self, folder: Path) -> None:
        """Loads what `save` saved; the settings of the optimizer stay the flags'. Without it, the fake score is new."""
        assert self._fake_score is not None
        if not folder.is_dir():
            logger.info("the checkpoint holds no fake score: it starts as the teacher")
            return
        self._fake_score.load(folder)
        saved = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
        own = self._optimizer.state_dict()
        self._optimizer.load_state_dict(own | {"state": saved["optimizer"]["state"]})
        for group in self._optimizer.param_groups:
            match_parameters(self._optimizer, group)
        if saved["scaler"]:  # empty without fp16
            self._scaler.load_state_dict(saved["scaler"])


def _replace(tensors: list[torch.Tensor], function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replaces the tensors' values by `function` of all of them, as one vector: one message to the other ranks."""
    vector = function(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    for tensor, values in zip(tensors, vector.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view(tensor.shape))
