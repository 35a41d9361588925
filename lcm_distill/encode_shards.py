"""Encode pictures once and train on their latents: training then neither runs the VAE nor decodes pictures.

    python -m lcm_distill.encode_shards "data/{00000..00099}.tar" encoded \\
        --pretrained_teacher_model stable-diffusion-v1-5/stable-diffusion-v1-5 --resolution 512 --captions
    torchrun --nproc_per_node 8 -m lcm_distill.encode_shards ...              # a process for each GPU

IN is anything that --train_shards_path_or_url takes. For each shard of IN, a shard of the same name is written to OUT,
with the same samples in the same order, their captions and their JSON. In place of each picture it holds the
distribution of its latents (mean and standard deviation, float16), from which each training step samples, as it does
when training on pictures. The training programs take OUT as --train_shards_path_or_url, with the same teacher, VAE and
--resolution, and refuse it with others.

What training on pictures draws anew in each epoch is fixed here: each sample has one crop, drawn from (--seed, shard,
sample), or the middle with --center_crop. With --random_flip the mirrored pictures are encoded too, and training with
--random_flip draws one of the two. --captions encodes the captions as well: training then needs no text encoders
either. A picture takes 66 kB at 512 pixels, 262 kB at 1024; a caption 118 kB for Stable Diffusion 1.x, 318 kB for SDXL.

Samples that training would leave out (bad or filtered ones) are left out here, and listed in a file .dropped.json at
the end of their shard. A shard gets its name only when it is complete: after a kill the same command continues with the
others. Started by torchrun (RANK, WORLD_SIZE), each process takes every WORLD_SIZE-th shard; the processes need not
start or end together. The same pictures, flags and device give the same bytes.
"""

import argparse

from lcm_distill import flags
from lcm_distill.errors import UsageError, run_program, shown
from lcm_distill.flags import SHARDS_FLAG, VAE_FLAG


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags.CommandParser(
        "python -m lcm_distill.encode_shards",
        __doc__,
        "%(prog)s IN OUT --pretrained_teacher_model TEACHER --resolution PIXELS [flags]",
    )
    parser.add_argument(
        "shards", metavar="IN", help=f"shards of pictures: a folder, a pattern, a URL, as {flags.SHARDS_FLAG} takes"
    )
    parser.add_argument(
        "out",
        type=flags.path,
        metavar="OUT",
        help="folder for the encoded shards: new, empty, or from an earlier run to continue",
    )
    flags.add_group(parser, flags.TeacherFlags)
    flags.add_group(parser, flags.PreparationFlags)
    group = parser.add_argument_group("encoding")
    group.add_argument(
        "--captions", action=argparse.BooleanOptionalAction, default=False, help="encode the captions as well"
    )
    group.add_argument(
        "--allow_pipe_in_lists", action="store_true", help="run the commands (pipe:COMMAND) in a .txt file of shards"
    )
    group.add_argument("--seed", type=flags.count, default=0, help="seed of the random crops")
    group.add_argument("--batch_size", type=flags.positive_int, default=8, help="pictures encoded at once")
    group.add_argument("--num_workers", type=flags.positive_int, default=4, help="threads that decode pictures")
    flags.add_group(parser, flags.EncodingDeviceFlags)
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # answers --help and mistyped flags here, before the imports below, which take seconds

import contextlib
import functools
import glob
import hashlib
import json
import os
import re
import shlex
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from lcm_distill.bars import Bar, progress_bar
from lcm_distill.data.captions import read_captions, read_json
from lcm_distill.data.encoded import Encoding, read_encoding
from lcm_distill.data.preflight import inspect_shards
from lcm_distill.data.preparation import Preparation, Sample, prepare_sample
from lcm_distill.data.raw import (
    DOTTED_NAME,
    DUPLICATE_NAME,
    LATENTS_EXTENSION,
    PICTURE_EXTENSIONS,
    UNREADABLE_SHARD,
    BadSample,
    RawSample,
    list_counts,
    printable,
)
from lcm_distill.data.shards import count_samples, expand_shards, read_shard
from lcm_distill.data.sources import local_path
from lcm_distill.data.tar import RESUME_HINT, TarWriter, atomic_tar, new_folder, remove_partials
from lcm_distill.environment import choose_device, quiet_libraries
from lcm_distill.models.families import Family, family_of
from lcm_distill.models.teacher import Teacher, read_configs
from lcm_distill.models.vae import encode_moments, moments_shape, scale_and_shift
from lcm_distill.redaction import hide_in_command_line

DROPPED = ".dropped.json"  # the last file of a shard: reason to the names of the samples that were left out

# The base name of a tar in a path, URL or command.
_TAR_NAME = re.compile(r"([^/\\\s'\"?=&.][^/\\\s'\"?=&]*?)\.(?:tar|tgz)(?![^\W_])")


@dataclass
class EncodeResult:
    """What one process wrote."""

    shards: int = 0
    already_encoded: int = 0  # shards that an earlier run encoded
    samples: int = 0
    bytes: int = 0
    dropped: Counter = field(default_factory=Counter)
    not_compared: Counter = field(default_factory=Counter)  # filters that could not compare a sample's value, and why


@dataclass(frozen=True)
class Encoder:
    """The networks and the settings that encode a shard."""

    encoding: Encoding
    preparation: Preparation
    frozen: Any  # a family's `Frozen`
    family: Family
    batch_size: int
    num_workers: int


def output_names(shards: list[str]) -> list[str]:
    """The names of the encoded shards: those of the shards, always with .tar, or numbers for shards without a name.

    `UsageError` if two shards have the same name.
    """
    names = []
    for number, shard in enumerate(shards):
        found = _TAR_NAME.findall(shard)
        names.append(f"{found[-1] if found else f'{number:05d}'}.tar")
    if duplicates := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"IN: several shards are called {duplicates[0]}; encode them into separate folders.")
    return names


def encode_shards(
    shards: list[str],
    out: str | os.PathLike,
    *,
    teacher: Teacher,
    preparation: Preparation,
    captions: bool = False,
    seed: int = 0,
    batch_size: int = 8,
    num_workers: int = 4,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    world_size: int = 1,
) -> EncodeResult:
    """Encodes every `world_size`-th shard, starting with number `rank`, unless it is in `out` already.

    See the module's docstring.

    Args:
        shards: of pictures, as returned by `expand_shards`.
        preparation: as for training on the pictures.
        captions: encode the captions, too.
        seed: of the random crops.
        batch_size: pictures that are encoded at once.
        num_workers: threads that decode pictures.
        dtype: of the networks; SDXL's VAE stays in float32 unless its config marks half precision as safe.
        rank, world_size: of this process among those that encode the same shards.

    Raises:
        UsageError: two shards of the same name; an `out` that contains anything but shards of this encoding; a teacher
            or shards that cannot be used; latents that overflow float16; a failure on the way (a full disk), after
            which completed shards stay.
    """
    out, result = Path(out), EncodeResult()
    names = output_names(shards)
    family = family_of(teacher.read_config(UNet2DConditionModel, "unet"))
    configs = read_configs(teacher, family=family.NAME, resolution=preparation.resolution, num_ddim_timesteps=1)
    frozen = family.Frozen(teacher, device=device, dtype=dtype)
    encoding = Encoding(
        vae=teacher.fingerprint("vae", AutoencoderKL),
        **scale_and_shift(configs.vae),
        vae_dtype=str(frozen.dtypes["vae"]).removeprefix("torch."),
        moments=moments_shape(configs.vae, preparation.resolution),
        resolution=preparation.resolution,
        interpolation=preparation.interpolation,
        center_crop=preparation.center_crop,
        random_flip=preparation.random_flip,
        caption_column=preparation.caption_column,
        seed=seed,
        filters=_filter_flags(preparation),
        text=family.text_fingerprint(teacher) if captions else None,
        text_dtype=str(dtype).removeprefix("torch.") if captions else None,
        vae_name=_public_name(teacher.vae or teacher.model),
        text_name=_public_name(teacher.model) if captions else "",
    )
    try:
        with new_folder(out):
            encoded = _find_encoded(out, encoding)
            own = list(zip(shards, names, strict=True))[rank::world_size]
            todo = [(shard, out / name) for shard, name in own if name not in encoded]
            result.already_encoded = len(own) - len(todo)
            if not todo:
                return result
            count_tokens = functools.partial(family.count_tokens, teacher) if captions else None
            report = inspect_shards(shards, preparation, count_tokens=count_tokens)
            if report.preparation.encoding is not None:
                raise UsageError(
                    f"IN contains encoded shards ({report.preparation.encoding}); give shards of pictures."
                )
            if rank == 0:
                print(report, file=sys.stderr)
            if captions:
                empty = _embeddings(family.encode_captions(frozen, [""]))
                first = {name: tensor[0].cpu().numpy() for name, tensor in empty.items()}
                shapes = {name: array.shape for name, array in first.items()}
                encoding = replace(encoding, embeddings=shapes, empty_caption=first)
            encoder = Encoder(encoding, preparation, frozen, family, batch_size, num_workers)
            estimate = _Estimate([shard for shard, _ in todo], preparation.caption_column)
            with progress_bar("encoding", unit="picture", total=estimate.total, position=rank) as bar:
                for shard, path in todo:
                    if living := remove_partials(out, f"{glob.escape(path.name)}.*"):
                        raise UsageError(
                            f"OUT {out} is in use: another process is writing {living.name}. Give another folder, or "
                            "wait until it has ended."
                        )
                    with atomic_tar(path) as tar:
                        samples, dropped = _encode_shard(shard, path.name, encoder, tar, bar, result.not_compared)
                    bar.total = estimate.after_shard(bar.n)
                    result.shards += 1
                    result.samples += samples
                    result.bytes += tar.size
                    result.dropped.update({reason: len(keys) for reason, keys in dropped.items()})
    except OSError as error:
        raise UsageError(f"OUT {out}: {error.strerror or error}. {RESUME_HINT} once that is fixed") from None
    return result


class _Estimate:
    """How many samples the shards have: exactly for one on a disk, of several by the share that is done.

    Shards count by their sizes, or, where these are not known, as equal: to count all samples, all would be read.
    """

    def __init__(self, shards: list[str], caption_column: str | None):
        paths = [local_path(shard) for shard in shards]
        sizes = [os.path.getsize(path) if path and os.path.isfile(path) else 0 for path in paths]
        self._weights = sizes if all(sizes) else [1] * len(shards)
        self._done = 0
        first = count_samples(shards[:1], caption_column=caption_column) if sizes[0] else None
        self.total = round(first * sum(self._weights) / self._weights[0]) if first else None

    def after_shard(self, samples: int) -> int:
        """The total after another shard, with which `samples` have been encoded."""
        self._done += 1
        return round(samples * sum(self._weights) / sum(self._weights[: self._done]))


def _public_name(model: str) -> str:
    """A model's Hub id, or the last part of its path: shards may be published."""
    return Path(model).resolve().name if Path(model).exists() else model


def _filter_flags(preparation: Preparation) -> tuple[str, ...]:
    """The filters of a preparation, as flags."""
    size = preparation.min_image_size
    return (*[f"--min_image_size {size}"] * bool(size), *(condition.flag for condition in preparation.filters))


def _find_encoded(out: Path, encoding: Encoding) -> set[str]:
    """The names of the shards in `out`; `UsageError` if it contains anything but shards of this encoding."""
    found = set()
    for path in sorted(out.iterdir()):
        if path.name.startswith("."):
            continue
        earlier = None
        with contextlib.suppress(Exception):  # not a tar
            earlier = read_encoding(str(path)) if path.is_file() else None  # a pipe would block
        if earlier is None:
            raise UsageError(f"OUT {out} contains other files ({printable(path.name)}); give a new or empty folder.")
        if differences := encoding.differences(earlier):
            raise UsageError(
                f"OUT {out} was started with other flags or another teacher: {', '.join(differences)}. Give another "
                "folder, or remove that one."
            )
        found.add(path.name)
    return found


def _encode_shard(
    shard: str, name: str, encoder: Encoder, tar: TarWriter, bar: Bar, not_compared: Counter
) -> tuple[int, dict[str, list[str]]]:
    """Fills `tar` from a shard; returns (the number of its samples, the names of those left out by reason).

    Adds to `not_compared`.
    """
    for file, content in encoder.encoding.header_files().items():
        tar.add(file, content)
    dropped: dict[str, list[str]] = defaultdict(list)
    samples, last_key = 0, None
    batch: list[tuple[RawSample, Sample]] = []
    encoded: deque[_EncodedBatch] = deque()  # a batch is written while a GPU encodes the next one
    for raw, sample_or_reason in _prepare_samples(shard, name, encoder, dropped):
        bar.update()
        if isinstance(sample_or_reason, str):
            dropped[sample_or_reason].append(printable(raw.key))
        elif raw.key == last_key:  # bad samples between the two are left out, so they would become one
            dropped[DUPLICATE_NAME].append(printable(raw.key))
        else:
            batch.append((raw, sample_or_reason))
            not_compared.update(sample_or_reason.not_compared)
            last_key = raw.key
        if len(batch) == encoder.batch_size:
            encoded.append(_encode_batch(batch, encoder))
            batch = []
        if len(encoded) > 1:
            samples += _write_batch(encoded.popleft(), shard, encoder, tar)
    if batch:
        encoded.append(_encode_batch(batch, encoder))
    while encoded:
        samples += _write_batch(encoded.popleft(), shard, encoder, tar)
    if dropped:
        tar.add(DROPPED, json.dumps(dropped, indent=1, sort_keys=True).encode())
    return samples, dropped


def _prepare_samples(
    shard: str, name: str, encoder: Encoder, dropped: dict[str, list[str]]
) -> Iterator[tuple[RawSample, Sample | str]]:
    """Yields the samples of a shard, in order, decoded by threads: each prepared, or why it cannot be used.

    Adds to `dropped` if the shard cannot be read to its end.
    """
    # The mirrored picture is made from the pixels later, and all captions are kept.
    preparation = replace(encoder.preparation, random_flip=False, proportion_empty_prompts=0.0)
    seed = encoder.encoding.seed

    def prepare(raw: RawSample) -> tuple[RawSample, Sample | str]:
        sample_id = hashlib.blake2b(f"{name}\0{raw.key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        sequence = np.random.SeedSequence((seed, int.from_bytes(sample_id, "big")))
        draws = np.random.Generator(np.random.Philox(sequence)).random(5)
        try:
            return raw, prepare_sample(raw, preparation, draws=draws)
        except BadSample as bad:
            return raw, bad.reason

    waiting: deque = deque()
    with ThreadPoolExecutor(encoder.num_workers) as pool:
        try:
            column = preparation.caption_column
            for raw in read_shard(
                shard, caption_column=column, on_dotted=lambda name: dropped[DOTTED_NAME].append(name)
            ):
                waiting.append(pool.submit(prepare, raw))
                if len(waiting) > encoder.batch_size + encoder.num_workers:
                    yield waiting.popleft().result()
        except UsageError:
            raise
        except Exception as error:
            if local_path(shard) is None or getattr(error, "errno", None):  # possibly transient: not a damaged shard
                raise UsageError(f"IN: reading {printable(shard)} failed ({error}). {RESUME_HINT}.") from None
            dropped[UNREADABLE_SHARD].append(f"{os.path.basename(shard)}: {error}")
        while waiting:
            yield waiting.popleft().result()


@dataclass(frozen=True)
class _EncodedBatch:
    """Samples and what they are encoded to, float16 in CPU memory; on a GPU only once `done` has happened."""

    samples: list[tuple[RawSample, Sample]]
    arrays: dict[str, torch.Tensor]  # a row for each sample
    embeddings: dict[str, torch.Tensor]  # a row for each caption; none if captions are not encoded
    captions: list[int]  # the number of captions of each sample
    done: torch.cuda.Event | None


@torch.no_grad()
def _encode_batch(samples: list[tuple[RawSample, Sample]], encoder: Encoder) -> _EncodedBatch:
    """Encodes samples. A GPU is not waited for: copies in both directions are queued with the rest of its work."""
    device = encoder.frozen.device
    queued = device.type == "cuda"
    pixels = torch.from_numpy(np.stack([sample.arrays["pixels"] for _, sample in samples])).permute(0, 3, 1, 2)
    pixels = (pixels.pin_memory() if queued else pixels).to(device, non_blocking=True)
    arrays = {"moments": _moments(pixels, encoder)}
    if encoder.preparation.random_flip:
        arrays["mirrored_moments"] = _moments(pixels.flip(-1), encoder)
    captions = [read_captions(raw, read_json(raw), encoder.preparation.caption_column)[0] for raw, _ in samples]
    embeddings = {}
    if encoder.encoding.text:
        flat = [caption for texts in captions for caption in texts]
        parts = [
            _embeddings(encoder.family.encode_captions(encoder.frozen, flat[first : first + encoder.batch_size]))
            for first in range(0, len(flat), encoder.batch_size)
        ]
        embeddings = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    # PyTorch pins the memory that a copy from a GPU goes to if it is not waited for.
    arrays = {name: tensor.to("cpu", non_blocking=queued) for name, tensor in arrays.items()}
    embeddings = {name: tensor.to("cpu", non_blocking=queued) for name, tensor in embeddings.items()}
    done = None
    if queued:
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(device))
    return _EncodedBatch(samples, arrays, embeddings, [len(texts) for texts in captions], done)


def _write_batch(batch: _EncodedBatch, shard: str, encoder: Encoder, tar: TarWriter) -> int:
    """Adds the samples of a batch to `tar`; returns their number."""
    if batch.done:
        batch.done.synchronize()
    ends = np.cumsum(batch.captions)[:-1]
    arrays = {name: tensor.numpy() for name, tensor in batch.arrays.items()}
    embeddings = {name: np.split(tensor.numpy(), ends) for name, tensor in batch.embeddings.items()}
    for number, (raw, sample) in enumerate(batch.samples):
        of_sample = {name: array[number] for name, array in (arrays | embeddings).items()}
        for name, array in of_sample.items():
            if not np.isfinite(array).all():
                raise UsageError(
                    f"IN: the {name} of {printable(raw.key)} in {printable(shard)} are not finite in half precision. "
                    f"Give --dtype fp32, and in place of SDXL's own VAE {VAE_FLAG} madebyollin/sdxl-vae-fp16-fix."
                )
        sizes = np.array([sample.original_size, sample.crop_top_left, sample.picture_size], np.int64)
        tar.add(f"{raw.key}.{LATENTS_EXTENSION}", encoder.encoding.pack(of_sample | {"sizes": sizes}))
        for extension, content in raw.files.items():
            if extension not in (*PICTURE_EXTENSIONS, LATENTS_EXTENSION):
                tar.add(f"{raw.key}.{extension}", content)
    return len(batch.samples)


def _moments(pixels: torch.Tensor, encoder: Encoder) -> torch.Tensor:
    return encode_moments(encoder.frozen.vae, pixels, encoder.batch_size).half()


def _embeddings(conditioning: dict[str, Any]) -> dict[str, torch.Tensor]:
    tensors = {"encoder_hidden_states": conditioning["encoder_hidden_states"]}
    tensors |= conditioning.get("added_cond_kwargs", {})
    return {name: tensor.half() for name, tensor in tensors.items()}


def _rank() -> tuple[int, int]:
    """(rank, world size) from torchrun's environment variables; (0, 1) without them."""
    given = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    try:
        rank, world_size = map(int, given.values())
        if 0 <= rank < world_size:
            return rank, world_size
    except ValueError:
        pass
    raise UsageError(f"RANK={given['RANK']} and WORLD_SIZE={given['WORLD_SIZE']} do not fit together; unset both.")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if argv is None:
        hide_in_command_line(args.shards)
    quiet_libraries()
    rank, world_size = _rank()
    local = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ and torch.cuda.is_available() else None
    device, dtype = choose_device(args.device or local, args.dtype)
    teacher = Teacher.from_flags(flags.take(flags.TeacherFlags, args))
    preparation = Preparation.from_flags(flags.take(flags.PreparationFlags, args))
    try:
        result = encode_shards(
            expand_shards(args.shards, args.allow_pipe_in_lists),
            args.out,
            teacher=teacher,
            preparation=preparation,
            captions=args.captions,
            seed=args.seed,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            device=device,
            dtype=dtype,
            rank=rank,
            world_size=world_size,
        )
    except KeyboardInterrupt:
        print(f"interrupted. {RESUME_HINT}", file=sys.stderr)
        sys.exit(130)
    process = f"process {rank} of {world_size}: " if world_size > 1 else ""
    earlier = f" (and {result.already_encoded} encoded earlier)" if result.already_encoded else ""
    if result.dropped:
        print(f"{process}left out; listed in the {DROPPED} of each shard: {list_counts(result.dropped)}")
    if result.not_compared:
        print(f"{process}kept, since a filter cannot compare their value: {list_counts(result.not_compared)}")
    print(
        f"{process}{result.shards} shard{'s' * (result.shards != 1)}{earlier}, {result.samples} samples, "
        f"{result.bytes / 10**6:.1f} MB: train with {SHARDS_FLAG} {shown(shlex.quote(args.out))} "
        f"--resolution {args.resolution}"
    )


if __name__ == "__main__":
    run_program(main, resume_hint="")
