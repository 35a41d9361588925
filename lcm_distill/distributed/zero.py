"""Optimizer state and gradients of a full student split over the ranks (DeepSpeed's ZeRO-2).

Every rank holds all networks, as with DDP, but only a slice of the student's gradients, of its optimizer's state and of
the float32 copy of its weights that the optimizer updates. Files hold complete tensors: a checkpoint can be resumed on
another number of ranks, and with or without ZeRO. What trains is float32: DeepSpeed's own bf16 mode, which would make
the student's weights bf16, stays off, and bf16 is autocast as in every other run.

To Accelerate such a run looks like DDP. Accelerate's own DeepSpeed integration would switch autocast off for target and
teacher, take accumulation and clipping from the launcher's file, and save the student in each checkpoint a second time.
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

from lcm_distill.distributed.finite import check_finite, tensors_in
from lcm_distill.errors import UsageError

_MIN_VERSION = "0.18.5"  # 0.18.0 computes accumulated gradients wrong
_STATE = ("exp_avg", "exp_avg_sq")
_BUCKET = 50_000_000  # elements reduced and gathered at a time: 200 MB; DeepSpeed's default, 500 million, would be 2 GB


def asks_for_deepspeed() -> bool:
    """Whether `accelerate launch` is configured for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


class ZeroAccelerator(Accelerator):
    """An `Accelerator` for one trained network and its optimizer, which `prepare_zero` hands over to DeepSpeed."""

    zero_engine: Any  # DeepSpeedEngine

    def __init__(self, *, gradient_accumulation_steps: int, **kwargs: Any):
        # Or the launcher's environment would set the accumulation to 1, whatever the program's flag.
        steps = str(gradient_accumulation_steps)
        with patch_environment(ACCELERATE_USE_DEEPSPEED="false", ACCELERATE_GRADIENT_ACCUMULATION_STEPS=steps):
            super().__init__(gradient_accumulation_steps=gradient_accumulation_steps, **kwargs)

    def no_sync(self, model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        """Does nothing: gradients are summed over the ranks after every batch, since each rank keeps only a slice."""
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        self.zero_engine.set_gradient_accumulation_boundary(self.sync_gradients)
        self.zero_engine.backward(loss)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: int = 2) -> torch.Tensor:
        """Clips the gradients and takes the optimizer's step, which DeepSpeed does in one call; returns the norm.

        The norm is that before clipping; if a gradient is not finite, it is infinite and no step is taken.
        """
        self.zero_engine.optimizer.clip_grad = max_norm
        self.zero_engine.step()
        return torch.as_tensor(self.zero_engine.get_global_grad_norm(), device=self.device)


def check_zero(accelerator: ZeroAccelerator, *, can_split: bool) -> None:
    """`UsageError` unless program, precision and DeepSpeed's version and settings are supported."""
    if not can_split:
        raise UsageError(
            "`accelerate config` asks for DeepSpeed, which only the full students need: the LoRA programs train too "
            "few weights to split; launch with --multi_gpu."
        )
    if not is_deepspeed_available() or compare_versions("deepspeed", "<", _MIN_VERSION):
        raise UsageError(
            f"`accelerate config` asks for DeepSpeed, which is not installed, or is older than {_MIN_VERSION}: "
            f'pip install "deepspeed>={_MIN_VERSION}"'
        )
    if accelerator.mixed_precision == "fp16":
        raise UsageError("--mixed_precision fp16 is not supported with DeepSpeed; use bf16.")
    supported = {
        "zero_stage": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2", "set it to 2, or use configs/fsdp2.yaml to split more"),
        "offload_optimizer_device": ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none", "leave it out"),
        "offload_param_device": ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none", "leave it out"),
        "deepspeed_config_file": ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none", "leave it out (configs/zero2.yaml)"),
    }
    for name, (variable, expected, remedy) in supported.items():
        if os.environ.get(variable, expected) != expected:
            raise UsageError(f"`accelerate config` sets {name} to a value that is not supported: {remedy}.")


def prepare_zero(
    accelerator: ZeroAccelerator, network: UNet2DConditionModel, optimizer: torch.optim.Optimizer
) -> tuple[Any, DeepSpeedOptimizerWrapper]:
    """`accelerator.prepare(network, optimizer)` by DeepSpeed, which moves the parameters into its own buffer."""
    if not isinstance(optimizer, torch.optim.AdamW):
        raise UsageError(
            "--use_8bit_adam is not supported with DeepSpeed, which splits the optimizer's state; leave it out."
        )
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator.zero_engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,  # required, but used for throughput logs only
            "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
            "steps_per_print": None,
            "torch_autocast": {
                "enabled": accelerator.mixed_precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # modules whose gradients would be summed over the ranks in bf16
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
    """An optimizer that `prepare_zero` split, as a part of a checkpoint: the same file as of an AdamW without ZeRO.

    Every rank must call its methods. While saving, the main process holds the complete state in CPU memory.
    """

    def __init__(self, optimizer: DeepSpeedOptimizerWrapper):
        self._zero = optimizer.optimizer
        (self._parameters,) = self._zero.bit16_groups  # the name is the same for every dtype
        (self._slice,) = self._zero.single_partition_of_fp32_groups

    def save(self, file: Path) -> None:
        from deepspeed.utils import safe_get_full_optimizer_state

        is_main = PartialState().is_main_process
        check_finite(file.name, tensors_in(self._zero.optimizer.state[self._slice]), together=True)
        (group,) = self._zero.param_groups
        step = self._zero.optimizer.state[self._slice]["step"].cpu()
        gathered: dict[int, dict[str, Any]] = {}
        for index, parameter in enumerate(self._parameters):
            gathered[index] = {"step": step.clone()}  # a shared tensor would be counted up once per parameter
            for name in _STATE:
                value = safe_get_full_optimizer_state(parameter, name)  # by all ranks; freed at once
                if is_main:
                    gathered[index][name] = value.cpu()
        if is_main:
            groups = [group | {"params": list(range(len(self._parameters)))}]
            torch.save({"state": gathered, "param_groups": groups}, file)

    def load(self, file: Path) -> None:
        """Loads the state; the settings of the parameter groups (learning rate, …) stay as they are."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_set_full_optimizer_state

        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)["state"]  # read lazily
        self._zero.refresh_fp32_params()  # this rank's slice of the weights, which the network has loaded before
        state = self._zero.optimizer.state
        state[self._slice] = {name: torch.zeros_like(self._slice, requires_grad=False) for name in _STATE}
        state[self._slice]["step"] = saved[0]["step"].to(self._slice.device)
        lazy_init_hp_params_optimizer_state(self._parameters, self._slice, state)
        for index, parameter in enumerate(self._parameters):
            for name in _STATE:
                safe_set_full_optimizer_state(parameter, saved[index][name], name)
