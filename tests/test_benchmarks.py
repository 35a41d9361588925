"""What measures the training step: it runs the programs' own step, and its numbers are those of closed forms."""

import contextlib
import gc
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from benchmarks import ceilings, compare_commits, fake_step, few_steps, measuring, memory, precision, public, train_step
from benchmarks.architectures import UNETS, build_vae
from benchmarks.fake_step import Case, build
from benchmarks.memory import Tally, compute
from lcm_distill.models import lora, unets
from lcm_distill.objective import consistency
from lcm_distill.run import run, stopping
from lcm_distill.run.progress import Progress
from toy.demo import PROGRAMS
from toy.make_shards import make_shards
from toy.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
_CONFIG = UNet2DConditionModel.load_config(ROOT / "toy/teachers/sd/unet")
TINY = {name: value for name, value in _CONFIG.items() if name[0] != "_" and name != "time_cond_proj_dim"}

SHORT = ("--rounds", "1", "--steps", "1", "--part_steps", "1", "--warmup", "1", "--train_batch_size", "2")


def test_a_step_is_timed_part_by_part_beside_the_plain_one(tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.train_step", *SHORT, "--program", "sd", "--straightforward"]
    command += ["--output", str(output), "--gradient_checkpointing", "--mixed_precision", "no"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ((title, result),) = json.loads(output.read_text()).items()
    assert title == "sd, toy at 64, batch 2, no, --gradient_checkpointing"
    parts = {"data", "VAE", "text", "teacher", "target", "student", "backward", "clip", "optimizer", "EMA"}
    for variant in ("all on", "straightforward"):
        times = result["variants"][variant]["parts_ms"]
        assert times.keys() == parts | {"rest"} and all(times[part] > 0 for part in parts)
        assert f"| {variant} |" in output.with_suffix(".md").read_text()
    # The teacher sees twice the batch; recomputation does not count.
    flops = result["gflops_by_part"]
    assert flops["student"] == flops["target"] == pytest.approx(flops["teacher"] / 2, rel=0.01)
    assert 1.8 < flops["backward"] / flops["student"] < 2.2
    assert result["floor_ms"] > 0 and result["matrix_tflops"] > 0


def test_what_was_measured_outlives_a_kill(tmp_path):
    """A command that ran into its time limit left no result at all."""
    output = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.train_step", *SHORT, "--straightforward", "--output", str(output)]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=said, stderr=said
        )
        deadline = time.monotonic() + 240
        while " ms a step" not in (tmp_path / "said").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()
            time.sleep(0.05)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    ((_, result),) = json.loads(output.read_text()).items()
    assert result["variants"]["all on"]["step_ms"] > 0
    assert result["floor_ms"] > 0 and result["unfinished"] in (None, "straightforward, round 1")
    assert "| all on |" in output.with_suffix(".md").read_text()


def test_a_file_of_results_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    measuring.keep(file, {"a": 1}, str)

    def killed(self, text):
        with self.open("w") as unfinished:
            unfinished.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        measuring.keep(file, {"b": 2}, str)
    monkeypatch.undo()
    measuring.keep(file, {"b": 2}, str)
    assert json.loads(file.read_text()) == {"a": 1, "b": 2}


def in_this_process(monkeypatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train_step", *SHORT, *flags])
    with pytest.raises(SystemExit) as ended:
        train_step.main()
    return ended.value.code


def what_variants_change() -> list[object]:
    program, family = train_step.modules("lora_sd")
    owners = {
        consistency: ("guided_prediction", "unet_output", "update_ema"), unets: ("apply_speed_flags",),
        program: ("build_optimizer", "autocast_over", "batch_latents"), family: ("batch_conditioning",),
        lora: ("LAYERS",), run: ("start_accelerator",), Progress: ("step", "batches"),
        Accelerator: ("backward", "clip_grad_norm_"),
        AcceleratedOptimizer: ("step",), stopping: ("SIGNALS",), torch.backends.cudnn: ("benchmark", "allow_tf32"),
        AcceleratorState: ("_shared_state",), logging.getLogger("lcm_distill"): ("level",),
    }  # fmt: skip
    values = [getattr(owner, name) for owner, names in owners.items() for name in names]
    values += [signal.getsignal(number) for number in stopping.SIGNALS]
    return [*values, dict(os.environ), [child.pid for child in psutil.Process().children()]]


def test_variants_leave_the_process_as_it_was_also_those_that_fail(tmp_path, monkeypatch, capsys):
    """All run in one process: what one of them changed, or the memory that it kept, would falsify the next."""

    def without_memory(program):
        step = Progress.step

        def exhausted(self, grad_norm):
            step(self, grad_norm)
            os.environ["SET_BY_A_RUN"] = "1"
            raise torch.OutOfMemoryError("CUDA out of memory\nand so on")

        return mock.patch.object(Progress, "step", exhausted)

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    monkeypatch.setitem(train_step.OPTIMISATIONS, "memory", train_step.Optimisation(without_memory))
    before, networks = what_variants_change(), alive(UNet2DConditionModel)
    output = tmp_path / "result.json"
    code = in_this_process(
        monkeypatch,
        *("--program", "lora_sd", "--variant", "broken=--no_such_flag", "--each", "memory", "fused LoRA layers"),
        *("--dataloader_num_workers", "1", "--output", str(output)),
    )
    assert code == 1
    assert what_variants_change() == before and alive(UNet2DConditionModel) <= networks
    ((_, result),) = json.loads(output.read_text()).items()
    assert list(result["variants"]) == ["all on", "without fused LoRA layers"] and result["unfinished"] is None
    assert result["failed"].keys() == {"broken", "without memory"}
    assert result["failed"]["without memory"] == "OutOfMemoryError: CUDA out of memory"
    assert "--no_such_flag" in capsys.readouterr().err
    assert "Failed: without memory: OutOfMemoryError" in output.with_suffix(".md").read_text()


def alive(kind: type) -> int:
    gc.collect()
    return sum(isinstance(thing, kind) for thing in gc.get_objects())


def test_a_variant_that_would_end_too_late_is_left_out(tmp_path, monkeypatch):
    times = {"first_step_s": 1.0, "step_ms": 10.0, "step_in_parts_ms": 30.0, "parts_ms": {}, "peak_memory_bytes": 1e9}
    clock = [0.0]

    def measured(kind, variant, argv, plan, flops):
        clock[0] += 40.0
        return times | ({"flops": {"student": 1e9}} if flops else {})

    monkeypatch.setattr(train_step, "measure", measured)
    monkeypatch.setattr(train_step, "elapsed", lambda: clock[0])
    monkeypatch.setattr(train_step, "matrix_rate", lambda dtype: 1e12)
    monkeypatch.setattr(train_step.time, "monotonic", lambda: clock[0])
    output = tmp_path / "result.json"
    assert in_this_process(monkeypatch, "--straightforward", "--each", "--seconds", "100", "--output", str(output)) == 0
    ((_, result),) = json.loads(output.read_text()).items()
    assert list(result["variants"]) == ["all on", "straightforward"] and result["floor_ms"] == 2
    assert result["left_out"]["without one teacher pass"] == "no time was left"


STAND_IN = """
import argparse, time, torch
from accelerate import Accelerator
parser = argparse.ArgumentParser()
for name in ("pretrained_teacher_model", "train_shards_path_or_url", "mixed_precision", "output_dir"):
    parser.add_argument(f"--{name}", required=True)
for name in ("resolution", "train_batch_size", "max_train_steps", "max_train_samples", "validation_steps",
             "checkpointing_steps", "dataloader_num_workers", "seed"):
    parser.add_argument(f"--{name}", type=int, required=True)
parser.add_argument("--learning_rate", type=float)
parser.add_argument("--cast_teacher_unet", action="store_true")
args = parser.parse_args()
assert args.max_train_samples > 1000 and args.dataloader_num_workers > 0, "the public program divides by both"
import tarfile
assert len(tarfile.open(args.train_shards_path_or_url).getnames()) > 3 * 2 * args.train_batch_size * 3
accelerator = Accelerator(gradient_accumulation_steps=2)
network = torch.nn.Linear(2, 2)
optimizer = torch.optim.AdamW(network.parameters())
network, optimizer = accelerator.prepare(network, optimizer)
for step in range(args.max_train_steps):
    with accelerator.accumulate(network):
        time.sleep(0.05 if args.train_batch_size == 2 else 60)
        accelerator.backward(network(torch.ones(1, 2)).sum())
        optimizer.step()
        optimizer.zero_grad()
"""


def test_a_public_program_is_clocked_from_outside(tmp_path, monkeypatch):
    """By a script with its interface: the public ones need packages and teachers that the tests have not."""
    make_shards(tmp_path / "shards", shards=1, samples_per_shard=4)
    assert "has no train_lcm_distill_sd_wds.py" in public.obstacle(tmp_path, "sd")
    (tmp_path / "train_lcm_distill_sd_wds.py").write_text(STAND_IN)
    monkeypatch.setattr(public, "NEEDED", ("torch", "no_such_package"))
    assert public.obstacle(tmp_path, "sd") == "it needs no_such_package, not installed here"
    argv = (
        "--pretrained_teacher_model=x --mixed_precision=no --output_dir=out --resolution=64 --cast_teacher_unet".split()
    )
    argv += "--dataloader_num_workers=1 --seed=0 --learning_rate=1e-6 --train_batch_size".split()
    plan = train_step.Plan(1, 2, 1)
    taken = public.measure(tmp_path, "sd", [*argv, "2"], tmp_path / "shards", plan)
    assert 100 <= taken["step_ms"] < 1000 and taken["first_step_s"] > 0.1 and taken["peak_memory_bytes"] > 1e7
    with pytest.raises(RuntimeError, match="ended with status 2 .*unrecognized arguments: --no_such_flag"):
        public.measure(tmp_path, "sd", [*argv, "2", "--no_such_flag"], tmp_path / "shards", plan)
    before = set(psutil.Process().children())  # a tracker's service of an earlier test may still be there
    monkeypatch.setattr(public, "_LIMIT", 1)
    with pytest.raises(RuntimeError, match="took more than 1 s"):
        public.measure(tmp_path, "sd", [*argv, "1"], tmp_path / "shards", plan)
    assert set(psutil.Process().children()) <= before


def test_what_is_measured_comes_in_this_order(tmp_path, monkeypatch):
    (tmp_path / "train_lcm_distill_lora_sd_wds.py").write_text("")
    monkeypatch.setattr(public, "NEEDED", ())
    words = ["--program", "lora_sd", "--mixed_precision", "bf16", "--straightforward", "--each"]
    words += ["--public", str(tmp_path), "--variant", "compiled=--compile", "--again"]
    args, _ = train_step.parse(words)
    program, _ = train_step.modules("lora_sd")
    needed = ["--pretrained_teacher_model=x", "--train_shards_path_or_url=x", "--mixed_precision=bf16"]
    names = [variant.name for variant in train_step.list_variants(args, program.parse_args(needed))[0]]
    first = ["all on", "straightforward", "compiled", "compiled, again", "public program", "without fused LoRA layers"]
    assert names[:6] == first and "without fused EMA" not in names and "without low-precision layer norms" in names
    flags = program.parse_args([*needed, "--ema_decay=0.9", "--mixed_precision=no"])
    names = [variant.name for variant in train_step.list_variants(args, flags)[0]]
    assert "without fused EMA" in names and "without low-precision layer norms" not in names


def test_products_that_are_added_in_place_are_counted():
    """The LoRA layers' own: PyTorch's counter knows addmm, but not addmm_."""
    with measuring.flop_counter() as counter:
        torch.zeros(3, 5).addmm_(torch.ones(3, 7), torch.ones(7, 5), alpha=2)
        assert counter.get_total_flops() == 2 * 3 * 7 * 5
        torch.zeros(2, 3, 5).baddbmm_(torch.ones(2, 3, 7), torch.ones(2, 7, 5))
        assert counter.get_total_flops() == 3 * 2 * 3 * 7 * 5


def test_ceilings_divide_by_the_work_that_is_done(tmp_path, monkeypatch):
    """A function that would take a second for each TFLOP is measured at 1 TFLOP/s."""

    def seconds(function, enough):
        with measuring.flop_counter() as counter:
            function()
        return counter.get_total_flops() / 1e12

    monkeypatch.setattr(ceilings, "seconds", seconds)
    one = ceilings.Ceilings(tiny=True, output=tmp_path / "ceilings.json")
    one.convolutions()
    one.attention()
    ((_, result),) = json.loads((tmp_path / "ceilings.json").read_text()).items()
    assert len(result["rates"]) == 4 * 2 + 6 * 2 and all(row["rate"] == 1 for row in result["rates"])
    assert all("kernel" in row for row in result["rates"][8:])
    monkeypatch.setattr(ceilings, "seconds", lambda function, enough: function() is None or 2.0)
    one.memory()
    assert one.result["rates"][-1]["rate"] == round(2**24 / 1e12, 3)
    assert "| memory, copy |" in (tmp_path / "ceilings.md").read_text()


def test_ratios_are_of_the_same_round():
    """On a machine that slows down between rounds medians of each variant say less than their ratios."""
    reference = {"step_ms_of_each_round": [10, 100, 20]}
    assert train_step.against({"step_ms_of_each_round": [15, 150, 30]}, reference) == "1.50"
    assert train_step.against({"step_ms_of_each_round": [15]}, reference) == "1.50"
    assert train_step.against({"step_ms_of_each_round": [15]}, None) == ""


@pytest.mark.parametrize(
    "call, modules",
    [
        ("", ["ceilings", "train_step", "train_step", "pytest"]),
        ("second", ["pytest", "train_step"]),
        ("program sdxl", ["real_size_run", "train_step"]),
        ("--smoke", ["ceilings", "train_step", "train_step", "pytest", "pytest", "train_step"]),
    ],
)
def test_every_command_for_the_gpu_is_one(call, modules, tmp_path):
    """None of them can run here: at least their flags are those that the commands and the programs have."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done >> "$SAID"\necho >> "$SAID"\n')
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 143771\n")
    for script in (fake, smi):
        script.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(fake), "SAID": str(tmp_path / "said")}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *call.split()]
    environment |= {"RESULTS": str(tmp_path), "PUBLIC": "/public"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
    lines = (tmp_path / "said").read_text().splitlines()
    calls = [line.split("\0")[1:-1] for line in lines]
    assert [words[0].removeprefix("benchmarks.") for words in calls] == modules
    for module, *words in calls:
        if module == "benchmarks.train_step":
            args, more = train_step.parse(words)
            program, _ = train_step.modules(args.program)
            variants = [flag for text in args.variant for flag in text.partition("=")[2].split()]
            program.parse_args(["--pretrained_teacher_model=x", "--train_shards_path_or_url=x", *more, *variants])
            assert call == "--smoke" or args.seconds <= 280
        elif module == "pytest" and "-k" in words:
            assert f"_{words[words.index('-k') + 1]}(" in (ROOT / words[words.index("-k") - 1]).read_text()


def test_a_command_for_the_gpu_that_takes_too_long_is_killed_with_its_children(tmp_path):
    """A training child outlived its parent, wrote a checkpoint, and ran beside the next measurement."""
    fake = tmp_path / "python"
    fake.write_text(
        f"#!/bin/bash\ntrap '' TERM\n(trap '' TERM; echo $BASHPID > {tmp_path}/child; touch $TMPDIR/kept; sleep 60) &\n"
        "sleep 60\n"
    )
    fake.chmod(0o755)
    environment = os.environ | {"PYTHON": str(fake), "RESULTS": str(tmp_path), "LIMIT": "6", "TMPDIR": str(tmp_path)}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "tests", "program"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "tests (status 137)" in done.stdout and "no time left" in done.stdout
    child = int((tmp_path / "child").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert not list(tmp_path.glob("tmp.*"))


def test_a_call_for_the_gpu_that_is_ended_leaves_nothing_behind(tmp_path):
    """Its measurement went on, alone with the GPU, after the script had gone."""
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/bash\necho $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; sleep 60\n")
    fake.chmod(0o755)
    environment = os.environ | {"PYTHON": str(fake), "RESULTS": str(tmp_path), "TMPDIR": str(tmp_path)}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "tests"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    child = psutil.Process(int((tmp_path / "pid").read_text()))
    process.terminate()
    assert process.wait(timeout=20) == 130
    gone, running = psutil.wait_procs([child], timeout=10)
    assert gone and not running and not list(tmp_path.glob("tmp.*"))


def test_memory_is_counted_from_when_a_tensor_is_made_until_it_is_gone():
    with Tally() as tally:
        kept = torch.zeros(1000)
        view = kept.view(10, 100)
        assert tally.peaks == {"": 4000}
        tally.begin("product")
        product = torch.zeros(2000) * 2
        del product
        tally.begin("after")
        assert tally.now == 4000 and view.numel() == 1000
        del kept
        assert tally.now == 4000  # the view still refers to it
        del view
    assert tally.now == 0
    assert tally.peaks == {"": 4000, "product": 4000 + 2 * 8000, "after": 4000}


def test_memory_of_a_step_is_that_of_its_weights_and_of_what_the_flags_say(monkeypatch):
    monkeypatch.setitem(UNETS, "half", TINY)  # SD's layout, quick
    monkeypatch.setattr(fake_step, "build_text_encoders", lambda name: [])
    monkeypatch.setattr(memory, "GB", 1)
    case = Case("sd", "half", resolution=256, train_batch_size=2, mixed_precision="no")
    plain = compute(case)
    size = sum(p.numel() for p in UNet2DConditionModel(**TINY, time_cond_proj_dim=256).parameters()) * 4
    teacher = sum(p.numel() for p in UNet2DConditionModel(**TINY).parameters()) * 4
    vae = sum(p.numel() for p in build_vae("half").parameters()) * 4
    assert plain["rest"] == pytest.approx(4 * size + teacher + vae, rel=0.01)  # student, target, AdamW's two
    assert plain["parts"]["optimizer"] == pytest.approx(plain["rest"] + size, rel=0.1)  # and the gradients
    less = compute(Case(**vars(case) | {"gradient_checkpointing": True, "use_8bit_adam": True}))
    assert less["rest"] == pytest.approx(plain["rest"] - 2 * size + size / 2, rel=0.02)
    assert less["parts"]["student"] - less["rest"] < 0.5 * (plain["parts"]["student"] - plain["rest"])
    with Tally() as tally:  # and the same of tensors that are there
        build(case, tally.begin)()
    for part, size in plain["parts"].items():
        assert tally.peaks[part] == pytest.approx(size, rel=0.02), part


@pytest.mark.parametrize("layers", [lora.LAYERS, {}], ids=["fused", "PEFT's"])
def test_an_emulated_precision_is_off_by_its_rounding(layers, monkeypatch):
    """Layers that add to a view in place once lost their adapters: what `round` returned was a copy of the view."""
    monkeypatch.setattr(lora, "LAYERS", layers)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(ROOT / "toy/teachers/sd", subfolder="unet")
    adapter = lora.Lora(unet, rank=4, alpha=8)
    for parameter in adapter.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    x, timesteps = torch.randn(2, unet.config.in_channels, 8, 8), torch.tensor([999, 19])
    given = {"encoder_hidden_states": torch.randn(2, 7, unet.config.cross_attention_dim)}
    with torch.no_grad(), adapter.target():
        exact = consistency.unet_output(unet, x, timesteps, given)
        errors = {}
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            with precision.rounding(dtype):
                emulated = consistency.unet_output(unet, x, timesteps, given)
            errors[dtype] = float((emulated - exact).norm() / exact.norm())
    assert errors[torch.float32] == 0
    assert 1e-4 < errors[torch.float16] < 3e-3 and 4 < errors[torch.bfloat16] / errors[torch.float16] < 16


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_a_command_line_of_every_program(recipe, program):
    """The last stage decides the length; rates differ between full students and LoRAs."""
    parse = importlib.import_module(f"train_lcm_distill_{program}_wds").parse_args
    for stage in RECIPES[recipe]:
        args = parse(["--pretrained_teacher_model", "x", *stage.argv(program)])
        assert args.length.max_train_steps == stage.steps
        expected = stage.lora_rate if program.startswith("lora") else stage.full_rate
        assert args.optimization.learning_rate == expected
        assert (args.distillation.w_min < args.distillation.w_max) == (not program.startswith("lora"))
    assert (args.matching.dm_weight > 0) == (recipe == "few")


def test_stages_that_are_done_are_not_trained_again_unless_their_flags_have_changed():
    first, second = ({"flags": stage.argv("sd"), "seconds": 1.0} for stage in RECIPES["few"])
    other = {"program": "lora_sd", "recipe": "few", "seed": 0, "stages": [first]}
    done = {"program": "sd", "recipe": "few", "seed": 0, "stages": [first, second]}
    assert few_steps.find([other, done], "sd", "few", 0) == done
    assert few_steps.find([other, done], "sd", "few", 1)["stages"] == []
    half = {**done, "stages": [first, {**second, "flags": [*second["flags"], "--dm_steps", "2"]}]}
    assert few_steps.find([half], "sd", "few", 0) == {**done, "stages": [first]}
    assert few_steps.find([half, done, half], "sd", "few", 0) == done
    assessed = {**done, "stages": [{**stage, "metrics": {}} for stage in done["stages"]]}
    assert few_steps.find([done, assessed, done], "sd", "few", 0) == assessed
    assert few_steps.rest([other, done, other], [half]) == [other]
    assert few_steps.rest([half, done, assessed, done], [other]) == [assessed]


def test_benchmarks_show_no_notices_of_the_libraries():
    """Fake networks build every text encoder: Transformers noticed that torchvision is not there."""
    code = "import benchmarks.fake_step; from transformers import CLIPImageProcessor"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_the_summary_of_recipes_has_means_ranges_and_costs():
    def run(recipe: str, seed: int, *stages: tuple[float, float]) -> dict[str, Any]:
        done = []
        for seconds, accuracy in stages:
            values = {"caption_accuracy": accuracy, "frechet_distance": 100 * accuracy, "diversity": 0.5}
            done.append({"seconds": seconds, "metrics": {str(steps): dict(values) for steps in few_steps.STEPS}})
        return {"program": "sd", "recipe": recipe, "seed": seed, "stages": done}

    # One second a step, and "plain" takes 300: then the first stage of "few" is 4/3 of it.
    runs = [run("plain", 0, (300, 0.25)), run("few", 0, (400, 0.4), (500, 0.5)), run("few", 1, (400, 0.4), (1100, 0.7))]
    plain, first, few = few_steps.summary(runs).splitlines()[2:]
    assert plain.startswith("| sd, plain | 1 | 1.0 | 0.25 (0.25 to 0.25) |")
    assert first.startswith("| sd, few, stage 1 | 2 | 1.3 | 0.40 (0.40 to 0.40) |")
    assert few.startswith("| sd, few, stage 2 | 2 | 4.0 | 0.60 (0.50 to 0.70) |") and few.endswith("| 60 | 0.50 |")
    for run_ in runs:  # few captions: none comes twice
        for stage in run_["stages"]:
            for values in stage["metrics"].values():
                values.pop("diversity")
    assert few_steps.summary(runs).splitlines()[4].endswith("| 60 |  |")


def test_two_commits_are_compared_each_with_its_own_code(tmp_path, capfd):
    """Every comparison failed from the day on which `benchmarks` imported the package, for its notices."""
    package = tmp_path / "commit" / "lcm_distill"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("COMMIT = 'another'\n")
    (package / "command.py").write_text("import sys\nfrom lcm_distill import COMMIT\nprint(COMMIT, sys.argv[1:])\n")
    log = tmp_path / "log.txt"
    with capfd.disabled():  # it writes to this process's files
        status = compare_commits.fork(["-m", "lcm_distill.command", "--flag"], package.parent, log)
    assert (status, log.read_text()) == (0, "another ['--flag']\n")


def test_weight_files_of_two_commits_may_differ_in_their_date_alone(tmp_path):
    """Since weight files have a date, no run was equal to its repetition."""
    found = []
    for number, more in enumerate(({"modelspec.date": "today"}, {"modelspec.date": "tomorrow"}, {"ss_epoch": "2"})):
        save_file({"weight": torch.ones(2)}, tmp_path / f"{number}.safetensors", {"ss_steps": "5"} | more)
        found.append(compare_commits.read_weights(tmp_path / f"{number}.safetensors")["metadata"])
    assert found[0] == found[1] == {"ss_steps": "5"} != found[2]
