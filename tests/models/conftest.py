"""Copies of the toy teachers with one file changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture()
def changed(teachers, tmp_path) -> Callable[..., Path]:
    """`changed(family, file, entry=value, …)`: a toy teacher without weights, with those entries in a JSON file of it.

    Text instead of entries becomes the file's whole content, None removes the file.
    """

    def copy(family: str, file: str | None = None, content: str | None = "", **entries) -> Path:
        folder = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(teachers[family], folder, ignore=shutil.ignore_patterns("*.safetensors"))
        if file is None:
            return folder
        path = folder / file
        if content is None:
            path.unlink()
        elif content:
            path.write_text(content, encoding="utf-8")
        else:
            path.write_text(json.dumps(json.loads(path.read_text()) | entries))
        return folder

    return copy
