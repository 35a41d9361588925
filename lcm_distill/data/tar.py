"""The files of a tar that nobody vouches for, one after the other, from any byte on.

    tar = TarReader(file)
    for entry in tar:                               # what the headers say
        if entry.readable and entry.size < limit:
            content = tar.content()                 # else it is passed over

The formats are POSIX's ustar and pax and GNU's, plain or packed by gzip, bzip2 or xz (in several pieces, too). Python's
tarfile reads them as well, but believes what headers claim: a few kilobytes can hold it for ever, or take all memory,
and at a damaged header it ends in silence. Here each of these is a `tarfile.ReadError`.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

MAX_HEADER_BYTES = 2**20  # of an entry's names and attributes
MAX_SKIP_BYTES = 2 * 2**30  # passed over for one entry of a packed tar, which can hold terabytes of nothing

_BLOCK = tarfile.BLOCKSIZE
_PACKED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}  # how they begin
# A regular file's header from its mode on: five numbers (the fourth is the size), checksum, type, names, device.
_PLAIN = re.compile(
    rb"(?:[0-7]{7}[ \0]){3}([0-7]{11})[ \0][0-7]{11}[ \0]([0-7]{6})\0 0.{172}(?:[0-7]{7}[ \0]|\0{8}){2}", re.DOTALL
)


@dataclass
class Entry:
    """What a tar's headers say of one of its files."""

    name: str
    size: int  # bytes of its content
    start: int  # the byte of the (unpacked) tar where its headers begin: another reader may begin there
    readable: bool  # a regular file without holes


class TarReader:
    """Iterates over the entries of `file`, which stands at the byte `offset`, where an entry begins.

    Raises:
        tarfile.ReadError: where the tar is damaged, ends without its end mark, or claims what no tar has.
        Exception: what `file` raises, or the unpacker.
    """

    def __init__(self, file: BinaryIO, offset: int = 0):
        begins = cast(io.BufferedReader, file).peek(6)
        unpack = next((unpack for magic, unpack in _PACKED.items() if begins.startswith(magic)), None)
        self.compressed = unpack is not None and offset == 0
        self._file = cast(BinaryIO, unpack(file)) if unpack is not None and offset == 0 else file
        self._position = offset
        self._size = 0  # of the content that comes next
        self._unread = 0  # bytes before the next header

    def content(self) -> bytes:
        """The content of the entry that the iterator has just given; once."""
        content = self._file.read(self._size)
        if len(content) < self._size:
            raise tarfile.ReadError("the tar is cut short in a file")
        self._unread -= self._size
        return content

    def __iter__(self) -> Iterator[Entry]:
        more: dict[str, bytes] = {}  # what extension headers say of the next entry
        start = extensions = 0
        while True:
            if not extensions:
                start = self._position
            block = self._header()
            try:
                header = _parse(block)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                return
            except tarfile.HeaderError as error:
                raise tarfile.ReadError(f"not a tar, or a damaged one: {error}") from None
            kind, size = header.type, header.size
            if kind in b"LKxgX":  # a long name, or attributes, of the next entry
                extensions += size + _BLOCK
                if not 0 <= size <= MAX_HEADER_BYTES or extensions > 2 * MAX_HEADER_BYTES:
                    raise tarfile.ReadError(f"names and attributes of {extensions} bytes")
                self._expect(size)
                content = self.content()
                if kind == b"L":
                    more["path"] = content.partition(b"\0")[0]
                elif kind in b"xX":
                    more |= _attributes(content)
                continue
            name = more["path"].decode("utf-8", "surrogateescape") if "path" in more else header.name
            if "size" in more:
                if not more["size"].isdigit() or len(more["size"]) > 20:
                    raise tarfile.ReadError("a size that is no number")
                size = int(more["size"])
            if size < 0:
                raise tarfile.ReadError(f"a header tells of {size} bytes")
            holes = kind == b"S" or any(key.startswith("GNU.sparse.") for key in more)
            if kind == b"S" and block[482]:  # the list of holes goes on in further blocks
                while self._header()[504]:
                    if self._position - start > MAX_HEADER_BYTES:
                        raise tarfile.ReadError("a list of holes without end")
            if kind in b"123456":  # links, devices and folders have no content
                size = 0
            if self.compressed and size > MAX_SKIP_BYTES:
                raise tarfile.ReadError(f"a packed file of {size} bytes")
            self._expect(size)
            yield Entry(name, size, start, header.isreg() and not holes)
            more, extensions = {}, 0

    def _expect(self, size: int) -> None:
        """The content of the header that was read last is so long."""
        padded = size + -size % _BLOCK
        self._size = size
        self._unread += padded
        self._position += padded

    def _header(self) -> bytes:
        """The next block, behind what is left of the content before it."""
        unread, self._unread = self._unread, 0
        if unread and not self.compressed:
            self._file.seek(unread, io.SEEK_CUR)
        while unread and self.compressed:
            got = len(self._file.read(min(unread, 2**18)))
            unread = unread - got if got else 0  # at the end: the block will not be there
        block = self._file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise tarfile.ReadError("the tar ends without its end mark: it is empty, or was cut short")
        self._position += _BLOCK
        return block


def _parse(block: bytes) -> tarfile.TarInfo:
    """Name, size, type and errors as tarfile has them; of a plain header, as nearly all are, three times as fast."""
    plain = _PLAIN.match(block, 100)
    if plain is None or sum(block) - sum(block[148:156]) + 8 * ord(" ") != int(plain[2], 8):
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    name, prefix = (block[start:end].partition(b"\0")[0] for start, end in ((0, 100), (345, 500)))
    header = tarfile.TarInfo((prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape"))
    header.size = int(plain[1], 8)
    return header


def _attributes(content: bytes) -> dict[str, bytes]:
    """The records "LENGTH KEY=VALUE\\n" of a pax header that matter here."""
    found: dict[str, bytes] = {}
    position = 0
    while position < len(content) and content[position]:
        length, space, _ = content[position : position + 20].partition(b" ")
        end = position + int(length) if length.isdigit() and space else 0
        if not position + len(length) < end <= len(content):
            raise tarfile.ReadError("attributes that no tar has")
        key, _, value = content[position + len(length) + 1 : end - 1].partition(b"=")
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse."):
            found[key.decode("ascii", "replace")] = value
        position = end
    return found


PARTIAL = ".partial"  # how names end that are not final; they begin with a dot


class TarWriter:
    """A tar in the making."""

    def __init__(self, tar: tarfile.TarFile):
        self._tar = tar
        self.files = 0
        self.size = 0  # bytes of the whole tar, when it is finished

    def add(self, name: str, content: bytes) -> None:
        header = tarfile.TarInfo(name)  # owner and time 0: always the same
        header.size = len(content)
        self._tar.addfile(header, io.BytesIO(content))
        self.files += 1


@contextlib.contextmanager
def whole_tar(path: Path) -> Iterator[TarWriter]:
    """A tar that gets the name `path` when the block has ended well and all is on the disk; none if nothing was added.

    What a killed process leaves is called `.NAME.PID.partial`, in the same folder.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
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
