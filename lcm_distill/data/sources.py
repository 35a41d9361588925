"""Opens a shard wherever it is stored, and reopens it at the byte at which a connection broke.

with open_shard("https://host/000.tar") as file: ...        # a buffered, seekable binary file

a path, file:            the operating system
http:, https:            requests, from any byte on (Range)
pipe:COMMAND             the shell; the command may be run more than once
s3:, gs:, hf:, az:, ...  fsspec, with the file system's own package (s3fs, gcsfs, huggingface_hub, ...)
"""

import contextlib
import io
import logging
import os
import select
import signal
import subprocess
import time
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import urlparse
from urllib.request import url2pathname

import fsspec
import requests
from fsspec.core import url_to_fs
from urllib3.exceptions import HTTPError as TransportError

from lcm_distill.errors import shown

logger = logging.getLogger(__name__)

RETRIES = 5  # consecutive attempts without a byte before a shard is abandoned
BACKOFF, MAX_BACKOFF = 1.0, 30.0  # seconds before the first retry, doubled each time; the longest wait
TIMEOUT = 30.0  # seconds in which a server must answer, or send something
PIPE_RETRIES = 2  # a command that fails more often is more likely wrong than unlucky
PIPE_TIMEOUT = 300.0  # seconds in which a command must write something
BUFFER = 2**16  # bytes; larger reads bypass the buffer and save a copy
BLOCK = 8 * 2**20  # bytes per request of an fsspec file system
_READ_SIZE = 2**16  # bytes per read from a connection: when it breaks, up to this many have to be sent again
_SHORT_SKIP = 2**20  # up to this many bytes, reading on is cheaper than a new request


class _Source(Protocol):
    """A source of bytes, opened at some offset: `readinto` returns 0 at its end, and raises if it breaks off."""

    def readinto(self, buffer: memoryview, /) -> int: ...
    def close(self) -> None: ...


def local_path(shard: str) -> str | None:
    """The path of a shard on a local file system; None for a URL or a command."""
    url = urlparse(shard)
    if url.scheme == "file":
        return url2pathname(url.path)
    return os.path.expanduser(shard) if url.scheme == "" else None


def find_problem(url: str) -> str | None:
    """Why a URL cannot be opened on this machine, with the remedy; None if it can."""
    scheme = urlparse(url).scheme
    if scheme in ("http", "https", "pipe"):
        return None
    remedy = f"Give a command that reads it, such as 'pipe:aws s3 cp {url} -'"
    try:
        fsspec.get_filesystem_class(scheme)
        return None
    except ImportError as error:  # fsspec knows the scheme, but its package is not installed
        return f"{url}: {error}. {remedy}, or install that package."
    except ValueError:
        return f"no installed package opens {scheme}: URLs ({url}). {remedy}."


def expand_url(url: str, suffixes: tuple[str, ...]) -> list[str]:
    """The shards of a remote pattern (`s3://bucket/*.tar`) or folder (`s3://bucket/data/`); else `[url]`.

    Only where fsspec can list files, which excludes http. Raises whatever the file system raises.
    """
    scheme = urlparse(url).scheme
    if scheme in ("http", "https", "pipe") or not (url.endswith("/") or any(mark in url for mark in "*?[")):
        return [url]
    files, path = url_to_fs(url)
    pattern = path.rstrip("/") + "/*" if url.endswith("/") else path
    return [files.unstrip_protocol(found) for found in sorted(files.glob(pattern)) if found.lower().endswith(suffixes)]


def open_shard(shard: str, offset: int = 0) -> BinaryIO:
    """Opens a shard as a buffered file at the byte `offset`; it can seek (forwards without reading, where possible).

    Transient failures are retried from the byte that was reached, with growing pauses: broken and stalled
    connections, busy servers (408, 425, 429, 5xx), commands that exit with an error.

    Raises:
        OSError: at once for a local file that cannot be opened.
        Exception: from `read`, whatever the opener raises, if the failure is permanent (no such file, no permission)
            or the retries are used up.
    """
    path = local_path(shard)
    if path is not None:
        file: BinaryIO = open(path, "rb", buffering=BUFFER)
        file.seek(offset)
        return file
    return cast(BinaryIO, io.BufferedReader(_RetryingFile(shard, offset), BUFFER))


class _RetryingFile(io.RawIOBase):
    """A remote shard or a command's output, reopened at the current position when it fails."""

    def __init__(self, shard: str, offset: int):
        self._shard = shard
        self._position = offset
        self._source: _Source | None = None
        self._version: str | None = None  # detects a file that changes between two requests
        self._failures = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the length of a shard is not known")
        target = offset + (self._position if whence == io.SEEK_CUR else 0)
        if self._source is not None and 0 <= target - self._position <= _SHORT_SKIP:
            scratch = memoryview(bytearray(_SHORT_SKIP))
            while self._position < target and self.readinto(scratch[: target - self._position]):
                pass
        if target != self._position:
            self._drop_source()
            self._position = target
        return target

    def readinto(self, buffer: Any, /) -> int:
        while True:
            try:
                if self._source is None:
                    self._source = self._open()
                count = self._source.readinto(memoryview(buffer))
            except Exception as error:
                self._drop_source()
                self._wait_or_raise(error)
            else:
                self._position += count
                self._failures = 0
                return count

    def _open(self) -> _Source:
        scheme = urlparse(self._shard).scheme
        if scheme in ("http", "https"):
            source = _HttpSource(self._shard, self._position, self._version)
            self._version = source.version
            return source
        if scheme == "pipe":
            return _skip_bytes(_CommandSource(self._shard.removeprefix("pipe:")), self._position)
        file = fsspec.open(self._shard, "rb", block_size=BLOCK).open()
        file.seek(self._position)
        return cast(_Source, file)

    def _wait_or_raise(self, error: Exception) -> None:
        """Waits before the next attempt, or raises `error` if it is permanent or the retries are used up."""
        retries = PIPE_RETRIES if self._shard.startswith("pipe:") else RETRIES
        if self._failures >= retries or not _is_transient(error):
            raise error
        seconds = min(BACKOFF * 2**self._failures, MAX_BACKOFF)
        self._failures += 1
        logger.warning(
            "%s: %s (byte %d); retrying in %g s (%d of %d)",
            shown(self._shard),
            shown(str(error)),
            self._position,
            seconds,
            self._failures,
            retries,
        )
        time.sleep(seconds)

    def _drop_source(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            with contextlib.suppress(Exception):  # it has failed, or is no longer needed
                source.close()

    def close(self) -> None:
        self._drop_source()
        super().close()


def _is_transient(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, _PermanentError)):
        return False
    return isinstance(error, (OSError, TransportError))  # those of requests are OSErrors


class _PermanentError(OSError):
    """Retrying would not help."""


def _skip_bytes(source: _Source, nbytes: int) -> _Source:
    scratch = memoryview(bytearray(BUFFER))
    while nbytes and (count := source.readinto(scratch[: min(nbytes, BUFFER)])):
        nbytes -= count
    return source


class _HttpSource:
    """A file on a web server, from `offset` on; `version` is that of an earlier request for it, if there was one."""

    def __init__(self, url: str, offset: int, version: str | None):
        # The bytes as stored: offsets into a response that the server compresses would be others.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
        self._response = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)
        self._response.raise_for_status()
        self.version = self._response.headers.get("ETag") or self._response.headers.get("Last-Modified")
        if version is not None and self.version != version:
            raise _PermanentError(f"{url} changed while it was being read")
        length = self._response.headers.get("Content-Length")
        self._left = int(length) if length else None
        if offset and self._response.status_code != 206:  # this server ignores Range
            _skip_bytes(self, offset)

    def readinto(self, buffer: memoryview, /) -> int:
        content = self._response.raw.read(min(len(buffer), _READ_SIZE))
        buffer[: len(content)] = content
        if self._left is not None:
            self._left -= len(content)
            if not content and self._left > 0:
                raise ConnectionError(f"the connection closed with {self._left} bytes left")
        return len(content)

    def close(self) -> None:
        self._response.close()


class _CommandSource:
    """A shell command's output; it may be silent for `PIPE_TIMEOUT`, and its children are ended with it."""

    def __init__(self, command: str):
        self._command = command
        self._process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        assert self._process.stdout is not None
        self._output = cast(io.RawIOBase, self._process.stdout)

    def readinto(self, buffer: memoryview, /) -> int:
        if not select.select([self._output], [], [], PIPE_TIMEOUT)[0]:
            raise TimeoutError(f"pipe:{self._command} wrote nothing for {PIPE_TIMEOUT:g} seconds")
        count = self._output.readinto(buffer) or 0
        if not count and (status := self._process.wait()):
            kind = _PermanentError if status in (126, 127) else OSError  # the shell found nothing to run
            raise kind(f"pipe:{self._command} failed with exit status {status}")
        return count

    def close(self) -> None:
        self._output.close()
        if self._process.poll() is None:  # closed early: do not wait for the rest, and end its children too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
