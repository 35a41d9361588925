"""The programs from command line to reloaded picture: each once on its toy teacher, the rest on small ones."""

import gc
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from processes import start_ranks, wait
from safetensors.torch import load_file
from small_teachers import TOY
from test_flags import PUBLIC_COMMANDS
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lcm_distill.errors import DivergenceError, UsageError
from lcm_distill.models import sd, sdxl, unets
from lcm_distill.models.teacher import Teacher, read_configs
from lcm_distill.objective import consistency as lcd
from lcm_distill.objective.consistency import ConsistencyFunction, guidance_embedding
from lcm_distill.objective.schedule import DDIMSolver, NoiseSchedule
from lcm_distill.run.journal import read_journal
from lcm_distill.run.record import write_record
from toy.make_shards import make_shards

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = [f"train_lcm_distill_{kind}_wds" for kind in ("sd", "sdxl", "lora_sd", "lora_sdxl")]
LORA_PROGRAMS = [program for program in PROGRAMS if "lora" in program]
FULL_PROGRAMS = [program for program in PROGRAMS if "lora" not in program]
SDXL_PROGRAMS = [program for program in PROGRAMS if "sdxl" in program]
ONE_OF_EACH = ["train_lcm_distill_sd_wds", "train_lcm_distill_lora_sdxl_wds"]  # of families and of kinds of student
TOY_SD = str(TOY / "sd")
PROMPT = "a small red circle on a black background"


def weights(path) -> dict[str, torch.Tensor]:
    return load_file(Path(path) / "diffusion_pytorch_model.safetensors")


def family(program: str) -> str:
    return "sdxl" if "sdxl" in program else "sd"


def result(out) -> dict[str, torch.Tensor]:
    """Everything that a run trained: the weights of all U-Nets and adapters in its folder, its checkpoints aside."""
    files = [f for f in Path(out).rglob("*.safetensors") if not any(p.name.startswith("checkpoint") for p in f.parents)]
    assert files
    return {f"{file.relative_to(out)}:{name}": w for file in files for name, w in load_file(file).items()}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def captured_losses(monkeypatch) -> list[tuple[int, float]]:
    """(global step, loss) of every logged step of the programs run from here on."""
    from lcm_distill.run.progress import Progress

    losses: list[tuple[int, float]] = []
    log = Progress.log

    def recording(self, global_step, lr_scheduler):
        values = log(self, global_step, lr_scheduler)
        losses.append((global_step, values["loss"]))
        return values

    monkeypatch.setattr(Progress, "log", recording)
    return losses


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_trains_and_its_export_generates(program, command, run, tmp_path, teachers, monkeypatch):
    module, teacher, is_lora = {"sd": sd, "sdxl": sdxl}[family(program)], teachers[family(program)], "lora" in program
    frozen: dict = {}
    load = module.load_frozen
    monkeypatch.setattr(module, "load_frozen", lambda *a, **k: frozen.setdefault("it", load(*a, **k)))
    options = {"lora_rank": 4} if is_lora else {}
    run(program, command(
        steps=3, family=family(program), learning_rate=1e-3, loss_type="huber", random_flip=True, validation_steps=2,
        report_to="tensorboard,wandb", validation_inference_steps=[1, 2], lr_scheduler="cosine", ema_decay=0.9,
        huber_c=0.01, pretrained_teacher_model=teacher, **options,
    ))  # fmt: skip
    out = tmp_path / "out"

    # What is frozen is bitwise what it was.
    for name in ("unet", "vae", "text_encoder", "text_encoder_2")[: 4 if module is sdxl else 3]:
        network = getattr(frozen["it"], name)
        folder = Path(teacher) / name
        before = load_file(next(folder.glob("*.safetensors")))
        after = {k.replace(".base_layer", ""): w for k, w in network.state_dict().items() if "lora_" not in k}
        if name == "text_encoder":  # the file has early Transformers' names, which all of them read
            before, after = ({k.removeprefix("text_model."): v for k, v in w.items()} for w in (before, after))
        assert before.keys() <= after.keys() and all(torch.equal(after[k], before[k].float()) for k in before), name

    # What trains has moved, the target less than the student; the export loads in one line and generates.
    check = check_lora_export if is_lora else check_full_export
    check(out, teacher)

    # Pictures, trackers, card, checkpoint.
    assert sorted(p.name for p in (out / "validation").iterdir()) == ["step-000002.png", "step-000003.png"]
    assert list((out / "logs").rglob("events.out.tfevents.*")) and list((out / "logs").rglob("*.wandb"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(out / "logs" / "text2image-fine-tune"))
    reader.Reload()
    rows = {f"validation/{network}_{n}" for network in ("student", "target") for n in ("1_step", "2_steps")}
    assert rows | {"validation/teacher_2_steps"} == set(reader.Tags()["images"])
    scalars = {"loss", "lr", "samples_per_second", "data_wait", "distance/student", "distance/target"}
    assert scalars <= set(reader.Tags()["scalars"])
    media = list((out / "logs").rglob("media/images/**/*.png"))
    assert len(media) == 9  # wandb: student and target in 1 and 2 steps, twice; the teacher once
    launches, entries = read_journal(out / "training.jsonl")
    assert [launch["end"]["global_step"] for launch in launches] == [3] and launches[0]["program"] == program
    values = {step: {name for e in entries if e["step"] == step for name in e} for step in (1, 2, 3)}
    assert {"loss", "grad_norm", "lr"} < values[1] and all(scalars <= values[step] for step in (2, 3))
    report = (out / "report.html").read_text()
    assert report.count("data:image/") == 2 and program in report
    assert "Target&#x27;s distance from the teacher" in report
    card = (out / "README.md").read_text()
    assert f"{entries[-1]['distance/student']:.4g}" in card
    assert "LCMScheduler" in card and "validation/step-000003.png" in card
    assert (out / "checkpoint-3" / "run.json").exists()


def check_full_export(out: Path, teacher: str) -> None:
    before = load_file(Path(teacher) / "unet" / "diffusion_pytorch_model.safetensors")
    student, target = weights(out / "unet"), weights(out / "unet_target")
    moved = [k for k in before if not torch.equal(student[k], before[k].float())]
    assert len(moved) > 0.9 * len(before)
    assert student["time_embedding.cond_proj.weight"].abs().max() > 0
    assert not same(student, target)
    distance = {
        n: sum((w[k] - before[k].float()).norm() ** 2 for k in before) for n, w in (("s", student), ("t", target))
    }
    assert distance["t"] < distance["s"]

    # The two-line load, in half and in full precision, with guidance 1, 4 and 8.
    half = UNet2DConditionModel.from_pretrained(out, torch_dtype=torch.float16, variant="fp16")
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    unet = UNet2DConditionModel.from_pretrained(out)
    assert same(dict(unet.state_dict()), student)
    pipeline = DiffusionPipeline.from_pretrained(teacher, unet=unet, torch_dtype=torch.float32)
    pictures = [drawn(pipeline, out, guidance_scale=scale) for scale in (1.0, 4.0, 8.0)]
    assert np.abs(pictures[0] - pictures[2]).max() > 0  # guidance does something


def check_lora_export(out: Path, teacher: str) -> None:
    student, target = load_file(out / "adapter" / "adapter_model.safetensors"), {}
    half = load_file(out / "pytorch_lora_weights.safetensors")
    averaged = load_file(out / "target" / "pytorch_lora_weights.safetensors")
    for name, weight in student.items():
        short = "unet." + name.removeprefix("base_model.model.")
        assert weight.dtype == torch.float32 and torch.equal(weight.half(), half[short])
        target[name] = averaged[short]
    second = [name for name in student if "lora_B" in name]  # zero at the start
    assert sum(bool(student[name].abs().max() > 0) for name in second) > 0.9 * len(second)
    norm = {n: sum(w[k].float().norm() ** 2 for k in second) for n, w in (("s", student), ("t", target))}
    assert 0 < norm["t"] < norm["s"]

    pipeline = DiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32)
    before = drawn(pipeline, out, guidance_scale=1.0)
    pipeline.load_lora_weights(out)
    pictures = [before] + [drawn(pipeline, out, guidance_scale=scale) for scale in (1.0, 1.5)]
    assert np.abs(pictures[0] - pictures[1]).max() > 0 and np.abs(pictures[1] - pictures[2]).max() > 0


def drawn(pipeline, out: Path, **options) -> np.ndarray:
    pipeline.scheduler = LCMScheduler.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    options |= {"generator": torch.Generator().manual_seed(0), "height": 64, "width": 64}
    picture = pipeline(PROMPT, num_inference_steps=4, **options).images[0]
    assert picture.size == (64, 64)
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_step_is_that_of_algorithm_1(program, command, run, monkeypatch, small_teachers):
    """Which network sees what at which timestep, and the loss worked out again from what they answered.

    Guidance left out, the student as its own teacher, the target at the wrong timestep: runs still ended well.
    """
    is_lora, module = "lora" in program, {"sd": sd, "sdxl": sdxl}[family(program)]
    calls = []
    forward = UNet2DConditionModel.forward

    def spy(self, sample, timesteps, **kwargs):
        output = forward(self, sample, timesteps, **kwargs)
        layers = [layer for layer in self.modules() if hasattr(layer, "lora_A")]
        adapters = {"off" if layer.disable_adapters else tuple(layer.active_adapters)[0] for layer in layers}
        calls.append(SimpleNamespace(
            network=self, sample=sample.clone(), timesteps=timesteps.clone(), output=output[0].detach().clone(),
            states=kwargs["encoder_hidden_states"], w=kwargs.get("timestep_cond"), adapters=adapters,
            added=kwargs.get("added_cond_kwargs"), grad=torch.is_grad_enabled() and output[0].requires_grad,
        ))  # fmt: skip
        return output

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)
    losses = captured_losses(monkeypatch)
    options = {"lora_rank": 4, "lora_dropout": 0.3} if is_lora else {}
    run(program, command(
        steps=2, family=family(program), train_batch_size=3, w_min=3, w_max=3, ema_decay=0.9, learning_rate=1e-2,
        loss_type="huber", huber_c=0.01, num_ddim_timesteps=10, **options,
    ))  # fmt: skip
    teacher, target, student = calls[3:6]  # of the second step: by then the three networks differ

    assert (student.grad, teacher.grad, target.grad) == (True, False, False)
    if is_lora:
        assert student.network is teacher.network is target.network
        assert [call.adapters for call in (student, teacher, target)] == [{"student"}, {"off"}, {"target"}]
        assert student.w is teacher.w is target.w is None
    else:
        assert len({id(call.network) for call in (student, teacher, target)}) == 3
        assert torch.equal(student.w, guidance_embedding(torch.full((3,), 3.0))) and torch.equal(student.w, target.w)
        assert teacher.w is None and calls[2].network is student.network

    source = Teacher(small_teachers[family(program)])
    frozen = module.load_frozen(source, device="cpu", dtype=torch.float32)
    empty = module.encode_captions(frozen, [""])
    assert torch.equal(teacher.states[:3], student.states) and torch.equal(target.states, student.states)
    assert torch.equal(teacher.states[3:], empty["encoder_hidden_states"].expand(3, -1, -1))
    if module is sdxl:
        text = empty["added_cond_kwargs"]["text_embeds"]
        assert torch.equal(teacher.added["text_embeds"][3:], text.expand(3, -1))
        assert torch.equal(target.added["text_embeds"], student.added["text_embeds"])

    schedule = NoiseSchedule.from_config(
        read_configs(source, family=family(program), resolution=64, num_ddim_timesteps=10).scheduler
    )
    solver, consistency = DDIMSolver(schedule, 10), ConsistencyFunction(schedule, 10.0)
    index = torch.searchsorted(solver.timesteps, student.timesteps)
    assert torch.equal(solver.timesteps[index], student.timesteps)
    assert torch.equal(teacher.timesteps, student.timesteps.repeat(2))
    assert torch.equal(target.timesteps, solver.previous_timesteps[index])
    assert torch.equal(teacher.sample, student.sample.repeat(2, 1, 1, 1))
    # By hand: (1 + w)·Ψ(c) − w·Ψ(∅).
    branches = []
    for output in teacher.output.chunk(2):
        x0 = schedule.predict_x0(output, student.sample, student.timesteps)
        epsilon = schedule.predict_epsilon(output, student.sample, student.timesteps)
        branches.append(solver.step(x0, epsilon, index))
    previous = 4 * branches[0] - 3 * branches[1]
    torch.testing.assert_close(target.sample, previous, rtol=1e-4, atol=1e-4)
    expected = consistency(target.output, target.sample, target.timesteps)
    difference = consistency(student.output, student.sample, student.timesteps) - expected
    loss = ((difference**2 + 0.01**2).sqrt() - 0.01).mean()
    assert losses[1][1] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("program, workers", [(p, 0) for p in PROGRAMS] + [(p, 2) for p in ONE_OF_EACH])
def test_two_plus_two_resumed_steps_equal_four(program, workers, command, run, tmp_path, monkeypatch):
    """Bit for bit: samples, losses, weights. The public programs restart their data on every resume.

    The launch that resumes gives neither seed nor workers: both are the checkpoint's, whatever this machine's would be.
    """
    losses = captured_losses(monkeypatch)
    options = {"dataloader_num_workers": workers, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
               "lr_scheduler": "linear", "lr_warmup_steps": 1, "checkpointing_steps": 2,
               "random_flip": True, "family": family(program), "ema_decay": 0.9}  # fmt: skip
    if program in LORA_PROGRAMS:
        options |= {"lora_rank": 4, "lora_dropout": 0.1}
    run(program, command("whole", steps=4, **options))
    whole = list(losses)
    losses.clear()

    def stop(self, global_step, *rest, **options):
        save(self, global_step, *rest, **options)
        if global_step == 2:
            raise KeyboardInterrupt

    from lcm_distill.run.checkpoint import Checkpoints

    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run(program, command("halves", steps=4, **options))
    monkeypatch.setattr(Checkpoints, "save", save)
    again = {"seed": None, "dataloader_num_workers": None}
    run(program, command("halves", steps=4, resume_from_checkpoint="latest", **options | again))
    assert losses == whole and [s for s, _ in whole] == [1, 2, 3, 4]
    assert same(result(tmp_path / "whole"), result(tmp_path / "halves"))
    resumed = json.loads((tmp_path / "halves" / "checkpoint-4" / "run.json").read_text())
    assert resumed["flags"]["dataloader_num_workers"] == workers


@pytest.mark.parametrize("program", LORA_PROGRAMS)
@pytest.mark.parametrize(
    "options",
    [
        {"lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.5, "lora_target_modules": "to_q,to_v"},
        {"mixed_precision": "bf16", "gradient_checkpointing": True, "use_8bit_adam": True},
        {"mixed_precision": "bf16", "no-cast_teacher_unet": True, "ema_decay": 0.5},
        {"w_min": 7.5, "w_max": 7.5, "proportion_empty_prompts": 1},
        {"w_min": 0, "w_max": 0, "num_ddim_timesteps": 48, "vae_encode_batch_size": 1},
    ],
    ids=lambda options: "-".join(options),
)
def test_lora_options_run(program, options, command, run, tmp_path, monkeypatch):
    losses = captured_losses(monkeypatch)
    run(program, command(family=family(program), learning_rate=1e-3, **options))
    assert len(losses) == 2 and all(math.isfinite(loss) for _, loss in losses)
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert {w.dtype for w in adapter.values()} == {torch.float32}
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == options.get("lora_rank", 64) and config["lora_alpha"] == options.get("lora_alpha", 64)
    if "lora_target_modules" in options:
        assert {name.split(".")[-3] for name in adapter} == {"to_q", "to_v"}
    assert (tmp_path / "out" / "target").exists() == ("ema_decay" in options)


def test_alpha_follows_the_rank_and_a_resumed_run_keeps_its_own(command, run, tmp_path, caplog):
    """`--lora_rank 8` alone meant a scale of 8, since alpha stayed 64."""
    program = "train_lcm_distill_lora_sd_wds"

    def alpha(folder: str) -> tuple[int, int]:
        path = tmp_path / folder
        saved = json.loads((path / "adapter" / "adapter_config.json").read_text())
        launch = read_journal(path / "training.jsonl")[0][-1]
        assert launch["flags"]["lora_alpha"] == saved["lora_alpha"]
        return saved["r"], saved["lora_alpha"]

    run(program, command("follows", steps=1, lora_rank=2))
    assert alpha("follows") == (2, 2)
    run(program, command("own", steps=1, lora_rank=2, lora_alpha=8))  # as a run of before, with its own alpha
    run(program, command("own", steps=2, lora_rank=2, resume_from_checkpoint="latest"))
    assert alpha("own") == (2, 8)
    assert "--lora_alpha" not in caplog.text  # nothing has changed
    with pytest.raises(UsageError, match="--lora_alpha: 8 in the checkpoint, 4 now"):
        run(program, command("own", steps=3, lora_rank=2, lora_alpha=4, resume_from_checkpoint="latest"))
    for wrong in (0, -1, "8", None, True, 2.5):
        file = tmp_path / "own" / "checkpoint-2" / "run.json"
        record = json.loads(file.read_text())
        record["architecture"]["--lora_alpha"] = wrong
        write_record(file.parent, {k: v for k, v in record.items() if k not in ("files", "sha256")}, record["files"])
        with pytest.raises(UsageError, match="--lora_alpha"):
            run(program, command("own", steps=3, lora_rank=2, resume_from_checkpoint=str(file.parent)))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
@pytest.mark.parametrize("program", ["train_lcm_distill_sd_wds", "train_lcm_distill_lora_sd_wds"])
def test_who_may_read_what_a_run_writes_is_the_umask_s_choice(program, umask, mode, command, run, tmp_path):
    """Nobody but its owner could read the result, nor the checkpoints."""
    before = os.umask(umask)
    try:
        run(program, command(steps=1, dm_weight=1, **({"lora_rank": 2} if "lora" in program else {})))
    finally:
        os.umask(before)
    weights = list((tmp_path / "out").rglob("*.safetensors"))
    assert {stat.S_IMODE(path.stat().st_mode) for path in weights} == {mode}
    assert {"fake_score.safetensors"} < {path.name for path in weights}


@pytest.mark.parametrize("program", LORA_PROGRAMS)
def test_the_base_of_a_lora_is_in_the_mixed_precision_by_default(program, command, run, monkeypatch):
    seen = []
    forward = UNet2DConditionModel.forward

    def spy(self, sample, *args, **kwargs):
        seen.append((sample.dtype, self.conv_in.weight.dtype))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)
    for number, (options, dtype) in enumerate(
        (
            ({}, torch.bfloat16),
            ({"cast_teacher_unet": True}, torch.bfloat16),
            ({"no-cast_teacher_unet": True}, torch.float32),
        )
    ):
        seen.clear()
        run(program, command(f"out{number}", 1, family=family(program), mixed_precision="bf16", **options))
        assert {weight for _, weight in seen} == {dtype} and {sample for sample, _ in seen[:3]} == {dtype}


def check_channels_last(program, argv, run, monkeypatch) -> None:
    """During the run the weights of 3 × 3 convolutions are channels_last, those of their adapters too."""
    from lcm_distill.run.progress import Progress

    layouts, networks = [], []
    step, forward = Progress.step, UNet2DConditionModel.forward

    def looking(self, grad_norm):
        for module in {module for network in networks for module in network.modules()}:
            if type(module) is torch.nn.Conv2d and module.weight.shape[1] > 1 and module.weight.shape[2] > 1:
                layouts.append(module.weight.is_contiguous(memory_format=torch.channels_last))
        step(self, grad_norm)

    def spy(self, *args, **kwargs):
        networks.append(self)
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", looking)
        patch.setattr(UNet2DConditionModel, "forward", spy)
        run(program, argv)
    assert len(layouts) > 20 and all(layouts)


@pytest.mark.parametrize("program", ["train_lcm_distill_sd_wds", "train_lcm_distill_lora_sdxl_wds"])
def test_channels_last_weights_change_nothing_but_rounding(program, command, run, monkeypatch, tmp_path):
    """A checkpoint of one layout is resumed in the other.

    With so large an ε a step is proportional to the gradient, so that rounding stays as small as it is; Adam's usual
    steps are of one size, whatever the gradient, and a tolerance of that size hid that the fused kernel read moments
    of the other layout in the wrong order: off by 3 % of the way at the median weight, 17 % at the worst.
    """
    options = {"family": family(program), "learning_rate": 0.1, "adam_epsilon": 0.01, "adam_weight_decay": 0}
    options |= {"ema_decay": 0.5}
    options |= {"lora_rank": 4} if program in LORA_PROGRAMS else {}
    losses = captured_losses(monkeypatch)
    run(program, command("start", steps=1, **options | {"learning_rate": 0}))
    losses.clear()
    run(program, command("plain", steps=2, **options))
    expected = [loss for _, loss in losses]
    losses.clear()
    check_channels_last(program, command("last", steps=1, channels_last=True, **options), run, monkeypatch)
    run(program, command("last", steps=2, resume_from_checkpoint="latest", **options))
    assert [loss for _, loss in losses] == pytest.approx(expected, rel=2e-3)
    start, plain, last = (result(tmp_path / name) for name in ("start", "plain", "last"))
    assert plain.keys() == last.keys()
    for name, weight in plain.items():
        if weight.dtype == torch.float32 and weight.dim() == 4:
            moved, off = (float((weight - other[name]).norm()) for other in (start, last))
            assert off < 0.03 * moved + 1e-8, (name, off, moved)


@pytest.mark.parametrize("program", LORA_PROGRAMS)
def test_a_lora_run_holds_one_u_net(program, command, run, monkeypatch):
    """The public LoRA programs hold two. Counted in the middle of a run: live parameters of the U-Net's layers."""
    from lcm_distill.run.progress import Progress

    alive: list[int] = []
    step = Progress.step

    def counting(self, grad_norm):
        gc.collect()
        networks = [o for o in gc.get_objects() if isinstance(o, UNet2DConditionModel) and id(o) not in before]
        assert len(networks) == 1
        size, adapter = (
            sum(p.numel() for name, p in networks[0].named_parameters() if ("lora_" in name) == lora)
            for lora in (False, True)
        )
        own = {id(p) for p in networks[0].parameters()}
        # Nothing else that is large enough to be another copy, in any dtype.
        others = [o for o in gc.get_objects() if isinstance(o, torch.nn.Parameter) and id(o) not in own | before]
        alive.append(sum(o.numel() for o in others) - sum(o.numel() for n in parts for o in n.parameters()))
        assert 0 < adapter < size
        step(self, grad_norm)

    module = {"sd": sd, "sdxl": sdxl}[family(program)]
    load, parts = module.load_frozen, []

    def loading(*args, **kwargs):
        frozen = load(*args, **kwargs)
        parts.extend(getattr(frozen, n) for n in ("vae", "text_encoder", "text_encoder_2") if hasattr(frozen, n))
        return frozen

    gc.collect()
    left_over = [o for o in gc.get_objects() if isinstance(o, (UNet2DConditionModel, torch.nn.Parameter))]
    before = {id(o) for o in left_over}  # of other tests; they stay alive, so that no new one takes their ids
    monkeypatch.setattr(module, "load_frozen", loading)
    monkeypatch.setattr(Progress, "step", counting)
    run(program, command(steps=1, family=family(program), lora_rank=4))
    assert alive == [0]


@pytest.mark.parametrize("program", SDXL_PROGRAMS)
@pytest.mark.parametrize("fixed", [False, True])
def test_sdxl_s_time_ids_are_those_of_the_pictures(program, fixed, command, run, tmp_path, monkeypatch):
    """The public programs give (width, height) as the original size, and crop corners that ignore flips."""
    from PIL import Image

    folder = tmp_path / "wide"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(4):  # 96 wide, 48 high: 128 × 64 after the resize
            files = {"jpg": io.BytesIO(), "txt": io.BytesIO(PROMPT.encode())}
            Image.new("RGB", (96, 48), (40 * number, 0, 0)).save(files["jpg"], "JPEG")
            if number % 2:
                files["json"] = io.BytesIO(b'{"original_height": 480, "original_width": 960}')
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{number}.{extension}")
                member.size = len(content.getvalue())
                content.seek(0)
                tar.addfile(member, content)
    seen = []
    forward = UNet2DConditionModel.forward

    def spy(self, *args, added_cond_kwargs, **kwargs):
        seen.append(added_cond_kwargs["time_ids"])
        return forward(self, *args, added_cond_kwargs=added_cond_kwargs, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)
    run(program, command(
        family="sdxl", steps=1, train_batch_size=8, train_shards_path_or_url=str(folder), random_flip=True,
        use_fix_crop_and_size=fixed,
    ))  # fmt: skip
    teacher, target, student = seen[:3]
    assert torch.equal(teacher, torch.cat([student, student])) and torch.equal(target, student)
    sizes = {tuple(row) for row in student[:, :2].tolist()}
    corners = student[:, 2:4].tolist()
    assert sizes == ({(64, 64)} if fixed else {(48, 96), (480, 960)})
    assert student[:, 4:].unique().tolist() == [64] and not student.is_floating_point()
    assert all(top == 0 and 0 <= left <= 64 for top, left in corners)
    assert (len({left for _, left in corners}) > 1) is not fixed


def test_a_raised_max_train_steps_continues_a_finished_run(command, run, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lcm_distill"):
        run(PROGRAMS[0], command(steps=1))
        run(PROGRAMS[0], command(steps=2, resume_from_checkpoint="latest", checkpoints_total_limit=1))
        assert "resumed from" in caplog.text and "--max_train_steps: 1 → 2" in caplog.text
        assert [p.name for p in tmp_path.glob("out/checkpoint-*")] == ["checkpoint-2"]
        before = weights(tmp_path / "out")
        caplog.clear()
        (tmp_path / "out" / "diffusion_pytorch_model.safetensors").unlink()
        run(PROGRAMS[0], command(steps=1, resume_from_checkpoint="latest"))  # beyond its end: it only exports
    assert "this run is finished: it is at step 2" in caplog.text and same(before, weights(tmp_path / "out"))


def test_the_environment_s_accumulation_is_in_the_plan(command, run, monkeypatch, caplog):
    """Accelerate lets the variable override the flag: 8 pictures in twos were 4 steps of 4 pictures each, not 2."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    losses = captured_losses(monkeypatch)
    with caplog.at_level(logging.INFO, "lcm_distill"):
        run(
            PROGRAMS[0], command(steps=None, max_train_samples=8, num_train_epochs=1, learning_rate=1e-5, scale_lr=True)
        )
    assert [step for step, _ in losses] == [1, 2]
    assert "4 pictures (2 per device × 2 accumulated × 1 devices), learning rate 4e-05" in caplog.text


@pytest.mark.parametrize("program", PROGRAMS)
def test_same_seed_same_run_and_validation_changes_nothing(program, command, run, tmp_path, monkeypatch, caplog):
    """Nor does keeping the best checkpoint, with what dropout and the moving average draw and do."""
    losses = captured_losses(monkeypatch)
    options = {"steps": 2, "family": family(program), "ema_decay": 0.9, "learning_rate": 1e-3}
    if program in LORA_PROGRAMS:
        options |= {"lora_rank": 4, "lora_dropout": 0.1}
    results = []
    for number, more in enumerate(({"validation_steps": 1, "keep_best": True}, {}, {"seed": 8})):
        losses.clear()
        run(program, command(f"out{number}", **options | more))
        results.append((list(losses), result(tmp_path / f"out{number}")))
        if number == 0:
            kept = caplog.text.count("saved ")
    assert results[0][0] == results[1][0] and same(results[0][1], results[1][1]) and kept == 2
    assert results[0][0] != results[2][0]


def test_the_best_checkpoint_is_kept_and_can_be_exported(command, run, tmp_path, monkeypatch, caplog):
    """By the measured distance, here a given sequence; `best` has the weights of its step, and can be exported."""
    from lcm_distill.run import validation

    measured = iter([0.9, 0.9, 0.5, 0.5, 0.7, 0.7, 0.8, 0.8])  # student and target at each step
    monkeypatch.setattr(validation, "relative_distance", lambda answers, ends: next(measured))
    out, options = tmp_path / "out", {"keep_best": True, "validation_steps": 1, "checkpoints_total_limit": 1}
    run(PROGRAMS[0], command(steps=4, checkpointing_steps=3, learning_rate=1e-3, **options))
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    best = weights(out / "checkpoint-2" / "unet")
    assert not same(best, weights(out))
    # The best on its own, exported into another folder: the run is at its end there.
    with caplog.at_level(logging.INFO, "lcm_distill"):
        run(PROGRAMS[0], command("chosen", steps=2, resume_from_checkpoint=str(out / "checkpoint-2")))
    assert "this run is finished" in caplog.text and same(best, weights(tmp_path / "chosen"))


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "bf16", "pretrained_teacher_model": TOY_SD},
        {
            "mixed_precision": "bf16",
            "pretrained_teacher_model": TOY_SD,
            "cast_teacher_unet": True,
            "gradient_checkpointing": True,
        },
        {"use_8bit_adam": True, "center_crop": True, "interpolation_type": "lanczos"},
        {"enable_xformers_memory_efficient_attention": True, "proportion_empty_prompts": 1, "allow_tf32": True},
        {"max_train_steps": None, "max_train_samples": 4, "num_train_epochs": 1, "scale_lr": True},
        {"w_min": 0, "w_max": 0, "num_ddim_timesteps": 48, "vae_encode_batch_size": 1, "ema_decay": 0},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_run(options, command, run, tmp_path, monkeypatch):
    losses = captured_losses(monkeypatch)
    run(PROGRAMS[0], command(**options))
    assert len(losses) == 2 and all(math.isfinite(loss) for _, loss in losses)
    student, target = weights(tmp_path / "out" / "unet"), weights(tmp_path / "out" / "unet_target")
    assert {w.dtype for w in student.values()} == {torch.float32}
    if options.get("ema_decay") == 0:
        assert same(student, target)
    if "mixed_precision" in options:
        half = [loss for _, loss in losses]
        losses.clear()
        run(PROGRAMS[0], command("exact", pretrained_teacher_model=TOY_SD))
        exact = [loss for _, loss in losses]
        # In the first step student and teacher differ by the guidance embedding's rounding alone: bf16 is most of it.
        assert exact[0] < half[0] < 1e-3 and half[1] == pytest.approx(exact[1], rel=0.2) and half[1] != exact[1]
    flags = json.loads((tmp_path / "out" / "checkpoint-2" / "run.json").read_text())["flags"]
    assert all(flags[name] == value for name, value in options.items())


def test_autocast_has_the_run_s_dtype(command, run, monkeypatch):
    """Autocast without a dtype was fp16 on CUDA even for bf16 runs. A network in half precision is run without it."""
    seen = []
    forward = UNet2DConditionModel.forward

    def spy(self, sample, *args, **kwargs):
        seen.append(
            (sample.dtype, self.conv_in.weight.dtype, torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu"))
        )
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)
    run(PROGRAMS[0], command(steps=1, mixed_precision="bf16"))
    assert all(dtype == torch.bfloat16 for _, _, dtype, enabled in seen if enabled)
    teacher, target, student = seen[:3]
    assert teacher[:2] == (torch.bfloat16, torch.bfloat16) and not teacher[3]
    assert student[:2] == target[:2] == (torch.float32, torch.float32) and student[3] and target[3]
    seen.clear()
    run(LORA_PROGRAMS[0], command("lora", steps=1, mixed_precision="bf16"))
    assert [enabled for *_, enabled in seen[:3]] == [False, True, True]
    seen.clear()
    run(PROGRAMS[0], command("float32", 1, mixed_precision="bf16", **{"no-cast_teacher_unet": True}))
    assert seen[0] == (torch.float32, torch.float32, torch.bfloat16, True)


@pytest.mark.parametrize("program", ["train_lcm_distill_sd_wds", "train_lcm_distill_lora_sd_wds"])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_prediction_types_train(program, prediction_type, command, run, small_teacher, tmp_path):
    shutil.copytree(small_teacher, tmp_path / "teacher")
    path = tmp_path / "teacher" / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"prediction_type": prediction_type, "rescale_betas_zero_snr": True}
    path.write_text(json.dumps(config))
    run(program, command(pretrained_teacher_model=str(tmp_path / "teacher")))
    assert LCMScheduler.from_pretrained(tmp_path / "out").config.prediction_type == prediction_type
    assert all(torch.isfinite(w).all() for w in result(tmp_path / "out").values())


@pytest.mark.parametrize(
    "program, config",
    [
        (PROGRAMS[0], {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "clip_sample": False}),
        (PROGRAMS[2], {"_class_name": "DDIMScheduler", "beta_end": 0.012, "clip_sample": True, "steps_offset": 0}),
    ],
)
def test_what_is_exported_is_the_schedule_that_was_trained(program, config, command, run, tmp_path, small_teachers):
    """Another class's betas were exported, and the teacher's clipping unless pictures were generated in between."""
    shutil.copytree(small_teachers[family(program)], tmp_path / "teacher")
    (tmp_path / "teacher" / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    options = dict(family=family(program), steps=1, pretrained_teacher_model=str(tmp_path / "teacher"))
    for pictures in (0, 1):
        run(program, command(f"pictures-{pictures}", num_validation_images=pictures, **options))
    files = [tmp_path / f"pictures-{pictures}" / "scheduler_config.json" for pictures in (0, 1)]
    assert files[0].read_bytes() == files[1].read_bytes()
    kept, unknown = LCMScheduler.extract_init_dict(json.loads(files[0].read_text()))[:2]
    assert not unknown and kept.keys() == LCMScheduler().config.keys() - {"_use_default_values"}
    exported = LCMScheduler.from_pretrained(tmp_path / "pictures-1")
    trained = getattr(diffusers, config["_class_name"]).from_config(config)
    assert torch.equal(exported.alphas_cumprod, trained.alphas_cumprod)
    assert not exported.config.clip_sample and not exported.config.thresholding


@pytest.mark.hostile("teachers")
def test_a_vae_that_overflows_fails_a_dry_run_and_is_said_in_a_run(command, run, small_teacher, tmp_path, caplog):
    """A dry run of a teacher with black pictures said that all works, with exit code 0."""
    shutil.copytree(small_teacher, tmp_path / "teacher")
    vae = AutoencoderKL.from_pretrained(tmp_path / "teacher", subfolder="vae", torch_dtype=torch.float32)
    with torch.no_grad():
        vae.decoder.conv_out.bias.fill_(torch.nan)
    vae.save_pretrained(tmp_path / "teacher" / "vae")
    options = dict(steps=1, pretrained_teacher_model=str(tmp_path / "teacher"))
    with pytest.raises(DivergenceError, match="validation at step 1 is not finite: teacher, 1 step: 1 of 1 pictures"):
        run(PROGRAMS[0], command(dry_run=True, **options))
    assert "all work" not in caplog.text
    run(PROGRAMS[0], command(**options))
    assert "validation at step 1 is not finite" in caplog.text and "The run continues." in caplog.text
    assert (tmp_path / "out" / "scheduler_config.json").is_file()


@pytest.mark.parametrize("program", SDXL_PROGRAMS)
def test_a_teacher_with_pruned_blocks_is_distilled(program, command, run, tmp_path, pruned_teacher):
    """SSD-1B's layout: no attention in the middle, other numbers of layers up than down."""
    run(program, command(pretrained_teacher_model=pruned_teacher))
    pipeline = DiffusionPipeline.from_pretrained(pruned_teacher, torch_dtype=torch.float32)
    if program in LORA_PROGRAMS:
        pipeline.load_lora_weights(tmp_path / "out")
    else:
        pipeline.unet = UNet2DConditionModel.from_pretrained(tmp_path / "out")
    drawn(pipeline, tmp_path / "out", guidance_scale=1.0)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_teacher_as_early_libraries_wrote_it_is_the_same(program, command, run, tmp_path, old_teachers):
    """Diffusers' from_config drops what such a config did not say: a student of SD 1.5 had no guidance embedding."""
    options = {"family": family(program), "steps": 1, "learning_rate": 1e-3, "lr_warmup_steps": 0}
    run(program, command("new", **options))
    run(program, command("old", **options, pretrained_teacher_model=old_teachers[family(program)]))
    assert same(result(tmp_path / "old"), result(tmp_path / "new"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_public_launch_commands_run_and_resume(program, command, run, tmp_path, shards, small_teachers, caplog):
    """All flags of Diffusers' guides; teacher, VAE, shards, output, sizes and precision changed, nothing uploaded."""
    public = shlex.split(PUBLIC_COMMANDS[program.removeprefix("train_lcm_distill_").removesuffix("_wds")])
    teacher = small_teachers[family(program)]
    changed = {
        "--pretrained_teacher_model": teacher,
        "--pretrained_vae_model_name_or_path": f"{teacher}/vae",
        "--train_shards_path_or_url": shards,
        "--output_dir": str(tmp_path / "out"),
        "--resolution": "64",
        "--train_batch_size": "2",
        "--dataloader_num_workers": "1",
        "--mixed_precision": "no",
    }
    argv = [
        f"{name}={changed.get(name, value)}" if value else name for name, _, value in (w.partition("=") for w in public)
    ]
    argv.remove("--push_to_hub")
    with caplog.at_level(logging.INFO, "lcm_distill"):
        run(program, [*argv, "--max_train_steps=1", "--num_validation_images=1", "--validation_teacher_steps=2"])
        run(program, [*argv, "--max_train_steps=2", "--num_validation_images=1", "--validation_teacher_steps=2"])
    assert "resumed from" in caplog.text and (tmp_path / "out" / "checkpoint-2").exists()


def test_sampler_is_saved_with_the_run_s_grid_and_scaling(command, run, tmp_path):
    run(PROGRAMS[0], command(steps=1, num_ddim_timesteps=25, timestep_scaling_factor=5))
    config = LCMScheduler.from_pretrained(tmp_path / "out").config
    assert config.original_inference_steps == 25 and config.timestep_scaling == 5


def test_a_separate_vae_is_used(command, run, small_teacher, tmp_path):
    """The public SD programs take the flag and load the teacher's own VAE."""
    vae = AutoencoderKL.from_pretrained(small_teacher, subfolder="vae", torch_dtype=torch.float32)
    vae.register_to_config(scaling_factor=0.01)
    vae.save_pretrained(tmp_path / "vae")
    run(PROGRAMS[0], command("plain", steps=1))
    run(PROGRAMS[0], command("other", steps=1, pretrained_vae_model_name_or_path=str(tmp_path / "vae")))
    assert not same(weights(tmp_path / "plain"), weights(tmp_path / "other"))


@pytest.mark.parametrize("program", ["train_lcm_distill_sd_wds", "train_lcm_distill_lora_sd_wds"])
def test_dry_run_writes_nothing(program, command, run, tmp_path, caplog):
    """Although it takes the path of a run: checkpoint, validation and best checkpoint."""
    with caplog.at_level(logging.INFO, "lcm_distill"):
        run(program, command(dry_run=True, keep_best=True, checkpointing_steps=1, report_to="tensorboard,wandb"))
    assert "dry run: shards, models, a training step and validation all work" in caplog.text
    assert not list(tmp_path.iterdir())


def test_dry_run_of_a_resumed_run_does_take_a_step(command, run, tmp_path, monkeypatch):
    """It took no step at all, and logged that a step worked. Nothing of the earlier run changes."""
    run(PROGRAMS[0], command(steps=1, keep_best=True))
    before = contents(tmp_path / "out")
    losses = captured_losses(monkeypatch)
    run(PROGRAMS[0], command(dry_run=True, keep_best=True, resume_from_checkpoint="latest"))
    run(PROGRAMS[0], command(dry_run=True))
    assert [step for step, _ in losses] == [2, 1]
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("program", PROGRAMS[1:3])
def test_changed_settings_of_the_optimizer_are_used_on_resume(program, command, run, caplog):
    """Read from the resumed run's optimizer as it steps: the log reported them while the old ones were used."""
    before = {"learning_rate": 1e-4, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-8}
    before |= {"adam_weight_decay": 0.1, "family": family(program)}
    after = {"learning_rate": 3e-4, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    after |= {"adam_weight_decay": 0.02}
    seen = []

    def note(optimizer, args, kwargs):
        (group,) = optimizer.param_groups
        seen.append((group["lr"], *group["betas"], group["eps"], group["weight_decay"]))

    hook = register_optimizer_step_pre_hook(note)
    try:
        run(program, command(steps=1, **before))
        with caplog.at_level(logging.INFO, "lcm_distill"):
            run(program, command(steps=2, resume_from_checkpoint="latest", **before | after))
    finally:
        hook.remove()
    assert seen == [(1e-4, 0.9, 0.99, 1e-8, 0.1), tuple(after.values())]
    assert all(f"--{name}: {before[name]} → {value}" in caplog.text for name, value in after.items())


def test_a_cast_teacher_does_not_round_the_student(command, run, small_teacher, monkeypatch):
    """The student was copied from the teacher after that was cast to half precision."""
    made = []
    make = unets.student_from_teacher
    monkeypatch.setattr(
        unets,
        "student_from_teacher",
        lambda unet, dim: made.append({k: v.clone() for k, v in unet.state_dict().items()}) or make(unet, dim),
    )
    run(PROGRAMS[0], command(steps=1, mixed_precision="bf16", cast_teacher_unet=True, learning_rate=0))
    again = UNet2DConditionModel.from_pretrained(small_teacher, subfolder="unet", torch_dtype=torch.float32)
    assert same(made[0], dict(again.state_dict()))


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("variant", ["fp16", "fp32"])
def test_weights_of_a_variant_load_or_are_refused(variant, command, run, small_teacher, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(small_teacher, torch_dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "teacher", variant="fp16")
    options = {"steps": 1, "pretrained_teacher_model": str(tmp_path / "teacher")}
    if variant == "fp16":
        run(PROGRAMS[0], command(**options, variant=variant))
    for wrong in (None, "fp32"):
        with pytest.raises(UsageError, match="--variant"):
            run(PROGRAMS[0], command("other", **options, variant=wrong))


def test_a_loss_that_is_not_finite_stops_with_the_step(command, run, monkeypatch):
    with pytest.raises(DivergenceError, match="at step 1.*--learning_rate"):
        monkeypatch.setattr(lcd, "consistency_loss", lambda prediction, *_: prediction.mean() * float("nan"))
        run(PROGRAMS[0], command(steps=3))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pretrained_teacher_model": "/no/such/folder"}, "--pretrained_teacher_model /no/such/folder"),
        ({"train_shards_path_or_url": None}, "--train_shards_path_or_url"),
        ({"train_shards_path_or_url": "/no/such.tar"}, "--train_shards_path_or_url"),
        ({"resolution": 66}, "--resolution 66"),
        ({"num_ddim_timesteps": 2000}, "--num_ddim_timesteps"),
        ({"report_to": "nothing"}, "--report_to nothing"),
        (
            {"num_ddim_timesteps": 3, "validation_inference_steps": [1, 4]},
            "--validation_inference_steps 4: .*at most 2 steps",
        ),
        ({"validation_teacher_steps": 1001}, "--validation_teacher_steps 1001"),
        ({"resolution": 20}, "--resolution 20"),
        ({"output_dir": "/dev/null/x"}, "--output_dir /dev/null/x"),
        ({"resume_from_checkpoint": "checkpoint-9"}, "--resume_from_checkpoint"),
        ({"validation_prompts": ["no such file.txt"]}, "--validation_prompts"),
        ({"caption_column": "no_such"}, "--caption_column no_such"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_mistakes_are_reported_before_any_model_is_loaded(program, options, message, command, run, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match=message):
        run(program, command(family=family(program), **options))


@pytest.mark.hostile("checkpoints")
def test_a_checkpoint_of_another_architecture_is_refused(command, run, monkeypatch):
    run(PROGRAMS[0], command(steps=1))
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match="time_cond_proj_dim: 256 in the checkpoint, 128 now"):
        run(PROGRAMS[0], command(resume_from_checkpoint="latest", unet_time_cond_proj_dim=128))


@pytest.mark.hostile("shards")
def test_bad_samples_are_skipped_and_counted(command, run, shards, tmp_path, caplog):
    bad = tmp_path / "bad"
    bad.mkdir()
    with tarfile.open(next(Path(shards).glob("*.tar"))) as source, tarfile.open(bad / "0.tar", "w") as copy:
        for number, member in enumerate(source.getmembers()):
            if number < 30 and member.name.endswith(".txt"):  # the captions of the first ten samples go missing
                continue
            copy.addfile(member, source.extractfile(member))
    run(PROGRAMS[0], command(steps=4, train_batch_size=4, train_shards_path_or_url=str(bad)))
    assert re.search(r"samples dropped: \d+ \(.*no caption", caplog.text)


@pytest.fixture()
def truncations():
    """The libraries' warnings of captions that are longer than the text encoder."""
    texts: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record):
            texts.append(record.getMessage())

    handler, loggers = Collect(), [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield lambda: [text for text in texts if "truncated" in text or "longer than" in text]
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.mark.parametrize("program", ONE_OF_EACH)
def test_captions_longer_than_the_text_encoder_are_counted_once(
    command, run, shards, tmp_path, caplog, truncations, program
):
    """Each picture of each validation came with a warning: 36 lines in a short run, and no count."""
    long = tmp_path / "long"
    long.mkdir()
    with tarfile.open(next(Path(shards).glob("*.tar"))) as source, tarfile.open(long / "0.tar", "w") as copy:
        for number, member in enumerate(source.getmembers()):
            content = source.extractfile(member).read()
            if number < 9 and member.name.endswith(".txt"):  # the captions of the first three samples
                content = b"a red circle " * 100
                member.size = len(content)
            copy.addfile(member, io.BytesIO(content))
    options = dict(validation_prompts=None, validation_steps=1, train_shards_path_or_url=str(long))
    run(program, command(steps=2, family=family(program), **options))
    assert not truncations()
    assert len(re.findall("captions cut:    3 of 16 are longer than the", caplog.text)) == 1
    assert caplog.text.count("that the text encoder reads") == 1
    caplog.clear()
    prompts = [PROMPT, "a red circle " * 100]  # of which the preflight knows nothing
    run(program, command("other", steps=2, family=family(program), **options | dict(validation_prompts=prompts)))
    assert not truncations() and caplog.text.count("prompts: 1 of 2 is longer than") == 1


def test_two_ranks_train_one_adapter_on_their_own_data_and_resume(command, tmp_path):
    """Two gloo processes: disjoint samples, other draws, equal weights, a resume that changes nothing.

    For full students see tests/test_many_processes.py and tests/distributed/test_fsdp.py.
    """
    script = tmp_path / "ranks.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import train_lcm_distill_lora_sdxl_wds as program
from lcm_distill.run.progress import Progress
from lcm_distill.run.randomness import BatchGenerators

rank = None
log = []
batches = Progress.batches
def spying(self, *given):
    for batch in batches(self, *given):
        log.append((tuple(batch["captions"]), float(batch["pixels"].float().sum())))
        yield batch
Progress.batches = spying
draw = BatchGenerators.at
def at(self, batch):
    generator = draw(self, batch)
    log.append(generator.initial_seed())
    return generator
BatchGenerators.at = at
end = Progress.close
def close(self, *rest):
    accelerator = self._accelerator
    assert accelerator.num_processes == 2
    weights = torch.cat([p.detach().flatten() for p in accelerator._models[0].parameters() if p.requires_grad])
    torch.save({{"log": log, "weights": weights}}, sys.argv[1] + f"-rank{{accelerator.process_index}}.pt")
    end(self, *rest)
Progress.close = close
program.main(sys.argv[2:])
""")
    options = {"family": "sdxl", "lora_rank": 4, "ema_decay": 0.9}
    for name, steps, more in (
        ("whole", 4, []),
        ("halves", 2, []),
        ("halves", 4, ["--resume_from_checkpoint", "latest"]),
    ):
        argv = [str(tmp_path / f"{name}{steps}"), *command(name, steps, **options), *more]
        log = tmp_path / "log.txt"
        assert wait(start_ranks(script, argv, log), log) == [0, 0], log.read_text()[-3000:]
    whole = [torch.load(tmp_path / f"whole4-rank{rank}.pt") for rank in (0, 1)]
    halves = [torch.load(tmp_path / f"halves4-rank{rank}.pt") for rank in (0, 1)]
    assert torch.equal(whole[0]["weights"], whole[1]["weights"])
    assert not set(whole[0]["log"]) & set(whole[1]["log"])  # samples and draws
    for rank in (0, 1):
        assert halves[rank]["log"] == whole[rank]["log"][-len(halves[rank]["log"]) :]
        assert torch.equal(halves[rank]["weights"], whole[rank]["weights"])
    assert same(result(tmp_path / "whole"), result(tmp_path / "halves"))


@pytest.mark.parametrize("program", ONE_OF_EACH)
def test_a_run_begins_from_a_finished_student_and_resumes_without_it(program, command, run, tmp_path):
    """At a learning rate of zero its result is that student; it is read once, so that it may be gone at a resume."""
    options = {"family": family(program), "ema_decay": 0.9} | ({"lora_rank": 4} if "lora" in program else {})
    run(program, command("first", learning_rate=1e-2, **options))
    options |= {"init_student": tmp_path / "first", "learning_rate": 0}
    run(program, command("second", **options))
    first, second = result(tmp_path / "first"), result(tmp_path / "second")
    if "lora" in program:  # files of LoRAs are float16; the target is a second adapter
        files = ["pytorch_lora_weights.safetensors"] * 2
        files[1] = f"target/{files[0]}"
    else:
        files = [f"{folder}/diffusion_pytorch_model.safetensors" for folder in ("unet", "unet_target")]
    for file in files:
        own = {name: weight for name, weight in second.items() if name.startswith(f"{file}:")}
        assert own and all(torch.equal(w, first[name.replace(file, files[0], 1)]) for name, w in own.items()), file
    shutil.rmtree(tmp_path / "first")
    run(program, command("second", steps=3, resume_from_checkpoint="latest", **options))
    assert same(second, result(tmp_path / "second"))
    with pytest.raises(UsageError, match="--init_student .*first contains neither"):
        run(program, command("third", **options))


def test_accelerate_launch_prints_a_plain_message_for_a_mistake(command, tmp_path):
    """A user launches from a shell, in any folder: the message, no traceback of ours."""
    argv = command(pretrained_teacher_model="/no/such/folder")
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_lcm_distill_sd_wds.py"), *argv],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error: --pretrained_teacher_model /no/such/folder"), done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 4


@pytest.fixture(scope="module")
def varied_shards(tmp_path_factory) -> str:
    """Pictures of other sizes and shapes than square 64 pixels, so that cropping matters."""
    folder = tmp_path_factory.mktemp("varied")
    make_shards(folder, shards=1, samples_per_shard=24, seed=4, varied_sizes=True)
    return str(folder)


@pytest.mark.parametrize("program", ONE_OF_EACH)
def test_flags_that_did_nothing_in_the_public_programs_do_something(program, command, run, tmp_path, varied_shards):
    """center_crop, random_flip, proportion_empty_prompts, scale_lr; in the SD programs the separate VAE.

    --cache_dir has its tests where Hub teachers are read.
    """
    teacher = command(family=family(program))[1]
    vae = AutoencoderKL.from_pretrained(teacher, subfolder="vae", torch_dtype=torch.float32)
    vae.register_to_config(scaling_factor=2 * vae.config.scaling_factor)
    vae.save_pretrained(tmp_path / "vae")
    adapter = {"lora_rank": 2, "lora_target_modules": "to_q,to_v"} if program in LORA_PROGRAMS else {}
    results = []
    for number, options in enumerate((
        {}, {}, {"center_crop": True}, {"random_flip": True}, {"proportion_empty_prompts": 1}, {"scale_lr": True},
        {"pretrained_vae_model_name_or_path": str(tmp_path / "vae")},
    )):  # fmt: skip
        run(program, command(
            f"out{number}", steps=2, family=family(program), train_shards_path_or_url=varied_shards, **adapter | options
        ))  # fmt: skip
        results.append(result(tmp_path / f"out{number}"))
    assert same(results[0], results[1])
    for number, other in enumerate(results[2:]):
        assert not same(results[0], other), number
