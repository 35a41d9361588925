"""Networks split over the ranks (FSDP2), and the same calls for runs that do not split them: one process, DDP, ZeRO-2.

A split network's parameters are DTensors: each rank holds a slice of every one. `fully_shard` gathers a unit's
parameters just before its forward or backward pass and frees them right after, so that a rank needs memory for its
slices and for one unit; gradients, optimizer state and the moving average exist as slices only. Files hold complete
tensors: a checkpoint can be resumed on another number of ranks, and with or without FSDP.
"""

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, disable_fsdp_ram_efficient_loading
from diffusers import UNet2DConditionModel
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lcm_distill.distributed.compiling import BLOCKS
from lcm_distill.distributed.finite import check_finite, tensors_in
from lcm_distill.distributed.zero import ZeroAccelerator, ZeroOptimizer, check_zero, prepare_zero
from lcm_distill.environment import respect_umask
from lcm_distill.errors import UsageError


def configure_engine(accelerator: Accelerator, *, can_split: bool) -> None:
    """Completes Accelerate's setup of FSDP or DeepSpeed; `UsageError` for settings that the program does not support.

    `can_split`: whether the program can split what it trains over the ranks.
    """
    if _asks_for_fsdp() and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate silently ignores FSDP on CPUs, although PyTorch supports it there too.
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
            raise UsageError(f"`accelerate config` sets {name} to a value that is not supported: {remedy}.")
    if accelerator.mixed_precision == "fp16":
        raise UsageError("--mixed_precision fp16 is not supported with FSDP; use bf16.")
    # RAM-efficient loading leaves Transformers' models, here the text encoders, which are not split, empty on all ranks
    # but one.
    disable_fsdp_ram_efficient_loading()


def _asks_for_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def is_split(accelerator: Accelerator) -> bool:
    """Whether the run splits its networks over the ranks: then all ranks must generate and save together."""
    return accelerator.distributed_type == DistributedType.FSDP


def all_ranks_save(accelerator: Accelerator) -> bool:
    """Whether every rank takes part in saving, because networks or the optimizer's state are split over the ranks."""
    return is_split(accelerator) or isinstance(accelerator, ZeroAccelerator)


def device_before_split(accelerator: Accelerator) -> torch.device:
    """Where to keep a network that `split` receives next: the CPU if it will be split, else the run's device."""
    return torch.device("cpu") if is_split(accelerator) else accelerator.device


def split(accelerator: Accelerator, *networks: UNet2DConditionModel) -> None:
    """Splits each network over the ranks, in place, if the run does so at all; call it before building an optimizer.

    In bf16 the parameters of a unit are gathered in bf16, which halves the traffic; slices, their gradients and the
    sums of gradients over the ranks stay float32. Split networks are on the accelerator's device, and cannot be copied.
    """
    if is_split(accelerator) or isinstance(accelerator, ZeroAccelerator):  # neither preserves channels-last
        for parameter in itertools.chain.from_iterable(network.parameters() for network in networks):
            parameter.data = parameter.data.contiguous()
    if not is_split(accelerator):
        return
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    half = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for network in networks:
        trains = any(parameter.requires_grad for parameter in network.parameters())
        # A frozen network has no backward pass to free what its forward pass has gathered.
        reshard = accelerator.state.fsdp_plugin.reshard_after_forward if trains else True
        # The rest of a U-Net (first and last convolution, embeddings, down- and upsamplers) is one more unit.
        units = [module for module in network.modules() if type(module).__name__ in BLOCKS]
        for module in [*units, network]:
            fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)


def prepare_for_training(
    accelerator: Accelerator, network: UNet2DConditionModel, optimizer: torch.optim.Optimizer
) -> tuple[Any, AcceleratedOptimizer]:
    """`accelerator.prepare(network, optimizer)`, for a network that `split` may have split, and for ZeRO.

    With FSDP, Accelerate's own would split the network its own way, and save it in each checkpoint a second time.
    """
    if isinstance(accelerator, ZeroAccelerator):
        return prepare_zero(accelerator, network, optimizer)
    if not is_split(accelerator):
        return accelerator.prepare(network, optimizer)
    if type(optimizer).__module__.startswith("bitsandbytes"):
        raise UsageError(
            "--use_8bit_adam is not supported with FSDP, which splits the optimizer's state; leave it out."
        )
    return network, AcceleratedOptimizer(optimizer, device_placement=False)


def free_gathered(network: torch.nn.Module) -> None:
    """Frees parameters that a forward pass without a backward pass has left gathered; nothing if it is not split."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The complete tensor, on every rank; every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_network(network: UNet2DConditionModel, name: str, *, largest: float = math.inf) -> None:
    """`DivergenceError`, which calls it `name`, if values of a network are not finite, or beyond ±`largest`.

    The main process looks; if the network is split, every rank must call it, and all raise.
    """
    together = _is_split_over_ranks(network)
    if together or PartialState().is_main_process:
        check_finite(name, network.state_dict().items(), largest=largest, together=together)


def save_network(network: UNet2DConditionModel, *folders: Path) -> None:
    """Saves a complete network, as Diffusers does, from the main process. If it is split, every rank must call it.

    For a split network the main process needs CPU memory for all of it, and each rank memory for one complete weight.
    `DivergenceError` if its values are not finite: then nothing is written.
    """
    check_network(network, folders[0].name)
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
            respect_umask(*folder.glob("*.safetensors"))


def load_network(network: UNet2DConditionModel, folder: Path) -> None:
    """Loads weights that `save_network` saved, whether the network is split or not, and whether it was then.

    From safetensors alone: Diffusers would take a pickle if there are none, and read the folder's config.
    """
    state: dict[str, torch.Tensor] = {}
    for file in _weight_files(folder):
        state |= load_file(file)
    if _is_split_over_ranks(network):
        own = network.state_dict()
        state = {name: _split_like(tensor, own[name]) for name, tensor in state.items()}
    network.load_state_dict(state)


def _weight_files(folder: Path) -> list[Path]:
    """The files of a network that Diffusers saved: one, or those in its index. `ValueError` for another index."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return [folder / SAFETENSORS_WEIGHTS_NAME]
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise ValueError(f"{index.name} names other files than .safetensors in its folder")
    return [folder / name for name in names]


class SplitOptimizer:
    """The optimizer of a split network as a part of a checkpoint: the same file that Accelerate writes without FSDP.

    Every rank must call its methods. While saving, the main process holds the complete state in CPU memory.
    """

    def __init__(self, optimizer: AcceleratedOptimizer):
        self._optimizer = optimizer.optimizer

    def save(self, file: Path) -> None:
        is_main = PartialState().is_main_process
        state = self._optimizer.state_dict()
        check_finite(file.name, tensors_in(state["state"]), together=True)
        gathered: dict[int, dict[str, Any]] = {}
        for index, values in state["state"].items():
            gathered[index] = {}
            for name, value in values.items():
                value = gather(value)  # by all ranks; freed at once on the others
                if is_main:
                    gathered[index][name] = value.cpu()
        if is_main:
            torch.save(state | {"state": gathered}, file)

    def load(self, file: Path) -> None:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)  # each rank reads its slices only
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
    """The optimizer as a part of a checkpoint, by file name; empty where Accelerate saves it itself."""
    if isinstance(accelerator, ZeroAccelerator):
        return {"optimizer.bin": ZeroOptimizer(optimizer)}
    return {"optimizer.bin": SplitOptimizer(optimizer)} if is_split(accelerator) else {}


def _is_split_over_ranks(network: torch.nn.Module) -> bool:
    return isinstance(network, FSDPModule)


def _split_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's slice of a complete `tensor`, split as `like` is; no communication."""
    if not isinstance(like, DTensor):
        return tensor
    split = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return split.clone()  # or the slice would keep the complete tensor alive
