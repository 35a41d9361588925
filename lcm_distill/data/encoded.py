"""Encoded shards: pictures as distributions of latents, captions as embeddings if asked for. What is in them.

    encoding = read_encoding("encoded/000.tar")         # None for a shard of pictures
    arrays = unpack(content, encoding)                  # of the file KEY.latents.safetensors of a sample

`encode_shards` writes them: tars as others are, in which that one file stands for a sample's picture, beside its
captions and its JSON. It holds, all float16 but the last two,

    moments                 [2C, h, w], mean and standard deviation of the latents as the VAE has them, unscaled
    mirrored_moments        the same of the mirrored picture
    encoder_hidden_states   [captions, tokens, dim], one for each caption of the sample
    text_embeds             [captions, dim], SDXL's second embedding
    sizes                   int64 [3, 2]: (height, width) told to SDXL; (top, left) of the crop, unmirrored; (height,
                            width) of the picture
    encoding                uint8 [16]: the tag of the `Encoding` that it was made with

of which the second to fourth only if they were asked for. The shard's first file, .encoding.json, is that `Encoding`;
.empty_caption.safetensors behind it has the embeddings of the empty caption. (A name that begins with a dot is no
sample.) The same pictures and settings give the same bytes.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from lcm_distill.data.raw import printable
from lcm_distill.data.shards import MAX_FILE_BYTES
from lcm_distill.data.sources import open_shard
from lcm_distill.data.tar import TarReader
from lcm_distill.errors import UsageError

FORMAT = 1
HEADER, EMPTY_CAPTION = ".encoding.json", ".empty_caption.safetensors"
_NOT_IN_TAG = ("vae_name", "text_name", "seed", "filters")
_MIRRORED = "mirrored_moments"
_MOST_HEADER = 2**16  # bytes of a safetensors header; those of samples have some 500
_EXPONENT = 0x7C00  # of a float16: all ones in what is not finite


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How the samples of an encoded shard were made."""

    vae: str  # fingerprint of the VAE's weights, by `Teacher.fingerprint`
    scaling_factor: float
    shift_factor: float | None
    vae_dtype: str  # "float32", in which it encoded
    moments: tuple[int, ...]  # shape of a sample's moments, (2C, h, w)
    resolution: int  # side of the square pictures, pixels
    interpolation: str
    center_crop: bool  # else one crop for each sample, drawn from (seed, shard, sample)
    random_flip: bool  # the mirrored pictures are there as well
    caption_column: str | None
    seed: int = 0
    filters: tuple[str, ...] = ()  # what was left out, as flags
    text: str | None = None  # fingerprint of the text encoders' weights; None: the captions are not encoded
    text_dtype: str | None = None
    embeddings: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # name to shape of a caption's
    vae_name: str = ""  # what its user calls it
    text_name: str = ""
    empty_caption: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @functools.cached_property
    def tag(self) -> bytes:
        """16 bytes, the same for encodings whose samples may be trained on together."""
        return hashlib.blake2b(self._json(leave_out=_NOT_IN_TAG), digest_size=16).digest()

    def __str__(self) -> str:
        crop = "centre crop" if self.center_crop else "random crop, the same in each epoch"
        flip = "with their mirror images" if self.random_flip else "no flip"
        text = f"captions encoded by {printable(self.text_name)}" if self.text else "captions not encoded"
        size = f"{self.resolution}x{self.resolution}"
        return f"encoded by {printable(self.vae_name)} in {self.vae_dtype}; latents of {size}, {crop}, {flip}; {text}"

    def differences(self, other: "Encoding") -> list[str]:
        """What another encoding has otherwise, in words; names and what text encoders give aside."""
        passed_over = ("vae_name", "text_name", "embeddings", "empty_caption")
        names = [f.name for f in dataclasses.fields(self) if f.name not in passed_over]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name} {theirs} (now {mine})" for name, mine, theirs in pairs if mine != theirs]

    def header_files(self) -> dict[str, bytes]:
        """The files that a shard begins with, by name."""
        files = {HEADER: self._json()}
        if self.embeddings:
            empty = {name: np.ascontiguousarray(array) for name, array in self.empty_caption.items()}
            files[EMPTY_CAPTION] = safetensors.numpy.save(empty)
        return files

    def _json(self, leave_out: tuple[str, ...] = ()) -> bytes:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "empty_caption"}
        kept = {name: value for name, value in fields.items() if name not in leave_out}
        return json.dumps({"format": FORMAT} | kept, indent=1, sort_keys=True).encode()

    def pack(self, arrays: Mapping[str, np.ndarray]) -> bytes:
        """The file of a sample with these arrays, without the tag among them."""
        whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}  # what strides say would be lost
        return safetensors.numpy.save(whole | {"encoding": np.frombuffer(self.tag, np.uint8)})


def read_encoding(shard: str) -> Encoding | None:
    """The encoding of a shard, by its first files; None if it holds pictures (or nothing).

    Raises:
        UsageError: those files are there, but cannot be used here.
        Exception: what opener and tar reader raise.
    """
    with open_shard(shard) as file:
        tar = TarReader(file)
        files = {}
        for entry in tar:
            if entry.name not in (HEADER, EMPTY_CAPTION) or not entry.readable or entry.size > MAX_FILE_BYTES:
                break
            files[entry.name] = tar.content()
    if HEADER not in files:
        return None
    try:
        return _parse(files)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, safetensors.SafetensorError) as error:
        told = error if isinstance(error, _OtherFormat) else "it is damaged"
        raise UsageError(
            f"{printable(shard)}: its {HEADER} cannot be used ({told}). Encode the pictures again."
        ) from None


class _OtherFormat(ValueError):
    pass


class OtherEncoding(ValueError):
    """The file of a sample was made with another encoding."""


_KINDS: dict[str, tuple[type, ...]] = {
    "vae": (str,),
    "scaling_factor": (float,),
    "shift_factor": (float, type(None)),
    "vae_dtype": (str,),
    "resolution": (int,),
    "interpolation": (str,),
    "center_crop": (bool,),
    "random_flip": (bool,),
    "caption_column": (str, type(None)),
    "seed": (int,),
    "text": (str, type(None)),
    "text_dtype": (str, type(None)),
    "vae_name": (str,),
    "text_name": (str,),
}


def _parse(files: Mapping[str, bytes]) -> Encoding:
    content = json.loads(files[HEADER])
    if content.pop("format") != FORMAT:
        raise _OtherFormat("it was written by another version")
    if any(type(content[name]) not in kinds for name, kinds in _KINDS.items()):
        raise ValueError
    content["moments"] = _shape(content["moments"])
    content["filters"] = tuple(map(str, content["filters"]))
    content["embeddings"] = {str(name): _shape(shape) for name, shape in content["embeddings"].items()}
    encoding = Encoding(**content)
    if not encoding.embeddings:
        return encoding
    parts = _Arrays(files[EMPTY_CAPTION])
    empty = {name: parts.array(name, "F16", shape) for name, shape in encoding.embeddings.items()}
    return dataclasses.replace(encoding, empty_caption=empty)


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(side) is int and 0 < side < 2**31 for side in value):
        raise ValueError
    return tuple(value)


@dataclasses.dataclass
class Unpacked:
    """What is in a sample's file; all finite, in the shapes of its encoding."""

    moments: np.ndarray
    embeddings: dict[str, np.ndarray]  # [captions, ...] each
    original_size: tuple[int, int]  # (height, width)
    crop_top_left: tuple[int, int]
    picture_size: tuple[int, int]  # (height, width)


def unpack(content: bytes, encoding: Encoding, *, mirrored: bool = False, captions: int = 0) -> Unpacked:
    """Reads a sample's file; with `mirrored` the moments and the crop are those of the mirror image.

    `ValueError` if it is damaged, or not what `encoding` says, for so many captions; `OtherEncoding` if its tag is that
    of another.
    """
    parts = _Arrays(content)
    if parts.array("encoding", "U8", (16,)).tobytes() != encoding.tag:
        raise OtherEncoding
    moments = parts.array(_MIRRORED if mirrored else "moments", "F16", encoding.moments)
    embeddings = {name: parts.array(name, "F16", (captions, *shape)) for name, shape in encoding.embeddings.items()}
    original, (top, left), picture = parts.array("sizes", "I64", (3, 2)).tolist()
    if not (0 < min(*original, *picture) and max(*original, *picture) < 2**31):
        raise ValueError("sizes that no picture has")
    most_top, most_left = (encoding.resolution * side // min(picture) - encoding.resolution for side in picture)
    if not (0 <= top <= most_top and 0 <= left <= most_left):
        raise ValueError("a crop outside of the picture")
    crop = (top, most_left - left if mirrored else left)
    return Unpacked(moments, embeddings, tuple(original), crop, tuple(picture))


class _Arrays:
    """The arrays of a safetensors file, which stay where they lie in it; `ValueError` if it is none."""

    def __init__(self, content: bytes):
        self._content = content
        length = int.from_bytes(content[:8], "little")
        if length > _MOST_HEADER:
            raise ValueError("no safetensors file, or one with a huge header")
        self._places = _find_arrays(content[: 8 + length], len(content))

    def array(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """One of them; `ValueError` if it is not there, not so, or not finite."""
        found, start = self._places.get(name, (None, 0))
        if found != (dtype, shape):
            raise ValueError(f"no {name} of shape {shape}")
        kind = {"F16": np.float16, "U8": np.uint8, "I64": np.int64}[dtype]
        array = np.frombuffer(self._content, kind, math.prod(shape), start).reshape(shape)
        if kind is np.float16 and array.size and (array.view(np.uint16) & _EXPONENT).max() == _EXPONENT:  # isfinite
            raise ValueError(f"{name} is not finite")
        return array


@functools.lru_cache(maxsize=64)
def _find_arrays(header: bytes, size: int) -> dict[str, tuple[tuple[str, tuple[int, ...]], int]]:
    """Name to (dtype, shape) and first byte of the arrays of a safetensors file of so many bytes that begins like this.

    Nearly all samples of a data set begin alike. safetensors checks the beginning, with zeros for the rest.
    """
    try:
        safetensors.deserialize(header + bytes(size - len(header)))
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from None
    arrays = json.loads(header[8:])
    arrays.pop("__metadata__", None)
    return {
        name: ((array["dtype"], tuple(array["shape"])), len(header) + array["data_offsets"][0])
        for name, array in arrays.items()
    }
