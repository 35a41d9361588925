"""Opens a shard wherever it is stored, and reopens it at the byte at which a connection broke.

with open_shard("https://host/000.tar") as file: ...        # a buffered, seekable binary file

a path, file:            the operating system
http:, https:            requests, from any byte on (Range)
pipe:COMMAND             the shell; the command may be run more than once
s3:, gs:, hf:, az:, ...  fsspec, with the file system's own package (s3fs, gcsfs, huggingface_hub, ...)
"""

import contextlib
import datetime
import email.utils
import io
import logging
import os
import re
import select
import signal
import stat
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import urljoin, urlparse
from urllib.request import url2pathname

import fsspec
import requests
from fsspec.core import url_to_fs
from urllib3.exceptions import HTTPError as TransportError

from lcm_distill.errors import shown

logger = logging.getLogger(__name__)

RETRIES = 5  # consecutive attempts without a byte before a shard is abandoned
BACKOFF, MAX_BACKOFF = 1.0, 30.0  # seconds before the first retry, doubled each time; the longest wait
MAX_RETRY_AFTER = 120.0  # seconds, the longest wait that a server can ask for (Retry-After)
TIMEOUT = 30.0  # seconds in which a server must send something,
OPEN_SECONDS = 90.0  # and in which it must have answered, redirects included
# The least that must come while it is waited for: in so many seconds (of a command: PIPE_TIMEOUT) so many bytes.
SLOW_SECONDS, LEAST_BYTES = 60.0, 2**14
SLOW_RETRIES = 2  # with a new connection
MAX_REDIRECTS = 10
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
    try:
        url = urlparse(shard)
    except ValueError:  # a host that is none, such as "[": `find_problem` says so
        return None
    if url.scheme in ("file", "local"):
        return url2pathname(url.path)
    return os.path.expanduser(shard) if url.scheme == "" else None


_COMMAND = re.compile("pipe:", re.IGNORECASE)


def is_command(shard: str) -> bool:
    """Whether a shard is the output of a command, `pipe:COMMAND`."""
    return _COMMAND.match(shard) is not None


def describe_irregular(mode: int) -> str | None:
    """What a file of this mode (`os.stat`) is if it is neither a regular file nor a folder; None for these two."""
    for is_kind, name in (
        (stat.S_ISFIFO, "a named pipe (FIFO)"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if is_kind(mode):
            return name
    return None


def open_regular(path: str) -> BinaryIO:
    """Opens a file for reading, buffered; `OSError` at once, not when someone writes, for a FIFO, socket or device."""

    def open_at_once(name: str, flags: int) -> int:
        if irregular := describe_irregular(os.stat(name).st_mode):
            raise IrregularFile(f"{name} is {irregular}, not a file")
        file = os.open(name, flags | os.O_NONBLOCK)  # it may have become one since
        if irregular := describe_irregular(os.fstat(file).st_mode):
            os.close(file)
            raise IrregularFile(f"{name} is {irregular}, not a file")
        return file

    return open(path, "rb", buffering=BUFFER, opener=open_at_once)


# A file system of fsspec that evaluates the templates in a file, which is somebody's program.
_RENDERS = re.compile("reference(?=:|$)", re.IGNORECASE)


def find_problem(url: str) -> str | None:
    """Why a URL cannot be opened on this machine, with the remedy; None if it can."""
    if is_command(url):
        return None
    try:
        scheme = urlparse(url).scheme
    except ValueError as error:
        return f"{url} is not a URL ({error}). Correct its host."
    if scheme in ("http", "https"):
        return None
    if any(map(_RENDERS.match, url.split("::"))):
        return f"reference: URLs are not opened ({url}): their templates are programs. Name the tars themselves."
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
        OSError: at once for a local file that cannot be opened, and for a FIFO, socket or device in its place.
        Exception: from `read`, whatever the opener raises, if the failure is permanent (no such file, no permission)
            or the retries are used up.
    """
    path = local_path(shard)
    if path is not None:
        file = open_regular(path)
        file.seek(offset)
        return file
    return cast(BinaryIO, io.BufferedReader(_RetryingFile(shard, offset), BUFFER))


@dataclass
class _Version:
    """What an answer says about the file, which must not change until it is read."""

    tag: str | None = None  # the ETag or the time of the last change
    is_certain: bool = False  # the tag changes whenever a byte does
    size: int | None = None  # of the file, in bytes
    encoding: str = ""  # in which the server sends it

    def differs(self, other: "_Version") -> bool:
        sizes = {self.size, other.size} - {None}
        return self.tag != other.tag or len(sizes) > 1 or self.encoding != other.encoding


class _Speed:
    """Whether enough bytes come for the time that they are waited for."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._waited, self._bytes = 0.0, 0

    def add(self, nbytes: int, waited: float) -> bool | None:
        """Notes that `nbytes` came after `waited` seconds; at the end of a period, returns whether they were enough."""
        self._waited += waited
        self._bytes += nbytes
        if self._waited < self.seconds:
            return None
        enough = self._bytes >= LEAST_BYTES
        self._waited, self._bytes = 0.0, 0
        return enough


class _RetryingFile(io.RawIOBase):
    """A remote shard or a command's output, reopened at the current position when it fails."""

    def __init__(self, shard: str, offset: int):
        self._shard = shard
        self._position = offset
        self._source: _Source | None = None
        self._version: _Version | None = None  # by the first answer
        self._size: int | None = None  # of the file, once an answer has said it
        self._whole = False  # ask for all of it: the server has answered a range with another one
        self._failures = 0
        self._speed = _Speed(PIPE_TIMEOUT if is_command(shard) else SLOW_SECONDS)
        self._times_slow = 0
        self._looking = False
        # Where no version is certain, what comes again must be what was read: from this byte on, with this checksum.
        self._first, self._checksum = offset, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    @property
    def _is_certain(self) -> bool:
        return self._version is not None and self._version.is_certain

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the length of a shard is not known")
        target = offset + (self._position if whence == io.SEEK_CUR else 0)
        # A new request for what is further on could be answered from another file, if no version is certain.
        far = _SHORT_SKIP if self._is_certain or self._source is None else sys.maxsize
        if self._source is not None and 0 < target - self._position <= far:
            scratch = memoryview(bytearray(min(target - self._position, _SHORT_SKIP)))
            while self._position < target and self.readinto(scratch[: target - self._position]):
                pass
        if target != self._position:
            self._drop_source()
            self._position = self._first = target
            self._checksum = 0
        return target

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        while True:
            began = time.monotonic()
            try:
                if self._source is None and self._looking:
                    return 0
                if self._source is None:
                    self._source = self._open()
                count = self._source.readinto(view)
                if not count and self._is_part(self._source, self._position):
                    self._drop_source()
                    self._source = self._open_at(self._position)
                    continue
                self._watch(count, time.monotonic() - began)
            except Exception as error:
                self._drop_source()
                if self._looking:
                    return 0
                self._wait_or_raise(error)
                continue
            if count:
                if not self._is_certain:
                    self._checksum = zlib.crc32(view[:count], self._checksum)
                self._position += count
                self._failures = 0
            return count

    def only_look(self) -> None:
        """From here on, what fails or does not come at once counts as the end: all of the tar has been read."""
        self._looking = True
        if isinstance(self._source, _CommandSource):
            self._source.timeout = min(1.0, self._source.timeout)

    def _open(self) -> _Source:
        """Opens the shard at the current position; without a certain version, what comes before it is compared."""
        position = self._position if self._is_certain else self._first
        source, checksum = self._open_at(position), 0
        scratch = memoryview(bytearray(min(self._position - position, BUFFER)))
        try:
            while position < self._position:
                count = source.readinto(scratch[: self._position - position])
                if not count and not self._is_part(source, position):
                    raise OSError(f"the end came at byte {position}, before what had been read")
                if not count:
                    source.close()
                    source = self._open_at(position)
                checksum = zlib.crc32(scratch[:count], checksum)
                position += count
            if len(scratch) and checksum != self._checksum:
                raise _PermanentError(f"{self._shard} changed while it was being read")
        except Exception:
            source.close()
            raise
        return source

    def _open_at(self, position: int) -> _Source:
        source: _Source
        version = None
        if is_command(self._shard):
            source = _CommandSource(self._shard.partition(":")[2])
            try:
                _skip_bytes(source, position)
            except Exception:
                source.close()
                raise
        elif urlparse(self._shard).scheme in ("http", "https"):
            try:
                source = _HttpSource(self._shard, position, size=self._size, whole=self._whole)
            except _WrongRange:
                self._whole = True
                raise
            version = source.version
        else:
            file = fsspec.open(self._shard, "rb", block_size=BLOCK).open()
            file.seek(position)
            source, version = cast(_Source, file), _version_of_file(file)
        try:
            self._check_version(version)
        except Exception:
            source.close()
            raise
        return source

    def _is_part(self, source: _Source | None, position: int) -> bool:
        """Whether the source that ended at `position` was only a part, after which another one must be asked for."""
        return isinstance(source, _HttpSource) and source.is_part and position != self._size

    def _check_version(self, version: _Version | None) -> None:
        """Compares the version of a new answer with that of the first; `_PermanentError` if they differ."""
        if version is None:
            return
        if self._version is None:
            self._version = version
        elif self._version.differs(version):
            raise _PermanentError(f"{self._shard} changed while it was being read")
        if version.size is not None:
            if self._size not in (None, version.size):
                raise _PermanentError(f"{self._shard} changed while it was being read")
            self._size = version.size

    def _watch(self, nbytes: int, waited: float) -> None:
        """`TimeoutError` if a connection or command has become too slow; `_PermanentError` if it does so repeatedly."""
        enough = self._speed.add(nbytes, waited)
        if enough:
            self._times_slow = 0
        elif enough is not None and nbytes:
            self._times_slow += 1
            kind = TimeoutError if self._times_slow <= SLOW_RETRIES else _PermanentError
            raise kind(f"{self._shard} sends fewer than {LEAST_BYTES} bytes in {self._speed.seconds:g} seconds")

    def _wait_or_raise(self, error: Exception) -> None:
        """Waits before the next attempt, or raises `error` if it is permanent or the retries are used up."""
        retries = PIPE_RETRIES if is_command(self._shard) else RETRIES
        if self._failures >= retries or not _is_transient(error):
            raise error
        seconds = max(min(BACKOFF * 2**self._failures, MAX_BACKOFF), _asked_to_wait(error))
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


class _PermanentError(OSError):
    """Retrying would not help."""


class IrregularFile(_PermanentError):
    """A FIFO, socket or device in place of a file."""


class _WrongRange(OSError):
    """A server has answered with another range of the file than was asked for."""


def _is_transient(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (202, 408, 425, 429) or status >= 500
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, _PermanentError)):
        return False
    if isinstance(error, requests.RequestException) and isinstance(error, ValueError):  # a URL or a scheme that is none
        return False
    return isinstance(error, (OSError, TransportError))  # those of requests are OSErrors


def _asked_to_wait(error: Exception) -> float:
    """The seconds for which a server asks to be left alone (Retry-After, in seconds or as a date), bounded; else 0."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    asked = headers.get("Retry-After", "").strip()
    if re.fullmatch("[0-9]{1,9}", asked):
        seconds = float(asked)
    else:
        until, now = _parse_date(asked), _parse_date(headers.get("Date", ""))  # by the server's own clock
        now = now or datetime.datetime.now(datetime.timezone.utc)
        seconds = (until - now).total_seconds() if until is not None else 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)


def _parse_date(text: str) -> datetime.datetime | None:
    try:
        date = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return date if date.tzinfo is not None else date.replace(tzinfo=datetime.timezone.utc)


def _skip_bytes(source: _Source, nbytes: int) -> None:
    """Passes over so many bytes; `OSError` if there are fewer."""
    scratch = memoryview(bytearray(min(nbytes, BUFFER)))
    while nbytes:
        count = source.readinto(scratch[:nbytes])
        if not count:
            raise OSError(f"the end came {nbytes} bytes before the place that had been read")
        nbytes -= count


def _version_of_file(file: Any) -> _Version:
    """The version of a file that fsspec has opened, as far as its file system knows it."""
    details = getattr(file, "details", None)
    details = details if isinstance(details, Mapping) else {}
    names = ("ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "last_modified", "updated")
    tags = [f"{name} {details[name]}" for name in names if details.get(name) is not None]
    size = details.get("size")
    return _Version(" ".join(tags) or None, is_certain=True, size=size if isinstance(size, int) else None)


class _NoRedirects(requests.Session):
    """Redirects are followed by `_HttpSource`: requests would first read all of their content into memory."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


_RANGE = re.compile(r"\s*bytes\s+(?:(\d{1,18})-(\d{1,18})|\*)/(?:(\d{1,18})|\*)\s*", re.IGNORECASE)


class _HttpSource:
    """A file on a web server, from `offset` on: all of it, or a part (`is_part`), after which to ask for the rest.

    `size` is that of the file, if an earlier answer has said it. With `whole`, the server is asked for all of the file,
    and what comes before `offset` is passed over.
    """

    def __init__(self, url: str, offset: int, *, size: int | None = None, whole: bool = False):
        # The bytes as stored: offsets into a response that the server compresses would be others.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset and not whole else {})
        self._session = _NoRedirects()
        self._left: int | None = None  # bytes of this answer; None: not known
        self.is_part = False
        try:
            self._response = self._request(url, headers)
            self._read = getattr(self._response.raw, "read1", self._response.raw.read)  # returns what has come
            self._begin(url, offset, size)
        except Exception:
            self._session.close()
            raise

    def _request(self, url: str, headers: dict[str, str]) -> requests.Response:
        """The answer's status and headers, within `OPEN_SECONDS`: each byte of them may come just before `TIMEOUT`."""
        found: list[requests.Response | Exception] = []

        def ask() -> None:
            try:
                found.append(self._follow(url, headers))
            except Exception as error:  # noqa: BLE001 - raised by the thread that waits
                found.append(error)

        thread = threading.Thread(target=ask, daemon=True, name="open_shard")
        thread.start()
        thread.join(OPEN_SECONDS)
        if not found:
            raise TimeoutError(f"{url} has not answered in {OPEN_SECONDS:g} seconds")
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def _follow(self, url: str, headers: dict[str, str]) -> requests.Response:
        for _ in range(MAX_REDIRECTS + 1):
            response = self._session.get(url, headers=headers, stream=True, timeout=TIMEOUT)
            if not response.is_redirect:
                return response
            response.close()
            target = urljoin(url, response.headers["Location"])
            if urlparse(target).scheme not in ("http", "https"):
                raise _PermanentError(f"{url} redirects to {urlparse(target).scheme or 'no'}:, which is not followed")
            url = target
        raise _PermanentError(f"{url}: more than {MAX_REDIRECTS} redirects")

    def _begin(self, url: str, offset: int, known_size: int | None) -> None:
        """Finds out which bytes of the file the answer holds, and goes to `offset`."""
        response, status = self._response, self._response.status_code
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        first, last, size = (None if part is None else int(part) for part in (found.groups() if found else (None,) * 3))
        if status == 416 and offset and size == offset:  # all of it had been read
            self.version, self._left = None, 0
            return
        response.raise_for_status()
        if status not in (200, 203, 206):
            raise requests.HTTPError(f"{url} answers with status {status}", response=response)
        length = response.headers.get("Content-Length", "")
        if re.fullmatch(r"\s*[0-9]{1,18}\s*", length) and "Transfer-Encoding" not in response.headers:
            self._left = int(length)  # anything else is no length
        skipped = offset
        multipart = response.headers.get("Content-Type", "").lower().startswith("multipart/")
        fits = known_size is None or self._left == known_size - offset
        if status == 206 and "Content-Range" not in response.headers and not multipart and fits:
            skipped = 0  # not as it should be, but nothing contradicts that it is the range that was asked for
        elif status == 206:
            if first is None or last is None or not first <= offset <= last or (size is not None and last >= size):
                raise _WrongRange(
                    f"{url} answers a request for the bytes from {offset} on with the range "
                    f"{response.headers.get('Content-Range', 'unknown')!r}"
                )
            self.is_part = True
            self._left = last - first + 1 if self._left is None else min(self._left, last - first + 1)
            skipped = offset - first
        else:
            size = self._left
        self.version = _version_of_answer(response.headers, size)
        if self.version.encoding and offset:
            raise _PermanentError(f"{url} is sent compressed ({self.version.encoding}): there is no byte {offset}")
        if self.version.encoding not in ("", "gzip"):  # a tar may be packed by gzip
            raise _PermanentError(f"{url} is sent compressed ({self.version.encoding}), though that was not asked for")
        _skip_bytes(self, skipped)

    def readinto(self, buffer: memoryview, /) -> int:
        if self._left == 0:
            return 0
        most = min(len(buffer), _READ_SIZE)
        content = self._read(most if self._left is None else min(most, self._left)) or b""
        buffer[: len(content)] = content
        if self._left is not None:
            self._left -= len(content)
            if not content:
                raise ConnectionError(f"the connection closed with {self._left} bytes left")
        return len(content)

    def close(self) -> None:
        self._response.close()
        self._session.close()


def _version_of_answer(headers: Mapping[str, str], size: int | None) -> _Version:
    """The version of a file by the headers of an answer.

    An ETag is certain unless it is a weak one (W/), and so is a time of the last change that is a minute old (RFC 9110,
    8.8.2.2): within the second that it names, a file may change again.
    """
    tag, changed = headers.get("ETag"), headers.get("Last-Modified")
    is_certain = tag is not None and not tag.startswith("W/")
    if changed is not None and not is_certain:
        then, now = _parse_date(changed), _parse_date(headers.get("Date", ""))
        is_certain = then is not None and now is not None and (now - then).total_seconds() >= 60
    encoding = headers.get("Content-Encoding", "").strip().lower().removeprefix("x-")
    return _Version(tag or changed, is_certain, size, "" if encoding == "identity" else encoding)


class _CommandSource:
    """A shell command's output; it may be silent for `timeout` seconds, and its children are ended with it.

    If this process is killed, so is the command: one that writes nothing to its standard output would not notice, and
    run on. A second shell, outside the command's process group, waits for that.
    """

    def __init__(self, command: str):
        self._command = command
        self.timeout = PIPE_TIMEOUT
        self._process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        assert self._process.stdout is not None
        self._output = cast(io.RawIOBase, self._process.stdout)
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r line; kill -KILL -"$0"', str(self._process.pid)],
            stdin=subprocess.PIPE,  # whose other end is closed when this process ends, however it ends
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def readinto(self, buffer: memoryview, /) -> int:
        if not select.select([self._output], [], [], self.timeout)[0]:
            raise TimeoutError(f"pipe:{self._command} wrote nothing for {self.timeout:g} seconds")
        count = self._output.readinto(buffer) or 0
        if not count:
            self._check_status()
        return count

    def _check_status(self) -> None:
        """`OSError` if the command, which has closed its output, fails or does not end."""
        try:
            status = self._process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(
                f"pipe:{self._command} closed its output, but did not end in {self.timeout:g} seconds"
            ) from None
        if status:
            kind = _PermanentError if status in (126, 127) else OSError  # the shell found nothing to run
            raise kind(f"pipe:{self._command} failed with exit status {status}")

    def close(self) -> None:
        self._output.close()
        if self._process.poll() is None:  # closed early: do not wait for the rest, and end its children too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._watcher.kill()
        self._watcher.communicate()  # closes its input
        self._process.wait()
