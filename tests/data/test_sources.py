"""Opening shards: broken connections, unreliable servers, commands, other file systems."""

import contextlib
import gzip
import http.server
import itertools
import os
import re
import socket
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from test_stream import captions, make_stream, read_epochs, take, write_shards

from lcm_distill.data import sources
from lcm_distill.data.loader import make_loader
from lcm_distill.data.preflight import inspect_shards
from lcm_distill.data.preparation import Preparation
from lcm_distill.data.raw import UNREADABLE_SHARD
from lcm_distill.data.shards import expand_shards, read_shard
from lcm_distill.data.sources import open_shard
from lcm_distill.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    monkeypatch.setattr(sources, "BACKOFF", 0.01)


class UnreliableServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Serves a folder; `outcomes` are those of its requests, in turn: ok, 500, 404, drop (after a part), stall."""

    daemon_threads = True

    def __init__(self, folder: Path, outcomes, *, ranges: bool = True):
        self.folder, self.outcomes, self.ranges = folder, outcomes, ranges
        self.lock, self.requests = threading.Lock(), []
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: UnreliableServer

    def do_GET(self):
        with self.server.lock:
            outcome = next(self.server.outcomes, "ok")
            self.server.requests.append((self.path, outcome, self.headers.get("Range")))
        path = self.server.folder / self.path.strip("/")
        if outcome.isdigit() or not path.exists():
            self.send_error(int(outcome) if outcome.isdigit() else 404)
            return
        content = path.read_bytes()
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and self.server.ranges:
            start = int(asked[1])
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if asked and self.server.ranges else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        body = content[start:]
        try:
            if outcome == "ok":
                self.wfile.write(body)
                return
            self.wfile.write(body[: max(1, len(body) // 3)])
            self.wfile.flush()
            if outcome == "stall":
                time.sleep(3)
        except (BrokenPipeError, ConnectionResetError):
            pass
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture()
def serve(tmp_path):
    servers = []

    def start(outcomes=(), **options):
        server = UnreliableServer(tmp_path, iter(outcomes), **options)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.hostile("servers")
@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreliable_server_delivers_all(tmp_path, serve, monkeypatch, workers):
    """Dropped connections, stalls and errors now and then: each sample still comes once an epoch, in the same order.

    Through a plain `curl` a dropped connection is a shard cut short, and a stalled one hangs the run forever.
    """
    monkeypatch.setattr(sources, "TIMEOUT", 0.3)
    local = write_shards(tmp_path, [9, 14, 11, 8])
    server = serve(itertools.cycle(["drop", "500", "ok", "stall", "503", "drop", "429", "drop", "ok"]))
    remote = expand_shards(server.url + "/{000..003}.tar")
    wanted = read_epochs(local, workers=workers, epochs=2)
    everything = sorted(c for epochs in wanted.values() for c in captions(epochs[0]))
    loader = make_loader(make_stream(remote), workers)
    got = take(iter(loader), 42 * 2)
    loader.close()
    assert len(everything) == 42 == len(set(everything))
    by_worker = {w: captions(b for b in got if b["worker"] == w) for w in range(max(1, workers))}
    for worker, mine in by_worker.items():
        expected = [c for epoch in wanted[0, worker] for c in captions(epoch)]
        assert mine[: len(expected)] == expected[: len(mine)] and len(mine) > len(wanted[0, worker][0])
    assert not got[-1]["dropped"]
    assert {outcome for _, outcome, _ in server.requests} >= {"drop", "stall", "500", "503", "429"}


@pytest.mark.hostile("servers")
@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_continues_where_it_broke(tmp_path, serve, ranges):
    content = os.urandom(3_000_000)
    (tmp_path / "a.tar").write_bytes(content)
    server = serve(["drop", "drop", "500", "drop", "ok"], ranges=ranges)
    with open_shard(f"{server.url}/a.tar") as file:
        assert file.read() == content
    starts = [int(asked[6:-1]) if asked else 0 for _, _, asked in server.requests]
    assert starts[0] == 0 and starts[1] > 900_000 and starts == sorted(starts)


def test_a_shard_over_http_is_read_from_an_offset(tmp_path, serve):
    """Restoring requests only the rest of the shard from the server, not what comes before it."""
    (shard,) = write_shards(tmp_path, [40])
    server = serve()
    raw = list(read_shard(f"{server.url}/000.tar"))
    assert all(sample.end for sample in raw[:-1]) and raw[-1].last
    rest = list(read_shard(f"{server.url}/000.tar", offset=raw[29].end))
    assert [sample.key for sample in rest] == [sample.key for sample in raw[30:]]
    assert [sample.files for sample in rest] == [sample.files for sample in read_shard(shard)][30:]
    assert server.requests[-1][2] == f"bytes={raw[29].end}-"


@pytest.mark.hostile("servers")
def test_a_file_that_changes_on_the_server_is_not_stitched_together(tmp_path, serve):
    (tmp_path / "a.tar").write_bytes(b"a" * 2_000_000)
    server = serve(["drop", "ok"])
    with open_shard(f"{server.url}/a.tar") as file:
        file.read(100)
        (tmp_path / "a.tar").write_bytes(b"b" * 2_000_000)
        with pytest.raises(OSError, match="changed while it was being read"):
            file.read()


@pytest.mark.hostile("servers")
def test_permanent_failures_are_not_retried(tmp_path, serve):
    server = serve()
    with pytest.raises(OSError, match="404"):
        open_shard(f"{server.url}/none.tar").read(1)
    assert len(server.requests) == 1
    with pytest.raises(FileNotFoundError):
        open_shard(str(tmp_path / "none.tar"))
    start = time.monotonic()
    with pytest.raises(OSError, match="status 127"):
        open_shard("pipe:no-such-command-here 2>/dev/null").read(1)
    assert time.monotonic() - start < 5


@pytest.mark.hostile("servers")
def test_a_server_that_never_recovers_ends_in_a_message(tmp_path, serve, caplog):
    write_shards(tmp_path, [3])
    server = serve(itertools.repeat("500"))
    with pytest.raises(UsageError, match="500"):
        inspect_shards([f"{server.url}/000.tar"], Preparation(resolution=16))
    assert len(server.requests) == 1 + sources.RETRIES
    assert f"retrying in 0.16 s ({sources.RETRIES} of {sources.RETRIES})" in caplog.text


@pytest.mark.hostile("servers")
def test_a_command_that_fails_is_run_again_and_continues(tmp_path):
    """It writes half of the file the first time, all of it the second."""
    content = os.urandom(500_000)
    (tmp_path / "a").write_bytes(content)
    flag = tmp_path / "flag"
    script = f"if [ -e {flag} ]; then cat {tmp_path}/a; else touch {flag}; head -c 200000 {tmp_path}/a; exit 7; fi"
    with open_shard(f"pipe:{script}") as file:
        assert file.read() == content


@pytest.mark.hostile("servers")
def test_a_command_that_stalls_is_ended(tmp_path, monkeypatch):
    """webdataset's own reader waits forever, and closing it early takes two hours."""
    monkeypatch.setattr(sources, "PIPE_TIMEOUT", 0.2)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="wrote nothing"):
        open_shard("pipe:sleep 60").read(1)
    with open_shard("pipe:echo ready; sleep 60") as file:
        assert file.read(5) == b"ready"
    assert time.monotonic() - start < 5


# --------------------------------------------------------------------------------------------- servers that err


class AnswerServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Serves `content`; requests are answered by `answer(handler, content, first byte asked for or None, number)`."""

    daemon_threads = True

    def __init__(self, content, answer):
        self.content, self.answer, self.lock, self.asked = content, answer, threading.Lock(), []
        super().__init__(("127.0.0.1", 0), _AnswerHandler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/000.tar"


class _AnswerHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: AnswerServer

    def do_GET(self):
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else None
        with self.server.lock:
            self.server.asked.append(first)
            number = len(self.server.asked) - 1
        try:
            self.server.answer(self, self.server.content, first, number)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def do_HEAD(self):
        self.send_error(405)

    def send(self, status, body, **headers):
        """Headers of the value None are not sent; by default the length, and a certain version."""
        self.send_response(status)
        for name, value in ({"Content-Length": len(body), "ETag": '"1"'} | headers).items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def part(self, content, first, last=None, **headers):
        """The bytes from `first` to `last`, as a correct 206."""
        last = len(content) - 1 if last is None else min(last, len(content) - 1)
        content_range = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self.send(206, content[first : last + 1], **content_range | headers)

    def log_message(self, *args):
        pass


@pytest.fixture()
def answering():
    servers = []

    def start(content, answer):
        servers.append(AnswerServer(content, answer))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


CONTENT = os.urandom(300_000)
BROKEN = 100_000  # the byte at which the first connection breaks


def broken_first(then):
    """Breaks the first answer off; `then` gives the others."""

    def answer(handler, content, first, number):
        if number == 0:
            handler.send(200, content[:BROKEN], **{"Content-Length": len(content)})
            handler.close_connection = True
        else:
            then(handler, content, first, number)

    return answer


def wrong_range(handler, content, first, number):
    """Another range than the one that was asked for, when one is."""
    if first is None:
        handler.send(200, content)
    else:
        handler.part(content, 5000, 9999)


def without_numbers(handler, content, first, number):
    if first is None:
        handler.send(200, content)
    else:
        handler.send(206, content[first:], **{"Content-Range": "bytes abc-def/ghi"})


def multipart(handler, content, first, number):
    if first is None:
        handler.send(200, content)
    else:
        handler.send(206, b"--x\r\n" + content[first:], **{"Content-Type": "multipart/byteranges; boundary=x"})


def missing_range(handler, content, first, number):
    """Does not say which bytes it sends, and they are not those that were asked for."""
    if first is None:
        handler.send(200, content)
        return
    handler.send(206, content[first + 7 :], **{"Content-Length": len(content) - first - 7})


def earlier_range(handler, content, first, number):
    handler.part(content, first - 10)


def whole_file(handler, content, first, number):
    handler.send(200, content)


def chunked(handler, content, first, number):
    handler.send(200, b"", **{"Content-Length": None, "Transfer-Encoding": "chunked"})
    for start in range(0, len(content), 70_000):
        piece = content[start : start + 70_000]
        handler.wfile.write(b"%x\r\n" % len(piece) + piece + b"\r\n")
    handler.wfile.write(b"0\r\n\r\n")


def no_length(handler, content, first, number):
    handler.send(200, content, **{"Content-Length": None})
    handler.close_connection = True


def wrong_length(handler, content, first, number):
    handler.send(200, content, **{"Content-Length": "abc"})
    handler.close_connection = True


def negative_length(handler, content, first, number):
    handler.send(200, content, **{"Content-Length": "-5"})
    handler.close_connection = True


def only_parts(handler, content, first, number):
    """Never more than 40,000 bytes, whatever is asked for."""
    handler.part(content, first or 0, (first or 0) + 39_999)


def parts_of_an_unknown_size(handler, content, first, number):
    first = first or 0
    if first >= len(content):
        handler.send(416, b"", **{"Content-Range": f"bytes */{len(content)}"})
        return
    last = min(first + 39_999, len(content) - 1)
    handler.send(206, content[first : last + 1], **{"Content-Range": f"bytes {first}-{last}/*"})


def parts_without_a_version(handler, content, first, number):
    handler.part(content, first or 0, (first or 0) + 39_999, ETag=None)


ANSWERS = [wrong_range, without_numbers, multipart, missing_range, earlier_range, whole_file, chunked, no_length]
ANSWERS += [wrong_length, negative_length]


@pytest.mark.hostile("servers")
@pytest.mark.parametrize(
    "answer",
    [*map(broken_first, ANSWERS), *ANSWERS[6:], only_parts, parts_of_an_unknown_size, parts_without_a_version],
    ids=lambda answer: getattr(answer, "__qualname__", ""),
)
def test_a_server_that_answers_wrongly_delivers_all(answering, answer):
    """Of a 206 for another range, or of fewer bytes, what it held was taken for the rest of the file."""
    with open_shard(answering(CONTENT, answer).url) as file:
        assert file.read() == CONTENT


@pytest.mark.hostile("servers")
@pytest.mark.parametrize("version", [None, 'W/"1"'])
def test_without_a_certain_version_what_comes_again_is_compared(answering, version):
    """Without an ETag a sample was spliced of two files."""
    other = CONTENT[:50_000] + os.urandom(250_000)

    def answer(handler, content, first, number):
        body = content if number == 0 else other if number == changes_at else content
        if number == 0:
            handler.send(200, body[:BROKEN], **{"Content-Length": len(body), "ETag": version})
            handler.close_connection = True
        elif first is None:
            handler.send(200, body, ETag=version)
        else:
            handler.part(body, first, ETag=version)

    changes_at = 1
    with open_shard(answering(CONTENT, answer).url) as file, pytest.raises(OSError, match="changed while"):
        file.read()
    changes_at = 99
    server = answering(CONTENT, answer)
    with open_shard(server.url) as file:
        assert file.read() == CONTENT
    assert server.asked == [None, None]


@pytest.mark.hostile("servers")
def test_a_file_of_another_size_has_changed(answering):
    def answer(handler, content, first, number):
        if number == 0:
            handler.send(200, content[:BROKEN], **{"Content-Length": len(content)})
            handler.close_connection = True
        else:
            handler.part(content[:-1], first)

    with open_shard(answering(CONTENT, answer).url) as file, pytest.raises(OSError, match="changed while"):
        file.read()


@pytest.mark.hostile("servers")
@pytest.mark.parametrize("slow", ["body", "headers"])
def test_a_server_that_dribbles_is_given_up(answering, monkeypatch, slow):
    """One byte per second kept a worker for ever."""
    for name, value in {"SLOW_SECONDS": 0.3, "OPEN_SECONDS": 0.3, "RETRIES": 2, "SLOW_RETRIES": 1}.items():
        monkeypatch.setattr(sources, name, value)

    def answer(handler, content, first, number):
        if slow == "body":
            first, size = first or 0, len(content)
            content_range = {"Content-Range": f"bytes {first}-{size - 1}/{size}"}
            handler.send(206, b"", **{"Content-Length": size - first} | content_range)
        for byte in content if slow == "body" else b"HTTP/1.1 200 OK\r\nX: " + b"x" * 9999:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(0.05)

    began = time.monotonic()
    with open_shard(answering(CONTENT, answer).url) as file, pytest.raises(OSError, match="sends fewer|not answered"):
        file.read()
    assert time.monotonic() - began < 15


@pytest.mark.hostile("servers")
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "999999999"}, sources.MAX_RETRY_AFTER),
        ({"Retry-After": "9" * 500}, 0.01),
        ({"Retry-After": "-5"}, 0.01),
        ({"Retry-After": "soon"}, 0.01),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:09 GMT", "Date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 9),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.01),
        ({"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}, sources.MAX_RETRY_AFTER),
    ],
)
def test_a_server_is_left_alone_as_long_as_it_asks(answering, monkeypatch, headers, seconds):
    slept = []
    monkeypatch.setattr(sources, "time", SimpleNamespace(monotonic=time.monotonic, sleep=slept.append))

    def answer(handler, content, first, number):
        if number == 0:
            handler.send_response_only(429)
            for name, value in headers.items() | {("Content-Length", "0")}:
                handler.send_header(name, value)
            handler.end_headers()
        else:
            handler.send(200, content)

    with open_shard(answering(CONTENT, answer).url) as file:
        assert file.read() == CONTENT
    assert slept == [seconds]


@pytest.mark.hostile("servers")
@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("file:///etc/passwd", "redirects to file:, which is not followed"),
        ("pipe:touch hostile-was-here", "redirects to pipe:, which is not followed"),
        ("ftp://host/a.tar", "redirects to ftp:"),
        ("/000.tar", "more than 10 redirects"),
    ],
)
def test_redirects_to_other_schemes_and_in_circles_are_not_followed(answering, target, words):
    server = answering(CONTENT, lambda handler, *_: handler.send(302, b"", Location=target))
    with open_shard(server.url) as file, pytest.raises(OSError, match=words):
        file.read()
    assert len(server.asked) == (1 if ":" in target else sources.MAX_REDIRECTS + 1)


@pytest.mark.hostile("servers")
def test_redirects_are_followed_and_their_content_is_not_read(answering):
    """requests reads all of it, and there may be no end of it."""

    def answer(handler, content, first, number):
        if handler.path == "/elsewhere":
            handler.send(200, content)
            return
        handler.send(301, b"", **{"Location": "/elsewhere", "Content-Length": 2**50})
        for _ in range(2**12):
            handler.wfile.write(bytes(2**20))

    with open_shard(answering(CONTENT, answer).url) as file:
        assert file.read() == CONTENT


@pytest.mark.hostile("servers")
@pytest.mark.parametrize("encoding", ["gzip", "br"])
def test_a_server_that_compresses_unasked(answering, tmp_path, encoding):
    (shard,) = write_shards(tmp_path, [5])
    packed = gzip.compress(Path(shard).read_bytes())
    server = answering(
        packed, lambda handler, content, *_: handler.send(200, content, **{"Content-Encoding": encoding})
    )
    if encoding == "gzip":
        assert [s.files for s in read_shard(server.url)] == [s.files for s in read_shard(shard)]
        assert [s.end for s in read_shard(server.url)] == [None] * 5
        with pytest.raises(OSError, match="there is no byte 512"):
            list(read_shard(server.url, offset=512))
    else:
        with pytest.raises(OSError, match="sent compressed .br., though that was not asked for"):
            list(read_shard(server.url))


@pytest.mark.hostile("servers")
def test_a_half_downloaded_file_on_a_server_is_damage(answering, tmp_path):
    (shard,) = write_shards(tmp_path, [64])
    content = Path(shard).read_bytes()
    half = content[: len(content) // 2] + bytes(len(content) - len(content) // 2)
    server = answering(half, lambda handler, content, *_: handler.send(200, content))
    report = inspect_shards([server.url], Preparation(resolution=16), limit=100)
    assert report.dropped == {UNREADABLE_SHARD: 1} and 20 < report.usable < 40


# ------------------------------------------------------------------------------------------ commands and odd files


@pytest.mark.hostile("shards")
@pytest.mark.parametrize(
    "command", ["sleep 300 >&2", "while :; do echo busy >&2; sleep 0.05; done 2>/dev/null", "cat /dev/zero"]
)
def test_a_command_dies_with_its_reader(tmp_path, command):
    """One that writes nothing to its output did not notice that its reader had been killed, and ran for ever."""
    code = f"from lcm_distill.data.sources import open_shard\nfile = open_shard('pipe:echo $$; {command}').raw\n"
    code += "file.readinto(x := bytearray(9)); print(int(x.split()[0])); import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-uc", code], stdout=subprocess.PIPE, text=True) as reader:
        pid = int(reader.stdout.readline())
        assert os.getpgid(pid) == pid
        reader.kill()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.02)
    else:
        pytest.fail("it is still running")


@pytest.mark.hostile("shards")
def test_a_command_that_closes_its_output_and_runs_on_is_ended(monkeypatch):
    monkeypatch.setattr(sources, "PIPE_TIMEOUT", 0.2)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="closed its output, but did not end"):
        open_shard("pipe:exec >&-; sleep 60").read(1)
    assert time.monotonic() - began < 5


@pytest.mark.hostile("shards")
def test_a_command_that_writes_much_to_its_standard_error_is_read(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    with open_shard(f"pipe:head -c 1000000 /dev/zero >&2 2>/dev/null; cat {tmp_path}/a") as file:
        assert file.read() == CONTENT


@pytest.mark.hostile("shards")
def test_a_command_that_writes_something_else_when_it_is_run_again_is_not_stitched_together(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    (tmp_path / "b").write_bytes(os.urandom(len(CONTENT)))
    flag = tmp_path / "flag"
    script = f"if [ -e {flag} ]; then cat {tmp_path}/b; else touch {flag}; head -c 200000 {tmp_path}/a; exit 7; fi"
    with open_shard(f"pipe:{script}") as file, pytest.raises(OSError, match="changed while it was being read"):
        file.read()


@pytest.mark.hostile("shards")
def test_a_command_that_runs_on_after_its_tar_is_not_waited_for(tmp_path):
    (shard,) = write_shards(tmp_path, [3])
    began = time.monotonic()
    assert len(list(read_shard(f"pipe:cat {shard}; sleep 60"))) == 3
    assert len(list(read_shard(f"pipe:cat {shard}; exit 3"))) == 3
    assert time.monotonic() - began < 10


@pytest.mark.hostile("shards")
@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_a_fifo_socket_or_device_is_refused_at_once(tmp_path, kind):
    """A FIFO blocked until someone wrote into it."""
    path = tmp_path / "000.tar"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            server.bind(str(path))
        else:
            path.symlink_to("/dev/zero")
        with pytest.raises(UsageError, match="named pipe|a socket|a device"):
            expand_shards(str(path))
        with pytest.raises(OSError, match="not a file"):
            open_shard(str(path))
        shards = [*write_shards(tmp_path / "good", [4]), *expand_shards(str(tmp_path / "*.tar"))]
        assert shards[1:] == [str(path)]
        batch = take(iter(make_stream(shards)), 9)[-1]
        assert batch["dropped"][UNREADABLE_SHARD] >= 1


@pytest.mark.hostile("shards")
@pytest.mark.parametrize(
    "entry", ["pipe:touch {}", "PIPE:touch {}", "pipe:touch {}{{a,b}}", "  pipe:touch {} ", "a.tar\npipe:touch {}"]
)
def test_a_list_runs_no_command(tmp_path, entry):
    """A list of shards may have been downloaded."""
    write_shards(tmp_path, [1])[0]
    os.rename(tmp_path / "000.tar", tmp_path / "a.tar")
    (tmp_path / "list.txt").write_text(entry.format(tmp_path / "ran"))
    with pytest.raises(UsageError, match="names a command, .*which is not run.* pass --allow_pipe_in_lists"):
        expand_shards(f"{tmp_path}/a.tar::{tmp_path}/list.txt")
    assert any("touch" in shard for shard in expand_shards(str(tmp_path / "list.txt"), allow_pipe_in_lists=True))
    assert not (tmp_path / "ran").exists()
    assert expand_shards("pipe:touch x") == ["pipe:touch x"]


def test_other_file_systems_come_through_fsspec(tmp_path):
    local = write_shards(tmp_path, [5, 6])
    memory = fsspec.filesystem("memory")
    for path in local:
        memory.pipe(f"/bucket/{Path(path).name}", Path(path).read_bytes())
    urls = expand_shards("memory://bucket/*.tar")
    assert urls == expand_shards("memory://bucket/") == ["memory:///bucket/000.tar", "memory:///bucket/001.tar"]
    raw = list(read_shard(urls[1]))
    assert [sample.files for sample in raw] == [sample.files for sample in read_shard(local[1])]
    assert [s.key for s in read_shard(urls[1], offset=raw[2].end)] == [s.key for s in raw[3:]]
    with pytest.raises(UsageError, match="matches no .tar"):
        expand_shards("memory://bucket/*.tgz")


@pytest.mark.hostile("servers")
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://bucket/000.tar", "s3fs.*'pipe:aws s3 cp s3://bucket/000.tar -', or install that package"),
        ("nonsense://bucket/000.tar", "no installed package opens nonsense: .*Give a command that reads it"),
    ],
)
def test_a_url_that_no_package_opens_names_the_remedy(url, words):
    if url.startswith("s3") and sources.find_problem(url) is None:
        pytest.skip("s3fs is installed")
    with pytest.raises(UsageError, match=words):
        expand_shards(url)


def test_a_list_file_names_shards(tmp_path):
    local = write_shards(tmp_path / "data", [2, 3, 4])
    (tmp_path / "list.txt").write_text(
        f"# the good ones\n\ndata/000.tar\n{local[2]}\nhttp://host/{{0..1}}.tar\npipe:cat x.tar\n"
    )
    expected = [local[0], local[2], "http://host/0.tar", "http://host/1.tar", "pipe:cat x.tar"]
    assert expand_shards(str(tmp_path / "list.txt"), allow_pipe_in_lists=True) == expected
    for content, words in (
        ("", "is empty; write one shard per line"),
        ("list.txt", "another list"),
        ("no.tar", "not found"),
        ("\xff", "not a text file"),
    ):
        (tmp_path / "bad.txt").write_bytes(content.encode("latin-1"))
        with pytest.raises(UsageError, match=words):
            expand_shards(str(tmp_path / "bad.txt"))
