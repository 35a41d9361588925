"""The original layout: every tensor of the real models has its name there, and Diffusers' converters read it back."""

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    infer_diffusers_model_type,
)
from original_names import file_shapes, open_clip_shapes, resolve_a1111, resolve_comfyui, resolve_kohya, unet_shapes
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.architectures import UNETS, build_text_encoders, build_vae
from lcm_distill.errors import UsageError
from lcm_distill.export.original import open_clip_tensors, original_name, pipeline_tensors, unet_modules
from lcm_distill.export.weights import kohya_weights
from lcm_distill.models.families import family_of
from lcm_distill.models.lora import TARGET_MODULES

MODELS = ("sd15", "sdxl", "ssd1b")
MODULES = {"sd15": 278, "sdxl": 788, "ssd1b": 423}  # that LCM-LoRA adapts


def meta_pipeline(name: str, **scheduler) -> SimpleNamespace:
    """A pipeline of the real shapes, without memory."""
    with torch.device("meta"):
        text = build_text_encoders(name)
        networks = {"unet": UNet2DConditionModel(**UNETS[name]), "vae": build_vae(name), "text_encoder": text[0]}
        networks |= {"text_encoder_2": text[1]} if len(text) > 1 else {}
    return SimpleNamespace(**networks, scheduler=LCMScheduler(**scheduler))


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    """(name, pipeline, its tensors in the original layout)."""
    pipeline = meta_pipeline(request.param)
    return request.param, pipeline, pipeline_tensors(pipeline, torch.float16)


def shapes(tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_every_tensor_has_the_name_and_the_shape_that_other_programs_expect(model):
    name, _, tensors = model
    assert shapes(tensors) == file_shapes(name)
    assert {t.dtype for n, t in tensors.items() if not n.endswith("position_ids")} == {torch.float16}


def test_diffusers_converters_read_every_tensor_back(model):
    name, pipeline, tensors = model
    assert infer_diffusers_model_type(tensors) == {"sd15": "v1"}.get(name, "xl_base")
    unet = convert_ldm_unet_checkpoint(copy.copy(tensors), dict(pipeline.unet.config))
    assert shapes(unet) == shapes(pipeline.unet.state_dict())
    vae = convert_ldm_vae_checkpoint(copy.copy(tensors), dict(pipeline.vae.config))
    assert shapes(vae) == shapes(pipeline.vae.state_dict())

    def own(network) -> dict[str, tuple[int, ...]]:
        return {key.removeprefix("text_model."): shape for key, shape in shapes(network.state_dict()).items()}

    text = {key.removeprefix("text_model."): t for key, t in convert_ldm_clip_checkpoint(copy.copy(tensors)).items()}
    text.pop("embeddings.position_ids")
    assert shapes(text) == own(pipeline.text_encoder)
    if name != "sd15":
        prefix = "conditioner.embedders.1.model."
        second = convert_open_clip_checkpoint(pipeline.text_encoder_2, copy.copy(tensors), prefix)
        assert {k.removeprefix("text_model."): s for k, s in shapes(second).items()} == own(pipeline.text_encoder_2)


@pytest.mark.parametrize("name", MODELS)
def test_every_module_of_a_kohya_file_is_found_by_comfyui_a1111_and_kohya(name):
    """Of SDXL they had Diffusers' names, and A1111 looked for one module where it is not."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
        modules = [m for m, _ in unet.named_modules() if any(f".{m}".endswith(f".{end}") for end in TARGET_MODULES)]
        halves = {f"{m}.lora_{half}.weight": torch.zeros(4, 4) for m in modules for half in "AB"}
    kohya = kohya_weights(halves, unet.config, family_of(unet.config))
    keys = {key.split(".")[0] for key in kohya}
    assert len(keys) == len(modules) == MODULES[name] == len(kohya) / 3
    own = {module: f"lora_unet_{module.replace('.', '_')}" for module in modules}
    found = {
        "A1111": {resolve_a1111(name, key) for key in keys},
        "ComfyUI": {resolve_comfyui(name, key, modules) for key in keys},
        "kohya": {resolve_kohya(name, key, modules) for key in keys},
    }
    for program, resolved in found.items():
        assert None not in resolved and len(resolved) == len(modules), program
    assert {original_name(m, unet_modules(unet.config)) for m in modules} == found["A1111"]
    if name == "sdxl":  # what would be missed
        assert [m for m, key in own.items() if resolve_a1111(name, key) is None] == ["up_blocks.0.upsamplers.0.conv"]
        assert "output_blocks.2.2.conv.weight" in unet_shapes(name)


def test_the_text_encoder_of_sd_2_is_open_clip_s():
    torch.manual_seed(0)
    network = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=77,
        )
    )  # fmt: skip
    tensors = open_clip_tensors(network.state_dict())
    assert shapes(tensors) == open_clip_shapes(64, 2, projection=False)
    prefixed = {f"cond_stage_model.model.{name}": tensor for name, tensor in tensors.items()}
    back = convert_open_clip_checkpoint(network, prefixed)
    assert back.keys() == {f"text_model.{n.removeprefix('text_model.')}" for n in network.state_dict()} or (
        back.keys() == network.state_dict().keys()
    )
    for name, tensor in network.state_dict().items():
        found = back.get(name, back.get(f"text_model.{name.removeprefix('text_model.')}"))
        assert torch.equal(found, tensor), name


def test_what_predicts_v_and_ends_at_zero_snr_is_marked():
    """Otherwise other programs take it for one that predicts noise."""
    plain = pipeline_tensors(meta_pipeline("sdxl"), torch.float16)
    marked = pipeline_tensors(
        meta_pipeline("sdxl", prediction_type="v_prediction", rescale_betas_zero_snr=True), torch.float16
    )
    assert marked.keys() - plain.keys() == {"v_pred", "ztsnr"} and plain.keys() < marked.keys()


def test_what_has_no_place_is_refused():
    pipeline = meta_pipeline("sd15")
    with torch.device("meta"):
        pipeline.unet = UNet2DConditionModel(**UNETS["sd15"], time_cond_proj_dim=256)
    with pytest.raises(UsageError, match="guidance embedding has no place .* bake"):
        pipeline_tensors(pipeline, torch.float16)
    for more in ({"layers_per_block": [2, 2, 2, 1]}, {"down_block_types": ("AttnDownBlock2D",)}):
        with pytest.raises(UsageError, match="has no place in the original layout.*--output_dir"):
            unet_modules({**pipeline.unet.config, **more})
    with pytest.raises(UsageError, match="^encoder_hid_proj.weight has no place"):
        original_name("encoder_hid_proj.weight", unet_modules(pipeline.unet.config))
