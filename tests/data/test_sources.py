"""Opening shards: broken connections, unreliable servers, commands, other file systems."""

import http.server
import itertools
import os
import re
import socketserver
import threading
import time
from pathlib import Path

import fsspec
import pytest
from test_stream import captions, make_stream, read_epochs, take, write_shards

from lcm_distill.data import sources
from lcm_distill.data.loader import make_loader
from lcm_distill.data.preflight import inspect_shards
from lcm_distill.data.preparation import Preparation
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


def test_a_file_that_changes_on_the_server_is_not_stitched_together(tmp_path, serve):
    (tmp_path / "a.tar").write_bytes(b"a" * 2_000_000)
    server = serve(["drop", "ok"])
    with open_shard(f"{server.url}/a.tar") as file:
        file.read(100)
        (tmp_path / "a.tar").write_bytes(b"b" * 2_000_000)
        with pytest.raises(OSError, match="changed while it was being read"):
            file.read()


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


def test_a_server_that_never_recovers_ends_in_a_message(tmp_path, serve, caplog):
    write_shards(tmp_path, [3])
    server = serve(itertools.repeat("500"))
    with pytest.raises(UsageError, match="500"):
        inspect_shards([f"{server.url}/000.tar"], Preparation(resolution=16))
    assert len(server.requests) == 1 + sources.RETRIES
    assert f"retrying in 0.16 s ({sources.RETRIES} of {sources.RETRIES})" in caplog.text


def test_a_command_that_fails_is_run_again_and_continues(tmp_path):
    """It writes half of the file the first time, all of it the second."""
    content = os.urandom(500_000)
    (tmp_path / "a").write_bytes(content)
    flag = tmp_path / "flag"
    script = f"if [ -e {flag} ]; then cat {tmp_path}/a; else touch {flag}; head -c 200000 {tmp_path}/a; exit 7; fi"
    with open_shard(f"pipe:{script}") as file:
        assert file.read() == content


def test_a_command_that_stalls_is_ended(tmp_path, monkeypatch):
    """webdataset's own reader waits forever, and closing it early takes two hours."""
    monkeypatch.setattr(sources, "PIPE_TIMEOUT", 0.2)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="wrote nothing"):
        open_shard("pipe:sleep 60").read(1)
    with open_shard("pipe:echo ready; sleep 60") as file:
        assert file.read(5) == b"ready"
    assert time.monotonic() - start < 5


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
