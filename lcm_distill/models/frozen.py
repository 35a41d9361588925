"""The parts of a teacher that do not train, each loaded on first use; latents of batches, encoded or not."""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL

from lcm_distill.data.encoded import HEADER, Encoding
from lcm_distill.data.raw import printable
from lcm_distill.distributed.compiling import compile_networks
from lcm_distill.errors import UsageError
from lcm_distill.flags import SHARDS_FLAG, VAE_FLAG
from lcm_distill.models.teacher import Teacher
from lcm_distill.models.vae import encode_pixels, moments_shape, sample_moments, scale_and_shift

if TYPE_CHECKING:
    from lcm_distill.models.families import Family


class FrozenParts:
    """The parts, as attributes: networks in eval mode, without gradients, on `device`; tokenizers.

    `kinds` are the Diffusers or Transformers classes of the parts, by name, `dtypes` those of the networks among them;
    `text` names the parts that encode captions. Parts whose output the shards hold, by their `encoding`, are loaded
    only when pictures are generated. Loading raises `UsageError` if a part's weights cannot be loaded.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        device: torch.device | str,
        kinds: Mapping[str, Any],
        dtypes: Mapping[str, torch.dtype],
        text: tuple[str, ...],
        encoding: Encoding | None = None,
    ):
        self.device = torch.device(device)
        self.dtypes = dict(dtypes)
        self.encoding = encoding
        self._teacher, self._kinds = teacher, dict(kinds)
        self._unused_in_training = set() if encoding is None else {"vae", *(text if encoding.text else ())}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._kinds:
            raise AttributeError(name)
        self._load([name])
        return self.__dict__[name]

    def _load(self, names: Iterable[str]) -> None:
        kinds = {name: self._kinds[name] for name in names if name not in self.__dict__}
        if not kinds:
            return
        parts = self._teacher.load(kinds, {name: self.dtypes[name] for name in kinds if name in self.dtypes})
        self.__dict__.update(parts)
        self._move(parts, self.device)

    def _move(self, names: Iterable[str], device: torch.device | str) -> None:
        for name in names:
            if name in self.dtypes:
                self.__dict__[name].to(device)

    def load_for_training(self) -> None:
        """Loads all parts that a training step needs."""
        self._load(name for name in self._kinds if name not in self._unused_in_training)

    def compile_encoder(self, mode: str | None) -> None:
        """Compiles the VAE's encoder, as `compile_networks` does, if training encodes pictures; never its decoder."""
        if "vae" not in self._unused_in_training:
            compile_networks(mode, self.vae.encoder)

    @contextlib.contextmanager
    def all_on_device(self) -> Iterator[None]:
        """Inside, all parts are loaded and on the device; on exit those that training does not need move to the CPU."""
        self._load(self._kinds)
        self._move(self._unused_in_training, self.device)
        try:
            yield
        finally:
            self._move(self._unused_in_training, "cpu")

    def to_embedding(self, stored: torch.Tensor) -> torch.Tensor:
        """An embedding from an encoded shard, on the device, in the text encoders' dtype."""
        on_device = stored.to(self.device, non_blocking=True)  # first: the copy that a cast makes would not be pinned
        return on_device.to(self.dtypes["text_encoder"])

    @functools.cached_property
    def scale_and_shift(self) -> dict[str, Any]:
        """What `sample_moments` needs of the VAE, without loading it."""
        return scale_and_shift(self._teacher.read_vae_config())


def check_encoding(encoding: Encoding | None, teacher: Teacher, family: "Family") -> None:
    """`UsageError` unless the shards were encoded with the VAE, and the text encoders, of `teacher`, of this `family`.

    So are shards whose arrays have other shapes than these networks give, whatever they say about who encoded them.
    Loads no networks.
    """
    if encoding is None:
        return
    vae_config = teacher.read_vae_config()
    scale = {"scaling_factor": encoding.scaling_factor, "shift_factor": encoding.shift_factor}
    if (teacher.fingerprint("vae", AutoencoderKL), scale_and_shift(vae_config)) != (encoding.vae, scale):
        raise UsageError(
            f"{SHARDS_FLAG}: the latents were encoded with another VAE, {printable(encoding.vae_name)}. Pass that as "
            f"{VAE_FLAG}, or encode the pictures again with this one (python -m lcm_distill.encode_shards)."
        )
    if encoding.text and encoding.text != family.text_fingerprint(teacher):
        raise UsageError(
            f"{SHARDS_FLAG}: the captions were encoded with other text encoders than the teacher's, those of "
            f"{printable(encoding.text_name)}. Encode the pictures again with this teacher, or without --captions."
        )
    found: dict[str, tuple[int, ...]] = {"moments": encoding.moments}
    expected: dict[str, tuple[int, ...]] = {"moments": moments_shape(vae_config, encoding.resolution)}
    if encoding.text:
        found |= encoding.embeddings
        expected |= family.embedding_shapes(teacher)
    if found != expected:
        raise UsageError(
            f"{SHARDS_FLAG}: its arrays are {_list_shapes(found)}, where the teacher gives {_list_shapes(expected)} at "
            f"{encoding.resolution} pixels: the shards, or their {HEADER}, are damaged. Encode the pictures again "
            "(python -m lcm_distill.encode_shards)."
        )


def _list_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{printable(name)} {'x'.join(map(str, shape))}" for name, shape in shapes.items())


def batch_latents(
    frozen: FrozenParts, batch: Mapping[str, Any], batch_size: int, generator: torch.Generator
) -> torch.Tensor:
    """Latents float32 `[B, C, h, w]` of a batch of the stream, with the same draws from `generator` for all shards.

    If the batch holds "pixels", the VAE encodes them, at most `batch_size` at once; "moments" need no VAE.
    """
    if "moments" not in batch:
        return encode_pixels(frozen.vae, batch["pixels"], batch_size, generator)
    moments = batch["moments"].to(frozen.device, non_blocking=True)
    return sample_moments(moments, generator, **frozen.scale_and_shift)


def empty_batch(encoding: Encoding | None) -> dict[str, Any]:
    """The unconditional batch: one row with the empty caption, and its embeddings if the shards have them."""
    stored = {} if encoding is None else encoding.empty_caption
    return {"captions": [""]} | {name: torch.from_numpy(array)[None] for name, array in stored.items()}
