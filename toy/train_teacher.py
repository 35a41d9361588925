"""Train the toy world's teachers from nothing and save them as Diffusers pipeline folders.

    python -m toy.train_teacher sd        → toy/teachers/sd,   a StableDiffusionPipeline
    python -m toy.train_teacher sdxl      → toy/teachers/sdxl, a StableDiffusionXLPipeline

Two stages. An autoencoder (64 pixels to a 16×16×4 latent) learns to copy pictures; then the U-Net learns to
predict noise in its latents, and the text encoders learn with it, from scratch. Captions drop to the empty one
10 % of the time, so that classifier-free guidance works. The SDXL teacher sees pictures of varied size and
crop with their time ids, so that the ids matter. Same seed and machine: same weights.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lcm_distill.export.weights import save_pipeline
from toy.world import WORDS, draw, random_scene

RESOLUTION = 64
TEACHERS = Path(__file__).parent / "teachers"
_SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


# --- what the teachers are made of -----------------------------------------------------------------------


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's own tokenizer with a small vocabulary: every byte, and the world's words whole."""
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:  # from the right: the words share few endings, so the merges do not collide
            pair = (parts[-2], parts[-1])
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
            parts[-2:] = ["".join(pair)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=16)


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,  # small groups would normalise a plain background's colour away
        sample_size=RESOLUTION,
        force_upcast=False,
    )


def build_unet(family: str) -> UNet2DConditionModel:
    common: dict[str, Any] = dict(
        sample_size=RESOLUTION // 4,
        block_out_channels=(24, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        time_embedding_dim=192,
    )
    if family == "sd":
        return UNet2DConditionModel(
            **common,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64,
            attention_head_dim=4,
        )
    return UNet2DConditionModel(
        **common,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + 64,
    )


class Conditioner(torch.nn.Module):
    """The text encoders of a family, trained with the U-Net: token ids (and time ids) to U-Net arguments."""

    def __init__(self, family: str, tokenizer: CLIPTokenizer):
        super().__init__()
        self.family = family
        self.text_encoder = CLIPTextModel(_text_config(tokenizer))
        if family == "sdxl":
            self.text_encoder_2 = CLIPTextModelWithProjection(_text_config(tokenizer))

    def forward(self, ids: torch.Tensor, time_ids: torch.Tensor) -> dict[str, Any]:
        if self.family == "sd":
            return {"encoder_hidden_states": self.text_encoder(ids).last_hidden_state}
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids, output_hidden_states=True)
        return {
            "encoder_hidden_states": torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1),
            "added_cond_kwargs": {"text_embeds": second.text_embeds, "time_ids": time_ids},
        }


# --- pictures ----------------------------------------------------------------------------------------------


def draw_pictures(count: int, seed: int, varied: bool) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """Pictures uint8 `[count, 3, 64, 64]`, captions, and SDXL time ids `[count, 6]`.

    With `varied`, pictures are drawn at other sizes and shapes, reduced or enlarged until the shorter side is
    64 pixels, and cropped at random: half of them in the middle of the longer side's range, as a plain crop.
    """
    pixels, captions, time_ids = [], [], []
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        scene = random_scene(rng)
        width = height = RESOLUTION
        top = left = 0
        if varied and rng.random() < 0.75:
            short = int(rng.integers(RESOLUTION // 2, 2 * RESOLUTION + 1))
            long = int(short * rng.uniform(1, 1.5))
            width, height = (short, long) if rng.random() < 0.5 else (long, short)
        picture = draw(scene, rng, width, height)
        if (width, height) != (RESOLUTION, RESOLUTION):
            scale = RESOLUTION / min(width, height)
            resized = (max(RESOLUTION, round(width * scale)), max(RESOLUTION, round(height * scale)))
            left = int(rng.integers(resized[0] - RESOLUTION + 1))
            top = int(rng.integers(resized[1] - RESOLUTION + 1))
            picture = picture.resize(resized, Image.Resampling.BILINEAR)
            picture = picture.crop((left, top, left + RESOLUTION, top + RESOLUTION))
        pixels.append(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1))
        captions.append(scene.caption)
        time_ids.append([height, width, top, left, RESOLUTION, RESOLUTION])
    return torch.stack(pixels), captions, torch.tensor(time_ids, dtype=torch.float32)


def _progress(stage: str, step: int, steps: int, loss: float, start: float) -> None:
    if (step + 1) % 100 == 0 or step + 1 == steps:
        elapsed = time.perf_counter() - start
        left = elapsed / (step + 1) * (steps - step - 1)
        print(f"{stage} {step + 1}/{steps}  loss {loss:.4f}  {elapsed:.0f} s, {left:.0f} s to go", flush=True)


# --- stage 1: the autoencoder --------------------------------------------------------------------------------


def train_vae(steps: int, batch_size: int, seed: int) -> AutoencoderKL:
    """A trained autoencoder whose `scaling_factor` brings its latents to unit spread."""
    torch.manual_seed(seed)
    vae = build_vae().to(memory_format=torch.channels_last)
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -5  # the posterior starts narrow: the decoder sees a signal from the first step
    square, _, _ = draw_pictures(6000, seed + 1, varied=False)
    varied, _, _ = draw_pictures(2000, seed + 2, varied=True)
    pictures = torch.cat([square, varied])
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(steps):
        batch = pictures[torch.randint(len(pictures), (batch_size,))].float() / 127.5 - 1
        posterior = vae.encode(batch).latent_dist
        difference = vae.decode(posterior.sample()).sample - batch
        # The shape covers few pixels but carries most of the caption: it counts three times.
        background = batch.flatten(2).median(dim=2).values[..., None, None]
        weight = 1 + 2 * ((batch - background).abs().amax(dim=1, keepdim=True) > 0.1)
        loss = (weight * (difference.square() + difference.abs())).mean() + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        _progress("autoencoder", step, steps, float(loss.detach()), start)
    vae.eval().requires_grad_(False)
    whiten_latents(vae, pictures)
    return vae


@torch.no_grad()
def whiten_latents(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Gives the latents of `pictures` zero mean and equal, independent channels, and sets `scaling_factor`.

    The change is linear, so the 1×1 convolutions on both sides of the latent take it up and the autoencoder's
    copies stay the same. Plain backgrounds make for latents that are flat over the whole picture, and a flat value
    outlasts noise that is independent from place to place: at unit spread the noisiest timestep still shows the
    background, which pure noise, where sampling starts, does not. A scaling factor below 1 drowns it.
    """
    means = torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in pictures.split(250)])
    spreads = torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.var for part in pictures.split(250)])
    columns = means.permute(1, 0, 2, 3).flatten(1).double()
    center = columns.mean(dim=1)
    values, vectors = torch.linalg.eigh(torch.cov(columns))
    whiten = (vectors / values.sqrt()).T
    channels = len(center)
    weight, bias = vae.quant_conv.weight[:, :, 0, 0].double(), vae.quant_conv.bias.double()
    spread = whiten.square() @ spreads.double().mean(dim=(0, 2, 3))
    vae.quant_conv.weight.copy_(torch.cat([whiten @ weight[:channels], 0 * weight[channels:]])[:, :, None, None])
    vae.quant_conv.bias.copy_(torch.cat([whiten @ (bias[:channels] - center), spread.log()]))
    weight = vae.post_quant_conv.weight[:, :, 0, 0].double()
    vae.post_quant_conv.bias.add_(weight @ center)
    vae.post_quant_conv.weight.copy_((weight @ torch.linalg.inv(whiten))[:, :, None, None])
    vae.register_to_config(scaling_factor=0.45)


# --- stage 2: U-Net and text encoders -------------------------------------------------------------------------


def train_unet(
    family: str,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    conditioner: Conditioner,
    tokenizer: CLIPTokenizer,
    *,
    cycles: Sequence[int],
    learning_rate: float,
    batch_size: int,
    pictures: int,
    seed: int,
) -> None:
    """Trains U-Net and text encoders in place on the latents of `pictures` pictures.

    Each of the `cycles` is so many steps of rising and falling learning rate, from the averaged weights of the one
    before; the first one's peak is `learning_rate`, the later ones' 0.4 of it.
    """
    schedule = DDPMScheduler(**_SCHEDULE, clip_sample=False)
    print(f"drawing and encoding {pictures} pictures", flush=True)
    pixels, captions, time_ids = draw_pictures(pictures, seed + 10, varied=family == "sdxl")
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    empty = tokenizer([""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        moments = torch.cat([vae.encode(p.float() / 127.5 - 1).latent_dist.parameters for p in pixels.split(250)])
    mean, log_variance = moments.chunk(2, dim=1)
    spread = torch.exp(0.5 * log_variance.clamp(-30, 20))

    unet.train().to(memory_format=torch.channels_last)
    parameters = [*unet.parameters(), *conditioner.train().parameters()]
    for cycle, steps in enumerate(cycles):
        torch.manual_seed(seed + cycle)
        peak = learning_rate if cycle == 0 else 0.4 * learning_rate
        optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.05)
        average = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75, foreach=True)
        start, smooth = time.perf_counter(), 1.0
        for step in range(steps):
            chosen = torch.randint(len(ids), (batch_size,))
            latents = mean[chosen] + spread[chosen] * torch.randn(batch_size, *mean.shape[1:])
            latents = latents * vae.config.scaling_factor
            tokens = torch.where(torch.rand(batch_size, 1) < 0.1, empty, ids[chosen])
            noise = torch.randn_like(latents)
            timesteps = torch.randint(schedule.config.num_train_timesteps, (batch_size,))
            noisy = schedule.add_noise(latents, noise, timesteps)
            predicted = unet(noisy, timesteps, **conditioner(tokens, time_ids[chosen])).sample
            # Halfway between the losses in the noise and in the picture: at high noise levels, where what the caption
            # says is decided, an error in the noise grows by sigma / alpha in the picture.
            weight = compute_snr(schedule, timesteps).rsqrt().clamp(max=12.0)
            loss = (weight * F.mse_loss(predicted, noise, reduction="none").mean(dim=(1, 2, 3))).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            rates.step()
            average.step(parameters)
            smooth = 0.99 * smooth + 0.01 * float(loss.detach())
            _progress(f"{family} U-Net, cycle {cycle + 1} of {len(cycles)}", step, steps, smooth, start)
        average.copy_to(parameters)
    unet.eval()
    conditioner.eval()


def build_pipeline(family: str, vae, unet, conditioner: Conditioner, tokenizer: CLIPTokenizer):
    if family == "sd":
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=conditioner.text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=PNDMScheduler(**_SCHEDULE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=conditioner.text_encoder,
        text_encoder_2=conditioner.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**_SCHEDULE, steps_offset=1, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def teacher_accuracy(pipeline, count: int, steps: int = 50, guidance_scale: float = 3.0, seed: int = 0) -> float:
    """Caption accuracy of `count` pictures that the teacher draws with DDIM, in [0, 1]."""
    from toy.score import Scorer, caption_accuracy

    rng = np.random.default_rng(seed)
    captions = [random_scene(rng).caption for _ in range(count)]
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        captions,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="pil",
    ).images
    return caption_accuracy(pictures, captions, scorer=Scorer.load())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=["sd", "sdxl"])
    parser.add_argument("--output_dir", type=Path, help="default: toy/teachers/FAMILY")
    parser.add_argument("--vae", type=Path, help="folder of an autoencoder to use instead of training one")
    parser.add_argument("--init", type=Path, help="folder of a teacher to train further, with its own autoencoder")
    parser.add_argument("--vae_steps", type=int, default=2800)
    parser.add_argument("--steps", type=int, nargs="+", default=[6500, 2000], help="U-Net training steps, per cycle")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak of the first cycle")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=40_000, help="distinct pictures the U-Net learns from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    output_dir = args.output_dir or TEACHERS / args.family
    kind = StableDiffusionPipeline if args.family == "sd" else StableDiffusionXLPipeline

    started = time.perf_counter()
    tokenizer = build_tokenizer()
    torch.manual_seed(args.seed)
    unet, conditioner = build_unet(args.family), Conditioner(args.family, tokenizer)
    if args.init:
        earlier = kind.from_pretrained(args.init, torch_dtype=torch.float32)
        vae, unet = earlier.vae, earlier.unet
        for name, _ in conditioner.named_children():
            setattr(conditioner, name, getattr(earlier, name))
    elif args.vae:
        vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32)
    else:
        vae = train_vae(args.vae_steps, 16, args.seed)
        vae.save_pretrained(output_dir / "vae")
    vae.register_to_config(_name_or_path="")  # no path of this machine belongs into the teacher's config
    unet.register_to_config(_name_or_path="")
    train_unet(
        args.family,
        vae.requires_grad_(False).eval(),
        unet,
        conditioner,
        tokenizer,
        cycles=args.steps,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        pictures=args.pictures,
        seed=args.seed,
    )
    save_pipeline(output_dir, build_pipeline(args.family, vae, unet, conditioner, tokenizer).to(torch.float16))
    print(f"{output_dir}: trained in {(time.perf_counter() - started) / 60:.0f} minutes")

    accuracy = teacher_accuracy(kind.from_pretrained(output_dir, torch_dtype=torch.float32), 256)
    print(json.dumps({"caption_accuracy_ddim50": round(accuracy, 4), "guidance_scale": 3.0}))


if __name__ == "__main__":
    main()
