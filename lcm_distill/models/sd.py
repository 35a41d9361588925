"""The Stable Diffusion 1.x / 2.x family: frozen parts, conditioning, pipeline."""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from lcm_distill.data.encoded import Encoding
from lcm_distill.models.frozen import FrozenParts, empty_batch
from lcm_distill.models.teacher import Teacher
from lcm_distill.models.tokenizer import count_tokens as count_tokens_by
from lcm_distill.models.unets import keeping_config

NAME = "sd"
PIPELINE = StableDiffusionPipeline
TAGS = ["stable-diffusion"]  # of the model card


class Frozen(FrozenParts):
    """The teacher's parts, none of which trains; `unet` is the teacher itself."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
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
        kinds = {"tokenizer": CLIPTokenizer, "text_encoder": CLIPTextModel}
        networks = {"vae": AutoencoderKL, "unet": UNet2DConditionModel}
        dtypes = {"text_encoder": dtype, "vae": dtype, "unet": unet_dtype}
        super().__init__(
            teacher, device=device, kinds=kinds | networks, dtypes=dtypes, text=tuple(kinds), encoding=encoding
        )

    @functools.cached_property
    def empty_conditioning(self) -> dict[str, torch.Tensor]:
        """The conditioning of the empty caption, `[1, tokens, dim]`."""
        return _text_conditioning(self, empty_batch(self.encoding))


def load_frozen(
    teacher: Teacher,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    unet_dtype: torch.dtype = torch.float32,
    encoding: Encoding | None = None,
) -> Frozen:
    """Loads the frozen parts onto `device`: text encoder and VAE in `dtype`, the teacher's U-Net in `unet_dtype`.

    A full student is copied from the U-Net, which must then be float32: training must not start from rounded weights.
    The VAEs of SD 1.x and 2.x are safe in half precision. Parts that the shards' `encoding` replaces are loaded later,
    if at all. `UsageError` if weights cannot be loaded.
    """
    frozen = Frozen(teacher, device=device, dtype=dtype, unet_dtype=unet_dtype, encoding=encoding)
    frozen.load_for_training()
    return frozen


def text_fingerprint(teacher: Teacher) -> str:
    """Identifies the text encoder's weights (`Teacher.fingerprint`)."""
    return teacher.fingerprint("text_encoder", CLIPTextModel)


def embedding_shapes(teacher: Teacher) -> dict[str, tuple[int, ...]]:
    """The shapes, of one caption, of the arrays that `encode_captions` gives; loads no network."""
    text = teacher.read_text_config("text_encoder")
    return {"encoder_hidden_states": (teacher.tokenizer("tokenizer").model_max_length, text.hidden_size)}


def base_model_version(unet_config: Mapping[str, Any]) -> str:
    """The model's name in the metadata of kohya-format LoRAs, by which other programs know what a LoRA fits."""
    return "sd_v2" if unet_config.get("cross_attention_dim") == 1024 else "sd_v1"


def count_tokens(teacher: Teacher, captions: Sequence[str]) -> list[tuple[int, int]]:
    """`models.tokenizer.count_tokens` by the teacher's tokenizer, the only part that is loaded."""
    return count_tokens_by([teacher.tokenizer("tokenizer")], captions)


@torch.no_grad()
def encode_captions(frozen: Frozen, captions: list[str]) -> dict[str, torch.Tensor]:
    """The U-Net's conditioning of `captions`: `encoder_hidden_states` `[B, tokens, dim]`."""
    tokenized = frozen.tokenizer(
        captions,
        padding="max_length",
        max_length=frozen.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    # As in the pipelines, the mask is used only if the text encoder's config asks for it.
    use_mask = getattr(frozen.text_encoder.config, "use_attention_mask", False)
    device = frozen.text_encoder.device
    mask = tokenized.attention_mask.to(device, non_blocking=True) if use_mask else None
    output = frozen.text_encoder(tokenized.input_ids.to(device, non_blocking=True), attention_mask=mask)
    return {"encoder_hidden_states": output.last_hidden_state}


def batch_conditioning(
    frozen: Frozen, batch: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(conditioning, unconditional) of a batch of the stream: `[B, tokens, dim]`, and `[1, tokens, dim]`."""
    return _text_conditioning(frozen, batch), frozen.empty_conditioning


def _text_conditioning(frozen: Frozen, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The batch's stored embeddings if it has them, else its captions, encoded."""
    if "encoder_hidden_states" not in batch:
        return encode_captions(frozen, batch["captions"])
    return {"encoder_hidden_states": frozen.to_embedding(batch["encoder_hidden_states"])}


def build_pipeline(frozen: Frozen, unet: UNet2DConditionModel, scheduler: LCMScheduler) -> StableDiffusionPipeline:
    """A pipeline of `unet` and the frozen parts, which it shares, not copies, and of a copy of `scheduler`.

    Diffusers' pipeline edits the configs of what it is given (offset, clipping, an old U-Net's sample_size): what is
    exported must not depend on whether pictures were generated.
    """
    with keeping_config(unet):
        pipeline = PIPELINE(
            vae=frozen.vae,
            text_encoder=frozen.text_encoder,
            tokenizer=frozen.tokenizer,
            unet=unet,
            scheduler=copy.deepcopy(scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
