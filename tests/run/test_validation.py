"""Validation: the prompts, the pictures against the pipelines' own, and where they are shown."""

import copy
import math
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from PIL import Image

from lcm_distill.errors import DivergenceError, UsageError
from lcm_distill.flags import DistillationFlags, ValidationFlags
from lcm_distill.models import sd, sdxl
from lcm_distill.models.vae import decode_latents, encode_pixels
from lcm_distill.objective.consistency import unet_output
from lcm_distill.objective.schedule import DDIMSolver, NoiseSchedule
from lcm_distill.run import validation
from lcm_distill.run.validation import Validation, validation_guidance_scale
from lcm_distill.sampling.generate import build_teacher_sampler, generate_latents, read_prompts
from lcm_distill.sampling.metrics import relative_distance

PROMPTS = ["a small red circle on a black background", "a large blue square on a white background"]
SETTINGS = {"images_per_prompt": 2, "guidance_scale": 3.0, "resolution": 64, "seed": 3}


@pytest.fixture(scope="module")
def pipelines(teachers):
    """Both toy teachers under an `LCMScheduler`, in float32."""
    loaded = {}
    for family in ("sd", "sdxl"):
        pipeline = DiffusionPipeline.from_pretrained(teachers[family], torch_dtype=torch.float32)
        pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        loaded[family] = pipeline
    return loaded


@pytest.fixture()
def seen_dtypes():
    """The dtypes that a network's convolutions gave: `seen_dtypes(network)` is a set that fills, during the test."""
    hooks = []

    def watch(network):
        seen = set()
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                hooks.append(module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype)))
        return seen

    yield watch
    for hook in hooks:
        hook.remove()


def generate(pipeline, prompts, *, images_per_prompt, seed, **options):
    """Pictures of each prompt, by `generate_latents` and `decode_latents`."""
    prompts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    seeds = range(seed, seed + len(prompts))
    latents = generate_latents(pipeline, prompts, seeds, batch_size=images_per_prompt, **options)
    return decode_latents(pipeline.vae, latents, 1)


def as_array(pictures):
    return np.stack([np.asarray(picture) for picture in pictures])


# --- prompts


def test_prompts_are_values_or_the_lines_of_txt_files(tmp_path, monkeypatch):
    assert read_prompts(None) is None
    assert read_prompts(["a cat", "", "a dog.TXTURE"]) == ["a cat", "", "a dog.TXTURE"]
    (tmp_path / "some.txt").write_bytes("\ufeffa cat \r\n\n  \nein süßer Hund\nlast".encode())
    (tmp_path / "MORE.TXT").write_text("one more\n")
    (tmp_path / "not.md").write_text("not read")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = ["first", "a cat", "ein süßer Hund", "last", "not.md", "one more"]
    assert read_prompts(["first", "some.txt", "not.md", str(tmp_path / "MORE.TXT")]) == expected
    assert read_prompts(["~/MORE.TXT"]) == ["one more"]


@pytest.mark.hostile("folders")
@pytest.mark.parametrize(
    ("value", "content", "words"),
    [
        ("nowhere.txt", None, "nowhere.txt cannot be read .*No such file.*end the prompt differently"),
        ("a sign that says hello.txt", None, "correct its path"),
        ("x" * 5000 + ".txt", None, "cannot be read"),
        ("nul\0.txt", None, "cannot be read"),
        ("~nobody-of-this-name/a.txt", None, "cannot be read"),
        ("folder.txt", "folder", "folder.txt cannot be read"),
        ("empty.txt", b"", "empty.txt is empty; write a prompt"),
        ("blank.txt", b" \n\n\t\n", "blank.txt is empty"),
        ("latin.txt", "ein süßer Hund".encode("latin-1"), "latin.txt is not UTF-8; save it"),
        ("wide.txt", "a cat".encode("utf-16"), "wide.txt is not UTF-8"),
    ],
)
def test_prompt_files_that_cannot_be_used_are_refused(tmp_path, monkeypatch, value, content, words):
    monkeypatch.chdir(tmp_path)
    if content == "folder":
        Path(value).mkdir()
    elif content is not None:
        Path(value).write_bytes(content)
    with pytest.raises(UsageError, match=f"^--validation_prompts: .*{words}"):
        read_prompts(["a good one", value])


# --- generating


@pytest.mark.parametrize("w_min, w_max, expected", [(5, 15, 8), (1, 5, 6), (9, 12, 10), (7.5, 7.5, 8.5)])
def test_default_guidance_scale_is_in_the_trained_range(w_min, w_max, expected):
    trained = DistillationFlags(w_min=w_min, w_max=w_max)
    assert validation_guidance_scale(ValidationFlags(), trained) == expected
    assert validation_guidance_scale(ValidationFlags(validation_guidance_scale=1.5), trained) == 1.5


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_pictures_are_those_of_the_pipeline(pipelines, family):
    """Validation decodes the latents itself; in float32 that must make no difference."""
    pipeline = pipelines[family]
    expected = []
    for number, prompt in enumerate(PROMPTS):
        generators = [torch.Generator().manual_seed(3 + 2 * number + k) for k in range(2)]
        expected += pipeline(
            [prompt] * 2, num_inference_steps=2, guidance_scale=3.0, height=64, width=64, generator=generators
        ).images
    pictures = generate(pipeline, PROMPTS, inference_steps=2, **SETTINGS)
    assert [(p.mode, p.size) for p in pictures] == [("RGB", (64, 64))] * 4
    ours, theirs = as_array(pictures).astype(int), as_array(expected).astype(int)
    assert np.abs(ours - theirs).max() <= 1  # the batch is another, and so may be the last bit
    assert len({picture.tobytes() for picture in pictures}) == 4 and theirs.std() > 20


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_latents_of_the_pipeline_are_the_vae_s_times_its_scale(pipelines, family):
    """What `decode_latents` undoes is what `encode_pixels` does, and what the pipelines call latents."""
    pipeline = pipelines[family]
    options = dict(num_inference_steps=1, guidance_scale=3.0, height=64, width=64)
    latents, picture = (
        pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(1), output_type=kind, **options).images
        for kind in ("latent", "np")
    )
    assert latents.shape == (1, 4, 16, 16) and latents.dtype == torch.float32
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    np.testing.assert_allclose((decoded[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy(), picture[0], atol=1e-5)


@pytest.mark.parametrize("shift", [None, 0.5])
def test_decoding_undoes_encoding(pipelines, shift):
    """A picture of the toy world there and back, with and without a shift; the batch size does not matter."""
    vae = pipelines["sd"].vae
    picture = generate(pipelines["sd"], PROMPTS[:1], inference_steps=4, **SETTINGS | {"images_per_prompt": 1})[0]
    pixels = torch.from_numpy(np.stack([np.asarray(picture)] * 3)).permute(0, 3, 1, 2)
    vae.register_to_config(shift_factor=shift)
    try:
        latents = encode_pixels(vae, pixels, 3, torch.Generator().manual_seed(0))
        pictures = decode_latents(vae, latents, 3)
        parts = []
        hook = vae.decoder.register_forward_pre_hook(lambda module, inputs: parts.append(len(inputs[0])))
        again = decode_latents(vae, latents, 2)
        hook.remove()
    finally:
        vae.register_to_config(shift_factor=None)
    assert np.abs(as_array(pictures) - as_array([picture] * 3).astype(float)).mean() < 6
    assert parts == [2, 1] and np.abs(as_array(pictures).astype(int) - as_array(again)).max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vae_decodes_in_its_own_dtype_whatever_autocast_says(pipelines, seen_dtypes, dtype):
    """Under autocast a float32 VAE computes in half precision, where SDXL's overflows: black pictures."""
    vae = torch.nn.Module.to(copy.deepcopy(pipelines["sd"].vae), dtype)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    seen = seen_dtypes(vae)
    with torch.autocast("cpu", dtype=torch.bfloat16 if dtype == torch.float32 else torch.float16):
        if dtype == torch.float32:
            vae.decode(latents.float())
            assert seen == {torch.bfloat16}  # autocast would have it so
            seen.clear()
        pictures = decode_latents(vae, latents, 1)
        assert torch.is_autocast_enabled("cpu")
    assert seen == {dtype}
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in decode_latents(vae, latents, 1)]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_under_autocast_the_unet_is_in_half_precision_and_the_vae_is_not(pipelines, seen_dtypes, family):
    pipeline = pipelines[family]
    of_unet, of_vae = seen_dtypes(pipeline.unet), seen_dtypes(pipeline.vae)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generate(pipeline, PROMPTS[:1], inference_steps=1, **SETTINGS | {"images_per_prompt": 1})
    assert of_unet == {torch.bfloat16} and of_vae == {torch.float32}


class FakePipeline:
    """Its latents are the first noise in the first channel, its VAE shows them in red; records its calls."""

    vae_scale_factor = 8

    def __init__(self, answer=1.0):
        self.answer = answer
        self.unet = torch.nn.Dropout().train()
        self.unet.config = SimpleNamespace(in_channels=3)
        self.unet.device, self.unet.dtype = torch.device("cpu"), torch.float32
        self.vae = SimpleNamespace(
            config=SimpleNamespace(scaling_factor=1.0),
            device=torch.device("cpu"),
            dtype=torch.float32,
            decode=lambda latents: SimpleNamespace(sample=latents.repeat_interleave(8, 2).repeat_interleave(8, 3)),
        )
        self.calls = []

    def __call__(self, prompts, *, generator, latents, height, width, **options):
        assert not self.unet.training and options["output_type"] == "latent" and latents.dtype == torch.float32
        assert len(generator) == len(latents) == len(prompts) and height == width == 8 * latents.shape[-1]
        self.calls.append((prompts, options["num_inference_steps"], torch.is_autocast_enabled("cpu")))
        self.guidance_scale = options["guidance_scale"]
        return SimpleNamespace(images=self.answer * latents)


def test_generating_restores_the_mode_and_uses_no_global_randomness():
    pipeline, before = FakePipeline(), torch.get_rng_state()
    options = SETTINGS | {"resolution": 8, "inference_steps": 1}
    pictures = generate(pipeline, ["a", "b"], **options)
    assert pipeline.unet.training and torch.equal(before, torch.get_rng_state())
    assert len({p.getpixel((0, 0)) for p in pictures}) == 4
    again = generate(pipeline, ["a", "b"], **options)
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in again]


# --- showing


class FakeTracker:
    def __init__(self, name):
        self.name, self.logged = name, []
        if name == "mlflow":  # does not take pictures
            return
        self.log_images = lambda images, step, **options: self.logged.append((images, step, options))


def fake_accelerator(trackers=(), is_main_process=True, autocast=nullcontext):
    return SimpleNamespace(
        distributed_type="NO", is_main_process=is_main_process, autocast=autocast, trackers=list(trackers)
    )


# A test's short names of the flags.
FLAGS = {
    "images_per_prompt": "num_validation_images",
    "inference_steps": "validation_inference_steps",
    "teacher_steps": "validation_teacher_steps",
}


def make(pipelines, teacher, output_dir, *, accelerator=None, **options):
    builders = {label: partial(lambda pipeline: pipeline, pipeline) for label, pipeline in pipelines.items()}
    return make_of(builders, lambda: teacher, output_dir, accelerator=accelerator, **options)


def make_of(builders, teacher, output_dir, *, accelerator=None, **options):
    chosen = {
        "prompts": ["a", "b"], "inference_steps": [4, 1, 4], "teacher_steps": 9, "teacher_guidance_scale": 5.0,
        "batch_size": 16,
    } | SETTINGS | {"resolution": 8} | options  # fmt: skip
    run = SimpleNamespace(
        accelerator=accelerator or fake_accelerator(),
        seed=chosen.pop("seed"),
        output_dir=None if output_dir is None else str(output_dir),
    )
    flags = ValidationFlags(**{flag: chosen.pop(name) for name, flag in FLAGS.items()})
    return Validation(run, flags, builders, teacher, **chosen)


def test_a_bar_counts_all_steps_of_a_validation(tmp_path, monkeypatch):
    """A validation with the teacher's 50 steps takes minutes, in which nothing was to be seen."""

    class Stepping(FakePipeline):
        def __call__(self, prompts, **options):
            for _ in range(options["num_inference_steps"]):
                self.unet(torch.ones(1))
            return super().__call__(prompts, **options)

    bars = []

    class Bar:
        def __init__(self, desc, *, total, disable, **options):
            self.total, self.disable, self.done = total, disable, 0
            bars.append(self)

        def update(self):
            self.done += 1

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731

    monkeypatch.setattr(validation, "progress_bar", Bar)
    monkeypatch.setattr(validation, "labelled_grid", lambda rows, **options: Image.new("RGB", (1, 1)))
    validate = make({"student": Stepping(), "target": Stepping()}, Stepping(), tmp_path)
    validate(1)
    validate(2)
    assert [bar.total for bar in bars] == [2 * (9 + 2 * (4 + 1)), 2 * 2 * (4 + 1)]  # the teacher's row is made once
    assert all(bar.done == bar.total and not bar.disable for bar in bars)


def test_each_pipeline_has_a_row_for_each_number_of_steps(tmp_path, monkeypatch, caplog):
    trackers = [FakeTracker(name) for name in ("tensorboard", "wandb", "mlflow")]
    grids = []

    def grid(rows, **options):
        grids.append((rows, options))
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(validation, "labelled_grid", grid)
    student, target, teacher = FakePipeline(0.5), FakePipeline(0.75), FakePipeline(1.0)
    accelerator = fake_accelerator(trackers, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    validate = make({"student": student, "target": target}, teacher, tmp_path, accelerator=accelerator)
    assert validate(7) == pytest.approx({"distance/student": 0.5, "distance/target": 0.25})
    ((rows, options),) = grids
    own = [f"{who}, {steps}" for who in ("student", "target") for steps in ("4 steps", "1 step")]
    assert [label for label, _ in rows] == ["teacher, 9 steps", *own]
    assert options["columns"] == ["a", "", "b", ""]
    assert student.calls == target.calls == [([p] * 2, steps, True) for steps in (4, 1) for p in "ab"]
    assert teacher.calls == [([p] * 2, 9, True) for p in "ab"]
    assert (teacher.guidance_scale, student.guidance_scale) == (5.0, 3.0)
    reds = [[picture.getpixel((0, 0)) for picture in pictures] for _, pictures in rows]
    assert reds[1] == reds[2] and reds[3] == reds[4] and len(set(reds[0])) == 4  # the same noise in each row
    assert (tmp_path / "validation" / "step-000007.png").is_file()
    tags = [f"validation/{name}" for name in ("student_4_steps", "student_1_step", "target_4_steps", "target_1_step")]
    tensorboard, wandb, _ = trackers
    for tracker in (tensorboard, wandb):
        assert [next(iter(images)) for images, _, _ in tracker.logged] == ["validation/teacher_9_steps", *tags]
        assert {step for _, step, _ in tracker.logged} == {7}
    images, _, options = tensorboard.logged[0]
    assert images["validation/teacher_9_steps"].shape == (4, 8, 8, 3) and options == {"dataformats": "NHWC"}
    assert caplog.text.count("the tracker mlflow does not take pictures") == 1
    assert list(validate.measured.values()) == pytest.approx([0.5, 0.25])

    # Again: the teacher's row is shown once more, but neither generated nor sent again.
    student.answer = 1.0
    assert validate(8)["distance/student"] == pytest.approx(0, abs=1e-6)
    assert len(teacher.calls) == 2 and [label for label, _ in grids[1][0]] == ["teacher, 9 steps", *own]
    assert [next(iter(images)) for images, _, _ in wandb.logged[5:]] == tags


def test_the_distance_needs_no_row_of_one_step_and_can_be_turned_off(tmp_path, monkeypatch):
    grids = []
    monkeypatch.setattr(validation, "labelled_grid", lambda rows, **_: grids.append(rows) or Image.new("RGB", (1, 1)))
    student, teacher = FakePipeline(2.0), FakePipeline(1.0)
    validate = make({"student": student}, teacher, tmp_path, inference_steps=[2], prompts=["a"])
    assert validate(1) == pytest.approx({"distance/student": 1.0})
    assert [steps for _, steps, _ in student.calls] == [2, 1]
    assert [label for label, _ in grids[0]] == ["teacher, 9 steps", "student, 2 steps"]
    validate = make({"student": student}, teacher, tmp_path, teacher_steps=0, prompts=["a"])
    calls = len(teacher.calls)
    assert validate(2) == {} == validate.measured and len(teacher.calls) == calls
    assert [label for label, _ in grids[1]] == ["student, 4 steps", "student, 1 step"]


def test_without_pictures_nothing_is_built_or_generated(tmp_path):
    def never():
        pytest.fail("a pipeline was asked for")

    for options in ({"images_per_prompt": 0}, {"prompts": []}):
        validate = make_of({"student": never}, never, tmp_path, all_loaded=never, **options)
        assert validate(1) == {} == validate.measured
    assert not list(tmp_path.iterdir())


def test_no_more_pictures_are_generated_at_once_than_are_trained_on(tmp_path):
    """With --train_batch_size 1 on a GPU that just suffices, four of them, guided, were eight at once."""
    student, teacher = FakePipeline(0.5), FakePipeline()
    validate = make({"student": student}, teacher, tmp_path, images_per_prompt=3, batch_size=2)
    assert validate(1) == pytest.approx({"distance/student": 0.5})
    assert [len(prompts) for prompts, *_ in teacher.calls] == [2, 2, 2]
    assert sum(len(prompts) for prompts, *_ in student.calls) == 2 * 6


def test_all_ranks_use_the_main_process_s_prompts(tmp_path, monkeypatch):
    """Each rank reads captions from the shards itself; split networks wait for each other in each batch."""
    monkeypatch.setattr(validation, "broadcast_object_list", lambda values: [["from the main process"]])
    student = FakePipeline()
    validate = make({"student": student}, FakePipeline(), tmp_path, teacher_steps=0, inference_steps=[1])
    monkeypatch.setattr(validation, "broadcast_object_list", lambda values: values)
    validate(1)
    assert [prompts for prompts, *_ in student.calls] == [["from the main process"] * 2]


def test_a_pipeline_generates_inside_its_context(tmp_path):
    inside, seen = [], []

    @contextmanager
    def off():
        inside.append("off")
        yield
        inside.clear()

    class Watched(FakePipeline):
        def __call__(self, *args, **options):
            seen.append((self.answer, *inside))
            return super().__call__(*args, **options)

    make(
        {"student": Watched(2.0)}, Watched(1.0), tmp_path, prompts=["a"], inference_steps=[1], contexts={"teacher": off}
    )(1)
    assert seen == [(1.0, "off"), (2.0,)]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_grid_of_the_toy_teacher_is_on_disk(pipelines, tmp_path, family):
    """The untrained student is the teacher: one step of its own, unguided, is what the distance compares."""
    pipeline = pipelines[family]
    teacher = pipeline.__class__(**pipeline.components)
    teacher.set_progress_bar_config(disable=True)
    teacher.scheduler = build_teacher_sampler(pipeline.scheduler.config)
    validate = make(
        {"student": pipeline}, teacher, tmp_path, prompts=PROMPTS, images_per_prompt=1, inference_steps=[1, 2],
        resolution=64, guidance_scale=1.0, teacher_steps=10, teacher_guidance_scale=1.0,
    )  # fmt: skip
    distances = validate(12)
    with Image.open(tmp_path / "validation" / "step-000012.png") as grid:
        assert grid.height > 3 * 64 and grid.width > 2 * 64

    # The same by the training's own solver, from the same noise.
    schedule = NoiseSchedule.from_config(pipeline.scheduler.config)
    solver = DDIMSolver(schedule, 10)
    start = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3 + k)) for k in range(2)])
    module = {"sd": sd, "sdxl": sdxl}[family]
    parts = SimpleNamespace(**pipeline.components, force_zeros_for_empty_prompt=True)
    conditioning = module.encode_captions(parts, PROMPTS)
    if family == "sdxl":
        conditioning["added_cond_kwargs"]["time_ids"] = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)

    def predict(x, timestep):
        timesteps = torch.full((2,), int(timestep))
        with torch.no_grad():
            output = unet_output(pipeline.unet, x, timesteps, conditioning)
        return schedule.predict_x0(output, x, timesteps), schedule.predict_epsilon(output, x, timesteps)

    x = start
    for index in reversed(range(10)):
        x = solver.step(*predict(x, solver.timesteps[index]), torch.tensor([index, index]))
    expected = relative_distance(predict(start, 999)[0], x)
    assert distances["distance/student"] == pytest.approx(expected, rel=1e-3)


def test_a_dry_run_and_the_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for main, output_dir, calls in ((True, None, 2), (False, "out", 0)):
        tracker, student, teacher = FakeTracker("wandb"), FakePipeline(), FakePipeline()
        accelerator = fake_accelerator([tracker], main)
        make({"student": student}, teacher, output_dir, accelerator=accelerator, prompts=["a"], inference_steps=[1, 2])(
            1
        )
        assert len(student.calls) == calls and [steps for _, steps, _ in teacher.calls] == [1] * (calls // 2)
        assert not tracker.logged and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "student, teacher, words",
    [
        (float("nan"), 1.0, ["student, 2 steps: 1 of 1 pictures", "student: the distance to the teacher is nan"]),
        (float("inf"), 1.0, ["student, 2 steps: 1 of 1 pictures", "student: the distance to the teacher is inf"]),
        (1.0, float("nan"), ["teacher, {} step", "student: the distance to the teacher is nan"]),
        (1.0, 0.0, ["student: the distance to the teacher is inf"]),
    ],
)
def test_what_is_not_finite_fails_a_dry_run_and_is_said_in_a_run(student, teacher, words, tmp_path, caplog):
    """A dry run said that all worked, and a run logged a distance of nan among its information."""

    def validate(output_dir):
        pipelines = {"student": FakePipeline(student), "target": FakePipeline(0.5)}
        return make(pipelines, FakePipeline(teacher), output_dir, prompts=["a"], images_per_prompt=1,
                    inference_steps=[2])  # fmt: skip

    with pytest.raises(
        DivergenceError, match="^validation at step 7 is not finite: .*--mixed_precision bf16"
    ) as caught:
        validate(None)(7)
    assert all(word.format(1) in str(caught.value) for word in words) and not caplog.records
    distances = validate(tmp_path)(7)
    assert not math.isfinite(distances["distance/student"])
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert error.startswith("validation at step 7 is not finite: ") and error.endswith("The run continues.")
    assert all(word.format(9) in error for word in words)
    assert (tmp_path / "validation" / "step-000007.png").is_file()


def test_pictures_alone_that_are_not_finite_fail_a_dry_run():
    """A VAE that overflows in half precision: the latents, and so the distance, are finite."""
    student = FakePipeline(0.5)
    student.vae.decode = lambda latents: SimpleNamespace(sample=torch.full((len(latents), 3, 8, 8), torch.nan))
    for teacher_steps in (0, 9):
        validate = make({"student": student}, FakePipeline(), None, teacher_steps=teacher_steps, inference_steps=[1])
        with pytest.raises(DivergenceError, match="student, 1 step: 4 of 4 pictures .* the VAE, in float32"):
            validate(1)
