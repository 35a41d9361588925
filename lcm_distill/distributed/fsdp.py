"""Networks split over the ranks (FSDP2), and the same calls for what leaves them whole: one process, DDP, ZeRO-2.

A split network's parameters are DTensors: each rank holds a slice of every one. `fully_shard` gathers a unit's
parameters just before its forward or backward pass and frees them right after, so that a rank needs memory for its
slices and for one unit; gradients, optimizer state and the moving average exist as slices only. On the disk everything
is whole: a checkpoint can be resumed on another number of ranks, and with or without FSDP.
"""

import itertools
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, disable_fsdp_ram_efficient_loading
from diffusers import UNet2DConditionModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lcm_distill.distributed.compiling import BLOCKS
from lcm_distill.distributed.zero import ZeroAccelerator, ZeroOptimizer, check_zero, prepare_zero
from lcm_distill.errors import UsageError


def settle_engine(accelerator: Accelerator, *, can_split: bool) -> None:
    """Readies Accelerate's engine; `UsageError` for one that the program does not run on.

    `can_split` says whether the program can split what it trains over the ranks.
    """
    if _asks_for_fsdp() and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate passes over FSDP on CPUs without a word, although PyTorch does it there too.
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if isinstance(accelerator, ZeroAccelerator):
        check_zero(accelerator, can_split=can_split)
    if not is_split(accelerator):
        return
    if not can_split:
        raise UsageError(
            "`accelerate config` asks for FSDP, which only the full students need: the LoRA programs train too few "
            "weights to split; launch with --multi_gpu."
        )
    plugin = accelerator.state.fsdp_plugin
    wrong = {
        "fsdp_version": plugin.fsdp_version != 2 and "set it to 2 (configs/fsdp2.yaml)",
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy) and "leave it out",
        "fsdp_activation_checkpointing": plugin.activation_checkpointing and "pass --gradient_checkpointing instead",
    }
    for name, remedy in wrong.items():
        if remedy:
            raise UsageError(f"`accelerate config` sets {name} to what this program does not do: {remedy}.")
    if accelerator.mixed_precision == "fp16":
        raise UsageError("--mixed_precision fp16 does not go with FSDP; take bf16.")
    # With it, Transformers would load the text encoders, which are not split, as empty on all ranks but one.
    disable_fsdp_ram_efficient_loading()


def _asks_for_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def is_split(accelerator: Accelerator) -> bool:
    """Whether the run splits its networks: then what uses them (drawing, saving) is done by all ranks together."""
    return accelerator.distributed_type == DistributedType.FSDP


def saves_together(accelerator: Accelerator) -> bool:
    """Whether every rank takes part in saving, because networks or the optimizer's state are split over them."""
    return is_split(accelerator) or isinstance(accelerator, ZeroAccelerator)


def whole_device(accelerator: Accelerator) -> torch.device:
    """Where to hold whole networks: on the run's device, or in the CPU's memory when `split` splits them next."""
    return torch.device("cpu") if is_split(accelerator) else accelerator.device


def split(accelerator: Accelerator, *networks: UNet2DConditionModel) -> None:
    """Splits each network over the ranks, in place, if the run shards at all; before an optimizer is built.

    In mixed precision units are gathered in it, which halves the traffic; slices, their gradients and the sums of
    gradients over the ranks keep float32. The networks are then on the accelerator's device and cannot be copied.
    """
    if is_split(accelerator) or isinstance(accelerator, ZeroAccelerator):  # neither keeps another layout
        for parameter in itertools.chain.from_iterable(network.parameters() for network in networks):
            parameter.data = parameter.data.contiguous()
    if not is_split(accelerator):
        return
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    half = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for network in networks:
        trains = any(parameter.requires_grad for parameter in network.parameters())
        # A frozen network has no backward pass that would free what its forward pass gathered.
        reshard = accelerator.state.fsdp_plugin.reshard_after_forward if trains else True
        # What is left of a U-Net (convolutions at its ends, embeddings, samplers) is one unit more.
        units = [module for module in network.modules() if type(module).__name__ in BLOCKS]
        for module in [*units, network]:
            fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)


def prepare_for_training(
    accelerator: Accelerator, network: UNet2DConditionModel, optimizer: torch.optim.Optimizer
) -> tuple[Any, AcceleratedOptimizer]:
    """`accelerator.prepare(network, optimizer)`, for a network that `split` may have split, or for ZeRO.

    Accelerate itself would split the network by its own rules, and write it into each checkpoint a second time.
    """
    if isinstance(accelerator, ZeroAccelerator):
        return prepare_zero(accelerator, network, optimizer)
    if not is_split(accelerator):
        return accelerator.prepare(network, optimizer)
    if type(optimizer).__module__.startswith("bitsandbytes"):
        raise UsageError("--use_8bit_adam does not go with FSDP, which splits the optimizer's state already; leave it.")
    return network, AcceleratedOptimizer(optimizer, device_placement=False)


def release(network: torch.nn.Module) -> None:
    """Frees what a forward pass without a backward pass, as drawing does, has left gathered."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in one piece, on every rank; every rank calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_whole(network: UNet2DConditionModel, *folders: Path) -> None:
    """Saves a network in one piece, as Diffusers does, from the main process. Every rank calls it if it is split.

    The main process then holds the whole network in the CPU's memory, and each rank one whole weight at a time.
    """
    is_main = PartialState().is_main_process
    if _is_split_over_ranks(network):
        state = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if is_main:
            with torch.device("meta"):
                network = UNet2DConditionModel.from_config(network.config)
            network.load_state_dict(state, assign=True)
    if is_main:
        for folder in folders:
            network.save_pretrained(folder)


def load_whole(network: UNet2DConditionModel, folder: Path) -> None:
    """Loads weights that `save_whole` saved, whether or not the network is split now or was then."""
    state = UNet2DConditionModel.from_pretrained(folder).state_dict()
    if _is_split_over_ranks(network):
        own = network.state_dict()
        state = {name: _split_like(tensor, own[name]) for name, tensor in state.items()}
    network.load_state_dict(state)


class SplitOptimizer:
    """The state of a split network's optimizer as a part of a checkpoint: the file that Accelerate writes otherwise.

    Every rank calls its methods. The main process holds the whole state in the CPU's memory while it saves.
    """

    def __init__(self, optimizer: AcceleratedOptimizer):
        self._optimizer = optimizer.optimizer

    def save(self, file: Path) -> None:
        is_main = PartialState().is_main_process
        state = self._optimizer.state_dict()
        gathered: dict[int, dict[str, Any]] = {}
        for index, values in state["state"].items():
            gathered[index] = {}
            for name, value in values.items():
                value = whole(value)  # every rank takes part, and lets go of it at once
                if is_main:
                    gathered[index][name] = value.cpu()
        if is_main:
            torch.save(state | {"state": gathered}, file)

    def load(self, file: Path) -> None:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)  # a rank reads its slices alone
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        state["state"] = {
            index: {
                name: _split_like(value, parameters[index]) if value.shape == parameters[index].shape else value
                for name, value in values.items()
            }
            for index, values in state["state"].items()
        }
        self._optimizer.load_state_dict(state)


def optimizer_parts(accelerator: Accelerator, optimizer: AcceleratedOptimizer) -> dict[str, Any]:
    """What a checkpoint must hold beside the networks: nothing where Accelerate saves the optimizer itself."""
    if isinstance(accelerator, ZeroAccelerator):
        return {"optimizer.bin": ZeroOptimizer(optimizer)}
    return {"optimizer.bin": SplitOptimizer(optimizer)} if is_split(accelerator) else {}


def _is_split_over_ranks(network: torch.nn.Module) -> bool:
    return isinstance(network, FSDPModule)


def _split_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's slice of a whole tensor, split as `like` is; no rank waits for another."""
    if not isinstance(like, DTensor):
        return tensor
    split = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return split.clone()  # of a whole that can then go
