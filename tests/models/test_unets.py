"""The student starts as its teacher; architectures are compared before any weights are read."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from lcm_distill.errors import UsageError
from lcm_distill.models import unets
from lcm_distill.models.support import check_unet
from lcm_distill.models.unets import (
    architecture,
    bake_guidance,
    enable_xformers,
    student_from_teacher,
    target_from_student,
)
from lcm_distill.objective.consistency import guidance_embedding

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def toy_unet(teacher):
    return UNet2DConditionModel.from_pretrained(teacher, subfolder="unet", torch_dtype=torch.float32).eval()


def test_an_untrained_student_equals_the_teacher_for_every_w(toy_unet):
    """With Diffusers' random initialization of the projection, the student is about 5 % off its teacher."""
    student = student_from_teacher(toy_unet, 256).eval()
    x, t, c = torch.randn(2, 4, 16, 16), torch.tensor([19, 999]), torch.randn(2, 16, 64)
    with torch.no_grad():
        expected = toy_unet(x, t, c).sample
        for w in (0.0, 14.0):
            embedding = guidance_embedding(torch.full((2,), w), 256)
            assert torch.equal(student(x, t, c, timestep_cond=embedding).sample, expected)


def test_a_student_is_made_without_initializing_weights_at_random(toy_unet):
    """With SDXL that took longer than loading the teacher; the weights are replaced anyway."""
    before = torch.get_rng_state()
    student = student_from_teacher(toy_unet, 256)
    assert torch.equal(torch.get_rng_state(), before)
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in toy_unet.parameters()}
    assert {str(tensor.device) for tensor in student.state_dict().values()} == {"cpu"}


def test_guidance_has_a_gradient_in_the_student(toy_unet):
    student = student_from_teacher(toy_unet, 64)
    x, t, c = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 16, 64)
    student(x, t, c, timestep_cond=guidance_embedding(torch.tensor([7.5]), 64)).sample.square().mean().backward()
    gradient = student.time_embedding.cond_proj.weight.grad
    assert gradient is not None and gradient.abs().max() > 0


@pytest.mark.parametrize("dim", [4, 255, 256, 512])
def test_guidance_embedding_is_the_pipelines(dim):
    w = torch.tensor([0.0, 0.5, 3.0, 7.5, 14.0])
    expected = StableDiffusionPipeline.get_guidance_scale_embedding(None, w, embedding_dim=dim)
    ours = guidance_embedding(w, dim)
    assert ours.shape == (5, dim) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_student_is_float32_even_of_a_half_precision_teacher(toy_unet):
    half = UNet2DConditionModel.from_config(toy_unet.config).half()
    student = student_from_teacher(half, 256)
    target = target_from_student(student)
    assert {p.dtype for p in student.parameters()} == {p.dtype for p in target.parameters()} == {torch.float32}
    assert student.training and not target.training
    assert all(p.requires_grad for p in student.parameters()) and not any(p.requires_grad for p in target.parameters())
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), target.parameters(), strict=True))


def test_architectures_differ_by_shape_and_not_by_name(toy_unet):
    assert architecture(toy_unet.config | {"_name_or_path": "x"}) == architecture(toy_unet.config)
    assert architecture(toy_unet.config | {"block_out_channels": (8, 8)}) != architecture(toy_unet.config)


@pytest.mark.hostile("teachers")
def test_a_teacher_of_another_kind_is_refused_and_the_right_program_named():
    with pytest.raises(UsageError, match="train_lcm_distill_sdxl_wds.py"):
        check_unet({"addition_embed_type": "text_time"}, name="--pretrained_teacher_model x", family="sd")
    with pytest.raises(UsageError, match="train_lcm_distill_sd_wds.py"):
        check_unet({}, name="--pretrained_teacher_model x", family="sdxl")
    with pytest.raises(UsageError, match="is an LCM"):
        check_unet({"time_cond_proj_dim": 256}, name="--pretrained_teacher_model x", family="sd")


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a GPU")
def test_xformers_that_cannot_work_gives_one_warning(toy_unet, caplog):
    with caplog.at_level(logging.WARNING):
        enable_xformers(toy_unet, toy_unet)
    (record,) = caplog.records
    assert record.message.startswith("xformers' attention is not used (it needs a CUDA GPU)")


def test_a_missing_xformers_is_named_with_its_installation(toy_unet, caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(unets, "is_xformers_available", lambda: False)
    enable_xformers(toy_unet)
    (record,) = caplog.records
    assert 'not installed: pip install -e ".[xformers]")' in record.message


def test_xformers_that_fails_gives_its_reason_in_one_line(toy_unet, caplog, monkeypatch):
    """It printed all thirty lines of why each kernel does not fit."""

    def fail(*_):
        raise NotImplementedError("no kernel fits:\n  one is for another GPU\n  one for another PyTorch")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(unets, "is_xformers_available", lambda: True)
    monkeypatch.setattr(UNet2DConditionModel, "enable_xformers_memory_efficient_attention", fail)
    before = toy_unet.attn_processors
    enable_xformers(toy_unet)
    (record,) = caplog.records
    assert "(NotImplementedError: no kernel fits: one is for another GPU; `python -m xformers.info`" in record.message
    assert "\n" not in record.message
    assert {name: type(kind) for name, kind in toy_unet.attn_processors.items()} == {
        name: type(kind) for name, kind in before.items()
    }


def test_an_installed_xformers_says_nothing_when_diffusers_imports_it(tmp_path):
    """Diffusers imports it whether or not it is used; without CUDA, xformers then warns that it has no kernels."""
    package = tmp_path / "xformers"
    package.mkdir()
    warning = "import logging\nlogging.getLogger('xformers').warning('no kernels')\n"
    (package / "__init__.py").write_text(warning)
    (package / "ops.py").write_text(warning)
    metadata = tmp_path / "xformers-0.0.35.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.35\n")
    code = "import sys; from lcm_distill.models import unets; print('xformers' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "True\n" and "no kernels" not in done.stderr, done.stderr


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("w", [0.0, 7.0, 14.5])
@torch.no_grad()
def test_a_baked_student_is_the_student_at_that_guidance_to_rounding(kind, dtype, tolerance, w, teachers):
    torch.manual_seed(0)
    teacher = UNet2DConditionModel.from_pretrained(teachers[kind], subfolder="unet", torch_dtype=torch.float32)
    student = student_from_teacher(teacher, 64)
    torch.nn.init.normal_(student.time_embedding.cond_proj.weight, std=0.3)
    student.to(dtype).eval()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    baked = bake_guidance(student, w)
    assert baked.config.time_cond_proj_dim is None and baked.dtype == dtype
    assert baked.state_dict().keys() == teacher.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())

    given = dict(
        sample=torch.randn(2, 4, 8, 8, dtype=dtype),
        timestep=torch.tensor([999, 19]),
        encoder_hidden_states=torch.randn(2, 16, student.config.cross_attention_dim, dtype=dtype),
    )
    if kind == "sdxl":
        width = student.config.projection_class_embeddings_input_dim - 6 * student.config.addition_time_embed_dim
        ids = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2, dtype=dtype)
        given["added_cond_kwargs"] = {"text_embeds": torch.randn(2, width, dtype=dtype), "time_ids": ids}

    def embedding(scale: float) -> torch.Tensor:
        """As the pipelines make it of a guidance_scale, by Diffusers' own code."""
        pipeline = StableDiffusionPipeline.get_guidance_scale_embedding
        return pipeline(None, torch.tensor([scale] * 2), embedding_dim=64).to(dtype)

    expected = student(**given, timestep_cond=embedding(w)).sample
    torch.testing.assert_close(baked(**given).sample, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    other = student(**given, timestep_cond=embedding(w + 1)).sample
    assert (other - expected).abs().max() > 1e-3 * expected.abs().max()
