"""The programs from command line to reloaded picture, on the toy teachers."""

import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel

import train_lcm_distill_sd_wds
from lcm_distill.errors import DivergenceError, UsageError

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ["train_lcm_distill_sd_wds"]
PROMPT = "a small red circle on a black background"


def weights(path) -> dict[str, torch.Tensor]:
    return load_file(Path(path) / "diffusion_pytorch_model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def captured_losses(monkeypatch) -> list[tuple[int, float]]:
    """(global step, loss) of every logged step of the programs run from here on."""
    from lcm_distill.progress import Progress

    losses: list[tuple[int, float]] = []
    log = Progress.log

    def recording(self, global_step, lr_scheduler):
        values = log(self, global_step, lr_scheduler)
        losses.append((global_step, values["loss"]))
        return values

    monkeypatch.setattr(Progress, "log", recording)
    return losses


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_trains_exports_and_its_export_draws(program, command, run, tmp_path, teacher, monkeypatch):
    frozen: dict = {}
    load = train_lcm_distill_sd_wds.sd.load_frozen
    monkeypatch.setattr(
        train_lcm_distill_sd_wds.sd, "load_frozen", lambda *a, **k: frozen.setdefault("it", load(*a, **k))
    )
    run(program, command(
        steps=3, learning_rate=1e-3, loss_type="huber", random_flip=True, validation_steps=2,
        report_to="tensorboard,wandb", validation_inference_steps=2, lr_scheduler="cosine", ema_decay=0.9, huber_c=0.01,
    ))  # fmt: skip
    out = tmp_path / "out"

    # What trains has moved, the target behind the student, and what is frozen is bitwise what it was.
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
    parts = frozen["it"]
    for network, kind, folder in (
        (parts.unet, UNet2DConditionModel, "unet"),
        (parts.vae, AutoencoderKL, "vae"),
        (parts.text_encoder, CLIPTextModel, "text_encoder"),
    ):
        again = kind.from_pretrained(teacher, subfolder=folder, torch_dtype=torch.float32)
        assert same(dict(network.state_dict()), dict(again.state_dict())), folder

    # The two-line load, in half and in full precision, with guidance 1, 4 and 8.
    half = UNet2DConditionModel.from_pretrained(out, torch_dtype=torch.float16, variant="fp16")
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    unet = UNet2DConditionModel.from_pretrained(out)
    assert same(dict(unet.state_dict()), student)
    pipeline = DiffusionPipeline.from_pretrained(teacher, unet=unet, torch_dtype=torch.float32)
    pipeline.scheduler = LCMScheduler.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for scale in (1.0, 4.0, 8.0):
        generator = torch.Generator().manual_seed(0)
        picture = pipeline(PROMPT, num_inference_steps=4, guidance_scale=scale, generator=generator).images[0]
        assert picture.size == (64, 64)
        pictures.append(np.asarray(picture).astype(int))
    assert np.abs(pictures[0] - pictures[2]).max() > 0  # guidance does something

    # Pictures, trackers, card, checkpoint.
    assert sorted(p.name for p in (out / "validation").iterdir()) == ["step-000002.png", "step-000003.png"]
    events = list((out / "logs").rglob("events.out.tfevents.*"))
    assert events and list((out / "logs").rglob("*.wandb"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(out / "logs" / "text2image-fine-tune"))
    reader.Reload()
    assert {"validation/student", "validation/target"} <= set(reader.Tags()["images"])
    assert {"loss", "lr", "samples_per_second", "data_wait"} <= set(reader.Tags()["scalars"])
    media = list((out / "logs").rglob("media/images/**/*.png"))
    assert len(media) == 4  # wandb: student and target, twice
    card = (out / "README.md").read_text()
    assert "LCMScheduler" in card and "validation/step-000003.png" in card
    assert (out / "checkpoint-3" / "run.json").exists()


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("workers", [0, 2])
def test_two_plus_two_resumed_steps_equal_four(program, workers, command, run, tmp_path, monkeypatch):
    """Bit for bit: samples, losses, weights. The public programs restart their data on every resume."""
    losses = captured_losses(monkeypatch)
    options = {"dataloader_num_workers": workers, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
               "lr_scheduler": "linear", "lr_warmup_steps": 1, "checkpointing_steps": 2,
               "random_flip": True}  # fmt: skip
    run(program, command("whole", steps=4, **options))
    whole = list(losses)
    losses.clear()

    def stop(self, global_step, *rest):
        save(self, global_step, *rest)
        if global_step == 2:
            raise KeyboardInterrupt

    from lcm_distill.checkpoint import Checkpoints

    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run(program, command("halves", steps=4, **options))
    monkeypatch.setattr(Checkpoints, "save", save)
    run(program, command("halves", steps=4, resume_from_checkpoint="latest", **options | {"seed": None}))
    assert losses == whole and [s for s, _ in whole] == [1, 2, 3, 4]
    for part in ("unet", "unet_target"):
        assert same(weights(tmp_path / "whole" / part), weights(tmp_path / "halves" / part))


def test_raising_max_train_steps_goes_on_and_a_finished_run_says_so(command, run, tmp_path, caplog):
    import logging

    with caplog.at_level(logging.INFO, "lcm_distill"):
        run(PROGRAMS[0], command(steps=1))
        run(PROGRAMS[0], command(steps=2, resume_from_checkpoint="latest", checkpoints_total_limit=1))
        assert "resumed from" in caplog.text and "--max_train_steps: 1 → 2" in caplog.text
        assert [p.name for p in tmp_path.glob("out/checkpoint-*")] == ["checkpoint-2"]
        before = weights(tmp_path / "out")
        caplog.clear()
        run(PROGRAMS[0], command(steps=2, resume_from_checkpoint="latest"))
    assert "finished" in caplog.text and same(before, weights(tmp_path / "out"))


def test_same_seed_same_run_and_validation_changes_nothing(command, run, tmp_path, monkeypatch):
    losses = captured_losses(monkeypatch)
    results = []
    for number, options in enumerate(({}, {"validation_steps": 1}, {"seed": 8})):
        losses.clear()
        run(PROGRAMS[0], command(f"out{number}", steps=2, **options))
        results.append((list(losses), weights(tmp_path / f"out{number}")))
    assert results[0][0] == results[1][0] and same(results[0][1], results[1][1])
    assert results[0][0] != results[2][0]


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "bf16"},
        {"mixed_precision": "bf16", "cast_teacher_unet": True, "gradient_checkpointing": True},
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
        exact = []
        losses.clear()
        run(PROGRAMS[0], command("exact"))
        exact += losses
        assert [s for s, _ in exact] == [1, 2]
    flags = json.loads((tmp_path / "out" / "checkpoint-2" / "run.json").read_text())["flags"]
    assert all(flags[name] == value for name, value in options.items())


def test_autocast_has_the_run_s_dtype(command, run, monkeypatch):
    """Autocast without a dtype was fp16 on CUDA even for bf16 runs."""
    seen = []
    forward = UNet2DConditionModel.forward

    def spy(self, sample, *args, **kwargs):
        seen.append(
            (sample.dtype, self.conv_in.weight.dtype, torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu"))
        )
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)
    run(PROGRAMS[0], command(steps=1, mixed_precision="bf16", cast_teacher_unet=True))
    assert all(enabled and dtype == torch.bfloat16 for _, _, dtype, enabled in seen)
    assert (torch.bfloat16, torch.bfloat16) in {s[:2] for s in seen}  # the cast teacher
    assert (torch.float32, torch.float32) in {s[:2] for s in seen}  # what trains


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_prediction_types_train(prediction_type, command, run, teacher, tmp_path):
    import shutil

    shutil.copytree(teacher, tmp_path / "teacher")
    path = tmp_path / "teacher" / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"prediction_type": prediction_type, "rescale_betas_zero_snr": True}
    path.write_text(json.dumps(config))
    run(PROGRAMS[0], command(pretrained_teacher_model=str(tmp_path / "teacher")))
    assert LCMScheduler.from_pretrained(tmp_path / "out").config.prediction_type == prediction_type
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "out").values())


def test_sampler_is_saved_with_the_run_s_grid_and_scaling(command, run, tmp_path):
    run(PROGRAMS[0], command(steps=1, num_ddim_timesteps=25, timestep_scaling_factor=5))
    config = LCMScheduler.from_pretrained(tmp_path / "out").config
    assert config.original_inference_steps == 25 and config.timestep_scaling == 5


def test_a_separate_vae_is_used(command, run, teacher, tmp_path):
    """The public SD programs take the flag and load the teacher's own VAE."""
    vae = AutoencoderKL.from_pretrained(teacher, subfolder="vae", torch_dtype=torch.float32)
    vae.register_to_config(scaling_factor=0.01)
    vae.save_pretrained(tmp_path / "vae")
    run(PROGRAMS[0], command("plain", steps=1))
    run(PROGRAMS[0], command("other", steps=1, pretrained_vae_model_name_or_path=str(tmp_path / "vae")))
    assert not same(weights(tmp_path / "plain"), weights(tmp_path / "other"))


def test_dry_run_writes_nothing(command, run, tmp_path, caplog):
    import logging

    with caplog.at_level(logging.INFO, "lcm_distill"):
        run(PROGRAMS[0], command(dry_run=True, report_to="tensorboard,wandb"))
    assert "dry run" in caplog.text and not (tmp_path / "out").exists()


def test_dry_run_of_a_resumed_run_does_take_a_step(command, run, tmp_path, monkeypatch):
    """It ran for no step at all, and said that a step worked."""
    run(PROGRAMS[0], command(steps=1))
    losses = captured_losses(monkeypatch)
    run(PROGRAMS[0], command(dry_run=True, resume_from_checkpoint="latest"))
    run(PROGRAMS[0], command(dry_run=True))
    assert [step for step, _ in losses] == [2, 1]
    assert [p.name for p in tmp_path.glob("out/checkpoint-*")] == ["checkpoint-1"]


def test_a_changed_learning_rate_is_used_on_resume(command, run, caplog):
    import logging

    run(PROGRAMS[0], command(steps=1))
    with caplog.at_level(logging.INFO, "lcm_distill"):
        run(PROGRAMS[0], command(steps=2, resume_from_checkpoint="latest", learning_rate=0))
    assert "--learning_rate: 0.0001 → 0.0" in caplog.text


def test_a_cast_teacher_does_not_round_the_student(command, run, teacher, monkeypatch):
    """The student was copied from the teacher after that was cast to half precision."""
    made = []
    make = train_lcm_distill_sd_wds.student_from_teacher
    monkeypatch.setattr(
        train_lcm_distill_sd_wds,
        "student_from_teacher",
        lambda unet, dim: made.append({k: v.clone() for k, v in unet.state_dict().items()}) or make(unet, dim),
    )
    run(PROGRAMS[0], command(steps=1, mixed_precision="bf16", cast_teacher_unet=True, learning_rate=0))
    again = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet", torch_dtype=torch.float32)
    assert same(made[0], dict(again.state_dict()))


@pytest.mark.parametrize("variant", ["fp16", "fp32"])
def test_weights_of_a_variant_load_or_are_told(variant, command, run, teacher, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "teacher", variant="fp16")
    options = {"steps": 1, "pretrained_teacher_model": str(tmp_path / "teacher")}
    if variant == "fp16":
        run(PROGRAMS[0], command(**options, variant=variant))
    for wrong in (None, "fp32"):
        with pytest.raises(UsageError, match="--variant"):
            run(PROGRAMS[0], command("other", **options, variant=wrong))


def test_a_loss_that_is_not_finite_stops_with_the_step(command, run, monkeypatch):
    with pytest.raises(DivergenceError, match="at step 1.*--learning_rate"):
        monkeypatch.setattr(
            train_lcm_distill_sd_wds, "consistency_loss", lambda prediction, *_: prediction.mean() * float("nan")
        )
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
        ({"num_ddim_timesteps": 3, "validation_inference_steps": 4}, "--validation_inference_steps 4"),
        ({"resolution": 20}, "--resolution 20"),
        ({"output_dir": "/dev/null/x"}, "--output_dir /dev/null/x"),
        ({"resume_from_checkpoint": "checkpoint-9"}, "--resume_from_checkpoint"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_told_before_any_model_is_loaded(options, message, command, run, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match=message):
        run(PROGRAMS[0], command(**options))


def test_a_checkpoint_of_another_architecture_is_refused(command, run, monkeypatch):
    run(PROGRAMS[0], command(steps=1))
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match="time_cond_proj_dim: 256 there, 128 here"):
        run(PROGRAMS[0], command(resume_from_checkpoint="latest", unet_time_cond_proj_dim=128))


def test_bad_samples_are_skipped_and_counted(command, run, shards, tmp_path, caplog):
    import tarfile

    bad = tmp_path / "bad"
    bad.mkdir()
    with tarfile.open(next(Path(shards).glob("*.tar"))) as source, tarfile.open(bad / "0.tar", "w") as copy:
        for number, member in enumerate(source.getmembers()):
            if number < 30 and member.name.endswith(".txt"):  # the captions of the first ten samples go missing
                continue
            copy.addfile(member, source.extractfile(member))
    run(PROGRAMS[0], command(steps=4, train_batch_size=4, train_shards_path_or_url=str(bad)))
    assert re.search(r"samples dropped: \d+ \(.*no caption", caplog.text)


def torchrun(argv: list[str], tmp_path: Path) -> subprocess.CompletedProcess:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", *argv],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_two_ranks_train_one_model_on_their_own_data_and_resume(command, tmp_path):
    """Two gloo processes: disjoint samples, other draws, equal weights, a resume that changes nothing."""
    script = tmp_path / "ranks.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import train_lcm_distill_sd_wds as program
from lcm_distill.progress import Progress

rank = None
log = []
batches = Progress.batches
def spying(self, loader):
    for batch in batches(self, loader):
        log.append((tuple(batch["captions"]), float(batch["pixels"].float().sum())))
        yield batch
Progress.batches = spying
draw = program.BatchRandom.at
def at(self, batch):
    generator = draw(self, batch)
    log.append(generator.initial_seed())
    return generator
program.BatchRandom.at = at
end = program.Progress.close
def close(self):
    accelerator = self._accelerator
    assert accelerator.num_processes == 2
    weights = torch.cat([p.detach().flatten() for p in accelerator._models[0].parameters()])
    torch.save({{"log": log, "weights": weights}}, sys.argv[1] + f"-rank{{accelerator.process_index}}.pt")
    end(self)
program.Progress.close = close
program.main(sys.argv[2:])
""")
    for name, steps, more in (
        ("whole", 4, []),
        ("halves", 2, []),
        ("halves", 4, ["--resume_from_checkpoint", "latest"]),
    ):
        done = torchrun([str(script), str(tmp_path / f"{name}{steps}"), *command(name, steps=steps), *more], tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    whole = [torch.load(tmp_path / f"whole4-rank{rank}.pt") for rank in (0, 1)]
    halves = [torch.load(tmp_path / f"halves4-rank{rank}.pt") for rank in (0, 1)]
    assert torch.equal(whole[0]["weights"], whole[1]["weights"])
    assert not set(whole[0]["log"]) & set(whole[1]["log"])  # samples and draws
    for rank in (0, 1):
        assert halves[rank]["log"] == whole[rank]["log"][-len(halves[rank]["log"]) :]
        assert torch.equal(halves[rank]["weights"], whole[rank]["weights"])


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
