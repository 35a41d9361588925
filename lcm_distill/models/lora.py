"""LoRA students (LCM-LoRA, arXiv 2311.05556): one U-Net, which is the teacher while its adapter is off.

    lora = Lora(unet, rank=64, alpha=64)      unet(x) is the student
    with lora.off(): unet(x)                  the teacher
    with lora.target(): unet(x)               the target: the student, or a moving average of its adapter

Only the adapter trains, in float32; the U-Net under it may be in half precision.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from lcm_distill.distributed.finite import check_finite
from lcm_distill.environment import respect_umask
from lcm_distill.errors import UsageError
from lcm_distill.flags import LoraFlags
from lcm_distill.models.low_rank import LAYERS

# LCM-LoRA's: attention, feed-forward, convolutions and the residual blocks' time embeddings.
TARGET_MODULES = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip

STUDENT, TARGET = "student", "target"  # the adapters' names inside the U-Net
_FOLDERS = {STUDENT: "adapter", TARGET: "adapter_target"}  # in a checkpoint


def parse_target_modules(text: str | None, unet_config: Mapping[str, Any]) -> list[str]:
    """`--lora_target_modules` as a sorted list: module names joined by commas; None: LCM-LoRA's.

    A name stands for every module whose path ends in it. `UsageError` unless each name matches linear layers or
    convolutions of a U-Net of `unet_config`; no weights are loaded.
    """
    if text is None:
        return sorted(TARGET_MODULES)
    chosen = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(unet_config))
    for name in chosen:
        named = [m for path, m in unet.named_modules() if path == name or path.endswith(f".{name}")]
        if not named or not all(isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) for module in named):
            raise UsageError(
                f"--lora_target_modules {name}: the teacher's U-Net has no linear layers or convolutions of that name; "
                f"LCM-LoRA's are {','.join(TARGET_MODULES)}."
            )
    if not chosen:
        raise UsageError("--lora_target_modules names no module; leave it out for LCM-LoRA's.")
    return sorted(chosen)


@dataclasses.dataclass(frozen=True)
class AdapterShape:
    """What two adapters must share for one's weights to fit the other; `Lora` takes its fields."""

    rank: int
    alpha: int
    target_modules: list[str]
    average: bool  # whether the target is a second adapter, the moving average of the student's

    @classmethod
    def from_flags(cls, flags: LoraFlags, unet_config: Mapping[str, Any]) -> "AdapterShape":
        """The shape that the flags describe; `UsageError` if a U-Net of `unet_config` lacks --lora_target_modules."""
        assert flags.lora_alpha is not None  # the flags set it themselves where it is not given
        return cls(
            rank=flags.lora_rank,
            alpha=flags.lora_alpha,
            target_modules=parse_target_modules(flags.lora_target_modules, unet_config),
            average=flags.ema_decay > 0,
        )

    def architecture(self) -> dict[str, Any]:
        """The shape as checkpoints record it, by flag."""
        return {
            "--lora_rank": self.rank,
            "--lora_alpha": self.alpha,
            "--lora_target_modules": self.target_modules,
            "--ema_decay above 0": self.average,
        }

    def resumed(self, architecture: Mapping[str, Any]) -> "AdapterShape":
        """The shape with the alpha of a run's `architecture`, which is the checkpoint's if the flag is not given."""
        return dataclasses.replace(self, alpha=architecture["--lora_alpha"])


def add_adapter(unet: UNet2DConditionModel, config: LoraConfig, name: str) -> list[torch.nn.Parameter]:
    """Adds an adapter to `unet`, in place, whose weights are float32 and need no gradients; returns these weights.

    It changes nothing: its second factor is zero, and its first is drawn from PyTorch's global generator.
    """
    config._register_custom_module(LAYERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT's warning about a second adapter
        unet.add_adapter(config, adapter_name=name)
    added = [weight for path, weight in unet.named_parameters() if "lora_" in path and f".{name}." in path]
    for weight in added:
        weight.data = weight.data.float()
        weight.requires_grad_(False)
    return added


class Lora:
    """Adds an adapter to `unet`, in place, and freezes the U-Net's own weights.

    A new adapter changes nothing: its second factor is zero, and its first is drawn from PyTorch's global generator.
    With `average`, a second adapter with the same weights is the target. `dropout`, in [0, 1), is the adapter's, and
    applies to the student's pass only.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        *,
        rank: int,
        alpha: int,
        dropout: float = 0.0,
        target_modules: list[str] | None = None,
        average: bool = False,
    ):
        self.unet = unet
        self.config = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules or list(TARGET_MODULES)
        )
        unet.requires_grad_(False)
        unet.train()
        parameters = {STUDENT: add_adapter(unet, self.config, STUDENT)}
        if average:
            parameters[TARGET] = add_adapter(unet, self.config, TARGET)
            for parameter, source in zip(parameters[TARGET], parameters[STUDENT], strict=True):
                parameter.data = source.detach().clone()
        self.average = average
        self._parameters = parameters
        self._layers = [module for module in unet.modules() if isinstance(module, LoraLayer)]
        self._dropouts = [module for module in unet.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]
        unet.set_adapter(STUDENT)

    def begin_from(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Gives every adapter these weights: by module the first factor `[r, …]` and the second `[…, r]`, scaled.

        Modules without an entry stay as they are, and so do rows above r, of which the second factor is zero: neither
        changes anything at first. `UsageError` for modules that have no adapter, and for an r above the adapter's rank.
        """
        layers: dict[str, Any] = {
            path: module for path, module in self.unet.named_modules() if isinstance(module, LoraLayer)
        }
        if foreign := sorted(factors.keys() - layers.keys()):
            raise UsageError(
                f"--init_student changes {foreign[0]}, which has no adapter in this run; pass --lora_target_modules "
                "with every module that it changes, or leave that flag out."
            )
        rank = max((len(down) for down, _ in factors.values()), default=0)
        if rank > self.config.r:
            raise UsageError(f"--init_student has rank {rank}, more than --lora_rank {self.config.r}; raise that.")
        for path, (down, up) in factors.items():
            for adapter in self._parameters:
                layer = layers[path]
                layer.lora_A[adapter].weight.data[: len(down)] = down
                layer.lora_B[adapter].weight.data[:, : len(down)] = up / layer.scaling[adapter]

    def parameters(self, adapter: str = STUDENT) -> list[torch.nn.Parameter]:
        """The weights of one adapter, in the same order for all adapters."""
        return self._parameters[adapter]

    # Not PEFT's own switches: these also set requires_grad of every adapter in hundreds of layers, at each pass.

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the U-Net is the teacher: no adapter, no dropout."""
        with self._without_dropout():
            for layer in self._layers:
                layer._disable_adapters = True
            try:
                yield
            finally:
                for layer in self._layers:
                    layer._disable_adapters = False

    @contextlib.contextmanager
    def target(self) -> Iterator[None]:
        """Inside, the U-Net is the target: with the averaged adapter if it has one, and without dropout."""
        with self._without_dropout():
            self._activate(TARGET if self.average else STUDENT)
            try:
                yield
            finally:
                self._activate(STUDENT)

    def _activate(self, adapter: str) -> None:
        if self.average:
            for layer in self._layers:
                layer._active_adapter = [adapter]

    @contextlib.contextmanager
    def _without_dropout(self) -> Iterator[None]:
        modes = [module.training for module in self._dropouts]
        for module in self._dropouts:
            module.training = False
        try:
            yield
        finally:
            for module, mode in zip(self._dropouts, modes, strict=True):
                module.training = mode

    def state_dict(self, adapter: str = STUDENT) -> dict[str, torch.Tensor]:
        """One adapter's weights by PEFT's names, without the adapter's name: `down_blocks.0….lora_A.weight`.

        Contiguous, as files need them, whatever their memory format in the U-Net.
        """
        weights = get_peft_model_state_dict(self.unet, adapter_name=adapter)
        return {name: tensor.contiguous() for name, tensor in weights.items()}

    def part(self, adapter: str = STUDENT) -> "AdapterPart":
        """One adapter as a part of a checkpoint."""
        return AdapterPart(self, adapter)

    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds of it, by folder name: the student's adapter, and the target's if it has its own."""
        return {_FOLDERS[adapter]: self.part(adapter) for adapter in self._parameters}


def prepare_without_autocast(
    accelerator: Accelerator, unet: UNet2DConditionModel, optimizer: torch.optim.Optimizer
) -> tuple[Any, AcceleratedOptimizer]:
    """`accelerator.prepare(unet, optimizer)`, without the autocast that it wraps around the U-Net's forward pass.

    The U-Net is also the teacher, which in half precision runs without autocast: the training loop sets it itself.
    """
    prepared = accelerator.prepare(unet, optimizer)
    vars(unet).pop("forward", None)  # the wrapper, which full precision does not have
    return prepared


class AdapterPart:
    """An adapter as a part of a checkpoint, in PEFT's format: `PeftModel.from_pretrained(unet, folder)` loads it."""

    _PREFIX = "base_model.model."
    _FILE = "adapter_model.safetensors"

    def __init__(self, lora: Lora, adapter: str):
        self._lora, self._adapter = lora, adapter

    def save(self, folder: Path) -> None:
        """Saves it; `DivergenceError` if its values are not finite: then nothing is written."""
        check_finite(folder.name, self._lora.state_dict(self._adapter).items())
        folder.mkdir(parents=True, exist_ok=True)
        weights = {self._PREFIX + name: tensor for name, tensor in self._lora.state_dict(self._adapter).items()}
        save_file(weights, folder / self._FILE)
        respect_umask(folder / self._FILE)
        self._lora.config.save_pretrained(str(folder))

    def load(self, folder: Path) -> None:
        weights = load_file(folder / self._FILE)
        weights = {name.removeprefix(self._PREFIX): tensor for name, tensor in weights.items()}
        expected = self._lora.state_dict(self._adapter)
        if weights.keys() != expected.keys():
            raise ValueError(f"{folder}: the adapter has other modules than this run's")
        set_peft_model_state_dict(self._lora.unet, weights, adapter_name=self._adapter)
