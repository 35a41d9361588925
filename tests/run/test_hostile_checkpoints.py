"""Checkpoints and output folders that are hostile or damaged: nothing is executed, accepted in silence, or lost."""

import json
import math
import os
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from pickle_bombs import explodes, plant
from processes import start_ranks, wait

from lcm_distill.distributed.fsdp import SplitOptimizer, load_network
from lcm_distill.distributed.zero import ZeroOptimizer
from lcm_distill.errors import DivergenceError, SaveError, UsageError
from lcm_distill.export.weights import _writing
from lcm_distill.models.fake_score import FakeScore
from lcm_distill.models.lora import Lora
from lcm_distill.models.unets import UNetPart
from lcm_distill.run import checkpoint as checkpoint_module
from lcm_distill.run.checkpoint import Checkpoints, find_checkpoint, find_run, list_checkpoints, where_to_resume
from lcm_distill.run.matching import DistributionMatching
from lcm_distill.run.optim import LearningRateSteps
from lcm_distill.run.record import digests_of, read_record, write_record

RUN = {"program": "p", "architecture": {"dim": [1]}, "seed": 3, "flags": {"lr": 1}, "batches": 2}


def tiny_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(4,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        mid_block_type=None, layers_per_block=1, norm_num_groups=2, cross_attention_dim=4,
    )  # fmt: skip


def find(folder, resume="latest", **more):
    expected = {"program": "p", "architecture": {"dim": (1,)}, "seed": None}
    return find_run(resume, str(folder), **expected | more)


class Training:
    """What trains, of the kind "full" or "lora", with a fake score, and its checkpoints in `folder`."""

    def __init__(self, folder: Path, kind: str, limit=None):
        self.accelerator = Accelerator(cpu=True)
        self.accelerator._optimizers.clear()
        unet = tiny_unet()
        lora = Lora(unet, rank=2, alpha=2, target_modules=["conv1", "conv2"], average=True) if kind == "lora" else None
        teacher = unet if lora else tiny_unet().requires_grad_(False)
        fake_score = FakeScore(teacher, rank=2, target_modules=["conv1", "conv2"])
        fake_score.train()
        self.trained = lora.parameters() if lora else list(unet.parameters())
        self.optimizer = self.accelerator.prepare(torch.optim.AdamW(self.trained, lr=0.1))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer.optimizer, lambda step: 1 / (1 + step))
        self.matching = object.__new__(DistributionMatching)
        self.matching._fake_score = fake_score
        self.matching._optimizer = torch.optim.AdamW(fake_score.parameters(), lr=0.1)
        self.matching._scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.target = tiny_unet()
        self.parts = lora.parts() if lora else {"unet": UNetPart(unet), "unet_target": UNetPart(self.target)}
        self.parts |= self.matching.parts() | {LearningRateSteps.FILE: LearningRateSteps(self.scheduler)}
        self.checkpoints = Checkpoints(self.accelerator, str(folder), self.parts, limit)

    def step(self):
        for parameters, optimizer in ((self.trained, self.optimizer), *self._fake()):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        self.scheduler.step()

    def _fake(self):
        return [(self.matching._fake_score.parameters(), self.matching._optimizer)]

    def save(self, step: int, **run):
        return self.checkpoints.save(step, RUN | run, {"place": step})


@pytest.fixture(params=["full", "lora"])
def training(request, tmp_path):
    return Training(tmp_path / "out", request.param)


def saved(training, *steps) -> Path:
    for step in steps:
        training.step()
        training.save(step)
    return Path(training.checkpoints._output_dir) / f"checkpoint-{steps[-1]}"


def sign(path: Path) -> None:
    """Brings the digests in run.json up to date, as one who plants a file can."""
    record = {name: value for name, value in read_record(path).items() if name not in ("files", "sha256")}
    write_record(path, record, {n: d for n, d in digests_of(path).items() if n != "run.json"})


def as_an_earlier_version(path: Path, training) -> None:
    """Makes of a checkpoint what it would have been before there were digests."""
    record = read_record(path)
    (path / "run.json").write_text(json.dumps({n: v for n, v in record.items() if n not in ("files", "sha256")}))
    (path / LearningRateSteps.FILE).unlink()
    torch.save(training.scheduler.state_dict(), path / "custom_checkpoint_0.pkl")


def resume(path: Path, training, how="latest") -> str | None:
    """The message with which it is refused; None if it is resumed."""
    try:
        training.checkpoints.load(find(path.parent, how, dry_run=True)[0])
    except UsageError as error:
        return str(error)
    return None


# ---------------------------------------------------------------------------------------------------- code

# What Accelerate, Diffusers and PEFT would read beside, or instead of, a checkpoint's own files.
OTHERS = (
    "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "pytorch_model.bin", "model.safetensors", "optimizer_1.bin",
    "scheduler.bin", "sampler.bin", "dl_state_dict.bin", "scaler.pt", "random_states_1.pkl", "stream-1.pt",
    "unet/diffusion_pytorch_model.bin", "unet/pytorch_model.bin", "adapter/adapter_model.bin", "adapter/config.py",
    "fake_score/adapter_model.bin",
)  # fmt: skip


@pytest.mark.hostile("checkpoints")
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_no_file_of_a_checkpoint_is_ever_unpickled(training, signed, tmp_path):
    """`custom_checkpoint_0.pkl` was, with --dry_run too. Signed: the digests are those of the planted file."""
    path, marker = saved(training, 1), tmp_path / "executed"
    names = [name for name in digests_of(path) if name != "run.json"]
    assert len(names) == 10 and not marker.exists(), names
    for name in names:
        before = (path / name).read_bytes()
        plant(path / name, marker)
        assert explodes(path / name, marker)
        if signed:
            sign(path)
        message = resume(path, training)
        assert not marker.exists(), name
        read = not name.endswith("config.json")  # those of the networks and adapters are for other programs
        assert (message is not None) is (read or not signed) and "is damaged" in (message or "is damaged"), name
        (path / name).write_bytes(before)
    sign(path)
    for name in OTHERS:
        plant(path / name, marker)
    assert resume(path, training) is None and not marker.exists()


@pytest.mark.hostile("checkpoints")
def test_weights_are_not_taken_from_a_pickle_where_the_right_file_is_gone(training, tmp_path):
    path, marker = saved(training, 1), tmp_path / "executed"
    for file in list(path.rglob("*.safetensors")):
        file.unlink()
        for name in ("diffusion_pytorch_model.bin", "adapter_model.bin", "fake_score.bin", "pytorch_model.bin"):
            plant(file.parent / name, marker)
    sign(path)
    assert "is damaged" in resume(path, training) and not marker.exists()


@pytest.mark.hostile("checkpoints")
@pytest.mark.parametrize("file", ["other.bin", "../other.safetensors", "/tmp/other.safetensors"])
def test_an_index_names_only_safetensors_in_its_folder(file, tmp_path):
    index = {"weight_map": {name: file for name in tiny_unet().state_dict()}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    plant(tmp_path / "other.bin", tmp_path / "executed")
    with pytest.raises(ValueError, match="names other files than .safetensors"):
        load_network(tiny_unet(), tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_network_in_several_files_is_loaded(tmp_path):
    network = tiny_unet()
    network.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    other = tiny_unet()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_network(other, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


@pytest.mark.hostile("checkpoints")
def test_optimizers_that_are_split_over_ranks_read_no_code(tmp_path):
    marker = tmp_path / "executed"
    plant(tmp_path / "optimizer.bin", marker)
    fsdp = SplitOptimizer(SimpleNamespace(optimizer=torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])))
    parts = [fsdp] + ([object.__new__(ZeroOptimizer)] if shutil.which("true") and _has_deepspeed() else [])
    for part in parts:
        with pytest.raises(Exception, match="(?i)weights.only"):
            part.load(tmp_path / "optimizer.bin")
    assert not marker.exists() and explodes(tmp_path / "optimizer.bin", marker)


def _has_deepspeed() -> bool:
    from accelerate.utils import is_deepspeed_available

    return is_deepspeed_available()


@pytest.mark.hostile("checkpoints")
def test_a_checkpoint_of_an_earlier_version_resumes_and_runs_nothing(training, tmp_path):
    path, marker = saved(training, 1, 2), tmp_path / "executed"
    as_an_earlier_version(path, training)
    expected = [parameter.detach().clone() for parameter in training.trained]
    training.step()
    assert resume(path, training) is None
    assert training.scheduler.last_epoch == 2 and training.scheduler.state_dict()["_step_count"] == 3
    assert all(torch.equal(a, b) for a, b in zip(expected, training.trained, strict=True))
    for name in [name for name in digests_of(path) if name != "run.json" and not name.endswith("config.json")]:
        before = (path / name).read_bytes()
        plant(path / name, marker)
        assert f"{name} cannot be read" in resume(path, training, str(path)), name
        assert not marker.exists()
        (path / name).write_bytes(before)
    assert resume(path, training) is None


# ---------------------------------------------------------------------------------------------------- damage


def flip(data: bytearray) -> None:
    data[len(data) // 2] ^= 1


def blank(data: bytearray) -> None:
    middle = len(data) // 2
    data[middle : middle + 4096] = bytes(len(data[middle : middle + 4096]))
    data[-1] ^= 255  # where all was zero before


def cut(data: bytearray) -> None:
    del data[-1:]


def add(data: bytearray) -> None:
    data += b"\0"


@pytest.mark.hostile("checkpoints")
@pytest.mark.parametrize("damage", [flip, blank, cut, add, bytearray.clear])
def test_a_damaged_file_is_found_and_latest_falls_back(training, damage, caplog):
    """Flipped bits and zeros in weights and optimizer were accepted; a truncated newest one was refused for ever."""
    path = saved(training, 1, 2)
    out = path.parent
    names = [name for name in digests_of(path) if name != "run.json"]
    for name in names:
        original = (path / name).read_bytes()
        data = bytearray(original)
        damage(data)
        (path / name).write_bytes(data)
        assert f"checkpoint-2 is damaged: {name} has changed" in resume(path, training, "checkpoint-2")
        caplog.clear()
        assert find(out, dry_run=True)[0] == out / "checkpoint-1" and path.exists()
        assert f"checkpoint-2 is damaged: {name} has changed since it was written. Resuming from checkpoint-1" in (
            caplog.text
        )
        (path / name).write_bytes(original)
    assert find(out)[0] == path
    (path / names[0]).unlink()
    caplog.clear()
    assert find(out)[0] == out / "checkpoint-1"
    assert f"{names[0]} is missing" in caplog.text and "it is kept as damaged-checkpoint-2" in caplog.text
    kept = out / "damaged-checkpoint-2"
    assert kept.is_dir() and not path.exists() and find(out)[0] == out / "checkpoint-1"
    # Under that name it is neither resumed nor removed, nor is another one.
    training.checkpoints._limit = 1
    saved(training, 2, 3)
    assert [each.name for each in list_checkpoints(out)] == ["checkpoint-3"] and kept.is_dir()
    (out / "checkpoint-3" / "run.json").write_text("{")
    saved(training, 4)
    (out / "checkpoint-4" / "optimizer.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="no checkpoint in .* is whole .*checkpoint-4 .*optimizer.bin has changed"):
        find(out)
    assert (out / "checkpoint-4").is_dir()  # a new run would begin if it were renamed


@pytest.mark.hostile("checkpoints")
def test_every_bit_of_run_json_counts(training):
    """A changed seed or number of batches would continue with other draws."""
    path = saved(training, 1)
    content = (path / "run.json").read_bytes()
    for place in range(0, len(content), 7):
        data = bytearray(content)
        data[place] ^= 4
        (path / "run.json").write_bytes(data)
        try:
            same = json.loads(data) == json.loads(content)
        except ValueError:
            same = False
        assert same or "is damaged: its run.json" in resume(path, training, str(path)), place
    (path / "run.json").write_bytes(content)
    assert resume(path, training) is None


FOREIGN = (None, True, -1, 1.5, 10**400, "1", "\x1b[2J", [], [1], {}, {"a": {}}, {"a": "b"}, math.inf, "[" * 1000)


@pytest.mark.hostile("checkpoints")
@pytest.mark.parametrize("version", ["this", "earlier"])
@pytest.mark.parametrize(
    "key", ["program", "architecture", "flags", "seed", "processes", "global_step", "batches", "trackers", "versions",
            "files", "sha256", "flags.dataloader_num_workers", "flags.w_min", "flags.w_max", "flags.use_8bit_adam"],
)  # fmt: skip
def test_a_foreign_or_missing_value_in_run_json_is_one_message(tmp_path, key, version):
    """Tracebacks, from wherever the value was used first; here as whoever plants it would sign it."""
    path = tmp_path / "checkpoint-1"
    path.mkdir()
    record = RUN | {"global_step": 1, "processes": 1, "versions": {}, "trackers": {}}
    record["flags"] = {"w_min": 1.0, "w_max": 2.0, "dataloader_num_workers": 0, "use_8bit_adam": False, "dm_weight": 1}
    flags = record["flags"] | {"w_min": 1.0, "w_max": 3.0}
    (path / "fake_score").mkdir()
    where, _, name = key.rpartition(".")
    for value in (*FOREIGN, "missing"):
        changed = json.loads(json.dumps(record))
        holder = changed[where] if where else changed
        holder.pop(name, None)
        if value != "missing":
            holder[name] = value
        if version == "this" and key not in ("files", "sha256"):
            write_record(path, changed, {})
        else:
            (path / "run.json").write_text(json.dumps(changed))
        for how in ("latest", str(path)):
            try:
                _, run = find(tmp_path, how, flags=flags)
            except UsageError as error:
                message = str(error)
                assert "\x1b" not in message and len(message) < 900 and "Traceback" not in message
            else:  # what is computed with has the right kind
                assert version == "this" and (where or key in ("flags", "seed", "batches", "trackers", "versions"))
                assert isinstance(run.get("seed", 0), int) and isinstance(run.get("batches", 0), int)
                assert isinstance(run["processes"], int) and isinstance(run.get("trackers", {}), dict)
                workers = run.get("flags", {}).get("dataloader_num_workers")
                assert workers is None or type(workers) is int and workers >= 0


@pytest.mark.hostile("checkpoints")
@pytest.mark.parametrize(
    "content", ['{"distance": 1e400}', '{"distance": ' + "9" * 4000 + "}", "[" * 10**5, "[]", '"x"', "\xff"]
)
def test_a_foreign_rating_is_none(tmp_path, content):
    path = tmp_path / "checkpoint-1"
    path.mkdir()
    (path / "run.json").write_text('{"global_step": 1}')
    (path / "rating.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match="no checkpoint .* is rated"):
        find_checkpoint("best", str(tmp_path))


@pytest.mark.hostile("checkpoints")
@pytest.mark.parametrize("name", ["optimizer.bin", "stream-0.pt", "lr_scheduler.json", "run.json"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "loop", "dangling"])
def test_what_is_no_file_is_refused_and_never_waited_for(training, name, kind, tmp_path):
    path = saved(training, 1, 2)
    (path / name).unlink()
    make = {
        "fifo": lambda: os.mkfifo(path / name),
        "folder": (path / name).mkdir,
        "device": lambda: (path / name).symlink_to("/dev/zero"),
        "loop": lambda: (path / name).symlink_to(path / name),
        "dangling": lambda: (path / name).symlink_to(tmp_path / "nowhere"),
    }
    make[kind]()
    assert find(path.parent)[0].name == "checkpoint-1"


@pytest.mark.hostile("checkpoints")
def test_a_checkpoint_of_another_step_is_damaged(training):
    path = saved(training, 1, 2)
    shutil.rmtree(path)
    shutil.copytree(path.with_name("checkpoint-1"), path)
    assert "checkpoint-2 is damaged: its run.json is that of step 1" in resume(path, training, str(path))
    assert find(path.parent)[0].name == "checkpoint-1"


@pytest.mark.hostile("checkpoints")
@pytest.mark.parametrize(
    "name", ["unet/diffusion_pytorch_model.safetensors.index.json", "adapter/other.safetensors", "fake_score/new.pt"]
)
def test_a_file_that_was_not_written_with_it_is_not_loaded(training, name):
    """An index would have been followed to files without a digest."""
    path = saved(training, 1)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text('{"weight_map": {}}')
    assert f"is damaged: {name} was not written with it" in resume(path, training)


@pytest.mark.hostile("checkpoints")
def test_an_earlier_version_s_optimizer_has_checksums_of_its_own(training):
    path = saved(training, 1)
    as_an_earlier_version(path, training)
    data = bytearray((path / "optimizer.bin").read_bytes())
    with zipfile.ZipFile(path / "optimizer.bin") as file:  # between its parts there is padding, which means nothing
        part = file.read(max(file.infolist(), key=lambda entry: entry.file_size))
    data[data.index(part) + len(part) // 2] ^= 1
    (path / "optimizer.bin").write_bytes(data)
    assert "optimizer.bin cannot be read" in resume(path, training)


@pytest.mark.hostile("checkpoints")
def test_a_position_in_the_shards_of_another_kind_is_refused(training):
    path = saved(training, 1)
    torch.save([1, 2], path / "stream-0.pt")
    sign(path)
    assert "stream-0.pt holds no position" in resume(path, training)


@pytest.mark.hostile("checkpoints")
def test_a_run_json_that_is_nested_deeply_is_refused(tmp_path):
    """Python reads deeper nesting than it can write or compare."""
    path = tmp_path / "checkpoint-1"
    path.mkdir()
    for depth in (40, 300, 600, 900, 950, 980, 10**5):
        nested = "[" * depth + "]" * depth
        for key in ("architecture", "other"):
            record = '{"program": "p", "global_step": 1, "seed": 1, "architecture": {"dim": %s}}'
            if key == "other":
                record = '{"program": "p", "global_step": 1, "files": {}, "sha256": "", "other": %s}'
            (path / "run.json").write_text(record % nested)
            with pytest.raises(UsageError, match="run.json cannot be read"):
                find(tmp_path)


@pytest.mark.hostile("folders")
def test_a_best_checkpoint_is_saved_where_a_stray_has_its_name(training, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint-1").write_text("mine")
    assert training.checkpoints.keep_if_best(0.5, 1, RUN, {})
    assert find_checkpoint("best", str(tmp_path / "out")).name == "checkpoint-1"
    assert (tmp_path / "out" / "damaged-checkpoint-1").read_text() == "mine"


@pytest.mark.hostile("checkpoints")
def test_the_digests_are_those_of_sha256sum(training):
    path = saved(training, 1)
    import hashlib

    record = read_record(path)
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {"run.json"}
    assert record["files"].keys() == files
    for name, digest in record["files"].items():
        assert digest == hashlib.sha256((path / name).read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------- values


@pytest.mark.hostile("checkpoints")
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("what", ["weights", "average", "optimizer", "fake score", "its optimizer"])
def test_values_that_are_not_finite_are_not_saved(training, what, value, tmp_path):
    """At --learning_rate 1e38 such a checkpoint was saved, and called the last good one."""
    saved(training, 1)
    training.step()
    lora = "adapter" in training.parts
    average = (
        training.parts["adapter_target"]._lora.parameters("target") if lora else list(training.target.parameters())
    )
    fake, its = training.matching._fake_score.parameters(), training.matching._optimizer
    tensor = {
        "weights": training.trained[-1],
        "average": average[-1],
        "optimizer": training.optimizer.optimizer.state[training.trained[-1]]["exp_avg_sq"],
        "fake score": fake[0],
        "its optimizer": its.state[fake[0]]["exp_avg"],
    }[what]
    tensor.data.view(-1)[-1] = value
    with pytest.raises(
        DivergenceError, match="checkpoint-2 is not written: .*finite.*, is .*checkpoint-1: resume with"
    ):
        training.save(2)
    with pytest.raises(DivergenceError):
        training.checkpoints.keep_if_best(0.5, 2, RUN, {})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-1"]


@pytest.mark.hostile("checkpoints")
def test_only_what_was_looked_at_is_called_finite(training):
    out = Path(training.checkpoints._output_dir)
    assert where_to_resume(out) == "There is no checkpoint yet: start again"
    path = saved(training, 1)
    assert where_to_resume(out) == f"The last checkpoint, of finite values, is {path}: resume"
    as_an_earlier_version(path, training)
    assert where_to_resume(out) == f"The last checkpoint is {path}, whose values have not been looked at: resume"
    (path / "run.json").write_text("{")
    assert "have not been looked at" in where_to_resume(out)


@pytest.mark.hostile("checkpoints")
def test_latest_passes_an_earlier_version_s_checkpoint_that_is_not_finite(training, caplog):
    path = saved(training, 1, 2)
    training.trained[0].data.view(-1)[0] = math.inf
    with pytest.MonkeyPatch.context() as patch:
        for module in ("distributed.fsdp", "models.lora", "models.fake_score", "run.checkpoint", "run.matching"):
            patch.setattr(f"lcm_distill.{module}.check_finite", lambda *_, **__: None)
        path = saved(training, 3)
    as_an_earlier_version(path, training)
    assert find(path.parent)[0].name == "checkpoint-2"
    assert "values in" in caplog.text and "are not finite. Resuming from checkpoint-2" in caplog.text


# ---------------------------------------------------------------------------------------------------- the folder


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.hostile("folders")
def test_a_link_among_the_checkpoints_is_resumed_and_only_the_link_is_removed(training, tmp_path):
    """Pruning raised at the link, and every save after that failed; alone in the folder, `latest` refused itself."""
    path = saved(training, 2)
    out, elsewhere = path.parent, tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert find(out)[0] == path and find(out, "checkpoint-2")[0] == path and find(out, str(path))[0] == path
    training.checkpoints._limit = 1
    saved(training, 3, 4)
    assert names_in(out) == {"checkpoint-4"} and resume(elsewhere, training, str(elsewhere)) is None


@pytest.mark.hostile("folders")
def test_a_link_to_the_output_folder_is_the_output_folder(training, tmp_path):
    saved(training, 1)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for how in ("latest", "checkpoint-1", str(tmp_path / "out" / "checkpoint-1")):
        assert find(tmp_path / "link", how)[1]["global_step"] == 1


@pytest.mark.hostile("folders")
@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling", "loop", "fifo"])
def test_what_is_in_a_checkpoint_s_way_is_kept_aside(training, kind, tmp_path, caplog):
    """A file or link of a checkpoint's name made every save fail; a folder was removed without a word."""
    out, target = tmp_path / "out", tmp_path / "target"
    out.mkdir()
    target.mkdir()
    (target / "notes").write_text("mine")
    place = out / "checkpoint-2"
    make = {
        "file": lambda: place.write_text("mine"), "folder": lambda: shutil.copytree(target, place),
        "link": lambda: place.symlink_to(target), "dangling": lambda: place.symlink_to(tmp_path / "nowhere"),
        "loop": lambda: place.symlink_to(place), "fifo": lambda: os.mkfifo(place),
    }  # fmt: skip
    make[kind]()
    saved(training, 1, 2)
    assert find(out)[0] == place and read_record(place)["global_step"] == 2
    assert names_in(out) == {"checkpoint-1", "checkpoint-2", "damaged-checkpoint-2"}
    assert "renamed to damaged-checkpoint-2" in caplog.text and (target / "notes").read_text() == "mine"


@pytest.mark.hostile("folders")
def test_only_leftovers_of_ours_are_cleaned_and_links_are_not_followed(training, tmp_path):
    """A file `.checkpoint-notes` made every save fail with "Make room", and a link was followed, or raised."""
    out, target = tmp_path / "out", tmp_path / "target"
    out.mkdir()
    target.mkdir()
    (target / "notes").write_text("mine")
    kept = {
        ".checkpoint-notes",
        ".checkpoint-3",
        ".checkpoint-x.partial",
        "checkpoint-notes",
        ".checkpoint-1.partial.old",
    }
    for name in kept:
        (out / name).write_text("mine")
    (out / ".checkpoint-1.partial").write_text("a file")
    (out / ".checkpoint-2.removed").symlink_to(target)
    (out / ".checkpoint-3.partial").symlink_to(tmp_path / "nowhere")
    shutil.copytree(target, out / ".checkpoint-4.partial")
    (out / ".checkpoint-4.partial" / "inner").symlink_to(target)
    saved(training, 1)
    assert names_in(out) == kept | {"checkpoint-1"} and (target / "notes").read_text() == "mine"


@pytest.mark.hostile("folders")
def test_cleaning_never_fails_a_save(training, tmp_path, monkeypatch, caplog):
    """As on a network disk, where an open file keeps its folder."""
    out = tmp_path / "out"
    for name in (".checkpoint-1.partial", ".checkpoint-1.removed", ".checkpoint-2.partial"):
        (out / name).mkdir(parents=True)

    def refuse(path, *args, **options):
        raise OSError(39, "Directory not empty")

    training.checkpoints._limit = 1
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        saved(training, 1, 2)
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-2"] and find(out)[0].name == "checkpoint-2"
    assert "could not be removed" in caplog.text
    saved(training, 3)
    assert names_in(out) == {"checkpoint-3"}


@pytest.mark.hostile("folders")
def test_later_checkpoints_may_be_links_or_have_been_abandoned_before(training, tmp_path, caplog):
    path = saved(training, 1, 2, 3)
    out, elsewhere = path.parent, tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    (out / "abandoned-checkpoint-2").symlink_to(elsewhere)
    (out / "abandoned-checkpoint-3").mkdir()
    training.checkpoints.load(out / "checkpoint-1")
    assert names_in(out) == {"checkpoint-1", "abandoned-checkpoint-2", "abandoned-checkpoint-3"}
    assert (out / "abandoned-checkpoint-2" / "run.json").is_file() and (out / "abandoned-checkpoint-3").is_symlink()
    assert len(digests_of(elsewhere)) > 5 and "in place of an earlier one" in caplog.text


@pytest.mark.hostile("folders")
def test_a_rating_is_not_written_through_a_link(training, tmp_path):
    path = saved(training, 1)
    (tmp_path / "mine").write_text("mine")
    (path / ".rating.json").symlink_to(tmp_path / "mine")
    assert training.checkpoints.keep_if_best(0.5, 1, RUN, {})
    assert (tmp_path / "mine").read_text() == "mine" and (path / "rating.json").is_file()
    assert resume(path, training) is None


# ---------------------------------------------------------------------------------------------------- disks


@pytest.mark.hostile("disks")
def test_a_result_that_cannot_be_written_promises_only_what_is_there(tmp_path):
    """After a full disk at the last step the last step's checkpoint was promised, which was not there."""

    def message() -> str:
        with pytest.raises(SaveError) as refused, _writing(tmp_path, 4):
            raise OSError(28, "No space left on device")
        return str(refused.value)

    assert "launch again: no checkpoint was written" in message() and "latest" not in message()
    for name in ("checkpoint-5x", "checkpoint-notes", ".checkpoint-4.partial", "damaged-checkpoint-4", "checkpoint-3"):
        assert "launch again: no checkpoint was written" in message()
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    assert "latest: checkpoint-4 was not written either" in message()
    (tmp_path / "checkpoint-4").mkdir()
    assert "latest: checkpoint-4 was not written either" in message()
    (tmp_path / "checkpoint-4" / "run.json").write_text("{}")
    assert "latest: with checkpoint-4 that only writes it" in message()


@pytest.mark.hostile("disks")
def test_a_first_checkpoint_that_cannot_be_written_promises_none(training, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "_sync_to_disk", full)
    with pytest.raises(SaveError, match="the last complete one is none.*then launch again: the run starts anew"):
        training.checkpoints.save(1, RUN, {}, required=True)


# ---------------------------------------------------------------------------------------------------- ranks

RANKS = """
import json, os, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
import test_hostile_checkpoints as t
from lcm_distill.errors import DivergenceError, UsageError
from lcm_distill.run.checkpoint import on_main_process
out = Path(sys.argv[1])
training = t.Training(out, "full")
rank = training.accelerator.process_index
assert training.accelerator.num_processes == 2
t.saved(training, 1, 2)
files = t.read_record(out / "checkpoint-2")["files"]
assert {{"stream-0.pt", "stream-1.pt", "random_states_0.pkl", "random_states_1.pkl", "optimizer.bin"}} <= set(files)
assert files == {{n: d for n, d in t.digests_of(out / "checkpoint-2").items() if n != "run.json"}}
training.accelerator.wait_for_everyone()
if rank == 1:
    (out / "checkpoint-2" / "stream-1.pt").write_bytes(b"")
training.accelerator.wait_for_everyone()
path, run = on_main_process(training.accelerator, lambda: t.find(out))
assert path.name == "checkpoint-1" and run["global_step"] == 1
assert training.checkpoints.load(path) == {{"place": 1}}
try:
    on_main_process(training.accelerator, lambda: t.find(out, "damaged-checkpoint-2"))
except UsageError as error:
    assert "stream-1.pt has changed" in str(error)
else:
    raise AssertionError
if rank == 0:
    training.trained[0].data.view(-1)[0] = float("nan")
try:
    training.save(3)
except DivergenceError as error:
    assert "checkpoint-3 is not written" in str(error) and "checkpoint-1" in str(error)
else:
    raise AssertionError
(out / f"done-{{rank}}").touch()
"""


@pytest.mark.hostile("checkpoints")
def test_ranks_agree_on_what_is_whole(tmp_path):
    """Each rank writes files of its own, and all must resume the same checkpoint."""
    tests = Path(__file__).resolve().parents[1]
    script = tmp_path / "script.py"
    script.write_text(RANKS.format(paths=[str(tests.parent), str(tests), str(Path(__file__).parent)]))
    log = tmp_path / "log.txt"
    assert wait(start_ranks(script, [str(tmp_path / "out")], log), log) == [0, 0], log.read_text()[-3000:]
    assert {"done-0", "done-1", "checkpoint-1", "damaged-checkpoint-2"} <= names_in(tmp_path / "out")
