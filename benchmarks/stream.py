"""How fast is the shard stream, and does its memory stay flat?

    python -m benchmarks.stream                            # pictures per second, and a profile: some 5 minutes
    python -m benchmarks.stream --memory 200000            # resident memory over 200,000 samples: some 3 minutes
    python -m benchmarks.stream --encoded                  # encoded shards against pictures: some 3 minutes
    python -m benchmarks.stream --output benchmarks/results/stream-cpu.json      # keep the result as JSON

Speed. Two pipelines read the same shards with the same number of worker processes, crop at random to 512 x 512 and
mirror every other picture, in batches of 16:

    straightforward   what the public programs do: webdataset's tar reading, shuffle and decode("pil"), the shorter
                      side to 512 by Pillow (bilinear), crop, flip, to float32 in [-1, 1], default_collate, DataLoader
    stream            `ShardStream` and `make_loader`: uint8 batches, which become float32 on the training device
    stream, float     the same, with that conversion done here, in the main process, on one thread

They take turns, round after round. Each turn begins when the others' workers have filled their queues and rest, and
when its own prefetched batches have been used up: steady state, page cache warm, the time to the first batch left
out. The numbers are medians over the rounds, of the rates and of the ratios within a round. On a machine that is also
busy with other things, the workers' CPU time per picture is the steadier measure.

The pictures are drawn from a fixed seed and saved at JPEG quality 90; their texture is set so that the files are as
large as photographs'. What is faster also has to be the same picture: the result says how far the stream's pixels are
from Pillow's.

Profile. The same two pipelines in one process, as worker 0 of 1: where the CPU milliseconds per picture go. In a real
worker the hand-over runs in a thread beside the rest.

Encoded. The stream over pictures, and over shards of the same samples as `encode_shards` writes them: latents with
their mirror images, alone and with the captions encoded as well. Each stands against what the same user would read
otherwise, pictures resized and cropped to its size: latents of 512 x 512, alone and with Stable Diffusion 1.x's
captions, against pictures of 1024 x 768; latents of 1024 x 1024, alone and with SDXL's, against pictures of
1536 x 1152. (The numbers in them are drawn; how fast they are read does not depend on what they say.)

Memory. A loader with one worker reads tiny pictures, epoch after epoch, from shards of which some are compressed, cut
short, or full of samples that cannot be used. Resident memory of worker and main process is read 100 times on the way.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import torch
import torch.utils.data
import webdataset as wds
from PIL import Image, ImageDraw, features
from torch.utils.data import default_collate

import lcm_distill.data.preparation
import lcm_distill.data.stream
from benchmarks.provenance import provenance
from lcm_distill.data.encoded import Encoding
from lcm_distill.data.loader import make_loader
from lcm_distill.data.preflight import inspect_shards
from lcm_distill.data.preparation import Preparation, prepare_sample
from lcm_distill.data.raw import LATENTS_EXTENSION
from lcm_distill.data.shards import read_shard
from lcm_distill.data.stream import DropCounter, ShardStream
from lcm_distill.data.tar import atomic_tar

RESOLUTION = 512
BATCH = 16
WINDOW = 64  # samples in the shuffle buffers of both
PREFETCH = 2  # batches per worker, in both


# The test pictures.


def draw_picture(width: int, height: int, rng: np.random.Generator, texture: float) -> Image.Image:
    """Smooth colours, some edges, and a texture of that many grey levels."""
    pixels = np.full((height, width, 3), 110, np.float32)
    for cells, contrast in ((4, 60), (12, 30), (40, 14)):
        coarse = contrast * rng.standard_normal((cells * height // width + 1, cells, 3), np.float32)
        pixels += _enlarge(coarse, width, height)
    shapes = Image.new("RGB", (width, height))
    pen = ImageDraw.Draw(shapes)
    for _ in range(40):
        x, y, a, b = (int(rng.integers(low, high)) for low, high in ((0, width), (0, height), *[(8, width // 6)] * 2))
        pen.ellipse((x - a, y - b, x + a, y + b), fill=tuple(rng.integers(0, 90, 3).tolist()))
    pixels += np.asarray(shapes)
    grain = texture * rng.standard_normal((int(height / 1.5), int(width / 1.5), 1), np.float32)
    pixels += _enlarge(grain, width, height)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _enlarge(field: np.ndarray, width: int, height: int) -> np.ndarray:
    layers = [
        Image.fromarray(field[..., i]).resize((width, height), Image.Resampling.BICUBIC) for i in range(field.shape[2])
    ]
    return np.stack([np.asarray(layer) for layer in layers], axis=-1)


def encode(picture: Image.Image, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def make_speed_shards(folder: Path, width: int, height: int) -> tuple[list[str], float]:
    """(4 shards of pictures of that size, their mean file size in kB)."""
    folder.mkdir(parents=True, exist_ok=True)
    large = width * height > 2e6
    shards, sizes = [], []
    for number in range(4):
        files = []
        for index in range(8 if large else 24):
            key = f"{number:02d}{index:04d}"
            rng = np.random.default_rng((width, height, number, index))
            content = encode(draw_picture(width, height, rng, texture=10 if large else 8), quality=90)
            meta = {"caption": f"picture {key}", "width": width, "height": height, "url": f"https://host/{key}.jpg"}
            meta |= {"similarity": 0.31, "pwatermark": 0.02, "aesthetic": 5.7, "hash": 2**61 + index, "status": "ok"}
            sizes.append(len(content))
            files += [(f"{key}.jpg", content), (f"{key}.json", json.dumps(meta).encode())]
            files += [(f"{key}.txt", f"picture {key}, a view over hills in the evening".encode())]
        shards.append(str(folder / f"{number:03d}.tar"))
        write_tar(Path(shards[-1]), files)
    return shards, statistics.mean(sizes) / 1000


# The straightforward pipeline.


def resize_and_crop(image: Image.Image) -> Image.Image:
    width, height = image.size
    scale = RESOLUTION / min(width, height)
    image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BILINEAR)
    left = random.randint(0, image.width - RESOLUTION)
    top = random.randint(0, image.height - RESOLUTION)
    image = image.crop((left, top, left + RESOLUTION, top + RESOLUTION))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image


def to_tensor(image: Image.Image) -> torch.Tensor:
    """What torchvision's to_tensor and normalize do, step by step."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    return pixels.sub_(0.5).div_(0.5)


def straightforward(shards: list[str], watch: "Stopwatch | None" = None) -> wds.DataPipeline:
    def timed(name: str) -> list:
        return [] if watch is None else [lambda samples: watch.iterate(samples, name)]

    resize = resize_and_crop if watch is None else watch.wrap(resize_and_crop, "resize, crop")
    convert = to_tensor if watch is None else watch.wrap(to_tensor, "copies, conversion")
    return wds.DataPipeline(
        wds.ResampledShards(shards, deterministic=True),
        wds.tarfile_to_samples(),
        wds.shuffle(WINDOW),
        *timed("tar reading"),
        wds.decode("pil"),
        *timed("decode"),
        wds.rename(image="jpg;png;jpeg;webp", text="text;txt;caption"),
        wds.map_dict(image=lambda image: convert(resize(image))),
        wds.to_tuple("image", "text"),
        *timed("captions, JSON"),
        wds.batched(BATCH, partial=False, collation_fn=default_collate),
        *timed("copies, conversion"),
    )


def straightforward_loader(shards: list[str], workers: int) -> wds.WebLoader:
    return wds.WebLoader(straightforward(shards), batch_size=None, num_workers=workers, prefetch_factor=PREFETCH)


# The stream.


def stream_of(shards: list[str], resolution: int = RESOLUTION) -> ShardStream:
    preparation = inspect_shards(shards, Preparation(resolution=resolution, random_flip=True), limit=1).preparation
    return ShardStream(shards=shards, preparation=preparation, batch_size=BATCH, seed=0, shuffle_window=WINDOW)


def to_float(batch: dict) -> torch.Tensor:
    return batch["pixels"].to(torch.float32).div_(127.5).sub_(1)


# Speed.


@dataclass
class Arm:
    """A pipeline under measurement: pictures per second, and its workers' CPU milliseconds per picture, by round."""

    batches: Iterator
    processes: list[psutil.Process]
    use: Callable = lambda batch: None
    times: int = 1  # so many batches in place of one: fast ones need longer turns
    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def measure(self, count: int) -> None:
        for _ in range((PREFETCH + 1) * len(self.processes)):  # made while the others were measured
            next(self.batches)
        start, start_cpu = time.perf_counter(), self._cpu_seconds()
        for _ in range(count * self.times):
            self.use(next(self.batches))
        pictures = count * self.times * BATCH
        self.rates.append(pictures / (time.perf_counter() - start))
        self.cpu.append(1000 * (self._cpu_seconds() - start_cpu) / pictures)
        self.settle()

    def settle(self) -> None:
        """Waits until the workers have filled their queues: they should not work while another is measured."""
        while True:
            before = self._cpu_seconds()
            time.sleep(0.3)
            if self._cpu_seconds() - before < 0.02:
                return

    def _cpu_seconds(self) -> float:
        return sum(times.user + times.system for times in (process.cpu_times() for process in self.processes))


def workers_since(before: list[psutil.Process], number: int) -> list[psutil.Process]:
    started = [child for child in psutil.Process().children() if child not in before]
    assert len(started) == number, started
    return started


def compare_speed(shards: list[str], workers: int, rounds: int, count: int) -> dict:
    before = psutil.Process().children()
    theirs = iter(straightforward_loader(shards, workers))
    pixels, _ = next(theirs)
    their_workers = workers_since(before, workers)
    loader = make_loader(stream_of(shards), workers)
    ours = iter(loader)
    shape = next(ours)["pixels"].shape
    our_workers = workers_since(before + their_workers, workers)
    assert pixels.dtype == torch.float32 and pixels.shape == shape == (BATCH, 3, RESOLUTION, RESOLUTION)
    del pixels
    arms = {
        "straightforward": Arm(theirs, their_workers),
        "stream": Arm(ours, our_workers),
        "stream, float": Arm(ours, our_workers, to_float),
    }
    result = take_turns(arms, "straightforward", rounds, count)
    loader.close()
    return {"workers": workers} | result


def take_turns(arms: dict[str, Arm], against: str, rounds: int, count: int) -> dict:
    for arm in arms.values():
        arm.settle()
    for turn in range(rounds):
        for arm in arms.values():
            arm.measure(count)
        now = ", ".join(f"{name} {arm.rates[-1]:.1f} ({arm.cpu[-1]:.2f} ms CPU)" for name, arm in arms.items())
        print(f"  round {turn + 1}: {now}", flush=True)
    plain = arms[against]
    return {
        "pictures_each": {name: rounds * count * arm.times * BATCH for name, arm in arms.items()},
        "pictures_per_second": {name: round(statistics.median(arm.rates), 1) for name, arm in arms.items()},
        "worker_cpu_ms_per_picture": {name: round(statistics.median(arm.cpu), 2) for name, arm in arms.items()},
        f"times_{against}": {
            name: round(statistics.median(a / b for a, b in zip(arm.rates, plain.rates, strict=True)), 2)
            for name, arm in arms.items()
            if arm is not plain
        },
        "rounds": {name: [round(rate, 1) for rate in arm.rates] for name, arm in arms.items()},
    }


# Encoded shards.

Embeddings = dict[str, tuple[int, ...]]  # name to shape of a caption's
SD_CAPTION: Embeddings = {"encoder_hidden_states": (77, 768)}
SDXL_CAPTION: Embeddings = {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,)}


@dataclass(frozen=True)
class EncodedCase:
    """Encoded shards of some kinds, and the pictures that they take the place of."""

    resolution: int
    picture: tuple[int, int]  # width, height
    kinds: dict[str, Embeddings]
    pictures_turn: int  # batches in a turn of the pictures, and
    encoded_turn: int  # of what is encoded, which is faster


ENCODED_CASES = (
    EncodedCase(512, (1024, 768), {"latents": {}, "latents, SD captions": SD_CAPTION}, 8, 64),
    EncodedCase(1024, (1536, 1152), {"latents": {}, "latents, SDXL captions": SDXL_CAPTION}, 3, 32),
)


def make_encoded_shards(pictures: list[str], folder: Path, case: EncodedCase, embeddings: Embeddings) -> list[str]:
    """Shards of the same samples, encoded for square pictures; the numbers are drawn."""
    folder.mkdir()
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(np.float16)

    side, (width, height) = case.resolution // 8, case.picture
    left = (case.resolution * width // height - case.resolution) // 2
    encoding = Encoding(
        vae="drawn", scaling_factor=0.18215, shift_factor=None, vae_dtype="float32", moments=(8, side, side),
        resolution=case.resolution, interpolation="bilinear", center_crop=False, random_flip=True, caption_column=None,
        text="drawn" if embeddings else None, embeddings=embeddings,
        empty_caption={name: drawn(*shape) for name, shape in embeddings.items()},
    )  # fmt: skip
    for shard in pictures:
        with atomic_tar(folder / Path(shard).name) as tar:
            for name, content in encoding.header_files().items():
                tar.add(name, content)
            for raw in read_shard(shard):
                arrays = {name: drawn(*encoding.moments) for name in ("moments", "mirrored_moments")}
                arrays |= {name: drawn(1, *shape) for name, shape in embeddings.items()}
                arrays["sizes"] = np.array([(height, width), (0, left), (height, width)], np.int64)
                tar.add(f"{raw.key}.{LATENTS_EXTENSION}", encoding.pack(arrays))
                for extension in ("json", "txt"):
                    tar.add(f"{raw.key}.{extension}", raw.files[extension])
    return [str(folder / Path(shard).name) for shard in pictures]


def run_encoded(folder: Path, workers: list[int], rounds: int) -> list[dict]:
    results = []
    for case in ENCODED_CASES:
        of_case = folder / str(case.resolution)
        pictures, _ = make_speed_shards(of_case / "pictures", *case.picture)
        of_each = {"pictures": pictures}
        for name, embeddings in case.kinds.items():
            of_each[name] = make_encoded_shards(pictures, of_case / name, case, embeddings)
        about = {
            "resolution": case.resolution,
            "pictures": "{}x{}".format(*case.picture),
            "kilobytes": {name: round(sum(map(os.path.getsize, shards)) / 96000) for name, shards in of_each.items()},
        }
        print(f"{about['pictures']} to {case.resolution}; kilobytes of a sample: {about['kilobytes']}")
        for number in workers:
            print(f"  {number} workers, pictures per second", flush=True)
            results.append(about | {"workers": number} | compare_encoded(of_each, case, number, rounds))
            print("  " + json.dumps({k: v for k, v in results[-1].items() if k != "rounds"}), flush=True)
    return results


def compare_encoded(of_each: dict[str, list[str]], case: EncodedCase, workers: int, rounds: int) -> dict:
    arms, loaders = {}, []
    for name, shards in of_each.items():
        before = psutil.Process().children()
        loaders.append(make_loader(stream_of(shards, case.resolution), workers))
        batches = iter(loaders[-1])
        next(batches)
        times = case.pictures_turn if name == "pictures" else case.encoded_turn
        arms[name] = Arm(batches, workers_since(before, workers), times=times)
    result = take_turns(arms, "pictures", rounds, 1)
    for loader in loaders:
        loader.close()
    return result


def pixel_difference(shard: str) -> dict:
    """How far the stream's pictures are from a full decode resized by Pillow: the middle crop, in grey levels."""
    differences = []
    for raw in read_shard(shard):
        ours = prepare_sample(raw, Preparation(resolution=RESOLUTION, center_crop=True), draws=np.full(5, 0.5))
        image = Image.open(io.BytesIO(raw.files["jpg"])).convert("RGB")
        short = min(image.size)
        width, height = (RESOLUTION * side // short for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        y, x = ours.crop_top_left
        theirs = np.asarray(image.crop((x, y, x + RESOLUTION, y + RESOLUTION)))
        differences.append(np.abs(ours.arrays["pixels"].astype(int) - theirs))
    together = np.stack(differences)
    return {"mean": round(float(together.mean()), 2), "99th percentile": float(np.percentile(together, 99))}


# Profile.


class Stopwatch:
    """CPU seconds by section; what an inner section takes is not counted in the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = time.process_time()

    def _turn(self) -> None:
        now = time.process_time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def wrap(self, function: Callable, name: str) -> Callable:
        def timed(*args, **options):
            with self.section(name):
                return function(*args, **options)

        return timed

    def iterate(self, items: Iterable, name: str) -> Iterator:
        iterator = iter(items)
        while True:
            with self.section(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


SECTIONS = ("tar reading", "decode", "resize, crop", "copies, conversion", "captions, JSON", "hand-over", "rest")


@contextlib.contextmanager
def as_worker() -> Iterator[None]:
    """This process takes itself for worker 0 of 1, so that batches are made in shared memory where a worker's are."""
    nothing: torch.utils.data.Dataset = torch.utils.data.Dataset()
    info = torch.utils.data._utils.worker.WorkerInfo(id=0, num_workers=1, seed=0, dataset=nothing)
    with mock.patch.object(torch.utils.data._utils.worker, "_worker_info", info):
        yield


@contextlib.contextmanager
def timed_stream(watch: Stopwatch) -> Iterator[None]:
    patches = [
        mock.patch.object(module, name, watch.wrap(getattr(module, name), section))
        for module, name, section in (
            (lcm_distill.data.preparation, "read_picture", "decode"),
            (lcm_distill.data.preparation, "resize_and_crop", "resize, crop"),
            (lcm_distill.data.preparation, "read_json", "captions, JSON"),
            (lcm_distill.data.preparation, "read_captions", "captions, JSON"),
        )
    ]
    read = lcm_distill.data.stream.read_shard
    timed_read = lambda *args, **options: watch.iterate(read(*args, **options), "tar reading")  # noqa: E731
    patches.append(mock.patch.object(lcm_distill.data.stream, "read_shard", timed_read))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def profile(shards: list[str], count: int) -> dict[str, dict[str, float]]:
    """CPU milliseconds per picture, by pipeline and section."""
    result = {}
    for name in ("straightforward", "stream"):
        watch = Stopwatch()
        with as_worker(), timed_stream(watch):
            if name == "stream":
                batches: Iterator = iter(stream_of(shards))
                batches._samples = watch.iterate(batches._samples, "rest")  # type: ignore[attr-defined]
            else:
                batches = iter(straightforward(shards, watch))
            for turn in range(-2, count):
                if turn == 0:
                    watch.seconds.clear()
                with watch.section("copies, conversion" if name == "stream" else "rest"):
                    batch = next(batches)
                with watch.section("hand-over"):
                    (batch["pixels"] if name == "stream" else batch[0]).share_memory_()
        per_picture = {section: 1000 * watch.seconds[section] / (count * BATCH) for section in SECTIONS}
        assert not set(watch.seconds) - set(SECTIONS), watch.seconds
        result[name] = {section: round(ms, 2) for section, ms in per_picture.items()}
        result[name]["sum"] = round(sum(per_picture.values()), 2)
    return result


def print_profile(profiles: dict[str, dict[str, float]]) -> None:
    print(f"  {'CPU ms per picture':20}" + "".join(f"{name:>17}" for name in profiles))
    for section in (*SECTIONS, "sum"):
        print(f"  {section:20}" + "".join(f"{times[section]:17.2f}" for times in profiles.values()))


def run_speed(folder: Path, sizes: list[str], workers: list[int], rounds: int) -> list[dict]:
    results = []
    for size in sizes:
        width, height = map(int, size.split("x"))
        shards, kilobytes = make_speed_shards(folder / size, width, height)
        count = 4 if width * height > 2e6 else 8
        result: dict = {"size": size, "mean_kilobytes": round(kilobytes), "to": RESOLUTION, "batch": BATCH}
        result["difference_from_pillow"] = pixel_difference(shards[0])
        print(f"{size} JPEGs of {kilobytes:.0f} kB; {result['difference_from_pillow']} grey levels from Pillow's")
        result["profile"] = profile(shards, count)
        print_profile(result["profile"])
        result["speed"] = []
        for number in workers:
            print(f"  {number} workers, pictures per second", flush=True)
            result["speed"].append(compare_speed(shards, number, rounds, count))
            print("  " + json.dumps({k: v for k, v in result["speed"][-1].items() if k != "rounds"}), flush=True)
        results.append(result)
    return results


# Memory.


def make_memory_shards(folder: Path, per_shard: int = 1000) -> list[str]:
    """12 shards: 6 good ones, 3 with many bad samples, 1 with some large pictures, 1 compressed, 1 cut short."""
    kinds = ["good"] * 6 + ["bad"] * 3 + ["large", "compressed", "cut"]
    shards = []
    for number, kind in enumerate(kinds):
        rng = np.random.default_rng(number)
        files = [
            file for index in range(per_shard) for file in _memory_sample(f"{number:02d}{index:05d}", kind, index, rng)
        ]
        path = folder / f"{number:03d}.tar"
        write_tar(path, files)
        if kind == "compressed":
            path = path.rename(path.with_suffix(".tar.gz"))
            path.write_bytes(gzip.compress(path.read_bytes(), 1))
        elif kind == "cut":
            os.truncate(path, path.stat().st_size * 2 // 3 + 100)
        shards.append(str(path))
    return shards


def _memory_sample(key: str, kind: str, index: int, rng: np.random.Generator) -> list[tuple[str, bytes]]:
    side = 800 if kind == "large" and index % 50 == 0 else int(rng.integers(16, 48))
    pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
    picture = Image.fromarray(pixels).resize((side, int(rng.integers(16, 48)) if side < 48 else side))
    if index % 7 == 1:
        files = [(f"{key}.png", encode(picture.convert("RGBA" if index % 2 else "L"), "PNG"))]
    else:
        files = [(f"{key}.jpg", encode(picture, quality=90))]
    captions = [f"picture {key}, wording {i}, {'word ' * int(rng.integers(0, 60))}" for i in range(3)]
    files.append((f"{key}.json", json.dumps({"caption": captions, "width": side, "aesthetic": 5.0}).encode()))
    if kind != "bad" or index % 4 == 0:
        return files
    name, content = files[0]
    damage = index % 7
    if damage == 0:
        return [(name, content[: len(content) // 2]), files[1]]
    if damage == 2:
        return [(name, b"no picture"), files[1]]
    if damage == 3:
        return files[:1]
    if damage == 4:
        return [files[0], files[0], files[1]]
    if damage == 5:
        return [files[0], (f"{key}.json", b"{broken")]
    return [files[0], (f"{key}.txt", b"\xff\xfe\xfa")]


def run_memory(folder: Path, samples: int) -> dict:
    loader = make_loader(
        ShardStream(
            shards=make_memory_shards(folder),
            preparation=Preparation(resolution=16, random_flip=True, proportion_empty_prompts=0.1),
            batch_size=BATCH,
            seed=0,
        ),
        num_workers=1,
    )
    batches, counter, main = iter(loader), DropCounter(), psutil.Process()
    next(batches)
    (worker,) = (child for child in main.children() if "resource_tracker" not in " ".join(child.cmdline()))
    total = samples // BATCH
    points: list[tuple[int, float, float]] = []
    start = time.perf_counter()
    for number in range(1, total + 1):
        counter.update(next(batches))
        if number % 100 == 0:
            loader.state_dict()  # as for a checkpoint
        if number * 100 // total > (number - 1) * 100 // total:
            points.append((number * BATCH, *(process.memory_info().rss / 2**20 for process in (main, worker))))
            if len(points) % 10 == 0:
                count, main_mb, worker_mb = points[-1]
                print(f"  {count:7} samples: main process {main_mb:.1f} MB, worker {worker_mb:.1f} MB", flush=True)
    seconds = time.perf_counter() - start
    loader.close()
    result: dict = {
        "samples": total * BATCH,
        "seconds": round(seconds),
        "dropped": counter.total(),
        "megabytes": [[count, round(main_mb, 1), round(worker_mb, 1)] for count, main_mb, worker_mb in points[9::10]],
    }
    settled = np.array(points[len(points) // 5 :])
    for column, process in ((1, "main process"), (2, "worker")):
        slope = np.polyfit(settled[:, 0] / 100_000, settled[:, column], 1)[0]
        growth = settled[:, column].max() - settled[0, column]
        result[process] = {
            "slope_mb_per_100000_samples": round(float(slope), 2),
            "greatest_growth_after_a_fifth_mb": round(float(growth), 2),
            "flat": bool(slope < 2 and growth < 10),
        }
        print(f"  {process}: {result[process]}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stream", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", nargs="+", default=["1024x768", "3000x2000"], help="of the pictures (1024x768 3000x2000)"
    )
    parser.add_argument(
        "--workers", nargs="+", type=int, default=[1, 2], help="numbers of worker processes to try (1 2)"
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="turns of each pipeline; 128 small or 64 large pictures each (7)"
    )
    parser.add_argument("--memory", type=int, metavar="SAMPLES", help="watch the memory over so many samples instead")
    parser.add_argument("--encoded", action="store_true", help="measure encoded shards against pictures instead")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON; the other part of an older result stays")
    args = parser.parse_args()
    torch.set_num_threads(1)
    origin = provenance("benchmarks.stream", sys.argv[1:])
    origin["versions"] |= {package: version(package) for package in ("numpy", "pillow")}
    origin["versions"] |= {"libjpeg-turbo": features.version("libjpeg_turbo")}
    part = "encoded" if args.encoded else "speed" if args.memory is None else "memory"
    with tempfile.TemporaryDirectory() as temporary:
        if args.encoded:
            numbers: object = run_encoded(Path(temporary), args.workers, args.rounds)
        elif args.memory is None:
            numbers = run_speed(Path(temporary), args.sizes, args.workers, args.rounds)
        else:
            numbers = run_memory(Path(temporary), args.memory)
    if args.output:
        earlier = json.loads(args.output.read_text()) if args.output.exists() else {}
        args.output.write_text(json.dumps(earlier | {part: origin | {"numbers": numbers}}, indent=2) + "\n")


if __name__ == "__main__":
    main()
