"""The Stable Diffusion XL family (SSD-1B too): load the frozen parts, encode captions and sizes, build the pipeline."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lcm_distill.data.encoded import Encoding
from lcm_distill.models.frozen import FrozenParts, empty_batch
from lcm_distill.models.teacher import Teacher

NAME = "sdxl"
PIPELINE = StableDiffusionXLPipeline
TAGS = ["stable-diffusion-xl"]  # of the model card


class Frozen(FrozenParts):
    """The parts that do not train; `unet` is the teacher.

    With `force_zeros_for_empty_prompt`, as in SDXL's own config, the empty caption is zeros, not its encoding.
    """

    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    vae: AutoencoderKL
    unet: UNet2DConditionModel

    def __init__(
        self,
        teacher: Teacher,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        unet_dtype: torch.dtype = torch.float32,
        encoding: Encoding | None = None,
    ):
        vae_dtype = torch.float32 if teacher.read_vae_config().get("force_upcast", True) else dtype
        kinds = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer}
        kinds |= {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        networks = {"vae": AutoencoderKL, "unet": UNet2DConditionModel}
        dtypes = {"text_encoder": dtype, "text_encoder_2": dtype, "vae": vae_dtype, "unet": unet_dtype}
        super().__init__(
            teacher, device=device, kinds=kinds | networks, dtypes=dtypes, text=tuple(kinds), encoding=encoding
        )
        self.force_zeros_for_empty_prompt: bool = forces_zeros(teacher)

    @functools.cached_property
    def empty_conditioning(self) -> dict[str, Any]:
        """The text part of the unconditional branch's conditioning, with a batch of 1: that of the empty caption."""
        return _text_conditioning(self, empty_batch(self.encoding))


def text_fingerprint(teacher: Teacher) -> str:
    """Tells what `encode_captions` gives for this teacher from what it gives for others, as `Teacher.fingerprint`."""
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    prints = [teacher.fingerprint(part, kind) for part, kind in kinds.items()]
    return "-".join([*prints, "zeros" if forces_zeros(teacher) else "encoded"])


def forces_zeros(teacher: Teacher) -> bool:
    """Whether the teacher's pipeline has zeros for the empty caption."""
    return teacher.read_config(PIPELINE, None).get("force_zeros_for_empty_prompt", True)


def load_frozen(
    teacher: Teacher,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    unet_dtype: torch.dtype = torch.float32,
    encoding: Encoding | None = None,
) -> Frozen:
    """Loads what does not train onto `device`: text encoders in `dtype`, the teacher's U-Net in `unet_dtype`.

    A student made from the U-Net needs it in float32: what trains must not start from rounded weights. The VAE is
    in `dtype` only if its config says that half precision is safe for it (`force_upcast` false); SDXL's own
    overflows there. What the shards' `encoding` makes needless waits. `UsageError` if weights are not there.
    """
    frozen = Frozen(teacher, device=device, dtype=dtype, unet_dtype=unet_dtype, encoding=encoding)
    frozen.load_for_training()
    return frozen


def base_model_version(unet_config: Mapping[str, Any]) -> str:
    """The model's name in the metadata of kohya-format LoRAs, by which programs tell what a LoRA fits."""
    return "sdxl_base_v1-0"


@torch.no_grad()
def encode_captions(frozen: Frozen, captions: list[str]) -> dict[str, Any]:
    """The text part of the U-Net's conditioning; `batch_conditioning` adds the sizes.

    `encoder_hidden_states` `[B, tokens, dim]` are the last but one hidden states of both text encoders side by side,
    `text_embeds` `[B, dim]`, among `added_cond_kwargs`, the pooled embedding of the second.
    """
    hidden, pooled = [], torch.empty(0)
    for tokenizer, text_encoder in (
        (frozen.tokenizer, frozen.text_encoder),
        (frozen.tokenizer_2, frozen.text_encoder_2),
    ):
        ids = tokenizer(
            captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        output = text_encoder(ids.to(text_encoder.device, non_blocking=True), output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
        pooled = output[0]  # of the last one: its projected embedding
    states = torch.cat(hidden, dim=-1)
    if frozen.force_zeros_for_empty_prompt and "" in captions:
        empty = torch.tensor([caption == "" for caption in captions]).to(states.device, non_blocking=True)
        states = states.masked_fill(empty[:, None, None], 0)
        pooled = pooled.masked_fill(empty[:, None], 0)
    return {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled}}


def batch_conditioning(frozen: Frozen, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The conditioning of a batch of the stream, and that of the empty caption (its text part with a batch of 1).

    Both have the time ids of the batch's pictures: the pipeline, too, gives the unconditional branch the same sizes.
    """
    ids = time_ids(batch)
    return _with_time_ids(_text_conditioning(frozen, batch), ids), _with_time_ids(frozen.empty_conditioning, ids)


def _text_conditioning(frozen: Frozen, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch's stored embeddings, or else its captions, encoded."""
    if "encoder_hidden_states" not in batch:
        return encode_captions(frozen, batch["captions"])
    states, pooled = (frozen.embedding(batch[name]) for name in ("encoder_hidden_states", "text_embeds"))
    return {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled}}


def time_ids(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """SDXL's micro-conditioning, int64 `[B, 6]`: original height and width, crop top and left, target height and width.

    Of a batch of the stream: its `original_sizes`, `crop_top_lefts` and `target_sizes`, `[B, 2]` each, in pixels.
    """
    return torch.cat([batch["original_sizes"], batch["crop_top_lefts"], batch["target_sizes"]], dim=1)


def _with_time_ids(conditioning: dict[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    """`conditioning` with the time ids, int64 `[B, 6]`, on its device."""
    added = conditioning["added_cond_kwargs"]
    on_device = ids.to(added["text_embeds"].device, non_blocking=True)
    return conditioning | {"added_cond_kwargs": added | {"time_ids": on_device}}


def build_pipeline(frozen: Frozen, unet: UNet2DConditionModel, scheduler: LCMScheduler) -> StableDiffusionXLPipeline:
    """A pipeline that draws with `unet` and the frozen parts; it shares their weights."""
    pipeline = PIPELINE(
        vae=frozen.vae,
        text_encoder=frozen.text_encoder,
        text_encoder_2=frozen.text_encoder_2,
        tokenizer=frozen.tokenizer,
        tokenizer_2=frozen.tokenizer_2,
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=frozen.force_zeros_for_empty_prompt,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
