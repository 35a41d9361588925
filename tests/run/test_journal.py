"""The journal: every value once, also after kills and resumes, and no secret in it."""

import json
import logging
import os
import resource
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

import train_lcm_distill_lora_sd_wds as program
from lcm_distill.redaction import public_flags
from lcm_distill.run.journal import Journal, read_journal
from lcm_distill.run.launch import describe_launch, resume_command
from lcm_distill.run.progress import start_progress

LAUNCH = {"program": program.PROGRAM, "flags": {"learning_rate": 1e-4}, "steps": 40}


def strict(path):
    """The lines of a journal as a strict JSON parser reads them."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.fixture()
def path(tmp_path):
    return tmp_path / "training.jsonl"


def test_every_value_is_in_the_file_as_soon_as_it_is_logged(tmp_path, path):
    journal = Journal(tmp_path, LAUNCH)
    journal.log({"loss": 0.5, "lr": torch.tensor(1e-4)}, 10)
    assert [(line["step"], line["loss"]) for line in strict(path)[1:]] == [(10, 0.5)]
    journal.log({"distance": 3}, 10)  # the validation after the same step
    journal.log({"loss": 0.25}, 20)
    journal.end(20, "SIGTERM")
    launches, entries = read_journal(path)
    assert launches[0]["flags"] == LAUNCH["flags"] and launches[0]["global_step"] == 0
    assert launches[0]["end"]["global_step"] == 20 and launches[0]["end"]["reason"] == "SIGTERM"
    values = [{name: value for name, value in entry.items() if name != "time"} for entry in entries]
    assert values == [
        {"step": 10, "loss": 0.5, "lr": pytest.approx(1e-4)},
        {"step": 10, "distance": 3.0},
        {"step": 20, "loss": 0.25},
    ]
    times = [launches[0]["started"], *(entry["time"] for entry in entries), launches[0]["end"]["time"]]
    assert times == sorted(times)


@pytest.mark.hostile("checkpoints")
def test_what_is_not_finite_is_still_json(tmp_path, path):
    journal = Journal(tmp_path, {"flags": {"w_max": float("inf")}})
    journal.log({"loss": float("nan"), "grad_norm": float("inf"), "lr": 1.0}, 10)
    launch, values = strict(path)
    assert launch["launch"]["flags"] == {"w_max": None}
    assert values["loss"] is None and values["grad_norm"] is None and values["lr"] == 1.0


def test_a_resumed_run_has_each_step_once(tmp_path, path):
    """Killed at step 30 in the middle of a line, resumed from the checkpoint at 20, then from that at 10."""
    journal = Journal(tmp_path, LAUNCH)
    for step in (10, 20, 30):
        journal.log({"loss": step}, step)
    with open(path, "a") as file:
        file.write('{"step": 40, "lo')
    journal = Journal(tmp_path, LAUNCH, global_step=20)
    assert [line.get("step", "launch") for line in strict(path)] == ["launch", 10, 20, "launch"]
    journal.log({"loss": 300}, 30)
    _, entries = read_journal(path)
    assert [(entry["step"], entry["loss"]) for entry in entries] == [(10, 10), (20, 20), (30, 300)]

    Journal(tmp_path, LAUNCH, global_step=10).log({"loss": 200}, 20)
    launches, entries = read_journal(path)
    assert [launch["global_step"] for launch in launches] == [0, 20, 10]
    assert [(entry["step"], entry["loss"]) for entry in entries] == [(10, 10), (20, 200)]
    assert sorted(os.listdir(tmp_path)) == ["training.jsonl"]  # no leftover of the rewriting


def test_a_new_run_starts_the_journal_afresh(tmp_path, path):
    """A run that was killed before its first checkpoint left a journal; the same command then starts at step 0."""
    Journal(tmp_path, LAUNCH).log({"loss": 1}, 10)
    Journal(tmp_path, LAUNCH).log({"loss": 2}, 10)
    launches, entries = read_journal(path)
    assert len(launches) == 1 and [entry["loss"] for entry in entries] == [2]


def test_a_run_resumed_into_another_folder_starts_a_journal_there(tmp_path, path):
    Journal(tmp_path, LAUNCH, global_step=500).log({"loss": 1}, 510)
    launches, entries = read_journal(path)
    assert launches[0]["global_step"] == 500 and [entry["step"] for entry in entries] == [510]


def test_other_ranks_and_dry_runs_write_nothing(tmp_path):
    journal = Journal(tmp_path, LAUNCH, enabled=False)
    journal.log({"loss": 1}, 10)
    journal.end(10)
    assert os.listdir(tmp_path) == []
    run = LAUNCH | {"seed": 3}
    for main, dry_run in ((False, False), (True, True), (True, False)):
        accelerator = SimpleNamespace(
            device=torch.device("cpu"), is_main_process=main, num_processes=2, mixed_precision="no"
        )
        start_progress(accelerator, str(tmp_path), run, steps=9, global_step=4, argv=NEEDED, dry_run=dry_run)
        assert os.listdir(tmp_path) == (["training.jsonl"] if main and not dry_run else [])
    ((launch,), _) = read_journal(tmp_path / "training.jsonl")
    assert (launch["steps"], launch["global_step"], launch["seed"]) == (9, 4, 3)


@pytest.mark.hostile("disks")
def test_a_disk_error_is_logged_once_and_never_ends_the_run(tmp_path, path, caplog):
    folder = tmp_path / "out"
    folder.mkdir()
    journal = Journal(folder, LAUNCH)
    shutil.rmtree(folder)
    for step in (10, 20):
        journal.log({"loss": 1}, step)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "training.jsonl could not be written" in caplog.text and "the run continues" in caplog.text
    folder.mkdir()
    journal.log({"loss": 1}, 30)
    assert [entry["step"] for entry in read_journal(folder / "training.jsonl")[1]] == [30]

    (tmp_path / "file").write_bytes(b"")
    impossible = Journal(tmp_path / "file" / "out", LAUNCH, global_step=20)
    impossible.log({"loss": 1}, 30)
    assert len(caplog.records) == 2


@pytest.mark.hostile("disks")
def test_a_line_that_was_cut_short_does_not_take_the_next_with_it(tmp_path, path):
    journal = Journal(tmp_path, LAUNCH)
    journal.log({"loss": 1}, 10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (path.stat().st_size + 8, before[1])
    )  # as on a full disk, for this process alone
    try:
        journal.log({"loss": 2}, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    journal.log({"loss": 3}, 30)
    assert '{"step":\n' in path.read_text()
    assert [entry["step"] for entry in read_journal(path)[1]] == [10, 30]


def test_repeated_steps_are_dropped_by_the_reader_too(tmp_path, path):
    journal = Journal(tmp_path, LAUNCH)
    for step in (10, 20, 30):
        journal.log({"loss": step}, step)
    with open(path, "a") as file:  # a launch whose rewrite of the file failed adds only its line
        file.write(json.dumps({"launch": {"global_step": 10}}) + "\n" + json.dumps({"step": 20, "loss": 200}) + "\n")
    assert [(entry["step"], entry["loss"]) for entry in read_journal(path)[1]] == [(10, 10), (20, 200)]


@pytest.mark.hostile("checkpoints")
def test_other_lines_are_ignored(path):
    path.write_bytes(
        b'\xff\xfe\n\n[1]\n"text"\nnull\n{"step": "ten"}\n{"other": 1}\n{"launch": 3}\n{"end": {}}\n{"step": 5}\n'
    )
    assert read_journal(path) == ([], [{"step": 5}])
    with pytest.raises(FileNotFoundError):
        read_journal(path.with_name("nowhere.jsonl"))


# --- the command to resume


NEEDED = ["--pretrained_teacher_model", "org/teacher"]


def in_a_shell(command):
    """The arguments that a shell gives to `accelerate`."""
    script = f"accelerate() {{ printf '%s\\0' \"$@\"; }}\n{command}\n"
    done = subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--resume_from_checkpoint", "checkpoint-10", "--seed", "7"],
        ["--resume_from_checkpoint=latest", "--gradient_checkpointing", "--no-cast_teacher_unet"],
        ["--hub_token", "hf_SECRET", "--push_to_hub", "--hub_model_id", "me/it"],
        ["--hub_token=hf_SECRET", "--local_rank", "-1"],
        ["--validation_prompts", 'it\'s a "cat"', "a $HOME `x` \\ dog", "two\nlines", "ein süßer Hund", "", "-5"],
        ["--validation_prompts=--not a flag", "--output_dir", "my runs/out", "--w_max=13"],
        ["--train_shards_path_or_url", "data/{00000..00099}.tar::/mnt/a b.tar", "--filter", "punsafe<0.2", "a=b"],
    ],
)
def test_the_command_means_the_same_run(more):
    """What a shell and the program make of it: the flags of the launch, but with `latest` and without a token."""
    words = in_a_shell(resume_command(["some folder/train.py", *NEEDED, *more]))
    assert words[:2] == ["launch", "some folder/train.py"]
    expected = program.parse_args([*NEEDED, *more]).flat()
    assert program.parse_args(words[2:]).flat() == expected | {"resume_from_checkpoint": "latest", "hub_token": None}


@pytest.mark.parametrize(
    "shards",
    ["pipe:aws s3 cp --key SECRET -", "https://host/{0..9}.tar?sig=SECRET::a.tar", "a.tar::pipe:curl -H SECRET"],
)
@pytest.mark.parametrize("joined", [False, True])
def test_no_secret_of_the_shards_is_in_the_command(shards, joined):
    flag = "--train_shards_path_or_url"
    command = resume_command(["train.py", *([f"{flag}={shards}"] if joined else [flag, shards])])
    assert "SECRET" not in command
    shown = program.parse_args([*NEEDED, *in_a_shell(command)[2:]]).streaming.train_shards_path_or_url
    assert shown == public_flags({"train_shards_path_or_url": shards})["train_shards_path_or_url"] and "…" in shown


def test_flags_cannot_be_abbreviated(capsys):
    """`--hub_tok SECRET` would be in the command: the parser must not take it."""
    with pytest.raises(SystemExit):
        program.parse_args([*NEEDED, "--hub_tok", "SECRET"])
    assert "unrecognized arguments" in capsys.readouterr().err


def test_the_command_is_in_lines_that_a_terminal_shows():
    command = resume_command(
        ["train.py", *NEEDED, *[word for step in range(30) for word in ("--filter", f"key>{step}")]]
    )
    lines = command.splitlines()
    assert len(lines) > 3 and all(len(line) <= 102 for line in lines)
    assert all(line.endswith(" \\") for line in lines[:-1]) and all(line.startswith("    --") for line in lines[1:])


def test_a_launch_is_described_without_secrets(tmp_path, monkeypatch):
    argv = [*NEEDED, "--hub_token", "hf_SECRET", "--train_shards_path_or_url", "pipe:SECRET", "--max_train_steps", "9"]
    flags = public_flags(program.parse_args(argv).flat())
    run = {"program": program.PROGRAM, "seed": 3, "flags": flags, "trackers": {}}
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=2, mixed_precision="bf16")
    monkeypatch.chdir(tmp_path)
    launch = describe_launch(accelerator, run, steps=9, argv=argv)
    assert "SECRET" not in json.dumps(launch)
    assert launch["program"] == program.PROGRAM and launch["seed"] == 3 and launch["steps"] == 9
    assert launch["command"].startswith(
        f"accelerate launch {program.PROGRAM}.py --pretrained_teacher_model org/teacher"
    )
    assert launch["folder"] == str(tmp_path) and launch["versions"]["torch"] == torch.__version__
    kind, _, processor = launch["machine"]["device"].partition(", ")
    assert kind == "cpu" and processor and launch["machine"]["processes"] == 2
    monkeypatch.setattr("sys.argv", ["here/train.py", *argv])
    assert describe_launch(accelerator, run, steps=9, argv=None)["command"].startswith(
        "accelerate launch here/train.py"
    )
