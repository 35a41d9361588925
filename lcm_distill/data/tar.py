"""Reads untrusted tars file by file, from any byte on; writes tars that appear only when they are complete.

    tar = TarReader(file)
    for entry in tar:                               # what the headers say
        if entry.readable and entry.size < limit:
            content = tar.content()                 # otherwise it is skipped

    with atomic_tar(path) as tar:
        tar.add("0001.txt", b"a cat")

The formats are POSIX's ustar and pax and GNU's, plain or compressed by gzip, bzip2 or xz (several concatenated streams,
too). Python's tarfile reads them as well, but trusts the headers: a few kilobytes can keep it busy forever, or exhaust
the memory, and at a damaged header it stops silently. Here each of these is a `tarfile.ReadError`.
"""

import bz2
import contextlib
import gzip
import io
import itertools
import lzma
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from lcm_distill.locks import is_locked, try_lock

PARTIAL = ".partial"  # suffix of the names of unfinished files; these names begin with a dot
RESUME_HINT = "Completed shards are kept: run the same command again to continue"  # of commands that write shards

MAX_HEADER_BYTES = 2**20  # of an entry's names and attributes
MAX_SKIP_BYTES = 2 * 2**30  # for one entry of a compressed tar, which can expand to terabytes of zeros

_BLOCK = tarfile.BLOCKSIZE
# After the end mark, two blocks of zeros, programs write zeros up to a whole record: of 20 blocks, or of some power of
# two of bytes that the user gives (tar --blocking-factor), which then divides the size of the tar, and is small beside
# it: otherwise what is missing of 64 samples of 2 KiB would be taken for one record.
_END_MARK, _RECORD, _MAX_RECORD = 2 * _BLOCK, 20 * _BLOCK, 2**20
_DECOMPRESSORS: dict[bytes, Callable[..., Any]] = {  # by the first bytes of a file
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
# A regular file's header from its mode on: five numbers (the fourth is the size), checksum, type, names, device.
_PLAIN_HEADER = re.compile(
    rb"(?:[0-7]{7}[ \0]){3}([0-7]{11})[ \0][0-7]{11}[ \0]([0-7]{6})\0 0.{172}(?:[0-7]{7}[ \0]|\0{8}){2}", re.DOTALL
)


@dataclass
class Entry:
    """What a tar's headers say about one of its files."""

    name: str
    size: int  # bytes of its content
    start: int  # the byte of the (decompressed) tar at which its headers begin: another reader may start there
    readable: bool  # a regular file without holes


class TarReader:
    """Iterates over the entries of `file`, whose position is the byte `offset`, at which an entry begins.

    Raises:
        tarfile.ReadError: the tar is damaged, ends without its end mark, has headers that no real tar has, or is
            followed by more zeros than any program writes: it was half downloaded into a file of the final size.
        Exception: whatever `file` or the decompressor raises.
    """

    def __init__(self, file: BinaryIO, offset: int = 0):
        decompress = None
        if offset == 0:
            first_bytes = cast(io.BufferedReader, file).peek(6)
            matching = (opener for magic, opener in _DECOMPRESSORS.items() if first_bytes.startswith(magic))
            decompress = next(matching, None)
        self.compressed = decompress is not None
        self._stored = file
        self._file = file if decompress is None else cast(BinaryIO, decompress(file))
        self._position = offset
        self._size = 0  # bytes of the content that comes next
        self._unread = 0  # bytes before the next header

    def content(self) -> bytes:
        """The content of the entry that the iterator returned last; call it at most once for each."""
        content = self._file.read(self._size)
        if len(content) < self._size:
            raise tarfile.ReadError("the tar is cut short in a file")
        self._unread -= self._size
        return content

    def __iter__(self) -> Iterator[Entry]:
        extended: dict[str, bytes] = {}  # what extension headers say about the next entry
        start = extension_bytes = 0
        while True:
            if not extension_bytes:
                start = self._position
            block = self._read_header()
            try:
                header = _parse_header(block)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                self._check_end()
                return
            except tarfile.HeaderError as error:
                raise tarfile.ReadError(f"not a tar, or a damaged one: {error}") from None
            kind, size = header.type, header.size
            if kind in b"LKxgX":  # a long name, or attributes, of the next entry
                extension_bytes += size + _BLOCK
                if not 0 <= size <= MAX_HEADER_BYTES or extension_bytes > 2 * MAX_HEADER_BYTES:
                    raise tarfile.ReadError(f"names and attributes of {extension_bytes} bytes")
                self._expect(size)
                content = self.content()
                if kind == b"L":
                    extended["path"] = content.partition(b"\0")[0]
                elif kind in b"xX":
                    extended |= _parse_attributes(content)
                continue
            name = extended["path"].decode("utf-8", "surrogateescape") if "path" in extended else header.name
            if "size" in extended:
                if not extended["size"].isdigit() or len(extended["size"]) > 20:
                    raise tarfile.ReadError("a size that is not a number")
                size = int(extended["size"])
            if size < 0:
                raise tarfile.ReadError(f"a size of {size} bytes")
            sparse = kind == b"S" or any(key.startswith("GNU.sparse.") for key in extended)
            if kind == b"S" and block[482]:  # the list of holes continues in the next blocks
                while self._read_header()[504]:
                    if self._position - start > MAX_HEADER_BYTES:
                        raise tarfile.ReadError("an endless list of holes in a sparse file")
            if kind in b"123456":  # links, devices and folders have no content
                size = 0
            if self.compressed and size > MAX_SKIP_BYTES:
                raise tarfile.ReadError(f"a file of {size} bytes in a compressed tar")
            self._expect(size)
            yield Entry(name, size, start, header.isreg() and not sparse)
            extended, extension_bytes = {}, 0

    def _check_end(self) -> None:
        """`ReadError` if the zeros that begin with the block read last are no end mark, but parts that are missing.

        Something else may follow an end mark, as where tars were joined: it is not part of this tar.
        """
        only_look = getattr(getattr(self._stored, "raw", None), "only_look", None)
        if only_look is not None:
            only_look()
        zeros, at_end = _BLOCK, False
        while zeros <= _END_MARK + _MAX_RECORD:
            try:
                content = self._file.read(_BLOCK)
            except Exception:  # noqa: BLE001 - what follows the tar may be anything, and compressed badly
                content = b""
            if not content.strip(b"\0"):
                zeros += len(content)
                at_end = not content
            if at_end or content.strip(b"\0"):
                break
        size = self._position + zeros - _BLOCK
        records = (2**power for power in range(_BLOCK.bit_length(), _MAX_RECORD.bit_length()))
        fits = any(zeros <= _END_MARK + record and size % record == 0 and 8 * record <= size for record in records)
        if zeros > _END_MARK + _RECORD and not (at_end and fits):
            raise tarfile.ReadError(
                f"zeros instead of files from byte {self._position - _BLOCK} on: a download that was not finished?"
            )

    def _expect(self, size: int) -> None:
        """Notes that the header read last is followed by `size` bytes of content, padded to full blocks."""
        padded = size + -size % _BLOCK
        self._size = size
        self._unread += padded
        self._position += padded

    def _read_header(self) -> bytes:
        """The next block, after what is left of the content before it."""
        unread, self._unread = self._unread, 0
        if unread and not self.compressed:
            self._file.seek(unread, io.SEEK_CUR)
        while unread and self.compressed:
            count = len(self._file.read(min(unread, 2**18)))
            unread = unread - count if count else 0  # at the end: reading the block below fails
        block = self._file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise tarfile.ReadError("the tar ends without its end mark: it is empty, or was cut short")
        self._position += _BLOCK
        return block


def _parse_header(block: bytes) -> tarfile.TarInfo:
    """Name, size, type and errors as in tarfile; three times as fast for plain headers, which nearly all are."""
    plain = _PLAIN_HEADER.match(block, 100)
    if plain is None or sum(block) - sum(block[148:156]) + 8 * ord(" ") != int(plain[2], 8):
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    name, prefix = (block[start:end].partition(b"\0")[0] for start, end in ((0, 100), (345, 500)))
    header = tarfile.TarInfo((prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape"))
    header.size = int(plain[1], 8)
    return header


def _parse_attributes(content: bytes) -> dict[str, bytes]:
    """The records "LENGTH KEY=VALUE\\n" of a pax header that matter here."""
    found: dict[str, bytes] = {}
    position = 0
    while position < len(content) and content[position]:
        length, space, _ = content[position : position + 20].partition(b" ")
        end = position + int(length) if length.isdigit() and space else 0
        if not position + len(length) < end <= len(content):
            raise tarfile.ReadError("malformed attributes")
        key, _, value = content[position + len(length) + 1 : end - 1].partition(b"=")
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse."):
            found[key.decode("ascii", "replace")] = value
        position = end
    return found


class TarWriter:
    """A tar that is being written, by `atomic_tar`."""

    def __init__(self, tar: tarfile.TarFile):
        self._tar = tar
        self.files = 0
        self.size = 0  # bytes of the complete tar, once it is finished

    def add(self, name: str, content: bytes) -> None:
        header = tarfile.TarInfo(name)  # owner and time are 0: the same bytes each time
        header.size = len(content)
        self._tar.addfile(header, io.BytesIO(content))
        self.files += 1


def _open_partial(path: Path) -> tuple[Path, BinaryIO]:
    """A new file for the tar `path`, locked; another machine may have a process with the same number."""
    marks = itertools.chain([f"{os.getpid()}"], (f"{os.getpid()}-{number}" for number in itertools.count(1)))
    for mark in marks:
        partial = path.with_name(f".{path.name}.{mark}{PARTIAL}")
        file = open(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666), "r+b")
        if try_lock(file):
            file.truncate()
            return partial, file
        file.close()
    raise AssertionError


_LEFTOVER = re.compile(r"\..+\.(tar|tgz|gz)\.[0-9]+(-[0-9]+)?\.partial", re.DOTALL)  # as `_open_partial` names them


def remove_partials(folder: Path, name: str = "*") -> Path | None:
    """Removes what killed processes left of the tars called `name`, a pattern, and nothing else; one that a living
    process still writes stays, and is returned."""
    living = None
    for partial in folder.glob(f".{name}{PARTIAL}"):
        if not _LEFTOVER.fullmatch(partial.name) or (partial.is_dir() and not partial.is_symlink()):
            continue  # another program's
        if is_locked(partial):
            living = partial
        else:
            partial.unlink(missing_ok=True)
    return living


@contextlib.contextmanager
def atomic_tar(path: Path) -> Iterator[TarWriter]:
    """Writes a tar that gets the name `path` once the block has ended without an error and all of it is on the disk.

    Without any file added there will be no tar. A killed process leaves `.NAME.PID.partial` in the same folder, which
    is locked (see `lcm_distill.locks`) for as long as the process lives.
    """
    partial, file = _open_partial(path)
    try:
        with file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                writer = TarWriter(tar)
                yield writer
            file.flush()
            os.fsync(file.fileno())
            writer.size = file.tell() if writer.files else 0
        if writer.files:
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Creates a folder for tars if it does not exist; if the block fails, removes it again, unless it has files then.

    The same holds for the folders above it.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:  # the innermost first
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
