"""`python -m lcm_distill.sample`: the pictures, their names and settings, and messages for mistakes."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from command_flags import unread_flags
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from PIL import Image

from lcm_distill import sample
from lcm_distill.errors import UsageError
from lcm_distill.models.teacher import Teacher
from lcm_distill.sample import PictureFolder, parse_lora, plan_rows, row_labels
from lcm_distill.sampling.finished import Student, WeightedLora

PROMPTS = ["a small red circle on a black background", "a large blue square on a white background"]
SEEDS = [3, 7]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def out(family, teachers, finished, tmp_path_factory):
    """The output for a teacher, a full LCM and an LCM-LoRA, all with a style LoRA, for two prompts and two seeds."""
    folder = tmp_path_factory.mktemp("drawn")
    sample.main(
        [
            "--pretrained_teacher_model",
            teachers[family],
            "--student",
            finished("full", family),
            finished("lora", family),
        ]
        + ["--lora", f"{finished('style', family)}=0.5", "--lcm_lora_scale", "0.9", "--prompts", *PROMPTS]
        + ["--negative_prompt", "blue", "--seeds", *map(str, SEEDS), "--steps", "1", "2", "--teacher_steps", "3"]
        + ["--guidance_scale", "4", "--lora_guidance_scale", "1", "1.5", "--output_dir", str(folder)]
    )
    return folder


def pixels(picture):
    return np.asarray(picture, int)


def listed(out, **chosen):
    found = [one for one in json.loads((out / "samples.json").read_text()) if chosen.items() <= one.items()]
    assert found
    return found


@pytest.mark.parametrize("kind", ["teacher", "full", "lora"])
def test_pictures_are_those_that_the_pipelines_generate_one_by_one(kind, out, family, teachers, finished):
    pipeline = DiffusionPipeline.from_pretrained(teachers[family], torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    adapters, weights = ["style"], [0.5]
    if kind == "teacher":
        chosen = listed(out, model="teacher", steps=3)
        pipeline.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=False, clip_sample=False
        )
    else:
        folder = finished(kind, family)
        chosen = listed(out, model=Path(folder).name, steps=2)
        pipeline.scheduler = LCMScheduler.from_pretrained(folder)
        if kind == "full":
            pipeline.unet = UNet2DConditionModel.from_pretrained(folder)
        else:
            pipeline.load_lora_weights(folder, adapter_name="lcm")
            adapters, weights = ["lcm", "style"], [0.9, 0.5]
    pipeline.load_lora_weights(finished("style", family), adapter_name="style")
    pipeline.set_adapters(adapters, weights)
    assert len(chosen) == (8 if kind == "lora" else 4)
    for one in chosen[:: len(chosen) - 1]:
        expected = pipeline(
            one["prompt"],
            negative_prompt=one["negative_prompt"],
            num_inference_steps=one["steps"],
            guidance_scale=one["guidance_scale"],
            generator=torch.Generator().manual_seed(one["seed"]),
        ).images[0]
        generated = pixels(Image.open(out / one["file"]))
        assert np.abs(generated - pixels(expected)).max() <= 1, one  # another batch size may change the last bit


def test_each_picture_has_its_settings_in_name_list_and_metadata(out, family, teachers, finished):
    everything = listed(out)
    files = sorted(f"pictures/{path.name}" for path in (out / "pictures").iterdir())
    assert sorted(one["file"] for one in everything) == files and len(files) == 4 * (1 + 2 + 4)
    negative = {(one["model"], one["guidance_scale"]): one["negative_prompt"] for one in everything}
    full, lora = f"full_{family}", f"lora_{family}"
    assert negative == {("teacher", 4): "blue", (full, 4): None, (lora, 1): None, (lora, 1.5): "blue"}
    style = {finished("style", family): 0.5}
    assert all(one["loras"] == style and one["resolution"] == 64 for one in everything)
    assert [one.get("lcm_lora_scale") for one in everything] == [None] * 12 + [0.9] * 16
    (one,) = listed(out, model="teacher", prompt=PROMPTS[1], seed=7)
    assert one["source"] == teachers[family] and one["sampler"] == "DDIM" and one["steps"] == 3
    assert all(word in one["file"] for word in ("teacher", "3-steps", "guidance-4", "large-blue-square", "seed-7"))
    text = Image.open(out / one["file"]).text
    assert text["prompt"] == PROMPTS[1] and text["negative_prompt"] == "blue" and text["model"] == "teacher"
    assert (int(text["seed"]), int(text["steps"]), float(text["guidance_scale"])) == (7, 3, 4)
    assert json.loads(text["loras"]) == style and set(text) == set(one) - {"file"}


def test_the_grid_has_a_row_for_each_model_and_setting(out, family):
    """Its cells are the pictures, in the order of samples.json."""
    grid, everything = pixels(Image.open(out / "grid.png").convert("RGB")), listed(out)
    side, gap, margin = 64, 4, 6
    left, top = grid.shape[1] - 4 * (side + gap) - margin, grid.shape[0] - 7 * (side + gap) - margin
    assert left > 50 and top > 20
    for number, one in enumerate(everything):
        row, column = divmod(number, 4)
        x, y = left + column * (side + gap), top + row * (side + gap)
        assert np.array_equal(grid[y : y + side, x : x + side], pixels(Image.open(out / one["file"]))), one["file"]


def run(teachers, folder, *more, prompts=PROMPTS[:1], family="sd"):
    sample.main(
        ["--pretrained_teacher_model", teachers[family], "--prompts", *prompts, "--output_dir", str(folder)]
        + [str(word) for word in more]
    )
    return json.loads((Path(folder) / "samples.json").read_text())


def test_the_batch_size_does_not_matter(teachers, finished, tmp_path):
    generated = []
    for batch_size in (1, 3):
        folder = tmp_path / str(batch_size)
        more = ("--student", finished("lora", "sd"), "--steps", 4, "--teacher_steps", 2, "--num_images", 3, "--seed", 5)
        found = run(teachers, folder, *more, "--batch_size", batch_size)
        assert [one["seed"] for one in found] == [5, 6, 7] * 2
        generated.append(np.stack([pixels(Image.open(folder / one["file"])) for one in found]))
    assert np.abs(generated[0] - generated[1]).max() <= 1
    assert len({picture.tobytes() for picture in generated[0]}) == 6


def test_img2img_starts_from_the_picture(teachers, finished, tmp_path):
    Image.new("RGB", (96, 160), (0, 0, 255)).save(tmp_path / "blue.jpg")
    more = (
        "--student",
        finished("full", "sd"),
        "--steps",
        2,
        "--teacher_steps",
        2,
        "--init_image",
        tmp_path / "blue.jpg",
    )
    found = run(teachers, tmp_path / "out", *more, "--strength", 0.1, "--resolution", 32, "--guidance_scale", 1)
    assert [(one["model"], one["strength"], one["resolution"]) for one in found] == [
        ("teacher", 0.1, 32),
        ("full_sd", 0.1, 32),
    ]
    assert found[0]["init_image"] == str(tmp_path / "blue.jpg")
    picture = Image.open(tmp_path / "out" / found[0]["file"])
    red, green, blue = pixels(picture).mean((0, 1))
    assert picture.size == (32, 32) and blue > 150 and red < 60 and green < 60
    with pytest.raises(UsageError, match=r"--steps 4: .* at most 2 steps at --strength 0.1"):
        run(teachers, tmp_path / "out", *more, "--strength", 0.1, "--steps", 4)  # the student's grid has 20


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_pictures_need_not_be_square(family, teachers, finished, tmp_path):
    """And they are those of the pipelines, which put the size into SDXL's conditioning."""
    more = ("--student", finished("full", family), "--steps", 1, "--teacher_steps", 0, "--guidance_scale", 4)
    (one,) = run(teachers, tmp_path, *more, "--width", 96, "--height", 40, "--seed", 5, family=family)
    assert (one["width"], one["height"]) == (96, 40) and "resolution" not in one
    pipeline = DiffusionPipeline.from_pretrained(teachers[family], torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet = UNet2DConditionModel.from_pretrained(finished("full", family))
    pipeline.scheduler = LCMScheduler.from_pretrained(finished("full", family))
    generator = torch.Generator().manual_seed(5)
    options = {"width": 96, "height": 40, "num_inference_steps": 1, "guidance_scale": 4, "generator": generator}
    expected = pipeline(PROMPTS[0], **options).images[0]
    generated = Image.open(tmp_path / one["file"])
    assert generated.size == (96, 40) and np.abs(pixels(generated) - pixels(expected)).max() <= 1
    grid = pixels(Image.open(tmp_path / "grid.png"))[-50:-10, -106:-10]
    assert np.array_equal(grid, pixels(generated))


def test_one_side_may_be_given_and_a_picture_is_cropped_to_both(teachers, tmp_path):
    canvas = Image.new("RGB", (160, 160), (255, 0, 0))
    canvas.paste((0, 0, 255), (0, 40, 160, 120))  # what a crop of half the height keeps
    canvas.save(tmp_path / "picture.png")
    more = ("--teacher_steps", 2, "--guidance_scale", 1, "--height", 32)
    (one,) = run(teachers, tmp_path / "out", *more, "--init_image", tmp_path / "picture.png", "--strength", 0.1)
    assert (one["width"], one["height"]) == (64, 32)  # the teacher's own resolution is 64
    red, _, blue = pixels(Image.open(tmp_path / "out" / one["file"])).mean((0, 1))
    assert blue > 150 and red < 60
    (one,) = run(teachers, tmp_path / "out", *more, "--resolution", 48)
    assert Image.open(tmp_path / "out" / one["file"]).size == (48, 32)


def test_a_prompt_file_and_another_sampler(teachers, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    more = ("--teacher_steps", 2, "--teacher_sampler", "DPM-Solver++")
    found = run(teachers, tmp_path / "out", *more, prompts=[str(tmp_path / "prompts.txt")])
    assert [(one["prompt"], one["sampler"]) for one in found] == [(prompt, "DPM-Solver++") for prompt in PROMPTS]
    ddim = run(teachers, tmp_path / "ddim", "--teacher_steps", 2, prompts=PROMPTS)
    assert (tmp_path / "out" / found[0]["file"]).read_bytes() != (tmp_path / "ddim" / ddim[0]["file"]).read_bytes()


# --- the plan


def test_the_sweep_is_that_of_the_announcement():
    needed = ["--pretrained_teacher_model", "x", "--student", "y", "--prompts", "z"]

    def steps(*more):
        args = sample.parse_args([*needed, *more])
        return args.steps, args.teacher_steps

    assert steps("--sweep") == ([1, 2, 3, 4, 5, 6, 7, 8], [1, 4, 8, 15, 20, 25, 30, 50])
    assert steps() == ([1, 2, 4, 8], [25])
    assert steps("--sweep", "--teacher_steps", "0") == ([1, 2, 3, 4, 5, 6, 7, 8], [0])


def test_rows_and_their_labels(finished):
    full, lora = Student(finished("full", "sd"), "full"), Student(finished("lora", "sd"), "lora")
    rows = plan_rows(
        [full, lora],
        steps=[1, 4, 1],
        teacher_steps=[50, 0],
        guidance_scales=[8, 4, 8],
        lora_guidance_scales=[1.0],
        negative_prompt="ugly",
    )
    assert row_labels(rows, "DDIM") == [
        "teacher, DDIM, 50 steps, guidance 8",
        "teacher, DDIM, 50 steps, guidance 4",
        "full_sd, 1 step, guidance 8",
        "full_sd, 4 steps, guidance 8",
        "full_sd, 1 step, guidance 4",
        "full_sd, 4 steps, guidance 4",
        "lora_sd, 1 step",
        "lora_sd, 4 steps",
    ]
    assert [row.negative_prompt for row in rows] == ["ugly"] * 2 + [None] * 6


def test_models_that_ignore_a_negative_prompt_are_named(teachers, finished, tmp_path, capsys):
    more = ("--student", finished("full", "sd"), finished("lora", "sd"), "--steps", 1, "--teacher_steps", 1)
    run(teachers, tmp_path, *more, "--negative_prompt", "blue", "--lora_guidance_scale", "1", "1.5")
    printed = capsys.readouterr().out
    assert re.findall(r"(\S+) ignores --negative_prompt", printed) == ["full_sd"]
    assert len(re.findall(r"^.*, 1 step.*: 1 in \d+\.\d s$", printed, re.M)) == 4
    assert f"{tmp_path / 'grid.png'}, and 4 pictures in {tmp_path / 'pictures'}" in printed


@pytest.mark.parametrize(
    "text, expected",
    [("style", ("style", 1)), ("style=0.8", ("style", 0.8)), ("a/b=-1e-1", ("a/b", -0.1)), ("a=b", ("a=b", 1)),
     ("a=b=2", ("a=b", 2)), ("rank=4=x.safetensors", ("rank=4=x.safetensors", 1)), ("=2", ("=2", 1))],
)  # fmt: skip
def test_loras_have_weights(text, expected):
    assert parse_lora(text, "cache") == WeightedLora(*expected, "--lora", "cache")


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf"])
def test_a_weight_is_finite(weight):
    with pytest.raises(UsageError, match="--lora a=.*finite"):
        parse_lora(f"a={weight}")


def test_file_names_are_unique_and_valid_on_every_file_system(tmp_path):
    folder, picture = PictureFolder(tmp_path), Image.new("RGB", (8, 8))
    base = {"model": "m", "steps": 1, "guidance_scale": 1.0, "seed": 0, "prompt": "x"}
    settings = [
        base,
        base,
        base | {"model": "M"},  # the same file where names ignore case
        base | {"prompt": '../../etc: a \\ "cat"? <*> | \n'},
        base | {"prompt": "Ein Fuchs im Schnee, 狐狸 🦊 " * 50},
        base | {"prompt": ""},
        base | {"model": "a b", "steps": 4, "guidance_scale": 7.5},
        base | {"model": "a-b", "steps": 4, "guidance_scale": 7.5},
    ]
    for one in settings:
        folder.add(picture, 1, one)
    files = [path.name for path in (tmp_path / "pictures").iterdir()]
    assert len({name.lower() for name in files}) == len(files) == len(settings)
    assert all(re.fullmatch(r"[\w.-]+", name) and len(name.encode()) < 250 for name in files)
    assert [one["prompt"] for one in folder.listed] == [one["prompt"] for one in settings]
    for one in folder.listed:
        assert Image.open(tmp_path / one["file"]).text["prompt"] == one["prompt"]


# --- mistakes


@pytest.mark.parametrize(
    "more, words",
    [(["--steps", "0"], "argument --steps"), (["--strength", "0.5"], "argument --strength"),
     (["--teacher_steps", "0"], "argument --teacher_steps"), (["--seeds", "-1"], "argument --seeds"),
     (["--guidance_scale", "x"], "argument --guidance_scale"), (["--teacher_sampler", "Euler"], "--teacher_sampler"),
     (["--dtype", "fp8"], "--dtype"), (["--width", "0"], "argument --width"),
     (["--width", "64", "--height", "32", "--resolution", "64"], "argument --resolution")],
)  # fmt: skip
def test_mistakes_in_flags_are_reported_in_one_line(more, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--pretrained_teacher_model", "x", "--prompts", "y", *more])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and len(error.splitlines()) == 2
    assert error.startswith("python -m lcm_distill.sample: error: ")


@pytest.mark.parametrize(
    "more, words",
    [(["--prompts", "none.txt"], "--prompts: none.txt cannot be read"), (["--student", "nowhere"], "--student nowhere"),
     (["--init_image", "none.png"], "--init_image none.png cannot be read"), (["--device", "gpu"], "--device gpu"),
     (["--init_image", __file__], "--init_image .*holds no picture"),
     (["--dtype", "fp16", "--device", "cpu"], "--dtype fp16 needs a GPU"),
     (["--pretrained_teacher_model", "./none"], "--pretrained_teacher_model ./none"),
     (["--resolution", "63"], "--resolution 63"), (["--width", "100"], "--width 100 is not .* 96 and 104"),
     (["--height", "4", "--width", "64"], "--height 4 is not .* 8 and 8"),
     (["--teacher_steps", "1001"], "--teacher_steps 1001"),
     (["--output_dir", __file__], "--output_dir .* cannot be written"), (["--lora", "./none=2"], "--lora ./none")],
)  # fmt: skip
def test_mistakes_are_reported_with_their_flag_before_anything_is_generated(
    more, words, teachers, tmp_path, monkeypatch
):
    monkeypatch.setattr(sample, "generate_latents", lambda *_, **__: pytest.fail("generated"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        sample.main(["--pretrained_teacher_model", teachers["sd"], "--prompts", "y", *more])


@pytest.mark.parametrize("kind, flag", [("full", "--student"), ("lora", "--student"), ("style", "--lora")])
def test_a_student_that_does_not_fit_is_refused_in_one_line_before_the_teacher_generates(
    kind, flag, teachers, finished, tmp_path, monkeypatch, capfd, caplog
):
    """The teacher's 25 steps came first, and then 40 lines of tensors that have other shapes."""
    monkeypatch.setattr(sample, "generate_latents", lambda *_, **__: pytest.fail("generated"))
    with pytest.raises(UsageError) as refused:
        run(teachers, tmp_path, flag, finished(kind, "sdxl"), family="sd")
    message = str(refused.value)
    assert message.startswith(f"{flag} {finished(kind, 'sdxl')}") and "\n" not in message
    assert ("differ in" if kind == "full" else "size mismatch for ") in message
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_a_gpu_without_memory_is_reported(teachers, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(sample, "generate_latents", full)
    with pytest.raises(UsageError, match="Tried to allocate 2.00 GiB.*--batch_size"):
        run(teachers, tmp_path)


def test_no_flag_is_declared_and_unread(monkeypatch):
    parsed = sample.parse_args(["--pretrained_teacher_model", "x", "--prompts", "y"])
    assert unread_flags(sample, parsed) == set()
    assert unread_flags(sample, argparse.Namespace(**vars(parsed), another=1)) == {"another"}
    monkeypatch.setattr(Teacher, "from_flags", lambda flags: Teacher(flags.pretrained_teacher_model))
    assert unread_flags(sample, parsed) >= {"variant", "revision"}


def test_help_begins_with_commands_to_run(capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and "python -m lcm_distill.sample --pretrained_teacher_model" in printed
    assert "--sweep" in printed and "(default: 1 2 4 8)" in printed
    assert "default: [" not in printed and "None" not in printed
