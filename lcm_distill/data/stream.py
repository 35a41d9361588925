"""Captioned pictures from WebDataset shards: an endless, seeded stream that can be resumed at any batch.

    shards = expand_shards("data/{000..010}.tar")           # lcm_distill.data.shards
    preparation = Preparation(resolution=512)               # lcm_distill.data.preparation
    print(inspect_shards(shards, preparation))              # lcm_distill.data.preflight, before any model is loaded
    stream = ShardStream(shards=shards, preparation=preparation, batch_size=16, seed=0)
    loader = make_loader(stream, num_workers=4)             # a StatefulDataLoader
    for batch in loader: ...                                # epoch after epoch; the loop counts steps

Order. C = ranks x workers consumers share S shards. In each epoch the shards are permuted from (seed, epoch), and
each consumer gets the same number of complete shards; the S mod C remaining ones are cut into C slots each, which are
dealt evenly, so a consumer reads parts of at most two of them. Over all consumers each sample comes once per epoch
(with `resampled`, each sample of S shards that are drawn with replacement). A consumer permutes its samples within
consecutive blocks of up to `shuffle_window`, from (seed, epoch, consumer, block).

State. (epoch, start of the block, place in the block) is the complete state: restoring it reads one block again, from
the byte of the shard at which it starts. (A compressed shard is read from its beginning, but not decoded.)

Workers that fail. When a worker is killed, or finds no shared memory for its batch, the loader's iterator raises a
`WorkerError`. `ShardLoader.rest` then reads what follows in the main process, so that a step can be finished and saved.

Safety. Only pictures, latents, captions and JSON are read; nothing in a shard is unpickled or run.
"""

import atexit
import contextlib
import functools
import hashlib
import itertools
import logging
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import re
import resource
import shutil
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import IterableDataset, default_collate, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from lcm_distill.data.filters import is_filtered
from lcm_distill.data.preflight import inspect_shards
from lcm_distill.data.preparation import MixedShards, Preparation, Sample, prepare_sample
from lcm_distill.data.raw import DOTTED_NAME, UNREADABLE_SHARD, BadSample, RawSample, list_counts
from lcm_distill.data.shards import read_shard
from lcm_distill.errors import UsageError, WorkerError, brief
from lcm_distill.flags import SHARDS_FLAG, StreamingFlags

logger = logging.getLogger(__name__)

MIN_SEEN = 500  # samples that a process must have seen before `max_bad_fraction` applies
WARN_AFTER_DROPS = 1024  # a warning after so many samples dropped in a row, and at each doubling
MAX_BLOCK_BYTES = 256 * 2**20  # a shuffle block ends here even if it has fewer than `shuffle_window` samples

PREFETCHED = 2  # batches that each worker has ready, or is making
SHARED_MEMORY = "/dev/shm"  # where Linux keeps it

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


class _SharingError(RuntimeError):
    """A worker could not put its batch into shared memory; the message is the same in the main process."""

    def __init__(self, message: str):
        super().__init__(_message_alone(message, "_SharingError"))


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


def _new_tally(workers: int) -> torch.Tensor:
    """int64 [workers, 2]: the numbers of good and bad samples that each worker has seen; shared, if there are any."""
    tally = torch.zeros(max(1, workers), 2, dtype=torch.int64)
    return tally.share_memory_() if workers else tally


_STATE = ("epoch", "block", "part", "sample", "offset", "place")


@dataclass
class _Read:
    """A sample as it was read, and where the next one begins."""

    raw: RawSample
    part: ShardSlice
    index: int  # of the sample in its shard
    next: tuple[int, int, int | None]  # (part, sample, offset)


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
        self.dropped: Counter = Counter()
        self._not_compared: Counter = Counter()  # since this process began
        self._dropped_in_a_row = 0  # since the last usable sample
        self._tally = (_new_tally(workers) if stream.tally is None else stream.tally).numpy()  # faster to index
        self._samples = self._generate_samples()

    def state_dict(self) -> dict:
        state = {name: getattr(self, name) for name in _STATE}
        return {"layout": self.stream.layout(self.workers), **state, "dropped": dict(self.dropped)}

    def load_state_dict(self, state: dict) -> None:
        assert state["layout"] == self.stream.layout(self.workers)  # `ShardLoader` checks it
        for name in _STATE:
            setattr(self, name, state[name])
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
            raise _SharingError(brief(error)) from None
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
                next_start = block[-1].next
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
            self.epoch, self.block, self.part, self.sample, self.offset, self.place = self.epoch + 1, 0, 0, 0, 0, 0
            # This consumer got no sample: do others have the good shards, or are there none? Checking costs up to one
            # pass over the data, so do it after 1, 2, 4, 8, ... such epochs.
            empty_epochs = empty_epochs + 1 if is_empty else 0
            if empty_epochs.bit_count() == 1:
                self._check_for_usable_samples()

    def _read_epoch(self) -> Iterator[_Read]:
        """Yields what this consumer reads in the epoch, from the start of the block on."""
        epoch, start_part = self.epoch, self.part
        caption_column = self.stream.preparation.caption_column
        parts = deal_shards(
            len(self.stream.shards),
            seed=self.stream.seed,
            epoch=epoch,
            consumer=self.consumer,
            consumers=self.consumers,
            resampled=self.stream.resampled,
        )
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
            try:
                for raw in read_shard(shard, caption_column=caption_column, on_dotted=drop_dotted, offset=offset):
                    if is_own():
                        following = (number + 1, 0, 0) if raw.last else (number, index + 1, raw.end)
                        yield _Read(raw, part, index, following)
                    index += 1
            except Exception as error:  # noqa: BLE001 - opener, decompressor and tar reader raise nearly anything
                if is_own():  # only one of its consumers counts it
                    logger.info("%s, sample %d: %s", shard, index, error)
                    self._drop(UNREADABLE_SHARD)

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


class ShardLoader(StatefulDataLoader):
    """A `StatefulDataLoader` that can also load the state of a run with other ranks, workers or shards.

    Its iterator ends with a `WorkerError` when its workers fail; `rest` is then what would have followed.
    """

    may_exit: torch.Tensor  # bool, shared with the workers: whether they obey SIGTERM
    reports: Connection  # a worker sends why it ends itself
    position: dict | None = None  # the state after the last batch; None before there are workers, unless one was loaded
    _rest: int | None = None  # batches that `rest` has yielded; None: it is not used

    def __iter__(self) -> Iterator[dict]:
        """Yields the batches. `StreamError` if the shards give none, `WorkerError` if the workers fail."""
        if not self.num_workers:
            yield from super().__iter__()
            return
        try:
            # As many as torchdata's iterator makes: if one of its own fails, it prints a traceback when it is freed.
            del [multiprocessing.Queue() for _ in range(self.num_workers + 2)][:]
            batches = super().__iter__()
            self.position = super().state_dict()
        except Exception as error:  # noqa: BLE001 - semaphores, processes and their memory raise nearly anything
            self._fail(error)
        with _WorkerDeaths() as deaths:
            while True:
                try:
                    with deaths.awaited():
                        batch = next(batches)
                    self.position = super().state_dict()
                except Exception as error:  # noqa: BLE001 - so do workers, their queue and its memory
                    self._fail(error)
                yield batch

    def _fail(self, error: Exception) -> NoReturn:
        """Raises a `WorkerError` for `error`, or `error` itself if it is not about processes and memory."""
        of_code = str(error).startswith("Caught ") and not isinstance(error, (_SharingError, MemoryError))
        if of_code or isinstance(error, (UsageError, AssertionError)):
            raise error
        with _WorkerDeaths():  # others may die meanwhile
            raise WorkerError(self._describe(error)) from None

    def rest(self) -> Iterator[dict]:
        """Yields the batches after the last one, read by this process, bit for bit those of the workers, which it ends.

        For a run whose workers have failed: it is slow, but needs no shared memory. `state_dict` follows it.
        """
        self.close()
        count, first, skipped = self.num_workers, 0, 0
        streams = [StreamIterator(self.dataset, worker=worker, workers=count) for worker in range(count)]
        if self.position is not None:
            snapshot, skipped = self.position[_SNAPSHOT], self.position[_AFTER_SNAPSHOT]
            for stream, state in zip(streams, _find_states(snapshot), strict=True):
                stream.load_state_dict(state)
            first = snapshot[_LAST_WORKER] + 1
        self._rest = 0
        in_turn = (next(streams[turn % count]) for turn in itertools.count(first))
        for batch in islice(in_turn, skipped, None):
            self._rest += 1
            yield batch

    def state_dict(self) -> dict:
        """The state after the last batch."""
        if self._rest is None:
            return super().state_dict()
        # A loader that is given this state leaves out so many batches after the snapshot.
        position = self.position
        return {} if position is None else position | {_AFTER_SNAPSHOT: position[_AFTER_SNAPSHOT] + self._rest}

    def load_state_dict(self, state: dict) -> None:
        """Continues exactly after the batch at which `state_dict` was called.

        If ranks, workers, shards, seed or shuffle window are not those of the saved run, that position does not
        exist: then it continues at the start of the saved epoch, and logs a warning.
        """
        saved = list(_find_states(state))
        layout = self.dataset.layout(self.num_workers)
        changed = {
            f"{name} {of_worker['layout'].get(name)} -> {value}"
            for of_worker in saved
            for name, value in layout.items()
            if of_worker["layout"].get(name) != value
        }
        if saved and not changed:
            self.position = state if self.num_workers else None
            return super().load_state_dict(state)
        super().load_state_dict({})
        self.dataset.start_epoch = min((of_worker["epoch"] for of_worker in saved), default=0)
        logger.warning(
            "The shard stream cannot continue exactly where it was saved (%s); it continues at the start of epoch %d, "
            "so some samples come a second time.",
            ", ".join(sorted(changed)) or "the saved state has no position",
            self.dataset.start_epoch,
        )

    def close(self) -> None:
        """Ends the worker processes now, instead of at garbage collection; `state_dict` stays valid.

        Otherwise, if the traceback of an error holds the iterator, its queues may be destroyed before it is: then,
        at some later time, five seconds are spent waiting for each worker.
        """
        if self._iterator is not None and self.num_workers:
            self.may_exit.fill_(True)
            with _WorkerDeaths():  # one that fails only now does not matter
                self._iterator._shutdown_workers()

    def _describe(self, error: BaseException) -> str:
        """Why the workers have failed with `error`, with the remedy."""
        report, workers = "", getattr(self._iterator, "_workers", [])
        if not isinstance(error, _SharingError):  # connections of a process that dies end just before it
            multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1)
        while self.reports.poll():
            report = self.reports.recv()
        exits = [worker.exitcode for worker in workers if worker.exitcode]
        return describe_failure(error, report, exits, self.num_workers, self.dataset.shuffle_window)


# The names of these parts in the state of a `StatefulDataLoader`.
_SNAPSHOT, _LAST_WORKER, _AFTER_SNAPSHOT = "_snapshot", "_last_yielded_worker_id", "_steps_since_snapshot"


class _WorkerDeaths:
    """Lets torch report a worker's death only where a batch is awaited.

    Its handler of SIGCHLD raises wherever the main thread is, in the middle of an optimizer's step, too, which leaves
    weights that are neither those before nor those after the step. The loader's iterator has to exist before.
    """

    def __enter__(self) -> "_WorkerDeaths":
        self._report: Any = signal.getsignal(signal.SIGCHLD)
        self._awaited = False
        self._set(self._on_death)
        return self

    def _set(self, handler: Any) -> None:
        if callable(self._report) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)

    def _on_death(self, number: int, frame: Any) -> None:
        if self._awaited:
            self._report(number, frame)

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Inside, a worker that has died, now or since the last time, raises torch's RuntimeError."""
        self._awaited = True
        try:
            if callable(self._report):
                self._report(signal.SIGCHLD, None)
            yield
        finally:
            self._awaited = False

    def __exit__(self, *error: Any) -> None:
        if signal.getsignal(signal.SIGCHLD) == self._on_death:
            self._set(self._report)


def describe_failure(
    error: BaseException, report: str, exits: Sequence[int], workers: int, shuffle_window: int = 1000
) -> str:
    """Why data workers have failed, in a message with the remedy.

    Args:
        error: what the main process found.
        report: what a worker found, if it did.
        exits: the exit codes of those that died; of one that died of a signal, the signal's negative number.
        workers: how many there were.
    """
    given, fewer = f"--dataloader_num_workers {workers}", "pass a smaller --dataloader_num_workers"
    found = report or (str(error) if isinstance(error, _SharingError) else brief(error))
    if re.search("Too many open files|ancdata", found):
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"{given}: too many files are open at once ({found}). Raise the limit, {most} (ulimit -n), or {fewer}."
    if isinstance(error, _SharingError) or -signal.SIGBUS in exits or re.search(_SHARING, found):
        return (
            f"{given}: the data workers have no shared memory left ({'SIGBUS' if -signal.SIGBUS in exits else found}"
            f"{_size_of_shared_memory()}). Start the container with more, such as docker run --shm-size 8g, or {fewer} "
            "or --train_batch_size."
        )
    killed = -signal.SIGKILL in exits or "signal: Killed" in found
    if killed or isinstance(error, MemoryError) or re.search("Cannot allocate|temporarily unavailable", found):
        what = "was killed (SIGKILL), most likely since memory ran out" if killed else f"has no memory ({found})"
        return (
            f"{given}: a data worker {what}. Give the job more memory, or {fewer} or --shuffle_window (now "
            f"{shuffle_window}: each worker keeps so many samples, up to {MAX_BLOCK_BYTES // 2**20} MiB)."
        )
    how = signal.Signals(-exits[0]).name if exits and exits[0] < 0 else found
    return f"{given}: a data worker has failed ({how}). To see why, pass --dataloader_num_workers 0, which is slower."


# In what torch and multiprocessing raise where shared memory is missing: files that do not fit, cannot be opened, …
_SHARING = re.compile("shared memory|shm|No space left|mmap|Bus error|Function not implemented|Permission denied")


def _size_of_shared_memory() -> str:
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(SHARED_MEMORY)
        return f"; {SHARED_MEMORY} has {usage.total / 1e6:.3g} MB, of which {usage.free / 1e6:.3g} are free"
    return ""


def check_shared_memory(flags: StreamingFlags, preparation: Preparation, processes: int = 1) -> None:
    """`UsageError` if the batches that workers keep ready do not fit into this machine's shared memory.

    `processes` is how many ranks have workers on this machine. A container has only 64 MB unless it is given more.
    Systems without /dev/shm are not checked.
    """
    workers, encoding = flags.dataloader_num_workers or 0, preparation.encoding
    if encoding is None:
        sample = 3 * preparation.resolution**2
    else:
        sample = 2 * sum(map(math.prod, [encoding.moments, *encoding.embeddings.values()]))  # float16
    batch = PREFETCHED * processes * sample * flags.train_batch_size  # for each worker of a process
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        return
    if usage.total and batch * workers > usage.free:
        raise UsageError(
            f"--dataloader_num_workers {workers}: the data workers keep up to {batch * workers / 1e6:.3g} MB of "
            f"batches in shared memory{f' (of {processes} processes)' if processes > 1 else ''}, but {SHARED_MEMORY} "
            f"has only {usage.free / 1e6:.3g} MB free. Start the container with more (docker run --shm-size "
            f"{math.ceil(2 * batch * workers / 2**30)}g), or pass --dataloader_num_workers {usage.free // batch}"
            f"{' or a smaller --train_batch_size' if flags.train_batch_size > 1 else ''}."
        )


def _find_states(state: object) -> Iterator[dict]:
    """The states of all `StreamIterator`s in a loader's state, whose structure depends on the number of workers."""
    if isinstance(state, dict):
        if "layout" in state:
            yield state
        else:
            for value in state.values():
                yield from _find_states(value)


def open_loader(
    flags: StreamingFlags, shards: list[str], preparation: Preparation, seed: int, accelerator: Accelerator
) -> ShardLoader:
    """A loader over this process's share of the `ShardStream` that the flags describe, its workers' number included."""
    assert flags.dataloader_num_workers is not None  # `Run` chooses it
    stream = ShardStream(
        shards=shards,
        preparation=preparation,
        batch_size=flags.train_batch_size,
        seed=seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        max_bad_fraction=flags.max_bad_fraction,
        shuffle_window=flags.shuffle_window,
        resampled=flags.resampled_shards,
    )
    return make_loader(stream, flags.dataloader_num_workers)


def make_loader(stream: ShardStream, num_workers: int) -> ShardLoader:
    """A loader over the stream, to be iterated once, since it is endless. Its state is that after the last batch.

    Tensors are pinned if there is a CUDA device. Nothing is drawn from torch's global generator.

    Args:
        num_workers: processes that read and decode; with 0 this process does.
    """
    if num_workers < 0:
        raise UsageError(f"--dataloader_num_workers is {num_workers}; give 0 or more.")
    may_exit = torch.zeros((), dtype=torch.bool)
    reports, report = multiprocessing.Pipe(duplex=False)
    try:
        stream.tally = _new_tally(num_workers)
        if num_workers:
            may_exit.share_memory_()
    except RuntimeError as error:
        raise WorkerError(describe_failure(error, brief(error), [], num_workers)) from None
    atexit.register(may_exit.fill_, True)  # before multiprocessing ends the workers
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_vital.*")  # torchdata 0.11 calls what torch 2.13 deprecates
        loader = ShardLoader(
            stream,
            batch_size=None,
            worker_init_fn=functools.partial(_prepare_worker, may_exit, report),
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=PREFETCHED if num_workers else None,
            # The workers of an endless stream live as long as its only iterator. Making them persistent adds nothing,
            # and with pinned memory each then costs five seconds at exit.
            persistent_workers=False,
            generator=torch.Generator(),  # otherwise creating the iterator draws from the global one
        )
    loader.may_exit, loader.reports = may_exit, reports
    return loader


def _prepare_worker(may_exit: torch.Tensor, report: Connection, worker: int) -> None:
    """Ignores signals to all processes of a job, since the run handles them and needs data for its last step.

    Also ends the worker, with a `report`, when the thread that sends its batches fails.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if may_exit else None)

    def end(error: BaseException, batch: object) -> NoReturn:
        report.send(brief(error))
        os._exit(1)

    # The method only prints a traceback, and the batch is lost: the main process would wait for it forever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]
    # Only the thread that hands out memory calls it, with an error that the main process, which asked, has too.
    sys.excepthook = lambda *error: None
