"""Read shape, size, colour and background back from pictures of the toy world: the judge of what a model draws.

    python -m toy.score              how well the scorer reads held-out drawn pictures
    python -m toy.score FOLDER       caption accuracy and Fréchet distance of *.png and *.jpg with captions in .txt
    python -m toy.score --train      retrain toy/scorer.safetensors from nothing, with a fixed seed

The scorer is a small convolutional network (about 110,000 parameters) with four heads. It is trained on drawn
pictures, also blurred, noisy, recoloured and JPEG-coded ones, so that what a VAE decodes is read fairly; and on
pictures without one clear shape (plain, noise, two shapes, two pictures in one), which it learns to call nothing.
"""

import argparse
import functools
import io
import itertools
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from lcm_distill.errors import UsageError
from toy.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, draw, random_scene

WEIGHTS = Path(__file__).with_name("scorer.safetensors")
RESOLUTION = 64
FEATURES = 64
_ATTRIBUTES = {"shape": SHAPES, "size": SIZES, "colour": tuple(COLOURS), "background": tuple(BACKGROUNDS)}
_NOTHING = len(SHAPES)  # the shape head's last class: no shape, or not one clear shape
_HEADS = (len(SHAPES) + 1, len(SIZES), len(COLOURS), len(BACKGROUNDS))
# Third words of the seeds: above any index of `toy.make_shards`, so that no shard holds these pictures.
_REAL, _TRAINING = 1_000_001, 1_000_002

Pictures = torch.Tensor | Sequence[Image.Image]


class Scorer(nn.Module):
    """Pictures in, scenes and features out; `Scorer.load()` is the trained one."""

    def __init__(self):
        super().__init__()

        def layer(channels_in: int, channels_out: int, kernel: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
            return [conv, nn.BatchNorm2d(channels_out), nn.ReLU()]

        self.trunk = nn.Sequential(
            *layer(3, 24, 5, 2), *layer(24, 48, 3, 2), *layer(48, 64, 3, 2), *layer(64, 96, 3, 1)
        )
        self.neck = nn.Linear(2 * 96, FEATURES)
        self.heads = nn.Linear(FEATURES, sum(_HEADS))

    @classmethod
    def load(cls, path: str | os.PathLike = WEIGHTS) -> "Scorer":
        if not Path(path).is_file():
            raise UsageError(f"no scorer at {path}: `python -m toy.score --train` makes one")
        scorer = cls()
        scorer.load_state_dict(load_file(path))  # float16 on disk; copied into float32
        return scorer.eval().requires_grad_(False)

    def save(self, path: str | os.PathLike) -> None:
        """Store the weights in float16 under `path`, which holds a whole file or is not touched."""
        half = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in self.state_dict().items()}
        with tempfile.TemporaryDirectory(dir=Path(path).parent, prefix=".writing-") as unfinished:
            Path(unfinished, "weights").write_bytes(to_bytes(half))
            os.replace(Path(unfinished, "weights"), path)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Features `[N, 64]` and the logits of the four heads for float32 `pixels` `[N, 3, 64, 64]` in 0 … 1."""
        maps = self.trunk(2 * pixels - 1)
        features = self.neck(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1))
        return features, self.heads(F.relu(features)).split(_HEADS, dim=1)

    @torch.inference_mode()
    def _batches(self, pictures: Pictures) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
        if self.training:
            raise RuntimeError("the scorer is in training mode: call eval() first")
        if len(pictures) == 0:
            raise ValueError("no pictures to read")
        for start in range(0, len(pictures), 256):
            yield self(_to_pixels(pictures[start : start + 256]).to(self.neck.weight.device))

    def read(self, pictures: Pictures) -> list[Scene | None]:
        """What each picture shows; `None` where there is not one clear shape.

        `pictures` is uint8 `[N, 3, H, W]` or a list of PIL pictures (of any sizes). What is not 64 × 64 is resized to
        it, so pictures should be square: others are squashed, and a squashed shape may be misread.
        """
        scenes = []
        for _, logits in self._batches(pictures):
            for classes in torch.stack([head.argmax(1) for head in logits], dim=1).tolist():
                words = [values[k] for values, k in zip(_ATTRIBUTES.values(), classes, strict=True) if k < len(values)]
                scenes.append(Scene(*words) if classes[0] != _NOTHING else None)
        return scenes

    def features(self, pictures: Pictures) -> torch.Tensor:
        """Float32 `[N, 64]` on the CPU: the layer before the heads, for `frechet_distance`. Takes what `read` takes."""
        return torch.cat([features.cpu() for features, _ in self._batches(pictures)])


def _to_pixels(pictures: Pictures) -> torch.Tensor:
    """Float32 `[N, 3, 64, 64]` in 0 … 1."""
    if isinstance(pictures, torch.Tensor):
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"pictures must be uint8 [N, 3, H, W], not {pictures.dtype} {list(pictures.shape)}")
        pixels = pictures.float() / 255
        if pixels.shape[2:] != (RESOLUTION, RESOLUTION):
            pixels = F.interpolate(pixels, (RESOLUTION, RESOLUTION), mode="bilinear", antialias=True)
        return pixels
    return torch.cat(
        [_to_pixels(torch.from_numpy(np.array(p.convert("RGB"))).permute(2, 0, 1)[None]) for p in pictures]
    )


@functools.cache
def _default_scorer() -> Scorer:
    return Scorer.load()


def caption_accuracy(pictures: Pictures, captions: Sequence[str], scorer: Scorer | None = None) -> float:
    """The share of pictures in which all four attributes are as the caption says, in 0 … 1.

    `ValueError` for a caption that is not of this world. `scorer` defaults to the trained one.
    """
    if len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures but {len(captions)} captions")
    wanted = [Scene.from_caption(caption) for caption in captions]
    read = (scorer or _default_scorer()).read(pictures)
    return sum(a == b for a, b in zip(read, wanted, strict=True)) / len(wanted)


def frechet_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two sets of features `[N, D]` and `[M, D]` (FID's formula).

    ‖μa − μb‖² + Tr(Σa + Σb − 2 (Σa Σb)^½), in float64 (Dowson & Landau 1982). The trace of the root is the sum of
    the roots of the eigenvalues of Σa^½ Σb Σa^½, which is symmetric and has the eigenvalues of Σa Σb. Like any FID
    it is biased upwards for few samples: compare sets of the same size. Needs two or more rows in each.
    """
    if features_a.ndim != 2 or features_b.ndim != 2 or features_a.shape[1] != features_b.shape[1]:
        shapes = f"{list(features_a.shape)} and {list(features_b.shape)}"
        raise ValueError(f"features must be [N, D] and [M, D], not {shapes}")
    if min(len(features_a), len(features_b)) < 2:
        raise ValueError("a Fréchet distance needs two or more pictures on each side")
    a, b = features_a.double(), features_b.double()
    covariance_a, covariance_b = torch.atleast_2d(torch.cov(a.T)), torch.atleast_2d(torch.cov(b.T))
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ covariance_b @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(0.0, distance.item())  # rounding can leave −1e-9 for equal sets


def real_pictures(n: int, seed: int, captions: Sequence[str] | None = None) -> tuple[torch.Tensor, list[str]]:
    """Drawn pictures, uint8 `[n, 3, 64, 64]`, and their captions; no shard holds them and the scorer never saw them.

    Captions are random, or `captions`, repeated or cut to `n`. Picture i depends on (seed, i) and its caption alone.
    For `frechet_distance` give the captions of the pictures to be judged: 1024 real pictures lie about 0.5 from others
    of the same captions, but 5 from others of random captions.
    """
    scenes = [Scene.from_caption(caption) for caption in itertools.islice(itertools.cycle(captions or ()), n)]
    pictures = []
    for i in range(n):
        rng = np.random.default_rng(np.random.SeedSequence((seed, i, _REAL)))
        if captions is None:
            scenes.append(random_scene(rng))
        pictures.append(np.asarray(draw(scenes[i], rng, RESOLUTION, RESOLUTION)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), [scene.caption for scene in scenes]


# ------------------------------------------------------------------------------------------------ training


def _training_pool(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 pictures `[size, 3, 64, 64]`, every other one through JPEG, and their classes `[size, 4]`."""
    pictures, classes = [], []
    for i in range(size):
        rng = np.random.default_rng(np.random.SeedSequence((seed, i, _TRAINING)))
        scene = random_scene(rng)
        picture = draw(scene, rng, RESOLUTION, RESOLUTION)
        if i % 2:
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=int(rng.integers(30, 96)))
            picture = Image.open(file)
        pictures.append(np.asarray(picture))
        classes.append([values.index(getattr(scene, name)) for name, values in _ATTRIBUTES.items()])
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), torch.tensor(classes)


def _uniform(n: int, low: float, high: float, generator: torch.Generator, channels: int = 1) -> torch.Tensor:
    return low + (high - low) * torch.rand(n, channels, 1, 1, generator=generator)


def _coarse_noise(n: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """Gaussian noise of unit size on a `side` × `side` grid, enlarged to 64 × 64."""
    return F.interpolate(torch.randn(n, 3, side, side, generator=generator), (RESOLUTION, RESOLUTION), mode="bilinear")


def spoil(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur, recolour and add noise to `pixels` (float32 in 0 … 1), each by its own amount, as a lossy decoder might."""
    n = len(pixels)
    blurred = pixels
    for _ in range(2):  # two 3 × 3 boxes: nearly Gaussian, with a standard deviation of 1.15 pixels
        blurred = F.avg_pool2d(blurred, 3, stride=1, padding=1, count_include_pad=False)
    pixels = torch.lerp(pixels, blurred, _uniform(n, -0.3, 1.0, generator))  # below 0 it sharpens
    pixels = pixels * _uniform(n, 0.88, 1.12, generator, 3) + _uniform(n, -0.06, 0.06, generator, 3)
    white = torch.randn(pixels.shape, generator=generator) * _uniform(n, 0, 0.07, generator)
    coarse = _coarse_noise(n, 16, generator) * _uniform(n, 0, 0.05, generator)
    return (pixels + white + coarse).clamp(0, 1)


def _without_shape(first: torch.Tensor, second: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures without one clear shape, made of two sets of pictures of scenes: a fourth each of four kinds."""
    pixels = first.clone()
    n, quarter = len(pixels), len(pixels) // 4
    background, background_2 = first[:, :, :1, :1], second[:, :, :1, :1]
    # Plain: the background, or any colour.
    plain = slice(0, quarter)
    any_colour = torch.rand(quarter, 3, 1, 1, generator=generator)
    pixels[plain] = torch.where(_uniform(quarter, 0, 1, generator) < 0.7, background[plain], any_colour)
    # Noise: white or in blobs, around the background.
    noise = slice(quarter, 2 * quarter)
    side = int(2 ** torch.randint(1, 7, (), generator=generator))
    pixels[noise] = background[noise] + _coarse_noise(quarter, side, generator) * _uniform(
        quarter, 0.03, 0.6, generator
    )
    # Two pictures in one, as the mean of several answers looks.
    blend = slice(2 * quarter, 3 * quarter)
    pixels[blend] = torch.lerp(first[blend], second[blend], _uniform(quarter, 0.3, 0.7, generator))
    # Two shapes on one background, side by side; where they would meet, a plain picture.
    both = slice(3 * quarter, n)
    where = (first[both] - background[both]).abs().amax(1, keepdim=True) > 0.1
    where_2 = (second[both] - background_2[both]).abs().amax(1, keepdim=True) > 0.1
    meet = (where & where_2).flatten(1).any(1)[:, None, None, None]
    together = torch.where(where_2, second[both], first[both])
    pixels[both] = torch.where(meet, background[both].expand_as(together), together)
    return pixels.clamp(0, 1)


def train(*, steps: int = 1800, batch_size: int = 96, pool: int = 16384, seed: int = 0, log_every: int = 250) -> Scorer:
    """A scorer trained from nothing. The same arguments give the same weights on the same machine."""
    generator = torch.Generator().manual_seed(seed)
    pictures, classes = _training_pool(pool, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scorer = Scorer().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs leave it out
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    nothing = batch_size // 4
    start = time.perf_counter()
    for step in range(1, steps + 1):
        chosen = torch.randint(pool, (batch_size + nothing,), generator=generator)
        pixels, targets = pictures[chosen].float() / 255, classes[chosen]
        pixels = torch.where(_uniform(len(pixels), 0, 1, generator) < 0.5, pixels, pixels.flip(3))
        shown = batch_size - nothing
        empty = _without_shape(pixels[shown:batch_size], pixels[batch_size:], generator)
        pixels, targets = torch.cat([pixels[:shown], empty]), targets[:batch_size]
        targets[shown:, 0] = _NOTHING
        pixels = torch.where(_uniform(batch_size, 0, 1, generator) < 0.75, spoil(pixels, generator), pixels)

        _, logits = scorer(pixels.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits[0], targets[:, 0])
        for head, target in zip(logits[1:], targets.T[1:], strict=True):  # nothing has no size, colour or background
            loss = loss + F.cross_entropy(head[:shown], target[:shown])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if log_every and (step % log_every == 0 or step == steps):
            print(f"step {step} of {steps}: loss {loss.item():.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    return scorer.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------- commands


def attribute_accuracy(scorer: Scorer, pictures: Pictures, captions: Sequence[str]) -> dict[str, float]:
    """The share of pictures read right, for each attribute and for `all` four together; nothing is right in `None`."""
    pairs = list(zip(scorer.read(pictures), map(Scene.from_caption, captions), strict=True))
    right = {"all": sum(a == b for a, b in pairs)}
    for name in _ATTRIBUTES:
        right[name] = sum(a is not None and getattr(a, name) == getattr(b, name) for a, b in pairs)
    return {name: count / len(pairs) for name, count in right.items()}


def _as_text(right: dict[str, float]) -> str:
    return f"{right['all']:.4f}  (" + ", ".join(f"{name} {right[name]:.4f}" for name in _ATTRIBUTES) + ")"


def load_folder(folder: str | os.PathLike) -> tuple[list[Image.Image], list[str]]:
    """The pictures `*.png` and `*.jpg` of `folder`, by name, and the captions in the `.txt` files beside them."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"FOLDER {folder} is not a folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not paths:
        raise UsageError(f"FOLDER {folder} holds no *.png or *.jpg")
    pictures, captions = [], []
    for path in paths:
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise UsageError(f"{path} has no caption: {text.name} should hold it")
        try:
            caption = text.read_text(encoding="utf-8").strip()
            Scene.from_caption(caption)
        except ValueError as error:  # not UTF-8, or not of this world
            raise UsageError(f"{text}: {error}") from error
        try:
            with Image.open(path) as picture:
                pictures.append(picture.convert("RGB"))
        except OSError as error:
            raise UsageError(f"{path} cannot be read as a picture: {error}") from error
        captions.append(caption)
    return pictures, captions


def _report_own_accuracy(scorer: Scorer, n: int = 2000) -> None:
    pictures, captions = real_pictures(n, seed=1)
    spoilt = spoil(pictures.float() / 255, torch.Generator().manual_seed(1)).mul(255).round().byte()
    print(f"share read right of {n} held-out pictures:")
    for title, shown in (("as drawn", pictures), ("blurred, recoloured and noisy", spoilt)):
        print(f"  {title}: all four {_as_text(attribute_accuracy(scorer, shown, captions))}")


def _report_folder(scorer: Scorer, folder: str, n: int = 2048) -> None:
    pictures, captions = load_folder(folder)
    print(f"{len(pictures)} pictures in {folder}")
    odd = sum(picture.width != picture.height for picture in pictures)
    if odd:
        print(f"  {odd} of them are not square; they are squashed to be read, so expect mistakes")
    print(f"  caption accuracy {_as_text(attribute_accuracy(scorer, pictures, captions))}")
    if len(pictures) < 2:
        print("  no Fréchet distance: it needs two or more pictures")
        return
    real = scorer.features(real_pictures(n, 2, captions)[0])
    same_size = scorer.features(real_pictures(len(pictures), 3, captions)[0])
    distance, of_real = (frechet_distance(features, real) for features in (scorer.features(pictures), same_size))
    print(f"  Fréchet distance to {n} real pictures of the same captions: {distance:.3f}")
    print(f"    ({len(pictures)} other real ones lie at {of_real:.3f})")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m toy.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="pictures to score, with captions in NAME.txt")
    parser.add_argument(
        "--train", action="store_true", help=f"retrain {WEIGHTS.name} first (four minutes on a slow core)"
    )
    args = parser.parse_args(argv)
    try:
        if args.train:
            train().save(WEIGHTS)
        scorer = Scorer.load()
        if args.folder is None:
            _report_own_accuracy(scorer)
        else:
            _report_folder(scorer, args.folder)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
