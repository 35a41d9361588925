"""Finding, refusing and pruning checkpoints, without training anything."""

import json
import logging
import math

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from lcm_distill.errors import SaveError, UsageError
from lcm_distill.models.unets import UNetPart
from lcm_distill.redaction import public_flags
from lcm_distill.run.checkpoint import Checkpoints, changed_flags, find_checkpoint, find_run, list_checkpoints


def make(folder, step, **run):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    record = {"program": "p", "architecture": {"dim": [1, 2]}, "seed": 3, "global_step": step} | run
    (path / "run.json").write_text(json.dumps(record))
    return path


def find(folder, resume="latest", **expected):
    return find_run(resume, str(folder), **{"program": "p", "architecture": {"dim": (1, 2)}, "seed": None} | expected)


def test_latest_is_the_highest_step_not_the_last_name(tmp_path):
    for step in (2, 10, 9):
        make(tmp_path, step)
    path, run = find(tmp_path)
    assert path == tmp_path / "checkpoint-10" and run["global_step"] == 10


@pytest.mark.hostile("checkpoints")
def test_latest_ignores_incomplete_checkpoints_with_a_warning(tmp_path, caplog):
    """The public programs pick an incomplete checkpoint as the latest."""
    make(tmp_path, 2)
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / ".checkpoint-6.partial").mkdir()
    with caplog.at_level(logging.WARNING):
        assert find(tmp_path)[0] == tmp_path / "checkpoint-2"
    assert "checkpoint-4" in caplog.text


def test_latest_without_checkpoints_is_a_new_run(tmp_path):
    assert find(tmp_path) == (None, {})
    assert find(tmp_path / "nowhere") == (None, {})
    assert find(tmp_path, resume=None) == (None, {})


def test_a_new_run_does_not_mix_with_an_earlier_one(tmp_path):
    """A second run into the same folder left `latest` to choose between two runs."""
    make(tmp_path, 7)
    other = make(tmp_path / "other", 3)
    for resume in (None, str(other)):
        with pytest.raises(UsageError, match="--output_dir .*checkpoint-7.*--resume_from_checkpoint latest"):
            find(tmp_path, resume=resume)
    assert find(tmp_path, resume=None, dry_run=True) == (None, {})


@pytest.mark.hostile("checkpoints")
@pytest.mark.parametrize("content", ["[]", "null", "", "[" * 100_000, '{"program": "p"}'])
def test_a_run_json_without_settings_is_refused(tmp_path, content):
    (make(tmp_path, 1) / "run.json").write_text(content)
    with pytest.raises(UsageError, match="run.json cannot be read"):
        find(tmp_path)


@pytest.mark.hostile("checkpoints")
@pytest.mark.parametrize(
    ("key", "value"),
    [("architecture", None), ("architecture", [1]), ("flags", None), ("flags", "x"), ("seed", None), ("seed", "3"),
     ("global_step", None), ("global_step", "1"), ("processes", {})],
)  # fmt: skip
def test_a_run_json_of_other_kinds_of_values_is_refused(tmp_path, key, value):
    """Tracebacks, some only after the weights were loaded."""
    make(tmp_path, 1, **{key: value})
    with pytest.raises(UsageError, match=rf'run.json cannot be read \(its "{key}" is .*another checkpoint'):
        find(tmp_path, flags={"use_8bit_adam": False}, seed=3)


@pytest.mark.hostile("checkpoints")
def test_a_checkpoint_that_does_not_say_its_seed(tmp_path):
    path = make(tmp_path, 1)
    record = json.loads((path / "run.json").read_text())
    del record["seed"]
    (path / "run.json").write_text(json.dumps(record))
    assert find(tmp_path, seed=4)[0] == path


def test_a_path_may_be_absolute_relative_or_inside_the_output_folder(tmp_path, monkeypatch):
    """The public programs cut an explicit path to its last part and look for that in the output folder."""
    elsewhere = make(tmp_path / "other", 5)
    assert find(tmp_path / "out", resume=str(elsewhere))[0] == elsewhere
    monkeypatch.chdir(tmp_path)
    assert find(tmp_path / "out", resume="other/checkpoint-5")[0].resolve() == elsewhere
    assert find(tmp_path / "other", resume="checkpoint-5")[0].resolve() == elsewhere


@pytest.mark.hostile("checkpoints")
def test_a_path_that_is_no_checkpoint_is_refused(tmp_path):
    make(tmp_path, 4)
    with pytest.raises(UsageError, match="--resume_from_checkpoint .*no such folder.*checkpoint-4"):
        find_checkpoint("checkpoint-5", str(tmp_path))
    (tmp_path / "torn").mkdir()
    with pytest.raises(UsageError, match="no run.json"):
        find_checkpoint(str(tmp_path / "torn"), str(tmp_path))


@pytest.mark.hostile("checkpoints")
def test_a_checkpoint_of_something_else_is_refused_with_the_difference(tmp_path):
    make(tmp_path, 1)
    with pytest.raises(UsageError, match=r"another architecture \(dim: \[1, 2\] in the checkpoint, \[1, 3\] now"):
        find(tmp_path, architecture={"dim": (1, 3)})
    with pytest.raises(UsageError, match="was written by p"):
        find(tmp_path, program="q")
    with pytest.raises(UsageError, match="--seed 4.*seed 3"):
        find(tmp_path, seed=4)
    assert find(tmp_path, seed=3)[1]["seed"] == 3


FLAGS = {"use_8bit_adam": False, "dm_weight": 0.5, "dm_rank": 4, "w_min": 3.0, "w_max": 15.0}
FULL = FLAGS | {"unet_time_cond_proj_dim": 32}


@pytest.mark.hostile("checkpoints")
@pytest.mark.parametrize(
    ("saved", "changed", "words"),
    [
        (FLAGS, {"use_8bit_adam": True}, "^--use_8bit_adam: the checkpoint .*/checkpoint-1 .* float32.* leave it"),
        (FLAGS | {"use_8bit_adam": True}, {"use_8bit_adam": False}, "^--use_8bit_adam is not given, but .* 8-bit"),
        (FULL | {"dm_weight": 0.0, "use_8bit_adam": True}, {"use_8bit_adam": False}, "^--use_8bit_adam is not given"),
        (FLAGS, {"dm_rank": 8}, "^--dm_rank: .*another rank.*--dm_rank 4 --w_min 3.0 --w_max 15.0"),
        (FULL, {"dm_rank": 8}, "^--dm_rank: .*another rank"),
        (FULL, {"w_min": 8.0, "w_max": 8.0}, "^--dm_rank: .*whether it takes a guidance embedding.*--w_min 3.0"),
        (FULL | {"w_min": 15.0}, {"w_min": 3.0}, "^--dm_rank: .*whether it takes a guidance embedding"),
    ],
)  # fmt: skip
def test_optimizers_and_fake_scores_of_other_flags_are_refused_before_models_are_loaded(
    tmp_path, saved, changed, words
):
    """A KeyError in the first step, or a refusal only after everything was loaded."""
    (make(tmp_path, 1, flags=saved) / "fake_score").mkdir()
    assert find(tmp_path, flags=saved)[1]["flags"] == saved
    with pytest.raises(UsageError, match=words):
        find(tmp_path, flags=saved | changed)


@pytest.mark.parametrize("recorded", [{}, {"use_8bit_adam": None}, {"use_8bit_adam": "True"}])
@pytest.mark.parametrize("moments", [("exp_avg", "exp_avg_sq"), ("state1", "state2"), ("nested",), None])
def test_where_the_flags_do_not_say_it_the_optimizer_s_state_does(tmp_path, moments, recorded):
    """Such a checkpoint was loaded with the other optimizer, and the first step was a KeyError."""
    path = make(tmp_path, 1, flags=recorded)
    has_8_bits = moments != ("exp_avg", "exp_avg_sq")
    if moments:
        values = {"state1": torch.zeros(2)} if moments == ("nested",) else torch.zeros(2)
        state = {"state": {0: {"step": 1} | dict.fromkeys(moments, values)}, "param_groups": []}
    else:
        parameter = torch.nn.Parameter(torch.ones(64, 64))
        optimizer = pytest.importorskip("bitsandbytes").optim.AdamW8bit([parameter])
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state = optimizer.state_dict()
    torch.save(state, path / "optimizer.bin")
    assert find(tmp_path, flags={"use_8bit_adam": has_8_bits})[0] == path
    with pytest.raises(UsageError, match="^--use_8bit_adam.* holds AdamW's state in " + "f8"[has_8_bits]):
        find(tmp_path, flags={"use_8bit_adam": not has_8_bits})


@pytest.mark.parametrize(
    ("saved", "now", "fake_score"),
    [
        (FULL, FULL | {"dm_weight": 0.0, "dm_rank": 8}, True),  # matching ends
        (FULL | {"dm_weight": 0.0}, FULL | {"dm_rank": 8}, False),  # and begins
        (FULL, FULL | {"dm_weight": 1.0, "w_min": 4.0}, True),
        (FLAGS, FLAGS | {"w_min": 8.0, "w_max": 8.0}, True),  # that of a LoRA never takes a guidance embedding
        ({}, FULL, True),  # a checkpoint that does not say
    ],
)
def test_flags_that_change_no_state_may_be_changed(tmp_path, saved, now, fake_score):
    path = make(tmp_path, 1, flags=saved)
    if fake_score:
        (path / "fake_score").mkdir()
    assert find(tmp_path, flags=now)[0] == path


def test_tokens_are_never_written_and_changes_are_listed():
    flags = public_flags({"hub_token": "secret", "lr": 1, "resume_from_checkpoint": "latest"})
    assert flags == {"lr": 1, "resume_from_checkpoint": "latest"}
    secret = "pipe:curl -H 'Authorization: Bearer secret' https://host/{0..9}.tar"
    urls = [
        "pipe:curl -s \\\n -H 'Authorization: Bearer secret' https://h/0.tar",  # a line continued, as in a shell
        "https://host/0.tar?sig=secret", f"a.tar::https://h/b.tar?secret::{secret}", "https://secret@h/a@b.tar",
        "https://alice:secret@host/0.tar::https://a:secret@h/1.tar", "https://h/0.tar?se=10:00:00Z&sig=secret::b.tar",
    ]  # fmt: skip
    for shards in [secret, *urls]:
        public = public_flags({"train_shards_path_or_url": shards})["train_shards_path_or_url"]
        assert "secret" not in public and public.startswith(shards[:5])
    kept = "hf://datasets/org/name@main/{0..9}.tar::s3://bucket/a.tar"
    assert public_flags({"train_shards_path_or_url": kept}) == {"train_shards_path_or_url": kept}
    assert changed_flags({"flags": {"lr": 2, "resume_from_checkpoint": None}}, flags) == ["--lr: 2 → 1"]


def tiny_unet():
    return UNet2DConditionModel(
        block_out_channels=(4,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        mid_block_type=None, layers_per_block=1, norm_num_groups=2, cross_attention_dim=4,
    )  # fmt: skip


def test_save_restores_prunes_after_and_leaves_no_partial(tmp_path, monkeypatch):
    """The public programs delete the old checkpoint before the new one exists."""
    accelerator = Accelerator(cpu=True)
    unet = tiny_unet()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.1)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    checkpoints = Checkpoints(accelerator, str(tmp_path), {"unet": UNetPart(unet)}, limit=2)

    def step():
        for parameter in unet.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    seen_at_prune = []
    prune = Checkpoints._prune
    monkeypatch.setattr(
        Checkpoints,
        "_prune",
        lambda self, keep: (seen_at_prune.append([p.name for p in list_checkpoints(tmp_path)]), prune(self, keep)),
    )
    for number in (1, 2, 3):
        step()
        checkpoints.save(number, {"program": "p"}, {"place": number})
    assert seen_at_prune[-1] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    assert not list(tmp_path.glob(".checkpoint-*"))

    saved = [p.detach().clone() for p in unet.parameters()]
    step()
    assert not torch.equal(saved[0], next(unet.parameters()))
    after = [p.detach().clone() for p in unet.parameters()]
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "run.json").write_text("{}")
    assert checkpoints.load(tmp_path / "checkpoint-3") == {"place": 3}
    # A later checkpoint no longer belongs to the run: the next `latest` must not return to it.
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    assert (tmp_path / "abandoned-checkpoint-9").is_dir()
    assert all(torch.equal(a, b) for a, b in zip(saved, unet.parameters(), strict=True))
    step()  # the optimizer's moments came back too
    assert all(torch.equal(a, b) for a, b in zip(after, unet.parameters(), strict=True))
    checkpoints.save(3, {}, {})  # again, replacing the one that exists
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    for part in ("stream-0.pt", "optimizer.bin"):
        (tmp_path / "checkpoint-3" / part).unlink()
        with pytest.raises(UsageError, match="checkpoint-3 is damaged"):
            checkpoints.load(tmp_path / "checkpoint-3")
    accelerator.free_memory()


@pytest.mark.hostile("signals")
def test_removal_killed_halfway_leaves_no_incomplete_checkpoint(tmp_path, monkeypatch):
    accelerator = Accelerator(cpu=True)
    unet = accelerator.prepare(tiny_unet())
    checkpoints = Checkpoints(accelerator, str(tmp_path), {"unet": UNetPart(unet)}, limit=1)
    checkpoints.save(1, {}, {})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(2, {}, {})
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert list(tmp_path.glob(".checkpoint-*"))
    checkpoints.save(3, {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]  # hidden leftovers are removed
    accelerator.free_memory()


@pytest.mark.hostile("disks")
def test_a_save_that_fails_leaves_the_old_checkpoint_as_latest(tmp_path, monkeypatch):
    accelerator = Accelerator(cpu=True)
    unet = accelerator.prepare(tiny_unet())
    checkpoints = Checkpoints(accelerator, str(tmp_path), {"unet": UNetPart(unet)}, limit=1)
    checkpoints.save(1, {}, {})
    monkeypatch.setattr(
        "lcm_distill.run.checkpoint._sync_to_disk", lambda folder: (_ for _ in ()).throw(OSError("full"))
    )
    assert checkpoints.save(2, {}, {}) is None
    with pytest.raises(SaveError, match="full.*checkpoint-1"):
        checkpoints.save(2, {}, {}, required=True)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert find_checkpoint("latest", str(tmp_path)) == tmp_path / "checkpoint-1"
    accelerator.free_memory()


def test_the_best_checkpoint_is_kept_besides_the_newest(tmp_path):
    """One is saved whenever the distance is smaller than before; the limit applies to the others."""
    accelerator = Accelerator(cpu=True)
    unet = accelerator.prepare(tiny_unet())
    checkpoints = Checkpoints(accelerator, str(tmp_path), {"unet": UNetPart(unet)}, limit=1)

    def names():
        return [path.name for path in list_checkpoints(tmp_path)]

    run = {"program": "p", "architecture": {"dim": (1, 2)}, "seed": 3}
    with pytest.raises(UsageError, match="--resume_from_checkpoint best: no checkpoint .* is rated"):
        find(tmp_path, resume="best")
    assert checkpoints.keep_if_best(0.5, 1, run, {}) and names() == ["checkpoint-1"]
    checkpoints.save(2, run, {})
    assert not checkpoints.keep_if_best(0.6, 2, run, {})  # worse: the checkpoint of step 2 is not rated
    checkpoints.save(3, run, {})
    assert names() == ["checkpoint-1", "checkpoint-3"]
    assert not checkpoints.keep_if_best(0.5, 4, run, {}) and names() == ["checkpoint-1", "checkpoint-3"]
    assert find(tmp_path, resume="best")[0].name == "checkpoint-1"
    assert find(tmp_path)[0].name == "checkpoint-3"
    assert checkpoints.keep_if_best(0.4, 5, run, {})
    assert names() == ["checkpoint-5"]  # the previous best and the previous newest are gone
    checkpoints.save(6, run, {})
    checkpoints.save(7, run, {})
    assert names() == ["checkpoint-5", "checkpoint-7"]
    assert find(tmp_path, resume="best")[0].name == "checkpoint-5"
    (tmp_path / "checkpoint-5" / "rating.json").write_text("{torn")
    with pytest.raises(UsageError, match="best"):
        find(tmp_path, resume="best")
    accelerator.free_memory()


def test_a_checkpoint_saved_only_as_the_best_goes_when_another_is(tmp_path):
    """Distances fall with nearly every validation: without a limit each left a checkpoint on the disk."""
    accelerator = Accelerator(cpu=True)
    checkpoints = Checkpoints(accelerator, str(tmp_path), {"unet": UNetPart(tiny_unet())}, limit=None)

    def names():
        return [path.name for path in list_checkpoints(tmp_path)]

    for step in (1, 2):
        assert checkpoints.keep_if_best(1 / step, step, {}, {}) and names() == [f"checkpoint-{step}"]
    checkpoints.save(3, {}, {})  # one of the run's own, which the limit, None, keeps
    assert checkpoints.keep_if_best(0.3, 3, {}, {}) and names() == ["checkpoint-3"]
    assert checkpoints.keep_if_best(0.2, 4, {}, {}) and names() == ["checkpoint-3", "checkpoint-4"]
    assert checkpoints.keep_if_best(0.1, 5, {}, {}) and names() == ["checkpoint-3", "checkpoint-5"]
    accelerator.free_memory()


def test_distances_of_other_pictures_are_not_compared(tmp_path, caplog):
    """Resumed with harder prompts, a run never had a best again: that of the easy ones was kept for good."""
    accelerator = Accelerator(cpu=True)
    checkpoints = Checkpoints(accelerator, str(tmp_path), {"unet": UNetPart(tiny_unet())}, limit=None)

    def keep(distance, step, **flags):
        run = {"flags": {"validation_prompts": ["a"], "resolution": 64, "learning_rate": 1, "w_max": 15.0} | flags}
        return checkpoints.keep_if_best(distance, step, run, {})

    assert keep(0.5, 1) and not keep(0.6, 2, learning_rate=2) and not keep(0.6, 2, train_shards_path_or_url="b.tar")
    assert not caplog.records
    assert keep(0.9, 3, validation_prompts=["a", "b"])
    assert "checkpoint-1 is no longer the best: distances with another --validation_prompts cannot" in caplog.text
    assert find_checkpoint("best", str(tmp_path)).name == "checkpoint-3"
    assert not keep(0.95, 4, validation_prompts=["a", "b"])
    # The captions of the first shard are the prompts, unless there are others.
    assert keep(1.0, 5, validation_prompts=None) and keep(1.1, 6, validation_prompts=None, train_shards_path_or_url="b")
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (1, 3, 5, 6)]
    accelerator.free_memory()


@pytest.mark.hostile("checkpoints")
def test_a_distance_that_is_no_number_is_never_the_best(tmp_path):
    """Python's min returns a NaN that comes first: no later checkpoint became the best."""
    accelerator = Accelerator(cpu=True)
    checkpoints = Checkpoints(accelerator, str(tmp_path), {"unet": UNetPart(tiny_unet())}, limit=None)
    assert not checkpoints.keep_if_best(math.nan, 1, {}, {}) and not list_checkpoints(tmp_path)
    for step, distance in ((1, 0.5), (2, 0.4)):
        checkpoints.save(step, {}, {})
        assert checkpoints.keep_if_best(distance, step, {}, {})
    (tmp_path / "checkpoint-1" / "rating.json").write_text('{"distance": NaN}')
    assert find_checkpoint("best", str(tmp_path)) == tmp_path / "checkpoint-2"
    accelerator.free_memory()


@pytest.mark.hostile("checkpoints")
def test_an_incomplete_checkpoint_is_reported_once_a_save(tmp_path, caplog):
    """Pruning looked for the best once for each checkpoint, with a warning each time."""
    accelerator = Accelerator(cpu=True)
    for step in (1, 2, 3):
        make(tmp_path, step)
    (tmp_path / "checkpoint-0").mkdir()
    checkpoints = Checkpoints(accelerator, str(tmp_path), {"unet": UNetPart(tiny_unet())}, limit=9)
    checkpoints.save(4, {}, {})
    assert caplog.text.count("checkpoint-0 is not a complete checkpoint") == 1
    accelerator.free_memory()


@pytest.mark.hostile("disks")
def test_a_best_checkpoint_that_cannot_be_written_is_not_the_best(tmp_path, monkeypatch, caplog):
    accelerator = Accelerator(cpu=True)
    unet = accelerator.prepare(tiny_unet())
    checkpoints = Checkpoints(accelerator, str(tmp_path), {"unet": UNetPart(unet)}, limit=None)
    with monkeypatch.context() as patch:
        patch.setattr("lcm_distill.run.checkpoint._sync_to_disk", lambda folder: (_ for _ in ()).throw(OSError("full")))
        assert not checkpoints.keep_if_best(0.5, 1, {}, {})
    assert "could not be written" in caplog.text and not list_checkpoints(tmp_path)
    assert checkpoints.keep_if_best(0.6, 2, {}, {})  # nothing was rated, so this is the best
    accelerator.free_memory()


@pytest.mark.hostile("disks")
def test_a_part_that_fails_on_one_rank_does_not_block_the_others(tmp_path):
    """Parts gather over the ranks: the main process left at its first full disk, and the others waited for it."""

    class Noting:
        def __init__(self, error=None):
            self.error, self.saved = error, False

        def save(self, folder):
            self.saved = True
            if self.error:
                raise self.error

    parts = {"unet": Noting(OSError("no room")), "unet_target": Noting(), "optimizer.bin": Noting(OSError("still"))}
    checkpoints = Checkpoints(Accelerator(cpu=True), str(tmp_path), parts, None)
    with pytest.raises(SaveError, match="no room"):
        checkpoints.save(1, {}, {}, required=True)
    assert all(part.saved for part in parts.values()) and list_checkpoints(tmp_path) == []


def test_a_dry_run_loads_a_checkpoint_and_changes_nothing(tmp_path):
    accelerator = Accelerator(cpu=True)
    Checkpoints(accelerator, str(tmp_path), {"unet": UNetPart(tiny_unet())}, limit=1).save(1, {}, {"place": 1})
    make(tmp_path, 9)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    dry = Checkpoints(Accelerator(cpu=True), str(tmp_path), {"unet": UNetPart(tiny_unet())}, limit=1, dry_run=True)
    assert dry.load(tmp_path / "checkpoint-1") == {"place": 1}
    assert dry.save(2, {}, {}) is None and not dry.keep_if_best(0.1, 2, {}, {}) and not dry.keep_if_best(0.1, 1, {}, {})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    accelerator.free_memory()
