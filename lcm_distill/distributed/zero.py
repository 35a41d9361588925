"""Optimizer state and gradients of a full student split over the ranks (DeepSpeed's ZeRO-2).

Every rank holds all the networks, as with DDP, but of the student's gradients, of its optimizer's state and of a copy
of its weights that the optimizer works on only a slice. On the disk everything is whole: a checkpoint can be resumed
on another number of ranks, and with or without ZeRO. What trains is float32: DeepSpeed's own half precision, which
would make the student's weights bf16, stays off, and bf16 is autocast as everywhere else.

To Accelerate such a run is one of DDP. Its own part for DeepSpeed would switch autocast off for target and teacher,
let the launcher's file decide on accumulation and clipping, and write the student into each checkpoint a second time.
"""

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import compare_versions, is_deepspeed_available, patch_environment
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from diffusers import UNet2DConditionModel

from lcm_distill.errors import UsageError

_VERSION = "0.18.5"  # 0.18.0 gets accumulated gradients wrong
_STATE = ("exp_avg", "exp_avg_sq")
_BUCKET = 50_000_000  # elements that are reduced and gathered at a time: 200 MB; DeepSpeed's 500 million would be 2 GB


def asks_for_deepspeed() -> bool:
    """Whether `accelerate launch` was told to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


class ZeroAccelerator(Accelerator):
    """An `Accelerator` whose one network and its optimizer `prepare_zero` gives to DeepSpeed."""

    zero_engine: Any  # of DeepSpeed

    def __init__(self, *, gradient_accumulation_steps: int, **kwargs: Any):
        # The launcher would have the accumulation be 1 whatever the program's flag says.
        steps = str(gradient_accumulation_steps)
        with patch_environment(ACCELERATE_USE_DEEPSPEED="false", ACCELERATE_GRADIENT_ACCUMULATION_STEPS=steps):
            super().__init__(gradient_accumulation_steps=gradient_accumulation_steps, **kwargs)

    def no_sync(self, model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        """Nothing: gradients are summed over the ranks behind every batch, since each rank keeps a slice alone."""
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        self.zero_engine.set_gradient_accumulation_boundary(self.sync_gradients)
        self.zero_engine.backward(loss)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: int = 2) -> torch.Tensor:
        """Clips the gradients and takes the optimizer's step, which DeepSpeed does in one; the norm before clipping.

        Infinite, and no step taken, where a gradient is not finite.
        """
        self.zero_engine.optimizer.clip_grad = max_norm
        self.zero_engine.step()
        return torch.as_tensor(self.zero_engine.get_global_grad_norm(), device=self.device)


def check_zero(accelerator: ZeroAccelerator, *, can_split: bool) -> None:
    """`UsageError` unless program, precision and DeepSpeed's settings are those that ZeRO-2 is done for."""
    if not can_split:
        raise UsageError(
            "`accelerate config` asks for DeepSpeed, which only the full students need: the LoRA programs train too "
            "few weights to split; launch with --multi_gpu."
        )
    if not is_deepspeed_available() or compare_versions("deepspeed", "<", _VERSION):
        raise UsageError(
            f"`accelerate config` asks for DeepSpeed, which is not installed, or is older than {_VERSION}: "
            f'pip install "deepspeed>={_VERSION}"'
        )
    if accelerator.mixed_precision == "fp16":
        raise UsageError("--mixed_precision fp16 does not go with DeepSpeed; take bf16.")
    wrong = {
        "zero_stage": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2", "set it to 2, or take configs/fsdp2.yaml to split more"),
        "offload_optimizer_device": ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none", "leave it out"),
        "offload_param_device": ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none", "leave it out"),
        "deepspeed_config_file": ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none", "leave it out (configs/zero2.yaml)"),
    }
    for name, (variable, right, remedy) in wrong.items():
        if os.environ.get(variable, right) != right:
            raise UsageError(f"`accelerate config` sets {name} to what this program does not do: {remedy}.")


def prepare_zero(
    accelerator: ZeroAccelerator, network: UNet2DConditionModel, optimizer: torch.optim.Optimizer
) -> tuple[Any, DeepSpeedOptimizerWrapper]:
    """`accelerator.prepare(network, optimizer)` by DeepSpeed; `network` keeps its parameters, in another memory."""
    if not isinstance(optimizer, torch.optim.AdamW):
        raise UsageError("--use_8bit_adam does not go with DeepSpeed, which splits the optimizer's state; leave it.")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator.zero_engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,  # asked for, but only used to report a throughput
            "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
            "steps_per_print": None,
            "torch_autocast": {
                "enabled": accelerator.mixed_precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # those whose gradients would be summed over the ranks in bf16
            },
            "zero_optimization": {
                "stage": 2,
                "overlap_comm": True,
                "reduce_bucket_size": _BUCKET,
                "allgather_bucket_size": _BUCKET,
            },
        },
    )
    return accelerator.zero_engine, DeepSpeedOptimizerWrapper(accelerator.zero_engine.optimizer)


class ZeroOptimizer:
    """The state of an optimizer that `prepare_zero` split, as a part of a checkpoint: the file of a whole AdamW.

    Every rank calls its methods. The main process holds the whole state in the CPU's memory while it saves.
    """

    def __init__(self, optimizer: DeepSpeedOptimizerWrapper):
        self._zero = optimizer.optimizer
        (self._parameters,) = self._zero.bit16_groups  # so named whatever their dtype
        (self._slice,) = self._zero.single_partition_of_fp32_groups

    def save(self, file: Path) -> None:
        from deepspeed.utils import safe_get_full_optimizer_state

        is_main = PartialState().is_main_process
        (group,) = self._zero.param_groups
        step = self._zero.optimizer.state[self._slice]["step"].cpu()
        gathered: dict[int, dict[str, Any]] = {}
        for index, parameter in enumerate(self._parameters):
            gathered[index] = {"step": step.clone()}  # one tensor for all, AdamW would count up once for each
            for name in _STATE:
                value = safe_get_full_optimizer_state(parameter, name)  # every rank takes part, lets go of it at once
                if is_main:
                    gathered[index][name] = value.cpu()
        if is_main:
            groups = [group | {"params": list(range(len(self._parameters)))}]
            torch.save({"state": gathered, "param_groups": groups}, file)

    def load(self, file: Path) -> None:
        """The settings of a group (its learning rate, …) are left as they are."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_set_full_optimizer_state

        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)["state"]  # a rank reads its slice
        self._zero.refresh_fp32_params()  # the slice of the weights: the network's have been loaded before
        state = self._zero.optimizer.state
        state[self._slice] = {name: torch.zeros_like(self._slice, requires_grad=False) for name in _STATE}
        state[self._slice]["step"] = saved[0]["step"].to(self._slice.device)
        lazy_init_hp_params_optimizer_state(self._parameters, self._slice, state)
        for index, parameter in enumerate(self._parameters):
            for name in _STATE:
                safe_set_full_optimizer_state(parameter, saved[index][name], name)
