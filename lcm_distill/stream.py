"""Captioned pictures from WebDataset shards: an endless, seeded stream that knows its place.

    shards = expand_shards("data/{000..010}.tar")           # lcm_distill.shards
    print(inspect_shards(shards, resolution=512))           # lcm_distill.preflight, before any model is loaded
    stream = ShardStream(shards=shards, batch_size=16, resolution=512, seed=0)
    loader = make_loader(stream, num_workers=4)             # a StatefulDataLoader
    for batch in loader: ...                                # epoch after epoch; the loop counts steps

Order. C = ranks x workers consumers share the shards. In each epoch the shards are permuted from (seed, epoch)
and dealt whole as long as they go round; the S mod C that are left over are cut into C slots each, dealt evenly,
so a consumer reads at most two of them. Over all consumers each sample comes once an epoch. A consumer permutes
its samples inside consecutive blocks of up to `shuffle_window`, from (seed, epoch, consumer, block).

Place. (epoch, start of the block, place in the block) is the whole state: restoring reads one block again, and
skims the part of its first shard that lies before it.

Safety. Only pictures, captions and JSON are read; nothing in a shard is unpickled or handed to another program.
"""

import hashlib
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from lcm_distill.errors import UsageError
from lcm_distill.preflight import inspect_shards
from lcm_distill.samples import INTERPOLATIONS, UNREADABLE_SHARD, BadSample, Sample, prepare_sample
from lcm_distill.shards import FLAG, RawSample, check_caption_column, list_counts, read_shard

logger = logging.getLogger(__name__)

WINDOW_BYTES = 256 * 2**20  # a shuffle block ends here even when it has fewer than `shuffle_window` samples

SHARD_ORDER, BLOCK_ORDER, SAMPLE_DRAWS = range(3)  # what a random stream is for, so that no two share numbers


def _rng(seed: int, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *key))))


class StreamError(UsageError):
    """The shards give nothing to train on. Raised in a worker process too, and reads the same there.

    A loader wraps a worker's error into "Caught ... in worker 0. Original Traceback ..."; what the person at the
    shell needs is the message alone.
    """

    def __init__(self, message: str):
        super().__init__(message.rpartition(f"{__name__}.StreamError: ")[2].strip())


def deal_shards(num_shards: int, *, seed: int, epoch: int, consumer: int, consumers: int) -> list[tuple[int, int, int]]:
    """What a consumer reads in an epoch: (shard, low, high), its samples i with low <= (i + epoch) % consumers < high.

    Over all consumers each sample comes exactly once. The epoch turns the slots, so that a consumer that gets
    nothing of a tiny shard gets some the next time.
    """
    order = _rng(seed, SHARD_ORDER, epoch).permutation(num_shards).tolist()
    left_over = num_shards % consumers
    dealt, shared = order[: num_shards - left_over], order[num_shards - left_over :]
    parts = [(shard, 0, consumers) for shard in dealt[consumer::consumers]]
    slot, end = consumer * left_over, (consumer + 1) * left_over
    while slot < end:
        number, low = divmod(slot, consumers)
        high = min(consumers, low + end - slot)
        parts.append((shared[number], low, high))
        slot += high - low
    return parts


class ShardStream(IterableDataset):
    """Endless batches of captioned pictures; see the module's docstring for their order.

    A batch is a dict of
        pixels: uint8 [batch_size, 3, resolution, resolution], 0 to 255
        captions: list of str, "" with probability `proportion_empty_prompts`; of a sample's several captions one is
            drawn, anew in each epoch
        original_sizes: int64 [batch_size, 2], (height, width) by the JSON's original_height and original_width, else
            its height and width, else of the picture itself, in pixels
        crop_top_lefts: int64 [batch_size, 2], (top, left) of the crop in pixels of the resized picture, mirrored
            with it if it was flipped
        dropped: dict of reason to count: what this worker has dropped since the run began; see `DropCounter`
        worker: int, the worker that made the batch
    All batches are full: the last samples of an epoch share a batch with the first of the next. All draws come
    from (seed, epoch, place of the shard in the list, number of the sample in it), whoever reads the sample.

    Args:
        shards: as `expand_shards` gives them.
        batch_size: samples in a batch (of one rank).
        resolution: side of the square pictures, pixels.
        seed: not negative.
        rank, world_size: of this process among those that train together.
        interpolation: nearest, box, bilinear, hamming, bicubic or lanczos (Pillow's, all antialiased).
        center_crop: crop the middle, not a random part.
        random_flip: mirror every other picture.
        proportion_empty_prompts: 0 to 1.
        caption_column: a file extension or a JSON key, the only place to take captions from (`check_caption_column`);
            None for the usual ones.
        shuffle_window: samples in a shuffle block; a block also ends at 256 MiB. Each worker holds one in memory.

    Raises:
        UsageError: from the constructor for an argument out of range; from the iterator, in the words of
            `inspect_shards`, when it went through an epoch without a sample and no shard has one to give.
    """

    def __init__(
        self,
        *,
        shards: list[str],
        batch_size: int,
        resolution: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        interpolation: str = "bilinear",
        center_crop: bool = False,
        random_flip: bool = False,
        proportion_empty_prompts: float = 0.0,
        caption_column: str | None = None,
        shuffle_window: int = 1000,
    ):
        assert 0 <= rank < world_size, (rank, world_size)
        if not shards:
            raise UsageError(f"{FLAG} names no shard.")
        for flag, value, least in (
            ("--train_batch_size", batch_size, 1),
            ("--resolution", resolution, 1),
            ("--seed", seed, 0),
            ("--shuffle_window", shuffle_window, 1),
        ):
            if value < least:
                raise UsageError(f"{flag} is {value}; give {least} or more.")
        if not 0 <= proportion_empty_prompts <= 1:
            raise UsageError(f"--proportion_empty_prompts is {proportion_empty_prompts}; give a number from 0 to 1.")
        self.shards = list(shards)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.shuffle_window = shuffle_window
        self.start_epoch = 0
        names = [os.path.basename(shard.partition("?")[0]) for shard in shards]  # data may move between runs
        self._digest = hashlib.blake2b("\0".join(names).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        self.prepare_options: dict[str, Any] = {
            "resolution": resolution,
            "resample": _resample_filter(interpolation),
            "center_crop": center_crop,
            "random_flip": random_flip,
            "proportion_empty_prompts": proportion_empty_prompts,
            "caption_column": check_caption_column(caption_column),
        }

    def __iter__(self) -> "StreamIterator":
        info = get_worker_info()
        return StreamIterator(self, worker=info.id if info else 0, workers=info.num_workers if info else 0)

    def layout(self, workers: int) -> dict:
        """What a saved place depends on: with any of these changed it points at other samples.

        Args:
            workers: of the loader; 0 and 1 give the same samples, but torchdata stores their states differently.
        """
        return {
            "rank": self.rank,
            "world_size": self.world_size,
            "workers": workers,
            "shards": self._digest,
            "seed": self.seed,
            "shuffle_window": self.shuffle_window,
        }


def _resample_filter(interpolation: str) -> int:
    if interpolation not in INTERPOLATIONS:
        raise UsageError(f"--interpolation_type is {interpolation!r}; give one of {', '.join(INTERPOLATIONS)}.")
    return INTERPOLATIONS[interpolation]


class StreamIterator:
    """One consumer's pass through a `ShardStream`, with a state that `StatefulDataLoader` saves batch by batch."""

    def __init__(self, stream: ShardStream, *, worker: int, workers: int):
        self.stream = stream
        self.worker = worker
        self.workers = workers
        self.consumer = stream.rank * max(1, workers) + worker
        self.consumers = stream.world_size * max(1, workers)
        self.epoch = stream.start_epoch
        self.block = 0  # number of the block in the epoch
        self.part = 0  # the block starts in this part of what `deal_shards` gave,
        self.sample = 0  # at this sample of the shard
        self.place = 0  # so many of the block's samples, in its shuffled order, are used up
        self.dropped: Counter = Counter()
        self._samples = self._run()

    def state_dict(self) -> dict:
        place = {name: getattr(self, name) for name in ("epoch", "block", "part", "sample", "place")}
        return {"layout": self.stream.layout(self.workers), **place, "dropped": dict(self.dropped)}

    def load_state_dict(self, state: dict) -> None:
        assert state["layout"] == self.stream.layout(self.workers)  # `ShardLoader` sees to it
        for name in ("epoch", "block", "part", "sample", "place"):
            setattr(self, name, state[name])
        self.dropped = Counter(state["dropped"])
        self._samples = self._run()

    def __iter__(self) -> "StreamIterator":
        return self

    def __next__(self) -> dict:
        size, resolution = self.stream.batch_size, self.stream.prepare_options["resolution"]
        pixels = torch.empty((size, 3, resolution, resolution), dtype=torch.uint8)
        samples = list(islice(self._samples, size))
        for row, sample in zip(pixels.numpy(), samples, strict=True):
            row[:] = sample.pixels.transpose(2, 0, 1)
        return {
            "pixels": pixels,
            "captions": [sample.caption for sample in samples],
            "original_sizes": torch.tensor([sample.original_size for sample in samples]),
            "crop_top_lefts": torch.tensor([sample.crop_top_left for sample in samples]),
            "dropped": dict(self.dropped),
            "worker": self.worker,
        }

    def _run(self) -> Iterator[Sample]:
        """Sample after sample, for ever."""
        stream, barren = self.stream, 0
        while True:
            reader, delivered = self._read_epoch(), False
            while window := self._fill(reader):
                next_start = window[-1][:2]
                order = _rng(stream.seed, BLOCK_ORDER, self.epoch, self.consumer, self.block).permutation(len(window))
                while self.place < len(window):
                    drawn = int(order[self.place])
                    _, _, shard, index, raw = window[drawn]
                    window[drawn] = None  # its bytes are not needed any more
                    self.place += 1
                    draws = _rng(stream.seed, SAMPLE_DRAWS, self.epoch, shard, index).random(5)
                    try:
                        sample = prepare_sample(raw, draws=draws, **stream.prepare_options)
                    except BadSample as bad:
                        self.dropped[bad.reason] += 1
                        continue
                    delivered = True
                    yield sample
                (self.part, self.sample), self.block, self.place = next_start, self.block + 1, 0
            self.epoch, self.block, self.part, self.sample, self.place = self.epoch + 1, 0, 0, 0, 0
            # Nothing for this consumer: bad luck (others have the good shards), or nothing to be had? Looking costs
            # up to a pass over the data, so do it after 1, 2, 4, 8, ... such epochs.
            barren = 0 if delivered else barren + 1
            if barren.bit_count() == 1:
                self._look_for_a_usable_sample()

    def _read_epoch(self) -> Iterator[tuple[int, int, int, int, RawSample]]:
        """From the block's start on: (part and sample after this one, shard, number in the shard, the sample)."""
        epoch, start_part, start_sample = self.epoch, self.part, self.sample
        caption_column = self.stream.prepare_options["caption_column"]
        parts = deal_shards(
            len(self.stream.shards),
            seed=self.stream.seed,
            epoch=epoch,
            consumer=self.consumer,
            consumers=self.consumers,
        )
        for part in range(start_part, len(parts)):
            shard, low, high = parts[part]
            first, index = start_sample if part == start_part else 0, 0
            try:
                for raw in read_shard(self.stream.shards[shard], caption_column=caption_column):
                    if index >= first and low <= (index + epoch) % self.consumers < high:
                        yield part, index + 1, shard, index, raw
                    index += 1
            except Exception as error:  # noqa: BLE001 - opener, decompressor and tar reader raise nearly anything
                if low <= (index + epoch) % self.consumers < high:  # one of those who share the shard counts it
                    self.dropped[UNREADABLE_SHARD] += 1
                    logger.info("%s, sample %d: %s", self.stream.shards[shard], index, error)

    def _fill(self, reader: Iterator) -> list:
        """The next block: up to `shuffle_window` samples, or `WINDOW_BYTES`; [] at the end of the epoch."""
        window, nbytes = [], 0
        dropped_before = Counter(self.dropped)
        for item in reader:
            window.append(item)
            nbytes += item[-1].nbytes
            if len(window) >= self.stream.shuffle_window or nbytes >= WINDOW_BYTES:
                break
        if self.place:  # restored inside this block: what reading it again counted is in the saved counts already
            self.dropped = dropped_before
        return window

    def _look_for_a_usable_sample(self) -> None:
        try:
            inspect_shards(
                self.stream.shards,
                resolution=1,
                caption_column=self.stream.prepare_options["caption_column"],
                limit=1,
                max_samples=None,
                max_shards=None,
            )
        except UsageError as error:
            raise StreamError(str(error)) from None


class DropCounter:
    """Totals what this process's workers dropped: give it each batch, and read `total()` or print it."""

    def __init__(self):
        self._of_worker: dict[int, dict[str, int]] = {}

    def update(self, batch: dict) -> None:
        self._of_worker[batch["worker"]] = batch["dropped"]

    def total(self) -> dict[str, int]:
        """Reason to count, the most frequent first."""
        return dict(sum(map(Counter, self._of_worker.values()), Counter()).most_common())

    def __str__(self) -> str:
        return list_counts(self.total())


class ShardLoader(StatefulDataLoader):
    """A `StatefulDataLoader` that can also take the state of a run with other ranks, workers or shards."""

    def load_state_dict(self, state: dict) -> None:
        """Continue exactly behind the batch after which `state_dict` was called.

        If ranks, workers, shards, seed or shuffle window are not those of the saved run, that place does not exist:
        then continue at the start of the saved epoch, and log a warning.
        """
        saved = list(_places(state))
        layout = self.dataset.layout(self.num_workers)
        changed = {
            f"{name} {place['layout'].get(name)} -> {value}"
            for place in saved
            for name, value in layout.items()
            if place["layout"].get(name) != value
        }
        if saved and not changed:
            return super().load_state_dict(state)
        super().load_state_dict({})
        self.dataset.start_epoch = min((place["epoch"] for place in saved), default=0)
        logger.warning(
            "The shard stream cannot continue at the very sample where it was saved (%s); it continues at the "
            "start of epoch %d, so some samples come a second time.",
            ", ".join(sorted(changed)) or "the saved state holds no place",
            self.dataset.start_epoch,
        )

    def close(self) -> None:
        """End the worker processes, now and not when the garbage collector comes by; `state_dict` stays valid.

        If an error's traceback holds the iterator, its queues may be gone before it is: then each worker is waited
        for in vain, for five seconds, at some later time.
        """
        if self._iterator is not None and self.num_workers:
            self._iterator._shutdown_workers()


def _places(state: object) -> Iterator[dict]:
    """The states of all `StreamIterator`s in a loader's state, which differs with and without workers."""
    if isinstance(state, dict):
        if "layout" in state:
            yield state
        else:
            for value in state.values():
                yield from _places(value)


def make_loader(stream: ShardStream, num_workers: int) -> ShardLoader:
    """A loader over the stream; iterate it once, it is endless. Its state is that of the last batch it gave.

    Args:
        num_workers: processes that read and decode; 0 does it in this one.

    The tensors are pinned if there is a CUDA device. Nothing is drawn from torch's global generator.
    """
    if num_workers < 0:
        raise UsageError(f"--dataloader_num_workers is {num_workers}; give 0 or more.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_vital.*")  # torchdata 0.11 calls what torch 2.13 deprecates
        return ShardLoader(
            stream,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=2 if num_workers else None,
            # The workers of an endless stream live as long as its only iterator. "Persistent" ones add nothing to that,
            # and with pinned memory each costs five seconds at exit.
            persistent_workers=False,
            generator=torch.Generator(),  # without it, making the iterator draws from the global one
        )
