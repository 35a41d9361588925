"""Finds shards, and reads their files as raw samples: bytes that are not decoded yet.

    shards = expand_shards("data/{000..010}.tar")
    for raw in read_shard(shards[0]): ...               # opened by lcm_distill.data.sources

Nothing in a shard is executed: only files with known extensions are read, as bytes.
"""

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO

from braceexpand import braceexpand

from lcm_distill.data.captions import caption_files, check_caption_column
from lcm_distill.data.raw import LATENTS_EXTENSION, PICTURE_EXTENSIONS, RawSample, list_counts, printable
from lcm_distill.data.sources import describe_irregular, expand_url, find_problem, is_command, local_path, open_shard
from lcm_distill.data.tar import TarReader
from lcm_distill.errors import UsageError, shown
from lcm_distill.flags import SHARDS_FLAG
from lcm_distill.redaction import protect

logger = logging.getLogger(__name__)

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
LIST_SUFFIXES = (".txt", ".list", ".lst")

MAX_FILE_BYTES = 256 * 2**20  # larger pictures are not read
MAX_TEXT_BYTES = 4 * 2**20  # nor are larger captions and JSON files
MAX_SHARDS = 10**6  # LAION-5B has 232 thousand
_MAX_NAME_CHARACTERS = 256 * 2**20  # of all names that one pattern stands for
_MAX_NESTED = 8  # braces within braces, each of which takes memory for every name
_ENDLESS = 10**18  # no count goes further

# For error messages.
SHARD_FORMAT = (
    "A shard is a tar in which the files of a sample share a name and stand next to each other: 0001.jpg (or .png, "
    '.webp, .avif, .bmp, .gif, .tif) with 0001.txt (or .text, .caption, or 0001.json with a "caption" or "text"); '
    "--caption_column names another extension or JSON key. "
    "An extension is what follows the first dot of a name: write a_b.jpg, not a.b.jpg. "
    "To make shards from a folder of pictures: python -m lcm_distill.pack_shards FOLDER OUT"
)


def expand_shards(spec: str | None, allow_pipe_in_lists: bool = False) -> list[str]:
    """The shards that `--train_shards_path_or_url` names, in a fixed order.

    Args:
        spec: a tar, a brace pattern (`data/{000..010}.tar`), a glob, a folder (its `.tar`, `.tar.gz` and `.tgz`
            files, or, if it has none, those of its subfolders), a list file (`.txt`: one of these on each line; `#`
            begins a comment), a URL or a `pipe:` command (braces are expanded; remote folders, which end in `/`,
            and globs are listed if fsspec can), or several of these joined by `::`.
        allow_pipe_in_lists: take `pipe:` commands from list files, too, which may have been downloaded.

    Raises:
        UsageError: nothing given, a local path that does not exist or is a FIFO, socket or device, a folder or list
            without tars, a list with a command, unbalanced braces, more than `MAX_SHARDS`, or a URL that no installed
            package opens.
    """
    parts = [part.strip() for part in (spec or "").split("::") if part.strip()]
    if not parts:
        raise UsageError(
            f"{SHARDS_FLAG} is missing. Give tar shards: a file, a pattern such as 'data/{{000..010}}.tar', "
            "a folder of tars, a URL, or a 'pipe:' command."
        )
    protect(parts)  # in the messages of mistakes in them
    found: list[str] = []
    for part in parts:
        try:
            found += _expand_one(part, allow_pipe_in_lists)
        except OSError as error:
            raise UsageError(
                f"{SHARDS_FLAG}: {printable(part, 1000)} cannot be read ({error}); correct the path, or "
                "its permissions."
            ) from None
        if len(found) > MAX_SHARDS:
            raise _too_many(part, f"with what stands before it, {len(found):,} shards")
    protect(found)
    return found


def _too_many(spec: str, what: str) -> UsageError:
    return UsageError(
        f"{SHARDS_FLAG}: {printable(spec)!r} stands for {what}; at most {MAX_SHARDS:,} shards are taken. Correct its "
        "braces, or pack more samples into each shard."
    )


def _expand_braces(pattern: str) -> list[str]:
    """The names that a pattern stands for: counted first, since a short one may stand for more than the memory holds.

    `ValueError` for braces that do not match, `UsageError` for too many names.
    """
    count, characters = _count_expansion(pattern)
    if count > MAX_SHARDS:
        raise _too_many(pattern, f"{count:,} names" if count < _ENDLESS else "endlessly many names")
    if characters > _MAX_NAME_CHARACTERS:
        raise _too_many(pattern, f"names of {characters:,} characters")
    return list(braceexpand(pattern))


@dataclass
class _Expansion:
    """So many names, and the characters of all of them."""

    count: int = 1
    characters: int = 0

    def __add__(self, other: "_Expansion") -> "_Expansion":  # either of them
        return _Expansion(min(self.count + other.count, _ENDLESS), min(self.characters + other.characters, _ENDLESS))

    def __mul__(self, other: "_Expansion") -> "_Expansion":  # one after the other
        characters = self.characters * other.count + other.characters * self.count
        return _Expansion(min(self.count * other.count, _ENDLESS), min(characters, _ENDLESS))


def _count_expansion(pattern: str) -> tuple[int, int]:
    """(how many names `braceexpand` makes of a pattern, their characters with escapes), each at most `_ENDLESS`."""
    # For each brace that is open: where its content begins, its alternatives before the last comma, what follows that.
    opened: list[tuple[int, _Expansion | None, _Expansion]] = [(0, None, _Expansion())]
    end = 0
    for mark in re.finditer(r"\\.|[{},]", pattern, re.DOTALL):
        start, before, last = opened.pop()
        last *= _Expansion(characters=mark.start() - end)
        end = mark.end()
        if mark[0] == "{":
            opened += [(start, before, last), (end, None, _Expansion())]
            if len(opened) > _MAX_NESTED + 1:
                raise ValueError(f"more than {_MAX_NESTED} of them are nested")
        elif mark[0] == "}":
            if not opened:
                raise ValueError("one is closed that was not opened")
            inside = _count_range(pattern[start : mark.start()]) if before is None else before + last
            start, before, outside = opened.pop()
            opened.append((start, before, outside * (inside or last * _Expansion(characters=2))))
        elif mark[0] == "," and opened:
            opened.append((start, last if before is None else before + last, _Expansion()))
        else:
            opened.append((start, before, last * _Expansion(characters=len(mark[0]))))
    if len(opened) > 1:
        raise ValueError("one is not closed")
    names = opened[0][2] * _Expansion(characters=len(pattern) - end)
    return names.count, names.characters


def _count_range(inside: str) -> _Expansion | None:
    """The names of `{0..9}`, `{00..10..2}` or `{a..z}`, of which `inside` is the content; None for any other."""
    if numbers := re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\n?", inside):
        if max(len(number or "") for number in numbers.groups()) > 18:
            raise ValueError("a number in them has more than 18 digits")
        first, last, step = (int(number or 1) for number in numbers.groups())
        count = abs(last - first) // (step or 1) + 1
        return _Expansion(min(count, _ENDLESS), min(count * max(len(numbers[1]), len(numbers[2])), _ENDLESS))
    if re.fullmatch(r"[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?\n?", inside):
        count = len(list(braceexpand(f"{{{inside}}}")))
        return _Expansion(count, count)
    return None


def _expand_one(spec: str, allow_pipe_in_lists: bool, in_list: str | None = None) -> list[str]:
    """The shards that one part of the flag, or one entry of a list, names."""
    try:
        names = [spec] if os.path.exists(spec) else _expand_braces(spec)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(
            f"{SHARDS_FLAG}: the braces of {printable(spec)!r} do not match ({printable(str(error))}); "
            "write {000..010}."
        ) from None
    found, missing = [], []
    for name in names:
        path = local_path(name)
        if in_list is not None and name.lower().endswith(LIST_SUFFIXES) and not is_command(name):  # perhaps itself
            raise UsageError(f"{SHARDS_FLAG}: the list {in_list} names another list, {name}; name its shards instead.")
        if path is None:
            found += _list_remote(name)
        elif os.path.isdir(path):
            found += _find_tars(path)
        elif os.path.isfile(path) and path.lower().endswith(LIST_SUFFIXES):
            found += _read_list(path, allow_pipe_in_lists)
        elif os.path.exists(path):
            if irregular := describe_irregular(os.stat(path).st_mode):
                raise UsageError(
                    f"{SHARDS_FLAG}: {path} is {irregular}, not a file, and cannot be read anew in each epoch; give a "
                    "file, or a command that writes the tar each time it is run ('pipe:COMMAND')."
                )
            found.append(path)
        else:
            matches = glob.glob(path, recursive=True) if glob.has_magic(path) else []
            tars = sorted(match for match in matches if match.lower().endswith(TAR_SUFFIXES))
            found += tars
            if not tars:
                missing.append(path)
    if missing:
        raise UsageError(
            f"{SHARDS_FLAG}: {len(missing)} of the {len(names)} paths of {spec!r} not found, the first is "
            f"{missing[0]}. {_describe_folder(os.path.dirname(missing[0]))} Correct the path; relative ones start at "
            f"{os.getcwd()}."
        )
    return found


def _list_remote(url: str) -> list[str]:
    problem = find_problem(url)
    if problem is not None:
        raise UsageError(f"{SHARDS_FLAG}: {problem}")
    try:
        found = expand_url(url, TAR_SUFFIXES)
    except Exception as error:  # noqa: BLE001 - each file system has errors of its own
        raise UsageError(
            f"{SHARDS_FLAG}: {url} cannot be listed: {error}. Check the URL and your access to it, or name the shards "
            "themselves."
        ) from None
    if not found:
        raise UsageError(f"{SHARDS_FLAG}: {url} matches no .tar, .tar.gz or .tgz; correct the URL.")
    return found


def _read_list(path: str, allow_pipe: bool) -> list[str]:
    """The shards of a list file: one entry per line; relative paths start at the list's folder."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except UnicodeDecodeError:
        raise UsageError(
            f"{SHARDS_FLAG}: {path} should be a list of shards, one per line, but is not a text file."
        ) from None
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise UsageError(f"{SHARDS_FLAG}: the list {path} is empty; write one shard per line.")
    found: list[str] = []
    for entry in entries:
        local = local_path(entry)
        named = _expand_one(
            entry if local is None else os.path.join(os.path.dirname(path), local), allow_pipe, in_list=path
        )
        if not allow_pipe and any(map(is_command, named)):
            raise UsageError(
                f"{SHARDS_FLAG}: the list {path} names a command, {printable(entry)!r}, which is not run, since a list "
                "may come from elsewhere. Read it, and if it is right, pass --allow_pipe_in_lists, or give the command "
                "itself instead of the list."
            )
        found += named
        if len(found) > MAX_SHARDS:
            raise _too_many(entry, f"with what stands before it, {len(found):,} shards")
    return found


def _find_tars(folder: str) -> list[str]:
    """The tars directly in `folder`, or, if there are none, those of its subfolders."""

    def pick_tars(parent: str, names: list[str]) -> list[str]:
        visible = (name for name in names if not name.startswith("."))
        return [os.path.join(parent, name) for name in visible if name.lower().endswith(TAR_SUFFIXES)]

    found = sorted(pick_tars(folder, os.listdir(folder)))
    if not found:
        found = sorted(path for parent, _, names in os.walk(folder) for path in pick_tars(parent, names))
    if not found:
        raise UsageError(
            f"{SHARDS_FLAG}: no .tar, .tar.gz or .tgz in {folder}. {_describe_folder(folder)} {SHARD_FORMAT}"
        )
    return found


def _describe_folder(folder: str) -> str:
    """What `folder`, or the nearest folder above it that exists, contains, in one sentence."""
    folder = folder or "."
    if not os.path.isdir(folder):
        return f"There is no folder {folder}. " + _describe_folder(os.path.dirname(folder.rstrip("/")) or ".")
    with os.scandir(folder) as entries:
        found = sorted((e.name + "/" if _is_folder(e) else e.name) for e in islice(entries, 10_000))
    if not found:
        return f"The folder {folder} is empty."
    kinds = Counter("folder" if n.endswith("/") else os.path.splitext(n)[1] or "other file" for n in found)
    names = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    return f"The folder {folder} contains {list_counts(kinds)} ({names})."


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _has_parts(sample: RawSample, caption_column: str | None) -> bool:
    """Whether the sample has a picture, or its latents, and a file that may hold a caption."""
    pictures, captions = (*PICTURE_EXTENSIONS, LATENTS_EXTENSION), caption_files(caption_column)
    return any(e in sample.files for e in pictures) and any(e in sample.files for e in captions)


def _split_name(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a file in a tar, split at the first dot of its base name, as webdataset does.

    Two empty strings for a name that has no dot or starts with one. (webdataset's own regular expression takes hours
    for some names.)
    """
    folder, slash, name = name.rpartition("/")
    stem, _, extension = name.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and extension else ("", "")


@dataclass
class _Member:
    """A file of a sample in a tar; `content` is None if it is too large to be read."""

    name: str
    content: bytes | None
    start: int | None  # the byte at which its header begins; None for a compressed tar


def _group_by_key(members: Iterable[_Member], caption_column: str | None) -> Iterator[RawSample]:
    """Consecutive files with the same key are a sample (webdataset's grouping raises on duplicates or mixes them)."""
    sample = None
    try:
        for member in members:
            key, extension = _split_name(member.name)
            if sample is None or key != sample.key:
                if sample is not None:
                    sample.end = member.start
                    yield sample
                sample = RawSample(key)
            if extension in sample.files:
                sample.duplicate = True
            elif member.content is None:
                sample.too_large = True
            else:
                sample.files[extension] = member.content
                if sample.nbytes > MAX_FILE_BYTES:
                    sample.files, sample.too_large = {}, True
    except Exception:
        # The tar is damaged from here on. A last sample that has all parts is good; otherwise it is part of the damage.
        if sample is not None and _has_parts(sample, caption_column):
            yield sample
        raise
    if sample is not None:
        sample.last = True
        yield sample


class _Names:
    """The names in a tar, in order: counts their extensions, and finds pictures that are in no sample.

    Consecutive files of one key are counted together, when a file of another key follows: nothing is counted before
    the sample that it belongs to. A picture such as a.b.jpg, whose extension is "b.jpg", is in no sample if none of the
    files of its key is one that is read, or if it has a caption of its own, a.b.txt. (Beside a.jpg and a.txt,
    a.mask.png is another file of the sample a.)
    """

    MAX_REMEMBERED = 10_000  # dotted names of one key: a hostile tar may have millions

    def __init__(
        self, caption_column: str | None, extensions: Counter | None, on_dotted: Callable[[str], object] | None
    ):
        self._needed = _needed_extensions(caption_column)
        self._caption_ends = tuple(f".{extension}" for extension in caption_files(caption_column))
        self._extensions, self._on_dotted = extensions, on_dotted
        self._key = ""
        self._start_key()

    def _start_key(self) -> None:
        self._pending: Counter = Counter()
        self._is_sample = False  # a file of the key is one that is read
        self._pictures: dict[int, str] = {}  # by the hash of its name without the extension: names can have a megabyte
        self._captioned: set[int] = set()

    def add(self, name: str) -> bool:
        """Notes the next file; returns whether it is to be read."""
        key, extension = _split_name(name)
        if not extension:
            return False
        if key != self._key:
            self.end_key()
            self._key = key
        if self._extensions is not None:
            self._pending[extension] += 1
        if extension in self._needed:
            if not self._is_sample:
                self._is_sample = True
                self._report_dotted()  # those before it: who begins to read at this file does not come across them
            return True
        if "." in extension and self._on_dotted is not None:
            self._add_dotted(extension)
        return False

    def _add_dotted(self, extension: str) -> None:
        stem, _, last = extension.rpartition(".")
        if last in PICTURE_EXTENSIONS:
            self._pictures[hash(stem)] = printable(f"{self._key}.{extension}")
        for end in self._caption_ends:
            if extension.endswith(end):
                self._captioned.add(hash(extension[: -len(end)]))
        if len(self._pictures) + len(self._captioned) > self.MAX_REMEMBERED:
            self._report_dotted()

    def _report_dotted(self) -> None:
        for stem, name in self._pictures.items():
            if self._on_dotted is not None and (not self._is_sample or stem in self._captioned):
                self._on_dotted(name)
        self._pictures, self._captioned = {}, set()

    def end_key(self) -> None:
        """Counts the files of the current key, and reports its pictures that are in no sample."""
        if self._extensions is not None:
            self._extensions.update(self._pending)
        if self._pictures:
            self._report_dotted()
        if self._pending or self._is_sample or self._captioned:
            self._start_key()


def _read_members(file: BinaryIO, *, offset: int, names: _Names) -> Iterator[_Member]:
    """The needed regular files of a tar, in order; the position of `file` is `offset`."""
    tar = TarReader(file, offset)
    try:
        for entry in tar:
            if not entry.readable or not names.add(entry.name):
                continue
            start = None if tar.compressed else entry.start
            is_text = not entry.name.lower().endswith((*PICTURE_EXTENSIONS, LATENTS_EXTENSION))
            too_large = entry.size > (MAX_TEXT_BYTES if is_text else MAX_FILE_BYTES)
            yield _Member(entry.name, None if too_large else tar.content(), start)
    except Exception:
        names.end_key()
        raise
    names.end_key()


def read_shard(
    shard: str,
    *,
    caption_column: str | None = None,
    extensions: Counter | None = None,
    on_dotted: Callable[[str], object] | None = None,
    offset: int = 0,
) -> Iterator[RawSample]:
    """Yields the samples of a shard in file order, undecoded.

    Files other than pictures, latents, captions and JSON are not read.

    Args:
        shard: a path, URL or `pipe:` command, as `open_shard` takes it.
        caption_column: where the caption is, as returned by `check_caption_column`; None for the usual places.
        extensions: if given, counts the extensions of all files, also of those that are not read, up to the last
            sample that was yielded.
        on_dotted: if given, is called with the (printable) name of each picture that is in no sample because of dots
            in its name (`DOTTED_NAME`): before the sample is yielded after whose first file it stands, so that reading
            from that sample's `end` does not come across it again.
        offset: 0, or the `end` of an earlier sample, to read what comes after it.

    Raises:
        Exception: whatever opener and tar reader raise (many types), after the samples that could be read.
    """
    names = _Names(caption_column, extensions, on_dotted)
    with open_shard(shard, offset) as file:
        yield from _group_by_key(_read_members(file, offset=offset, names=names), caption_column)


def _needed_extensions(caption_column: str | None) -> frozenset[str]:
    return frozenset((*PICTURE_EXTENSIONS, LATENTS_EXTENSION, *caption_files(caption_column)))


def count_samples(shards: list[str], *, caption_column: str | None = None) -> int | None:
    """The number of samples in the shards, from the tar headers alone; None if a shard is not on a local file system.

    Counts samples with a picture (or its latents) and a caption file (that of `--caption_column`, if given) or a JSON;
    whether they decode, and whether the JSON has a caption, is not checked. What cannot be read is not counted.
    Takes about a second for 10,000 samples; compressed tars have to be decompressed for it.
    """
    column = check_caption_column(caption_column)
    needed = _needed_extensions(column)
    total = 0
    for shard in shards:
        path = local_path(shard)
        if path is None:
            return None
        try:
            with open_shard(path) as file:
                names = (entry.name for entry in TarReader(file) if entry.readable)
                members = (_Member(name, b"", None) for name in names if _split_name(name)[1] in needed)
                for sample in _group_by_key(members, column):
                    total += _has_parts(sample, column) and not sample.duplicate
        except Exception as error:  # noqa: BLE001 - as in the stream
            logger.warning("%s cannot be read to its end: %s", shown(shard), shown(str(error)))
    return total
