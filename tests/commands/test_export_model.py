"""A finished student as a single file and as a pipeline: what loads it generates what the student does."""

import importlib
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file
from small_teachers import TOY
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lcm_distill import export_model
from lcm_distill.errors import SaveError, UsageError
from lcm_distill.models.single_file import SingleFile
from lcm_distill.models.teacher import Teacher, read_configs

PROMPT = "a small red circle on a black background"
PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def latents(pipeline, **options) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    chosen = dict(num_inference_steps=2, output_type="latent", height=64, width=64) | options
    return pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **chosen).images


def of_student(kind: str, folder: str, teacher: str, **options) -> torch.Tensor:
    """What a finished student generates in its teacher's pipeline, as the README loads it."""
    more = {"unet": UNet2DConditionModel.from_pretrained(folder)} if kind == "full" else {}
    pipeline = DiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32, **more)
    pipeline.scheduler = LCMScheduler.from_pretrained(folder)
    if kind == "lora":
        pipeline.load_lora_weights(folder)
    return latents(pipeline, **options)


def export(*arguments, **flags) -> None:
    export_model.main([*map(str, arguments), *(str(w) for name, value in flags.items() for w in (f"--{name}", value))])


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def family(request):
    return request.param


@pytest.fixture(scope="module", params=["full", "lora"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, str]:
    """The toy teachers, SDXL's with text encoders of two widths, as real ones: Diffusers' loader of single files tells
    them apart by that alone."""
    folder = tmp_path_factory.mktemp("wide") / "sdxl"
    shutil.copytree(TOY / "sdxl", folder)
    torch.manual_seed(0)
    for name, kind, factor in (
        ("text_encoder", CLIPTextModel, 0.5),
        ("text_encoder_2", CLIPTextModelWithProjection, 1.5),
    ):
        config = CLIPTextConfig.from_pretrained(folder / name)
        config.hidden_size = int(factor * config.hidden_size)
        shutil.rmtree(folder / name)
        kind(config).save_pretrained(folder / name)
    return {"sd": str(TOY / "sd"), "sdxl": str(folder)}


@pytest.fixture(scope="module")
def exported(family, kind, finished, teachers, tmp_path_factory):
    """(a single file, a pipeline's folder), float32; the full student's with a guidance_scale of 5."""
    folder = tmp_path_factory.mktemp(f"exported-{kind}-{family}")
    own = ["--guidance_scale", "5"] if kind == "full" else ["--fuse_lora"]
    export(
        finished(kind, family), *own, "--dtype", "fp32", single_file=folder / "model.safetensors",
        output_dir=folder / "pipeline", pretrained_teacher_model=teachers[family],
    )  # fmt: skip
    return folder / "model.safetensors", folder / "pipeline"


def test_the_pipeline_loads_with_one_line_and_generates_what_the_student_does(
    exported, kind, family, finished, teachers
):
    pipeline = DiffusionPipeline.from_pretrained(exported[1])
    assert pipeline.unet.config.time_cond_proj_dim is None and isinstance(pipeline.scheduler, LCMScheduler)
    expected = of_student(kind, finished(kind, family), teachers[family], guidance_scale=5.0 if kind == "full" else 1.0)
    torch.testing.assert_close(latents(pipeline, guidance_scale=1.0), expected, rtol=1e-4, atol=1e-4)
    other = of_student(kind, finished(kind, family), teachers[family], guidance_scale=2.0)
    assert (other - expected).abs().max() > 0.01


def test_the_single_file_reloaded_generates_what_the_pipeline_does(exported, family, teachers):
    file, folder = exported
    pipeline = DiffusionPipeline.from_pretrained(folder)
    more = {"safety_checker": None} if family == "sd" else {}
    loaded = PIPELINES[family].from_single_file(str(file), config=teachers[family], dtype=torch.float32, **more)
    loaded.scheduler = pipeline.scheduler
    for name, network in pipeline.components.items():
        if isinstance(network, torch.nn.Module):
            state = getattr(loaded, name).state_dict()
            assert all(torch.equal(state[key], tensor) for key, tensor in network.state_dict().items()), name
    torch.testing.assert_close(
        latents(loaded, guidance_scale=1.0), latents(pipeline, guidance_scale=1.0), rtol=1e-5, atol=1e-5
    )


def test_the_single_file_is_a_teacher_here_too(exported, family, teachers):
    """Its header is understood by the package's own reader, with all parts and the right prediction."""
    teacher = Teacher(str(exported[0]), config=teachers[family])
    read_configs(teacher, family=family, resolution=64, num_ddim_timesteps=50)
    assert SingleFile.open(str(exported[0]), "it").prediction_type == "epsilon"


def test_what_the_files_say_about_themselves(exported, kind, family):
    """All keys that ModelSpec 1.0.1 requires; no folder of this machine."""
    architecture = {"sd": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}[family]
    for path in (exported[0], next((exported[1] / "unet").glob("*.safetensors"))):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert metadata["modelspec.architecture"] == architecture
        for name in ("sai_model_spec", "implementation", "title", "resolution", "description", "date", "hash_sha256"):
            assert metadata[f"modelspec.{name}"], name
        assert "CFG 1" in metadata["modelspec.usage_hint"] and "sgm_uniform" in metadata["modelspec.usage_hint"]
        assert metadata["modelspec.merged_from"].startswith(f"{family}, {kind}_{family}")
        assert "/tmp" not in str(metadata) and str(Path.cwd()) not in str(metadata)


def test_the_workflow_is_beside_the_file(exported):
    workflow = json.loads((exported[0].parent / "comfyui_workflow.json").read_text())
    nodes = {node["class_type"]: node["inputs"] for node in workflow.values()}
    assert nodes["CheckpointLoaderSimple"]["ckpt_name"] == "model.safetensors"
    assert nodes["ModelSamplingDiscrete"]["sampling"] == "lcm" and "LoraLoaderModelOnly" not in nodes
    sampler = nodes["KSampler"]
    assert (sampler["sampler_name"], sampler["scheduler"], sampler["cfg"]) == ("lcm", "sgm_uniform", 1.0)


def test_the_card_s_code_runs_as_it_stands(exported):
    names: dict = {}
    exec((exported[1] / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    assert len(names["picture"].getcolors(1 << 24)) > 1


def test_half_precision_loads_with_one_line_too(finished, teachers, tmp_path):
    """Transformers loads its networks in the dtype of the files, Diffusers its own in float32: together they failed."""
    export(finished("full", "sd"), output_dir=tmp_path / "p", pretrained_teacher_model=teachers["sd"])
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "p")
    assert latents(pipeline, guidance_scale=1.0).isfinite().all()
    stored = load_file(next((tmp_path / "p" / "unet").glob("*.safetensors")))
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_the_umask_decides_who_may_read(umask, mode, finished, teachers, tmp_path):
    before = os.umask(umask)
    try:
        export(
            finished("lora", "sd"), "--fuse_lora", single_file=tmp_path / "x" / "m.safetensors",
            output_dir=tmp_path / "p", pretrained_teacher_model=teachers["sd"],
        )  # fmt: skip
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode} and len(files) > 10


# --- where the student and its teacher come from


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards, teachers):
    """`trained(program)`: the output folder of a run of two steps, with a checkpoint after each."""
    made: dict[str, Path] = {}

    def get(program: str, **more) -> Path:
        if program not in made:
            out = tmp_path_factory.mktemp("trained") / f"lcm-{program}"
            family = "sdxl" if program.endswith("xl") else "sd"
            options = {
                "pretrained_teacher_model": teachers[family], "train_shards_path_or_url": shards, "output_dir": out,
                "resolution": 64, "train_batch_size": 2, "max_train_steps": 2, "checkpointing_steps": 1, "seed": 1,
                "num_ddim_timesteps": 25, "timestep_scaling_factor": 8, "report_to": "none", "learning_rate": 1e-3,
                "validation_steps": 2, "num_validation_images": 1, "validation_teacher_steps": 2, "w_max": 6,
                "validation_prompts": PROMPT, "dataloader_num_workers": 0,
            } | ({"lora_rank": 4, "lora_alpha": 16} if "lora" in program else {})  # fmt: skip
            argv = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
            importlib.import_module(f"train_lcm_distill_{program}_wds").main(argv)
            made[program] = out
        return made[program]

    return get


@pytest.mark.parametrize("program", ["sd", "lora_sd"])
def test_a_run_and_its_checkpoints_know_their_teacher_sampler_and_picture(program, trained, tmp_path):
    """The last checkpoint is the result: both give the same file. Without a guidance_scale, 8 within the range."""
    out = trained(program)
    own = ["--fuse_lora"] if "lora" in program else []
    pipelines = []
    for number, source in enumerate((out, out / "checkpoint-2", out / "checkpoint-1")):
        export(
            source, *own, "--dtype", "fp32", single_file=tmp_path / f"{number}.safetensors",
            output_dir=tmp_path / str(number),
        )  # fmt: skip
        pipelines.append(DiffusionPipeline.from_pretrained(tmp_path / str(number)))
        config = pipelines[-1].scheduler.config
        assert (config.original_inference_steps, config.timestep_scaling) == (25, 8.0)
        with safe_open(tmp_path / f"{number}.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata["ss_steps"] == str((2, 2, 1)[number]) and metadata["ss_seed"] == "1"
        assert metadata["modelspec.resolution"] == "64x64" and metadata["ss_resolution"] == "(64, 64)"
        has_picture = metadata.get("modelspec.thumbnail", "").startswith("data:image/jpeg;base64,")
        assert has_picture == (number < 2)  # a picture of step 2 is none of step 1
        if not own:
            assert "at guidance_scale 7" in metadata["modelspec.merged_from"]
    result, same, earlier = (latents(pipeline, guidance_scale=1.0) for pipeline in pipelines)
    torch.testing.assert_close(result, same, rtol=1e-2, atol=1e-2 if own else 1e-5)  # a LoRA's result is float16
    assert (result - earlier).abs().max() > 1e-3


def test_what_is_a_mistake_is_one_message(finished, teachers, tmp_path, capsys):
    full, lora, teacher = finished("full", "sd"), finished("lora", "sd"), teachers["sd"]
    file = tmp_path / "x.safetensors"
    for words, arguments in (
        ("is a LoRA: pass --fuse_lora", [lora, "--single_file", file, "--pretrained_teacher_model", teacher]),
        ("is a whole U-Net", [full, "--fuse_lora", "--single_file", file, "--pretrained_teacher_model", teacher]),
        ("has no guidance input", [lora, "--fuse_lora", "--guidance_scale", 8, "--single_file", file]),
        ("pass that as --pretrained_teacher_model", [f"{full}/unet", "--single_file", file]),
        (
            "not distilled from this teacher",
            [full, "--single_file", file, "--pretrained_teacher_model", teachers["sdxl"]],
        ),
        ("is a model that is read", [full, "--output_dir", teacher, "--pretrained_teacher_model", teacher]),
    ):
        with pytest.raises(UsageError, match=words):
            export(*arguments)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="has to end in .safetensors"):
        export(full, "--single_file", tmp_path / "x.ckpt")
    with pytest.raises(SystemExit):
        export(full)
    assert "pass --single_file FILE.safetensors, --output_dir FOLDER, or both" in capsys.readouterr().err


def test_nobody_s_files_are_replaced(finished, teachers, tmp_path):
    """A file of this command is written again; another's is refused before anything is loaded."""
    options = {"pretrained_teacher_model": teachers["sd"], "single_file": tmp_path / "x.safetensors"}
    export(finished("full", "sd"), **options)
    first = (tmp_path / "x.safetensors").read_bytes()
    export(finished("full", "sd"), guidance_scale=3, **options)
    assert (tmp_path / "x.safetensors").read_bytes() != first
    shutil.copy(Path(finished("full", "sd")) / "diffusion_pytorch_model.safetensors", tmp_path / "other.safetensors")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "diary.txt").write_text("mine")
    for flag, place in (("single_file", "other.safetensors"), ("output_dir", "folder")):
        with pytest.raises(UsageError, match=f"--{flag} .*this command has not written"):
            export(finished("full", "sd"), **{**options, flag: tmp_path / place})


def test_a_disk_error_leaves_no_part_of_a_file(finished, teachers, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_model, "write_metadata", fail)
    with pytest.raises(SaveError, match="could not be written .*No space left.*free disk space"):
        export(finished("full", "sd"), single_file=tmp_path / "x.safetensors", pretrained_teacher_model=teachers["sd"])
    assert not list(tmp_path.iterdir())


def test_a_guidance_beyond_the_training_is_warned_of(trained, tmp_path, caplog):
    export(trained("sd"), guidance_scale=12, single_file=tmp_path / "x.safetensors")
    assert "trained with 6 to 7" in caplog.text
    assert "a grid of 25 and a timestep scaling of 8" in caplog.text
