"""The Stable Diffusion XL family (SSD-1B too): frozen parts, conditioning on captions and sizes, pipeline."""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lcm_distill.data.encoded import Encoding
from lcm_distill.models.frozen import FrozenParts, empty_batch
from lcm_distill.models.teacher import Teacher
from lcm_distill.models.tokenizer import count_tokens as count_tokens_by

NAME = "sdxl"
PIPELINE = StableDiffusionXLPipeline
TAGS = ["stable-diffusion-xl"]  # of the model card


class Frozen(FrozenParts):
    """The teacher's parts, none of which trains; `unet` is the teacher itself.

    With `force_zeros_for_empty_prompt`, as in SDXL's own config, the empty caption is encoded as zeros.
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
        self.force_zeros_for_empty_prompt: bool = uses_zeros_for_empty_caption(teacher)

    @functools.cached_property
    def empty_conditioning(self) -> dict[str, Any]:
        """The text part of the empty caption's conditioning, with a batch of 1."""
        return _text_conditioning(self, empty_batch(self.encoding))


def text_fingerprint(teacher: Teacher) -> str:
    """Identifies the text encoders' weights (`Teacher.fingerprint`), and how the empty caption is encoded."""
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    prints = [teacher.fingerprint(part, kind) for part, kind in kinds.items()]
    return "-".join([*prints, "zeros" if uses_zeros_for_empty_caption(teacher) else "encoded"])


def embedding_shapes(teacher: Teacher) -> dict[str, tuple[int, ...]]:
    """The shapes, of one caption, of the arrays that `encode_captions` gives; loads no network."""
    first, second = (teacher.read_text_config(part) for part in ("text_encoder", "text_encoder_2"))
    tokens = teacher.tokenizer("tokenizer").model_max_length
    return {
        "encoder_hidden_states": (tokens, first.hidden_size + second.hidden_size),
        "text_embeds": (second.projection_dim,),
    }


def uses_zeros_for_empty_caption(teacher: Teacher) -> bool:
    """Whether the teacher's pipeline encodes the empty caption as zeros."""
    return teacher.zeros_for_empty_caption()


def load_frozen(
    teacher: Teacher,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    unet_dtype: torch.dtype = torch.float32,
    encoding: Encoding | None = None,
) -> Frozen:
    """Loads the frozen parts onto `device`: text encoders in `dtype`, the teacher's U-Net in `unet_dtype`.

    A full student is copied from the U-Net, which must then be float32: training must not start from rounded weights.
    The VAE is in `dtype` only if its config marks half precision as safe (`force_upcast` false), in which SDXL's own
    overflows. Parts that the shards' `encoding` replaces are loaded later, if at all. `UsageError` if weights cannot be
    loaded.
    """
    frozen = Frozen(teacher, device=device, dtype=dtype, unet_dtype=unet_dtype, encoding=encoding)
    frozen.load_for_training()
    return frozen


def base_model_version(unet_config: Mapping[str, Any]) -> str:
    """The model's name in the metadata of kohya-format LoRAs, by which other programs know what a LoRA fits."""
    return "sdxl_base_v1-0"


def count_tokens(teacher: Teacher, captions: Sequence[str]) -> list[tuple[int, int]]:
    """`models.tokenizer.count_tokens` by the teacher's tokenizers, the only parts that are loaded."""
    return count_tokens_by([teacher.tokenizer(part) for part in ("tokenizer", "tokenizer_2")], captions)


@torch.no_grad()
def encode_captions(frozen: Frozen, captions: list[str]) -> dict[str, Any]:
    """The text part of the U-Net's conditioning, to which `batch_conditioning` adds the sizes.

    `encoder_hidden_states` `[B, tokens, dim]`: the penultimate hidden states of both text encoders, concatenated;
    `text_embeds` `[B, dim]`, in `added_cond_kwargs`: the pooled embedding of the second.
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
        pooled = output[0]  # the second encoder's, which is kept, is the projected embedding
    states = torch.cat(hidden, dim=-1)
    if frozen.force_zeros_for_empty_prompt and "" in captions:
        empty = torch.tensor([caption == "" for caption in captions]).to(states.device, non_blocking=True)
        states = states.masked_fill(empty[:, None, None], 0)
        pooled = pooled.masked_fill(empty[:, None], 0)
    return {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled}}


def batch_conditioning(frozen: Frozen, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(conditioning, unconditional) of a batch of the stream; the text part of the latter has a batch of 1.

    Both have the time ids of the batch's pictures, as in the pipelines, whose two branches have the same sizes.
    """
    ids = time_ids(batch).to(frozen.device, non_blocking=True)
    return _with_time_ids(_text_conditioning(frozen, batch), ids), _with_time_ids(frozen.empty_conditioning, ids)


def _text_conditioning(frozen: Frozen, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch's stored embeddings if it has them, else its captions, encoded."""
    if "encoder_hidden_states" not in batch:
        return encode_captions(frozen, batch["captions"])
    states, pooled = (frozen.to_embedding(batch[name]) for name in ("encoder_hidden_states", "text_embeds"))
    return {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled}}


def time_ids(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """SDXL's micro-conditioning, int64 `[B, 6]`: original height and width, crop top and left, target height and width.

    `batch` holds `original_sizes`, `crop_top_lefts` and `target_sizes`, int64 `[B, 2]` each, in pixels.
    """
    return torch.cat([batch["original_sizes"], batch["crop_top_lefts"], batch["target_sizes"]], dim=1)


def _with_time_ids(conditioning: dict[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    """A copy of `conditioning` with the time ids, int64 `[B, 6]`."""
    return conditioning | {"added_cond_kwargs": conditioning["added_cond_kwargs"] | {"time_ids": ids}}


def build_pipeline(frozen: Frozen, unet: UNet2DConditionModel, scheduler: LCMScheduler) -> StableDiffusionXLPipeline:
    """A pipeline of `unet` and the frozen parts, which it shares, not copies, and of a copy of `scheduler`."""
    pipeline = PIPELINE(
        vae=frozen.vae,
        text_encoder=frozen.text_encoder,
        text_encoder_2=frozen.text_encoder_2,
        tokenizer=frozen.tokenizer,
        tokenizer_2=frozen.tokenizer_2,
        unet=unet,
        scheduler=copy.deepcopy(scheduler),  # a pipeline sets its timesteps
        force_zeros_for_empty_prompt=frozen.force_zeros_for_empty_prompt,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
