"""The upload and the model card, with the real client against a stand-in of the Hub on loopback."""

import json
import logging
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from diffusers import LCMScheduler, UNet2DConditionModel
from small_teachers import TOY

from lcm_distill.errors import UsageError
from lcm_distill.export.card import build_model_card, parse_hub_id, strip_folders
from lcm_distill.export.hub import HubUpload
from lcm_distill.export.weights import export_full_student
from lcm_distill.models import sd
from lcm_distill.models.teacher import Teacher
from tests.hub_stand_in import HubStandIn

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hf_a-token-that-nobody-may-read"
LICENSED = "---\nlicense: other\nlicense_name: toy-licence\nlicense_link: LICENSE.md\n---\nA toy."
# Runs the Python code of a card, on a CPU. Arguments: the repository, and words to put in place of others.
USER = """
import sys
from huggingface_hub import ModelCard

code = ModelCard.load(sys.argv[1]).text.split("```python\\n")[1].split("```")[0]
for before, after in zip(sys.argv[2::2], sys.argv[3::2]):
    code = code.replace(before, after)
names = {}
exec(code, names)
colours = names["picture"].getcolors(1 << 24)
print(names["picture"].size, len(colours) > 1, names["pipe"].get_active_adapters())
"""
ON_A_CPU = ["torch.float16", "torch.float32", '.to("cuda")', ""]


@pytest.fixture()
def hub(monkeypatch, tmp_path):
    """A Hub on loopback, for the processes that this one starts."""
    with HubStandIn(SECRET) as stand_in:
        monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_UPDATE_CHECK"):
            monkeypatch.setenv(name, "1")
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        yield stand_in


def python(*arguments: str) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------- the programs


def test_a_full_student_goes_to_the_hub_and_the_token_nowhere(hub, command, tmp_path):
    """Of two pictures the last is uploaded; the card's code downloads teacher and student, and draws."""
    hub.add("toys/sd", TOY / "sd", LICENSED)
    argv = command(
        "lcm-toy", pretrained_teacher_model="toys/sd", push_to_hub=True, hub_token=SECRET, validation_steps=1,
        report_to="tensorboard,wandb",
    )  # fmt: skip
    done = python("train_lcm_distill_sd_wds.py", *argv)
    out, uploaded = tmp_path / "lcm-toy", hub.files["me/lcm-toy"]
    weights = "diffusion_pytorch_model.safetensors"
    assert sorted(uploaded) == [
        "README.md", "comfyui_workflow.json", "config.json",
        "diffusion_pytorch_model.fp16.safetensors", weights, "scheduler_config.json",
        "unet/config.json", f"unet/{weights}", "unet_target/config.json", f"unet_target/{weights}",
        "validation/step-000002.png",
    ]  # fmt: skip
    written = contents(out)
    assert all(written[name] == data for name, data in uploaded.items())
    assert hub.commits["me/lcm-toy"] == ["first", "Distilled for 2 steps"]

    assert any("wandb" in name for name in written) and any("events.out" in name for name in written)
    for name, data in {**written, "stdout": done.stdout.encode(), "stderr": done.stderr.encode()}.items():
        assert SECRET.encode() not in data, name
    for name, data in uploaded.items():
        assert str(tmp_path).encode() not in data and str(ROOT).encode() not in data, name

    used = python("-c", USER, "me/lcm-toy", *ON_A_CPU)
    assert used.stdout.splitlines()[-1] == "(64, 64) True []"


def test_a_lora_goes_to_the_hub(hub, command, run, tmp_path, small_teacher, monkeypatch):
    """With the token of the environment, from a teacher in a folder; its averaged target is not uploaded.

    The upload came before the process group's end: other ranks waited for it, and NCCL ends a run that waits.
    """
    monkeypatch.setenv("HF_TOKEN", SECRET)
    end_training, at_the_end = Accelerator.end_training, []
    monkeypatch.setattr(
        Accelerator, "end_training", lambda self: at_the_end.append(dict(hub.files)) or end_training(self)
    )
    argv = command(steps=1, push_to_hub=True, hub_model_id="me/lcm-lora-toy", ema_decay=0.9, lora_rank=4)
    run("train_lcm_distill_lora_sd_wds", argv)
    assert at_the_end == [{"me/lcm-lora-toy": {}}]
    uploaded = hub.files["me/lcm-lora-toy"]
    assert sorted(uploaded) == [
        "README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "comfyui_workflow.json",
        "kohya_lora_weights.safetensors", "pytorch_lora_weights.safetensors", "scheduler_config.json",
        "validation/step-000001.png",
    ]  # fmt: skip
    written = contents(tmp_path / "out")
    assert "target/pytorch_lora_weights.safetensors" in written
    assert not [name for name, data in written.items() if SECRET.encode() in data]
    assert all(written[name] == data for name, data in uploaded.items())
    for name, data in uploaded.items():
        assert str(tmp_path).encode() not in data and str(ROOT).encode() not in data, name
    used = python("-c", USER, "me/lcm-lora-toy", *ON_A_CPU, "'sd'", repr(small_teacher))
    assert used.stdout.splitlines()[-1].startswith("(64, 64) True ['default_0'")


def export(folder: Path, **options) -> None:
    """A tiny student into `folder`."""
    unet = UNet2DConditionModel(
        block_out_channels=(4,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        mid_block_type=None, layers_per_block=1, norm_num_groups=2, cross_attention_dim=4,
    )  # fmt: skip
    unet.register_to_config(_name_or_path="/home/alice/teacher")
    export_full_student(
        str(folder), student=unet, target=unet, scheduler=LCMScheduler(), teacher=Teacher("org/model"),
        family=sd, guidance_scale=8.0, global_step=2, settings={}, **options,
    )  # fmt: skip


def test_the_saved_configs_name_no_folder_of_this_machine(tmp_path):
    """Diffusers writes down where a network was loaded from; the half-size twin came from the output folder."""
    export(tmp_path, measured={"trajectory distance": 0.5})
    configs = [json.loads(path.read_text()) for path in tmp_path.rglob("config.json")]
    assert [config["_name_or_path"] for config in configs] == [""] * 3
    assert "| trajectory distance | 0.5 |" in (tmp_path / "README.md").read_text()


def test_what_users_load_is_uploaded_and_nothing_else(tmp_path):
    """The public programs upload optimizer states too."""
    private = [
        "logs/wandb/run-1/files/wandb-metadata.json", "logs/x/deep.safetensors", "logs/x/events.1", "wandb/config.yaml",
        "checkpoint-2/optimizer.bin", "checkpoint-2/unet/config.json", "checkpoint-2/run.json",
        "abandoned-checkpoint-2/run.json", ".checkpoint-4.partial/unet/config.json", "sub/checkpoint-2/config.json",
        "unet/checkpoint-2/config.json", "target/pytorch_lora_weights.safetensors", "report.html", "training.jsonl",
        "validation/step-000001.png", "validation/step-000003.png",
    ]  # fmt: skip
    for name in [*private, "validation/step-000002.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    staged: list[str] = []
    hub = SimpleNamespace(
        repo_id="me/model", ensure_repository=lambda base: {}, stage=lambda files, message: staged.extend(sorted(files))
    )
    export(tmp_path, hub=hub)
    assert staged == [
        "README.md", "comfyui_workflow.json", "config.json",
        "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors",
        "scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "unet_target/config.json", "unet_target/diffusion_pytorch_model.safetensors", "validation/step-000002.png",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------- the upload


@pytest.fixture()
def result(tmp_path) -> Path:
    folder = tmp_path / "my model"
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text("---\ntags:\n- lcm\n---\nA card.")
    (folder / "unet" / "weights.safetensors").write_bytes(os.urandom(300_000))
    (folder / "optimizer.bin").write_bytes(b"private")
    return folder


FILES = ["README.md", "unet/weights.safetensors"]


def quick(folder: Path, token: str | None = SECRET, repo_id: str | None = "model", **options) -> HubUpload:
    return HubUpload(
        repo_id, token, str(folder), **{"timeout": 5.0, "retry_delays": (0.02, 0.02), "time_limit": 30.0} | options
    )


def pushed(upload: HubUpload) -> bool:
    upload.stage(FILES, "done")
    return upload.push()


@pytest.mark.hostile("servers")
@pytest.mark.parametrize("case", ["wrong token", "no right", "no namespace", "bad name", "offline"])
def test_a_refusal_is_an_error_before_training(case, hub, result, monkeypatch):
    """A token that may only read was noticed at the end: for a repository that exists the client does not check."""
    token, repo_id = SECRET, "model"
    if case == "wrong token":
        token = "hf_wrong"
    elif case == "no right":
        hub.add("me/model", result)
        hub.read_only = True
    elif case == "no namespace":
        hub.inject_fault("/repos/create", 404)
    elif case == "bad name":
        repo_id = "a/b/c"
    else:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="--push_to_hub: the Hub refused the repository .*--hub_model_id") as refused:
        quick(result, token, repo_id)
    assert token not in str(refused.value)


def test_without_a_token_nothing_is_asked(hub, result, monkeypatch):
    monkeypatch.setattr("lcm_distill.export.hub.get_token", lambda: None)
    with pytest.raises(UsageError, match="--push_to_hub: there is no token.*HF_TOKEN"):
        quick(result, None)
    assert not hub.requests


@pytest.mark.hostile("servers")
@pytest.mark.parametrize("how", [503, 429, "hang", "drop"])
def test_a_hub_that_cannot_be_reached_at_first_stops_no_run(how, hub, result, caplog):
    """It did: any error at the start was taken for a refusal."""
    hub.inject_fault("/repos/create", how, times=2)
    upload = quick(result, timeout=2.0 if how == "hang" else 5.0)
    assert "cannot be reached now" in caplog.text and "The run continues" in caplog.text
    assert upload.repo_id == "model"
    assert upload.ensure_repository(None) == {} and upload.repo_id == "me/model"
    assert pushed(upload) and list(hub.files["me/model"]) == FILES


@pytest.mark.hostile("servers")
def test_an_unreachable_hub_loses_nothing(hub, result, monkeypatch, caplog):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the port of the discard service: nothing listens
    upload = quick(result)
    assert upload.ensure_repository("toys/sd") == {} and not pushed(upload)
    assert caplog.text.count("trying again in") == 2 and "Connect" in caplog.text and "hf upload model" in caplog.text


@pytest.mark.hostile("servers")
@pytest.mark.parametrize(("path", "how"), [("/commit/", 500), ("/validate-yaml", 503), ("/storage/", "cut")])
def test_what_fails_is_tried_again(path, how, hub, result):
    upload = quick(result)
    hub.inject_fault(path, how, times=1)
    assert pushed(upload)
    assert hub.files["me/model"] == {name: (result / name).read_bytes() for name in FILES}
    assert hub.commits["me/model"] == ["first", "done"]


@pytest.mark.hostile("servers")
def test_a_slow_hub_is_waited_for(hub, result):
    upload = quick(result)
    hub.inject_fault("/commit/|/storage/", 1.0)
    started = time.monotonic()
    assert pushed(upload) and time.monotonic() - started > 2


@pytest.mark.hostile("servers")
def test_a_hub_that_dies_is_logged_with_the_command_that_uploads(hub, result, caplog):
    upload = quick(result)
    hub.inject_fault("/commit/", "drop")
    assert not pushed(upload)
    assert sum("/commit/" in path for _, path in hub.requests) == 3 and hub.files["me/model"] == {}
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "The result is complete in" in message and SECRET not in caplog.text

    hub.clear_faults()
    words = shlex.split(message.partition("upload it with: ")[2])
    assert words[:3] == ["hf", "upload", "me/model"]
    words[0] = str(Path(sys.executable).with_name("hf"))
    subprocess.run(words, env=os.environ | {"HF_TOKEN": SECRET}, check=True, capture_output=True, timeout=60)
    assert hub.files["me/model"] == {name: (result / name).read_bytes() for name in FILES}


@pytest.mark.hostile("servers")
def test_a_refusal_at_the_end_is_not_tried_again(hub, result, caplog):
    upload = quick(result)
    hub.inject_fault("/preupload/", 403)
    assert not pushed(upload)
    assert sum("/preupload/" in path for _, path in hub.requests) == 1 and "403" in caplog.text


@pytest.mark.hostile("servers")
@pytest.mark.parametrize(
    "options", [{"timeout": 1.5, "retry_delays": ()}, {"time_limit": 3.0}], ids=["timeout", "time_limit"]
)
def test_a_hub_that_never_answers_is_not_waited_for(options, hub, result, caplog):
    """The client's own sessions have no timeouts, and Xet respects none: the process that they are in is killed."""
    upload = quick(result, timeout=30.0)
    late = quick(result, **({"timeout": 30.0} | options))
    hub.inject_fault("/commit/", "hang")
    started = time.monotonic()
    assert not pushed(late) and time.monotonic() - started < 15
    assert any("/commit/" in path for _, path in hub.requests)
    assert "the upload to me/model failed" in caplog.text
    hub.clear_faults()
    assert pushed(upload)


# ---------------------------------------------------------------------------------------------------- the card


def test_the_licence_is_the_base_model_s_or_none(hub, result, caplog):
    hub.add("toys/sd", result, LICENSED)
    hub.add("toys/bare", result, "no metadata")
    upload = quick(result)
    licence = upload.ensure_repository("toys/sd")
    link = "https://huggingface.co/toys/sd/blob/main/LICENSE.md"
    assert licence == {"license": "other", "license_name": "toy-licence", "license_link": link}
    assert upload.ensure_repository("toys/bare") == {} and not caplog.records
    assert upload.ensure_repository("toys/private") == {} and "licence of toys/private could not be read" in caplog.text


def card(**options):
    known = dict(base_model="org/model", relation="finetune", usage="draw()", note="", settings={}, tags=["sd"])
    return build_model_card("lcm", **known | options)


def test_the_card_has_what_the_hub_expects():
    licence = {"license": "other", "license_name": "toy", "license_link": "https://host/LICENSE"}
    found = card(relation="adapter", licence=licence, picture="validation/step-000002.png", tags=["lora"])
    data = found.data.to_dict()
    assert data["base_model"] == "org/model" and data["base_model_relation"] == "adapter"
    assert {name: data[name] for name in licence} == licence
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "text-to-image"
    assert {"lcm", "lora", "diffusers", "text-to-image"} <= set(data["tags"])
    assert "(validation/step-000002.png)" in found.text and "[toy](https://host/LICENSE)" in found.text
    bare = card().data.to_dict()
    assert bare["base_model_relation"] == "finetune" and not any("license" in name for name in bare)
    assert "licence" not in card().text and "![" not in card().text


def test_the_card_has_measured_numbers_and_settings():
    text = card(settings={"lr": 1, "x": None, "filter": ["a|b", "c"]}, measured={"trajectory distance": 0.123456}).text
    assert "## Measured" in text and "| trajectory distance | 0.1235 |" in text
    assert "| `--lr` | 1 |" in text and "--x" not in text and r"a\|b" in text and "draw()" in text
    assert "## Measured" not in card().text and "## Measured" not in card(measured={}).text


def test_the_card_of_a_local_teacher_names_no_folder(tmp_path):
    local = card(base_model=str(tmp_path / "teacher.safetensors"), settings={"output_dir": str(tmp_path / "out")})
    assert local.data.base_model is None and "base_model_relation" not in local.data.to_dict()
    assert "`teacher.safetensors`" in local.text and "| `--output_dir` | out |" in local.text
    assert str(tmp_path.parent) not in str(local)


@pytest.mark.parametrize(
    ("value", "public"),
    [
        ("/home/alice/data/{00..09}.tar", "{00..09}.tar"),
        ("~/a/b/::../c/d.tar::file:///home/alice/e.tar", "b::d.tar::e.tar"),
        ("C:\\Users\\alice\\out", "out"),
        ("https://host/a/b.tar::s3://bucket/c.tar", "https://host/a/b.tar::s3://bucket/c.tar"),
        (["a cat / a dog", "/home/alice/prompts.txt"], ["a cat / a dog", "prompts.txt"]),
        ("org/model", "org/model"),
        (str(ROOT), ROOT.name),
        (0.5, 0.5),
        (True, True),
    ],
)  # fmt: skip
def test_local_paths_are_stripped(value, public):
    assert strip_folders(value) == public


def test_hub_ids_are_distinguished_from_folders(monkeypatch, tmp_path):
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert (
        parse_hub_id("org/model") == "org/model"
        and parse_hub_id("/org/model") is None
        and parse_hub_id("a/b/c") is None
    )
    monkeypatch.chdir(tmp_path)
    assert parse_hub_id("org/model") is None
