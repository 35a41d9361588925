"""Captioned pictures from WebDataset shards: an endless, seeded stream that can be resumed at any batch.

    shards = expand_shards("data/{000..010}.tar")           # lcm_distill.data.shards
    preparation = Preparation(resolution=512)               # lcm_distill.data.preparation
    print(inspect_shards(shards, preparation))              # lcm_distill.data.preflight, before any model is loaded
    stream = ShardStream(shards=shards, preparation=preparation, batch_size=16, seed=0)
    loader = make_loader(stream, num_workers=4)             # lcm_distill.data.loader: a StatefulDataLoader
    for batch in loader: ...                                # epoch after epoch; the loop counts steps

Order. C = ranks x workers consumers share S shards. In each epoch the shards are permuted from (seed, epoch), and
each consumer gets the same number of complete shards; the S mod C remaining ones are cut into C slots each, which are
dealt evenly, so a consumer reads parts of at most two of them. Over all consumers each sample comes once per epoch
(with `resampled`, each sample of S shards that are drawn with replacement). A consumer permutes its samples within
consecutive blocks of up to `shuffle_window`, from (seed, epoch, consumer, block).

State. (epoch, start of the block, place in the block) is the complete state: restoring it reads one block again, from
the byte of the shard at which it starts. (A compressed shard is read from its beginning, but not decoded.) The state
also has a digest of the block's samples and the size of the shard, by which a shard is recognized that has changed
since: then the stream continues at the sample of the same number, warns, and counts it.

Safety. Only pictures, latents, captions and JSON are read; nothing in a shard is unpickled or run.
"""

import contextlib
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from lcm_distill.data.filters import is_filtered
from lcm_distill.data.preflight import inspect_shards
from lcm_distill.data.preparation import MixedShards, Preparation, Sample, prepare_sample
from lcm_distill.data.raw import (
    CHANGED_SHARD,
    DOTTED_NAME,
    UNREADABLE_SHARD,
    BadSample,
    RawSample,
    list_counts,
    printable,
)
from lcm_distill.data.shards import read_shard
from lcm_distill.data.sources import local_path
from lcm_distill.errors import UsageError, brief, shown
from lcm_distill.flags import SHARDS_FLAG

logger = logging.getLogger(__name__)

MIN_SEEN = 500  # samples that a process must have seen before `max_bad_fraction` applies
WARN_AFTER_DROPS = 1024  # a warning after so many samples dropped in a row, and at each doubling
MAX_BLOCK_BYTES = 256 * 2**20  # a shuffle block ends here even if it has fewer than `shuffle_window` samples

SHARD_ORDER, BLOCK_ORDER, SAMPLE_DRAWS = range(3)  # keys of the random generators, so that no two give the same numbers


def _rng(seed: int, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *key))))


class StreamError(UsageError):
    """The shards give nothing to train on. The message is the same if it is raised in a worker process.

    A loader wraps a worker's error as "Caught ... in worker 0. Original Traceback ...", from which this takes the
    message alone.
    """

    def __init__(self, message: str):
        super().__init__(_message_alone(message, "StreamError"))


class SharingError(RuntimeError):
    """A worker could not put its batch into shared memory; the message is the same in the main process."""

    def __init__(self, message: str):
        super().__init__(_message_alone(message, "SharingError"))


def _message_alone(message: str, name: str) -> str:
    return message.rpartition(f"{__name__}.{name}: ")[2].strip()


@dataclass(frozen=True)
class ShardSlice:
    """The part of a shard that a consumer reads: the samples i with `low` <= (i + epoch) % consumers < `high`."""

    shard: int
    turn: int  # earlier occurrences of the shard in this epoch: 0, unless shards are drawn with replacement
    low: int
    high: int


def deal_shards(
    num_shards: int, *, seed: int, epoch: int, consumer: int, consumers: int, resampled: bool = False
) -> list[ShardSlice]:
    """The parts of shards that a consumer reads in an epoch, in order.

    Over all consumers each sample comes exactly once; with `resampled`, each sample of `num_shards` shards that are
    drawn with replacement. The slots rotate with the epoch, so that a consumer that gets no sample of a tiny shard
    gets one in a later epoch.
    """
    rng = _rng(seed, SHARD_ORDER, epoch)
    order = (rng.integers(num_shards, size=num_shards) if resampled else rng.permutation(num_shards)).tolist()
    seen: Counter = Counter()
    turns = []
    for shard in order:
        turns.append((shard, seen[shard]))
        seen[shard] += 1
    remaining = num_shards % consumers
    complete, shared = turns[: num_shards - remaining], turns[num_shards - remaining :]
    parts = [ShardSlice(*turn, 0, consumers) for turn in complete[consumer::consumers]]
    slot, end = consumer * remaining, (consumer + 1) * remaining
    while slot < end:
        number, low = divmod(slot, consumers)
        high = min(consumers, low + end - slot)
        parts.append(ShardSlice(*shared[number], low, high))
        slot += high - low
    return parts


class ShardStream(IterableDataset):
    """Endless batches of captioned pictures; see the module's docstring for their order.

    A batch is a dict of
        pixels: uint8 [batch_size, 3, resolution, resolution], 0 to 255, channels last in memory; not for encoded shards
        moments: for encoded shards, float16 [batch_size, 2C, h, w], mean and standard deviation of the latents; if the
            captions are encoded too, also encoder_hidden_states, float16 [batch_size, tokens, dim], and, for SDXL,
            text_embeds, float16 [batch_size, dim]
        captions: list of str, "" with probability `proportion_empty_prompts`; from several captions of a sample one is
            drawn, anew in each epoch
        original_sizes: int64 [batch_size, 2], (height, width) in pixels, from the JSON's original_height and
            original_width, else from its height and width, else of the picture itself
        crop_top_lefts: int64 [batch_size, 2], (top, left) of the crop in pixels of the resized picture, which is
            mirrored first if the sample is flipped
        target_sizes: int64 [batch_size, 2], (height, width) of the pixels, or of what the latents decode to
        dropped: dict of reason to count, of the samples that this worker has dropped since the run began; see
            `DropCounter`
        worker: int, the worker that made the batch
    All batches are full: the last samples of an epoch share a batch with the first of the next. All draws come from
    (seed, epoch, index of the shard in the list, index of the sample in it), whichever consumer reads the sample.

    Args:
        shards: as returned by `expand_shards`.
        preparation: how a sample becomes pixels and a caption.
        batch_size: samples per batch (of one rank).
        seed: not negative.
        rank, world_size: of this process among those that train together.
        max_bad_fraction: 0 to 1; the stream ends with an error if a larger share of the samples that this process and
            its workers have seen (at least 500) cannot be used. Samples left out by filters are not bad.
        shuffle_window: samples in a shuffle block; a block also ends at 256 MiB. Each worker keeps one in memory.
        resampled: draw shards with replacement.

    Raises:
        UsageError: from the constructor, an argument out of range; from the iterator, too many bad samples, or, with
            the message of `inspect_shards`, an epoch without a sample after which no shard has a usable one.
    """

    def __init__(
        self,
        *,
        shards: list[str],
        preparation: Preparation,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        max_bad_fraction: float = 1.0,
        shuffle_window: int = 1000,
        resampled: bool = False,
    ):
        assert 0 <= rank < world_size, (rank, world_size)
        if not shards:
            raise UsageError(f"{SHARDS_FLAG} names no shard; give at least one.")
        for flag, value, least in (
            ("--train_batch_size", batch_size, 1),
            ("--seed", seed, 0),
            ("--shuffle_window", shuffle_window, 1),
        ):
            if value < least:
                raise UsageError(f"{flag} is {value}; give {least} or more.")
        self.shards = list(shards)
        self.preparation = preparation
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.max_bad_fraction = max_bad_fraction
        self.shuffle_window = shuffle_window
        self.resampled = resampled
        self.start_epoch = 0
        self.tally: torch.Tensor | None = None  # set by `make_loader`; its workers share it
        self.reading: torch.Tensor | None = None  # so is this
        names = [os.path.basename(shard.partition("?")[0]) for shard in shards]  # base names: data may move
        self._digest = hashlib.blake2b("\0".join(names).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

    def __iter__(self) -> "StreamIterator":
        info = get_worker_info()
        return StreamIterator(self, worker=info.id if info else 0, workers=info.num_workers if info else 0)

    def layout(self, workers: int) -> dict:
        """What a saved state depends on: if any of these changes, it refers to other samples.

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
            "resampled": self.resampled,
        }


def new_tally(workers: int) -> torch.Tensor:
    """int64 [workers, 2]: the numbers of good and bad samples that each worker has seen; shared, if there are any."""
    tally = torch.zeros(max(1, workers), 2, dtype=torch.int64)
    return tally.share_memory_() if workers else tally


def new_reading(workers: int) -> torch.Tensor:
    """int64 [workers]: the index of the shard that each worker reads, -1 before the first; shared, if there are any."""
    reading = torch.full((max(1, workers),), -1, dtype=torch.int64)
    return reading.share_memory_() if workers else reading


_STATE = ("epoch", "block", "part", "sample", "offset", "place")
_IDENTITY = ("shard_size", "block_digest")  # not in the states of earlier versions


@dataclass
class _Read:
    """A sample as it was read, and where the next one begins."""

    raw: RawSample
    part: ShardSlice
    index: int  # of the sample in its shard
    next: tuple[int, int, int | None]  # (part, sample, offset)
    shard_size: int | None  # of the shard in which the next one begins; None: not known, or it begins with the next one


def _digest(block: list[_Read]) -> str:
    """Of which samples a block consists: their places, names and sizes."""
    digest = hashlib.blake2b(digest_size=8)
    for read in block:
        digest.update(
            f"{read.part.shard} {read.index} {read.raw.nbytes} {read.raw.key}\0".encode("utf-8", "surrogatepass")
        )
    return digest.hexdigest()


def _size_of(shard: str) -> int | None:
    """Bytes of a local shard."""
    path = local_path(shard)
    with contextlib.suppress(OSError, ValueError):
        return None if path is None else os.stat(path).st_size
    return None


class StreamIterator:
    """One consumer's pass through a `ShardStream`; `StatefulDataLoader` saves its state after each batch."""

    def __init__(self, stream: ShardStream, *, worker: int, workers: int):
        self.stream = stream
        self.worker = worker
        self.workers = workers
        self.consumer = stream.rank * max(1, workers) + worker
        self.consumers = stream.world_size * max(1, workers)
        self.epoch = stream.start_epoch
        self.block = 0  # index of the block in the epoch
        self.part = 0  # the block starts in this one of the parts from `deal_shards`,
        self.sample = 0  # at this sample of the shard,
        self.offset: int | None = 0  # which begins at this byte; None: not known, as in a compressed shard
        self.place = 0  # samples of the block, in its shuffled order, that are used up
        self.shard_size: int | None = None  # bytes of the shard in which the block starts, where known,
        self.block_digest: str | None = None  # and what the block contains; None: it has not been read yet
        self.dropped: Counter = Counter()
        self._not_compared: Counter = Counter()  # since this process began
        self._dropped_in_a_row = 0  # since the last usable sample
        self._tally = (new_tally(workers) if stream.tally is None else stream.tally).numpy()  # faster to index
        self._reading = (new_reading(workers) if stream.reading is None else stream.reading).numpy()
        self._samples = self._generate_samples()

    def state_dict(self) -> dict:
        state = {name: getattr(self, name) for name in _STATE + _IDENTITY}
        return {"layout": self.stream.layout(self.workers), **state, "dropped": dict(self.dropped)}

    def load_state_dict(self, state: dict) -> None:
        assert state["layout"] == self.stream.layout(self.workers)  # `ShardLoader` checks it
        for name in _STATE:
            setattr(self, name, state[name])
        for name in _IDENTITY:
            setattr(self, name, state.get(name))
        self.dropped = Counter(state["dropped"])
        self._samples = self._generate_samples()

    def __iter__(self) -> "StreamIterator":
        return self

    def __next__(self) -> dict:
        samples = list(islice(self._samples, self.stream.batch_size))
        # In a worker process `default_collate` stacks into shared memory, which saves a copy to the main process.
        try:
            tensors = {
                name: default_collate([torch.from_numpy(sample.arrays[name]) for sample in samples])
                for name in samples[0].arrays
            }
        except RuntimeError as error:
            if get_worker_info() is None:
                raise
            raise SharingError(brief(error)) from None
        if "pixels" in tensors:
            tensors["pixels"] = tensors["pixels"].permute(0, 3, 1, 2)
        return {
            **tensors,
            "captions": [sample.caption for sample in samples],
            "original_sizes": torch.tensor([sample.original_size for sample in samples]),
            "crop_top_lefts": torch.tensor([sample.crop_top_left for sample in samples]),
            "target_sizes": torch.full((len(samples), 2), self.stream.preparation.resolution),
            "dropped": dict(self.dropped),
            "worker": self.worker,
        }

    def _generate_samples(self) -> Iterator[Sample]:
        """Yields sample after sample, endlessly."""
        stream, empty_epochs = self.stream, 0
        while True:
            reader, is_empty = self._read_epoch(), True
            while block := self._read_block(reader):
                digest = _digest(block)
                # Restored inside this block, which was another one?
                if self.block_digest not in (None, digest) or self.place > len(block):
                    self._begin_anew("its samples are others")
                    reader = self._read_epoch()
                    continue
                self.block_digest = digest
                next_start, next_size = block[-1].next, block[-1].shard_size
                order = _rng(stream.seed, BLOCK_ORDER, self.epoch, self.consumer, self.block).permutation(len(block))
                while self.place < len(block):
                    chosen = int(order[self.place])
                    read, block[chosen] = block[chosen], None  # its bytes are not needed any more
                    self.place += 1
                    key = (read.part.shard, read.index) + ((read.part.turn,) if read.part.turn else ())
                    draws = _rng(stream.seed, SAMPLE_DRAWS, self.epoch, *key).random(5)
                    try:
                        sample = prepare_sample(read.raw, stream.preparation, draws=draws)
                    except BadSample as bad:
                        self._drop(bad.reason)
                        continue
                    except MixedShards as error:
                        raise StreamError(f"{error} It is in {stream.shards[read.part.shard]}.") from None
                    is_empty = False
                    self._count(bad=False)
                    self._note_not_compared(sample)
                    yield sample
                (self.part, self.sample, self.offset), self.block, self.place = next_start, self.block + 1, 0
                self.shard_size, self.block_digest = next_size, None
            if self.block_digest is not None or self.place:  # restored inside a block of which nothing is left
                self._begin_anew("its samples are missing")
                continue
            self.epoch, self.block, self.part, self.sample, self.offset, self.place = self.epoch + 1, 0, 0, 0, 0, 0
            self.shard_size = None
            # This consumer got no sample: do others have the good shards, or are there none? Checking costs up to one
            # pass over the data, so do it after 1, 2, 4, 8, ... such epochs.
            empty_epochs = empty_epochs + 1 if is_empty else 0
            if empty_epochs.bit_count() == 1:
                self._check_for_usable_samples()

    def _begin_anew(self, why: str) -> None:
        """Continues where the restored state says, by the number of the sample, in a shard that has changed since."""
        shard = self.stream.shards[self._parts()[self.part].shard]
        logger.warning(
            "worker %d of %d: %s, or a shard read after it, is not what it was when the checkpoint was saved (%s): it "
            "has changed, or cannot be read now. The stream continues at its sample %d, so some samples may be missing "
            "or come a second time.",
            self.worker,
            max(1, self.workers),
            printable(shard),
            why,
            self.sample,
        )
        self.offset, self.place, self.shard_size, self.block_digest = None, 0, None, None
        self._drop(CHANGED_SHARD)

    def _parts(self) -> list[ShardSlice]:
        """What this consumer reads in the epoch."""
        return deal_shards(
            len(self.stream.shards),
            seed=self.stream.seed,
            epoch=self.epoch,
            consumer=self.consumer,
            consumers=self.consumers,
            resampled=self.stream.resampled,
        )

    def _read_epoch(self) -> Iterator[_Read]:
        """Yields what this consumer reads in the epoch, from the start of the block on."""
        epoch, start_part = self.epoch, self.part
        caption_column = self.stream.preparation.caption_column
        parts = self._parts()
        part, first, index, offset = ShardSlice(0, 0, 0, 0), 0, 0, 0

        def is_own() -> bool:
            """Whether this consumer reads, and counts what is wrong with, the sample `index` of the shard."""
            return index >= first and part.low <= (index + epoch) % self.consumers < part.high

        def drop_dotted(_: str) -> None:
            if is_own():
                self._drop(DOTTED_NAME)

        for number in range(start_part, len(parts)):
            part, first, index, offset = parts[number], 0, 0, 0
            if number == start_part and self.offset is not None:
                index, offset = self.sample, self.offset
            elif number == start_part:
                first = self.sample
            shard = self.stream.shards[part.shard]
            size = _size_of(shard)
            if number == start_part and self.shard_size not in (None, size):
                self._begin_anew(f"it has {size} bytes instead of {self.shard_size}")
                yield from self._read_epoch()
                return
            begun = index
            self._reading[self.worker] = part.shard
            try:
                for raw in read_shard(shard, caption_column=caption_column, on_dotted=drop_dotted, offset=offset):
                    if is_own():
                        following = (number + 1, 0, 0) if raw.last else (number, index + 1, raw.end)
                        yield _Read(raw, part, index, following, None if raw.last else size)
                    index += 1
            except Exception as error:  # noqa: BLE001 - opener, decompressor and tar reader raise nearly anything
                if is_own():  # only one of its consumers counts it
                    logger.info("%s, sample %d: %s", shown(shard), index, shown(str(error)))
                    self._drop(UNREADABLE_SHARD)
                continue
            if offset and index == begun:  # restored at a sample, and there is none
                self._begin_anew("it ends before that place")
                yield from self._read_epoch()
                return

    def _read_block(self, reader: Iterator[_Read]) -> list:
        """The next block: up to `shuffle_window` samples or `MAX_BLOCK_BYTES`; [] at the end of the epoch."""
        block: list[_Read] = []
        nbytes = 0
        dropped_before = Counter(self.dropped)
        for read in reader:
            block.append(read)
            nbytes += read.raw.nbytes
            if len(block) >= self.stream.shuffle_window or nbytes >= MAX_BLOCK_BYTES:
                break
        if self.place:  # restored inside this block: the saved counts already include what reading it counts
            self.dropped = dropped_before
        return block

    def _drop(self, reason: str) -> None:
        self.dropped[reason] += 1
        self._dropped_in_a_row += 1
        # The run may be waiting for a batch: log why.
        if self._dropped_in_a_row >= WARN_AFTER_DROPS and self._dropped_in_a_row.bit_count() == 1:
            logger.warning(
                "worker %d of %d: none of the last %d samples can be used; dropped so far: %s",
                self.worker,
                max(1, self.workers),
                self._dropped_in_a_row,
                list_counts(self.dropped),
            )
        if not is_filtered(reason):
            self._count(bad=True)

    def _note_not_compared(self, sample: Sample) -> None:
        """Counts the filters that could not judge a sample; logs the first one, and then the counts now and then."""
        for reason in sample.not_compared:
            self._not_compared[reason] += 1
            count = self._not_compared[reason]
            if count == 1 or (count >= WARN_AFTER_DROPS and count.bit_count() == 1):
                logger.warning(
                    "worker %d of %d: samples pass whose value a filter cannot compare; so far: %s",
                    self.worker,
                    max(1, self.workers),
                    list_counts(self._not_compared),
                )

    def _count(self, *, bad: bool) -> None:
        """Counts one more sample of this process; `StreamError` if too many of them are bad."""
        self._tally[self.worker, int(bad)] += 1
        if not bad:
            self._dropped_in_a_row = 0
            return
        num_good, num_bad = self._tally.sum(axis=0).tolist()
        seen, allowed = num_good + num_bad, self.stream.max_bad_fraction
        if seen >= MIN_SEEN and num_bad > allowed * seen:
            whose = f" (of worker {self.worker} of {self.workers})" if self.workers > 1 else ""
            raise StreamError(
                f"{num_bad} of {seen} samples cannot be used, more than --max_bad_fraction {allowed:g} allows. "
                f"The reasons{whose}: {list_counts(self.dropped)}. Fix the shards, or raise --max_bad_fraction."
            )

    def _check_for_usable_samples(self) -> None:
        """`StreamError`, with the preflight's message, if no shard has a usable sample."""
        try:
            inspect_shards(self.stream.shards, self.stream.preparation, limit=1, max_samples=None, max_shards=None)
        except UsageError as error:
            raise StreamError(str(error)) from None


class DropCounter:
    """The total of what this process's workers dropped: `update` it with each batch; read `total()`, or print it."""

    def __init__(self):
        self._of_worker: dict[int, dict[str, int]] = {}

    def update(self, batch: dict) -> None:
        self._of_worker[batch["worker"]] = batch["dropped"]

    def total(self) -> dict[str, int]:
        """Reason to count, the most frequent first."""
        return dict(sum(map(Counter, self._of_worker.values()), Counter()).most_common())

    def __str__(self) -> str:
        return list_counts(self.total())
