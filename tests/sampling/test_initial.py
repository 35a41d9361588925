"""A run that begins from a finished student: it is that student at first, whatever file it came from, or refuses."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from finished_students import GRID, SCHEDULE, full_student, lora_student, style_lora
from pickle_bombs import plant
from safetensors.torch import load_file, save_file

from lcm_distill import flags
from lcm_distill.errors import UsageError
from lcm_distill.models.families import FAMILIES
from lcm_distill.models.lora import TARGET, Lora
from lcm_distill.models.teacher import TeacherConfigs
from lcm_distill.models.unets import student_from_teacher
from lcm_distill.objective.schedule import build_lcm_scheduler
from lcm_distill.sampling.initial import InitialStudent

TEACHER_FLAGS = flags.TeacherFlags(pretrained_teacher_model="unused")
SAMPLER = build_lcm_scheduler(SCHEDULE, GRID)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def students(tmp_path_factory, teachers, family):
    """Finished students of the family: a full one, and a LoRA of rank 2 with alpha 4 (a scale of 2)."""
    folder = tmp_path_factory.mktemp(f"initial-{family}")
    return {
        "full": full_student(folder / "full", teachers[family], family),
        "lora": lora_student(folder / "lora", teachers[family], family),
        "style": style_lora(folder / "style", teachers[family], family),
    }


def unet_of(teacher: str) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(teacher, subfolder="unet", torch_dtype=torch.float32)


def configs_of(teacher: str) -> TeacherConfigs:
    return TeacherConfigs(UNet2DConditionModel.load_config(teacher, subfolder="unet"), {}, SCHEDULE)


def find(source: str, family: str, teacher: str, kind=flags.FullStudentFlags, **more) -> InitialStudent:
    given, configs = kind(init_student=source, **more), configs_of(teacher)
    found = InitialStudent.find(given, TEACHER_FLAGS, FAMILIES[family], configs, SAMPLER)
    assert found is not None
    return found


def read(source: str, family: str, teacher: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    config = UNet2DConditionModel.load_config(teacher, subfolder="unet")
    return find(source, family, teacher, flags.LoraFlags).read_adapter(config)


def inputs(family: str, unet: UNet2DConditionModel) -> dict:
    generator = torch.Generator().manual_seed(0)
    given = {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([999, 300]),
        "encoder_hidden_states": torch.randn(2, 16, unet.config.cross_attention_dim, generator=generator),
    }
    if family == "sdxl":
        width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        ids = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)
        given["added_cond_kwargs"] = {"text_embeds": torch.randn(2, width, generator=generator), "time_ids": ids}
    return given


@torch.no_grad()
def answer(family: str, unet: UNet2DConditionModel, **more) -> torch.Tensor:
    return unet(**inputs(family, unet), **more).sample


def test_no_student_is_asked_for(teachers):
    configs = configs_of(teachers["sd"])
    for given in (None, flags.FullStudentFlags()):
        assert InitialStudent.find(given, TEACHER_FLAGS, FAMILIES["sd"], configs, SAMPLER) is None


def test_a_full_student_begins_as_another_bit_for_bit(students, family, teachers):
    student = student_from_teacher(unet_of(teachers[family]), 64)
    find(students["full"], family, teachers[family], unet_time_cond_proj_dim=64).load_into(student)
    expected = UNet2DConditionModel.from_pretrained(students["full"]).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in student.state_dict().items())
    assert student.state_dict().keys() == expected.keys()


def test_the_projection_stays_zero_for_a_student_without_a_guidance_embedding(students, family, teachers, tmp_path):
    unet = unet_of(teachers[family])
    with torch.no_grad():
        unet.conv_out.weight += 1
    unet.save_pretrained(tmp_path / "merged")
    student = student_from_teacher(unet_of(teachers[family]), 64)
    find(str(tmp_path / "merged"), family, teachers[family], unet_time_cond_proj_dim=64).load_into(student)
    assert not student.time_embedding.cond_proj.weight.any()
    assert torch.equal(student.conv_out.weight, unet.conv_out.weight)


@pytest.mark.parametrize("file", ["", "pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"])
def test_students_begin_as_a_lora_of_every_format_and_at_its_scale(students, family, teachers, file):
    """Alpha is twice the rank here: read without it, the student would be half of what it should be."""
    source = str(Path(students["lora"]) / file)
    teacher = unet_of(teachers[family])
    plain = answer(family, teacher)
    kohya = str(Path(students["lora"]) / "kohya_lora_weights.safetensors")
    pipeline = FAMILIES[family].PIPELINE
    pipeline.load_lora_into_unet(*pipeline.lora_state_dict(kohya, unet_config=teacher.config), unet=teacher)
    expected = answer(family, teacher)
    moved = float((expected - plain).abs().max())
    assert moved > 0.01

    full = student_from_teacher(unet_of(teachers[family]), 64)
    find(source, family, teachers[family], unet_time_cond_proj_dim=64).load_into(full)
    assert full.state_dict().keys() == student_from_teacher(unet_of(teachers[family]), 64).state_dict().keys()
    embedding = torch.randn(2, 64)  # which counts for nothing yet
    torch.testing.assert_close(answer(family, full, timestep_cond=embedding), expected, atol=0.002 * moved, rtol=0)

    unet = unet_of(teachers[family])
    lora = Lora(unet, rank=3, alpha=1, average=True)  # another rank and scale
    lora.begin_from(read(source, family, teachers[family]))
    torch.testing.assert_close(answer(family, unet), expected, atol=0.002 * moved, rtol=0)
    with lora.target():
        torch.testing.assert_close(answer(family, unet), expected, atol=0.002 * moved, rtol=0)
    assert all(parameter.dtype == torch.float32 for parameter in lora.parameters() + lora.parameters(TARGET))


def test_a_lora_is_read_exactly(students, family, teachers):
    """Read through a U-Net in bfloat16, as the base of a LoRA may be, it would be rounded to eight bits."""
    stored = load_file(Path(students["lora"]) / "pytorch_lora_weights.safetensors")
    factors = read(students["lora"], family, teachers[family])
    assert len(factors) == len(stored) / 2 > 20
    for path, (down, up) in factors.items():
        assert torch.equal(down, stored[f"unet.{path}.lora_A.weight"].float())
        assert torch.equal(up, stored[f"unet.{path}.lora_B.weight"].float())  # the scale of 2 is in the weights


@pytest.mark.hostile("teachers")
def test_what_does_not_fit_is_refused(students, family, teachers, tmp_path):
    other = {"sd": "sdxl", "sdxl": "sd"}[family]
    teacher = teachers[family]
    for source, kind, more, message in (
        (students["full"], flags.LoraFlags, {}, f"a whole U-Net.*train_lcm_distill_{family}_wds"),
        (students["full"], flags.FullStudentFlags, {}, "guidance embedding of width 64, not 256: pass"),
        (str(tmp_path), flags.FullStudentFlags, {}, "--init_student .* neither a U-Net .* nor a LoRA"),
    ):
        with pytest.raises(UsageError, match=message):
            find(source, family, teacher, kind, **more)
    with pytest.raises(UsageError, match="--init_student .* not distilled from this teacher"):
        find(students["full"], other, teachers[other], unet_time_cond_proj_dim=64)
    student = student_from_teacher(unet_of(teachers[other]), 64)
    with pytest.raises(UsageError, match="--init_student .* cannot be loaded into the teacher"):
        find(students["lora"], other, teachers[other]).load_into(student)
    with pytest.raises(UsageError, match="also changes text_encoder"):
        read(students["style"], family, teacher)
    shutil.copytree(students["lora"], tmp_path / "torn")
    (tmp_path / "torn" / "pytorch_lora_weights.safetensors").write_bytes(b"torn")
    with pytest.raises(UsageError, match="cannot be loaded"):
        read(str(tmp_path / "torn"), family, teacher)


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_student_that_starts_lower_is_named(students, family, teachers, kind, tmp_path, caplog):
    lower = build_lcm_scheduler(SCHEDULE, 14, top_timestep=699)
    shutil.copytree(students[kind], tmp_path / "lower")
    lower.save_config(tmp_path / "lower")
    source = str(tmp_path / "lower")
    student = flags.FullStudentFlags(init_student=source, unet_time_cond_proj_dim=64)
    if kind == "lora":
        student = flags.LoraFlags(init_student=source)
    for own, warned in ((SAMPLER, True), (lower, False), (build_lcm_scheduler(SCHEDULE, 12, top_timestep=599), False)):
        caplog.clear()
        InitialStudent.find(student, TEACHER_FLAGS, FAMILIES[family], configs_of(teachers[family]), own)
        assert ("pass --top_timestep 699 " in caplog.text) == warned


def test_an_adapter_that_is_too_small_is_refused(students, family, teachers, tmp_path):
    factors = read(students["lora"], family, teachers[family])
    with pytest.raises(UsageError, match="--init_student has rank 2, more than --lora_rank 1"):
        Lora(unet_of(teachers[family]), rank=1, alpha=1).begin_from(factors)
    with pytest.raises(UsageError, match="which has no adapter in this run; pass --lora_target_modules"):
        Lora(unet_of(teachers[family]), rank=2, alpha=2, target_modules=["to_q"]).begin_from(factors)
    # Modules that the file lacks stay as they are.
    file = tmp_path / "part.safetensors"
    weights = load_file(Path(students["lora"]) / "pytorch_lora_weights.safetensors")
    save_file({name: weight for name, weight in weights.items() if "to_q" in name}, file)
    unet = unet_of(teachers[family])
    factors = read(str(file), family, teachers[family])
    lora = Lora(unet, rank=2, alpha=2)
    lora.begin_from(factors)
    changed = [name for name, weight in lora.state_dict().items() if "lora_B" in name and weight.any()]
    assert changed and all("to_q" in name for name in changed) and len(changed) == len(factors)


@pytest.mark.hostile("checkpoints")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_student_that_is_not_finite_is_refused(students, family, teachers, kind, tmp_path):
    """The run stopped at its first loss, and blamed the learning rate."""
    shutil.copytree(students[kind], tmp_path / "bad")
    name = "pytorch_lora_weights" if kind == "lora" else "diffusion_pytorch_model"
    for file in tmp_path.rglob(f"{name}*.safetensors"):
        weights = load_file(file)
        next(iter(weights.values())).view(-1)[0] = float("nan")
        save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="--init_student .*bad: values in .* are not finite"):
        if kind == "lora":
            read(str(tmp_path / "bad"), family, teachers[family])
        else:
            student = student_from_teacher(unet_of(teachers[family]), 64)
            find(str(tmp_path / "bad"), family, teachers[family], unet_time_cond_proj_dim=64).load_into(student)


@pytest.mark.hostile("checkpoints")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_pickled_student_runs_nothing(students, family, teachers, kind, tmp_path):
    shutil.copytree(students[kind], tmp_path / "bad")
    marker = tmp_path / "executed"
    for file in list(tmp_path.rglob("*.safetensors")):
        plant(file.with_suffix(".bin"), marker)
        plant(file, marker)
    for again in (False, True):
        with pytest.raises(UsageError, match="--init_student .*bad.* cannot be loaded"):
            if kind == "lora":
                read(str(tmp_path / "bad"), family, teachers[family])
            else:
                student = student_from_teacher(unet_of(teachers[family]), 64)
                find(str(tmp_path / "bad"), family, teachers[family], unet_time_cond_proj_dim=64).load_into(student)
        if not again and kind == "full":  # now only the pickles
            for file in list(tmp_path.rglob("*.safetensors")):
                file.unlink()
    assert not marker.exists()
