"""Finished students: found in any layout, put into a teacher's pipeline as users do, and taken out again."""

import contextlib
import copy
import json
import logging
import pickle
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from finished_students import GRID
from peft.tuners.lora import LoraLayer
from pickle_bombs import explodes, plant

from lcm_distill.environment import quiet_libraries
from lcm_distill.errors import UsageError
from lcm_distill.models.families import family_of
from lcm_distill.models.lora import Lora
from lcm_distill.models.teacher import Teacher
from lcm_distill.models.unets import UNetPart, student_from_teacher
from lcm_distill.run.record import write_record
from lcm_distill.sampling.finished import (
    Student,
    WeightedLora,
    find_student,
    find_students,
    load_teacher,
    native_resolution,
    with_loras,
)
from lcm_distill.sampling.generate import build_teacher_sampler, generate_latents

PROMPTS = ["a small red circle on a black background", "a large blue square on a white background"]
SETTINGS = dict(inference_steps=2, guidance_scale=4.0, resolution=64, batch_size=2)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipelines(teachers):
    return {
        family: load_teacher(Teacher(teacher), device="cpu", dtype=torch.float32)
        for family, teacher in teachers.items()
    }


@pytest.fixture()
def pipeline(pipelines, family):
    """The teacher's; after each test it must be the teacher's again."""
    yield from restored(pipelines[family])


@pytest.fixture()
def sd_pipeline(pipelines):
    yield from restored(pipelines["sd"])


def restored(pipeline):
    def networks():
        return {name: copy.deepcopy(getattr(pipeline, name).state_dict()) for name in ("unet", "text_encoder", "vae")}

    before, unet, scheduler = networks(), pipeline.unet, pipeline.scheduler
    yield pipeline
    assert pipeline.unet is unet and pipeline.scheduler is scheduler and not pipeline.get_list_adapters()
    for name, state in networks().items():
        assert state.keys() == before[name].keys() and all(torch.equal(state[k], before[name][k]) for k in state), name


def generate(pipeline, **more):
    return generate_latents(pipeline, PROMPTS, [1, 2], **SETTINGS | more)


def called_directly(pipeline, guidance_scale=4.0):
    """The latents of a direct call of a Diffusers pipeline."""
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return pipeline(
        PROMPTS, num_inference_steps=2, guidance_scale=guidance_scale, generator=generators, output_type="latent"
    ).images


def users_pipeline(teacher, student, **more):
    """As in the README."""
    pipeline = DiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32, **more)
    pipeline.scheduler = LCMScheduler.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --- the teacher


def test_the_teacher_s_pipeline_is_complete_and_samples_with_ddim(pipeline, family, teachers):
    assert family_of(pipeline.unet.config).NAME == family and native_resolution(pipeline) == 64
    users = DiffusionPipeline.from_pretrained(teachers[family], torch_dtype=torch.float32)
    users.set_progress_bar_config(disable=True)
    users.scheduler = DDIMScheduler.from_config(
        users.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=False, clip_sample=False
    )
    close(generate(pipeline), called_directly(users))
    with pytest.raises(UsageError, match="--resolution"):
        load_teacher(Teacher(teachers[family]), device="cpu", dtype=torch.float32, resolution=63)


def test_a_vae_of_another_factor_needs_no_resolution_to_be_loaded(teachers, tmp_path):
    """Without the flag, a resolution of 8 was checked, which is not a multiple of 16."""
    vae = AutoencoderKL.from_pretrained(teachers["sd"], subfolder="vae")
    coarse = {"block_out_channels": [8] * 5, "down_block_types": ["DownEncoderBlock2D"] * 5}
    coarse |= {"up_block_types": ["UpDecoderBlock2D"] * 5}
    AutoencoderKL.from_config(dict(vae.config) | coarse).save_pretrained(tmp_path)
    pipeline = load_teacher(Teacher(teachers["sd"], vae=str(tmp_path)), device="cpu", dtype=torch.float32)
    assert pipeline.vae_scale_factor == 16 and native_resolution(pipeline) == 256
    assert generate_latents(pipeline, PROMPTS, [1, 2], **SETTINGS).shape == (2, 4, 4, 4)
    with pytest.raises(UsageError, match="--resolution 72 is not a multiple of 16"):
        load_teacher(Teacher(teachers["sd"], vae=str(tmp_path)), device="cpu", dtype=torch.float32, resolution=72)


def test_a_teacher_whose_config_has_no_size_needs_the_flag(sd_pipeline):
    unet = sd_pipeline.unet
    sd_pipeline.unet = UNet2DConditionModel.from_config(dict(unet.config) | {"sample_size": None})
    with pytest.raises(UsageError, match="--resolution is needed"):
        native_resolution(sd_pipeline)
    sd_pipeline.unet = unet


def test_sdxl_s_vae_stays_in_float32_and_the_rest_does_not(teachers):
    pipeline = load_teacher(Teacher(teachers["sdxl"]), device="cpu", dtype=torch.bfloat16)
    upcast = pipeline.vae.config.force_upcast
    assert pipeline.unet.dtype == pipeline.text_encoder_2.dtype == torch.bfloat16
    assert pipeline.vae.dtype == (torch.float32 if upcast else torch.bfloat16)


# --- students in the pipeline


def test_a_full_student_generates_as_in_its_users_pipeline(pipeline, family, finished, teachers):
    folder = finished("full", family)
    users = users_pipeline(teachers[family], folder, unet=UNet2DConditionModel.from_pretrained(folder))
    before = generate(pipeline)
    with find_student(folder).installed_in(pipeline) as installed:
        assert installed is pipeline
        close(generate(pipeline), called_directly(users))
        assert (generate(pipeline, guidance_scale=2.0) - generate(pipeline)).abs().max() > 1e-3
    assert torch.equal(generate(pipeline), before)


def test_a_lora_with_a_style_equals_set_adapters(pipeline, family, finished, teachers):
    folder, style = finished("lora", family), finished("style", family)
    users = users_pipeline(teachers[family], folder)
    users.load_lora_weights(folder, adapter_name="lcm")
    alone = called_directly(users, 1.0)
    users.load_lora_weights(style, adapter_name="style")
    users.set_adapters(["lcm", "style"], [0.9, 0.5])
    student, before = find_student(folder), generate(pipeline)
    with student.installed_in(pipeline):
        close(generate(pipeline, guidance_scale=1.0), alone)
    with student.installed_in(pipeline, lora_scale=0.9, loras=[WeightedLora(style, 0.5)]):
        close(generate(pipeline, guidance_scale=1.0), called_directly(users, 1.0))
        assert (generate(pipeline, guidance_scale=1.0) - alone).abs().max() > 0.01
    assert torch.equal(generate(pipeline), before)


def test_a_style_on_a_full_student_and_on_the_teacher(sd_pipeline, finished, teachers):
    folder, style = finished("full", "sd"), finished("style", "sd")
    users = users_pipeline(teachers["sd"], folder, unet=UNet2DConditionModel.from_pretrained(folder))
    users.load_lora_weights(style, adapter_name="style")
    users.set_adapters(["style"], [0.5])
    before = generate(sd_pipeline)
    with find_student(folder).installed_in(sd_pipeline, loras=[WeightedLora(style, 0.5)]):
        close(generate(sd_pipeline), called_directly(users))
    users.unet.unload_lora()
    users = users_pipeline(teachers["sd"], folder)
    users.scheduler = sd_pipeline.scheduler
    users.load_lora_weights(style, adapter_name="style")
    users.set_adapters(["style"], [0.5])
    with with_loras(sd_pipeline, [WeightedLora(style, 0.5)]):
        close(generate(sd_pipeline), called_directly(users))
    assert torch.equal(generate(sd_pipeline), before)


def test_a_fused_student_is_a_copy_that_may_be_kept(sd_pipeline, finished):
    student = find_student(finished("lora", "sd"))
    with student.installed_in(sd_pipeline, lora_scale=0.7):
        expected = generate(sd_pipeline, guidance_scale=1.0)
    with student.installed_in(sd_pipeline, fuse=True, lora_scale=0.7):
        kept, sampler = sd_pipeline.unet, sd_pipeline.scheduler
        assert not any(isinstance(module, LoraLayer) for module in kept.modules())
        close(generate(sd_pipeline, guidance_scale=1.0), expected)
    teacher, scheduler = sd_pipeline.unet, sd_pipeline.scheduler
    sd_pipeline.unet, sd_pipeline.scheduler = kept, sampler
    close(generate(sd_pipeline, guidance_scale=1.0), expected)
    sd_pipeline.unet, sd_pipeline.scheduler = teacher, scheduler


def test_students_in_turn_leave_nothing_behind(sd_pipeline, finished):
    lora, full = find_student(finished("lora", "sd")), find_student(finished("full", "sd"))
    pictures = []
    for student in (lora, full, lora, full):
        with student.installed_in(sd_pipeline):
            pictures.append(generate(sd_pipeline))
    assert torch.equal(pictures[0], pictures[2]) and torch.equal(pictures[1], pictures[3])


def test_which_students_have_a_guidance_embedding(finished, teachers, tmp_path):
    assert find_student(finished("full", "sd")).has_guidance_embedding
    assert not find_student(finished("lora", "sd")).has_guidance_embedding
    shutil.copytree(Path(teachers["sd"], "unet"), tmp_path / "merged")
    assert not find_student(str(tmp_path / "merged")).has_guidance_embedding


# --- finding them


def test_students_are_found_in_every_layout(finished, tmp_path):
    full, lora = finished("full", "sd"), finished("lora", "sd")
    assert find_student(full) == Student(full, "full")
    assert find_student(lora) == Student(lora, "lora")
    assert find_student(f"{full}/unet_target") == Student(f"{full}/unet_target", "full")
    for file in ("pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"):
        assert find_student(f"{lora}/{file}") == Student(f"{lora}/{file}", "lora")
    shutil.copytree(f"{full}/unet", tmp_path / "pipeline" / "unet")
    assert find_student(str(tmp_path / "pipeline")) == Student(str(tmp_path / "pipeline"), "full", "unet")


def test_the_short_names_of_students(finished, tmp_path, monkeypatch):
    lora = Path(finished("lora", "sd"))
    assert find_student(str(lora)).name == lora.name == find_student(f"{lora}/").name
    assert find_student(f"{lora}/pytorch_lora_weights.safetensors").name == lora.name  # every LoRA file has this name
    shutil.copy(lora / "pytorch_lora_weights.safetensors", tmp_path / "paper-cut.v1.safetensors")
    assert find_student(str(tmp_path / "paper-cut.v1.safetensors")).name == "paper-cut.v1"
    monkeypatch.chdir(lora)
    assert find_student(".").name == lora.name
    assert Student("someone/lcm-lora-x", "lora").name == "lcm-lora-x"


@pytest.mark.hostile("teachers")
def test_two_students_of_one_name_are_refused(finished, tmp_path):
    lora = finished("lora", "sd")
    shutil.copytree(lora, tmp_path / Path(lora).name)
    assert len(find_students([lora, finished("full", "sd")])) == 2
    with pytest.raises(UsageError, match=f"--student: two are called {Path(lora).name}"):
        find_students([lora, str(tmp_path / Path(lora).name)])


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("content", ["nothing", "a folder", "a picture", "a LoRA of another name"])
def test_a_source_without_a_student_is_refused_with_the_flag(content, tmp_path):
    path = tmp_path / "it"
    if content != "nothing":
        path.mkdir()
    if content == "a LoRA of another name":
        (path / "style.safetensors").touch()
    if content == "a picture":
        path = path / "a.png"
        path.touch()
    with pytest.raises(UsageError, match=f"--student {path} contains neither a U-Net .* nor a LoRA"):
        find_student(str(path))


@pytest.mark.hostile("servers")
def test_a_hub_id_without_a_connection_is_refused_unless_it_is_in_the_cache(finished, tmp_path, sd_pipeline):
    """After one file that the cache lacked, those that it had were not found either."""
    with pytest.raises(UsageError, match="--student some/lcm: no such folder, and the Hub cannot be reached"):
        find_student("some/lcm", str(tmp_path))
    cached = tmp_path / "models--some--lcm"
    shutil.copytree(finished("full", "sd"), cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    student = find_student("some/lcm", str(tmp_path))
    assert student == Student("some/lcm", "full", cache_dir=str(tmp_path)) and student.has_guidance_embedding
    with student.installed_in(sd_pipeline):
        from_cache, grid = generate(sd_pipeline), sd_pipeline.scheduler.config.original_inference_steps
    with find_student(finished("full", "sd")).installed_in(sd_pipeline):
        assert grid == GRID and torch.equal(generate(sd_pipeline), from_cache)


# --- public students


def test_a_public_lcm_is_a_complete_pipeline(sd_pipeline, finished, teachers, tmp_path):
    """Its `unet/` and its `scheduler/` are used; the config of an older version has other notation."""
    shutil.copytree(teachers["sd"], tmp_path / "lcm", ignore=shutil.ignore_patterns("unet", "scheduler"))
    shutil.copytree(f"{finished('full', 'sd')}/unet", tmp_path / "lcm" / "unet")
    LCMScheduler(original_inference_steps=25).save_pretrained(tmp_path / "lcm" / "scheduler")
    file = tmp_path / "lcm" / "unet" / "config.json"
    config = json.loads(file.read_text())
    assert config["upcast_attention"] is False and config["attention_head_dim"] == 4
    config |= {"upcast_attention": None, "attention_head_dim": [4, 4, 4], "sample_size": 96, "_name_or_path": "x"}
    config.pop("transformer_layers_per_block")
    file.write_text(json.dumps(config))
    with find_student(finished("full", "sd")).installed_in(sd_pipeline):
        sampler, expected = sd_pipeline.scheduler, generate(sd_pipeline)
    for place in (tmp_path / "lcm", tmp_path / "lcm" / "unet"):
        with find_student(str(place)).installed_in(sd_pipeline):
            assert sd_pipeline.scheduler.config.original_inference_steps == 25
            sd_pipeline.scheduler = sampler
            close(generate(sd_pipeline), expected)


def test_a_public_lora_has_no_scheduler_of_its_own(sd_pipeline, finished, tmp_path):
    """It gets an `LCMScheduler` with the teacher's noise schedule and Diffusers' grid."""
    shutil.copy(Path(finished("lora", "sd"), "pytorch_lora_weights.safetensors"), tmp_path)
    for place in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        with find_student(str(place)).installed_in(sd_pipeline):
            config = sd_pipeline.scheduler.config
            assert isinstance(sd_pipeline.scheduler, LCMScheduler) and config.original_inference_steps == 50
            assert (config.beta_schedule, config.beta_end) == ("scaled_linear", 0.012)
            assert generate(sd_pipeline, guidance_scale=1.0).isfinite().all()


@pytest.mark.parametrize(
    "part", ["full:", "full:unet", "full:unet_target", "lora:", "lora:kohya_lora_weights.safetensors"]
)
def test_the_parts_of_a_distillation_have_its_scheduler(part, finished):
    """The target of a run was sampled with Diffusers' grid and scaling instead of the run's."""
    kind, _, name = part.partition(":")
    scheduler = find_student(str(Path(finished(kind, "sd"), name))).sampler({})
    assert (scheduler.config.original_inference_steps, scheduler.config.timestep_scaling) == (GRID, 5.0)


def test_a_saved_scheduler_does_not_clip(finished, tmp_path):
    """Older versions saved the teacher's clip_sample."""
    shutil.copytree(finished("full", "sd"), tmp_path / "old")
    LCMScheduler(original_inference_steps=GRID, clip_sample=True, thresholding=True).save_pretrained(tmp_path / "old")
    config = find_student(str(tmp_path / "old")).sampler({}).config
    assert (config.clip_sample, config.thresholding, config.original_inference_steps) == (False, False, GRID)


def test_a_saved_scheduler_of_another_class_has_its_own_schedule(finished, tmp_path):
    """A pipeline's: what its config leaves out had `LCMScheduler`'s defaults."""
    folder = tmp_path / "lcm"
    shutil.copytree(f"{finished('full', 'sd')}/unet", folder / "unet")
    (folder / "scheduler").mkdir()
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "DDIMScheduler", "num_train_timesteps": 500}))
    sampler = find_student(str(folder)).sampler({})
    assert isinstance(sampler, LCMScheduler)
    assert torch.equal(sampler.alphas_cumprod, DDIMScheduler(500).alphas_cumprod)
    file.write_text(json.dumps({"_class_name": "EDMEulerScheduler"}))
    with pytest.raises(UsageError, match=f"--student {folder}: its scheduler .EDMEulerScheduler."):
        find_student(str(folder)).sampler({})


@pytest.mark.parametrize("name", ["DDPMScheduler", "HeunDiscreteScheduler", "LCMScheduler"])
def test_a_lora_without_a_scheduler_has_the_schedule_of_the_teacher(name, finished, tmp_path):
    shutil.copy(Path(finished("lora", "sd"), "pytorch_lora_weights.safetensors"), tmp_path)
    own = getattr(diffusers, name)()
    for config in ({"_class_name": name}, dict(own.config), dict(build_teacher_sampler({"_class_name": name}).config)):
        sampler = find_student(str(tmp_path)).sampler(config)
        assert torch.equal(sampler.alphas_cumprod, own.alphas_cumprod) and not sampler.config.clip_sample


def test_the_kohya_file_generates_the_same(sd_pipeline, finished):
    pictures = []
    for file in ("pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"):
        with find_student(str(Path(finished("lora", "sd"), file))).installed_in(sd_pipeline):
            pictures.append(generate(sd_pipeline, guidance_scale=1.0))
    close(*pictures)


def test_a_folder_with_only_half_precision_weights_is_loaded(sd_pipeline, finished, tmp_path):
    folder = Path(finished("full", "sd"))
    for file in ("config.json", "diffusion_pytorch_model.fp16.safetensors"):
        shutil.copy(folder / file, tmp_path)
    with find_student(str(tmp_path)).installed_in(sd_pipeline):
        assert sd_pipeline.unet.dtype == torch.float32 and not sd_pipeline.unet.training


# --- checkpoints


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, teachers):
    """Of runs "full" and "lora" of the SD teacher, whose weights have changed; their flags are not the defaults."""
    made = {}
    for kind in ("full", "lora"):
        path = tmp_path_factory.mktemp("runs") / f"lcm-{kind}" / "checkpoint-30"
        unet = UNet2DConditionModel.from_pretrained(teachers["sd"], subfolder="unet", torch_dtype=torch.float32)
        generator = torch.Generator().manual_seed(5)
        if kind == "full":
            student = student_from_teacher(unet, 64)
            parts = {"unet": UNetPart(student), "unet_target": UNetPart(student)}
            changed = [student.time_embedding.cond_proj.weight, student.conv_out.weight]
        else:
            lora = Lora(unet, rank=2, alpha=6)
            parts, changed = lora.parts(), lora.parameters()
        with torch.no_grad():
            for parameter in changed:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        for name, part in parts.items():
            part.save(path / name)
        write_record(path, {"global_step": 30, "processes": 1, "flags": FLAGS}, {})
        made[kind] = path, (student if kind == "full" else unet).eval()
    return made


FLAGS = {"num_ddim_timesteps": GRID, "timestep_scaling_factor": 5.0}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_checkpoint_is_the_student_that_it_holds(kind, checkpoints, sd_pipeline):
    """A LoRA's was refused, and a full student's was sampled with a grid of 50, whatever it was trained with."""
    path, unet = checkpoints[kind]
    student = find_student(str(path))
    assert (student.kind, student.name) == (kind, f"lcm-{kind}/checkpoint-30")
    assert student.has_guidance_embedding == (kind == "full")
    sampler = student.sampler(sd_pipeline.scheduler.config)
    assert (sampler.config.original_inference_steps, sampler.config.timestep_scaling) == (GRID, 5.0)
    scale = 4.0 if kind == "full" else 1.0
    before = generate(sd_pipeline)
    with student.installed_in(sd_pipeline):
        found = generate(sd_pipeline, guidance_scale=scale)
    teacher, scheduler = sd_pipeline.unet, sd_pipeline.scheduler
    try:
        sd_pipeline.unet, sd_pipeline.scheduler = unet, sampler
        close(found, generate(sd_pipeline, guidance_scale=scale))
    finally:
        sd_pipeline.unet, sd_pipeline.scheduler = teacher, scheduler
    assert (found - before).abs().max() > 0.01 and torch.equal(generate(sd_pipeline), before)


def test_parts_of_a_checkpoint_are_students_with_its_sampler(checkpoints, sd_pipeline):
    for kind, part in (("full", "unet_target"), ("lora", "adapter")):
        student = find_student(str(checkpoints[kind][0] / part))
        assert student.kind == kind and student.sampler({}).config.original_inference_steps == GRID
        with student.installed_in(sd_pipeline):
            assert generate(sd_pipeline, guidance_scale=1.0).isfinite().all()


@pytest.mark.parametrize("top, starts", [(None, 999), (699, 699), (999, 999)])
def test_a_checkpoint_is_sampled_from_where_its_run_starts(top, starts, checkpoints, tmp_path):
    """It was sampled from the last timestep, where a student with --top_timestep was not trained."""
    shutil.copytree(checkpoints["lora"][0], tmp_path / "checkpoint-30")
    flags = {"num_ddim_timesteps": 50, "timestep_scaling_factor": 10.0} | ({"top_timestep": top} if top else {})
    (tmp_path / "checkpoint-30" / "run.json").write_text(json.dumps({"global_step": 30, "flags": flags}))
    sampler = find_student(str(tmp_path / "checkpoint-30")).sampler({})
    sampler.set_timesteps(2)
    assert sampler.timesteps[0] == starts


@pytest.mark.parametrize("top", ["699", 0, [699], 10**6, 700])
def test_a_checkpoint_with_an_odd_top_timestep_is_refused(top, checkpoints, tmp_path):
    shutil.copytree(checkpoints["lora"][0], tmp_path / "checkpoint-30")
    flags = {"num_ddim_timesteps": 50, "timestep_scaling_factor": 10.0, "top_timestep": top}
    (tmp_path / "checkpoint-30" / "run.json").write_text(json.dumps({"global_step": 30, "flags": flags}))
    with pytest.raises(UsageError, match="top_timestep"):
        find_student(str(tmp_path / "checkpoint-30")).sampler({})


@pytest.mark.parametrize(
    "flags", [None, [], {}, {"num_ddim_timesteps": "50"}, {**FLAGS, "timestep_scaling_factor": -1}]
)
def test_a_checkpoint_whose_flags_say_no_grid_is_refused(flags, checkpoints, tmp_path):
    shutil.copytree(checkpoints["lora"][0], tmp_path / "checkpoint-30")
    (tmp_path / "checkpoint-30" / "run.json").write_text(json.dumps({"global_step": 30, "flags": flags}))
    with refused("--student", "run.json"):
        find_student(str(tmp_path / "checkpoint-30")).sampler({})


@pytest.mark.parametrize(
    "change",
    [{"r": "2"}, {"lora_alpha": None}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"to_q": 4}}],
)
def test_an_adapter_of_another_kind_is_refused(change, checkpoints, sd_pipeline, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(checkpoints["lora"][0] / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with refused(f"--student {folder}", "plain LoRA"), find_student(str(folder)).installed_in(sd_pipeline):
        pass


# --- what does not fit


@contextlib.contextmanager
def refused(*words):
    with pytest.raises(UsageError) as caught:
        yield
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.hostile("teachers")
def test_students_of_another_teacher_are_refused_and_leave_nothing_behind(pipeline, family, finished):
    other = {"sd": "sdxl", "sdxl": "sd"}[family]
    before = generate(pipeline)
    for kind, words in (("full", "their U-Nets differ in"), ("lora", "cannot be loaded into the teacher")):
        folder = finished(kind, other)
        with refused(f"--student {folder}", words), find_student(folder).installed_in(pipeline):
            pass
    style = WeightedLora(finished("style", other), flag="--lora")
    with (
        refused(f"--lora {style.source}"),
        find_student(finished("lora", family)).installed_in(pipeline, loras=[style]),
    ):
        pass
    assert torch.equal(generate(pipeline), before)


@pytest.mark.hostile("teachers")
def test_missing_or_damaged_weights_are_refused(sd_pipeline, finished, tmp_path):
    shutil.copy(Path(finished("full", "sd"), "config.json"), tmp_path)
    with (
        refused(f"--student {tmp_path}: its weights cannot be loaded"),
        find_student(str(tmp_path)).installed_in(sd_pipeline),
    ):
        pass
    (tmp_path / "damaged.safetensors").write_bytes(b"no weights")
    with refused("damaged.safetensors"), find_student(str(tmp_path / "damaged.safetensors")).installed_in(sd_pipeline):
        pass


class _Executed:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.hostile("teachers")
def test_a_pickled_lora_is_not_opened(sd_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "style.bin").write_bytes(pickle.dumps(_Executed()))
    with refused("--lora style.bin", ".safetensors"), with_loras(sd_pipeline, [WeightedLora("style.bin")]):
        pass
    assert not (tmp_path / "executed").exists()


@pytest.mark.hostile("checkpoints")
@pytest.mark.parametrize("folder", [".", "unet"])
def test_a_pickled_student_runs_nothing(folder, sd_pipeline, finished, tmp_path):
    """A folder, or a checkpoint of a run, whose safetensors are gone, and a pickle in their place."""
    marker, unet = tmp_path / "executed", tmp_path / "checkpoint-4" / folder
    unet.mkdir(parents=True)
    shutil.copy(Path(finished("full", "sd"), "config.json"), unet)
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin", "pytorch_model.bin"):
        plant(unet / name, marker)
    student = find_student(str(tmp_path / "checkpoint-4"))
    with refused("checkpoint-4: its weights cannot be loaded"), student.installed_in(sd_pipeline):
        pass
    index = json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": "diffusion_pytorch_model.bin"}})
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    with refused("checkpoint-4: its weights cannot be loaded"), student.installed_in(sd_pipeline):
        pass
    assert not marker.exists() and explodes(unet / "pytorch_model.bin", marker)


# --- the libraries' messages


def test_expected_messages_of_libraries_are_hidden_and_no_others(sd_pipeline, finished, teachers, capfd):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    quiet_libraries()
    diffusers_logging.add_handler(handler)
    try:
        LCMScheduler.from_config(DDIMScheduler.load_config(teachers["sd"], subfolder="scheduler"))
        style = WeightedLora(finished("style", "sd"))
        with find_student(finished("lora", "sd")).installed_in(sd_pipeline, loras=[style]):
            pass
        assert messages == [] and capfd.readouterr() == ("", "")
        logging.getLogger("diffusers.configuration_utils").warning("The weights are those of another model")
        logging.getLogger("diffusers.loaders.peft").warning("No LoRA keys associated to UNet2DConditionModel found")
    finally:
        diffusers_logging.remove_handler(handler)
    assert len(messages) == 2
