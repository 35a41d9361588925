"""Which shards there are, and their files as raw samples: bytes, not decoded.

    shards = expand_shards("data/{000..010}.tar")
    for raw in read_shard(shards[0]): ...

Nothing in a shard is executed: only files whose extension is wanted are kept, as bytes.
"""

import contextlib
import glob
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from urllib.parse import urlparse
from urllib.request import url2pathname

from braceexpand import braceexpand
from webdataset.gopen import gopen, gopen_schemes
from webdataset.tariterators import base_plus_ext, tar_file_iterator

from lcm_distill.errors import UsageError

logger = logging.getLogger(__name__)

FLAG = "--train_shards_path_or_url"
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "text", "caption")
WANTED = frozenset((*PICTURES, *CAPTIONS, "json"))

SHARD_NEEDS = (
    "A shard is a tar in which the files of a sample share a name and stand next to each other: 0001.jpg (or .jpeg, "
    '.png, .webp) with 0001.txt (or .text, .caption, or 0001.json with a "caption" or "text"). '
    "An extension is what follows the first dot of a name: write a_b.jpg, not a.b.jpg. "
    "To make a shard of a folder: tar --sort=name -cf 000.tar -C FOLDER ."
)


def expand_shards(spec: str | None) -> list[str]:
    """The shards that `--train_shards_path_or_url` names, in a fixed order.

    Args:
        spec: a tar, a brace pattern (`data/{000..010}.tar`), a glob, a folder (its `.tar`, `.tar.gz` and `.tgz`,
            or, if it has none, those of the folders in it), a URL or a `pipe:` command (passed on as they are,
            braces expanded), or several of these with `::` between them.

    Raises:
        UsageError: nothing given, a local path that does not exist, a folder without tars, unbalanced braces, or
            a URL that webdataset does not open.
    """
    parts = [part.strip() for part in (spec or "").split("::") if part.strip()]
    if not parts:
        raise UsageError(
            f"{FLAG} is missing. Give it tar shards: a file, a pattern such as 'data/{{000..010}}.tar', "
            "a folder of tars, a URL, or a 'pipe:' command."
        )
    return [shard for part in parts for shard in _expand_one(part)]


def _expand_one(spec: str) -> list[str]:
    try:
        names = [spec] if os.path.exists(spec) else list(braceexpand(spec))
    except ValueError as error:
        raise UsageError(f"{FLAG}: the braces of {spec!r} do not match ({error}); write {{000..010}}.") from None
    found, missing = [], []
    for name in names:
        path = _local_path(name)
        if path is None:
            scheme = urlparse(name).scheme
            if scheme not in gopen_schemes:
                raise UsageError(
                    f"{FLAG}: webdataset does not open {scheme}: addresses ({name}). Name the command that does, "
                    "such as 'pipe:aws s3 cp s3://bucket/000.tar -'."
                )
            found.append(name)
        elif os.path.isdir(path):
            found += _tars_in(path)
        elif os.path.exists(path):
            found.append(path)
        else:
            matches = glob.glob(path, recursive=True)
            tars = sorted(match for match in matches if match.lower().endswith(TAR_SUFFIXES))
            found += tars
            if not tars:
                missing.append(path)
    if missing:
        raise UsageError(
            f"{FLAG}: {len(missing)} of the {len(names)} paths of {spec!r} not found, the first is {missing[0]}. "
            f"{_describe_folder(os.path.dirname(missing[0]))} Correct the path; relative ones start at {os.getcwd()}."
        )
    return found


def _local_path(shard: str) -> str | None:
    """The path of a shard on this machine's file systems, None for a URL or a command."""
    url = urlparse(shard)
    if url.scheme == "file":
        return url2pathname(url.path)
    return os.path.expanduser(shard) if url.scheme == "" else None


def _tars_in(folder: str) -> list[str]:
    def tars(where: str, names: list[str]) -> list[str]:
        visible = (name for name in names if not name.startswith("."))
        return [os.path.join(where, name) for name in visible if name.lower().endswith(TAR_SUFFIXES)]

    found = sorted(tars(folder, os.listdir(folder)))
    if not found:
        found = sorted(path for where, _, names in os.walk(folder) for path in tars(where, names))
    if not found:
        raise UsageError(f"{FLAG}: no .tar, .tar.gz or .tgz in {folder}. {_describe_folder(folder)} {SHARD_NEEDS}")
    return found


def _describe_folder(folder: str) -> str:
    """What there is at `folder`, or at the nearest folder above it, in one sentence."""
    folder = folder or "."
    if not os.path.isdir(folder):
        return f"There is no folder {folder}. " + _describe_folder(os.path.dirname(folder.rstrip("/")) or ".")
    with os.scandir(folder) as entries:
        found = sorted((e.name + "/" if e.is_dir() else e.name) for e in islice(entries, 10_000))
    if not found:
        return f"The folder {folder} is empty."
    kinds = Counter("folder" if n.endswith("/") else os.path.splitext(n)[1] or "other file" for n in found)
    names = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    return f"The folder {folder} holds {list_counts(kinds)} ({names})."


def list_counts(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listed = [f"{count} x {what}" for what, count in ordered[:20]]
    if ordered[20:]:
        listed.append(f"{len(ordered) - 20} more kinds")
    # Names in a hostile tar may hold what no terminal can show.
    return (", ".join(listed) or "nothing").encode("utf-8", "replace").decode()


@dataclass
class RawSample:
    """The undecoded files of one sample: extension (lower case) to content."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    duplicate: bool = False  # a name came twice: which caption goes with which picture cannot be known

    @property
    def complete(self) -> bool:
        """It has a picture and something to take a caption from."""
        return any(e in self.files for e in PICTURES) and any(e in self.files for e in (*CAPTIONS, "json"))

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.files.values()))


def _split_name(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a file in a tar, split at the first dot of its name as webdataset does.

    Two empty strings for a name without a dot, or with one at its start.
    """
    key, extension = base_plus_ext(name)
    return (key, extension.lower()) if key else ("", "")


def _group(files: Iterable[tuple[str, bytes]]) -> Iterator[RawSample]:
    """Consecutive files of one key make a sample (webdataset's own grouping raises on duplicates or mixes them)."""
    sample = None
    try:
        for name, content in files:
            key, extension = _split_name(name)
            if sample is None or key != sample.key:
                if sample is not None:
                    yield sample
                sample = RawSample(key)
            if extension in sample.files:
                sample.duplicate = True
            else:
                sample.files[extension] = content
    except Exception:
        # The tar is cut. Its last sample is good if it was whole by then; otherwise it is part of the damage.
        if sample is not None and sample.complete:
            yield sample
        raise
    if sample is not None:
        yield sample


def read_shard(shard: str, *, extensions: Counter | None = None) -> Iterator[RawSample]:
    """The samples of a shard in file order, undecoded; files that are neither picture, caption nor JSON stay unread.

    Args:
        shard: a path, URL or `pipe:` command, as webdataset's `gopen` takes it.
        extensions: if given, counts the extensions of all files passed, the unread ones too.

    Raises:
        Exception: what opener and tar reader raise (many kinds), after the samples that could be read.
    """

    def wanted(name: str) -> bool:
        _, extension = _split_name(name)
        if extension and extensions is not None:
            extensions[extension] += 1
        return extension in WANTED

    source = gopen(shard)
    try:
        yield from _group((f["fname"], f["data"]) for f in tar_file_iterator(source, select_files=wanted))
    finally:
        with contextlib.suppress(OSError):  # the command behind a pipe minds that nobody listens any more
            source.close()


def count_samples(shards: list[str]) -> int | None:
    """How many samples the shards hold, from the tar headers alone; None if a shard is not on a local file system.

    Counts samples with a picture and a caption file or a JSON; whether they decode is not known here. What cannot
    be read counts as nothing. Takes about a second for 10,000 samples; a compressed tar has to be unpacked for it.
    """
    total = 0
    for shard in shards:
        path = _local_path(shard)
        if path is None:
            return None
        try:
            with tarfile.open(path) as tar:
                names = (member.name for member in tar if member.isreg())
                wanted = ((name, b"") for name in names if _split_name(name)[1] in WANTED)
                for sample in _group(wanted):
                    total += sample.complete and not sample.duplicate
        except Exception as error:  # noqa: BLE001 - as in the stream
            logger.warning("%s cannot be read to its end: %s", shard, error)
    return total
