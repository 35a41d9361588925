"""Files that run code when they are unpickled, planted where a run reads a checkpoint or a student."""

import pickle
from pathlib import Path

import torch


class Bomb:
    """Creates the file `marker` when it is unpickled."""

    def __init__(self, marker: Path):
        self._marker = str(marker)

    def __reduce__(self):
        return open, (self._marker, "w")


def plant(path: Path, marker: Path) -> None:
    """Writes a bomb to `path`: as PyTorch writes its files, or as a bare pickle where those are of another format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if path.suffix in (".bin", ".pt", ".pkl"):
        torch.save({"state": Bomb(marker), "last_epoch": Bomb(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(marker)))


def explodes(path: Path, marker: Path) -> bool:
    """Whether the bomb works: unpickled, it leaves the marker, which is removed again."""
    if path.suffix in (".bin", ".pt", ".pkl"):
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    exploded = marker.exists()
    marker.unlink(missing_ok=True)
    return exploded
