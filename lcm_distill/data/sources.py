"""Opening a shard wherever it lies, and opening it again at the byte where a connection broke.

with open_shard("https://host/000.tar") as file: ...        # a buffered, seekable binary file

a path, file:            the operating system
http:, https:            requests, from any byte on (Range)
pipe:COMMAND             the shell; the command may be run again
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

logger = logging.getLogger(__name__)

RETRIES = 5  # openings without a byte in between until a shard is given up
BACKOFF, LONGEST_BACKOFF = 1.0, 30.0  # seconds before the first of them, doubled each time; the longest
TIMEOUT = 30.0  # seconds in which a server must answer, or send something
PIPE_RETRIES = 2  # a command that fails more often than that is more likely wrong than unlucky
PIPE_TIMEOUT = 300.0  # seconds in which a command must write something
BUFFER = 2**16  # bytes; what is larger is read past it, and not copied once more
BLOCK = 8 * 2**20  # bytes of one request of an fsspec file system
_PIECE = 2**16  # bytes of one read from a connection: what a broken one loses of them has to be sent again
_SHORT_SKIP = 2**20  # bytes that are cheaper to read over than to ask for another place


class _Source(Protocol):
    """A source of bytes, opened at some place: `readinto` gives 0 at its end, and raises where it breaks off."""

    def readinto(self, buffer: memoryview, /) -> int: ...
    def close(self) -> None: ...


def local_path(shard: str) -> str | None:
    """The path of a shard on this machine's file systems, None for a URL or a command."""
    url = urlparse(shard)
    if url.scheme == "file":
        return url2pathname(url.path)
    return os.path.expanduser(shard) if url.scheme == "" else None


def why_not(url: str) -> str | None:
    """Why a URL cannot be opened here, with the remedy; None if something is there to open it."""
    scheme = urlparse(url).scheme
    if scheme in ("http", "https", "pipe"):
        return None
    instead = f"Name the command that reads it, such as 'pipe:aws s3 cp {url} -'"
    try:
        fsspec.get_filesystem_class(scheme)
        return None
    except ImportError as error:  # known, but its package is not installed
        return f"{url}: {error}. {instead}, or install that package."
    except ValueError:
        return f"nothing here opens {scheme}: addresses ({url}). {instead}."


def expand_url(url: str, suffixes: tuple[str, ...]) -> list[str]:
    """The shards a remote pattern (`s3://bucket/*.tar`) or folder (`s3://bucket/data/`) stands for; else `[url]`.

    Only where fsspec can list: not for http. Raises what its file system raises.
    """
    scheme = urlparse(url).scheme
    if scheme in ("http", "https", "pipe") or not (url.endswith("/") or any(mark in url for mark in "*?[")):
        return [url]
    files, path = url_to_fs(url)
    pattern = path.rstrip("/") + "/*" if url.endswith("/") else path
    return [files.unstrip_protocol(p) for p in sorted(files.glob(pattern)) if p.lower().endswith(suffixes)]


def open_shard(shard: str, offset: int = 0) -> BinaryIO:
    """The bytes of a shard from `offset` on, as a buffered file that seeks (forwards: without reading, if it can).

    What fails on the way and may pass is tried again from the byte that was reached, with growing pauses: broken and
    stalled connections, servers that are busy (408, 425, 429, 5xx), commands that end with an error.

    Raises:
        OSError, or what the opener raises: at once for what cannot pass (no such file, no permission); later, from
        `read`, for the rest.
    """
    path = local_path(shard)
    if path is not None:
        file: BinaryIO = open(path, "rb", buffering=BUFFER)
        file.seek(offset)
        return file
    return cast(BinaryIO, io.BufferedReader(_RetryingFile(shard, offset), BUFFER))


class _RetryingFile(io.RawIOBase):
    def __init__(self, shard: str, offset: int):
        self._shard = shard
        self._position = offset
        self._source: _Source | None = None
        self._version: str | None = None  # by it, a file that changes while it is read is known
        self._failures = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the end of a shard is not known")
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
                got = self._source.readinto(memoryview(buffer))
            except Exception as error:
                self._drop_source()
                self._pause(error)
            else:
                self._position += got
                self._failures = 0
                return got

    def _open(self) -> _Source:
        scheme = urlparse(self._shard).scheme
        if scheme in ("http", "https"):
            source = _Http(self._shard, self._position, self._version)
            self._version = source.version
            return source
        if scheme == "pipe":
            return _skip(_Command(self._shard.removeprefix("pipe:")), self._position)
        file = fsspec.open(self._shard, "rb", block_size=BLOCK).open()
        file.seek(self._position)
        return cast(_Source, file)

    def _pause(self, error: Exception) -> None:
        """Waits before the next try, or raises `error` if there should be none."""
        retries = PIPE_RETRIES if self._shard.startswith("pipe:") else RETRIES
        if self._failures >= retries or not _may_pass(error):
            raise error
        seconds = min(BACKOFF * 2**self._failures, LONGEST_BACKOFF)
        self._failures += 1
        logger.warning(
            "%s: %s (byte %d); trying again in %g s (%d of %d)",
            self._shard,
            error,
            self._position,
            seconds,
            self._failures,
            retries,
        )
        time.sleep(seconds)

    def _drop_source(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            with contextlib.suppress(Exception):  # it has failed, or nobody needs it any more
                source.close()

    def close(self) -> None:
        self._drop_source()
        super().close()


def _may_pass(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, _Final)):
        return False
    return isinstance(error, (OSError, TransportError))  # requests' own are OSErrors


class _Final(OSError):
    """Trying again would not help."""


def _skip(source: _Source, nbytes: int) -> _Source:
    scratch = memoryview(bytearray(BUFFER))
    while nbytes and (got := source.readinto(scratch[: min(nbytes, BUFFER)])):
        nbytes -= got
    return source


class _Http:
    def __init__(self, url: str, offset: int, version: str | None):
        # The bytes as they lie there: a server that packs them on the way would count others.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
        self._response = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)
        self._response.raise_for_status()
        self.version = self._response.headers.get("ETag") or self._response.headers.get("Last-Modified")
        if version is not None and self.version != version:
            raise _Final(f"{url} has changed while it was read")
        length = self._response.headers.get("Content-Length")
        self._left = int(length) if length else None
        if offset and self._response.status_code != 206:  # this server sends whole files only
            _skip(self, offset)

    def readinto(self, buffer: memoryview, /) -> int:
        content = self._response.raw.read(min(len(buffer), _PIECE))
        buffer[: len(content)] = content
        if self._left is not None:
            self._left -= len(content)
            if not content and self._left > 0:
                raise ConnectionError(f"the connection ended {self._left} bytes too early")
        return len(content)

    def close(self) -> None:
        self._response.close()


class _Command:
    """A shell command's output, whose silence ends after `PIPE_TIMEOUT` and whose children end with it."""

    def __init__(self, command: str):
        self._command = command
        self._process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        assert self._process.stdout is not None
        self._output = cast(io.RawIOBase, self._process.stdout)

    def readinto(self, buffer: memoryview, /) -> int:
        if not select.select([self._output], [], [], PIPE_TIMEOUT)[0]:
            raise TimeoutError(f"pipe:{self._command} has written nothing for {PIPE_TIMEOUT:g} seconds")
        got = self._output.readinto(buffer) or 0
        if not got and (status := self._process.wait()):
            kind = _Final if status in (126, 127) else OSError  # the shell found nothing to run
            raise kind(f"pipe:{self._command} ended with exit status {status}")
        return got

    def close(self) -> None:
        self._output.close()
        if self._process.poll() is None:  # whoever is done early does not wait for the rest; its children go too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
