"""Names of the original layout (LDM, SGM) for networks in Diffusers' and Transformers' layout, and their tensors.

    unet_modules(config)          module by module: "down_blocks.0.resnets.0" → "input_blocks.1.0"
    pipeline_tensors(pipeline)    all tensors of a single file, which ComfyUI, A1111, Forge and Diffusers load

No library converts this way; the other way does `from_single_file`, with which the tests compare. Values are not
changed: a few tensors are joined (query, key and value of OpenCLIP's encoders), transposed (its projection) or get the
two dimensions of a 1 × 1 convolution (the attention of a VAE).
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from lcm_distill.errors import UsageError

Tensors = dict[str, torch.Tensor]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."  # SD 1.x, SD 2.x
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

_WITH_ATTENTION = {"CrossAttnDownBlock2D", "CrossAttnUpBlock2D"}
_NO_PLACE = (
    "has no place in the original layout, of single files: that has only networks that are built as those of Stable "
    "Diffusion and SDXL; export a Diffusers pipeline folder instead (--output_dir)."
)
# Inside a residual block of a U-Net, and of a VAE, where the other names are the same.
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
# The largest scale that CLIP is trained with, and ends at. Of text encoders it is never used, but loaders look for it.
_LOGIT_SCALE = math.log(100)


def unet_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """The original names of the modules of a U-Net with this `config`, by Diffusers' names.

    A module that is not listed has the same name inside the longest one that is: transformer blocks are the same.
    `UsageError` for a U-Net of other blocks than those of Stable Diffusion and SDXL.
    """
    kinds = {*config["down_block_types"], *config["up_block_types"]}
    if not isinstance(config["layers_per_block"], int) or kinds - _WITH_ATTENTION - {"DownBlock2D", "UpBlock2D"}:
        raise UsageError(f"a U-Net of {', '.join(sorted(kinds))} {_NO_PLACE}")
    per_block = config["layers_per_block"] + 1  # a block's downsampler, or its additional layer on the way up
    names = dict(_UNET_ENDS)
    blocks = list(enumerate(config["down_block_types"]))
    for block, kind in blocks:
        for layer in range(per_block - 1):
            place = 1 + block * per_block + layer
            _add_layer(names, f"down_blocks.{block}", layer, f"input_blocks.{place}", kind in _WITH_ATTENTION)
        if block < len(blocks) - 1:
            names[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{(block + 1) * per_block}.0.op"
    _add_resnet(names, "mid_block.resnets.0", "middle_block.0")
    names["mid_block.attentions.0"] = "middle_block.1"  # blocks without attention have the first of the three alone
    _add_resnet(names, "mid_block.resnets.1", "middle_block.2")
    for block, kind in enumerate(config["up_block_types"]):
        for layer in range(per_block):
            place = block * per_block + layer
            _add_layer(names, f"up_blocks.{block}", layer, f"output_blocks.{place}", kind in _WITH_ATTENTION)
        last = f"output_blocks.{(block + 1) * per_block - 1}"
        names[f"up_blocks.{block}.upsamplers.0.conv"] = f"{last}.{2 if kind in _WITH_ATTENTION else 1}.conv"
    return names


def _add_layer(names: dict[str, str], block: str, layer: int, place: str, has_attention: bool) -> None:
    _add_resnet(names, f"{block}.resnets.{layer}", f"{place}.0")
    if has_attention:
        names[f"{block}.attentions.{layer}"] = f"{place}.1"


def _add_resnet(names: dict[str, str], own: str, original: str, inside: Mapping[str, str] = _UNET_RESNET) -> None:
    names[own] = original
    names |= {f"{own}.{part}": f"{original}.{other}" for part, other in inside.items()}


def original_name(name: str, names: Mapping[str, str]) -> str:
    """The original name of a module or tensor by `names` of modules; `UsageError` if it has none."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        if (found := names.get(".".join(parts[:count]))) is not None:
            return ".".join([found, *parts[count:]])
    raise UsageError(f"{name} {_NO_PLACE}")


def unet_tensors(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Tensors:
    """The tensors of a U-Net by their original names, without a prefix."""
    names = unet_modules(config)
    return _distinct((original_name(name, names), tensor) for name, tensor in state.items())


def vae_tensors(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Tensors:
    """The tensors of an autoencoder by their original names, without a prefix."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for coder in ("encoder", "decoder"):
        names |= {f"{coder}.{end}": f"{coder}.{end}" for end in ("conv_in", "conv_out")}
        names[f"{coder}.conv_norm_out"] = f"{coder}.norm_out"
        for number in (0, 1):
            _add_resnet(names, f"{coder}.mid_block.resnets.{number}", f"{coder}.mid.block_{number + 1}", _VAE_RESNET)
        for part, other in _VAE_ATTENTION.items():
            names[f"{coder}.mid_block.attentions.0.{part}"] = f"{coder}.mid.attn_1.{other}"
    layers = config["layers_per_block"]
    for block in range(len(config["down_block_types"])):
        for layer in range(layers):
            _add_resnet(
                names,
                f"encoder.down_blocks.{block}.resnets.{layer}",
                f"encoder.down.{block}.block.{layer}",
                _VAE_RESNET,
            )
        names[f"encoder.down_blocks.{block}.downsamplers.0"] = f"encoder.down.{block}.downsample"
    last = len(config["up_block_types"]) - 1
    for block in range(last + 1):  # the original counts them from the pixels
        for layer in range(layers + 1):
            own, original = f"decoder.up_blocks.{block}", f"decoder.up.{last - block}"
            _add_resnet(names, f"{own}.resnets.{layer}", f"{original}.block.{layer}", _VAE_RESNET)
        names[f"decoder.up_blocks.{block}.upsamplers.0"] = f"decoder.up.{last - block}.upsample"
    found = _distinct((original_name(name, names), tensor) for name, tensor in state.items())
    return {
        name: tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
        for name, tensor in found.items()
    }


def clip_tensors(state: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors of OpenAI's CLIP text encoder: Transformers' names, with the position ids that it used to save."""
    found = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in state.items()}
    positions = len(found["text_model.embeddings.position_embedding.weight"])
    return found | {"text_model.embeddings.position_ids": torch.arange(positions)[None]}


def open_clip_tensors(state: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors of an OpenCLIP text encoder by that library's names."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    found: Tensors = {"logit_scale": torch.tensor(_LOGIT_SCALE)}
    for name, tensor in state.items():
        if name in _OPEN_CLIP_ENDS:
            found[_OPEN_CLIP_ENDS[name]] = tensor
        elif name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            layer, part, kind = match.groups()
            block = f"transformer.resblocks.{layer}."
            if part in _OPEN_CLIP_LAYER:
                found[f"{block}{_OPEN_CLIP_LAYER[part]}.{kind}"] = tensor
            elif part == "self_attn.q_proj":
                three = [state[f"encoder.layers.{layer}.self_attn.{which}_proj.{kind}"] for which in "qkv"]
                found[f"{block}attn.in_proj_{kind}"] = torch.cat(three)
            elif part not in ("self_attn.k_proj", "self_attn.v_proj"):
                raise UsageError(f"the text encoder's {name} {_NO_PLACE}")
        elif name != "embeddings.position_ids":
            raise UsageError(f"the text encoder's {name} {_NO_PLACE}")
    return found


def pipeline_tensors(pipeline: Any, dtype: torch.dtype) -> Tensors:
    """All tensors of a single file: U-Net, VAE and text encoders of a Stable Diffusion or SDXL `pipeline`, in `dtype`.

    With the markers of a U-Net that predicts v, and of a schedule that ends at zero SNR, by which other programs know
    it. `UsageError` for networks that the original layout has no place for, among them a U-Net with a guidance
    embedding.
    """
    unet, scheduler = pipeline.unet, pipeline.scheduler.config
    if unet.config.time_cond_proj_dim is not None:
        raise UsageError("a guidance embedding has no place in a single file: bake a guidance_scale into the U-Net.")
    found = dict(_prefixed(UNET, unet_tensors(unet.state_dict(), unet.config)))
    found |= _prefixed(VAE, vae_tensors(pipeline.vae.state_dict(), pipeline.vae.config))
    text = pipeline.text_encoder.state_dict()
    is_sd2 = False
    if getattr(pipeline, "text_encoder_2", None) is not None:
        found |= _prefixed(XL_CLIP, clip_tensors(text))
        found |= _prefixed(XL_OPEN_CLIP, open_clip_tensors(pipeline.text_encoder_2.state_dict()))
    elif unet.config.cross_attention_dim == 1024:
        is_sd2 = True
        found |= _prefixed(OPEN_CLIP, open_clip_tensors(text))
    else:
        found |= _prefixed(CLIP, clip_tensors(text))
    if not is_sd2:  # of which other programs recognize the prediction in another way, by a tensor's values
        if scheduler.prediction_type == "v_prediction":
            found["v_pred"] = torch.zeros(0)
        if scheduler.rescale_betas_zero_snr:
            found["ztsnr"] = torch.zeros(0)
    return {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in found.items()
    }


def _prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((prefix + name, tensor) for name, tensor in tensors.items())


def _distinct(tensors: Iterable[tuple[str, torch.Tensor]]) -> Tensors:
    found: Tensors = {}
    for name, tensor in tensors:
        assert name not in found, name
        found[name] = tensor
    return found
