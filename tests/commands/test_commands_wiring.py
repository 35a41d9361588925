"""Every flag of every command is followed to where it acts.

A command runs once, or a few times where flags exclude each other, with values that are distinct and not the defaults.
Spies record what these reach: the calls of Diffusers' pipelines, the libraries' loaders, the VAE, the pools of workers,
the files that are left. Its table gives for each flag what must then hold, as a pair (found, expected).
"""

import argparse
import dataclasses
import functools
import io
import json
import random
import sys
import tarfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.numpy import load as load_arrays
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from lcm_distill import bench_inference, encode_shards, evaluate, export_model, pack_shards, report, sample
from lcm_distill.data import packing
from lcm_distill.data.encoded import read_encoding
from lcm_distill.export.metadata import read_metadata
from lcm_distill.models.frozen import FrozenParts
from lcm_distill.models.teacher import Teacher

COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (bench_inference, encode_shards, evaluate, export_model, pack_shards, report, sample)
}
TEACHER_VALUES = {
    "pretrained_teacher_model": "org/teacher",
    "teacher_config": "org/configs",
    "pretrained_vae_model_name_or_path": "org/vae",
    "teacher_revision": "teacher-branch",
    "revision": "vae-branch",
    "variant": "fp16",
}
DEVICE_VALUES = {"device": "cpu:0", "dtype": "bf16"}
PROMPTS = ["a small red circle", "a large blue square", "a green star"]


# ------------------------------------------------------------------------------------------------------- the spies


@dataclasses.dataclass
class PipelineCall:
    """A call of a pipeline: one batch of pictures."""

    model: str  # "teacher" under its own samplers; under LCMScheduler "full", "lora", or else "LCM"
    sampler: str
    prompts: list[str]
    seeds: list[int]
    steps: int
    guidance_scale: float
    negative_prompt: str | None
    loras: dict[str, float]  # the weight of each by its source
    size: tuple[int | None, int | None]
    strength: float | None


@dataclasses.dataclass
class Run:
    """One run of a command: what was typed, and what the spies saw."""

    typed: dict[str, Any]
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the parser: name to default
    parsed: dict[str, Any] = dataclasses.field(default_factory=dict)
    teacher: Any = None
    frozen: Any = None
    calls: list[PipelineCall] = dataclasses.field(default_factory=list)
    loads: list[tuple[str, str, Any]] = dataclasses.field(default_factory=list)  # (class, source, cache_dir)
    loras: dict[str, str] = dataclasses.field(default_factory=dict)  # the source of each adapter
    pixels: list[torch.Tensor] = dataclasses.field(default_factory=list)  # batches that the VAE encoded
    texts: list[list[str]] = dataclasses.field(default_factory=list)  # batches that were tokenized to be encoded
    more: dict[str, list] = dataclasses.field(default_factory=dict)  # what only one command has

    def add(self, name: str, value: Any) -> None:
        self.more.setdefault(name, []).append(value)

    def values(self, name: str, *models: str) -> list[Any]:
        """The distinct values of an attribute of the calls of `models`, or of all, in their order."""
        found = [getattr(call, name) for call in self.calls if not models or call.model in models]
        return [value for number, value in enumerate(found) if value not in found[:number]]

    def sources(self, kind: str) -> set[str]:
        return {source for of, source, _ in self.loads if of == kind}

    @property
    def out(self) -> Path:
        return Path(self.typed.get("output_dir") or self.typed["out"])

    def written(self, file: str) -> Any:
        return json.loads((self.out / file).read_text())


def _watch(run: Run, teacher: str, patch: pytest.MonkeyPatch) -> None:
    """Installs the spies that all commands share; `teacher` is loaded in place of the one that was typed."""
    parse_args, from_flags = argparse.ArgumentParser.parse_args, Teacher.from_flags.__func__

    def parse(parser, *args, **options):
        parsed = parse_args(parser, *args, **options)
        actions = [action for action in parser._actions if action.dest not in ("help", "version")]
        run.flags, run.parsed = {action.dest: action.default for action in actions}, dict(vars(parsed))
        return parsed

    def make_teacher(kind, flags):
        run.teacher = from_flags(kind, flags)
        return Teacher(teacher, cache_dir=run.teacher.cache_dir)

    def watch_loader(kind, name):
        original = getattr(kind, name).__func__

        def load(cls, source, *args, **options):
            run.loads.append((kind.__name__, str(source), options.get("cache_dir")))
            return original(cls, source, *args, **options)

        patch.setattr(kind, name, classmethod(load))

    load_lora, encode, tokenize = (
        StableDiffusionPipeline.load_lora_weights,
        AutoencoderKL.encode,
        CLIPTokenizer.__call__,
    )
    make_frozen = FrozenParts.__init__

    def watched_load_lora(pipeline, source, adapter_name=None, **options):
        run.loads.append(("LoRA", source, options.get("cache_dir")))
        run.loras[adapter_name] = source
        return load_lora(pipeline, source, adapter_name=adapter_name, **options)

    def watched_encode(vae, pixels, *args, **options):
        run.pixels.append(pixels)
        return encode(vae, pixels, *args, **options)

    def decode(vae, latents):
        """In place of the VAE's, which would take half of the time: a grey picture of the right size."""
        batch, _, height, width = latents.shape
        return SimpleNamespace(sample=torch.zeros(batch, 3, 4 * height, 4 * width))

    def watched_tokenize(tokenizer, texts, *args, **options):
        if options.get("truncation"):  # otherwise the tokens are only counted
            run.texts.append(texts)
        return tokenize(tokenizer, texts, *args, **options)

    def watched_frozen(frozen, *args, **options):
        make_frozen(frozen, *args, **options)
        run.frozen = frozen

    patch.setattr(argparse.ArgumentParser, "parse_args", parse)
    patch.setattr(Teacher, "from_flags", classmethod(make_teacher))
    for kind in (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTokenizer):
        watch_loader(kind, "from_pretrained")
    for kind in (UNet2DConditionModel, LCMScheduler):
        watch_loader(kind, "load_config")
    patch.setattr(StableDiffusionPipeline, "load_lora_weights", watched_load_lora)
    patch.setattr(AutoencoderKL, "encode", watched_encode)
    patch.setattr(AutoencoderKL, "decode", decode)
    patch.setattr(CLIPTokenizer, "__call__", watched_tokenize)
    patch.setattr(FrozenParts, "__init__", watched_frozen)
    for kind in (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline):
        patch.setattr(kind, "__call__", functools.partialmethod(_record_call, run))


def _record_call(
    pipeline,
    run,
    prompt,
    *,
    generator,
    num_inference_steps,
    guidance_scale,
    output_type,
    negative_prompt=None,
    latents=None,
    image=None,
    height=None,
    width=None,
    strength=None,
):
    """In place of a pipeline's call: records it, and returns the latents it was to start from."""
    weights = {
        run.loras[adapter]: round(layer.scaling[adapter] * layer.r[adapter] / layer.lora_alpha[adapter], 6)
        for layer in pipeline.unet.modules()
        if isinstance(layer, LoraLayer)
        for adapter in layer.active_adapters
        if adapter in layer.scaling
    }
    model = "teacher"
    if isinstance(pipeline.scheduler, LCMScheduler):
        guided = pipeline.unet.config.time_cond_proj_dim is not None
        model = "full" if guided else "lora" if weights else "LCM"
    run.calls.append(
        PipelineCall(
            model,
            type(pipeline.scheduler).__name__,
            prompt,
            [each.initial_seed() for each in generator],
            num_inference_steps,
            guidance_scale,
            None if negative_prompt is None else negative_prompt[0],
            weights,
            (height, width),
            strength,
        )
    )
    assert output_type == "latent" and len(generator) == len(prompt) == len(image if latents is None else latents)
    return SimpleNamespace(images=image if latents is None else latents)


class FakeClip:
    """In place of transformers' CLIP `source`: records where it is loaded, and which metric calls it."""

    def __init__(self, run: Run, source: str):
        self._run, self._source = run, source

    def to(self, device):
        self._run.add("clip devices", (self._source, torch.device(device)))
        return self

    def eval(self):
        return self

    def __call__(self, input_ids, pixel_values):
        self._run.add("clip calls", ("clip", self._source))
        ones = torch.ones(len(pixel_values), 4) / 2
        return SimpleNamespace(image_embeds=ones, text_embeds=ones)

    def vision_model(self, pixel_values):
        self._run.add("clip calls", ("cmmd", self._source))
        return SimpleNamespace(pooler_output=pixel_values)

    def visual_projection(self, hidden):
        return hidden


class FakeTokens(dict):
    def to(self, device):
        return self


def _fake_clips(run: Run, patch: pytest.MonkeyPatch) -> None:
    own = CLIPTokenizer.from_pretrained

    def make(result):
        def from_pretrained(source, cache_dir=None, **_):
            run.loads.append(("CLIP", source, cache_dir))
            return result(source)

        return from_pretrained

    def process(pictures, return_tensors):
        return SimpleNamespace(pixel_values=torch.stack([torch.tensor(p.getpixel((0, 0))).float() for p in pictures]))

    def tokenize(texts, **_):
        return FakeTokens(input_ids=texts)

    fake_tokenizer = make(lambda source: tokenize)
    processor = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    patch.setattr(transformers.CLIPModel, "from_pretrained", make(lambda source: FakeClip(run, source)))
    patch.setattr(getattr(transformers, processor), "from_pretrained", make(lambda source: process))
    patch.setattr(
        CLIPTokenizer,
        "from_pretrained",
        lambda source, **options: (fake_tokenizer if "clip" in source else own)(source, **options),
    )
    library = ModuleType("torch_fidelity")

    def calculate_metrics(input1, input2, **_):
        run.add("fid", (len(input1), [tuple(input2[i][:, 0, 0].tolist()) for i in range(len(input2))]))
        run.add("fid sizes", tuple(input2[0].shape[1:]))
        return {"frechet_inception_distance": 1.0}

    library.calculate_metrics = calculate_metrics
    patch.setitem(sys.modules, "torch_fidelity", library)


# -------------------------------------------------------------------------------------------------------- the runs


@dataclasses.dataclass
class World:
    """Where a run may write, and the toy models."""

    folder: Path
    teacher: str
    full: str
    lora: str
    style: str

    def run(self, command: str, typed: dict[str, Any], prepare: Callable[[Run, pytest.MonkeyPatch], None]) -> Run:
        """Runs the command with the flags of `typed`: True is a switch, what ends in a dot a positional argument."""
        argv: list[str] = []
        for name, value in typed.items():
            words = [] if value is True else [str(item) for item in value] if isinstance(value, list) else [str(value)]
            argv = [*words, *argv] if name.endswith(".") else [*argv, f"--{name}", *words]
        run = Run({name.removesuffix("."): value for name, value in typed.items()})
        with pytest.MonkeyPatch.context() as patch:
            _watch(run, self.teacher, patch)
            prepare(run, patch)
            COMMANDS[command].main(argv)
        return run

    def models(self) -> dict[str, Any]:
        return TEACHER_VALUES | {"cache_dir": str(self.folder / "cache")}


def _write_shard(path: Path, samples: dict[str, dict[str, bytes | str]]) -> str:
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for extension, content in files.items():
                content = content.encode() if isinstance(content, str) else content
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(path)


def _png(colour: tuple[int, int, int], size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def _nothing_more(run: Run, patch: pytest.MonkeyPatch) -> None:
    pass


def run_sample(world: World) -> dict[str, Run]:
    """The usual flags; then img2img in the sweep, with seeds by name."""
    prompts = world.folder / "prompts.txt"
    prompts.write_text(PROMPTS[1] + "\n")
    picture = world.folder / "picture.png"
    picture.write_bytes(_png((0, 0, 255), (50, 70)))
    usual = world.models() | DEVICE_VALUES | {
        "student": [world.full, world.lora],
        "lcm_lora_scale": 0.7,
        "lora": [f"{world.style}=0.4"],
        "prompts": [PROMPTS[0], prompts],
        "negative_prompt": "blurry",
        "num_images": 3,
        "seed": 11,
        "resolution": 32,
        "steps": [7, 2],
        "teacher_steps": [6],
        "guidance_scale": [4.5, 9.5],
        "lora_guidance_scale": [1.25, 1.75],
        "teacher_sampler": "DPM-Solver++",
        "batch_size": 5,
        "output_dir": str(world.folder / "sample"),
    }  # fmt: skip
    sweep = {
        "pretrained_teacher_model": "org/teacher",
        "student": [world.full],
        "prompts": [PROMPTS[0]],
        "width": 48,
        "height": 40,
        "seeds": [23, 19],
        "sweep": True,
        "init_image": str(picture),
        "strength": 0.45,
        "output_dir": str(world.folder / "sweep"),
    }
    runs = {"usual": usual, "sweep": sweep}
    return {name: world.run("sample", typed, _nothing_more) for name, typed in runs.items()}


def run_evaluate(world: World) -> dict[str, Run]:
    """All metrics but the default one; then captions of the real pictures in place of prompts."""
    samples = {f"{i}": {"png": _png(colour, (48, 40)), "txt": f"caption {i}"} for i, colour in enumerate(COLOURS)}
    real = _write_shard(world.folder / "real.tar", samples)
    usual = world.models() | DEVICE_VALUES | {
        "student": [world.full, world.lora],
        "prompts": PROMPTS,
        "real": real,
        "num_pictures": 5,
        "steps": [6, 9],
        "samplers": ["DPM-Solver++"],
        "reference_steps": 7,
        "guidance_scale": 4.5,
        "lora_guidance_scale": 1.25,
        "resolution": 32,
        "seed": 11,
        "metrics": ["clip", "cmmd", "fid"],
        "clip_model": "org/clip-of-the-score",
        "cmmd_model": "org/clip-of-cmmd",
        "output_dir": str(world.folder / "evaluate"),
        "shown": 3,
        "batch_size": 2,
    }  # fmt: skip
    captions = {
        "pretrained_teacher_model": "org/teacher",
        "real": real,
        "num_pictures": 4,
        "samplers": ["DDIM"],
        "steps": [1],
        "reference_steps": 2,
        "output_dir": str(world.folder / "captions"),
    }

    def prepare(run, patch):
        grid = evaluate.labelled_grid

        def watched_grid(rows, **options):
            run.add("shown", ([len(pictures) for _, pictures in rows], len(options["columns"])))
            return grid(rows, **options)

        patch.setattr(evaluate, "labelled_grid", watched_grid)
        _fake_clips(run, patch)

    runs = {"usual": usual, "captions": captions}
    return {name: world.run("evaluate", typed, prepare) for name, typed in runs.items()}


COLOURS = [(40 * i, 10 + i, 250 - 9 * i) for i in range(6)]


def run_bench_inference(world: World) -> dict[str, Run]:
    typed = world.models() | DEVICE_VALUES | {
        "student": [world.full, world.lora],
        "steps": 7,
        "teacher_steps": 9,
        "guidance_scale": 4.5,
        "lora_guidance_scale": 1.25,
        "batch_sizes": [2, 6],
        "resolution": 32,
        "prompt": PROMPTS[0],
        "repeats": 3,
        "warmup": 5,
        "compile": True,
        "output_dir": str(world.folder / "bench"),
    }  # fmt: skip

    def prepare(run, patch):
        patch.setattr(torch.nn.Module, "compile", lambda network, **_: run.add("compiled", type(network).__name__))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(world.folder))
        for name in ("CC", "CXX"):
            patch.setenv(name, sys.executable)  # a compiler is looked for, and not called

    return {"usual": world.run("bench_inference", typed, prepare)}


def run_export_model(world: World) -> dict[str, Run]:
    """A full student with all flags that it can have; then a LoRA that is fused."""
    usual = world.models() | {
        "student.": world.full,
        "single_file": str(world.folder / "one.safetensors"),
        "output_dir": str(world.folder / "pipeline"),
        "dtype": "bf16",
        "guidance_scale": 4.5,
    }
    fused = {
        "student.": world.lora,
        "fuse_lora": True,
        "single_file": str(world.folder / "fused.safetensors"),
        "pretrained_teacher_model": "org/teacher",
    }

    def prepare(run, patch):
        bake = export_model.bake_guidance
        patch.setattr(export_model, "bake_guidance", lambda unet, w: run.add("baked", w) or bake(unet, w))

    return {name: world.run("export_model", typed, prepare) for name, typed in {"usual": usual, "fused": fused}.items()}


def run_encode_shards(world: World) -> dict[str, Run]:
    """All flags; then crops at random, since with --center_crop nothing depends on --seed."""
    good = {"pwatermark": 0.39, "aesthetic": 5.51, "punsafe": 0.19}
    metas = {f"good{i}": good for i in range(4)}
    metas |= {"watermark": good | {"pwatermark": 0.41}, "ugly": good | {"aesthetic": 5.49}}
    metas |= {"unsafe": good | {"punsafe": 0.21}, "small": good}
    rng = np.random.default_rng(0)
    samples = {}
    for i, (key, meta) in enumerate(metas.items()):
        file = io.BytesIO()
        height = 35 if key == "small" else 40
        Image.fromarray(rng.integers(0, 256, (height, 60, 3), dtype=np.uint8)).save(file, "PNG")
        samples[key] = {"png": file.getvalue(), "txt": "wrong", "blip": f"right {i}", "json": json.dumps(meta)}
    (world.folder / "pictures").mkdir()
    _write_shard(world.folder / "pictures" / "cats.tar", samples)
    usual = world.models() | DEVICE_VALUES | {
        "out.": str(world.folder / "encoded"),
        "shards.": str(world.folder / "pictures"),
        "caption_column": "blip",
        "resolution": 32,
        "interpolation_type": "hamming",
        "center_crop": True,
        "random_flip": True,
        "min_image_size": 36,
        "max_decode_mb": 77,
        "allow_pipe_in_lists": True,
        "max_pwatermark": 0.4,
        "min_aesthetic": 5.5,
        "filter": ["punsafe<0.2"],
        "captions": True,
        "batch_size": 3,
        "num_workers": 5,
    }  # fmt: skip
    random_crops = {
        "out.": str(world.folder / "random"),
        "shards.": str(world.folder / "pictures"),
        "pretrained_teacher_model": "org/teacher",
        "resolution": 32,
        "seed": 17,
    }

    def prepare(run, patch):
        prepare_sample, pool = encode_shards.prepare_sample, encode_shards.ThreadPoolExecutor
        resize, sequence = Image.Image.resize, np.random.SeedSequence

        def watched_prepare(raw, preparation, **options):
            run.add("preparations", preparation)
            return prepare_sample(raw, preparation, **options)

        def watched_pool(max_workers):
            run.add("workers", max_workers)
            return pool(max_workers)

        expand = encode_shards.expand_shards

        def watched_expand(*arguments):
            run.add("expanded", arguments)
            return expand(*arguments)

        def watched_resize(picture, size, resample=None, *args, **options):
            run.add("resized", (tuple(size), resample))
            return resize(picture, size, resample, *args, **options)

        def watched_sequence(entropy=None, **options):
            run.add("seeds", entropy[0])
            return sequence(entropy, **options)

        patch.setattr(encode_shards, "prepare_sample", watched_prepare)
        patch.setattr(encode_shards, "ThreadPoolExecutor", watched_pool)
        patch.setattr(encode_shards, "expand_shards", watched_expand)
        patch.setattr(Image.Image, "resize", watched_resize)
        patch.setattr(np.random, "SeedSequence", watched_sequence)

    runs = {"usual": usual, "random": random_crops}
    return {name: world.run("encode_shards", typed, prepare) for name, typed in runs.items()}


def run_pack_shards(world: World) -> dict[str, Run]:
    """All flags but the size of shards in bytes; then that alone."""
    images, heavy = world.folder / "images", world.folder / "heavy"
    rows = []
    for folder, count in ((images, 10), (heavy, 3)):
        folder.mkdir()
        for i in range(count):
            content = _png(COLOURS[i % 6], (30, 24) if i else (12, 14))
            (folder / f"{i}.png").write_bytes(content + bytes(700_000) * (folder == heavy))
            rows.append({"file_name": f"{i}.png", "text": "wrong", "blip": f"right {i}"})
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = []
    usual = {
        "out.": str(world.folder / "packed"),
        "images.": str(images),
        "caption_column": "blip",
        "max_size": 20,
        "samples_per_shard": 4,
        "seed": 5,
        "num_workers": 2,
    }
    by_bytes = {"out.": str(world.folder / "by_bytes"), "images.": str(heavy), "max_shard_mb": 1}

    def prepare(run, patch):
        pool = packing.ProcessPoolExecutor

        def watched_pool(max_workers, *args):
            run.add("workers", max_workers)
            return pool(max_workers, *args)

        patch.setattr(packing, "ProcessPoolExecutor", watched_pool)
        patch.setattr(packing, "usable_cores", lambda: 64)

    runs = {"usual": usual, "by bytes": by_bytes}
    return {name: world.run("pack_shards", typed, prepare) for name, typed in runs.items()}


def run_report(world: World) -> dict[str, Run]:
    folder = world.folder / "finished run"
    folder.mkdir()
    (folder / "training.jsonl").write_text(json.dumps({"step": 10, "time": 0.0, "loss": 2.0}) + "\n")
    return {"usual": world.run("report", {"output_dir.": str(folder)}, _nothing_more)}


# ------------------------------------------------------------------------------------------------------- the tables


Runs = dict[str, Run]
Check = Callable[[Run, Runs], tuple[Any, Any]]  # the usual run, all runs: what is found, what is expected

DTYPES = {"bf16": torch.bfloat16}


def teacher_checks(**more: Check) -> dict[str, Check]:
    fields = {
        "pretrained_teacher_model": "model",
        "teacher_config": "config",
        "pretrained_vae_model_name_or_path": "vae",
        "teacher_revision": "revision",
        "revision": "vae_revision",
        "variant": "variant",
    }

    def check(flag: str) -> Check:
        return lambda run, runs: (getattr(run.teacher, fields[flag]), run.typed[flag])

    checks = {flag: check(flag) for flag in fields}
    checks["cache_dir"] = lambda run, runs: (
        {run.teacher.cache_dir} | {cache_dir for *_, cache_dir in run.loads},
        {run.typed["cache_dir"]},
    )
    checks["device"] = lambda run, runs: (str(run.frozen.device), run.typed["device"])
    checks["dtype"] = lambda run, runs: (
        {run.frozen.dtypes["vae"], run.frozen.dtypes["text_encoder"]},
        {DTYPES[run.typed["dtype"]]},
    )
    return checks | more


def sizes(calls: list[PipelineCall]) -> list[int]:
    return [len(call.prompts) for call in calls]


def unet_dtype(run: Run, runs: Runs) -> tuple[Any, Any]:
    return set(run.frozen.dtypes.values()), {DTYPES[run.typed["dtype"]]}


def students_loaded(run: Run, runs: Runs) -> tuple[Any, Any]:
    """Each from its own folder, with the scheduler that was saved there."""
    full, lora = run.typed["student"]
    loaded = {"UNet2DConditionModel": full, "LoRA": lora}
    missing = {source for kind, source in loaded.items() if source not in run.sources(kind)}
    return (missing, {full, lora} - run.sources("LCMScheduler")), (set(), set())


def listed(run: Run, name: str, **chosen: Any) -> list[Any]:
    """The distinct values of a setting in samples.json."""
    found = [one[name] for one in run.written("samples.json") if chosen.items() <= one.items()]
    return list(dict.fromkeys(found))


def size_written(run: Run, side: int) -> tuple[int, set[int], list[int]]:
    """A side (0: the width) of what the VAE encoded, of the pictures, and as it is written down."""
    written = {Image.open(path).size[side] for path in (run.out / "pictures").iterdir()}
    return run.pixels[0].shape[3 - side], written, listed(run, ("width", "height")[side])


SAMPLE = teacher_checks(
    pretrained_teacher_model=lambda run, runs: (
        (run.teacher.model, listed(run, "source", model="teacher")),
        (run.typed["pretrained_teacher_model"], [run.typed["pretrained_teacher_model"]]),
    ),
    dtype=unet_dtype,
    student=students_loaded,
    lcm_lora_scale=lambda run, runs: (
        {call.model: call.loras.get(run.typed["student"][1]) for call in run.calls},
        {"teacher": None, "full": None, "lora": run.typed["lcm_lora_scale"]},
    ),
    lora=lambda run, runs: (
        {call.model: call.loras.get(run.typed["lora"][0].removesuffix("=0.4")) for call in run.calls},
        {"teacher": 0.4, "full": 0.4, "lora": 0.4},
    ),
    prompts=lambda run, runs: (list(dict.fromkeys(p for call in run.calls for p in call.prompts)), PROMPTS[:2]),
    negative_prompt=lambda run, runs: (
        {call.model: call.negative_prompt for call in run.calls},
        {"teacher": run.typed["negative_prompt"], "full": None, "lora": run.typed["negative_prompt"]},
    ),
    num_images=lambda run, runs: (sum(sizes(run.calls[:2])), len(PROMPTS[:2]) * run.typed["num_images"]),
    seed=lambda run, runs: (run.calls[0].seeds + run.calls[1].seeds, [11, 12, 13] * 2),
    seeds=lambda run, runs: (runs["sweep"].values("seeds"), [runs["sweep"].typed["seeds"]]),
    resolution=lambda run, runs: (
        (run.values("size"), {Image.open(path).size for path in (run.out / "pictures").iterdir()}),
        ([(32, 32)], {(32, 32)}),
    ),
    init_image=lambda run, runs: (
        [(tuple(batch.shape), batch.mean((0, 2, 3)).round().tolist()) for batch in runs["sweep"].pixels],
        [((1, 3, 40, 48), [-1, -1, 1])] * len(runs["sweep"].calls),
    ),
    width=lambda run, runs: (size_written(runs["sweep"], 0), (48, {48}, [48])),
    height=lambda run, runs: (size_written(runs["sweep"], 1), (40, {40}, [40])),
    strength=lambda run, runs: (runs["sweep"].values("strength"), [runs["sweep"].typed["strength"]]),
    steps=lambda run, runs: ([run.values("steps", model) for model in ("full", "lora")], [[7, 2], [7, 2]]),
    teacher_steps=lambda run, runs: (run.values("steps", "teacher"), run.typed["teacher_steps"]),
    sweep=lambda run, runs: (
        {model: [int(steps * 0.45) for steps in runs["sweep"].values("steps", model)] for model in ("teacher", "full")},
        {"teacher": [1, 4, 8, 15, 20, 25, 30, 50], "full": [1, 2, 3, 4, 5, 6, 7, 8]},
    ),
    guidance_scale=lambda run, runs: (
        {model: run.values("guidance_scale", model) for model in ("teacher", "full")},
        {"teacher": [4.5, 9.5], "full": [4.5, 9.5]},
    ),
    lora_guidance_scale=lambda run, runs: (run.values("guidance_scale", "lora"), [1.25, 1.75]),
    teacher_sampler=lambda run, runs: (
        (run.values("sampler", "teacher"), listed(run, "sampler", model="teacher")),
        (["DPMSolverMultistepScheduler"], ["DPM-Solver++"]),
    ),
    batch_size=lambda run, runs: (sizes(run.calls), [5, 1] * (len(run.calls) // 2)),
    output_dir=lambda run, runs: (
        {path.name for path in Path(run.typed["output_dir"]).iterdir()},
        {"grid.png", "samples.json", "pictures"},
    ),
)  # fmt: skip


def rows_of_evaluate(run: Run) -> list[list[PipelineCall]]:
    """The calls by row: the reference, DPM-Solver++, the control, the students, each in 6 and 9 steps."""
    return [run.calls[first : first + 3] for first in range(0, len(run.calls), 3)]


EVALUATE = teacher_checks(
    pretrained_teacher_model=lambda run, runs: (
        (run.teacher.model, run.written("evaluation.json")["settings"]["teacher"]),
        (run.typed["pretrained_teacher_model"],) * 2,
    ),
    device=lambda run, runs: (
        {run.frozen.device} | {device for _, device in run.more["clip devices"]},
        {torch.device(run.typed["device"])},
    ),
    dtype=unet_dtype,
    student=students_loaded,
    prompts=lambda run, runs: (
        [[prompt for call in row for prompt in call.prompts] for row in rows_of_evaluate(run)],
        [PROMPTS + PROMPTS[:2]] * 9,
    ),
    real=lambda run, runs: (
        ({tuple(reference) for _, reference in run.more["fid"]}, runs["captions"].values("prompts")),
        ({tuple(COLOURS[:5])}, [[f"caption {i}" for i in range(4)]]),
    ),
    num_pictures=lambda run, runs: (
        ({sum(sizes(row)) for row in rows_of_evaluate(run)}, {(n, len(of)) for n, of in run.more["fid"]}),
        ({5}, {(5, 5)}),
    ),
    steps=lambda run, runs: ([row[0].steps for row in rows_of_evaluate(run)][1:], [6, 9] * 4),
    samplers=lambda run, runs: (
        [row[0].sampler for row in rows_of_evaluate(run)],
        ["DDIMScheduler"] + ["DPMSolverMultistepScheduler"] * 2 + ["LCMScheduler"] * 6,
    ),
    reference_steps=lambda run, runs: (
        ([row[0].steps for row in rows_of_evaluate(run)][:1], run.written("evaluation.json")["rows"][0]["steps"]),
        ([run.typed["reference_steps"]], run.typed["reference_steps"]),
    ),
    guidance_scale=lambda run, runs: (
        {model: run.values("guidance_scale", model) for model in ("teacher", "LCM", "full")},
        {"teacher": [4.5], "LCM": [4.5], "full": [4.5]},
    ),
    lora_guidance_scale=lambda run, runs: (run.values("guidance_scale", "lora"), [run.typed["lora_guidance_scale"]]),
    resolution=lambda run, runs: ((run.values("size"), set(run.more["fid sizes"])), ([(32, 32)], {(32, 32)})),
    seed=lambda run, runs: (
        [[seed for call in row for seed in call.seeds] for row in rows_of_evaluate(run)],
        [[11, 12, 13, 14, 15]] * 9,
    ),
    metrics=lambda run, runs: (
        [set(row["values"]) for row in run.written("evaluation.json")["rows"]],
        [{"clip_score", "cmmd", "fid"}] * 9,
    ),
    clip_model=lambda run, runs: (
        {source for metric, source in run.more["clip calls"] if metric == "clip"},
        {run.typed["clip_model"]},
    ),
    cmmd_model=lambda run, runs: (
        {source for metric, source in run.more["clip calls"] if metric == "cmmd"},
        {run.typed["cmmd_model"]},
    ),
    output_dir=lambda run, runs: (
        {path.name for path in Path(run.typed["output_dir"]).iterdir()},
        {"evaluation.md", "evaluation.json", "evaluation.png"},
    ),
    shown=lambda run, runs: (run.more["shown"], [([run.typed["shown"]] * 9, run.typed["shown"])]),
    batch_size=lambda run, runs: (sizes(run.calls), [2, 2, 1] * 9),
)  # fmt: skip


BENCH_INFERENCE = teacher_checks(
    dtype=unet_dtype,
    student=students_loaded,
    steps=lambda run, runs: ([run.values("steps", model) for model in ("full", "LCM")], [[7], [7]]),
    teacher_steps=lambda run, runs: (run.values("steps", "teacher"), [run.typed["teacher_steps"]]),
    guidance_scale=lambda run, runs: (
        {model: run.values("guidance_scale", model) for model in ("teacher", "full")},
        {"teacher": [4.5], "full": [4.5]},
    ),
    lora_guidance_scale=lambda run, runs: (run.values("guidance_scale", "LCM"), [run.typed["lora_guidance_scale"]]),
    batch_sizes=lambda run, runs: (
        (sizes(run.calls), sorted({row["batch_size"] for row in run.written("bench_inference.json")["results"]})),
        (run.typed["batch_sizes"] * (len(run.calls) // 2), run.typed["batch_sizes"]),
    ),
    resolution=lambda run, runs: (run.values("size"), [(32, 32)]),
    prompt=lambda run, runs: ({prompt for call in run.calls for prompt in call.prompts}, {run.typed["prompt"]}),
    repeats=lambda run, runs: (
        {len(row["seconds"]) for row in run.written("bench_inference.json")["results"]},
        {run.typed["repeats"]},
    ),
    warmup=lambda run, runs: (  # the rounds of three models at two batch sizes that do not count
        len(run.calls) // 6 - len(run.written("bench_inference.json")["results"][0]["seconds"]),
        run.typed["warmup"],
    ),
    compile=lambda run, runs: (run.more["compiled"], ["UNet2DConditionModel"] * 3),
    output_dir=lambda run, runs: (
        {path.name for path in Path(run.typed["output_dir"]).iterdir()},
        {"bench_inference.md", "bench_inference.json"},
    ),
)  # fmt: skip


def exported_dtypes(run: Run) -> set[torch.dtype]:
    """Those of the floats in the single file, and in the pipeline's U-Net if there is one."""
    files = [Path(run.typed["single_file"]), *Path(run.typed.get("output_dir", "none"), "unet").glob("*.safetensors")]
    return {tensor.dtype for file in files for tensor in load_file(file).values() if tensor.is_floating_point()}


EXPORT_MODEL = {name: check for name, check in teacher_checks().items() if name != "device"} | {
    "student": lambda run, runs: (
        {run.typed["student"] in run.sources("UNet2DConditionModel"), "LoRA" in {kind for kind, *_ in run.loads}},
        {True, False},
    ),
    "single_file": lambda run, runs: (
        [read_metadata(Path(of.typed["single_file"]))["modelspec.title"] for of in (run, runs["fused"])],
        ["one", "fused"],
    ),
    "output_dir": lambda run, runs: (
        {name for name in ("model_index.json", "README.md") if (Path(run.typed["output_dir"]) / name).is_file()},
        {"model_index.json", "README.md"},
    ),
    "dtype": lambda run, runs: (
        [exported_dtypes(of) for of in (run, runs["fused"])],
        [{torch.bfloat16}, {torch.float16}],
    ),
    "guidance_scale": lambda run, runs: ((run.more["baked"], runs["fused"].more.get("baked")), ([3.5], None)),
    "fuse_lora": lambda run, runs: (runs["fused"].sources("LoRA"), {runs["fused"].typed["student"]}),
}


def files_of(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def encoded(run: Run) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of each sample of the encoded shard."""
    files = files_of(run.out / "cats.tar")
    ending = ".latents.safetensors"
    return {name.removesuffix(ending): load_arrays(files[name]) for name in files if name.endswith(ending)}


def header(run: Run) -> Any:
    return read_encoding(str(run.out / "cats.tar"))


def left_out(run: Run, flag: str) -> list[str]:
    """The samples that were left out for a flag, named with its value."""
    dropped = json.loads(files_of(run.out / "cats.tar")[".dropped.json"])
    return [name for reason, names in dropped.items() if reason.endswith(flag) for name in names]


def crops(run: Run) -> list[list[int]]:
    return [arrays["sizes"][1].tolist() for arrays in encoded(run).values()]


GOOD = [f"good{i}" for i in range(4)]
ENCODE_SHARDS = teacher_checks(
    shards=lambda run, runs: (list(encoded(run)), GOOD),
    out=lambda run, runs: ({path.name for path in Path(run.typed["out"]).iterdir()}, {"cats.tar"}),
    caption_column=lambda run, runs: (
        (run.texts, header(run).caption_column),
        ([[""], ["right 0", "right 1", "right 2"], ["right 3"]], run.typed["caption_column"]),
    ),
    resolution=lambda run, runs: (
        ({tuple(batch.shape[2:]) for batch in run.pixels}, header(run).resolution),
        ({(32, 32)}, run.typed["resolution"]),
    ),
    interpolation_type=lambda run, runs: (
        ({filter for size, filter in run.more["resized"] if size == (32, 32)}, header(run).interpolation),
        ({Image.Resampling.HAMMING}, run.typed["interpolation_type"]),
    ),
    center_crop=lambda run, runs: (
        (crops(run), header(run).center_crop, crops(runs["random"]) == crops(run)),
        ([[0, 8]] * 4, True, False),  # of 32 x 48 pixels
    ),
    random_flip=lambda run, runs: (
        (
            [torch.equal(run.pixels[i + 1], run.pixels[i].flip(-1)) for i in (0, 2)],
            {"mirrored_moments" in arrays for arrays in encoded(run).values()},
            {"mirrored_moments" in arrays for arrays in encoded(runs["random"]).values()},
        ),
        ([True, True], {True}, {False}),
    ),
    min_image_size=lambda run, runs: (left_out(run, "--min_image_size 36"), ["small"]),
    max_decode_mb=lambda run, runs: ({prepared.max_decode_mb for prepared in run.more["preparations"]}, {77}),
    allow_pipe_in_lists=lambda run, runs: (run.more["expanded"], [(run.typed["shards"], True)]),
    max_pwatermark=lambda run, runs: (left_out(run, "--max_pwatermark 0.4"), ["watermark"]),
    min_aesthetic=lambda run, runs: (left_out(run, "--min_aesthetic 5.5"), ["ugly"]),
    filter=lambda run, runs: (left_out(run, "--filter 'punsafe<0.2'"), ["unsafe"]),
    captions=lambda run, runs: (
        [{"encoder_hidden_states" in arrays for arrays in encoded(of).values()} for of in (run, runs["random"])],
        [{True}, {False}],
    ),
    seed=lambda run, runs: (
        (set(runs["random"].more["seeds"]), header(runs["random"]).seed),
        ({runs["random"].typed["seed"]}, runs["random"].typed["seed"]),
    ),
    batch_size=lambda run, runs: (
        ([len(batch) for batch in run.pixels], [len(batch) for batch in run.texts]),
        ([3, 3, 1, 1], [1, 3, 1]),
    ),
    num_workers=lambda run, runs: (run.more["workers"], [run.typed["num_workers"]]),
    dtype=lambda run, runs: (
        (run.frozen.dtypes["vae"], run.frozen.dtypes["text_encoder"], header(run).vae_dtype, header(run).text_dtype),
        (torch.bfloat16, torch.bfloat16, "bfloat16", "bfloat16"),
    ),
)  # fmt: skip


def packed(run: Run) -> list[list[dict[str, Any]]]:
    """The samples of each shard: their JSON, with the caption and the size of the picture."""
    shards = []
    for path in sorted(run.out.glob("*.tar")):
        samples: dict[str, dict] = {}
        for name, content in files_of(path).items():
            key, _, extension = name.partition(".")
            values = samples.setdefault(key, {})
            if extension == "json":
                values.update(json.loads(content))
            elif extension == "txt":
                values["caption"] = content.decode()
            else:
                values["size"] = Image.open(io.BytesIO(content)).size
        shards.append(list(samples.values()))
    return shards


def all_packed(run: Run, name: str) -> list[Any]:
    return [one[name] for shard in packed(run) for one in shard]


def shuffled(names: list[str], seed: int) -> list[str]:
    random.Random(seed).shuffle(names)
    return names


PACK_SHARDS: dict[str, Check] = {
    "images": lambda run, runs: (sorted(all_packed(run, "file_name")), [f"{i}.png" for i in range(10)]),
    "out": lambda run, runs: (
        sorted(path.name for path in Path(run.typed["out"]).iterdir()),
        ["00000.tar", "00001.tar", "00002.tar", "manifest.jsonl"],
    ),
    "caption_column": lambda run, runs: (
        {one["file_name"]: one["caption"] for shard in packed(run) for one in shard},
        {f"{i}.png": f"right {i}" for i in range(10)},
    ),
    "max_size": lambda run, runs: (
        {one["file_name"]: one["size"] for shard in packed(run) for one in shard},
        {"0.png": (12, 14)} | {f"{i}.png": (25, 20) for i in range(1, 10)},
    ),
    "samples_per_shard": lambda run, runs: ([len(shard) for shard in packed(run)], [3, 3, 4]),
    "max_shard_mb": lambda run, runs: ([len(shard) for shard in packed(runs["by bytes"])], [1, 1, 1]),
    "seed": lambda run, runs: (all_packed(run, "file_name"), shuffled([f"{i}.png" for i in range(10)], 5)),
    "num_workers": lambda run, runs: (run.more["workers"], [run.typed["num_workers"]]),
}

REPORT: dict[str, Check] = {
    "output_dir": lambda run, runs: (
        {path.name for path in Path(run.typed["output_dir"]).iterdir()},
        {"training.jsonl", "report.html"},
    )
}

TABLES: dict[str, tuple[Callable[[World], Runs], dict[str, Check]]] = {
    "sample": (run_sample, SAMPLE),
    "evaluate": (run_evaluate, EVALUATE),
    "bench_inference": (run_bench_inference, BENCH_INFERENCE),
    "encode_shards": (run_encode_shards, ENCODE_SHARDS),
    "export_model": (run_export_model, EXPORT_MODEL),
    "pack_shards": (run_pack_shards, PACK_SHARDS),
    "report": (run_report, REPORT),
}


# -------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory, teacher, finished) -> Callable[[str], Runs]:
    """The runs of a command, which are made once; an error in them is the error of each test."""
    made: dict[str, Runs | str] = {}

    def get(command: str) -> Runs:
        if command not in made:
            students = [finished(kind, "sd") for kind in ("full", "lora", "style")]
            world = World(tmp_path_factory.mktemp(command), teacher, *students)
            try:
                made[command] = TABLES[command][0](world)
            except (Exception, SystemExit):
                made[command] = traceback.format_exc()
        runs = made[command]
        if isinstance(runs, str):
            pytest.fail(f"{command} failed:\n{runs}", pytrace=False)
        return runs

    return get


@pytest.mark.parametrize(
    ("command", "flag"), [(command, flag) for command, (_, table) in TABLES.items() for flag in table]
)
def test_a_flag_acts(command, flag, runs_of):
    runs = runs_of(command)
    found, expected = TABLES[command][1][flag](runs["usual"], runs)
    assert found == expected


@pytest.mark.parametrize("command", TABLES)
def test_every_flag_is_in_the_table(command, runs_of):
    assert set(TABLES[command][1]) == set(runs_of(command)["usual"].flags)


@pytest.mark.parametrize("command", TABLES)
def test_the_values_are_distinct_and_not_the_defaults(command, runs_of):
    """Else a swapped pair, or a flag that is ignored, would not be noticed."""
    runs, other = runs_of(command), set()
    for run in runs.values():
        seen: list[Any] = []
        for name, value in run.parsed.items():
            if name not in run.typed:
                continue
            if value != run.flags[name]:
                other.add(name)
            if not isinstance(value, bool):
                seen += value if isinstance(value, list) else [value]
        if run is runs["usual"]:
            assert len(seen) == len(set(seen)), seen
    assert other == set(TABLES[command][1])


def test_every_command_has_a_table():
    folder = Path(sample.__file__).parent
    found = {path.stem for path in folder.glob("*.py") if "run_program(main" in path.read_text(encoding="utf-8")}
    assert found == set(TABLES)
