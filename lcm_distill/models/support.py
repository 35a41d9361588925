"""Which models can be teachers, by their configs: `UsageError` for every other, before any weights are read.

Each check takes a config, and a `name` that its messages begin with, such as "--pretrained_teacher_model MODEL". First
come the kinds of models that people have and that are not supported, by what they are called; then the networks are
built without memory, so that a config that nobody thought of is refused too.
"""

import inspect
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.initialization import no_init_weights

from lcm_distill.errors import UsageError

# The tokenizers of each family, and the text encoders that they feed.
TEXT_PARTS: Mapping[str, Mapping[str, str]] = {
    "sd": {"tokenizer": "text_encoder"},
    "sdxl": {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"},
}
SUPPORTED = "only Stable Diffusion 1.x, 2.x and SDXL, and models of their architecture, are supported"

_TIME_IDS = 6  # SDXL's sizes and crop
_REFINER_TIME_IDS = 5  # its refiner has an aesthetic score in place of the target's height and width
# U-Nets that take a picture beside the noise, by their number of channels.
_WITH_PICTURE = {
    9: "an inpainting model",
    8: "a model that edits or measures a picture (InstructPix2Pix, Marigold)",
    7: "an upscaler",
    5: "a model that is conditioned on depth",
}
# Entries of a U-Net's config that Stable Diffusion leaves out, and what a model is that has them.
_CONDITIONED = {
    "class_embed_type": "a model that is conditioned on classes or pictures (Stable unCLIP, AudioLDM)",
    "num_class_embeds": "a model that is conditioned on classes or noise levels (an upscaler)",
    "encoder_hid_dim_type": "a model with another text or image encoder (Kolors, DeepFloyd IF, Kandinsky)",
    "encoder_hid_dim": "a model with another text or image encoder (Kolors, DeepFloyd IF, Kandinsky)",
    "dual_cross_attention": "a model that is conditioned on text and pictures (Versatile Diffusion)",
}
_PIPELINES = [f"StableDiffusion{of}{task}Pipeline" for of in ("", "XL") for task in ("", "Img2Img", "Inpaint")]
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # that LCMScheduler, the students' sampler, has
_MOST_TIMESTEPS = 100_000
_MOST_LAYERS = 256
_LAYERS = ("layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block")


def is_sdxl(unet_config: Mapping[str, Any]) -> bool:
    """Whether a U-Net is one of SDXL's family, by its config."""
    return unet_config.get("addition_embed_type") == "text_time"


def check_pipeline(index: Mapping[str, Any], *, name: str) -> None:
    """For the pipeline's model_index.json: that it has a U-Net such as Stable Diffusion's, and begins from noise.

    The index of a pipeline that was saved without its U-Net lists none; the U-Net's own config then counts.
    """
    kind, unet = index.get("_class_name"), index.get("unet")
    if unet in (None, [None, None]) and kind in _PIPELINES:
        unet = ["diffusers", UNet2DConditionModel.__name__]
    if (kind or unet) and (not isinstance(unet, list) or unet[1:] != [UNet2DConditionModel.__name__]):
        what = f", whose model_index.json lists the U-Net {unet!r}" if kind in _PIPELINES else ""
        raise UsageError(f"{name} is a {kind or 'model with another U-Net'}{what}; {SUPPORTED}.")
    if index.get("requires_aesthetics_score") is True:
        raise _refiner(name)


def check_unet(config: Mapping[str, Any], *, family: str, name: str) -> None:
    """For the U-Net's config alone: that it is one of `family`, "sd" or "sdxl", and conditioned on nothing else."""
    _check_class(config, "U-Net", UNet2DConditionModel.__name__, name)
    addition = config.get("addition_embed_type")
    if addition not in (None, "text_time"):
        raise UsageError(
            f"{name} is a model of another kind (addition_embed_type {addition!r}, as in Kandinsky and DeepFloyd IF); "
            f"{SUPPORTED}."
        )
    found_sdxl = is_sdxl(config)
    if found_sdxl != (family == "sdxl"):
        right = "sdxl" if found_sdxl else "sd"
        raise UsageError(
            f"{name} is a Stable Diffusion {'XL ' if found_sdxl else ''}model; "
            f"distil it with train_lcm_distill_{right}_wds.py or train_lcm_distill_lora_{right}_wds.py."
        )
    if config.get("time_cond_proj_dim") is not None:
        raise UsageError(
            f"{name} already has a guidance embedding: it is an LCM, not a teacher. "
            "Pass the model that it was distilled from."
        )
    for key, kind in _CONDITIONED.items():
        if config.get(key) not in (None, False):
            raise UsageError(f"{name} is {kind}: its U-Net's {key} is {config[key]!r}; {SUPPORTED}.")
    if str(config.get("attention_type") or "default") != "default":
        raise UsageError(
            f"{name} is a model that is conditioned on boxes (GLIGEN): its U-Net's attention_type is "
            f"{config['attention_type']!r}; {SUPPORTED}."
        )


def check_channels(unet: Mapping[str, Any], latent_channels: int, *, name: str, vae_name: str) -> None:
    """That the U-Net, named `name`, takes latents of the VAE, named `vae_name`, and predicts as many channels."""
    taken, predicted = unet.get("in_channels", 4), unet.get("out_channels", 4)
    with_picture = _WITH_PICTURE.get(taken) if isinstance(taken, int) else None
    if with_picture and taken != latent_channels:
        raise UsageError(
            f"{name} is {with_picture}: its U-Net takes {taken} channels, where latents have "
            f"{latent_channels}; {SUPPORTED}. Pass the text-to-image model that it was made from."
        )
    if taken != latent_channels:
        raise UsageError(
            f"{vae_name}: its latents have {latent_channels} channels, the teacher's U-Net takes {taken!r}."
        )
    if predicted != taken:
        raise UsageError(
            f"{name}: its U-Net takes {taken} channels and predicts {predicted!r}, as models do that predict a "
            f"variance too, or several pictures; {SUPPORTED}."
        )


def check_text_encoder(config: Mapping[str, Any], *, part: str, name: str) -> CLIPTextConfig:
    """The config of the text encoder `part`, all defaults filled in; it has to be CLIP's, and one that can be built."""
    name = f"{name}: its {part}"
    kind = config.get("model_type") or "clip_text_model"
    architectures = config.get("architectures") or ["CLIPTextModel"]
    if kind not in ("clip_text_model", "clip") or not str(architectures).lstrip("['").startswith("CLIP"):
        raise UsageError(f"{name} is of the kind {kind} ({architectures}); only CLIP's text encoder is supported.")
    _check_not_quantized(config, name)
    network = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
    _check_layers(config, ("num_hidden_layers",), name)
    found = _built(lambda: CLIPTextConfig.from_dict(_text_part(config)), name)
    _built(lambda: network(found), name)
    if not _is_number(found.layer_norm_eps):  # Transformers takes null, and fails when it first encodes
        raise UsageError(f"{name}'s layer_norm_eps is {found.layer_norm_eps!r}, not a number; CLIP's is 1e-05.")
    return found


def _text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text encoder's part of a whole CLIP's config; any other as it is."""
    inner = config.get("text_config")
    return dict(inner if isinstance(inner, dict) else config)


def check_vae(config: Mapping[str, Any], *, name: str) -> None:
    """That a VAE is Stable Diffusion's kind, of RGB pictures, and scales its latents by one number."""
    _check_class(config, "VAE", AutoencoderKL.__name__, name)
    if config.get("latents_mean") or config.get("latents_std"):
        raise UsageError(
            f"{name}: its latents are normalized per channel (latents_mean, latents_std), as in Playground v2.5; "
            "such models are not supported."
        )
    for key in ("in_channels", "out_channels"):
        if config.get(key, 3) != 3:
            raise UsageError(
                f"{name}: its VAE has {key} {config[key]!r}, where RGB pictures have 3 (some have depth or "
                "transparency beside the colours); such models are not supported."
            )
    if not has_usable_scale(config):
        raise UsageError(
            f"{name}: its VAE's scaling_factor is {config.get('scaling_factor')!r} and its shift_factor "
            f"{config.get('shift_factor')!r}, where the first has to be a number above 0, the second a number or null; "
            "write those that the U-Net was trained with (0.18215 for Stable Diffusion 1.x and 2.x, 0.13025 for SDXL; "
            "no shift)."
        )
    _check_layers(config, _LAYERS, name)
    _build(AutoencoderKL, config, f"{name}: its VAE")


def has_usable_scale(config: Mapping[str, Any]) -> bool:
    """Whether a VAE's scaling_factor and shift_factor are left out, or numbers that latents can be scaled by."""
    scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor")
    return _is_number(scale) and scale > 0 and (shift is None or _is_number(shift))


def check_scheduler(config: Mapping[str, Any], *, name: str) -> None:
    """That the numbers in a scheduler's config are usable ones, and its betas of a kind that the student's sampler has.

    Which schedulers are understood at all is the business of `NoiseSchedule`.
    """
    name = f"{name}: its scheduler's"
    steps = config.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= _MOST_TIMESTEPS:
        raise UsageError(
            f"{name} num_train_timesteps is {steps!r}, not a whole number from 1 to {_MOST_TIMESTEPS}; Stable "
            "Diffusion's is 1000."
        )
    schedule = config.get("beta_schedule", "linear")
    betas = config.get("trained_betas")
    if betas is not None:
        usable = isinstance(betas, list) and all(_is_beta(beta) or beta == 1 for beta in betas)
        if not usable or len(betas) != steps:
            raise UsageError(f"{name} trained_betas are not {steps} numbers from 0 to 1, one for each timestep.")
    elif schedule not in _BETA_SCHEDULES:
        raise UsageError(
            f"{name} beta_schedule is {schedule!r}, which LCMScheduler, the student's sampler, does not have; "
            f"supported are {', '.join(_BETA_SCHEDULES)}."
        )
    for key in ("beta_start", "beta_end"):
        if key in config and not _is_beta(config[key]):
            raise UsageError(f"{name} {key} is {config[key]!r}, not a number above 0 and below 1.")
    if "beta_start" in config and "beta_end" in config and config["beta_start"] > config["beta_end"]:
        raise UsageError(
            f"{name} beta_start {config['beta_start']} is above its beta_end {config['beta_end']}: less and less noise "
            "would be added."
        )


def check_noise_levels(alphas: torch.Tensor, *, name: str) -> None:
    """That the last of a schedule's `alphas` `[T]` is a small one: sampling starts there, from noise alone.

    Stable Diffusion's is 0.07; above 0.71, its picture is stronger than its noise.
    """
    last = float(alphas[-1])
    if last**2 > 0.5:
        raise UsageError(
            f"{name}: its scheduler's last timestep, where sampling starts from noise alone, is more picture than "
            f"noise (alpha {last:.2f}; Stable Diffusion's is 0.07): too small betas, or too few timesteps; "
            "write those that the model was trained with."
        )


def check_conditioning(unet: Mapping[str, Any], text: Mapping[str, CLIPTextConfig], *, family: str, name: str) -> None:
    """That the U-Net can be built, and takes the embeddings of the text encoders `text`, by their parts."""
    width = sum(config.hidden_size for config in text.values())
    _check_layers(unet, _LAYERS, name)
    network = _build(UNet2DConditionModel, unet, f"{name}: its U-Net")
    for path, layer in network.named_modules():
        if isinstance(layer, Attention) and layer.is_cross_attention and layer.cross_attention_dim != width:
            raise UsageError(
                f"{name}: its U-Net takes embeddings of {layer.cross_attention_dim} numbers ({path}), its text "
                f"encoders ({', '.join(text)}) give {width}; pass a model whose parts belong together."
            )
    if family == "sdxl":
        each: Any = unet.get("addition_time_embed_dim")
        pooled = text["text_encoder_2"].projection_dim
        taken = network.add_embedding.linear_1.in_features
        if not isinstance(each, int) or taken != pooled + _TIME_IDS * each:
            raise UsageError(
                f"{name}: its U-Net takes {taken} numbers for the pooled embedding and the sizes "
                f"(projection_class_embeddings_input_dim), where SDXL's takes {pooled} and {_TIME_IDS} times {each} "
                f"(addition_time_embed_dim); {SUPPORTED}."
            )


def check_not_refiner(unet: Mapping[str, Any], text_2: Mapping[str, Any], *, name: str) -> None:
    """That an SDXL U-Net is not the refiner's, which takes one text encoder and an aesthetic score.

    `text_2` is the config of the second text encoder, whose pooled embedding both take.
    """
    taken, each = unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim")
    pooled = text_2.get("projection_dim", 512)
    if not (isinstance(taken, int) and isinstance(each, int) and isinstance(pooled, int)):
        return  # not a U-Net that can be built
    if unet.get("cross_attention_dim") == text_2.get("hidden_size") or taken == pooled + _REFINER_TIME_IDS * each:
        raise _refiner(name)


def _refiner(name: str) -> UsageError:
    return UsageError(
        f"{name} is an SDXL refiner, which improves pictures and cannot begin from noise alone; it is not supported. "
        "Pass the base model."
    )


def _check_class(config: Mapping[str, Any], part: str, expected: str, name: str) -> None:
    kind = config.get("_class_name", expected)
    if kind != expected:
        raise UsageError(f"{name}: its {part} is of the class {kind}, not Diffusers' {expected}; {SUPPORTED}.")
    _check_not_quantized(config, f"{name}: its {part}")


def _check_not_quantized(config: Mapping[str, Any], name: str) -> None:
    if config.get("quantization_config") is not None:
        raise UsageError(
            f"{name} is quantized (quantization_config), which is not supported; pass the model in half precision or "
            "float32."
        )


def _check_layers(config: Mapping[str, Any], keys: tuple[str, ...], name: str) -> None:
    """That building the network ends: `keys` are numbers of layers, or lists of lists of them."""
    for key in keys:
        values = [config.get(key)]
        while values:
            value = values.pop()
            if isinstance(value, (list, tuple)):
                values += value
            elif isinstance(value, (int, float)) and not 0 <= value <= _MOST_LAYERS:
                raise UsageError(f"{name}: {key} is {value!r}, not a number of layers up to {_MOST_LAYERS}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_beta(value: Any) -> bool:
    return _is_number(value) and 0 < value < 1


def _build(kind: Any, config: Mapping[str, Any], name: str) -> Any:
    """A network of the Diffusers class `kind`; entries that it does not know are left to its loading to name."""
    known = inspect.signature(kind).parameters
    for key, parameter in known.items():
        if key in config:
            _check_entry(config[key], parameter, name)
    own = {key: value for key, value in config.items() if key in known or key == "_use_default_values"}
    return _built(lambda: kind.from_config(own), name)


def _check_entry(value: Any, parameter: inspect.Parameter, name: str) -> None:
    """`UsageError` if an entry is text, or null, where the class's default is a number, or true or false.

    Python takes such an entry until the network runs, or as true: the text "false".
    """
    default = parameter.default
    if not isinstance(default, (bool, int, float)) or parameter.name == "sample_size":  # which only pipelines read
        return
    kinds = (bool,) if isinstance(default, bool) else (int, float)
    values = [value]
    while values:
        item = values.pop()
        if isinstance(item, (list, tuple)):  # one for each block
            values += item
            continue
        can_be_null = "None" in str(parameter.annotation) or "Optional" in str(parameter.annotation)
        null_is_default = default is False or can_be_null
        right = isinstance(item, kinds) and (bool in kinds or not isinstance(item, bool))
        if not right and not (item is None and null_is_default):
            expected = "true or false" if bool in kinds else "a number"
            raise UsageError(
                f"{name} cannot be built from its config: {parameter.name} is {value!r}, not {expected}; Diffusers' "
                f"default is {json.dumps(default)}."
            )


def _built(build: Callable[[], Any], name: str) -> Any:
    """What `build` returns, without memory for its tensors; `UsageError`, which calls it `name`, if that fails."""
    try:
        with init_empty_weights(), no_init_weights():  # the second saves most of the time
            return build()
    except Exception as error:  # odd values in a config: each raises another class
        reason = " ".join(str(error).split())[:300]  # Transformers names the entry in the second line
        raise UsageError(
            f"{name} cannot be built from its config ({type(error).__name__}: {reason}); {SUPPORTED}. Compare the "
            "config with that of the model that it was made from."
        ) from None
