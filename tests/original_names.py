"""Names, and shapes, that other programs expect: of a single file's tensors, and of a LoRA's modules.

Written down from how those programs build their networks, and not from the package's tables, which are compared with
this. Sources, by repository and file:

    CompVis/latent-diffusion, ldm/modules/diffusionmodules/openaimodel.py, ldm/modules/attention.py and model.py
    Stability-AI/generative-models, sgm/modules/diffusionmodules/openaimodel.py; mlfoundations/open_clip, transformer.py
    comfyanonymous/ComfyUI, comfy/supported_models.py (depths of the transformers; prefixes), comfy/lora.py
    AUTOMATIC1111/stable-diffusion-webui, extensions-builtin/Lora/networks.py (convert_diffusers_name_to_compvis)
    kohya-ss/sd-scripts, networks/lora.py with library/sdxl_original_unet.py (SDXL), and Diffusers' U-Net (SD)
"""

import functools
import re
from collections.abc import Callable, Iterable

Shapes = dict[str, tuple[int, ...]]

# The networks' settings by these programs' names: levels are channel multiples, depths are transformer blocks for each
# input block, for the middle (None: the middle is one residual block) and for each output block, in their order.
UNETS = {
    "sd15": dict(
        levels=(1, 2, 4, 4), depths=(1, 1, 1, 1, 1, 1, 0, 0), middle=1, up=(0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1),
        context=768, label=None, linear=False,
    ),
    "sdxl": dict(
        levels=(1, 2, 4), depths=(0, 0, 2, 2, 10, 10), middle=10, up=(10, 10, 10, 2, 2, 2, 0, 0, 0),
        context=2048, label=2816, linear=True,
    ),
    "ssd1b": dict(
        levels=(1, 2, 4), depths=(0, 0, 2, 2, 4, 4), middle=None, up=(4, 4, 10, 2, 1, 1, 0, 0, 0),
        context=2048, label=2816, linear=True,
    ),
}  # fmt: skip


def _layer(name: str, *shape: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def _residual(name: str, taken: int, given: int, time: int) -> Shapes:
    found = _layer(f"{name}.in_layers.0", taken) | _layer(f"{name}.in_layers.2", given, taken, 3, 3)
    found |= _layer(f"{name}.emb_layers.1", given, time)
    found |= _layer(f"{name}.out_layers.0", given) | _layer(f"{name}.out_layers.3", given, given, 3, 3)
    return found | (_layer(f"{name}.skip_connection", given, taken, 1, 1) if taken != given else {})


def _transformer(name: str, width: int, depth: int, context: int, linear: bool) -> Shapes:
    square = (width, width) if linear else (width, width, 1, 1)
    found = _layer(f"{name}.norm", width) | _layer(f"{name}.proj_in", *square) | _layer(f"{name}.proj_out", *square)
    for block in (f"{name}.transformer_blocks.{number}" for number in range(depth)):
        for attention, source in (("attn1", width), ("attn2", context)):
            found |= _layer(f"{block}.{attention}.to_q", width, width, bias=False)
            for part in ("to_k", "to_v"):
                found |= _layer(f"{block}.{attention}.{part}", width, source, bias=False)
            found |= _layer(f"{block}.{attention}.to_out.0", width, width)
        found |= _layer(f"{block}.ff.net.0.proj", 8 * width, width) | _layer(f"{block}.ff.net.2", width, 4 * width)
        for number in (1, 2, 3):
            found |= _layer(f"{block}.norm{number}", width)
    return found


def unet_shapes(name: str, base: int = 320) -> Shapes:
    """Every tensor of the U-Net `name` of `UNETS`."""
    known = UNETS[name]
    time, context, linear = 4 * base, known["context"], known["linear"]
    found = _layer("time_embed.0", time, base) | _layer("time_embed.2", time, time)
    if known["label"]:
        found |= _layer("label_emb.0.0", time, known["label"]) | _layer("label_emb.0.2", time, time)
    found |= _layer("input_blocks.0.0", base, 4, 3, 3)
    width, skips, place, depths = base, [base], 1, iter(known["depths"])
    for level, multiple in enumerate(known["levels"]):
        for _ in range(2):
            found |= _residual(f"input_blocks.{place}.0", width, multiple * base, time)
            width = multiple * base
            if depth := next(depths):
                found |= _transformer(f"input_blocks.{place}.1", width, depth, context, linear)
            skips.append(width)
            place += 1
        if level < len(known["levels"]) - 1:
            found |= _layer(f"input_blocks.{place}.0.op", width, width, 3, 3)
            skips.append(width)
            place += 1
    found |= _residual("middle_block.0", width, width, time)
    if known["middle"]:
        found |= _transformer("middle_block.1", width, known["middle"], context, linear)
        found |= _residual("middle_block.2", width, width, time)
    place, depths = 0, iter(known["up"])
    for level, multiple in reversed(list(enumerate(known["levels"]))):
        for number in range(3):
            found |= _residual(f"output_blocks.{place}.0", width + skips.pop(), multiple * base, time)
            width = multiple * base
            depth = next(depths)
            if depth:
                found |= _transformer(f"output_blocks.{place}.1", width, depth, context, linear)
            if level and number == 2:
                found |= _layer(f"output_blocks.{place}.{2 if depth else 1}.conv", width, width, 3, 3)
            place += 1
    return found | _layer("out.0", width) | _layer("out.2", 4, width, 3, 3)


def vae_shapes(base: int = 128, levels: tuple[int, ...] = (1, 2, 4, 4), latent: int = 4) -> Shapes:
    """Every tensor of the autoencoder of Stable Diffusion and SDXL."""

    def residual(name: str, taken: int, given: int) -> Shapes:
        found = _layer(f"{name}.norm1", taken) | _layer(f"{name}.conv1", given, taken, 3, 3)
        found |= _layer(f"{name}.norm2", given) | _layer(f"{name}.conv2", given, given, 3, 3)
        return found | (_layer(f"{name}.nin_shortcut", given, taken, 1, 1) if taken != given else {})

    def middle(name: str, width: int) -> Shapes:
        found = residual(f"{name}.mid.block_1", width, width) | residual(f"{name}.mid.block_2", width, width)
        found |= _layer(f"{name}.mid.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            found |= _layer(f"{name}.mid.attn_1.{part}", width, width, 1, 1)
        return found

    found, width = _layer("encoder.conv_in", base, 3, 3, 3), base
    for level, multiple in enumerate(levels):
        for number in (0, 1):
            found |= residual(f"encoder.down.{level}.block.{number}", width, multiple * base)
            width = multiple * base
        if level < len(levels) - 1:
            found |= _layer(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    found |= middle("encoder", width) | middle("decoder", width)
    found |= _layer("encoder.norm_out", width) | _layer("encoder.conv_out", 2 * latent, width, 3, 3)
    found |= _layer("quant_conv", 2 * latent, 2 * latent, 1, 1) | _layer("post_quant_conv", latent, latent, 1, 1)
    found |= _layer("decoder.conv_in", width, latent, 3, 3)
    for level, multiple in reversed(list(enumerate(levels))):
        for number in (0, 1, 2):
            found |= residual(f"decoder.up.{level}.block.{number}", width, multiple * base)
            width = multiple * base
        if level:
            found |= _layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    return found | _layer("decoder.norm_out", width) | _layer("decoder.conv_out", 3, width, 3, 3)


def clip_shapes(width: int = 768, layers: int = 12) -> Shapes:
    """Every tensor of OpenAI's text encoder, by Transformers' names of 2022."""
    found: Shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
        "text_model.embeddings.position_ids": (1, 77),
    }
    for layer in (f"text_model.encoder.layers.{number}" for number in range(layers)):
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= _layer(f"{layer}.self_attn.{part}", width, width)
        found |= _layer(f"{layer}.layer_norm1", width) | _layer(f"{layer}.layer_norm2", width)
        found |= _layer(f"{layer}.mlp.fc1", 4 * width, width) | _layer(f"{layer}.mlp.fc2", width, 4 * width)
    return found | _layer("text_model.final_layer_norm", width)


def open_clip_shapes(width: int = 1280, layers: int = 32, projection: bool = True) -> Shapes:
    """Every tensor of OpenCLIP's text encoder."""
    found: Shapes = {"token_embedding.weight": (49408, width), "positional_embedding": (77, width), "logit_scale": ()}
    for layer in (f"transformer.resblocks.{number}" for number in range(layers)):
        found |= {f"{layer}.attn.in_proj_weight": (3 * width, width), f"{layer}.attn.in_proj_bias": (3 * width,)}
        found |= _layer(f"{layer}.attn.out_proj", width, width)
        found |= _layer(f"{layer}.ln_1", width) | _layer(f"{layer}.ln_2", width)
        found |= _layer(f"{layer}.mlp.c_fc", 4 * width, width) | _layer(f"{layer}.mlp.c_proj", width, 4 * width)
    return found | _layer("ln_final", width) | ({"text_projection": (width, width)} if projection else {})


def file_shapes(name: str) -> Shapes:
    """Every tensor of a single file of SD 1.5, SDXL or SSD-1B."""
    parts = {"model.diffusion_model.": unet_shapes(name), "first_stage_model.": vae_shapes()}
    if name == "sd15":
        parts["cond_stage_model.transformer."] = clip_shapes()
    else:
        parts["conditioner.embedders.0.transformer."] = clip_shapes()
        parts["conditioner.embedders.1.model."] = open_clip_shapes()
    return {prefix + tensor: shape for prefix, shapes in parts.items() for tensor, shape in shapes.items()}


# ---------------------------------------------------------------------------------------- the modules of a LoRA

_RESNET = {
    "conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1", "conv_shortcut": "skip_connection"
}  # fmt: skip
_PLACE = {"attentions": 1, "resnets": 0}
# What a name matches, and the module that it then stands for.
_A1111: list[tuple[str, Callable[[re.Match], str]]] = [
    (r"conv_in", lambda m: "input_blocks_0_0"),
    (r"conv_out", lambda m: "out_2"),
    (r"time_embedding_linear_(\d)", lambda m: f"time_embed_{2 * int(m[1]) - 2}"),
    (
        r"down_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
        lambda m: f"input_blocks_{1 + 3 * int(m[1]) + int(m[3])}_{_PLACE[m[2]]}_{_RESNET.get(m[4], m[4])}",
    ),
    (r"mid_block_attentions_\d+_(.+)", lambda m: f"middle_block_1_{m[1]}"),
    (r"mid_block_resnets_(\d+)_(.+)", lambda m: f"middle_block_{2 * int(m[1])}_{_RESNET.get(m[2], m[2])}"),
    (
        r"up_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
        lambda m: f"output_blocks_{3 * int(m[1]) + int(m[3])}_{_PLACE[m[2]]}_{_RESNET.get(m[4], m[4])}",
    ),
    (r"down_blocks_(\d+)_downsamplers_0_conv", lambda m: f"input_blocks_{3 + 3 * int(m[1])}_0_op"),
    (r"up_blocks_(\d+)_upsamplers_0_conv", lambda m: f"output_blocks_{2 + 3 * int(m[1])}_{1 + (m[1] != '0')}_conv"),
]


@functools.cache
def _by_underscores(name: str) -> dict[str, str]:
    """The modules of a U-Net that have weights, by their names with underscores."""
    modules = {tensor.removesuffix(".weight") for tensor in unet_shapes(name) if tensor.endswith(".weight")}
    return {module.replace(".", "_"): module for module in modules}


def resolve_a1111(unet: str, key: str) -> str | None:
    """The module that A1111, and Forge, find for a key such as `lora_unet_…`; None if they find none."""
    modules, name = _by_underscores(unet), key.removeprefix("lora_unet_")
    for pattern, original in _A1111:
        if match := re.fullmatch(pattern, name):
            return modules.get(original(match))
    return modules.get(name)


def resolve_comfyui(unet: str, key: str, diffusers_modules: Iterable[str]) -> str | None:
    """The same for ComfyUI: every module's original name, and Diffusers' names of those that it has tables for."""
    name = key.removeprefix("lora_unet_")
    if (found := _by_underscores(unet).get(name)) is not None:
        return found
    return name if name in _underscored(tuple(diffusers_modules)) else None


@functools.cache
def _underscored(modules: tuple[str, ...]) -> set[str]:
    return {module.replace(".", "_") for module in modules}


def resolve_kohya(unet: str, key: str, diffusers_modules: Iterable[str]) -> str | None:
    """The same for kohya's scripts: SDXL has the original U-Net there, Stable Diffusion has Diffusers'."""
    name = key.removeprefix("lora_unet_")
    if unet != "sd15":
        return _by_underscores(unet).get(name)
    return name if name in _underscored(tuple(diffusers_modules)) else None
