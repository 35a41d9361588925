"""The programs' training step on PyTorch's fake tensors, which have shapes and no memory: for `memory`, `step_cost` and
a test that compares it with a GPU.

    with fake_networks():
        step = build(Case("sd", "sd15"), begin)    # begin("teacher"), …: called as each part of the step begins
        step()

The parts that the programs are made of (`Lora`, `guided_prediction`, `update_ema`, …) run in the order of the programs'
step, on empty pictures.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.architectures import RESOLUTIONS, UNETS, build_text_encoders, build_vae, is_sdxl
from lcm_distill.flags import MatchingFlags, OptimizationFlags, SpeedFlags
from lcm_distill.models import unets
from lcm_distill.models.fake_score import FakeScore
from lcm_distill.models.lora import Lora
from lcm_distill.models.vae import encode_pixels
from lcm_distill.objective import consistency as lcd
from lcm_distill.objective.schedule import DDIMSolver, NoiseSchedule
from lcm_distill.run import matching as run_matching
from lcm_distill.run.accelerator import autocast_over
from lcm_distill.run.matching import DistributionMatching


@dataclass(frozen=True)
class Case:
    """A program's run, as far as its memory and its arithmetic go; the fields are named like its flags."""

    program: str = "lora_sdxl"
    teacher: str = "sdxl"
    resolution: int = 0  # the teacher's own
    train_batch_size: int = 1
    mixed_precision: str = "bf16"
    gradient_checkpointing: bool = False
    cast_teacher_unet: bool = True
    channels_last: bool = False
    float32_norms: bool = False
    use_8bit_adam: bool = False
    teacher_batch_size: int | None = None
    vae_encode_batch_size: int = 1
    vae_float32: bool = False  # as SDXL's own needs it; madebyollin/sdxl-vae-fp16-fix does not
    lora_rank: int = 64
    dm_steps: int = 0  # 0: no distribution matching
    dm_rank: int = 64


def add_flags(parser: argparse.ArgumentParser, default: Case) -> None:
    """A flag for each field, with the `default` case's value."""
    for name, value in asdict(default).items():
        if isinstance(value, bool):
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(f"--{name}", type=str if isinstance(value, str) else int, default=value)


def replacing(network: torch.nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """`nn.Module._apply` for fake tensors, which cannot take each other's place within a parameter."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    data = function(parameter)
                module._parameters[name] = torch.nn.Parameter(data.detach(), requires_grad=parameter.requires_grad)
        module._buffers |= {name: function(buffer) for name, buffer in module._buffers.items() if buffer is not None}
    return network


@contextlib.contextmanager
def fake_networks() -> Iterator[None]:
    """Inside, tensors and networks are fake."""
    with FakeTensorMode(), mock.patch.object(torch.nn.Module, "_apply", replacing):
        yield


def build_optimizer(trained: list[torch.nn.Parameter], case: Case) -> torch.optim.Optimizer:
    return State(trained, case.use_8bit_adam)


class State(torch.optim.Optimizer):
    """What a fused AdamW, or bitsandbytes' with 8-bit state, keeps; neither needs more while it works."""

    def __init__(self, parameters: list[torch.nn.Parameter], use_8bit: bool):
        super().__init__(parameters, {})
        for parameter in parameters:
            small = use_8bit and parameter.numel() >= 4096
            for name in ("exp_avg", "exp_avg_sq"):
                state = torch.zeros_like(parameter, dtype=torch.uint8 if small else torch.float32)
                self.state[parameter][name] = state, torch.zeros(parameter.numel() // 256 * small)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


def build(case: Case, begin: Callable[[str], None], device: str = "cpu") -> Callable[[], None]:
    """Builds the networks; what comes back takes a step on empty pictures, and calls `begin` with each part's name."""
    with torch.device(device):
        step = _build(case, begin, device)

    def on_device() -> None:
        with torch.device(device):
            step()

    return on_device


def _build(case: Case, begin: Callable[[str], None], device: str) -> Callable[[], None]:
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case.mixed_precision, torch.float32)
    weights = half if case.cast_teacher_unet else torch.float32
    lora: Lora | None = None
    unet = UNet2DConditionModel(**UNETS[case.teacher]).requires_grad_(False).eval()
    size = case.resolution or RESOLUTIONS[case.teacher]
    vae = build_vae(case.teacher).requires_grad_(False).eval()
    text_encoders = build_text_encoders(case.teacher)
    unets.cast(vae, torch.float32 if case.vae_float32 else half)
    for encoder in text_encoders:
        unets.cast(encoder.requires_grad_(False), half)
    target = None
    if case.program.startswith("lora"):
        unets.cast(unet, weights)
        lora, student = Lora(unet, rank=case.lora_rank, alpha=case.lora_rank), unet
    else:
        student, target = (UNet2DConditionModel(**UNETS[case.teacher], time_cond_proj_dim=256) for _ in range(2))
        target.requires_grad_(False).eval()
        unets.cast(unet, weights)
    width = None if lora else 256  # of the guidance embedding
    fake_score = FakeScore(unet, rank=case.dm_rank, time_cond_proj_dim=width) if case.dm_steps else None
    speed = SpeedFlags(
        vae_encode_batch_size=case.vae_encode_batch_size,
        channels_last=case.channels_last,
        float32_norms=case.float32_norms,
        gradient_checkpointing=case.gradient_checkpointing,
    )
    unets.apply_speed_flags(speed, *([unet] if target is None else [student, target, unet]))
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(trained, case)
    schedule = NoiseSchedule(LCMScheduler(beta_schedule="scaled_linear").alphas_cumprod).to(device)
    solver, consistency = DDIMSolver(schedule, 50), lcd.ConsistencyFunction(schedule)
    batch, states = case.train_batch_size, UNETS[case.teacher]["cross_attention_dim"]

    def conditioning(rows: int) -> dict[str, Any]:
        given: dict[str, Any] = {"encoder_hidden_states": torch.zeros(rows, 77, states, dtype=half)}
        if is_sdxl(case.teacher):
            ids = torch.zeros(rows, 6, dtype=torch.int64)
            given["added_cond_kwargs"] = {"text_embeds": torch.zeros(rows, 1280, dtype=half), "time_ids": ids}
        return given

    def autocast() -> torch.autocast:
        enabled = half != torch.float32
        return torch.autocast(device, dtype=half if enabled else torch.bfloat16, enabled=enabled)

    # No loss scaler in fp16: it looks at the gradients' values, which fake tensors do not have.
    accelerator: Any = SimpleNamespace(
        autocast=autocast, device=torch.device(device), mixed_precision="no", num_processes=1, sync_gradients=True
    )
    guided = partial(lcd.guided_prediction, unet, schedule, dtype=weights, batch_size=case.teacher_batch_size)
    teacher = lora.off if lora else contextlib.nullcontext
    run: Any = SimpleNamespace(accelerator=accelerator, output_dir=None, add_values=lambda **values: None)
    flags = MatchingFlags(dm_weight=1.0, dm_steps=case.dm_steps, dm_rank=case.dm_rank)
    with mock.patch.object(run_matching, "build_optimizer", lambda given, *_, **__: build_optimizer(given, case)):
        matching = DistributionMatching(
            run, flags, OptimizationFlags(), fake_score, schedule, guided, teacher, dtype=weights
        )
    generator = torch.Generator(device)

    def step() -> None:
        begin("text")
        with torch.no_grad():
            for encoder in text_encoders:
                encoder(torch.zeros(batch, 77, dtype=torch.int64), output_hidden_states=True)
        begin("VAE")
        pixels = torch.zeros(batch, 3, size, size, dtype=torch.uint8)
        latents = encode_pixels(vae, pixels, case.vae_encode_batch_size, generator)
        index = torch.zeros(batch, dtype=torch.int64)
        start, end = solver.timesteps[index], solver.previous_timesteps[index]
        noisy = schedule.add_noise(latents, torch.zeros_like(latents), start)
        given, w = conditioning(batch), torch.ones(batch)
        embedding = None if lora else torch.zeros(batch, 256)
        options: dict[str, Any] = {"dtype": weights} if lora else {"timestep_cond": embedding}
        begin("teacher")
        with torch.no_grad(), autocast_over(accelerator, weights), teacher():
            clean, epsilon = guided(noisy, start, given, conditioning(1), w)
        previous = solver.step(clean, epsilon, index)
        begin("target")
        with torch.no_grad(), autocast(), lora.target() if lora else contextlib.nullcontext():
            goal = consistency(lcd.unet_output(target or unet, previous, end, given, **options), previous, end)
        begin("student")
        with autocast():
            prediction = consistency(lcd.unet_output(student, noisy, start, given, **options), noisy, start)
        loss = lcd.consistency_loss(prediction, goal)
        if fake_score:
            begin("matching")
            loss = loss + matching.loss(prediction, given, conditioning(1), w, embedding, generator)
        begin("backward")
        loss.backward()
        begin("optimizer")
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if target is not None:
            lcd.update_ema(target.parameters(), student.parameters(), 0.95)
        if fake_score:
            begin("fake score")
            matching.train_fake_score(prediction, given, embedding, generator)

    return step
