"""Paths of programs and commands: ~ is expanded wherever it stands, and a refusal leaves no folder behind it."""

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lcm_distill.errors import UsageError
from lcm_distill.run import run as run_module

pytestmark = pytest.mark.hostile("folders")

PROGRAMS = ("train_lcm_distill_sd_wds", "train_lcm_distill_sdxl_wds", "train_lcm_distill_lora_sd_wds",
            "train_lcm_distill_lora_sdxl_wds")  # fmt: skip
COMMON = ("pretrained_teacher_model", "teacher_config", "pretrained_vae_model_name_or_path", "cache_dir")
# Flags of each parser that are paths, and what else it needs to be given.
COMMANDS = {
    "sample": ((*COMMON, "student", "lora", "init_image", "output_dir"), ["--prompts", "x"]),
    "evaluate": ((*COMMON, "student", "clip_model", "cmmd_model", "output_dir"), ["--prompts", "x"]),
    "bench_inference": ((*COMMON, "student", "output_dir"), []),
    "export_model": ((*COMMON, "single_file", "output_dir"), ["STUDENT"]),
    "encode_shards": (COMMON, ["IN", "OUT", "--resolution", "64"]),
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def check(parse, names, rest, home, capsys):
    """Every flag as --name=~/x, as no shell expands it, and with a user that does not exist."""
    parsed = parse([*rest, *(f"--{name}=~/x/{name}" for name in names)])
    for name in names:
        value = parsed[name]
        assert value in (f"{home}/x/{name}", [f"{home}/x/{name}"]), name
    for wrong in names:
        with pytest.raises(SystemExit):
            parse([*rest, *(f"--{name}={'~no-such-user/' if name == wrong else ''}x" for name in names)])
        assert f"argument --{wrong}: '~no-such-user/x': there is no user 'no-such-user'" in capsys.readouterr().err


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_expand_the_home_folder(program, home, capsys):
    """--output_dir=~/x wrote into a folder named ~."""
    names = (*COMMON, "init_student", "output_dir", "logging_dir", "resume_from_checkpoint")
    parse = importlib.import_module(program).parse_args
    check(lambda argv: parse(argv).flat(), names, [], home, capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_expand_the_home_folder(command, home, capsys):
    names, rest = COMMANDS[command]
    parse = importlib.import_module(f"lcm_distill.{command}").parse_args
    check(lambda argv: vars(parse(argv)), names, rest, home, capsys)


def test_arguments_without_a_flag_are_expanded_too(home):
    parse = importlib.import_module("lcm_distill.pack_shards").parse_args
    assert (parse(["~/in", "~/out"]).images, parse(["~/in", "~/out"]).out) == (f"{home}/in", f"{home}/out")
    parse = importlib.import_module("lcm_distill.encode_shards").parse_args
    assert parse(["IN", "~/o", "--pretrained_teacher_model", "t", "--resolution", "64"]).out == f"{home}/o"
    with pytest.raises(UsageError, match=f"^{home}/run holds no training.jsonl"):
        importlib.import_module("lcm_distill.report").main(["~/run"])


@pytest.mark.parametrize(
    "spec", ["~/data", "~/data/{00000..00001}.tar", "~/data/*.tar", "~/list.txt", "x/0.tar::~/data"]
)
def test_shards_may_be_in_the_home_folder(spec, home, shards, tmp_path):
    from lcm_distill.data.shards import expand_shards

    shutil.copytree(shards, home / "data")
    names = sorted(path.name for path in (home / "data").glob("*.tar"))
    (home / "list.txt").write_text("~/data\n")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "0.tar").write_bytes(b"")
    spec = spec.replace("{00000..00001}.tar", "{" + ",".join(names) + "}")
    assert [found for found in expand_shards(spec) if found != "x/0.tar"] == [f"{home}/data/{name}" for name in names]


# ------------------------------------------------------------------------------------------- what a refusal leaves


@pytest.fixture()
def without_weights(teacher, tmp_path) -> str:
    """A teacher that is refused only when its weights are loaded."""
    return shutil.copytree(teacher, tmp_path / "teacher", ignore=shutil.ignore_patterns("diffusion_pytorch_model*"))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("more", [
    {"train_shards_path_or_url": "nowhere.tar"}, {"report_to": "tensorboard"}, {"caption_column": "nothing"},
    {"mixed_precision": "fp16"}, {"init_student": "nowhere.safetensors"}, {"resume_from_checkpoint": "checkpoint-9"},
])  # fmt: skip
def test_a_refused_run_leaves_no_folder(more, command, run, tmp_path, without_weights, monkeypatch):
    """Once its process has ended: until then it has the folder's lock."""
    before, at_exit = files(tmp_path), []
    monkeypatch.setattr(run_module, "atexit", SimpleNamespace(register=at_exit.append))
    argv = command("new/out", pretrained_teacher_model=str(without_weights), **more)
    with pytest.raises(UsageError):
        run("train_lcm_distill_sd_wds", argv)
    for function in at_exit:
        function()
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["sample", "evaluate", "bench_inference", "encode_shards", "pack_shards"])
def test_a_refused_command_leaves_no_folder(name, tmp_path, without_weights, shards, teacher):
    out = str(tmp_path / "new" / "out")
    argv = {
        "sample": ["--prompts", "x", "--output_dir", out],
        "evaluate": ["--prompts", "x", "--output_dir", out],
        "bench_inference": ["--student", str(tmp_path), "--output_dir", out],
        "encode_shards": [shards, out, "--resolution", "64", "--caption_column", "nothing"],
        "pack_shards": [str(tmp_path / "pictures"), out],
    }[name]
    if name == "pack_shards":
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / "a.png").write_bytes(b"no picture")
        (tmp_path / "pictures" / "a.txt").write_text("a caption")
    else:
        argv += ["--pretrained_teacher_model", teacher if name == "encode_shards" else str(without_weights)]
    before = files(tmp_path)
    with pytest.raises(UsageError):
        importlib.import_module(f"lcm_distill.{name}").main(argv)
    assert files(tmp_path) == before
