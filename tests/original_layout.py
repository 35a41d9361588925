"""A Diffusers pipeline's weights in the original layout (LDM, SGM), as in single files."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]


def save_single_file(pipeline: Any, path: str) -> Weights:
    """Saves the networks of `pipeline`, Stable Diffusion or SDXL, in one .safetensors file; returns the tensors."""
    weights = _prefixed("model.diffusion_model.", unet(pipeline.unet.state_dict(), pipeline.unet.config))
    weights |= _prefixed("first_stage_model.", vae(pipeline.vae.state_dict(), pipeline.vae.config))
    text = clip(pipeline.text_encoder.state_dict())
    if hasattr(pipeline, "text_encoder_2"):
        weights |= _prefixed("conditioner.embedders.0.transformer.", text)
        weights |= _prefixed("conditioner.embedders.1.model.", open_clip(pipeline.text_encoder_2.state_dict()))
    else:
        weights |= _prefixed("cond_stage_model.transformer.", text)
    # Real files also hold tensors that are not weights of the pipeline.
    weights["alphas_cumprod"] = torch.linspace(1, 0, 10)
    weights["model_ema.decay"] = torch.tensor(0.9999)
    weights |= {f"model_ema.diffusion_modelweight{i}": torch.zeros(1) for i in range(120)}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return weights


def unet(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Weights:
    per_block = config["layers_per_block"] + 1  # a block's downsampler, or its additional layer on the way up
    names = [
        (r"^time_embedding\.linear_([12])", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
        (r"^add_embedding\.linear_([12])", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}"),
        (r"^conv_in", "input_blocks.0.0"),
        (r"^conv_norm_out", "out.0"),
        (r"^conv_out", "out.2"),
        (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{1 + int(m[1]) * per_block + int(m[2])}.0"),
        (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{1 + int(m[1]) * per_block + int(m[2])}.1"),
        (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{(int(m[1]) + 1) * per_block}.0.op"),
        (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
        (r"^mid_block\.attentions\.0", "middle_block.1"),
        (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{int(m[1]) * per_block + int(m[2])}.0"),
        (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{int(m[1]) * per_block + int(m[2])}.1"),
        (
            r"^up_blocks\.(\d)\.upsamplers\.0\.conv",
            lambda m: (
                f"output_blocks.{(int(m[1]) + 1) * per_block - 1}."
                f"{2 if f'up_blocks.{m[1]}.attentions.0.norm.weight' in state else 1}.conv"
            ),
        ),
    ]
    in_resnets = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    weights = {}
    for name, tensor in state.items():
        if ".resnets." in name:
            name = re.sub("|".join(in_resnets), lambda m: in_resnets[m[0]], name)
        weights[_renamed(name, names)] = tensor
    assert len(weights) == len(state)
    return weights


def vae(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Weights:
    last = len(config["up_block_types"]) - 1
    names = [
        (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
        (r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample."),
        (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{last - int(m[1])}.block.{m[2]}"),
        (r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{last - int(m[1])}.upsample."),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    ]
    in_attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    weights = {}
    for name, tensor in state.items():
        coder, attention, part = name.partition(".mid_block.attentions.0.")
        if attention:
            layer, _, kind = part.rpartition(".")
            name = f"{coder}.mid.attn_1.{in_attention[layer]}.{kind}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor  # the original's are 1 × 1 convolutions
        weights[_renamed(name, names)] = tensor
    assert len(weights) == len(state)
    return weights


def clip(state: Mapping[str, torch.Tensor]) -> Weights:
    """A text encoder by Transformers' old names, with the position ids that it used to save."""
    weights = _prefixed("text_model.", {name.removeprefix("text_model."): tensor for name, tensor in state.items()})
    positions = len(weights["text_model.embeddings.position_embedding.weight"])
    return weights | {"text_model.embeddings.position_ids": torch.arange(positions)[None]}


def open_clip(state: Mapping[str, torch.Tensor]) -> Weights:
    """A text encoder with a projection, by open_clip's names: query, key and value are one matrix."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    names = [
        (r"^embeddings\.token_embedding\.weight", "token_embedding.weight"),
        (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"^final_layer_norm", "ln_final"),
        (r"^text_projection\.weight", "text_projection"),
        (r"^encoder\.layers\.", "transformer.resblocks."),
        (r"layer_norm([12])", r"ln_\1"),
        (r"\.fc1\.", ".c_fc."),
        (r"\.fc2\.", ".c_proj."),
        (r"\.self_attn\.", ".attn."),
    ]
    weights = {"logit_scale": torch.tensor(4.6)}
    for name, tensor in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace(".q_proj.", ".in_proj_")
        weights[_renamed(name, names)] = tensor.T if name == "text_projection.weight" else tensor
    return weights


def _prefixed(prefix: str, weights: Mapping[str, torch.Tensor]) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def _renamed(name: str, names: list) -> str:
    for pattern, new in names:
        name = re.sub(pattern, new, name)
    return name
