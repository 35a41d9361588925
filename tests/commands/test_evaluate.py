"""`evaluate`: an untrained student, a perfect one, the metrics compared with their formulas, the command."""

import contextlib
import copy
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from command_flags import unread_flags
from diffusers import UNet2DConditionModel
from PIL import Image

from lcm_distill import evaluate
from lcm_distill.data.tar import atomic_tar
from lcm_distill.errors import UsageError
from lcm_distill.export.weights import save_lora
from lcm_distill.models import sd
from lcm_distill.models.lora import STUDENT, Lora
from lcm_distill.models.teacher import Teacher
from lcm_distill.models.unets import student_from_teacher
from lcm_distill.objective.schedule import build_lcm_scheduler
from lcm_distill.sampling import metrics
from lcm_distill.sampling.finished import Student, find_students, load_teacher
from lcm_distill.sampling.generate import build_teacher_sampler
from lcm_distill.sampling.metrics import ClipScore, Cmmd, Fid, GeneratedRow, LatentDistances, squared_mmd
from toy import compare
from toy.compare import ToyMetric
from toy.score import real_pictures

CAPTIONS = real_pictures(6, 0)[1]


@pytest.fixture(scope="module")
def untrained(teacher, tmp_path_factory) -> list[str]:
    """The output folders of a full student and of a LoRA that have not been trained."""
    folder = tmp_path_factory.mktemp("students")
    pipeline = load_teacher(Teacher(teacher), device="cpu", dtype=torch.float32)
    sampler = build_lcm_scheduler(pipeline.scheduler.config)
    student_from_teacher(pipeline.unet, 16).save_pretrained(folder / "full")
    save_lora(folder / "lora", Lora(pipeline.unet, rank=2, alpha=2), STUDENT, family=sd)
    for name in ("full", "lora"):
        sampler.save_pretrained(folder / name)
    return [str(folder / "full"), str(folder / "lora")]


@pytest.fixture()
def pipeline(teacher):
    return load_teacher(Teacher(teacher), device="cpu", dtype=torch.float32)


def rows_of(pipeline, students, **options):
    chosen = dict(
        prompts=CAPTIONS, make_metrics=lambda reference: [LatentDistances(reference), ToyMetric(CAPTIONS, 0)],
        steps=(1, 2), samplers=["DDIM"], reference_steps=10, guidance_scale=1.0, resolution=64, batch_size=4, shown=2,
    )  # fmt: skip
    return list(evaluate.evaluate(pipeline, students, **chosen | options))


def test_an_untrained_student_equals_the_untrained_control(pipeline, untrained):
    rows = rows_of(pipeline, find_students(untrained))
    labels = ["DDIM, 10 steps", "DDIM, 1 step", "DDIM, 2 steps"]
    labels += [
        f"{model}, {steps}" for model in ("untrained control", "full", "lora") for steps in ("1 step", "2 steps")
    ]
    assert [row.label for row in rows] == labels and [row.is_reference for row in rows] == [True] + [False] * 8
    values = {(row.model, row.steps): row.values for row in rows}
    for steps in (1, 2):
        for model in ("full", "lora"):
            assert values[model, steps] == pytest.approx(values["untrained control", steps], rel=1e-4)
        assert values["untrained control", steps].keys() == values["DDIM", steps].keys()
    assert {"distance", "energy", "caption_accuracy", "frechet_distance"} == values["full", 1].keys()
    assert "distance" not in values["full", 2] and values["full", 1]["distance"] > 0.3
    # The reference has no distance to itself.
    assert rows[0].values["energy"] == 0 and len(rows[0].pictures) == 2
    # The pipeline is the teacher's again.
    assert isinstance(pipeline.unet, UNet2DConditionModel) and pipeline.scheduler.__class__.__name__ == "DDIMScheduler"
    assert not any("lora" in name for name, _ in pipeline.unet.named_parameters())


def test_students_without_a_guidance_embedding_have_their_own_guidance_scale(
    pipeline, untrained, monkeypatch, tmp_path
):
    """A U-Net that a LoRA was merged into has none: at the teacher's scale the pipelines guided it a second time."""
    scales = []
    pipeline.unet.save_pretrained(tmp_path / "merged")

    def generate(pipeline, prompts, seeds, *, guidance_scale, **_):
        scales.append(guidance_scale)
        return torch.ones(6, 4, 16, 16)

    monkeypatch.setattr(evaluate, "generate_latents", generate)
    monkeypatch.setattr(metrics, "decode_latents", lambda *_, **__: [])
    rows = rows_of(
        pipeline, find_students([*untrained, str(tmp_path / "merged")]), guidance_scale=4.0, lora_guidance_scale=1.5,
        steps=[1], make_metrics=lambda reference: [],
    )  # fmt: skip
    assert scales == [4.0, 4.0, 4.0, 4.0, 1.5, 1.5] == [row.guidance_scale for row in rows]


@pytest.mark.parametrize("name", ["DDPMScheduler", "HeunDiscreteScheduler", "TCDScheduler"])
def test_every_row_has_the_teacher_s_schedule(name, pipeline, untrained, monkeypatch, tmp_path):
    """Of a config that leaves its betas out, the teacher's rows had one class's defaults, the LCMs' another's."""
    config = {"_class_name": name, "num_train_timesteps": 1000}
    pipeline.scheduler = build_teacher_sampler(config)
    (tmp_path / "lora").mkdir()
    shutil.copy(f"{untrained[1]}/pytorch_lora_weights.safetensors", tmp_path / "lora")
    own, rows = getattr(diffusers, name)(), []

    def generate(pipeline, prompts, seeds, **_):
        rows.append(type(pipeline.scheduler).__name__)
        assert torch.equal(pipeline.scheduler.alphas_cumprod, own.alphas_cumprod)
        return torch.ones(6, 4, 16, 16)

    monkeypatch.setattr(evaluate, "generate_latents", generate)
    monkeypatch.setattr(metrics, "decode_latents", lambda *_, **__: [])
    for students in ([], find_students([str(tmp_path / "lora")])):
        rows_of(pipeline, students, samplers=["DDIM", "DPM-Solver++"], steps=[1], make_metrics=lambda reference: [])
    assert rows == [
        *["DDIMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"],
        *["DDIMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "LCMScheduler", "LCMScheduler"],
    ]


class PerfectStudent(Student):
    """Its U-Net predicts, at any timestep, the end of the teacher's trajectory from the initial noise."""

    ends: torch.Tensor

    def sampler(self, scheduler_config):
        return build_lcm_scheduler(scheduler_config)

    @contextlib.contextmanager
    def installed_in(self, pipeline, *, fuse=False):
        teacher, scheduler = pipeline.unet, pipeline.scheduler
        pipeline.unet, pipeline.scheduler = copy.copy(teacher), self.sampler(scheduler.config)
        alphas, seen = scheduler.alphas_cumprod, {"picture": 0}

        def forward(sample, timestep, **_):
            if timestep == 999:
                seen["now"] = range(seen["picture"], seen["picture"] + len(sample))
                seen["picture"] = (seen["picture"] + len(sample)) % len(self.ends)
            alpha = alphas[int(timestep)]
            return ((sample - alpha.sqrt() * self.ends[list(seen["now"])]) / (1 - alpha).sqrt(),)

        pipeline.unet.forward = forward
        yield pipeline
        pipeline.unet, pipeline.scheduler = teacher, scheduler


def test_a_perfect_student_has_no_distance(pipeline):
    """Neither in one step, by pairs, nor in several, by distribution; its pictures are the teacher's."""
    ends = []

    def make_metrics(reference):
        ends.append(reference.latents)
        return [LatentDistances(reference)]

    students = [PerfectStudent("perfect", "lora")]  # "lora": generates at --lora_guidance_scale, without guidance
    rows_of(pipeline, [], make_metrics=make_metrics, samplers=[], control=False, guidance_scale=3.0)
    object.__setattr__(students[0], "ends", ends[0])
    rows = rows_of(
        pipeline, students, make_metrics=make_metrics, samplers=[], control=False, guidance_scale=3.0, steps=[1, 2, 4]
    )
    assert [row.label for row in rows[1:]] == ["perfect, 1 step", "perfect, 2 steps", "perfect, 4 steps"]
    assert rows[1].values["distance"] < 1e-4
    assert all(abs(row.values["energy"]) < 1e-3 for row in rows[1:])
    for row in rows[1:]:
        for picture, other in zip(row.pictures, rows[0].pictures, strict=True):
            assert np.abs(np.asarray(picture, int) - np.asarray(other, int)).max() <= 1


@pytest.mark.parametrize(
    ("students", "options", "message"),
    [
        (1, {"steps": [1, 51]}, "--steps 51: LCM.*takes at most 50 steps"),
        (0, {"steps": [51]}, "--steps 51: LCM.*takes at most 50 steps"),
        (0, {"steps": [1001], "control": False}, "--steps 1001: DDIM.*takes at most 1000 steps"),
        (0, {"reference_steps": 1001}, "--reference_steps 1001: DDIM.*takes at most 1000 steps"),
    ],
)
def test_more_steps_than_a_grid_has_are_refused_before_generating(
    pipeline, untrained, monkeypatch, students, options, message
):
    monkeypatch.setattr(evaluate, "generate_latents", lambda *_, **__: pytest.fail("generated"))
    with pytest.raises(UsageError, match=message):
        rows_of(pipeline, find_students(untrained[:students]), **options)


def test_a_student_that_does_not_fit_is_refused_before_generating(pipeline, untrained, monkeypatch, tmp_path):
    """It was refused only after the teacher's rows, which take hours with a real teacher."""
    UNet2DConditionModel.from_config(dict(pipeline.unet.config) | {"layers_per_block": 2}).save_pretrained(tmp_path)
    monkeypatch.setattr(evaluate, "generate_latents", lambda *_, **__: pytest.fail("generated"))
    with pytest.raises(UsageError, match="--student .* was not distilled from this teacher: .*layers_per_block"):
        rows_of(pipeline, find_students([*untrained, str(tmp_path)]))


# --- metrics


def generated(pictures, prompts=()):
    row = GeneratedRow(prompts, torch.zeros(0), 1, None)
    row.__dict__["pictures"] = pictures
    return row


def noise_pictures(count, seed):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def clip(teacher, tmp_path_factory) -> str:
    """A small CLIP with random weights, as transformers saves it."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(teacher, subfolder="tokenizer")
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.CLIPConfig(
        text_config=size | dict(
            vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length,
            **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
        ),
        vision_config=size | dict(image_size=32, patch_size=8), projection_dim=16,
    )  # fmt: skip
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return str(folder)


def test_clip_score_is_the_cosine_of_picture_and_prompt(clip):
    pictures, prompts = noise_pictures(20, 0), (CAPTIONS * 4)[:20]
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip)
    process = transformers.CLIPImageProcessorPil.from_pretrained(clip)
    scores = []
    with torch.no_grad():
        for picture, prompt in zip(pictures, prompts, strict=True):
            hidden = model.vision_model(process([picture], return_tensors="pt").pixel_values).pooler_output
            image = model.visual_projection(hidden)
            text = model.text_projection(model.text_model(**tokenizer([prompt], return_tensors="pt")).pooler_output)
            scores.append(max(0.0, torch.nn.functional.cosine_similarity(image, text).item()))
    assert len(set(scores)) > 10
    score = ClipScore(clip, "cpu")(generated(pictures, prompts))["clip_score"]
    assert score == pytest.approx(100 * sum(scores) / 20, rel=1e-3)


class OnApple(torch.Tensor):
    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_cmmd_is_the_squared_mmd_of_the_embeddings(clip):
    a, b = noise_pictures(5, 0), [Image.new("RGB", (40, 40), colour) for colour in ("red", "green", "white")]
    metric = Cmmd(clip, "cpu").against(b)
    assert metric(generated(b))["cmmd"] == pytest.approx(0, abs=1e-9)
    process = transformers.CLIPImageProcessorPil.from_pretrained(clip)
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        x, y = (
            torch.nn.functional.normalize(
                model.visual_projection(
                    model.vision_model(process(pictures, return_tensors="pt").pixel_values).pooler_output
                )
            ).double()
            for pictures in (a, b)
        )

    def mean(first, second):
        values = [np.exp(-float((u - v).square().sum()) / 200) for u in first for v in second]
        return sum(values) / len(values)

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert metric(generated(a))["cmmd"] == pytest.approx(expected, rel=1e-4) and expected > 0
    # Apple's GPUs have no float64.
    metric._model.visual_projection.register_forward_hook(lambda module, inputs, out: out.as_subclass(OnApple))
    assert metric(generated(a))["cmmd"] == pytest.approx(expected, rel=1e-4)
    assert squared_mmd(torch.zeros(1, 2), torch.tensor([[0.0, 10.0]])) == pytest.approx(2 - 2 * np.exp(-0.5))


def test_fid_is_torch_fidelity_s(monkeypatch):
    """The library needs torchvision, so a stub checks its arguments."""
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UsageError, match="--metrics fid needs torch-fidelity"):
        Fid("cpu")
    calls = []
    library = ModuleType("torch_fidelity")
    library.calculate_metrics = lambda **options: calls.append(options) or {"frechet_inception_distance": 12.5}
    monkeypatch.setitem(sys.modules, "torch_fidelity", library)
    reference, pictures = noise_pictures(3, 0), noise_pictures(2, 1)
    assert Fid("cpu").against(reference)(generated(pictures)) == {"fid": 12.5}
    (call,) = calls
    assert call["fid"] and not call["cuda"] and len(call["input1"]) == 2 and len(call["input2"]) == 3
    assert call["input1"][1].dtype == torch.uint8 and call["input1"][1].shape == (3, 40, 40)
    assert torch.equal(call["input1"][1].permute(1, 2, 0), torch.from_numpy(np.array(pictures[1])))


def test_mistakes_with_metrics_are_reported(tmp_path):
    for make, message in (
        (lambda: ClipScore(str(tmp_path), "cpu"), "--clip_model .*no CLIP model"),
        (lambda: Cmmd(str(tmp_path / "none"), "cpu"), "--cmmd_model .*no CLIP model"),
    ):
        with pytest.raises(UsageError, match=message):
            make()


# --- the command


def command(teacher, output_dir, *more):
    return [
        *("--pretrained_teacher_model", teacher, "--output_dir", str(output_dir), "--reference_steps", "4"),
        *("--steps", "1", "2", "--guidance_scale", "3", "--num_pictures", "4", "--resolution", "64", *more),
    ]


def test_the_command_writes_tables_numbers_and_a_grid(teacher, untrained, shards, tmp_path, capsys, clip):
    evaluate.main(command(
        teacher, tmp_path / "out", "--student", *untrained, "--real", shards, "--samplers", "DPM-Solver++",
        "--metrics", "latents", "cmmd", "clip", "--cmmd_model", clip, "--clip_model", clip, "--shown", "3",
    ))  # fmt: skip
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    models = [(row["model"], row["steps"]) for row in record["rows"]]
    assert models == [("DDIM", 4)] + [
        (model, steps) for model in ("DPM-Solver++", "untrained control", "full", "lora") for steps in (1, 2)
    ]
    assert record["settings"]["reference"] == "real pictures" and record["versions"]["torch"]
    tables = (tmp_path / "out" / "evaluation.md").read_text()
    assert tables.split("\n\n**")[0] in printed and "Loading weights" not in printed
    values = record["rows"][3]["values"]
    assert values.keys() == {"distance", "energy", "cmmd", "clip_score"}
    for name in ("energy", "cmmd"):
        cells = [evaluate.format_number(row["values"][name]) for row in record["rows"][3:5]]
        assert f"| untrained control | {cells[0]} | {cells[1]} |" in tables
    assert f"The reference: DDIM, 4 steps: {evaluate.format_number(record['rows'][0]['values']['cmmd'])}." in tables
    with Image.open(tmp_path / "out" / "evaluation.png") as grid:
        assert grid.height > 9 * 64 and 3 * 64 < grid.width < 3 * 64 + 400


def test_rows_from_before_an_interruption_are_written(teacher, tmp_path, monkeypatch):
    original = evaluate.LatentDistances.__call__
    calls = []

    def interrupted(self, row):
        calls.append(row)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, row)

    monkeypatch.setattr(evaluate.LatentDistances, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(command(teacher, tmp_path, "--prompts", *CAPTIONS))
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert [(row["model"], row["steps"]) for row in rows] == [("DDIM", 4), ("DDIM", 1)]
    assert "| DDIM | " in (tmp_path / "evaluation.md").read_text() and (tmp_path / "evaluation.png").is_file()


def test_a_value_that_is_not_finite_is_null_in_the_json(tmp_path):
    values = {"distance": float("nan"), "accuracy": 0.5}
    row = evaluate.EvaluatedRow("LCM", 1, 1.0, values, 0.1, [Image.new("RGB", (8, 8))])
    evaluate.write_results([row], {"distance": "Distance"}, [1], {"seed": 0}, tmp_path, ["a"])
    text = (tmp_path / "evaluation.json").read_text()
    (kept,) = json.loads(text, parse_constant=pytest.fail)["rows"]
    assert kept["values"] == {"distance": None, "accuracy": 0.5}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "pass --prompts, or --real"),
        (["--prompts", "none.txt"], "--prompts: none.txt cannot be read"),
        (["--prompts", "a", "--student", "/nowhere"], "--student /nowhere contains neither"),
        (["--prompts", "a", "--resolution", "63"], "--resolution 63 is not a multiple"),
        (["--prompts", "a", "--metrics", "beauty"], "--metrics: invalid choice"),
        (["--prompts", "a", "--dtype", "fp16", "--device", "cpu"], "--dtype fp16"),
        (["--real", "SHARDS", "--num_pictures", "5000"], "48 usable pictures, but --num_pictures is 5000"),
    ],
)
def test_mistakes_are_reported(teacher, shards, tmp_path, more, message, capsys):
    argv = command(teacher, tmp_path / "out", *[shards if word == "SHARDS" else word for word in more])
    with pytest.raises((UsageError, SystemExit)) as error:
        evaluate.main(argv)
    assert message in str(error.value) + capsys.readouterr().err


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("metric", ["clip", "cmmd", "fid"])
def test_a_metric_that_cannot_be_loaded_is_reported_before_generating(teacher, tmp_path, monkeypatch, metric):
    """It was reported only after the reference, which takes an hour with a real teacher."""
    monkeypatch.setattr(evaluate, "generate_latents", lambda *_, **__: pytest.fail("generated"))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    none = str(tmp_path / "none")
    argv = ["--prompts", "a castle", "--metrics", "latents", metric, "--clip_model", none, "--cmmd_model", none]
    with pytest.raises(
        UsageError, match=f"--{metric}_model {none}: no CLIP" if metric != "fid" else "--metrics fid needs"
    ):
        evaluate.main(command(teacher, tmp_path / "out", *argv))


def test_no_flag_is_declared_and_unread(teacher, tmp_path):
    assert unread_flags(evaluate, evaluate.parse_args(command(teacher, tmp_path, "--prompts", "x"))) == set()


def test_tables_leave_out_metrics_and_steps_that_no_row_has():
    row = evaluate.EvaluatedRow("DDIM", 1, 8.0, {"distance": 1.0}, 0.1, [])
    rows = [dataclasses.replace(row, steps=50, values={}, is_reference=True), row]
    rows += [evaluate.EvaluatedRow("mine", 1, 8.0, {"distance": 123.4}, 0.1, [])]
    rows += [evaluate.EvaluatedRow(model, 2, 8.0, {}, 0.1, []) for model in ("DDIM", "mine")]
    assert evaluate.format_tables(rows, {"distance": "Distance", "fid": "FID"}, [1, 2]) == (
        "**Distance**\n\n| model | 1 step |\n|---|---|\n| DDIM | 1.000 |\n| mine | 123 |"
    )


def test_the_toy_comparison_generates_and_evaluates(untrained, tmp_path, capsys, monkeypatch):
    original = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda *a, **k: original(*a, **k | {"reference_steps": 4}))
    rows = compare.main(["--student", *untrained, "--output_dir", str(tmp_path), "--count", "2"])
    assert len(rows) == 1 + 4 * 5 and rows[-1].label == "SD LCM-LoRA, 8 steps"
    printed = capsys.readouterr().out
    assert printed.count("caption error at") == 4 and "SD LCM " in printed and "**Caption accuracy" in printed
    assert (tmp_path / "evaluation.png").is_file() and (tmp_path / "evaluation.md").is_file()


def test_the_reference_follows_the_solver_s_trajectory(pipeline):
    """The teacher's sampler uses the solver's grid, 999, 979, …, and ends at timestep 0."""
    sampler = build_teacher_sampler(pipeline.scheduler.config)
    sampler.set_timesteps(50)
    assert sampler.timesteps.tolist() == list(range(999, 0, -20))
    assert torch.equal(sampler.final_alpha_cumprod, sampler.alphas_cumprod[0])
    other = build_teacher_sampler(SimpleNamespace(**pipeline.scheduler.config).__dict__, "DPM-Solver++")
    other.set_timesteps(4)
    assert other.timesteps.tolist()[0] == 999


def test_real_shards_that_are_cut_are_left_out_and_encoded_ones_refused(shards, tmp_path):
    """A tar that was cut short ended in a traceback, and messages named a flag that the command does not have."""
    first, second = sorted(Path(shards).glob("*.tar"))
    (tmp_path / "0.tar").write_bytes(first.read_bytes()[:20_000])
    both = f"{tmp_path / '0.tar'}::{second}"
    pictures, captions = evaluate.read_real_pictures(both, 24, 64)
    assert len(pictures) == len(captions) == 24 and pictures[0].size == (64, 64)
    with pytest.raises(
        UsageError, match=r"^--real .* has \d\d usable pictures, .*0.tar cannot be read, or not to its end"
    ):
        evaluate.read_real_pictures(both, 48, 64)
    with pytest.raises(UsageError, match=r"^--real: .*none.tar") as error:
        evaluate.read_real_pictures(str(tmp_path / "none.tar"), 1, 64)
    assert "--train_shards" not in str(error.value)
    with atomic_tar(tmp_path / "encoded.tar") as tar:
        tar.add("a.latents.safetensors", b"x")
        tar.add("a.txt", b"a caption")
    with pytest.raises(UsageError, match=r"^--real: the sample a is encoded"):
        evaluate.read_real_pictures(str(tmp_path / "encoded.tar"), 1, 64)
