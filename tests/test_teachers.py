"""docs/teachers.md: each row of its tables is a test. And every program and command asks what can be a teacher."""

import ast
import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from lcm_distill.errors import UsageError
from lcm_distill.models.teacher import Teacher, read_configs

pytestmark = pytest.mark.hostile("teachers")

ROOT = Path(__file__).resolve().parents[1]
LINES = (ROOT / "docs" / "teachers.md").read_text(encoding="utf-8").splitlines()
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in LINES if line.startswith("| ")]
ROWS = [row for row in ROWS if row[0] != "Teacher"]
CHANGE = re.compile(r"`(?P<file>[^`]+)` (?P<how>has|is) `(?P<entries>\{.*\})`")


def expected(row: list[str]) -> str | None:
    """What the row's message contains; None for a teacher that works."""
    if row[2] == "works":
        return None
    match = re.fullmatch(r'refused with "(.+)"', row[2])
    assert match, f'{row[0]}: the result is neither "works" nor "refused with" a message in quotes'
    return match[1]


def change(folder: Path, what: str) -> None:
    """Changes a file of a teacher as a row says."""
    if match := re.fullmatch(r"no `([^`]+)`", what):
        (folder / match[1]).unlink()
        return
    match = CHANGE.fullmatch(what)
    assert match, f"a row is neither a test, nor a file with `has`, `is` or `no`: {what}"
    path, entries = folder / match["file"], json.loads(match["entries"])
    path.write_text(json.dumps(entries if match["how"] == "is" else json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("row", [row for row in ROWS if "::" not in row[1]], ids=lambda row: row[0])
def test_a_row_is_true(row, teachers, tmp_path):
    family = "sdxl" if "SDXL" in row[0] else "sd"
    ignored = shutil.ignore_patterns("*.safetensors")  # so no weights can be read
    folder = Path(shutil.copytree(teachers[family], tmp_path / "teacher", ignore=ignored))
    change(folder, row[1])
    message = expected(row)
    if message is None:
        read_configs(Teacher(str(folder)), family=family, resolution=64, num_ddim_timesteps=50)
        return
    with pytest.raises(UsageError, match=re.escape(message)) as info:
        read_configs(Teacher(str(folder)), family=family, resolution=64, num_ddim_timesteps=50)
    assert str(info.value).startswith("--pretrained_teacher_model") and "\n" not in str(info.value)


@pytest.mark.parametrize("row", [row for row in ROWS if "::" in row[1]], ids=lambda row: row[0])
def test_a_row_names_its_test(row):
    """The test exists, and asserts the message that the row shows."""
    path, _, name = row[1].strip("`").partition("::")
    text = (ROOT / path).read_text(encoding="utf-8")
    found = {node.name: node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    assert name in found and name.startswith("test_")
    first = min([found[name].lineno, *(decorator.lineno for decorator in found[name].decorator_list)])
    source = "\n".join(text.splitlines()[first - 1 : found[name].end_lineno])
    assert (expected(row) or "") in source.replace('"\n        f"', "")


def test_the_tables_are_whole():
    assert len(ROWS) > 70 and all(len(row) == 3 for row in ROWS)
    assert {row[2].partition(" ")[0] for row in ROWS} == {"works", "refused"}


# Every entry asks


def command_line(name: str, teacher: str, shards: str, student: str, folder: Path) -> list[str]:
    """A command line that would use this teacher."""
    common = ["--pretrained_teacher_model", teacher]
    if name.startswith("train"):
        return [
            *common, "--train_shards_path_or_url", shards, "--output_dir", str(folder / "out"), "--resolution", "64",
            "--max_train_steps", "1", "--report_to", "none",
        ]  # fmt: skip
    return {
        "lcm_distill.sample": [*common, "--prompts", "a", "--output_dir", str(folder / "out")],
        "lcm_distill.evaluate": [*common, "--prompts", "a", "--output_dir", str(folder / "out")],
        "lcm_distill.bench_inference": [*common, "--student", student],
        "lcm_distill.encode_shards": [*common, shards, str(folder / "out"), "--resolution", "64"],
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "train_lcm_distill_sd_wds",
        "train_lcm_distill_sdxl_wds",
        "train_lcm_distill_lora_sd_wds",
        "train_lcm_distill_lora_sdxl_wds",
        "lcm_distill.sample",
        "lcm_distill.evaluate",
        "lcm_distill.bench_inference",
        "lcm_distill.encode_shards",
    ],
)
@pytest.mark.parametrize(
    "what, message",
    [
        ("no `tokenizer/tokenizer.json`", "its tokenizer has no vocabulary"),
        ('`unet/config.json` has `{"in_channels": 9}`', "is an inpainting model"),
        ('`vae/config.json` has `{"scaling_factor": NaN}`', "scaling_factor is nan"),
    ],
)
def test_every_program_and_command_refuses_before_weights_are_read(
    name, what, message, teachers, shards, finished, tmp_path, monkeypatch
):
    student = finished("style", "sd")
    family = "sdxl" if "sdxl" in name else "sd"
    folder = Path(shutil.copytree(teachers[family], tmp_path / "teacher"))
    change(folder, what)
    monkeypatch.setattr(Teacher, "load", lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setattr(Teacher, "fingerprint", lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UsageError, match=f"--pretrained_teacher_model .*{message}"):
        importlib.import_module(name).main(command_line(name, str(folder), shards, student, tmp_path))
