"""Writing tars that are whole once they have their name, and the same bytes each time."""

import contextlib
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

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
