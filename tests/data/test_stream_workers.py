"""Workers of a loader that fail: killed, or without shared memory. One error with the remedy, and an exact state."""

import contextlib
import itertools
import multiprocessing
import os
import re
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from test_stream import assert_same_batches, make_stream, take, write_shards

from lcm_distill.data import loader as loader_module
from lcm_distill.data import stream as stream_module
from lcm_distill.data.loader import Interrupted, check_shared_memory, describe_failure, make_loader
from lcm_distill.data.preparation import Preparation
from lcm_distill.data.stream import SharingError, StreamIterator
from lcm_distill.errors import UsageError, WorkerError
from lcm_distill.flags import StreamingFlags

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose

NO_SPACE = "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
NOT_OPENED = "unable to open shared memory object </torch_1_2_3> in read-write mode: Permission denied (13)"


OPTIONS = {"batch_size": 2, "random_flip": True, "shuffle_window": 4}


@pytest.fixture()
def shards(tmp_path):
    return write_shards(tmp_path, [7, 6, 8, 5])


def loader_of(shards, workers):
    return make_loader(make_stream(shards, **OPTIONS), workers)


def read_until_failure(iterator) -> tuple[list[dict], WorkerError]:
    """The batches up to the failure, which has to come soon."""
    batches, start = [], time.monotonic()
    with pytest.raises(WorkerError) as failure:
        for batch in itertools.islice(iterator, 60):
            batches.append(batch)
    assert time.monotonic() - start < 20
    return batches, failure.value


def assert_rest_and_state_are_exact(loader, batches, shards, workers):
    """What follows in this process, and in a loader that continues from its state, is what workers would have read."""
    batches = batches + take(loader.rest(), 3)
    again = loader_of(shards, workers)
    again.load_state_dict(loader.state_dict())
    batches += take(iter(again), 4)
    again.close()
    stream = make_stream(shards, **OPTIONS)
    streams = [StreamIterator(stream, worker=worker, workers=workers) for worker in range(workers)]
    assert_same_batches(batches, [next(streams[turn % workers]) for turn in range(len(batches))])


@pytest.mark.hostile("signals")
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, r"--dataloader_num_workers 3: a data worker was killed \(SIGKILL\), .*--shuffle_window"),
        (signal.SIGBUS, "--dataloader_num_workers 3: the data workers have no shared memory left .*--shm-size"),
        (signal.SIGSEGV, r"a data worker has failed \(SIGSEGV\).*--dataloader_num_workers 0"),
    ],
)  # fmt: skip
def test_a_worker_that_dies_is_one_error_and_nothing_is_lost(shards, number, words, capfd):
    """It raised a RuntimeError with a traceback, wherever the program was; what was trained since the last checkpoint
    was lost."""
    loader = loader_of(shards, 3)
    iterator = iter(loader)
    batches = take(iterator, 4)
    os.kill(loader._iterator._workers[1].pid, number)
    until = time.monotonic() + 0.3
    while time.monotonic() < until:  # here nothing is raised: it could be the middle of an optimizer's step
        pass
    more, failure = read_until_failure(iterator)
    assert re.search(words, str(failure)), failure
    assert_rest_and_state_are_exact(loader, batches + more, shards, 3)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.hostile("signals")
def test_a_worker_whose_connections_end_before_it_is_named_by_its_end(shards):
    """A kernel closes what a killed process has open first: the error was "Connection reset by peer", not SIGKILL."""

    def die_slowly():
        os.closerange(3, 1000)
        time.sleep(0.4)
        os.kill(os.getpid(), signal.SIGKILL)

    loader, worker = loader_of(shards, 1), multiprocessing.get_context("fork").Process(target=die_slowly)
    loader._iterator = SimpleNamespace(_workers=[worker])
    worker.start()
    assert "a data worker was killed (SIGKILL)" in loader._describe(ConnectionResetError(104, "reset by peer"))


@pytest.mark.hostile("signals")
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_worker_that_dies_after_an_error_is_not_a_second_error(shards, interrupted, monkeypatch):
    """It raised a RuntimeError in whatever handled the first: the run was lost in the middle of what would save it.

    The first is not a death here: torch looks for no other after one that it has reported.
    """
    loader = loader_of(shards, 2)
    iterator = iter(loader)
    batches = take(iterator, 4)
    workers = loader._iterator._workers
    if interrupted:
        loader.give_up = lambda: True
    else:

        def fail(_):
            raise ConnectionResetError(104, "Connection reset by peer")

        monkeypatch.setattr(loader, "_await", fail)
    with pytest.raises(Interrupted if interrupted else WorkerError):
        next(iterator)
    with contextlib.suppress(ProcessLookupError):
        os.kill(workers[0].pid, signal.SIGKILL)
    until = time.monotonic() + 0.3
    while time.monotonic() < until:  # here the handler of SIGCHLD would raise
        pass
    assert_rest_and_state_are_exact(loader, batches, shards, 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_state_of_the_rest_can_be_continued_twice(shards, workers):
    """A resumed run whose workers fail before their first batch has the position that it was given."""
    loader = loader_of(shards, workers)
    first = take(iter(loader), 3)
    loader.close()
    first += take(loader.rest(), 2)
    again = loader_of(shards, workers)
    again.load_state_dict(loader.state_dict())
    assert_rest_and_state_are_exact(again, first, shards, workers)


def failing_after(monkeypatch, name, calls, error):
    """Lets torch's `name`, which makes shared memory, raise `error` in the workers, after so many calls in each."""
    main, original, done = os.getpid(), getattr(torch.UntypedStorage, name), itertools.count()

    def make(*args):
        if os.getpid() != main and next(done) >= calls:
            raise error
        return original(*args)

    as_class = isinstance(torch.UntypedStorage.__dict__.get(name), classmethod)
    monkeypatch.setattr(torch.UntypedStorage, name, staticmethod(make) if as_class else make)


@pytest.mark.hostile("disks")
@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("_new_using_fd_cpu", RuntimeError(NO_SPACE), ["No space left", "--shm-size", "--train_batch_size"]),
        ("_new_using_fd_cpu", RuntimeError(NOT_OPENED), ["Permission denied", "--shm-size"]),
        ("_share_fd_cpu_", RuntimeError(NO_SPACE), ["No space left", "--shm-size", "--dataloader_num_workers 2"]),
        ("_share_fd_cpu_", RuntimeError(NOT_OPENED), ["Permission denied", "--shm-size"]),
        ("_share_fd_cpu_", OSError(24, "Too many open files"), ["Too many open files", "ulimit -n"]),
    ],
)
@pytest.mark.parametrize("calls", [0, 20])
def test_without_shared_memory_there_is_one_error_and_no_hang(shards, name, error, words, calls, monkeypatch, capfd):
    """The thread that feeds a worker's queue printed a traceback, and the main process waited for the batch forever."""
    failing_after(monkeypatch, name, calls, error)
    loader = loader_of(shards, 2)
    batches, failure = read_until_failure(iter(loader))
    assert bool(batches) == bool(calls)
    assert all(word in str(failure) for word in words), failure
    monkeypatch.undo()
    assert_rest_and_state_are_exact(loader, batches, shards, 2)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.hostile("disks")
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(38, "Function not implemented"),
                                   BlockingIOError(11, "Resource temporarily unavailable")])  # fmt: skip
def test_workers_that_cannot_be_started_are_one_error(shards, error, monkeypatch, capfd):
    def failing(*args, **options):
        raise error

    loader = loader_of(shards, 2)
    monkeypatch.setattr(multiprocessing, "Queue", failing)
    _, failure = read_until_failure(iter(loader))
    remedy = "Give the job more memory" if error.errno == 11 else "--shm-size"
    assert error.strerror in str(failure) and remedy in str(failure)
    assert loader.position is None
    assert "Traceback" not in capfd.readouterr().err


def test_without_any_shared_memory_zero_workers_still_work(shards, monkeypatch):
    """The remedy must not fail as well."""

    def failing(self):
        raise RuntimeError(NO_SPACE)

    monkeypatch.setattr(torch.Tensor, "share_memory_", failing)
    with pytest.raises(WorkerError, match="--dataloader_num_workers 2: .*No space left.*--shm-size"):
        loader_of(shards, 2)
    assert len(take(iter(loader_of(shards, 0)), 2)) == 2


def test_an_error_in_a_worker_s_code_stays_what_it_is(shards, monkeypatch):
    def failing(*args, **options):
        raise LookupError("a mistake")

    monkeypatch.setattr(stream_module, "prepare_sample", failing)
    with pytest.raises(LookupError, match="a mistake"):
        next(iter(loader_of(shards, 1)))


def test_other_loaders_keep_torch_s_handler(shards):
    """While a loader is used, torch's handler of SIGCHLD is replaced; afterwards it is as it was."""
    first = iter(loader_of(shards, 1))
    next(first)
    first.close()
    before = signal.getsignal(signal.SIGCHLD)
    assert before not in (signal.SIG_DFL, None)
    loader = loader_of(shards, 1)
    second = iter(loader)
    next(second)
    assert signal.getsignal(signal.SIGCHLD) is not before
    loader.close()
    second.close()
    assert signal.getsignal(signal.SIGCHLD) is before


@pytest.mark.hostile("disks")
@pytest.mark.parametrize(
    ("error", "report", "exits", "words"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "", [], "was killed (SIGKILL)"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is"), "", [], "--shm-size"),
        (RuntimeError("DataLoader worker (pid 7) exited unexpectedly"), "", [-9], "was killed (SIGKILL)"),
        (RuntimeError("DataLoader worker (pid 7) exited unexpectedly"), "", [-11], "has failed (SIGSEGV)"),
        (RuntimeError("DataLoader worker (pid 7) exited unexpectedly"), "", [3], "exited unexpectedly"),
        (EOFError(), "", [-9], "was killed (SIGKILL)"),
        (RuntimeError("received 0 items of ancdata"), "", [], "ulimit -n"),
        (RuntimeError("exited with code 1"), f"RuntimeError: {NO_SPACE}", [1], "--shm-size"),
        (RuntimeError("exited with code 1"), "PicklingError: a mistake", [1], "PicklingError: a mistake"),
        (SharingError("RuntimeError: unable to mmap 8 bytes"), "", [], "(RuntimeError: unable to mmap 8 bytes; /dev"),
        (OSError(12, "Cannot allocate memory"), "", [], "has no memory (OSError: [Errno 12]"),
        (MemoryError(), "", [], "has no memory"),
    ],
)
def test_each_failure_has_its_remedy(error, report, exits, words):
    message = describe_failure(error, report, exits, 4, 250)
    assert message.startswith("--dataloader_num_workers 4: ") and words in message and "\n" not in message
    assert ("--shuffle_window (now 250" in message) == ("memory" in message and "--shm-size" not in message)


def flags_for(workers, batch):
    return StreamingFlags(dataloader_num_workers=workers, train_batch_size=batch)


ENCODING = SimpleNamespace(moments=(8, 64, 64), embeddings={"encoder_hidden_states": (77, 768)})


@pytest.mark.hostile("disks")
@pytest.mark.parametrize(
    ("workers", "batch", "resolution", "encoding", "processes", "need"),
    [
        (8, 16, 512, None, 1, 8 * 2 * 16 * 3 * 512**2),  # 201 MB, in Docker's 64 MB
        (4, 16, 512, None, 2, 2 * 4 * 2 * 16 * 3 * 512**2),
        (1, 1, 64, None, 1, 2 * 3 * 64**2),
        (8, 16, 512, ENCODING, 1, 8 * 2 * 16 * 2 * (8 * 64 * 64 + 77 * 768)),
    ],
)
def test_batches_that_do_not_fit_into_shared_memory_are_refused(
    workers, batch, resolution, encoding, processes, need, monkeypatch
):
    preparation = Preparation(resolution=resolution, encoding=encoding)
    usage = SimpleNamespace(total=need, free=need)
    monkeypatch.setattr(loader_module.shutil, "disk_usage", lambda path: usage)
    check_shared_memory(flags_for(workers, batch), preparation, processes)
    usage.free = need - 1
    remedy = rf"--shm-size \d+g\), or pass --dataloader_num_workers {workers - 1}\b"
    with pytest.raises(UsageError, match=f"^--dataloader_num_workers {workers}: .*/dev/shm.*{remedy}"):
        check_shared_memory(flags_for(workers, batch), preparation, processes)
    check_shared_memory(flags_for(workers - 1, batch), preparation, processes)
    check_shared_memory(flags_for(0, batch), preparation, processes)
    usage.total = usage.free = 0  # a system that does not say
    check_shared_memory(flags_for(workers, batch), preparation, processes)


def test_a_system_without_dev_shm_is_not_checked(monkeypatch):
    monkeypatch.setattr(loader_module, "SHARED_MEMORY", "/no/such/folder")
    check_shared_memory(flags_for(1000, 1000), Preparation(resolution=4096))
