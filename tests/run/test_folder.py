"""The output folder: one run has it at a time, and nothing is overwritten that no run has made."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import start, wait

from lcm_distill import launcher, locks
from lcm_distill.errors import UsageError
from lcm_distill.locks import FolderLock
from lcm_distill.run.checkpoint import find_best, list_checkpoints
from lcm_distill.run.folder import check_folder, check_shards_apart, is_run

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "train_lcm_distill_sd_wds"
pytestmark = pytest.mark.hostile("folders")

# A process that takes a lock, says so, and holds it until it is killed.
HOLDER = """
import os, sys, time
from lcm_distill.locks import FolderLock
lock = FolderLock.take(sys.argv[1], "--output_dir out", "train_lcm_distill_sd_wds")
{more}
print("held", flush=True)
time.sleep(1000)
"""


def holder(folder, more=""):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(more=more), str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def take(folder):
    return FolderLock.take(folder, "--output_dir out", "train_lcm_distill_sd_wds")


def test_a_second_process_is_refused_and_told_by_whom(tmp_path):
    """Two runs in one folder tore each other's checkpoints, and both said that their result was in it."""
    process = holder(tmp_path)
    said = (
        rf"--output_dir out is in use: train_lcm_distill_sd_wds, process {process.pid} on .*, has had it since \d{{4}}-"
    )
    try:
        with pytest.raises(UsageError, match=said):
            take(tmp_path)
    finally:
        process.kill()
        process.wait()
    take(tmp_path).release()  # the file of the killed one is there, and blocks nobody
    assert os.listdir(tmp_path) == []


def test_a_lock_does_not_outlive_its_process_in_a_child(tmp_path):
    """A data worker that hangs kept the folder of a run that had been killed."""
    more = "child = os.fork()\nif child == 0:\n    time.sleep(1000)\nprint(child, flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(more=more), str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    try:
        os.kill(child, 0)
        take(tmp_path).release()
    finally:
        os.kill(child, 9)


def test_another_rank_that_lives_on_keeps_the_folder_and_is_named(tmp_path):
    main = holder(tmp_path, "lock.share()")
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER.replace("take", "join").replace(', "train_lcm_distill_sd_wds"', "")
         .format(more=""), str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=f"process {main.pid} on"):
            take(tmp_path)
        main.kill()
        main.wait()
        with pytest.raises(UsageError, match=rf"That process has died, but .*\b{other.pid}\b.* of the same run"):
            take(tmp_path)
    finally:
        for process in (main, other):
            process.kill()
            process.wait()
    take(tmp_path).release()


def test_an_orphan_is_named_as_one(tmp_path):
    """The launcher was killed, and its process is still saving when the job is queued again."""
    more = (
        "from lcm_distill import launcher\nlauncher.PARENT = 1 << 22\nlock = FolderLock.take(sys.argv[1], 'x', 'train')"
    )
    process = holder(tmp_path, more)
    try:
        with pytest.raises(UsageError, match=f"Its launcher has died, so it saves .* kill -9 {process.pid}"):
            take(tmp_path)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"pid": true}', '{"pid": 1e99}', '{"pid": -1}', "\0" * 50])
def test_whatever_a_lock_s_file_holds_it_blocks_only_while_it_is_locked(content, tmp_path):
    (tmp_path / locks.NAME).write_text(content)
    lock = take(tmp_path)
    (tmp_path / locks.NAME).write_text(content)
    found = []

    def second():
        try:
            take(tmp_path)
        except UsageError as error:
            found.append(str(error))
            os._exit(7 if "is in use" in str(error) else 8)

    process = multiprocessing.get_context("fork").Process(target=second)
    process.start()
    process.join()
    assert process.exitcode == 7
    lock.release()
    take(tmp_path).release()


@pytest.mark.parametrize("stray", ["link", "dangling", "folder", "pipe"])
def test_what_is_no_file_in_the_lock_s_place_is_refused_or_replaced_and_never_followed(stray, tmp_path):
    other = tmp_path / "other"
    other.write_text("mine")
    folder = tmp_path / "out"
    folder.mkdir()
    {
        "link": lambda: (folder / locks.NAME).symlink_to(other),
        "dangling": lambda: (folder / locks.NAME).symlink_to(tmp_path / "new"),
        "folder": (folder / locks.NAME).mkdir,
        "pipe": lambda: os.mkfifo(folder / locks.NAME),
    }[stray]()
    with pytest.raises(UsageError, match="--output_dir out cannot be written to"):
        take(folder)
    assert other.read_text() == "mine" and not (tmp_path / "new").exists()


def test_where_there_are_no_locks_a_run_is_warned_and_goes_without(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    take(tmp_path).release()
    assert "has no locks (Function not implemented); make sure that no other run writes there" in caplog.text


def test_a_run_holds_its_folder_while_it_trains_and_no_longer(command, run, tmp_path, monkeypatch):
    """From before it reads the folder to its end; a run that is refused leaves nothing there."""
    from lcm_distill.run.progress import Progress

    seen, step = [], Progress.step

    def looking(self, grad_norm):
        seen.append(json.loads((tmp_path / "out" / locks.NAME).read_text()))
        step(self, grad_norm)

    monkeypatch.setattr(Progress, "step", looking)
    run(PROGRAM, command(steps=1, checkpointing_steps=1))
    assert seen[0]["pid"] == os.getpid() and seen[0]["program"] == PROGRAM
    assert not (tmp_path / "out" / locks.NAME).exists()
    process = holder(tmp_path / "out")
    try:
        before = sorted(path.name for path in (tmp_path / "out").rglob("*"))
        for more in ({}, {"resume_from_checkpoint": "latest"}):
            with pytest.raises(UsageError, match=f"is in use: .* process {process.pid} on"):
                run(PROGRAM, command(steps=2, **more))
        assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == before
        run(PROGRAM, command(steps=2, dry_run=True))  # writes nothing
    finally:
        process.kill()
        process.wait()
    run(PROGRAM, command(steps=2, resume_from_checkpoint="latest"))
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-1", "checkpoint-2"]


def test_two_runs_that_begin_together_one_of_them_trains(command, tmp_path):
    logs = [tmp_path / f"{number}.txt" for number in range(2)]
    argv = command(steps=2, num_validation_images=0)
    both = [start(ROOT / f"{PROGRAM}.py", argv, log) for log in logs]
    codes, errors = wait(both, logs[0]), [log.read_text() for log in logs]
    assert sorted(codes) == [0, 2], errors
    assert f"process {both[codes.index(0)].pid} on" in errors[codes.index(2)]
    assert (tmp_path / "out" / "unet" / "config.json").exists()


# --------------------------------------------------------------------------------------- what no run has made


@pytest.mark.parametrize(
    "names",
    [
        [],
        [".gitattributes", ".git/config"],  # a repository cloned from the Hub
        ["train.log", "slurm-12.out", "logs/12.log", "wandb/run-1/x", "command.sh", "validation/notes.txt"],
        ["runs/events.out.tfevents.1", "dataset.txt"],
    ],
)
def test_files_that_a_run_does_not_touch_are_fine(names, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    check_folder(str(tmp_path), {})
    check_folder(str(tmp_path / "new"), {})


@pytest.mark.parametrize(
    "name",
    [
        "README.md", "unet/config.json", "config.json", "scheduler_config.json", "training.jsonl", "report.html",
        "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors", "validation/step-000010.png",
        "checkpoint-500/unet/config.json", "adapter/adapter_config.json", "abandoned-checkpoint-3/x",
    ],
)  # fmt: skip
def test_files_that_no_run_has_made_are_not_overwritten(name, tmp_path):
    """A run wrote its own over them without a word."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="holds files that no run has made .*: give a new or empty folder, or move"):
        check_folder(str(tmp_path), {})
    # A run's own folder may hold anything.
    (tmp_path / "training.jsonl").write_text(json.dumps({"launch": {"program": PROGRAM}}) + "\n")
    check_folder(str(tmp_path), {})


@pytest.mark.parametrize("line", ["", "{}", "[]", '{"launch": 1}', '{"step": 1}', "[" * 100_000, "\0\0"])
def test_a_journal_of_something_else_makes_no_run(line, tmp_path):
    (tmp_path / "training.jsonl").write_text(line)
    assert not is_run(tmp_path)
    with pytest.raises(UsageError, match=r"\(training.jsonl\)"):
        check_folder(str(tmp_path), {})


def test_a_run_does_not_write_into_its_teacher(command, run, small_teacher, tmp_path):
    """The teacher's U-Net was overwritten by its student's, and its card by the student's."""
    shutil.copytree(small_teacher, tmp_path / "models" / "teacher")
    own = str(tmp_path / "models" / "teacher")
    before = {path: path.stat().st_mtime_ns for path in Path(own).rglob("*")}
    (tmp_path / "link").symlink_to(own)
    flag = {"pretrained_teacher_model": own}
    for out, what in [
        (own, "is the folder"),
        (f"{own}/../teacher/", "is the folder"),
        (str(tmp_path / "link"), "is the folder"),
        (f"{own}/lcm", "is inside the folder"),
        (f"{own}/unet", "is inside the folder"),
        (str(tmp_path / "models"), "contains the folder"),
    ]:
        for more in ({}, {"resume_from_checkpoint": "latest"}):
            with pytest.raises(UsageError, match=f"--output_dir {out} {what} of --pretrained_teacher_model"):
                run(PROGRAM, [*command(steps=1, **flag, **more), "--output_dir", out])
    assert {path: path.stat().st_mtime_ns for path in Path(own).rglob("*")} == before
    run(PROGRAM, [*command(steps=1, **flag), "--output_dir", str(tmp_path / "models-lcm")])


def test_the_other_models_are_not_overwritten_either(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flag in ("teacher_config", "pretrained_vae_model_name_or_path", "init_student"):
        with pytest.raises(UsageError, match=f"of --{flag} mine"):
            check_folder("mine", {flag: "mine"})
    # What is named like a model on the Hub would from then on be taken for it.
    with pytest.raises(UsageError, match="has the name of --pretrained_teacher_model org/sd"):
        check_folder("org/sd", {"pretrained_teacher_model": "org/sd"})
    lora = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    lora.parent.mkdir()
    lora.write_text("mine")
    (tmp_path / "out" / "training.jsonl").write_text('{"launch": {}}\n')
    with pytest.raises(UsageError, match="would overwrite the file of --init_student"):
        check_folder("out", {"init_student": str(lora)})
    check_folder("out", {"init_student": str(lora), "resume_from_checkpoint": "latest"})  # it is not read again
    other = lora.with_name("style.safetensors")
    other.write_text("mine")
    check_folder("out", {"init_student": str(other)})


def test_a_run_that_is_inside_its_teacher_s_folder_already_can_be_resumed(tmp_path):
    """Earlier versions allowed it, and it overwrites nothing there."""
    teacher = tmp_path / "teacher"
    run_json = teacher / "lcm" / "checkpoint-3" / "run.json"
    run_json.parent.mkdir(parents=True)
    run_json.write_text('{"global_step": 3}')
    check_folder(str(teacher / "lcm"), {"pretrained_teacher_model": str(teacher)})
    with pytest.raises(UsageError, match="is the folder"):
        check_folder(str(teacher / "lcm"), {"pretrained_teacher_model": str(teacher / "lcm")})


def test_the_shards_folder_is_no_output_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shards = [str(tmp_path / "data" / "0.tar"), "https://host/1.tar", "pipe:cat 2.tar"]
    with pytest.raises(UsageError, match="--output_dir data is the folder of the shards"):
        check_shards_apart("data", shards)
    with pytest.raises(UsageError, match="is the folder of the shards"):
        check_shards_apart(".", ["0.tar"])
    check_shards_apart("data/out", shards)
    check_shards_apart("other", shards)


def test_the_launcher_is_a_shell_only_if_it_launched(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    assert launcher._find() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert launcher._find() == os.getppid()


# ------------------------------------------------------------------------------------------ pipes, and files of others


@pytest.fixture
def in_time():
    """Ends what hangs by a TimeoutError."""

    def end(*_):
        raise TimeoutError("it hangs")

    previous = signal.signal(signal.SIGALRM, end)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize(
    "name", ["training.jsonl", "checkpoint-1/run.json", "abandoned-checkpoint-1/run.json", "run.json"]
)
def test_a_pipe_in_the_folder_is_not_read(tmp_path, name, in_time):
    """The program waited for ever, before it had said anything."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    assert not is_run(tmp_path)
    if name == "run.json":
        check_folder(str(tmp_path), {})


def test_a_pipe_in_place_of_a_rating_is_not_read(tmp_path, in_time):
    """A save, which looks for the best checkpoint, waited for ever."""
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "run.json").write_text("{}")
    os.mkfifo(tmp_path / "checkpoint-1" / "rating.json")
    assert find_best(tmp_path) is None


@pytest.mark.parametrize("inside", ["", "new", "adapter"])
def test_a_checkpoint_is_no_output_folder(tmp_path, inside):
    """The run began anew in it, and then its own run took that checkpoint for damaged."""
    checkpoint = tmp_path / "checkpoint-5"
    (checkpoint / "adapter").mkdir(parents=True)
    (checkpoint / "run.json").write_text('{"global_step": 5}')
    said = rf"is (in )?a checkpoint \({checkpoint}\).*give its run's folder \({tmp_path}\).*--resume_from_checkpoint"
    with pytest.raises(UsageError, match=said):
        check_folder(str(checkpoint / inside), {"resume_from_checkpoint": "latest"})
    check_folder(str(tmp_path), {})


def test_a_name_that_is_too_long_is_no_run():
    assert not is_run("x" * 300)
    check_folder("x" * 300, {})


@pytest.mark.parametrize("content", ["another program's\n", "[1]", "{}", '{"host": "a"}', "\0" * 100])
@pytest.mark.parametrize("linked", [False, True])
def test_a_lock_file_of_others_is_not_overwritten(tmp_path, content, linked):
    """It was, and removed at the end of the run; under a hard link that is any file. It is locked all the same."""
    mine, out = tmp_path / "mine", tmp_path / "out"
    out.mkdir()
    mine.write_text(content)
    (out / ".lock").hardlink_to(mine) if linked else (out / ".lock").write_text(content)
    lock = take(out)
    assert locks.is_locked(out / ".lock")
    lock.release()
    assert not locks.is_locked(out / ".lock")
    assert mine.read_text() == content and (out / ".lock").read_text() == content


def test_an_empty_lock_file_is_taken(tmp_path):
    """A process may have been killed before it wrote who it is."""
    (tmp_path / ".lock").touch()
    take(tmp_path).release()
    assert os.listdir(tmp_path) == []
