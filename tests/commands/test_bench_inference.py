"""`python -m lcm_distill.bench_inference`: what is timed, in which order, and the table."""

import json

import pytest
import torch
from command_flags import unread_flags
from peft.tuners.lora import LoraLayer

from lcm_distill import bench_inference
from lcm_distill.bench_inference import Contender, Result, format_table, measure, prepare_contenders
from lcm_distill.errors import UsageError
from lcm_distill.models.teacher import Teacher
from lcm_distill.sampling.finished import find_students, load_teacher


def argv(teacher, *students, **more):
    words = ["--pretrained_teacher_model", teacher, "--student", *students]
    for name, value in more.items():
        words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}", str(value)]
    return words


def test_the_table_of_a_teacher_and_two_students(teachers, finished, tmp_path, capsys):
    words = argv(
        teachers["sdxl"],
        finished("full", "sdxl"),
        finished("lora", "sdxl"),
        teacher_steps=3,
        steps=1,
        batch_sizes=[1, 2, 1],
        repeats=2,
        warmup=0,
        output_dir=tmp_path,
    )
    bench_inference.main(words)
    printed = capsys.readouterr().out
    assert (tmp_path / "bench_inference.md").read_text().strip() == printed.strip()
    written = json.loads((tmp_path / "bench_inference.json").read_text())
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 6 and len({line.count("|") for line in lines}) == 1
    rows = [(r["model"], r["steps"], r["unet_passes"], r["batch_size"]) for r in written["results"]]
    models = [("teacher", 3, 6), ("full_sdxl", 1, 1), ("lora_sdxl", 1, 1)]
    assert rows == [(*model, batch) for batch in (1, 2) for model in models]
    for result in written["results"]:
        assert len(result["seconds"]) == 2 and min(result["seconds"]) > 0 and result["peak_gpu_bytes"] is None
        teacher = next(r for r in written["results"] if r["batch_size"] == result["batch_size"])
        ratios = [a / b for a, b in zip(teacher["seconds"], result["seconds"], strict=True)]
        assert result["times_as_fast"] == pytest.approx(sum(ratios) / 2)
    assert written["command"][-len(words) :] == words and written["resolution"] == 64
    for word in ("64 × 64 pixels, float32", f"torch {torch.__version__}", "1 of ", "LoRAs are fused", "loading is not"):
        assert word in printed, word


def test_each_generates_with_its_own_network_and_passes(teachers, finished):
    pipeline = load_teacher(Teacher(teachers["sd"]), device="cpu", dtype=torch.float32)
    teacher, scheduler = pipeline.unet, pipeline.scheduler
    students = find_students([finished("full", "sd"), finished("lora", "sd")])
    options = dict(steps=2, teacher_steps=3, guidance_scale=4.0)
    contenders = prepare_contenders(pipeline, students, lora_guidance_scale=1.5, **options)
    assert len({id(contender.unet) for contender in contenders}) == 3
    assert not any(isinstance(module, LoraLayer) for contender in contenders for module in contender.unet.modules())
    passes: list[tuple[int, int]] = []  # which contender, batch size
    for number, contender in enumerate(contenders):
        contender.unet.register_forward_pre_hook(
            lambda module, inputs, number=number: passes.append((number, len(inputs[0])))
        )
    results = measure(pipeline, contenders, prompt="a red circle", resolution=64, batch_sizes=[3], repeats=1, warmup=0)
    # The teacher, and the LoRA above guidance scale 1, take two passes per step; the full LCM has a guidance embedding.
    assert passes == [(0, 6)] * 3 + [(1, 3)] * 2 + [(2, 6)] * 2
    assert [result.unet_passes for result in results] == [6, 2, 4]
    assert [result.guidance_scale for result in results] == [4, 4, 1.5]
    assert pipeline.unet is teacher and pipeline.scheduler is scheduler
    with pytest.raises(UsageError, match="--steps 21: .* at most 20"):
        prepare_contenders(pipeline, students, lora_guidance_scale=1.0, **options | {"steps": 21})
    with pytest.raises(UsageError, match="--teacher_steps 1001"):
        prepare_contenders(pipeline, students, lora_guidance_scale=1.0, **options | {"teacher_steps": 1001})


def test_turns_medians_and_ratios(monkeypatch):
    """Every round has each model once; one slow round does not change the result; warm-up does not count."""
    networks = [torch.nn.Linear(1, 1) for _ in range(2)]
    for network in networks:
        network.device = torch.device("cpu")
    pipeline = type("Pipeline", (), {"unet": networks[0], "scheduler": None})()
    contenders = [Contender(name, network, name, 4, 1.0, False) for name, network in zip("ab", networks, strict=True)]
    clock = iter([99, 99, 8, 2, 80, 10, 9, 3])  # the second timed round is ten times as slow
    turns = []

    def taken(pipeline, contender, prompts, resolution):
        assert pipeline.unet is contender.unet and pipeline.scheduler == contender.name
        turns.append(contender.name)
        return 2.0 * next(clock), 7 if contender.name == "a" else 5

    monkeypatch.setattr(bench_inference, "_time", taken)
    teacher, student = measure(pipeline, contenders, prompt="x", resolution=8, batch_sizes=[2], repeats=3, warmup=1)
    assert turns == list("ab" * 4)
    assert teacher.seconds == [8, 80, 9] and student.seconds == [2, 10, 3]  # of one picture
    assert (teacher.median, student.median) == (9, 3)
    assert teacher.times_as_fast == 1 and student.times_as_fast == 4  # of 4, 8 and 3
    assert (teacher.peak_gpu_bytes, student.peak_gpu_bytes) == (7, 5)


def test_the_table_is_markdown_and_has_the_memory_if_it_is_known():
    result = Result("a|b", 4, 1.0, 4, 2, [0.12345, 1.0, 0.1], 9.87, None)
    assert format_table([result]).splitlines()[-1] == "| a\\|b | 4 | 1 | 4 | 2 | 0.123 | 9.9 |"
    on_gpu = Result("a", 4, 7.5, 8, 2, [1.0], 1.0, 3 * 2**29)
    head, rule, line = format_table([on_gpu]).splitlines()
    assert head.endswith("| peak GPU memory |") and line == "| a | 4 | 7.5 | 8 | 2 | 1 | 1.0 | 1.5 GiB |"
    assert head.count("|") == rule.count("|") == line.count("|")


def test_compile_compiles_every_u_net(teachers, finished, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled.append(type(module).__name__))
    words = argv(teachers["sd"], finished("lora", "sd"), teacher_steps=1, steps=1, batch_sizes=[1], repeats=1)
    bench_inference.main([*words, "--compile"])
    assert compiled == ["UNet2DConditionModel"] * 2 and "U-Nets compiled" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, words",
    [(["--compile", "--warmup", "0"], "argument --compile"), (["--batch_sizes", "0"], "argument --batch_sizes"),
     (["--repeats", "0"], "argument --repeats"), (["--student"], "argument --student")],
)  # fmt: skip
def test_mistakes_in_flags_are_reported_in_one_line(more, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_inference.main(["--pretrained_teacher_model", "x", "--student", "y", *more])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and len(error.splitlines()) == 2
    assert error.startswith("python -m lcm_distill.bench_inference: error: ")


@pytest.mark.parametrize(
    "more, words",
    [(["--student", "nowhere"], "--student nowhere"), (["--output_dir", __file__], "--output_dir .* cannot be written"),
     (["--resolution", "63"], "--resolution 63")],
)  # fmt: skip
def test_mistakes_are_reported_with_their_flag(more, words, teachers, finished):
    with pytest.raises(UsageError, match=words):
        bench_inference.main([*argv(teachers["sd"], finished("lora", "sd")), *more])


def test_no_flag_is_declared_and_unread():
    assert unread_flags(bench_inference, bench_inference.parse_args(argv("x", "y"))) == set()


def test_help_begins_with_commands_to_run(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_inference.main(["--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and "python -m lcm_distill.bench_inference --pretrained_teacher_model" in printed
    assert "--batch_sizes" in printed and "None" not in printed
