"""The fake score of distribution matching: the teacher's U-Net with one more adapter (`objective.matching`).

    fake_score = FakeScore(unet, rank=64)     unet(x) is what it was before
    with fake_score.active(): unet(x)         the fake score

A full student has a teacher beside it, which gets the adapter; a LoRA student and its teacher are one U-Net, which gets
one more. So the fake score adds no second U-Net to the memory. Only the adapter trains, in float32.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from lcm_distill.distributed.finite import check_finite
from lcm_distill.environment import respect_umask
from lcm_distill.errors import UsageError
from lcm_distill.flags import MatchingFlags
from lcm_distill.models.lora import TARGET_MODULES, add_adapter

ADAPTER = "fake_score"  # its name inside the U-Net
_PROJECTION = "time_embedding.cond_proj.weight"


def _layers_of(unet: UNet2DConditionModel) -> list[LoraLayer]:
    return [module for module in unet.modules() if isinstance(module, LoraLayer)]


def _add_projection(unet: UNet2DConditionModel, width: int) -> torch.nn.Parameter:
    """Lets `unet` take a guidance embedding of this width if it is given one; the projection's weight, zero, frozen."""
    embedding = unet.time_embedding
    inner = embedding.linear_1.in_features
    embedding.cond_proj = torch.nn.Linear(width, inner, bias=False, device=unet.device).requires_grad_(False)
    torch.nn.init.zeros_(embedding.cond_proj.weight)
    return embedding.cond_proj.weight


class FakeScore:
    """Adds the adapter to `unet`, in place: a frozen teacher, or one with a `Lora`, whose modules it has to share.

    It starts as the teacher without guidance: the adapter's second factor is zero, the first is drawn from PyTorch's
    global generator. With `time_cond_proj_dim` it takes a guidance embedding, as a full student does, whose projection
    starts at zero. Its weights need gradients only from `train` on, so that a DDP around the U-Net, which wants a
    gradient for each weight that needs one, can be created before.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        *,
        rank: int,
        target_modules: list[str] | None = None,
        time_cond_proj_dim: int | None = None,
    ):
        self.unet = unet
        trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        idle = [layer._active_adapter for layer in _layers_of(unet)]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=target_modules or list(TARGET_MODULES))
        self._parameters = add_adapter(unet, config, ADAPTER)
        for parameter in trained:  # `add_adapter` makes the new adapter the one that is active and trains
            parameter.requires_grad_(True)
        self._layers = _layers_of(unet)
        assert len(self._layers) == len(idle) or not idle  # the same modules as the Lora's
        self._idle = (idle[0], False) if idle else ([ADAPTER], True)
        self._switch(*self._idle)
        self._projection = _add_projection(unet, time_cond_proj_dim) if time_cond_proj_dim else None
        self._parameters += [] if self._projection is None else [self._projection]

    @classmethod
    def from_flags(
        cls,
        flags: MatchingFlags,
        unet: UNet2DConditionModel,
        *,
        target_modules: list[str] | None = None,
        time_cond_proj_dim: int | None = None,
    ) -> "FakeScore | None":
        """The fake score that the flags ask for; None without --dm_weight."""
        if not flags.dm_weight:
            return None
        return cls(unet, rank=flags.dm_rank, target_modules=target_modules, time_cond_proj_dim=time_cond_proj_dim)

    def parameters(self) -> list[torch.nn.Parameter]:
        """What trains, float32."""
        return self._parameters

    @property
    def takes_guidance(self) -> bool:
        """Whether it takes a guidance embedding."""
        return self._projection is not None

    def train(self) -> None:
        """Its weights need gradients from now on."""
        for parameter in self._parameters:
            parameter.requires_grad_(True)

    def _switch(self, adapters: str | list[str], disabled: bool) -> None:
        for layer in self._layers:
            layer._active_adapter, layer._disable_adapters = adapters, disabled

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the U-Net is the fake score. Its backward pass belongs inside, too: it may recompute the forward."""
        self._switch([ADAPTER], False)
        try:
            yield
        finally:
            self._switch(*self._idle)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Its weights, by PEFT's names without the adapter's, and the projection's by the U-Net's; contiguous."""
        weights: dict[str, torch.Tensor] = dict(get_peft_model_state_dict(self.unet, adapter_name=ADAPTER))
        if self._projection is not None:
            weights[_PROJECTION] = self._projection.detach()
        return {name: tensor.contiguous() for name, tensor in weights.items()}

    _FILE = "fake_score.safetensors"

    def save(self, folder: Path) -> None:
        """Saves it; `DivergenceError` if its values are not finite: then nothing is written."""
        weights = self.state_dict()
        check_finite(folder.name, weights.items())
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / self._FILE)
        respect_umask(folder / self._FILE)

    def load(self, folder: Path) -> None:
        """Loads what `save` saved; `UsageError` if that has another rank, other modules or another guidance input."""
        weights, own = load_file(folder / self._FILE), self.state_dict()
        if {name: tensor.shape for name, tensor in weights.items()} != {n: t.shape for n, t in own.items()}:
            raise UsageError(
                "--dm_rank: the checkpoint's fake score has another rank, or whether it takes a guidance embedding "
                "(--w_min below --w_max) has changed; give the flags that it was trained with."
            )
        if self._projection is not None:
            self._projection.data.copy_(weights.pop(_PROJECTION))
        set_peft_model_state_dict(self.unet, weights, adapter_name=ADAPTER)
