"""Hostile shards (`hostile_shards.py`): all good samples are delivered and the rest is counted; nothing hangs, takes
much memory, or is executed.

Each shard is read in a forked process of its own, which ends itself when it gets stuck.
"""

import faulthandler
import io
import itertools
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import tarfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hostile_shards import AFTER, END, MAKERS, TOUCHED, Hostile, Tar, Touches, write_shards

from lcm_distill.data.loader import make_loader
from lcm_distill.data.preflight import inspect_shards
from lcm_distill.data.preparation import Preparation
from lcm_distill.data.shards import count_samples
from lcm_distill.data.stream import ShardStream, StreamIterator, deal_shards

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc"), pytest.mark.hostile("shards")]

PREPARATION = Preparation(resolution=16)
SECONDS = 20  # for each way to read a shard
MEMORY = 600 * 2**20  # bytes that reading one may take
ADDRESS_SPACE = 6 * 2**30  # bytes that may be requested, so that a failure does not exhaust the memory of the machine
GOOD = "nothing"  # is wrong with it

IMPORTED = (".py", ".pyc", ".so")
FORBIDDEN = ("pickle.", "subprocess.", "socket.", "shutil.", "os.exec", "os.fork", "os.posix_spawn", "os.system")
FORBIDDEN += ("os.link", "os.symlink", "os.mkdir", "os.remove", "os.rename", "os.chmod", "os.truncate", "os.utime")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> dict[str, Hostile]:
    return {shard.name: shard for shard in write_shards(tmp_path_factory.mktemp("hostile"))}


def write_good(folder: Path, name: str) -> Hostile:
    tar = Tar(name)
    tar.surround(b"", b"")
    path = folder / f"{name}.tar"
    path.write_bytes(tar.take() + END)
    return Hostile(str(path), GOOD, tar.captions, tar.drops)


def make_stream(shards: list[str], seed: int) -> ShardStream:
    # In file order, so that it is known what an epoch drops before its first sample.
    return ShardStream(shards=shards, preparation=PREPARATION, batch_size=1, seed=seed, shuffle_window=1)


def accounts_for(dropped: dict[str, int], drops: Iterable[tuple[str | None, ...]]) -> bool:
    """Whether these are the counts for some choice of one reason for each drop."""
    drops = list(drops)
    for reason in {*dropped, *(reason for drop in drops for reason in drop if reason is not None)}:
        least, most = sum(drop == (reason,) for drop in drops), sum(reason in drop for drop in drops)
        if not least <= dropped.get(reason, 0) <= most:
            return False
    return sum(None not in drop for drop in drops) <= sum(dropped.values()) <= len(drops)


# -------------------------------------------------------------------------------------------------- one by one


def forked(work: Callable, *arguments, seconds: float) -> tuple[list, int | None]:
    """What `work(send, *arguments)` sent from a process of its own, and that one's exit code."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(sender.send, *arguments))
    process.start()
    sender.close()
    sent = []
    try:
        while receiver.poll(seconds):
            sent.append(receiver.recv())
    except EOFError:
        process.join(seconds)
    process.kill()
    process.join()
    return sent, process.exitcode


def watch(allowed: set[str]) -> set[str]:
    """The forbidden actions of this process from now on; it may read the `allowed` files, and import."""
    forbidden = set()

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(FORBIDDEN):
            forbidden.add(f"{event} {arguments}")
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes or not (path in allowed or os.fsdecode(path).endswith(IMPORTED)):
                forbidden.add(f"open {path!r}")

    sys.addaudithook(hook)
    return forbidden


@dataclass
class Reading:
    """The results of reading a shard, as far as its reader got."""

    usable: int = 0
    report: str = ""
    seen_dropped: dict[str, int] | None = None  # by the preflight
    captions: Counter[str] | None = None
    dropped: dict[str, int] | None = None  # by the stream
    counted: int | None = None
    memory: int = 0
    forbidden: tuple[str, ...] = ()
    error: str = ""


def read(send: Callable, shards: list[str], seed: int, folder: Path) -> None:
    """Reads shards in each of the three ways, with a time limit, and sends the results after each."""
    os.chdir(folder)
    logging.disable()
    warnings.simplefilter("ignore")
    size, resident = (int(pages) * resource.getpagesize() for pages in Path("/proc/self/statm").read_text().split()[:2])
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, size + ADDRESS_SPACE))
    reading = Reading()

    def look() -> None:
        report = inspect_shards(shards, PREPARATION, limit=10**9, max_samples=None, max_shards=None)
        reading.usable, reading.seen_dropped, reading.report = report.usable, dict(report.dropped), str(report)

    def stream() -> None:
        captions, states, batch = run(None)
        reading.captions, reading.dropped = Counter(captions), batch["dropped"]
        middle = len(states) // 2
        if shards[0].endswith(".tar"):  # compressed ones take longer
            again, _, last = run(states[middle])
            assert (again, last["dropped"]) == (captions[middle:], batch["dropped"]), "restored in the middle"

    def run(state: dict | None) -> tuple[list[str], list[dict], dict]:
        """The captions of an epoch, or the rest of it; the states before each; the first batch of the next epoch."""
        iterator = StreamIterator(make_stream(shards, seed), worker=0, workers=0)
        if state is not None:
            iterator.load_state_dict(state)
        captions, states = [], []
        while True:
            states.append(iterator.state_dict())
            batch = next(iterator)
            if iterator.epoch:
                return captions, states, batch
            captions += batch["captions"]

    def count() -> None:
        reading.counted = count_samples(shards)

    with open(folder.parent / "trace", "w") as trace:
        forbidden = watch({*shards})
        for way in (look, stream, count):
            faulthandler.dump_traceback_later(SECONDS, exit=True, file=trace)
            try:
                way()
            except BaseException:  # noqa: BLE001 - reported by the parent
                reading.error = traceback.format_exc()
            faulthandler.cancel_dump_traceback_later()
            reading.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident
            reading.forbidden = tuple(sorted(forbidden))
            send(reading)


@pytest.mark.hostile("shards")
@pytest.mark.parametrize("name", MAKERS)
def test_hostile_shard(hostile, tmp_path, name):
    shard, good = hostile[name], write_good(tmp_path, "good")
    # In the second epoch the good shard comes first: with its first sample all of the first epoch is counted.
    seed = next(s for s in itertools.count() if deal_shards(2, seed=s, epoch=1, consumer=0, consumers=1)[0].shard)
    folder = tmp_path / "deep" / "empty"
    folder.mkdir(parents=True)
    (readings, exit_code) = forked(read, [shard.path, good.path], seed, folder, seconds=SECONDS + 10)
    stuck = "\n".join((folder.parent / "trace").read_text().splitlines()[:12])
    assert not stuck, f"{shard}\n{stuck}"
    assert readings and not readings[-1].error, f"{shard}\n{readings and readings[-1].error}"
    assert (len(readings), exit_code) == (3, 0), str(shard)

    reading = readings[-1]
    expected = Counter(shard.captions + good.captions)
    assert reading.captions - Counter({AFTER: 1}) == expected
    assert accounts_for(reading.dropped, shard.drops), reading.dropped
    assert reading.seen_dropped == reading.dropped
    assert reading.usable == reading.captions.total()
    assert reading.counted >= expected.total()  # by their names; what does not decode may be among them
    assert len(reading.report) < 5000 and reading.report.replace("\n", "").isprintable()
    assert reading.memory < MEMORY, f"{reading.memory / 2**20:.0f} MiB"
    assert not reading.forbidden
    assert {path.name for path in tmp_path.rglob("*")} == {"good.tar", "deep", "empty", "trace"}


def test_the_watch_notices_forbidden_actions(tmp_path):
    """It is noticed if a shard runs something, or has a file read or written."""

    def unpickle():
        pickle.loads(pickle.dumps(Touches()))

    def unpack():
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("unpacked"))
        buffer.seek(0)
        with tarfile.open(fileobj=buffer) as tar:
            tar.extractall(tmp_path)

    def work(send, act):
        os.chdir(tmp_path)
        forbidden = watch(set())
        act()
        send(forbidden)

    for act, what in (
        (unpickle, "pickle.find_class ('posix', 'system')"),
        (unpack, "open"),
        (lambda: open("/etc/passwd").close(), "open '/etc/passwd'"),
    ):
        (forbidden,), _ = forked(work, act, seconds=SECONDS)
        assert any(one.startswith(what) for one in forbidden), (what, forbidden)
    assert (tmp_path / TOUCHED).exists() and (tmp_path / "unpacked").exists()


# ------------------------------------------------------------------------------------------------ all together


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_all_hostile_shards_at_once(hostile, tmp_path):
    """Two workers read all of them: in an epoch each good sample comes once, and each drop is counted once."""
    shards = [*hostile.values(), *(write_good(tmp_path, f"good{i}") for i in range(20 + len(hostile) % 2))]

    def deal(seed: int, epoch: int) -> list[list[Hostile]]:
        parts = [deal_shards(len(shards), seed=seed, epoch=epoch, consumer=w, consumers=2) for w in range(2)]
        return [[shards[part.shard] for part in of] for of in parts]

    for seed in itertools.count():
        dealt, next_first = deal(seed, 0), [of[0] for of in deal(seed, 1)]
        lengths = [sum(len(shard.captions) for shard in of) for of in dealt]
        # Each worker's second epoch begins with a good shard that was the other's in the first, so that all of its
        # first epoch is counted when a caption of that shard comes. And neither is much longer in its first epoch.
        new = all(one.fault == GOOD and one not in of for one, of in zip(next_first, dealt, strict=True))
        if new and abs(lengths[0] - lengths[1]) < 10:
            break
    delivered: list[Counter[str]] = [Counter(), Counter()]
    dropped: dict[int, dict[str, int]] = {}

    loader = make_loader(make_stream([shard.path for shard in shards], seed), 2)
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"stuck after {delivered}"))
    signal.alarm(6 * SECONDS)
    try:
        for batch in loader:
            worker, (caption,) = batch["worker"], batch["captions"]
            if worker not in dropped and caption == next_first[worker].captions[0]:
                dropped[worker] = batch["dropped"]
            if len(dropped) == 2:
                break
            if worker not in dropped:
                delivered[worker][caption] += 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        loader.close()
    for worker, of in enumerate(dealt):
        del delivered[worker][AFTER]
        assert delivered[worker] == Counter(caption for shard in of for caption in shard.captions)
        assert accounts_for(dropped[worker], [drop for shard in of for drop in shard.drops]), dropped[worker]
