"""Metrics of generated pictures, computed row by row.

    latents    relative distance and energy distance to the teacher's latents, diversity; needs no other network
    clip       CLIP score: how well pictures match their prompts; Transformers' CLIP
    cmmd       CMMD to the reference pictures (arXiv 2401.09603); Transformers' CLIP
    fid        FID to the reference pictures; needs torch-fidelity (pip install torch-fidelity)

A metric loads what it needs when it is created, before any picture is generated. The reference pictures of cmmd and
fid, set with `against`, are real pictures if there are any, else the teacher's. Both metrics are biased upwards for few
pictures: compare rows of one evaluation with each other, not with numbers from elsewhere.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from PIL import Image

from lcm_distill.errors import UsageError, brief
from lcm_distill.models.vae import decode_latents


@dataclasses.dataclass
class GeneratedRow:
    """A row of generated pictures: latents `[N, C, h, w]` on the CPU, one for each prompt; decoded when needed."""

    prompts: Sequence[str]
    latents: torch.Tensor
    steps: int
    vae: Any = dataclasses.field(repr=False)

    @functools.cached_property
    def pictures(self) -> list[Image.Image]:
        return decode_latents(self.vae, self.latents, batch_size=1)

    def first_pictures(self, count: int) -> list[Image.Image]:
        """The first `count` pictures, without decoding the others."""
        decoded = self.__dict__.get("pictures")
        return decoded[:count] if decoded else decode_latents(self.vae, self.latents[:count], batch_size=1)


class Metric(Protocol):
    """Computes values of a row, by name; not every row has all. `titles`: their titles, in the order of the tables."""

    @property
    def titles(self) -> Mapping[str, str]: ...

    def __call__(self, row: GeneratedRow) -> dict[str, float]: ...


class LatentDistances:
    """To the reference's latents: `relative_distance` of rows with one step, `energy_distance` of all rows.

    If prompts are repeated, also the `spread` of the pictures of one prompt, relative to the reference's.
    """

    titles = {
        "distance": "Distance of the one-step answer to the end of the teacher's trajectory (0 is perfect)",
        "energy": "Energy distance to the teacher's answers, in latents, × 1000 (0: the same distribution)",
        "diversity": "Diversity of the pictures of one prompt, in latents (1: the teacher's)",
    }

    def __init__(self, reference: GeneratedRow):
        self._reference = reference.latents
        self._spread = spread(reference.latents, reference.prompts)

    def __call__(self, row: GeneratedRow) -> dict[str, float]:
        values = {"distance": relative_distance(row.latents, self._reference)} if row.steps == 1 else {}
        if len(row.latents) > 1:
            values["energy"] = 1000 * energy_distance(row.latents, self._reference)
        if self._spread > 0:
            values["diversity"] = spread(row.latents, row.prompts) / self._spread
        return values


def spread(latents: torch.Tensor, prompts: Sequence[str]) -> float:
    """The mean distance ‖a − b‖ of the latents `[N, …]` of two pictures of one prompt; 0 if no prompt has two."""
    flat = latents.flatten(1).double()
    groups = [[i for i, prompt in enumerate(prompts) if prompt == chosen] for chosen in dict.fromkeys(prompts)]
    distances = [torch.nn.functional.pdist(flat[group]) for group in groups if len(group) > 1]
    return float(torch.cat(distances).mean()) if distances else 0.0


class ClipScore:
    """CLIP score (arXiv 2104.08718): the mean of 100 · max(0, cos) of CLIP's embeddings of picture and prompt."""

    titles = {"clip_score": "CLIP score (higher is better)"}

    def __init__(self, model: str, device: torch.device | str, cache_dir: str | None = None):
        self._device = device
        self._model, self._process = _load_clip(model, "--clip_model", device, cache_dir)
        try:
            self._tokenizer = transformers.CLIPTokenizer.from_pretrained(model, cache_dir=cache_dir)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"--clip_model {model}: it has no tokenizer ({brief(error)}).") from None

    @torch.no_grad()
    def __call__(self, row: GeneratedRow) -> dict[str, float]:
        scores = []
        for first in range(0, len(row.pictures), 16):
            tokens = self._tokenizer(
                list(row.prompts[first : first + 16]), padding=True, truncation=True, return_tensors="pt"
            )
            pixels = self._process(row.pictures[first : first + 16], return_tensors="pt").pixel_values
            output = self._model(**tokens.to(self._device), pixel_values=pixels.to(self._device))
            scores += (output.image_embeds * output.text_embeds).sum(dim=1).clamp(min=0).tolist()  # of unit length
        return {"clip_score": 100 * sum(scores) / len(scores)}


class Cmmd:
    """CMMD (arXiv 2401.09603): 1000 · MMD² of CLIP's unit-length picture embeddings to the reference's, σ = 10."""

    titles = {"cmmd": "CMMD to the reference pictures (lower is better)"}

    def __init__(self, model: str, device: torch.device | str, cache_dir: str | None = None):
        self._device = device
        self._model, self._process = _load_clip(model, "--cmmd_model", device, cache_dir)
        self._reference = torch.empty(0)

    def against(self, reference: Sequence[Image.Image]) -> "Cmmd":
        """Sets the pictures to compare with; returns itself."""
        self._reference = self._embed(reference)
        return self

    @torch.no_grad()
    def _embed(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        rows = []
        for first in range(0, len(pictures), 16):
            pixels = self._process(list(pictures[first : first + 16]), return_tensors="pt").pixel_values
            hidden = self._model.vision_model(pixel_values=pixels.to(self._device)).pooler_output
            rows.append(self._model.visual_projection(hidden).cpu().double())  # Apple's GPUs have no float64
        return torch.nn.functional.normalize(torch.cat(rows))

    def __call__(self, row: GeneratedRow) -> dict[str, float]:
        return {"cmmd": 1000 * squared_mmd(self._embed(row.pictures), self._reference)}


def squared_mmd(a: torch.Tensor, b: torch.Tensor, sigma: float = 10.0) -> float:
    """Squared maximum mean discrepancy of `[N, D]` and `[M, D]` over all pairs; kernel exp(−‖x − y‖² / 2σ²)."""

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.exp(-torch.cdist(x, y).square() / (2 * sigma**2)).mean()

    return float(kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))


class Fid:
    """FID to the reference pictures, by torch-fidelity, which downloads its Inception weights itself."""

    titles = {"fid": "FID to the reference pictures (lower is better)"}

    def __init__(self, device: torch.device | str):
        try:
            from torch_fidelity import calculate_metrics
        except ImportError:
            raise UsageError("--metrics fid needs torch-fidelity: pip install torch-fidelity, or use cmmd.") from None
        self._calculate = functools.partial(
            calculate_metrics, fid=True, cuda=torch.device(device).type == "cuda", verbose=False
        )
        self._reference = _Pictures([])

    def against(self, reference: Sequence[Image.Image]) -> "Fid":
        """Sets the pictures to compare with; returns itself."""
        self._reference = _Pictures(reference)
        return self

    def __call__(self, row: GeneratedRow) -> dict[str, float]:
        values = self._calculate(input1=_Pictures(row.pictures), input2=self._reference)
        return {"fid": float(values["frechet_inception_distance"])}


class _Pictures(torch.utils.data.Dataset):
    """Pictures as torch-fidelity expects them: uint8 `[3, H, W]`."""

    def __init__(self, pictures: Sequence[Image.Image]):
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self._pictures[index].convert("RGB"))).permute(2, 0, 1)


def _load_clip(
    model: str, flag: str, device: torch.device | str, cache_dir: str | None
) -> tuple[Any, Callable[..., Any]]:
    """A CLIP in float32 and its image processor (Pillow's, which needs no torchvision)."""
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    try:
        network = transformers.CLIPModel.from_pretrained(model, cache_dir=cache_dir, dtype=torch.float32)
        return network.to(device).eval(), processor.from_pretrained(model, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag} {model}: no CLIP model can be loaded from there ({brief(error)}).") from None


def relative_distance(predicted: torch.Tensor, ends: torch.Tensor) -> float:
    """The mean over pairs of ‖predicted − end‖ / ‖end‖, of `[N, …]` each: 0 is perfect, zeros have 1.

    With `ends` those of the guided teacher's DDIM trajectories, and `predicted` the student's one-step results from the
    same noise, it is how far the student is from the goal of distillation, f(z_T) = z_0 (arXiv 2310.04378).
    """
    predicted, ends = _flatten(predicted), _flatten(ends)
    if predicted.shape != ends.shape:
        raise ValueError(f"predicted {list(predicted.shape)} and ends {list(ends.shape)} must come in pairs")
    return float(((predicted - ends).norm(dim=1) / ends.norm(dim=1)).mean())


def energy_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The energy coefficient of two distributions, from N samples of each, `[N, …]`: 0 if equal, 1 if far apart.

    (2·E‖a − b‖ − E‖a − a'‖ − E‖b − b'‖) / 2·E‖a − b‖, by Székely and Rizzo (2013). All means are over pairs i ≠ j, so
    that a pair with the same prompt and noise does not count as close; the estimate can be slightly below 0. `a` and
    `b` must have the same number of samples, at least two.
    """
    a, b = _flatten(a), _flatten(b)
    if a.shape != b.shape or len(a) < 2:
        raise ValueError(f"needs the same number of samples of each, at least two, not {len(a)} and {len(b)}")
    others = ~torch.eye(len(a), dtype=torch.bool, device=a.device)
    across, within_a, within_b = (torch.cdist(x, y)[others].mean() for x, y in ((a, b), (a, a), (b, b)))
    return float((2 * across - within_a - within_b) / (2 * across))


def _flatten(samples: torch.Tensor) -> torch.Tensor:
    return samples.detach().double().flatten(1)
