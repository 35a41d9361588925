"""Captioned pictures from WebDataset shards: an endless, seeded stream that knows its place.

    shards = expand_shards("data/{000..010}.tar")           # lcm_distill.data.shards
    preparation = Preparation(resolution=512)               # lcm_distill.data.preparation
    print(inspect_shards(shards, preparation))              # lcm_distill.data.preflight, before any model is loaded
    stream = ShardStream(shards=shards, preparation=preparation, batch_size=16, seed=0)
    loader = make_loader(stream, num_workers=4)             # a StatefulDataLoader
    for batch in loader: ...                                # epoch after epoch; the loop counts steps

Order. C = ranks x workers consumers share the shards. In each epoch the shards are permuted from (seed, epoch)
and dealt whole as long as they go round; the S mod C that are left over are cut into C slots each, dealt evenly,
so a consumer reads at most two of them. Over all consumers each sample comes once an epoch (`resampled`: each of S
shards drawn with replacement). A consumer permutes its samples inside consecutive blocks of up to
`shuffle_window`, from (seed, epoch, consumer, block).

Place. (epoch, start of the block, place in the block) is the whole state: restoring reads one block again, from
the byte of its shard where it starts. (A compressed shard is read from its beginning, but not decoded.)

Safety. Only pictures, captions and JSON are read; nothing in a shard is unpickled or handed to another program.
"""

import atexit
import functools
import hashlib
import logging
import os
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import IterableDataset, default_collate, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from lcm_distill.data.filters import is_filtered
from lcm_distill.data.preflight import inspect_shards
from lcm_distill.data.preparation import MixedShards, Preparation, Sample, prepare_sample
from lcm_distill.data.raw import UNREADABLE_SHARD, BadSample, RawSample, list_counts
from lcm_distill.data.shards import read_shard
from lcm_distill.errors import UsageError
from lcm_distill.flags import SHARDS_FLAG, StreamingFlags

logger = logging.getLogger(__name__)

LEAST_SEEN = 500  # samples that a process has seen before it judges how many are bad
WARN_AFTER_DROPS = 1024  # samples dropped in a row, and each doubling of that, are worth a message
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


@dataclass(frozen=True)
class ShardSlice:
    """What a consumer reads of a shard: the samples i with `low` <= (i + epoch) % consumers < `high`."""

    shard: int
    turn: int  # how often the shard has come in this epoch before: 0, unless shards are drawn with replacement
    low: int
    high: int


def deal_shards(
    num_shards: int, *, seed: int, epoch: int, consumer: int, consumers: int, resampled: bool = False
) -> list[ShardSlice]:
    """What a consumer reads in an epoch, in order.

    Over all consumers each sample comes exactly once; with `resampled`, those of `num_shards` shards drawn with
    replacement. The epoch turns the slots, so that a consumer that gets nothing of a tiny shard gets some the
    next time.
    """
    rng = _rng(seed, SHARD_ORDER, epoch)
    order = (rng.integers(num_shards, size=num_shards) if resampled else rng.permutation(num_shards)).tolist()
    seen: Counter = Counter()
    turns = []
    for shard in order:
        turns.append((shard, seen[shard]))
        seen[shard] += 1
    left_over = num_shards % consumers
    dealt, shared = turns[: num_shards - left_over], turns[num_shards - left_over :]
    parts = [ShardSlice(*turn, 0, consumers) for turn in dealt[consumer::consumers]]
    slot, end = consumer * left_over, (consumer + 1) * left_over
    while slot < end:
        number, low = divmod(slot, consumers)
        high = min(consumers, low + end - slot)
        parts.append(ShardSlice(*shared[number], low, high))
        slot += high - low
    return parts


class ShardStream(IterableDataset):
    """Endless batches of captioned pictures; see the module's docstring for their order.

    A batch is a dict of
        pixels: uint8 [batch_size, 3, resolution, resolution], 0 to 255, channels last in memory; or of encoded shards
        moments: float16 [batch_size, 2C, h, w], mean and standard deviation of the latents, and if the captions are
            encoded too, encoder_hidden_states: float16 [batch_size, tokens, dim], and text_embeds, [batch_size, dim]
        captions: list of str, "" with probability `proportion_empty_prompts`; of a sample's several captions one is
            drawn, anew in each epoch
        original_sizes: int64 [batch_size, 2], (height, width) by the JSON's original_height and original_width, else
            its height and width, else of the picture itself, in pixels
        crop_top_lefts: int64 [batch_size, 2], (top, left) of the crop in pixels of the resized picture, mirrored
            with it if it was flipped
        target_sizes: int64 [batch_size, 2], (height, width) of the pixels, or of what the latents decode to
        dropped: dict of reason to count: what this worker has dropped since the run began; see `DropCounter`
        worker: int, the worker that made the batch
    All batches are full: the last samples of an epoch share a batch with the first of the next. All draws come
    from (seed, epoch, place of the shard in the list, number of the sample in it), whoever reads the sample.

    Args:
        shards: as `expand_shards` gives them.
        preparation: how a sample becomes pixels and words.
        batch_size: samples in a batch (of one rank).
        seed: not negative.
        rank, world_size: of this process among those that train together.
        max_bad_fraction: 0 to 1; the stream ends with an error when more of the samples than that (of at least 500
            that this process and its workers have seen) cannot be used. What is left out on purpose is not bad.
        shuffle_window: samples in a shuffle block; a block also ends at 256 MiB. Each worker holds one in memory.
        resampled: draw shards with replacement.

    Raises:
        UsageError: from the constructor for an argument out of range; from the iterator for too many bad samples, or,
            in the words of `inspect_shards`, when it went through an epoch without a sample and no shard has one to
            give.
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
            raise UsageError(f"{SHARDS_FLAG} names no shard.")
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
        self.tally: torch.Tensor | None = None  # set by `make_loader`, for its workers to share
        names = [os.path.basename(shard.partition("?")[0]) for shard in shards]  # data may move between runs
        self._digest = hashlib.blake2b("\0".join(names).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

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
            "resampled": self.resampled,
        }


def _new_tally(workers: int) -> torch.Tensor:
    """int64 [workers, 2]: the samples good and bad that each worker has seen, in memory they all see."""
    return torch.zeros(max(1, workers), 2, dtype=torch.int64).share_memory_()


_PLACE = ("epoch", "block", "part", "sample", "offset", "place")


@dataclass
class _Read:
    """A sample as it was read, and where the one after it is."""

    raw: RawSample
    part: ShardSlice
    index: int  # its number in the shard
    next: tuple[int, int, int | None]  # (part, sample, offset)


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
        self.sample = 0  # at this sample of the shard,
        self.offset: int | None = 0  # which begins at this byte; None: not known, as in a compressed shard
        self.place = 0  # so many of the block's samples, in its shuffled order, are used up
        self.dropped: Counter = Counter()
        self._dropped_in_a_row = 0  # samples dropped since the last that was not
        self._tally = (_new_tally(workers) if stream.tally is None else stream.tally).numpy()  # quicker one by one
        self._samples = self._run()

    def state_dict(self) -> dict:
        place = {name: getattr(self, name) for name in _PLACE}
        return {"layout": self.stream.layout(self.workers), **place, "dropped": dict(self.dropped)}

    def load_state_dict(self, state: dict) -> None:
        assert state["layout"] == self.stream.layout(self.workers)  # `ShardLoader` sees to it
        for name in _PLACE:
            setattr(self, name, state[name])
        self.dropped = Counter(state["dropped"])
        self._samples = self._run()

    def __iter__(self) -> "StreamIterator":
        return self

    def __next__(self) -> dict:
        samples = list(islice(self._samples, self.stream.batch_size))
        # In a worker process it stacks into shared memory: nothing is copied on the way to the main process.
        tensors = {
            name: default_collate([torch.from_numpy(sample.arrays[name]) for sample in samples])
            for name in samples[0].arrays
        }
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

    def _run(self) -> Iterator[Sample]:
        """Sample after sample, for ever."""
        stream, barren = self.stream, 0
        while True:
            reader, delivered = self._read_epoch(), False
            while window := self._fill(reader):
                next_start = window[-1].next
                order = _rng(stream.seed, BLOCK_ORDER, self.epoch, self.consumer, self.block).permutation(len(window))
                while self.place < len(window):
                    drawn = int(order[self.place])
                    read, window[drawn] = window[drawn], None  # its bytes are not needed any more
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
                    delivered = True
                    self._count(bad=False)
                    yield sample
                (self.part, self.sample, self.offset), self.block, self.place = next_start, self.block + 1, 0
            self.epoch, self.block, self.part, self.sample, self.offset, self.place = self.epoch + 1, 0, 0, 0, 0, 0
            # Nothing for this consumer: bad luck (others have the good shards), or nothing to be had? Looking costs
            # up to a pass over the data, so do it after 1, 2, 4, 8, ... such epochs.
            barren = 0 if delivered else barren + 1
            if barren.bit_count() == 1:
                self._look_for_a_usable_sample()

    def _read_epoch(self) -> Iterator[_Read]:
        """What this consumer reads in the epoch, from the block's start on."""
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
        for number in range(start_part, len(parts)):
            part, first, index, offset = parts[number], 0, 0, 0
            if number == start_part and self.offset is not None:
                index, offset = self.sample, self.offset
            elif number == start_part:
                first = self.sample
            shard = self.stream.shards[part.shard]
            try:
                for raw in read_shard(shard, caption_column=caption_column, offset=offset):
                    if index >= first and part.low <= (index + epoch) % self.consumers < part.high:
                        following = (number + 1, 0, 0) if raw.last else (number, index + 1, raw.end)
                        yield _Read(raw, part, index, following)
                    index += 1
            except Exception as error:  # noqa: BLE001 - opener, decompressor and tar reader raise nearly anything
                if part.low <= (index + epoch) % self.consumers < part.high:  # one of those who share it counts it
                    logger.info("%s, sample %d: %s", shard, index, error)
                    self._drop(UNREADABLE_SHARD)

    def _fill(self, reader: Iterator[_Read]) -> list:
        """The next block: up to `shuffle_window` samples, or `WINDOW_BYTES`; [] at the end of the epoch."""
        window: list[_Read] = []
        nbytes = 0
        dropped_before = Counter(self.dropped)
        for read in reader:
            window.append(read)
            nbytes += read.raw.nbytes
            if len(window) >= self.stream.shuffle_window or nbytes >= WINDOW_BYTES:
                break
        if self.place:  # restored inside this block: what reading it again counted is in the saved counts already
            self.dropped = dropped_before
        return window

    def _drop(self, reason: str) -> None:
        self.dropped[reason] += 1
        self._dropped_in_a_row += 1
        if (
            self._dropped_in_a_row >= WARN_AFTER_DROPS and self._dropped_in_a_row & (self._dropped_in_a_row - 1) == 0
        ):  # whoever waits for a batch is told why
            what = "worker %d of %d: none of the last %d samples can be used; dropped so far: %s"
            logger.warning(what, self.worker, max(1, self.workers), self._dropped_in_a_row, list_counts(self.dropped))
        if not is_filtered(reason):
            self._count(bad=True)

    def _count(self, *, bad: bool) -> None:
        """Adds one sample to what this process has seen; `StreamError` if too many of them are bad."""
        self._tally[self.worker, int(bad)] += 1
        if not bad:
            self._dropped_in_a_row = 0
            return
        good_ones, bad_ones = self._tally.sum(axis=0).tolist()
        seen, most = good_ones + bad_ones, self.stream.max_bad_fraction
        if seen >= LEAST_SEEN and bad_ones > most * seen:
            whose = f" (those of worker {self.worker} of {self.workers})" if self.workers > 1 else ""
            raise StreamError(
                f"{bad_ones} of {seen} samples cannot be used, more than --max_bad_fraction {most:g} allows. "
                f"The reasons{whose}: {list_counts(self.dropped)}. Mend the shards, or raise --max_bad_fraction."
            )

    def _look_for_a_usable_sample(self) -> None:
        try:
            inspect_shards(self.stream.shards, self.stream.preparation, limit=1, max_samples=None, max_shards=None)
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

    leaving: torch.Tensor  # bool, in memory the workers see: whether they may end

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
            self.leaving.fill_(True)
            self._iterator._shutdown_workers()


def _places(state: object) -> Iterator[dict]:
    """The states of all `StreamIterator`s in a loader's state, which differs with and without workers."""
    if isinstance(state, dict):
        if "layout" in state:
            yield state
        else:
            for value in state.values():
                yield from _places(value)


def open_loader(
    flags: StreamingFlags, shards: list[str], preparation: Preparation, seed: int, accelerator: Accelerator
) -> ShardLoader:
    """`make_loader` over the `ShardStream` that the flags ask for, this process's share of it."""
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
    """A loader over the stream; iterate it once, it is endless. Its state is that of the last batch it gave.

    Args:
        num_workers: processes that read and decode; 0 does it in this one.

    The tensors are pinned if there is a CUDA device. Nothing is drawn from torch's global generator.
    """
    if num_workers < 0:
        raise UsageError(f"--dataloader_num_workers is {num_workers}; give 0 or more.")
    stream.tally = _new_tally(num_workers)
    leaving = torch.zeros((), dtype=torch.bool).share_memory_()
    atexit.register(leaving.fill_, True)  # before multiprocessing ends the workers
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_vital.*")  # torchdata 0.11 calls what torch 2.13 deprecates
        loader = ShardLoader(
            stream,
            batch_size=None,
            worker_init_fn=functools.partial(_heed_the_run_alone, leaving),
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=2 if num_workers else None,
            # The workers of an endless stream live as long as its only iterator. "Persistent" ones add nothing to that,
            # and with pinned memory each costs five seconds at exit.
            persistent_workers=False,
            generator=torch.Generator(),  # without it, making the iterator draws from the global one
        )
    loader.leaving = leaving
    return loader


def _heed_the_run_alone(leaving: torch.Tensor, worker: int) -> None:
    """Signals to all processes of a job are for the run to answer: its step needs the data, so the workers stay."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving else None)
