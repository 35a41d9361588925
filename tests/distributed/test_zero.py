"""Full students on two gloo ranks with DeepSpeed's ZeRO-2; what needs the package is skipped without it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import is_deepspeed_available
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from small_teachers import TOY
from test_fsdp import ROOT, TWICE, Runs, close, differences, train
from test_programs import result, same, weights

from lcm_distill.distributed import zero
from lcm_distill.distributed.zero import asks_for_deepspeed, check_zero, prepare_zero
from lcm_distill.errors import UsageError

# As in test_fsdp.py. Every step is clipped, each by a different factor: Adam would hide a common one.
CLIPPED = TWICE | {"max_grad_norm": 0.05}
MATCHING = {"dm_weight": 0.5, "dm_steps": 2, "dm_rank": 4}
RUNS: Runs = [
    ("ddp", "ddp", "sd", 2, CLIPPED),
    ("zero", "zero", "sd", 2, CLIPPED | {"validation_steps": 1}),
    ("halves", "zero", "sd", 2, CLIPPED | {"resume_from_checkpoint": "zero/checkpoint-1"}),
    ("to-ddp", "ddp", "sd", 2, CLIPPED | {"resume_from_checkpoint": "zero/checkpoint-1"}),
    ("to-zero", "zero", "sd", 2, CLIPPED | {"resume_from_checkpoint": "ddp/checkpoint-1"}),
    ("ddp-bf16", "ddp", "sdxl", 1, {"mixed_precision": "bf16"}),
    ("zero-bf16", "zero", "sdxl", 1, {"mixed_precision": "bf16"}),
    ("ddp-matching", "ddp", "sd", 2, CLIPPED | MATCHING),
    ("zero-matching", "zero", "sd", 2, CLIPPED | MATCHING),
]
NUMBER = {name: number for number, (name, *_) in enumerate(RUNS)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> SimpleNamespace:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    return train(RUNS, tmp_path_factory.mktemp("ranks"))


def test_both_ranks_hold_whole_float32_networks_and_half_of_the_optimizer_s_state(runs):
    for (number, rank), seen in runs.seen.items():
        name, engine, *_, options = RUNS[number]
        assert seen["engine"] == {"ddp": "MULTI_CPU", "zero": "ZERO"}[engine], (name, rank)
        assert seen["world"] == 2 and seen["shares"][:3] == [1, 1, 1]
        teacher = "torch.bfloat16" if options.get("mixed_precision") == "bf16" else "torch.float32"
        assert seen["dtypes"] == [["torch.float32"], ["torch.float32"], [teacher]]  # student and target in any case
        if engine == "zero":
            assert seen["shares"][3:] == pytest.approx([0.5, 0.5], rel=1e-4)


def test_training_equals_ddp(runs):
    """With accumulated and clipped gradients, gradient checkpointing, and validation in between."""
    close(runs.folder / "ddp", runs.folder / "zero", 1e-5)
    before = UNet2DConditionModel.from_pretrained(TOY / "sd", subfolder="unet").float().state_dict()
    student = weights(runs.folder / "zero")
    assert min(float((student[name] - before[name]).abs().max()) for name in before) > 1e-4
    for name in ("losses", "grad_norms"):
        ddp, deepspeed = (runs.seen[NUMBER[run], 0][name] for run in ("ddp", "zero"))
        assert len(ddp) == 2 and ddp == pytest.approx(deepspeed, rel=1e-5)
    assert min(runs.seen[NUMBER["zero"], 0]["grad_norms"]) > 0.05


def test_sdxl_trains_as_with_ddp_in_bf16(runs):
    """DeepSpeed's own bf16 mode would make the student's weights bf16; a network without autocast changes the loss."""
    close(runs.folder / "ddp-bf16", runs.folder / "zero-bf16", 1e-5)
    losses = [runs.seen[NUMBER[name], 0]["losses"] for name in ("ddp-bf16", "zero-bf16")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_distribution_matching_is_that_of_ddp(runs):
    """The fake score trains outside DeepSpeed, with its own averaging over the ranks."""
    close(runs.folder / "ddp-matching", runs.folder / "zero-matching", 1e-5)
    assert (
        max(float(change.abs().max()) for change in differences(runs.folder / "ddp", runs.folder / "ddp-matching"))
        > 1e-4
    )
    ddp, deepspeed = (
        load_file(runs.folder / f"{name}-matching" / "checkpoint-2" / "fake_score" / "fake_score.safetensors")
        for name in ("ddp", "zero")
    )
    assert max(float(weight.abs().max()) for name, weight in ddp.items() if "lora_B" in name) > 1e-4
    assert max(float((ddp[name] - deepspeed[name]).abs().max()) for name in ddp) < 1e-5


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(runs):
    assert same(result(runs.folder / "zero"), result(runs.folder / "halves"))
    states = [optimizer_state(runs, name)["state"] for name in ("zero", "halves")]
    assert all(torch.equal(states[0][i][name], states[1][i][name]) for i in states[0] for name in states[0][i])


def test_a_checkpoint_resumes_with_or_without_zero(runs):
    """Its content is that of DDP's. The parameters once shared one step count, which AdamW incremented for each."""
    for name in ("to-ddp", "to-zero"):
        close(runs.folder / "ddp", runs.folder / name, 1e-5)
    written = [runs.folder / name / "checkpoint-2" for name in ("ddp", "zero")]
    assert sorted(p.name for p in written[0].iterdir()) == sorted(p.name for p in written[1].iterdir())
    ddp = optimizer_state(runs, "ddp")
    for run in ("zero", "to-ddp", "to-zero"):
        state = optimizer_state(runs, run)
        assert state["param_groups"] == ddp["param_groups"] and state["state"].keys() == ddp["state"].keys()
        for index, values in ddp["state"].items():
            assert values.keys() == state["state"][index].keys()
            for name, value in values.items():
                torch.testing.assert_close(value, state["state"][index][name], rtol=1e-4, atol=1e-7)


def optimizer_state(runs: SimpleNamespace, run: str) -> dict:
    return torch.load(runs.folder / run / "checkpoint-2" / "optimizer.bin", weights_only=True)


def test_the_export_is_a_complete_model(runs):
    out = runs.folder / "zero"
    unet = UNet2DConditionModel.from_pretrained(out)
    assert same(dict(unet.state_dict()), weights(out / "unet"))
    sizes = [(runs.folder / name / "diffusion_pytorch_model.safetensors").stat().st_size for name in ("ddp", "zero")]
    assert np.isclose(*sizes, rtol=1e-3)  # not each weight with the buffer that all share


def accelerator(precision: str = "bf16") -> SimpleNamespace:
    return SimpleNamespace(mixed_precision=precision)


@pytest.fixture()
def installed(monkeypatch):
    monkeypatch.setattr(zero, "is_deepspeed_available", lambda: True)
    monkeypatch.setattr(zero, "compare_versions", lambda *_: False)
    for name in ("ZERO_STAGE", "OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE", "CONFIG_FILE"):
        monkeypatch.delenv(f"ACCELERATE_DEEPSPEED_{name}", raising=False)


@pytest.mark.parametrize(
    "precision, can_split, setting, message",
    [
        ("bf16", False, {}, "only the full students.*--multi_gpu"),
        ("fp16", True, {}, "--mixed_precision fp16.*bf16"),
        ("bf16", True, {"ZERO_STAGE": "3"}, "zero_stage.*set it to 2.*configs/fsdp2.yaml"),
        ("bf16", True, {"OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device.*leave it out"),
        ("bf16", True, {"OFFLOAD_PARAM_DEVICE": "nvme"}, "offload_param_device.*leave it out"),
        ("bf16", True, {"CONFIG_FILE": "ds.json"}, "deepspeed_config_file.*configs/zero2.yaml"),
    ],
)
def test_unsupported_settings_are_refused(precision, can_split, setting, message, installed, monkeypatch):
    for name, value in setting.items():
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    with pytest.raises(UsageError, match=message):
        check_zero(accelerator(precision), can_split=can_split)


@pytest.mark.parametrize("available, older", [(False, False), (True, True)])
def test_a_missing_or_old_deepspeed_is_refused(available, older, installed, monkeypatch):
    """DeepSpeed 0.18.0 silently computes wrong gradients when they are accumulated."""
    monkeypatch.setattr(zero, "is_deepspeed_available", lambda: available)
    monkeypatch.setattr(zero, "compare_versions", lambda *_: older)
    with pytest.raises(UsageError, match='pip install "deepspeed>=0.18.5"'):
        check_zero(accelerator(), can_split=True)


def test_8_bit_adam_is_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=1.0)  # not AdamW, as 8-bit Adam is not
    with pytest.raises(UsageError, match="--use_8bit_adam is not supported with DeepSpeed"):
        prepare_zero(accelerator(), torch.nn.Linear(1, 1), optimizer)


def test_the_shipped_configuration_is_taken(installed, monkeypatch):
    """In the environment that the launcher derives from it for the program."""
    assert not asks_for_deepspeed()
    argv = ["--config_file", str(ROOT / "configs" / "zero2.yaml"), "train.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(argv))
    args.deepspeed_fields_from_accelerate_config = []  # the launcher's own bookkeeping
    for name, value in prepare_deepspeed_cmd_env(args)[1].items():
        monkeypatch.setenv(name, value)
    assert asks_for_deepspeed()
    check_zero(accelerator(), can_split=True)


@pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed")
def test_this_deepspeed_is_new_enough(monkeypatch):
    check_zero(accelerator(), can_split=True)
