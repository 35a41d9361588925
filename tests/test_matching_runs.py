"""Distribution matching in the programs: what each network sees, both losses, resuming, the other flags."""

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from test_encoded_runs import encoded  # noqa: F401 - a fixture
from test_programs import FULL_PROGRAMS, LORA_PROGRAMS, ONE_OF_EACH, PROGRAMS, family, result, same
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lcm_distill.errors import UsageError
from lcm_distill.models import sd, sdxl
from lcm_distill.models.teacher import Teacher, read_configs
from lcm_distill.objective.consistency import ConsistencyFunction, boundary_scalings
from lcm_distill.objective.schedule import DDIMSolver, NoiseSchedule
from lcm_distill.run.progress import Progress

CONSISTENCY_WEIGHT, WEIGHT = 0.375, 0.625
STUDENT_LR, FAKE_SCORE_LR = 1e-2, 5e-3
MATCHING = {"dm_weight": WEIGHT, "dm_consistency_weight": CONSISTENCY_WEIGHT, "dm_rank": 4}
MATCHING |= {"dm_learning_rate": FAKE_SCORE_LR, "learning_rate": STUDENT_LR}


def options_of(program: str, **more: Any) -> dict[str, Any]:
    adapter = {"lora_rank": 4, "lora_dropout": 0.3} if program in LORA_PROGRAMS else {}
    return MATCHING | adapter | {"family": family(program), "ema_decay": 0.9} | more


@pytest.fixture()
def logged(monkeypatch) -> list[dict[str, float]]:
    """What is logged at each step, but for the times."""
    found: list[dict[str, float]] = []
    log = Progress.log

    def logging(self, global_step, lr_scheduler):
        values = log(self, global_step, lr_scheduler)
        timed = ("samples_per_second", "data_wait")
        found.append({"step": global_step} | {name: value for name, value in values.items() if name not in timed})
        return values

    monkeypatch.setattr(Progress, "log", logging)
    return found


@pytest.fixture()
def steps():
    """The learning rate of each optimizer step, by which the student's and the fake score's differ."""
    found: list[float] = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: found.append(optimizer.param_groups[0]["lr"]))
    yield found
    hook.remove()


def fake_score(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[int, dict[str, torch.Tensor]]]:
    """The weights of a checkpoint's fake score, and its optimizer's state."""
    saved = torch.load(checkpoint / "fake_score" / "training.pt", weights_only=True)
    return load_file(checkpoint / "fake_score" / "fake_score.safetensors"), saved["optimizer"]["state"]


def equal_fake_scores(a: Path, b: Path) -> bool:
    (weights, state), (other_weights, other_state) = fake_score(a), fake_score(b)
    return same(weights, other_weights) and all(same(state[i], other_state[i]) for i in state | other_state)


# ------------------------------------------------------------------------------------------------ a step by hand


def spied_calls(monkeypatch) -> list[SimpleNamespace]:
    """Every pass of a U-Net from here on; `gradient` is that of the loss with respect to its output."""
    calls: list[SimpleNamespace] = []
    forward = UNet2DConditionModel.forward

    def spy(self, sample, timesteps, **kwargs):
        output = forward(self, sample, timesteps, **kwargs)
        layers = [layer for layer in self.modules() if hasattr(layer, "lora_A")]
        adapters = {"off" if layer.disable_adapters else tuple(layer.active_adapters)[0] for layer in layers}
        call = SimpleNamespace(
            network=self, sample=sample.detach().clone(), timesteps=timesteps.clone(), adapters=adapters,
            output=output[0].detach().clone(), states=kwargs["encoder_hidden_states"], w=kwargs.get("timestep_cond"),
            added=kwargs.get("added_cond_kwargs"), inputs_need_gradients=sample.requires_grad, gradient=None,
        )  # fmt: skip
        if torch.is_grad_enabled() and output[0].requires_grad:
            output[0].register_hook(lambda gradient: setattr(call, "gradient", gradient.detach().clone()))
        calls.append(call)
        return output

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)
    return calls


class Float64:
    """The schedule in float64, for a teacher that predicts ε."""

    def __init__(self, schedule: NoiseSchedule):
        assert schedule.prediction_type == "epsilon"
        self.schedule = schedule

    def levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alphas, sigmas = self.schedule.alphas.double(), self.schedule.sigmas.double()
        return alphas[timesteps].view(-1, 1, 1, 1), sigmas[timesteps].view(-1, 1, 1, 1)

    def x0(self, output: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        alpha, sigma = self.levels(timesteps)
        return (noisy.double() - sigma * output.double()) / alpha

    def noise(self, noisy: torch.Tensor, x0: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """That by which x0 became `noisy`."""
        alpha, sigma = self.levels(timesteps)
        return (noisy.double() - alpha * x0.double()) / sigma

    def consistency(self, output: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        c_skip, c_out = (c.double().view(-1, 1, 1, 1) for c in boundary_scalings(timesteps))
        return c_skip * noisy.double() + c_out * self.x0(output, noisy, timesteps)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def drawn_guidance(schedule: Float64, solver: DDIMSolver, teacher: Any, target: Any) -> torch.Tensor:
    """The w `[B, 1, 1, 1]` by which the teacher was guided: (1 + w)·Ψ(c) − w·Ψ(∅) is what the target sees."""
    size = len(target.sample)
    noisy, timesteps = teacher.sample[:size], teacher.timesteps[:size]
    alpha, sigma = schedule.levels(target.timesteps)
    cond, uncond = (
        alpha * schedule.x0(output, noisy, timesteps) + sigma * output.double() for output in teacher.output.chunk(2)
    )
    along = cond - uncond
    dimensions = (1, 2, 3)
    return ((target.sample.double() - cond) * along).sum(dimensions, True) / along.square().sum(dimensions, True)


@pytest.mark.parametrize("guided", ["by the drawn w", "by --dm_guidance_w"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_step_is_that_of_dmd2(program, guided, command, run, monkeypatch, small_teachers, logged, steps):
    """Which network sees what at which timestep; both losses and the student's gradient worked out again in float64.

    The real and the fake score exchanged, the real one without guidance, the fake score trained at other timesteps or
    on pictures other than the student's: all of these would run.
    """
    calls = spied_calls(monkeypatch)
    guidance = {"w_min": 3, "w_max": 5} if "drawn" in guided else {"w_min": 3, "w_max": 3, "dm_guidance_w": 6}
    run(program, command(
        steps=3, train_batch_size=3, num_ddim_timesteps=10, dm_timesteps=[0.3, 0.35], dm_steps=2, dm_start_step=1,
        loss_type="huber", huber_c=0.01, **options_of(program), **guidance,
    ))  # fmt: skip
    # One step without matching, two with it, each followed by two of the fake score, the student's first.
    matched = [STUDENT_LR, FAKE_SCORE_LR, FAKE_SCORE_LR]
    assert steps == [STUDENT_LR, *matched, *matched]
    assert ["dm_loss" in values for values in logged] == [False, True, True]
    earlier, calls = calls[3:10], calls[10:17]  # of the second and of the third step, when all networks differ
    teacher, target, student, real, fake, *trained = calls
    assert not any(call.inputs_need_gradients for call in calls)
    assert [call.gradient is not None for call in calls] == [False, False, True, False, False, True, True]

    # Networks and adapters.
    is_lora, module = program in LORA_PROGRAMS, {"sd": sd, "sdxl": sdxl}[family(program)]
    used = [call.adapters for call in calls]
    if is_lora:
        assert {call.network for call in calls} == {student.network}
        assert used == [{"off"}, {"target"}, {"student"}, {"off"}, *[{"fake_score"}] * 3]
    else:
        assert {call.network for call in (real, fake, *trained)} == {teacher.network}
        assert len({teacher.network, target.network, student.network}) == 3
        assert used == [{"off"}, set(), set(), {"off"}, *[{"fake_score"}] * 3]
    # Only the fake score of a full student that is given w is given it, too.
    takes_w = not is_lora and "drawn" in guided
    assert teacher.w is real.w is None
    for call in (fake, *trained):
        assert torch.equal(call.w, student.w) if takes_w else call.w is None

    # Conditioning: the real score with and without the captions, the fake score with them.
    source = Teacher(small_teachers[family(program)])
    empty = module.encode_captions(module.load_frozen(source, device="cpu", dtype=torch.float32), [""])
    assert torch.equal(real.states, teacher.states) and torch.equal(real.states[:3], student.states)
    assert torch.equal(real.states[3:], empty["encoder_hidden_states"].expand(3, -1, -1))
    for call in (fake, *trained):
        assert torch.equal(call.states, student.states)
        for name in student.added or {}:
            assert torch.equal(call.added[name], student.added[name])
            assert torch.equal(real.added[name], teacher.added[name])

    # x, noised anew each time.
    schedule = NoiseSchedule.from_config(
        read_configs(source, family=family(program), resolution=64, num_ddim_timesteps=10).scheduler
    )
    exact, total = Float64(schedule), len(schedule)
    x = ConsistencyFunction(schedule)(student.output, student.sample, student.timesteps)
    assert torch.equal(real.sample, fake.sample.repeat(2, 1, 1, 1))
    assert torch.equal(real.timesteps, fake.timesteps.repeat(2))
    noises = [exact.noise(call.sample, x, call.timesteps) for call in (fake, *trained)]
    for number, noise in enumerate(noises):
        assert abs(float(noise.mean())) < 0.08 and abs(float(noise.std()) - 1) < 0.06
        assert all(abs(float((noise * other).mean())) < 0.08 for other in noises[:number])  # of 3072 each
    compared = torch.cat([fake.timesteps, earlier[4].timesteps])
    learned = torch.cat([call.timesteps for call in (*trained, *earlier[5:])])
    assert 0.3 * total <= compared.min() and compared.max() < 0.35 * total and len(compared.unique()) > 1
    assert learned.min() < 0.3 * total and learned.max() >= 0.35 * total

    # The student's losses and their gradient.
    w = drawn_guidance(exact, DDIMSolver(schedule, 10), teacher, target)
    if "drawn" in guided:
        assert 2.99 < w.min() and w.max() < 5.01 and w.max() - w.min() > 0.1
        if not is_lora:  # the embedding's lowest frequency
            torch.testing.assert_close(student.w[:, 127].double(), (0.1 * w.flatten()).sin(), rtol=0, atol=1e-3)
    else:
        torch.testing.assert_close(w, torch.full_like(w, 3), rtol=0, atol=1e-2)
        w = torch.full_like(w, 6)
    cond, uncond = (exact.x0(output, fake.sample, fake.timesteps) for output in real.output.chunk(2))
    real_x0 = (1 + w) * cond - w * uncond
    fake_x0 = exact.x0(fake.output, fake.sample, fake.timesteps)
    output = student.output.double().requires_grad_()
    x64 = exact.consistency(output, student.sample, student.timesteps)
    scale = (x64.detach() - real_x0).abs().mean((1, 2, 3), keepdim=True)
    assert scale.min() > 0.05
    dm_loss = 0.5 * (x64 - (x64.detach() - (fake_x0 - real_x0) / scale)).square().mean()
    difference = x64 - exact.consistency(target.output, target.sample, target.timesteps)
    consistency_loss = ((difference**2 + 0.01**2).sqrt() - 0.01).mean()
    assert logged[2]["loss"] == pytest.approx(consistency_loss.item(), rel=1e-4)
    assert logged[2]["dm_loss"] == pytest.approx(dm_loss.item(), rel=1e-4)
    parts = [
        weight * torch.autograd.grad(loss, output, retain_graph=True)[0]
        for weight, loss in ((CONSISTENCY_WEIGHT, consistency_loss), (WEIGHT, dm_loss))
    ]
    expected = parts[0] + parts[1]
    assert min(part.norm() for part in parts) > 0.01 * expected.norm()  # or an error in one would not be seen
    assert relative_error(student.gradient, expected) < 1e-4

    # The fake score's.
    errors = [call.output.double() - noise for call, noise in zip(trained, noises[1:], strict=True)]
    losses = [error.square().mean().item() for error in errors]
    assert logged[2]["fake_score_loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
    for call, error in zip(trained, errors, strict=True):
        assert relative_error(call.gradient, 2 * error / error.numel()) < 1e-3


@pytest.mark.parametrize("program", PROGRAMS)
def test_at_a_lower_top_timestep_all_networks_start_from_noise_alone(program, command, run, monkeypatch, tmp_path):
    """As the exported sampler does, whose schedule ends there; below it, the teacher continues from where it is."""
    calls = spied_calls(monkeypatch)
    run(program, command(
        steps=1, train_batch_size=3, num_ddim_timesteps=12, top_timestep=599, top_timestep_probability=1,
        **options_of(program, dm_weight=0),
    ))  # fmt: skip
    teacher, target, student, *_ = calls
    assert torch.equal(teacher.sample, student.sample.repeat(2, 1, 1, 1))
    assert set(student.timesteps.tolist()) == set(teacher.timesteps.tolist()) == {599}
    assert set(target.timesteps.tolist()) == {549}
    numbers = student.sample.numel()
    assert abs(float(student.sample.mean())) < 3 / numbers**0.5 > abs(float(student.sample.std()) - 1) * 2**0.5
    sampler = LCMScheduler.from_pretrained(tmp_path / "out")
    sampler.set_timesteps(2)
    assert sampler.timesteps.tolist() == [599, 299]
    assert relative_error(target.sample, student.sample) > 0.02  # a step was taken
    for page in ("README.md", "report.html"):  # they say that other programs start elsewhere
        assert "ManualSigmas" in (tmp_path / "out" / page).read_text()


# ------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("program", ONE_OF_EACH)
def test_two_plus_two_resumed_steps_equal_four(program, command, run, tmp_path, logged):
    """Bit for bit: losses, student, target, and the fake score with its optimizer's moments."""
    options = options_of(
        program, steps=4, gradient_accumulation_steps=2, checkpointing_steps=2, dm_steps=2, dm_start_step=1,
        lr_scheduler="linear", lr_warmup_steps=1, random_flip=True,
    )  # fmt: skip
    run(program, command("whole", **options))
    half = tmp_path / "whole" / "checkpoint-2"
    run(program, command("halves", resume_from_checkpoint=str(half), **options))
    assert logged[4:] == logged[2:4] and [values["step"] for values in logged] == [1, 2, 3, 4, 3, 4]
    assert same(result(tmp_path / "whole"), result(tmp_path / "halves"))
    ends = [tmp_path / name / "checkpoint-4" for name in ("whole", "halves")]
    assert equal_fake_scores(*ends)
    # It trained: two steps in each of the student's last three, and also between the checkpoints.
    weights, state = fake_score(ends[0])
    before, state_before = fake_score(half)
    assert {int(values["step"]) for values in state.values()} == {6}
    assert {int(values["step"]) for values in state_before.values()} == {2}
    assert all(not torch.equal(weights[name], before[name]) for name in weights)
    assert ("time_embedding.cond_proj.weight" in weights) is (program in FULL_PROGRAMS)


@pytest.mark.parametrize("program", ONE_OF_EACH)
def test_a_resumed_run_may_begin_matching_change_it_and_end_it(program, command, run, tmp_path, caplog, steps, logged):
    """A checkpoint's learning rate would replace the flag's, which the log said was changed."""
    options = options_of(program)
    plain = {name: value for name, value in options.items() if not name.startswith("dm_")}
    again = {"resume_from_checkpoint": "latest"}
    run(program, command(steps=1, **plain))
    assert not (tmp_path / "out" / "checkpoint-1" / "fake_score").exists()
    with caplog.at_level(logging.INFO, "lcm_distill"):
        run(program, command(steps=2, **options, **again))
        assert "the checkpoint holds no fake score: it starts as the teacher" in caplog.text
        caplog.clear()
        run(program, command(steps=3, **options | {"dm_learning_rate": 2e-4}, **again))
        assert "--dm_learning_rate: 0.005 → 0.0002" in caplog.text and "no fake score" not in caplog.text
    run(program, command(steps=4, **plain, **again))
    assert steps == [STUDENT_LR, STUDENT_LR, FAKE_SCORE_LR, STUDENT_LR, 2e-4, STUDENT_LR]
    assert ["dm_loss" in values for values in logged] == [False, True, True, False]
    assert not (tmp_path / "out" / "checkpoint-4" / "fake_score").exists()


@pytest.mark.hostile("checkpoints")
@pytest.mark.parametrize("more", [{"dm_rank": 8}, {"w_min": 8, "w_max": 8}], ids=lambda more: "-".join(more))
def test_a_fake_score_of_another_shape_is_refused_with_the_flag_s_name(more, command, run):
    """The message was that the checkpoint is damaged."""
    program = FULL_PROGRAMS[0]
    run(program, command(steps=1, **options_of(program)))
    with pytest.raises(UsageError, match="^--dm_rank: the checkpoint's fake score has another rank, or whether"):
        run(program, command(steps=2, resume_from_checkpoint="latest", **options_of(program) | more))


# -------------------------------------------------------------------------------------------------- other flags


@pytest.mark.parametrize("program", ONE_OF_EACH)
def test_gradient_checkpointing_changes_nothing(program, command, run, tmp_path, logged):
    """The fake score's recomputed forward pass, after which its adapter is off again, would be the teacher's."""
    for name in (False, True):
        options = options_of(program, gradient_checkpointing=name, steps=2, gradient_accumulation_steps=2)
        run(program, command(str(name), **options))
    assert logged[:2] == logged[2:] and "dm_loss" in logged[0]
    assert same(result(tmp_path / "False"), result(tmp_path / "True"))
    assert equal_fake_scores(tmp_path / "False" / "checkpoint-2", tmp_path / "True" / "checkpoint-2")


@pytest.mark.parametrize("program", ONE_OF_EACH)
def test_the_validation_teacher_and_the_export_are_without_the_fake_score(program, command, run, tmp_path):
    """A fake score that is trained as fast as can be, beside a student that learns nothing."""
    options = options_of(program, learning_rate=0, validation_steps=2, validation_inference_steps=1)
    run(program, command("with", **options | {"dm_learning_rate": 0.1}))
    run(program, command("without", **options | {"dm_weight": 0}))
    assert fake_score(tmp_path / "with" / "checkpoint-2")
    pictures = [(tmp_path / name / "validation" / "step-000002.png").read_bytes() for name in ("with", "without")]
    assert pictures[0] == pictures[1]
    results = [result(tmp_path / name) for name in ("with", "without")]
    assert results[0].keys() == results[1].keys()
    if program in FULL_PROGRAMS:  # whose start is the teacher; an adapter's is drawn
        assert same(*results)


@pytest.mark.parametrize("program", ONE_OF_EACH)
@pytest.mark.parametrize(
    "more",
    [
        {"mixed_precision": "bf16", "use_8bit_adam": True, "gradient_checkpointing": True},
        {"channels_last": True, "w_min": 0, "w_max": 0, "dm_guidance_w": 0, "dm_consistency_weight": 0},
    ],
    ids=lambda more: "-".join(more),
)
def test_options_run_and_resume(program, more, command, run, tmp_path, logged):
    run(program, command(steps=1, **options_of(program, **more)))
    run(program, command(steps=2, resume_from_checkpoint="latest", **options_of(program, **more)))
    assert [values["step"] for values in logged] == [1, 2]
    assert all(math.isfinite(values[name]) for values in logged for name in ("dm_loss", "fake_score_loss"))
    (before, _), (after, _) = (fake_score(tmp_path / "out" / f"checkpoint-{step}") for step in (1, 2))
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert all(not torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("program", ONE_OF_EACH)
def test_from_latents(program, command, run, encoded, tmp_path, logged):  # noqa: F811 - the fixture
    """The same losses as from pictures, to float16."""
    options = options_of(program, steps=1, center_crop=True, random_flip=True)
    run(program, command("pictures", **options))
    run(program, command("latents", train_shards_path_or_url=encoded(family(program)), **options))
    pictures, latents = logged
    for name in ("loss", "dm_loss", "fake_score_loss"):
        assert latents[name] == pytest.approx(pictures[name], rel=1e-2) and latents[name] != pictures[name]


@pytest.mark.parametrize("program", ONE_OF_EACH)
def test_a_dry_run_matches_at_once(program, command, run, tmp_path, logged):
    """Else it would say that all works of a run that runs out of memory days later."""
    run(program, command(dry_run=True, **options_of(program, dm_start_step=1000)))
    assert len(logged) == 1 and {"dm_loss", "fake_score_loss"} < logged[0].keys()
    assert not list(tmp_path.iterdir())


def test_the_journal_has_both_losses(command, run, tmp_path):
    run(LORA_PROGRAMS[0], command(steps=2, **options_of(LORA_PROGRAMS[0], dm_start_step=1)))
    entries = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    by_step = {entry["step"]: entry for entry in entries if "loss" in entry}
    assert "dm_loss" not in by_step[1] and {"dm_loss", "fake_score_loss"} < by_step[2].keys()
    assert (tmp_path / "out" / "report.html").exists()
