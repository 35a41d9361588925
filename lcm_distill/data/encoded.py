"""The format of encoded shards: pictures as distributions of latents, captions, if requested, as embeddings.

    encoding = read_encoding("encoded/000.tar")         # None for a shard of pictures
    sample = unpack(content, encoding)                  # of a sample's file KEY.latents.safetensors

`encode_shards` writes them: ordinary shards in which that one file replaces a sample's picture, next to its captions
and its JSON. It holds these arrays, all float16 but the last two:

    moments                 [2C, h, w], mean and standard deviation of the latents as the VAE gives them, unscaled
    mirrored_moments        the same for the mirrored picture
    encoder_hidden_states   [captions, tokens, dim], one for each caption of the sample
    text_embeds             [captions, dim], SDXL's second embedding
    sizes                   int64 [3, 2]: original (height, width), for SDXL; (top, left) of the crop, unmirrored;
                            (height, width) of the picture
    encoding                uint8 [16]: the tag of the `Encoding` that it was made with

The second to fourth exist only if they were requested. The shard's first file, .encoding.json, is the `Encoding`; after
it, .empty_caption.safetensors has the embeddings of the empty caption. (A file whose name begins with a dot is not part
of a sample.) The same pictures and settings give the same bytes.
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

from lcm_distill.data.captions import check_caption_column
from lcm_distill.data.raw import printable
from lcm_distill.data.shards import MAX_FILE_BYTES
from lcm_distill.data.sources import open_shard
from lcm_distill.data.tar import TarReader
from lcm_distill.errors import UsageError
from lcm_distill.flags import INTERPOLATIONS

FORMAT = 1
HEADER, EMPTY_CAPTION = ".encoding.json", ".empty_caption.safetensors"
_EMBEDDING_AXES = {"encoder_hidden_states": 2, "text_embeds": 1}  # (tokens, dim) and (dim): those of one caption
_NOT_IN_TAG = ("vae_name", "text_name", "seed", "filters")
_MIRRORED = "mirrored_moments"
_MAX_HEADER_BYTES = 2**16  # of a safetensors file; those of samples have about 500
_MAX_ENCODING_BYTES = 2**20  # of a shard's .encoding.json, which has about 1000
_EXPONENT = 0x7C00  # the exponent bits of a float16, which are all ones in infinities and NaNs


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How the samples of an encoded shard were made."""

    vae: str  # fingerprint of the VAE's weights, by `Teacher.fingerprint`
    scaling_factor: float
    shift_factor: float | None
    vae_dtype: str  # in which the VAE encoded, such as "float32"
    moments: tuple[int, ...]  # shape of a sample's moments, (2C, h, w)
    resolution: int  # side of the square pictures, pixels
    interpolation: str
    center_crop: bool  # otherwise one crop per sample, drawn from (seed, shard, sample)
    random_flip: bool  # the mirrored pictures were encoded as well
    caption_column: str | None
    seed: int = 0
    filters: tuple[str, ...] = ()  # the flags of what was left out
    text: str | None = None  # fingerprint of the text encoders' weights; None: the captions are not encoded
    text_dtype: str | None = None
    embeddings: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # name to shape, of one caption
    vae_name: str = ""  # for messages
    text_name: str = ""
    empty_caption: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @functools.cached_property
    def tag(self) -> bytes:
        """16 bytes that are equal for encodings whose samples may be trained on together."""
        return hashlib.blake2b(self._to_json(leave_out=_NOT_IN_TAG), digest_size=16).digest()

    def __str__(self) -> str:
        crop = "centre crop" if self.center_crop else "random crop, the same in each epoch"
        flip = "with their mirror images" if self.random_flip else "no flip"
        text = f"captions encoded by {printable(self.text_name)}" if self.text else "captions not encoded"
        size, dtype = f"{self.resolution}x{self.resolution}", printable(self.vae_dtype)
        return f"encoded by {printable(self.vae_name)} in {dtype}; latents of {size}, {crop}, {flip}; {text}"

    def differences(self, other: "Encoding") -> list[str]:
        """The fields in which `other` differs, such as "resolution 32 (now 64)"; names and embeddings aside."""
        ignored = ("vae_name", "text_name", "embeddings", "empty_caption")
        names = [field.name for field in dataclasses.fields(self) if field.name not in ignored]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [
            f"{name} {printable(str(theirs))} (now {printable(str(ours))})"
            for name, ours, theirs in pairs
            if ours != theirs
        ]

    def header_files(self) -> dict[str, bytes]:
        """The files at the beginning of a shard, by name."""
        files = {HEADER: self._to_json()}
        if self.embeddings:
            empty = {name: np.ascontiguousarray(array) for name, array in self.empty_caption.items()}
            files[EMPTY_CAPTION] = safetensors.numpy.save(empty)
        return files

    def _to_json(self, leave_out: tuple[str, ...] = ()) -> bytes:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "empty_caption"}
        kept = {name: value for name, value in fields.items() if name not in leave_out}
        return json.dumps({"format": FORMAT} | kept, indent=1, sort_keys=True).encode()

    def pack(self, arrays: Mapping[str, np.ndarray]) -> bytes:
        """The content of a sample's file: these arrays, to which it adds the tag."""
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}  # safetensors drops strides
        return safetensors.numpy.save(contiguous | {"encoding": np.frombuffer(self.tag, np.uint8)})


def read_encoding(shard: str) -> Encoding | None:
    """Reads the encoding of a shard from its first files; None if it contains pictures (or nothing).

    Raises:
        UsageError: these files exist, but are damaged or of another version.
        Exception: whatever opener and tar reader raise.
    """
    with open_shard(shard) as file:
        tar = TarReader(file)
        files: dict[str, bytes] = {}
        for entry in tar:
            if entry.name not in {HEADER, EMPTY_CAPTION} - {*files} or not entry.readable:
                break
            huge = entry.size > (_MAX_ENCODING_BYTES if entry.name == HEADER else MAX_FILE_BYTES)
            files[entry.name] = b"" if huge else tar.content()
    if HEADER not in files:
        return None
    try:
        return _parse_encoding(files)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, safetensors.SafetensorError) as error:
        problem = error if isinstance(error, _UnknownFormat) else "it is damaged"
        raise UsageError(
            f"{printable(shard)}: its {HEADER} cannot be used ({problem}). Encode the pictures again."
        ) from None


class _UnknownFormat(ValueError):
    pass


class EncodingMismatch(ValueError):
    """A sample's file was made with another encoding."""


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
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


def _parse_encoding(files: Mapping[str, bytes]) -> Encoding:
    content = json.loads(files[HEADER])
    if content.pop("format") != FORMAT:
        raise _UnknownFormat("it was written by another version")
    if any(type(content[name]) not in types for name, types in _FIELD_TYPES.items()):
        raise ValueError
    content["moments"] = _parse_shape(content["moments"])
    content["filters"] = tuple(map(str, content["filters"]))
    content["embeddings"] = {str(name): _parse_shape(shape) for name, shape in content["embeddings"].items()}
    encoding = Encoding(**content)
    _check_consistency(encoding)
    if not encoding.embeddings:
        return encoding
    file = _SafetensorsFile(files[EMPTY_CAPTION])
    empty = {name: file.array(name, "F16", shape) for name, shape in encoding.embeddings.items()}
    return dataclasses.replace(encoding, empty_caption=empty)


def _check_consistency(encoding: Encoding) -> None:
    """`ValueError` for what no encoder writes. Whether it is right for a teacher: `models.frozen.check_encoding`."""
    channels, height, width = encoding.moments
    if channels % 2 or height != width or not 0 < encoding.resolution < 2**31 or encoding.resolution % height:
        raise ValueError
    # Other embeddings would take the place of what a batch has under their names.
    axes = {name: len(shape) for name, shape in encoding.embeddings.items()}
    if bool(encoding.text) != bool(axes) or not axes.items() <= _EMBEDDING_AXES.items():
        raise ValueError
    if encoding.interpolation not in INTERPOLATIONS:
        raise ValueError
    if check_caption_column(encoding.caption_column) != encoding.caption_column:
        raise ValueError


def _parse_shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(side) is int and 0 < side < 2**31 for side in value):
        raise ValueError
    return tuple(value)


@dataclasses.dataclass
class EncodedSample:
    """The content of a sample's file; all of it finite, in the shapes of its encoding."""

    moments: np.ndarray
    embeddings: dict[str, np.ndarray]  # [captions, ...] each
    original_size: tuple[int, int]  # (height, width)
    crop_top_left: tuple[int, int]
    picture_size: tuple[int, int]  # (height, width)


def unpack(content: bytes, encoding: Encoding, *, mirrored: bool = False, captions: int = 0) -> EncodedSample:
    """Reads the file of a sample that has so many `captions`.

    With `mirrored`, the moments and the crop are those of the mirrored picture.

    Raises:
        EncodingMismatch: its tag is that of another encoding.
        ValueError: it is damaged, or its arrays are not those of `encoding`.
    """
    file = _SafetensorsFile(content)
    if file.array("encoding", "U8", (16,)).tobytes() != encoding.tag:
        raise EncodingMismatch
    moments = file.array(_MIRRORED if mirrored else "moments", "F16", encoding.moments)
    embeddings = {name: file.array(name, "F16", (captions, *shape)) for name, shape in encoding.embeddings.items()}
    original, (top, left), picture = file.array("sizes", "I64", (3, 2)).tolist()
    if not (0 < min(*original, *picture) and max(*original, *picture) < 2**31):
        raise ValueError("impossible sizes of a picture")
    max_top, max_left = (encoding.resolution * side // min(picture) - encoding.resolution for side in picture)
    if not (0 <= top <= max_top and 0 <= left <= max_left):
        raise ValueError("a crop outside the picture")
    crop = (top, max_left - left if mirrored else left)
    return EncodedSample(moments, embeddings, tuple(original), crop, tuple(picture))


class _SafetensorsFile:
    """The arrays of a safetensors file, as views of its bytes; `ValueError` if it is not such a file."""

    def __init__(self, content: bytes):
        self._content = content
        length = int.from_bytes(content[:8], "little")
        if length > _MAX_HEADER_BYTES:
            raise ValueError("not a safetensors file, or one with a huge header")
        self._arrays = _find_arrays(content[: 8 + length], len(content))

    def array(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """The array of this name; `ValueError` if it is missing, not finite, or of another dtype or shape."""
        found, start = self._arrays.get(name, (None, 0))
        if found != (dtype, shape):
            raise ValueError(f"no {name} of shape {shape}")
        numpy_dtype = {"F16": np.float16, "U8": np.uint8, "I64": np.int64}[dtype]
        array = np.frombuffer(self._content, numpy_dtype, math.prod(shape), start).reshape(shape)
        if dtype == "F16" and array.size and (array.view(np.uint16) & _EXPONENT).max() == _EXPONENT:
            raise ValueError(f"{name} is not finite")
        return array


@functools.lru_cache(maxsize=64)
def _find_arrays(header: bytes, size: int) -> dict[str, tuple[tuple[str, tuple[int, ...]], int]]:
    """Name to ((dtype, shape), first byte) of the arrays of a safetensors file of `size` bytes with this header.

    Cached, since nearly all samples of a dataset have the same header. safetensors validates it, with zeros for the
    rest of the file.
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
