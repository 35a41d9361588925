"""The SDXL family: captions, sizes and frozen parts compared with the pipeline's; a pruned U-Net, as SSD-1B's."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from original_layout import save_single_file
from PIL import Image

from lcm_distill.data.preparation import Preparation, prepare_sample
from lcm_distill.data.raw import RawSample
from lcm_distill.flags import SDXLPreparationFlags
from lcm_distill.models import sdxl
from lcm_distill.models.teacher import Teacher, read_configs
from lcm_distill.models.unets import student_from_teacher
from lcm_distill.objective.consistency import guidance_embedding, guided_prediction, unet_output
from lcm_distill.objective.schedule import NoiseSchedule, build_lcm_scheduler

CAPTIONS = ["a small red circle on a black background", "no such words", "a " * 60]
SIZES = torch.tensor([[500, 300], [64, 1023]]), torch.tensor([[0, 7], [13, 0]])  # (height, width), (top, left)
BATCH = {
    "captions": CAPTIONS[:2],
    "original_sizes": SIZES[0],
    "crop_top_lefts": SIZES[1],
    "target_sizes": torch.tensor([[64, 64], [64, 64]]),
}


@pytest.fixture(scope="module")
def xl(teachers) -> str:
    return teachers["sdxl"]


@pytest.fixture(scope="module")
def frozen(xl):
    return sdxl.load_frozen(Teacher(xl), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def pipeline(xl):
    return StableDiffusionXLPipeline.from_pretrained(xl, torch_dtype=torch.float32)


def copy_of(teacher: str, folder: Path) -> Path:
    shutil.copytree(teacher, folder)
    return folder


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def toy_latents(frozen, batch: int = 2) -> torch.Tensor:
    size = frozen.unet.config.sample_size
    return torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("zeros", [True, False])
def test_captions_are_encoded_as_the_pipeline_does(zeros, xl, tmp_path):
    """`force_zeros_for_empty_prompt` is the teacher's setting; with it, only the empty caption is zeros."""
    folder = copy_of(xl, tmp_path / "teacher")
    change_json(folder / "model_index.json", force_zeros_for_empty_prompt=zeros)
    frozen = sdxl.load_frozen(Teacher(str(folder)), device="cpu", dtype=torch.float32)
    assert frozen.force_zeros_for_empty_prompt is zeros
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    states, no_states, pooled, no_pooled = pipeline.encode_prompt(CAPTIONS, device="cpu")
    ours = sdxl.encode_captions(frozen, [CAPTIONS[0], "", *CAPTIONS[1:]])  # a dropped caption between others
    ours_states, ours_pooled = ours["encoder_hidden_states"], ours["added_cond_kwargs"]["text_embeds"]
    for actual, conditional, empty in ((ours_states, states, no_states), (ours_pooled, pooled, no_pooled)):
        expected = torch.cat([conditional[:1], empty[:1], conditional[1:]])
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert actual[1].any().item() is not zeros
        assert actual[[0, 2, 3]].flatten(1).any(dim=1).all()
    alone = sdxl.encode_captions(frozen, [""])
    torch.testing.assert_close(alone["encoder_hidden_states"], no_states[:1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone["added_cond_kwargs"]["text_embeds"], no_pooled[:1], rtol=1e-5, atol=1e-5)
    without_empty = sdxl.encode_captions(frozen, CAPTIONS)
    assert torch.equal(without_empty["encoder_hidden_states"], states)
    assert torch.equal(without_empty["added_cond_kwargs"]["text_embeds"], pooled)


def test_time_ids_are_in_the_pipeline_s_order(pipeline):
    """Height before width, top before left: no picture is square, and no crop is on the diagonal."""
    projection = pipeline.text_encoder_2.config.projection_dim
    ids = sdxl.time_ids(BATCH)
    assert ids.dtype == torch.int64
    for size, corner, row in zip(*(tensor.tolist() for tensor in SIZES), ids, strict=True):
        expected = pipeline._get_add_time_ids(tuple(size), tuple(corner), (64, 64), torch.int64, projection)
        assert torch.equal(row[None], expected)


def test_fixed_sizes_give_the_time_ids_of_a_pipeline_by_default(pipeline):
    """`--use_fix_crop_and_size`, from the flag through the sample to the time ids."""
    projection = pipeline.text_encoder_2.config.projection_dim
    default = pipeline._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.int64, projection)
    picture = io.BytesIO()
    Image.new("RGB", (150, 100)).save(picture, "PNG")
    raw = RawSample("0", {"png": picture.getvalue(), "txt": b"a red circle"})
    for fixed in (True, False):
        flags = SDXLPreparationFlags(resolution=64, use_fix_crop_and_size=fixed)
        sample = prepare_sample(raw, Preparation.from_flags(flags), draws=np.full(5, 0.9))
        sizes = {"original_sizes": [sample.original_size], "crop_top_lefts": [sample.crop_top_left]}
        ids = sdxl.time_ids({name: torch.tensor(size) for name, size in (sizes | {"target_sizes": [(64, 64)]}).items()})
        assert torch.equal(ids, default) is fixed


def test_one_unconditional_row_serves_the_whole_batch(frozen):
    """Both branches have each picture's own time ids; one pass over both equals two."""
    conditioning, unconditional = sdxl.batch_conditioning(frozen, BATCH)
    assert len(conditioning["encoder_hidden_states"]) == 2 and len(unconditional["encoder_hidden_states"]) == 1
    schedule = NoiseSchedule.from_config({"beta_schedule": "scaled_linear"})
    noisy, timesteps, w = toy_latents(frozen), torch.tensor([999, 259]), torch.tensor([3.0, 14.0])
    x0, epsilon = guided_prediction(frozen.unet, schedule, noisy, timesteps, conditioning, unconditional, w)
    expanded = {
        "encoder_hidden_states": unconditional["encoder_hidden_states"].repeat(2, 1, 1),
        "added_cond_kwargs": {
            "text_embeds": unconditional["added_cond_kwargs"]["text_embeds"].repeat(2, 1),
            "time_ids": sdxl.time_ids(BATCH),
        },
    }
    with torch.no_grad():
        outputs = [frozen.unet(noisy, timesteps, **branch).sample for branch in (conditioning, expanded)]
    for actual, predict in ((x0, schedule.predict_x0), (epsilon, schedule.predict_epsilon)):
        cond, uncond = (predict(output, noisy, timesteps) for output in outputs)
        expected = cond + w[:, None, None, None] * (cond - uncond)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_time_ids_stay_integers_in_half_precision(frozen, xl):
    """bfloat16 rounds 1023 to 1024: the U-Net received other sizes than the pictures'."""
    unet = UNet2DConditionModel.from_pretrained(xl, subfolder="unet", torch_dtype=torch.bfloat16).eval()
    seen = []
    unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    outputs = []
    for width in (1023, 1024):
        batch = {name: values[:1] for name, values in BATCH.items()} | {"original_sizes": torch.tensor([[64, width]])}
        ids = sdxl.time_ids(batch)
        conditioning, _ = sdxl.batch_conditioning(frozen, batch)
        with torch.no_grad():
            noisy = toy_latents(frozen, 1)
            outputs.append(unet_output(unet, noisy, torch.tensor([500]), conditioning, dtype=torch.bfloat16))
        assert torch.equal(seen[-1]["time_ids"], ids) and seen[-1]["time_ids"].dtype == torch.int64
        assert seen[-1]["text_embeds"].dtype == torch.bfloat16
    assert outputs[0].dtype == torch.float32 and not torch.equal(*outputs)


def test_the_empty_caption_is_encoded_once_and_gets_each_batch_s_time_ids(frozen, monkeypatch):
    encoded, encode = [], sdxl.encode_captions
    monkeypatch.setattr(sdxl, "encode_captions", lambda _, captions: encoded.append(captions) or encode(_, captions))
    vars(frozen).pop("empty_conditioning", None)
    for batch in (BATCH, BATCH | {"original_sizes": BATCH["original_sizes"] + 1}):
        for conditioning in sdxl.batch_conditioning(frozen, batch):
            assert torch.equal(conditioning["added_cond_kwargs"]["time_ids"], sdxl.time_ids(batch))
    assert sorted(encoded) == [[""], CAPTIONS[:2], CAPTIONS[:2]]
    assert "time_ids" not in frozen.empty_conditioning["added_cond_kwargs"]


@pytest.mark.parametrize("upcast, expected", [(True, torch.float32), (False, torch.bfloat16), (None, torch.float32)])
def test_the_vae_is_in_half_precision_only_if_that_is_safe(upcast, expected, xl, tmp_path):
    """SDXL's own overflows in half precision and has `force_upcast` in its config, which old configs lack."""
    vae = copy_of(f"{xl}/vae", tmp_path / "vae")
    if upcast is None:
        config = json.loads((vae / "config.json").read_text())
        del config["force_upcast"]
        (vae / "config.json").write_text(json.dumps(config))
    else:
        change_json(vae / "config.json", force_upcast=upcast)
    frozen = sdxl.load_frozen(Teacher(xl, vae=str(vae)), device="cpu", dtype=torch.bfloat16)
    assert frozen.vae.dtype == expected
    assert {p.dtype for p in frozen.vae.parameters()} == {expected}
    assert frozen.text_encoder.dtype == frozen.text_encoder_2.dtype == torch.bfloat16
    assert frozen.unet.dtype == torch.float32


def test_frozen_parts_are_frozen(frozen):
    for network in (frozen.text_encoder, frozen.text_encoder_2, frozen.vae, frozen.unet):
        assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_the_pipeline_generates_without_a_progress_bar(frozen, capfd):
    pipeline = sdxl.build_pipeline(frozen, frozen.unet, build_lcm_scheduler({"beta_schedule": "scaled_linear"}))
    assert pipeline.vae is frozen.vae and pipeline.unet is frozen.unet
    picture = pipeline(
        CAPTIONS[0],
        num_inference_steps=2,
        guidance_scale=1.0,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
    ).images[0]
    assert picture.shape == (64, 64, 3) and picture.std() > 0.01
    assert "it/s" not in capfd.readouterr().err


@pytest.mark.parametrize("zeros", [True, False])
def test_the_pipeline_treats_the_empty_prompt_as_the_teacher_does(zeros, frozen, monkeypatch):
    monkeypatch.setattr(frozen, "force_zeros_for_empty_prompt", zeros)
    pipeline = sdxl.build_pipeline(frozen, frozen.unet, build_lcm_scheduler({"beta_schedule": "scaled_linear"}))
    assert pipeline.config.force_zeros_for_empty_prompt is zeros


# SSD-1B: no attention in the middle block, other numbers of transformer layers in the up blocks than in the down blocks


def test_a_student_of_a_pruned_teacher_equals_it(pruned_teacher):
    """Config entries that are lists of lists survive reading, saving and copying."""
    teacher = Teacher(pruned_teacher)
    configs = read_configs(teacher, family="sdxl", resolution=64, num_ddim_timesteps=50)
    assert configs.unet["mid_block_type"] == "UNetMidBlock2D"
    frozen = sdxl.load_frozen(teacher, device="cpu", dtype=torch.float32)
    layers = [len(a.transformer_blocks) for block in frozen.unet.up_blocks[:2] for a in block.attentions]
    assert layers == [4, 4, 10, 2, 1, 1]
    student = student_from_teacher(frozen.unet, 256).eval()
    conditioning, _ = sdxl.batch_conditioning(frozen, BATCH)
    noisy, timesteps = toy_latents(frozen), torch.tensor([999, 259])
    embedding = guidance_embedding(torch.tensor([0.0, 14.0]))
    with torch.no_grad():
        expected = unet_output(frozen.unet, noisy, timesteps, conditioning)
        assert torch.equal(unet_output(student, noisy, timesteps, conditioning, embedding), expected)


def test_a_pruned_student_is_saved_and_loaded(pruned_teacher, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(pruned_teacher, subfolder="unet", torch_dtype=torch.float32)
    student = student_from_teacher(unet, 256)
    student.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float32)
    state = student.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_a_pruned_teacher_as_a_single_file(pruned_teacher, tmp_path):
    """Its file would be taken for SDXL base: the configs must be given."""
    path = str(tmp_path / "ssd.safetensors")
    save_single_file(StableDiffusionXLPipeline.from_pretrained(pruned_teacher, torch_dtype=torch.float32), path)
    frozen = sdxl.load_frozen(Teacher(path, config=pruned_teacher), device="cpu", dtype=torch.float32)
    expected = UNet2DConditionModel.from_pretrained(
        pruned_teacher, subfolder="unet", torch_dtype=torch.float32
    ).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in frozen.unet.state_dict().items())
