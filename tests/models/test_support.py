"""Which models can be teachers: the kinds that people have, by name; odd values in a config, each with one message.

The kinds are also rows of docs/teachers.md, each of which is a test (tests/test_teachers.py).
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPTextConfig

from benchmarks.architectures import UNETS
from lcm_distill.errors import UsageError
from lcm_distill.models import support
from lcm_distill.models.teacher import Teacher, read_configs

UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER = "scheduler/scheduler_config.json"


def read(folder: Path, family: str = "sd", **teacher):
    return read_configs(Teacher(str(folder), **teacher), family=family, resolution=64, num_ddim_timesteps=50)


def assert_refused(folder: Path, message: str, family: str = "sd") -> None:
    with pytest.raises(UsageError, match=f"--pretrained_teacher_model .*{message}") as info:
        read(folder, family)
    text = str(info.value)
    assert "\n" not in text and "--variant" not in text and "--pretrained_vae_model_name_or_path" not in text


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize(
    "entries, message",
    [
        ({"in_channels": 9}, "is an inpainting model: its U-Net takes 9 channels"),
        ({"in_channels": 8}, "edits or measures a picture .*takes 8 channels"),
        ({"in_channels": 7, "num_class_embeds": 1000}, "num_class_embeds is 1000"),
        ({"in_channels": 5}, "is conditioned on depth"),
        ({"in_channels": 16}, "its latents have 4 channels, the teacher's U-Net takes 16"),
        ({"in_channels": None}, "the teacher's U-Net takes None"),
        ({"out_channels": 8}, "takes 4 channels and predicts 8"),
        ({"out_channels": 3}, "takes 4 channels and predicts 3"),
        ({"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8}, "Stable unCLIP"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ({"class_embed_type": "identity"}, "class_embed_type is 'identity'"),
        ({"encoder_hid_dim": 4096}, "Kolors.*encoder_hid_dim is 4096"),
        ({"encoder_hid_dim": 768, "encoder_hid_dim_type": "text_image_proj"}, "is 'text_image_proj'"),
        ({"addition_embed_type": "text"}, "addition_embed_type 'text'"),
        ({"addition_embed_type": "image"}, "addition_embed_type 'image'"),
        ({"attention_type": "gated"}, "GLIGEN.*attention_type is 'gated'"),
        ({"dual_cross_attention": True}, "Versatile Diffusion"),
        ({"time_cond_proj_dim": 256}, "is an LCM, not a teacher"),
        ({"_class_name": "UNet3DConditionModel"}, "of the class UNet3DConditionModel"),
        ({"quantization_config": {"load_in_4bit": True}}, "its U-Net is quantized"),
        ({"cross_attention_dim": 96}, "takes embeddings of 96 numbers"),
        ({"cross_attention_dim": [32, 96, 96]}, "takes embeddings of 96 numbers"),
    ],
    ids=str,
)
def test_a_u_net_of_another_kind_is_refused_by_its_name(family, entries, message, changed):
    """They were tracebacks, or a message about a flag that nobody had given."""
    assert_refused(changed(family, UNET, **entries), message, family)


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize(
    "entries",
    [
        {"block_out_channels": [24, 64]},
        {"block_out_channels": "wide"},
        {"down_block_types": ["NoBlock2D"] * 3},
        {"mid_block_type": "NoBlock"},
        {"norm_num_groups": 7},
        {"attention_head_dim": 0},
        {"attention_head_dim": None},
        {"act_fn": "unheard-of"},
        {"layers_per_block": 10**9},  # building that many would not end
        {"transformer_layers_per_block": [1, [10**9], 1]},
        {"time_embedding_type": "unheard-of"},
        {"resnet_time_scale_shift": "spatial"},
        {"cross_attention_dim": None},
        {"norm_eps": float("nan")},
    ],
    ids=str,
)
def test_a_u_net_that_cannot_be_built_is_refused(entries, changed):
    assert_refused(changed("sd", UNET, **entries), "its U-Net cannot be built|not a number of layers|norm_eps is nan")


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("entries", [{"projection_class_embeddings_input_dim": 999}, {"addition_time_embed_dim": 16}])
def test_sdxl_s_sizes_have_to_fit(entries, changed):
    assert_refused(changed("sdxl", UNET, **entries), "for the pooled embedding and the sizes", "sdxl")


def make_refiner(folder: Path) -> None:
    """SDXL's refiner: the second text encoder alone, an aesthetic score in place of the target's size."""
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
    path = folder / UNET
    refined = {"cross_attention_dim": 64, "projection_class_embeddings_input_dim": 64 + 5 * 32}
    path.write_text(json.dumps(json.loads(path.read_text()) | refined))
    path = folder / "model_index.json"
    absent = {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | absent))


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("shown_by", ["the index", "the U-Net", "the width of its embeddings alone"])
def test_an_sdxl_refiner_is_refused(shown_by, changed):
    """ "pass --variant fp16" was said, after the U-Net's weights had been read."""
    folder = changed("sdxl")
    make_refiner(folder)
    if shown_by != "the index":
        (folder / "model_index.json").unlink()
    if shown_by == "the width of its embeddings alone":
        path = folder / UNET
        path.write_text(json.dumps(json.loads(path.read_text()) | {"addition_time_embed_dim": 16}))
    assert_refused(folder, "is an SDXL refiner", "sdxl")


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize(
    "pipeline, unet",
    [
        ("StableDiffusion3Pipeline", None),
        ("FluxPipeline", None),
        ("WuerstchenCombinedPipeline", [None, None]),
        ("StableVideoDiffusionPipeline", ["diffusers", "UNetSpatioTemporalConditionModel"]),
        ("KandinskyV22Pipeline", "x"),
    ],
)
def test_a_pipeline_without_such_a_u_net_is_refused_by_its_name(pipeline, unet, changed):
    folder = changed("sd", "model_index.json", _class_name=pipeline, unet=unet)
    if unet is None:
        shutil.rmtree(folder / "unet")
    assert_refused(folder, f"is a {pipeline}; only Stable Diffusion")


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize(
    "entries, message",
    [
        ({"scaling_factor": 0}, "scaling_factor is 0 "),
        ({"scaling_factor": -0.18215}, "scaling_factor is -0.18215"),
        ({"scaling_factor": float("nan")}, "scaling_factor is nan"),
        ({"scaling_factor": float("inf")}, "scaling_factor is inf"),
        ({"scaling_factor": None}, "scaling_factor is None"),
        ({"scaling_factor": "0.18215"}, "scaling_factor is '0.18215'"),
        ({"scaling_factor": True}, "scaling_factor is True"),
        ({"shift_factor": "0.1"}, "shift_factor '0.1'"),
        ({"shift_factor": float("nan")}, "shift_factor is nan"),
        ({"latents_mean": [0.1] * 4}, "normalized per channel"),
        ({"latents_std": [1.0] * 4}, "normalized per channel"),
        ({"in_channels": 4, "out_channels": 4}, "has in_channels 4"),
        ({"out_channels": 6}, "has out_channels 6"),
        ({"latent_channels": 16}, "its latents have 16 channels, the teacher's U-Net takes 4"),
        ({"_class_name": "AutoencoderTiny"}, "of the class AutoencoderTiny"),
        ({"_class_name": "VQModel"}, "of the class VQModel"),
        ({"quantization_config": {}}, "its VAE is quantized"),
        ({"block_out_channels": []}, "its VAE cannot be built"),
        ({"norm_num_groups": 3}, "its VAE cannot be built"),
        ({"layers_per_block": 10**9}, "layers_per_block is 1000000000"),
    ],
    ids=str,
)
def test_a_vae_that_cannot_be_used_is_refused(entries, message, changed, teacher):
    """A scale of 0 or NaN trained on latents that were all the same, in silence."""
    folder = changed("sd", VAE, **entries)
    assert_refused(folder, message)
    flag = "--pretrained_vae_model_name_or_path"
    with pytest.raises(UsageError, match=f"{flag} .*{message}") as info:  # the same as a separate one
        read(Path(teacher), vae=str(folder / "vae"))
    assert "\n" not in str(info.value)


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize(
    "entries, message",
    [
        ({"model_type": "t5", "architectures": ["T5EncoderModel"]}, "of the kind t5"),
        ({"model_type": "clip_vision_model"}, "of the kind clip_vision_model"),
        ({"architectures": ["RobertaSeriesModelWithTransformation"]}, "RobertaSeries"),
        ({"architectures": 5}, "only CLIP's"),
        ({"vocab_size": "many"}, "cannot be built .*vocab_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_attention_heads": 5}, "cannot be built"),
        ({"hidden_act": "unheard-of"}, "cannot be built"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"hidden_size": 128}, "its U-Net takes embeddings of 64 numbers .* give 128"),
        ({"quantization_config": {"bits": 4}}, "its text_encoder is quantized"),
    ],
    ids=str,
)
def test_a_text_encoder_of_another_kind_is_refused(entries, message, changed):
    assert_refused(changed("sd", TEXT, **entries), message)


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize(
    "entries, message",
    [
        ({"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000,"),
        ({"num_train_timesteps": 1e12}, "num_train_timesteps is 1000000000000.0"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps is '1000'"),
        ({"num_train_timesteps": True}, "num_train_timesteps is True"),
        ({"num_train_timesteps": None}, "num_train_timesteps is None"),
        ({"beta_schedule": "laplace"}, "beta_schedule is 'laplace', which LCMScheduler"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid', which LCMScheduler"),
        ({"beta_schedule": "exponential"}, "beta_schedule is 'exponential'"),
        ({"beta_schedule": None}, "beta_schedule is None"),
        ({"beta_start": float("nan")}, "beta_start is nan"),
        ({"beta_end": float("inf")}, "beta_end is inf"),
        ({"beta_start": "0.00085"}, "beta_start is '0.00085'"),
        ({"beta_start": -0.1}, "beta_start is -0.1"),
        ({"beta_end": 1.5}, "beta_end is 1.5"),
        ({"beta_end": None}, "beta_end is None"),
        ({"beta_start": 0.5}, "beta_start 0.5 is above its beta_end 0.012"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas are not 1000 numbers"),
        ({"trained_betas": [0.1] * 999 + [-0.1]}, "trained_betas are not 1000 numbers"),
        ({"trained_betas": "all"}, "trained_betas are not 1000 numbers"),
        ({"trained_betas": [0.1] * 999 + [float("nan")]}, "trained_betas is nan"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_numbers_of_a_scheduler_that_are_none_are_refused(entries, message, changed):
    """MemoryError, or betas that were not a number; and nothing was said."""
    assert_refused(changed("sd", SCHEDULER, **entries), message)


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("file", [UNET, VAE, TEXT, SCHEDULER, "model_index.json"])
@pytest.mark.parametrize("content", ["[1]", "[" * 100_000 + "]" * 100_000, "no JSON"], ids=["list", "deep", "text"])
def test_a_config_that_is_no_object_is_refused_by_its_name(file, content, changed):
    assert_refused(changed("sd", file, content), file)


# Models that people have, by the configs that are on the Hub: what is left out of them is a default.
REAL = {
    "SD 1.x": {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
    "SD 2.x": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "BK-SDM-Small": {"cross_attention_dim": 768, "layers_per_block": 1},
    "BK-SDM-Tiny": {
        "cross_attention_dim": 768,
        "layers_per_block": 1,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "mid_block_type": None,
    },
    "SDXL": UNETS["sdxl"] | {"only_cross_attention": False, "num_class_embeds": None, "attention_type": "default"},
    "SSD-1B": UNETS["ssd1b"],
    "Segmind Vega": UNETS["sdxl"]
    | {
        "transformer_layers_per_block": [1, 1, 2],
        "mid_block_type": "UNetMidBlock2D",
        "reverse_transformer_layers_per_block": [[1, 1, 1], [1, 1, 1], 1],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_u_nets_that_people_have_are_supported(name):
    family = "sdxl" if "addition_embed_type" in REAL[name] else "sd"
    config = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0"} | REAL[name]
    width = config["cross_attention_dim"]
    sizes = {"text_encoder": width} if family == "sd" else {"text_encoder": 768, "text_encoder_2": 1280}
    text = {
        part: support.check_text_encoder(
            {
                "architectures": ["CLIPTextModel" if part == "text_encoder" else "CLIPTextModelWithProjection"],
                "model_type": "clip_text_model",
                "hidden_size": size,
                "num_attention_heads": size // 64,
                "num_hidden_layers": 2,
                "projection_dim": 1280 if part == "text_encoder_2" else 768,
                "eos_token_id": 2,
            },
            part=part,
            name=name,
        )
        for part, size in sizes.items()
    }
    support.check_unet(config, family=family, name=name)
    support.check_channels(config, 4, name=name, vae_name=name)
    if family == "sdxl":
        support.check_not_refiner(config, {"hidden_size": 1280, "projection_dim": 1280}, name=name)
    support.check_conditioning(config, text, family=family, name=name)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_teachers_that_early_libraries_wrote_are_supported(family, old_teachers, pruned_teacher):
    read(Path(old_teachers[family]), family)
    if family == "sdxl":
        read(Path(pruned_teacher), family)


@pytest.mark.parametrize(
    "entries",
    [
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "lambda_min_clipped": float("-inf"),
            "algorithm_type": "dpmsolver++",
        },
        {"trained_betas": [0.001] * 1000},
        {"num_train_timesteps": 500},
    ],
    ids=lambda value: str(value)[:60],
)
def test_schedulers_that_people_have_are_supported(entries, changed):
    read(changed("sd", SCHEDULER, **entries))


def test_nothing_is_drawn_from_the_global_generator(teacher):
    """The networks are built without memory: a run's draws must not depend on that."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    read(Path(teacher))
    assert torch.equal(torch.get_rng_state(), before)
    layer = torch.nn.Linear(4, 4)  # initialized as ever
    assert layer.weight.device.type == "cpu" and layer.weight.abs().sum() > 0


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"])
@pytest.mark.parametrize("listed", [None, [None, None]])
def test_a_pipeline_that_was_saved_without_its_u_net_is_known_by_the_u_net(kind, listed, changed):
    """The message was that a StableDiffusionPipeline is none of Stable Diffusion's."""
    read(changed("sd", "model_index.json", _class_name=kind, unet=listed))


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("channels", [[4], {"a": 4}, "4", 4.0])
def test_channels_that_are_no_whole_number_are_refused(channels, changed):
    """A list was a traceback; the text "4" gave a message that 4 is not 4."""
    assert_refused(changed("sd", UNET, in_channels=channels), "U-Net")


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize(
    "file, entries",
    [
        (UNET, {"flip_sin_to_cos": "false"}),
        (UNET, {"upcast_attention": "false"}),
        (UNET, {"center_input_sample": "no"}),
        (UNET, {"freq_shift": "0"}),
        (UNET, {"freq_shift": None}),
        (UNET, {"norm_eps": None}),
        (UNET, {"norm_eps": "1e-5"}),
        (UNET, {"mid_block_scale_factor": None}),
        (VAE, {"force_upcast": "false"}),
        (VAE, {"force_upcast": None}),
        (VAE, {"use_quant_conv": 1}),
    ],
    ids=str,
)
def test_entries_of_another_kind_than_the_class_s_default_are_refused(file, entries, changed):
    """A network is built with them, and takes "false" for true, or fails when it first runs."""
    (key,) = entries
    assert_refused(changed("sd", file, **entries), f"cannot be built from its config: {key} is {entries[key]!r}")


@pytest.mark.parametrize("entries", [{"upcast_attention": None}, {"only_cross_attention": [False] * 3}])
def test_entries_that_mean_the_default_are_kept(entries, changed):
    """SDXL's own config says null of upcast_attention."""
    read(changed("sd", UNET, **entries))


@pytest.mark.hostile("teachers")
def test_a_text_encoder_s_epsilon_has_to_be_a_number(changed):
    assert_refused(changed("sd", TEXT, layer_norm_eps=None), "layer_norm_eps is None")


def test_a_text_encoder_s_architecture_may_be_text_where_transformers_reads_that(changed):
    """5.17 takes a list alone."""
    folder = changed("sd", TEXT, architectures="CLIPTextModel")
    try:
        CLIPTextConfig.from_pretrained(folder / "text_encoder")
    except StrictDataclassError:
        assert_refused(folder, "text_encoder cannot be built from its config .*'architectures'")
    else:
        read(folder)


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("value", ["false", None, 0, []])
def test_how_sdxl_s_empty_caption_is_encoded_is_true_or_false(value, changed):
    """The text "false" was taken for true: half of the guidance was of another caption."""
    folder = changed("sdxl", "model_index.json", force_zeros_for_empty_prompt=value)
    assert_refused(folder, "force_zeros_for_empty_prompt.*correct it", "sdxl")


@pytest.mark.hostile("teachers")
def test_an_sdxl_folder_without_an_index_is_refused_before_weights_are_read(changed):
    folder = changed("sdxl")
    (folder / "model_index.json").unlink()
    assert_refused(folder, "has no model_index.json, which says whether the empty caption is encoded as zeros", "sdxl")


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize(
    "scheduler",
    [
        {"_class_name": "DDPMScheduler", "beta_end": 1e-5},  # below its own beta_start
        {"_class_name": "DDIMScheduler", "beta_start": 1e-9, "beta_end": 1e-9},
        {"_class_name": "PNDMScheduler", "num_train_timesteps": 60},
        {"_class_name": "DDIMScheduler", "trained_betas": [1e-4] * 1000},
    ],
    ids=lambda config: str(config)[:60],
)
def test_a_schedule_that_does_not_end_in_noise_is_refused(scheduler, changed):
    folder = changed("sd")
    (folder / SCHEDULER).write_text(json.dumps(scheduler))
    assert_refused(folder, "last timestep, where sampling starts from noise alone, is more picture than noise")
