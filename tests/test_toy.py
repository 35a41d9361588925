"""The toy world, its shards and its scorer, on which the other toys and the end-to-end tests depend."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from lcm_distill.errors import UsageError
from lcm_distill.evaluate import EvaluatedRow
from lcm_distill.export.weights import save_pipeline
from lcm_distill.run.journal import Journal
from toy import compare, demo, score
from toy import make_shards as shards_module
from toy.make_shards import make_shards
from toy.recipes import RECIPES
from toy.world import ALL_SCENES, BACKGROUNDS, COLOURS, Scene, draw


@pytest.fixture(scope="module")
def scorer():
    return score.Scorer.load()


# --------------------------------------------------------------------------------------------- the world


def test_captions_are_many_and_distinct():
    captions = {scene.caption for scene in ALL_SCENES}
    assert len(captions) == len(ALL_SCENES) >= 300


def test_a_caption_is_parsed_into_its_scene():
    for scene in ALL_SCENES:
        assert Scene.from_caption(scene.caption) == scene


@pytest.mark.parametrize(
    "text", ["", "a cat", "a small red circle on a mauve background", "a small red  circle on a black background"]
)
def test_other_text_is_no_caption(text):
    with pytest.raises(ValueError, match="not a caption"):
        Scene.from_caption(text)


def _mask(picture: Image.Image, background: str) -> np.ndarray:
    return np.abs(np.asarray(picture, dtype=int) - BACKGROUNDS[background]).sum(-1) > 60


@pytest.mark.parametrize("width, height", [(64, 64), (48, 72), (120, 80)])
def test_sizes_are_fractions_of_the_shorter_side(width, height):
    """The extent of a shape over the shorter side distinguishes small from large at any picture size."""
    rng = np.random.default_rng(0)
    extents = {"small": [], "large": []}
    for scene in ALL_SCENES[::3]:
        mask = _mask(draw(scene, rng, width, height), scene.background)
        extent = max(np.ptp(np.flatnonzero(mask.any(axis))) + 1 for axis in (0, 1))
        extents[scene.size].append(extent / min(width, height))
    assert 0.15 < min(extents["small"]) and max(extents["small"]) < 0.40
    assert 0.38 < min(extents["large"]) and max(extents["large"]) < 0.70
    assert np.mean(extents["large"]) > 1.6 * np.mean(extents["small"])


def test_colour_and_background_are_those_of_the_caption():
    rng = np.random.default_rng(0)
    for scene in ALL_SCENES[::7]:
        pixels = np.asarray(draw(scene, rng)).reshape(-1, 3).tolist()
        assert pixels[0] == list(BACKGROUNDS[scene.background])
        assert list(COLOURS[scene.colour]) in pixels


def test_shapes_are_distinct():
    """With the same position, rotation and size, two shapes differ in at least a tenth of their pixels."""
    drawn = {
        scene.shape: _mask(draw(scene, np.random.default_rng(0)), "black")
        for scene in ALL_SCENES
        if (scene.size, scene.colour, scene.background) == ("large", "red", "black")
    }
    assert len(drawn) == 5
    for (a, mask_a), (b, mask_b) in itertools.combinations(drawn.items(), 2):
        assert (mask_a ^ mask_b).sum() > 0.1 * (mask_a | mask_b).sum(), (a, b)


# -------------------------------------------------------------------------------------------- the shards


def test_shards_are_the_same_bytes_each_time_and_differ_by_seed_and_shard(tmp_path):
    options = {"shards": 2, "samples_per_shard": 5, "varied_sizes": True}
    first = [path.read_bytes() for path in make_shards(tmp_path / "a", seed=3, **options)]
    again = [path.read_bytes() for path in make_shards(tmp_path / "b", seed=3, **options)]
    over = [path.read_bytes() for path in make_shards(tmp_path / "a", seed=3, **options)]
    other = [path.read_bytes() for path in make_shards(tmp_path / "c", seed=4, **options)]
    assert first == again == over
    assert len({*first, *other}) == 4
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["toy-000000.tar", "toy-000001.tar"]


@pytest.mark.parametrize("picture_format", ["jpg", "png"])
def test_shards_are_read_by_webdataset(tmp_path, picture_format):
    paths = make_shards(tmp_path, shards=2, samples_per_shard=6, seed=0, resolution=32, picture_format=picture_format)
    samples = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [f"{s:06d}-{i:06d}" for s in range(2) for i in range(6)]
    for sample in samples:
        scene = Scene.from_caption(sample["txt"].decode())
        picture = Image.open(io.BytesIO(sample[picture_format]))
        assert picture.format == {"jpg": "JPEG", "png": "PNG"}[picture_format] and picture.mode == "RGB"
        assert picture.size == (32, 32) and json.loads(sample["json"]) == {"width": 32, "height": 32}
        shard, index = map(int, sample["__key__"].split("-"))
        original, expected = shards_module.make_picture(0, shard, index, 32)
        assert scene == expected
        difference = np.abs(np.asarray(picture, dtype=float) - np.asarray(original)).mean()
        assert difference == 0 if picture_format == "png" else difference < 5


def test_varied_sizes_are_in_range_and_in_the_json(tmp_path):
    (path,) = make_shards(tmp_path, shards=1, samples_per_shard=60, seed=1, resolution=32, varied_sizes=True)
    sizes = []
    for sample in webdataset.WebDataset(str(path), shardshuffle=False):
        meta = json.loads(sample["json"])
        assert Image.open(io.BytesIO(sample["jpg"])).size == (meta["width"], meta["height"])
        sizes.append((meta["width"], meta["height"]))
    short, long = np.min(sizes, axis=1), np.max(sizes, axis=1)
    assert short.min() >= 16 and short.max() <= 64 and short.min() < 24 and short.max() > 48
    assert (long / short).max() <= 1.5 and (long / short).max() > 1.3
    assert any(w > h for w, h in sizes) and any(w < h for w, h in sizes)


@pytest.mark.parametrize(
    "flag, value",
    [("--shards", 0), ("--samples_per_shard", 0), ("--seed", -1), ("--resolution", 15), ("--resolution", 2000)],
)
def test_a_flag_out_of_range_is_named(tmp_path, capsys, flag, value):
    with pytest.raises(SystemExit):
        shards_module.main([str(tmp_path / "out"), flag, str(value)])
    assert f"{flag} must lie in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_shards_of_a_longer_run_are_not_mixed_in(tmp_path):
    make_shards(tmp_path, shards=3, samples_per_shard=1)
    with pytest.raises(UsageError, match="1 toy shards beyond --shards 2"):
        make_shards(tmp_path, shards=2, samples_per_shard=1)


def test_main_prints_what_it_wrote(tmp_path, capsys):
    shards_module.main(
        [str(tmp_path), "--shards", "2", "--samples_per_shard", "3", "--resolution", "16", "--format", "png"]
    )
    printed = capsys.readouterr().out
    assert "3 pictures to each of 2 shards" in printed and str(tmp_path / "toy-000001.tar") in printed


# ------------------------------------------------------------------------------------- Fréchet distance


def _with_moments(mean: torch.Tensor, covariance: torch.Tensor, n: int = 400, seed: int = 0) -> torch.Tensor:
    """`n` float64 rows with exactly this sample mean and covariance."""
    rows = torch.randn(n, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rows -= rows.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(rows.T)), rows.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ white).T + mean


def _random_covariance(d: int, seed: int) -> torch.Tensor:
    a = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.T / d + 0.05 * torch.eye(d, dtype=torch.float64)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))  # fewer rows than dimensions: singular
    assert score.frechet_distance(rows, rows) == pytest.approx(0, abs=1e-5)
    assert score.frechet_distance(rows, rows.flip(0)) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_of_a_shift_is_its_square():
    rows = torch.randn(300, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shift = torch.arange(8.0, dtype=torch.float64)
    assert score.frechet_distance(rows, rows + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)


def test_frechet_distance_of_diagonal_covariances():
    """Σ (√a − √b)² + ‖μ‖² where both covariances are diagonal."""
    a = torch.tensor([0.5, 1.0, 4.0, 9.0], dtype=torch.float64)
    b = torch.tensor([2.0, 1.0, 0.25, 1e-6], dtype=torch.float64)
    mean = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
    got = score.frechet_distance(_with_moments(torch.zeros_like(mean), a.diag()), _with_moments(mean, b.diag(), seed=1))
    assert got == pytest.approx(((a.sqrt() - b.sqrt()).square().sum() + mean.square().sum()).item(), rel=1e-7)


def test_frechet_distance_agrees_with_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    a, b, mean = _random_covariance(16, 0), _random_covariance(16, 1), torch.linspace(-1, 1, 16, dtype=torch.float64)
    root = linalg.sqrtm((a @ b).numpy()).real
    wanted = mean.square().sum().item() + np.trace(a.numpy() + b.numpy() - 2 * root)
    x, y = _with_moments(torch.zeros_like(mean), a), _with_moments(mean, b, seed=1)
    assert score.frechet_distance(x, y) == pytest.approx(wanted, rel=1e-7)
    assert score.frechet_distance(y, x) == pytest.approx(wanted, rel=1e-7)


@pytest.mark.parametrize("a, b", [((5, 3), (5, 4)), ((5,), (5,)), ((1, 3), (5, 3))])
def test_frechet_distance_refuses_other_shapes(a, b):
    with pytest.raises(ValueError, match="features must be|two or more"):
        score.frechet_distance(torch.zeros(a), torch.zeros(b))


# -------------------------------------------------------------------------------------------- the scorer


def test_scorer_is_small(scorer):
    assert sum(p.numel() for p in scorer.parameters()) < 200_000
    assert score.WEIGHTS.stat().st_size < 2**20


def test_scorer_reads_held_out_pictures(scorer):
    pictures, captions = score.real_pictures(500, seed=10)
    assert score.caption_accuracy(pictures, captions) >= 0.97
    spoilt = score.spoil(pictures.float() / 255, torch.Generator().manual_seed(0)).mul(255).byte()
    assert score.caption_accuracy(spoilt, captions, scorer) >= 0.95


def test_one_wrong_attribute_counts_as_wrong(scorer):
    wanted = Scene("circle", "small", "red", "black")
    wrong = [
        Scene("square", "small", "red", "black"),
        Scene("circle", "large", "red", "black"),
        Scene("circle", "small", "blue", "black"),
        Scene("circle", "small", "red", "grey"),
    ]
    pictures, captions = score.real_pictures(5, 0, [wanted.caption, *(scene.caption for scene in wrong)])
    assert scorer.read(pictures) == [wanted, *wrong]
    assert score.caption_accuracy(pictures, captions) == 1
    assert score.caption_accuracy(pictures, [wanted.caption] * 5) == 0.2


def _pictures_of_nothing(n: int, captions: list[str]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    backgrounds = torch.tensor([BACKGROUNDS[Scene.from_caption(c).background] for c in captions], dtype=torch.uint8)
    colours = torch.tensor([COLOURS[Scene.from_caption(c).colour] for c in captions], dtype=torch.uint8)
    plain = backgrounds[:, :, None, None].expand(n, 3, 64, 64)
    grain = torch.randn(n, 3, 64, 64, generator=generator)
    speckle = (torch.rand(n, 1, 64, 64, generator=generator) < 0.2).expand(n, 3, 64, 64)
    return {
        "plain": plain,
        "plain, of the shape's colour": colours[:, :, None, None].expand(n, 3, 64, 64),
        "grain on the background": (plain + 12 * grain).clamp(0, 255).byte(),
        "uniform noise": torch.randint(0, 256, (n, 3, 64, 64), generator=generator, dtype=torch.uint8),
        "Gaussian noise": (128 + 60 * grain).clamp(0, 255).byte(),
        "specks of the right colour": torch.where(speckle, colours[:, :, None, None], plain),
    }


def test_pictures_of_nothing_rarely_score(scorer):
    """Not even if background or colour match the caption, where a guess would be right once in 80."""
    n = 400
    _, captions = score.real_pictures(n, seed=11)
    for name, pictures in _pictures_of_nothing(n, captions).items():
        assert score.caption_accuracy(pictures, captions, scorer) < 0.02, name


def test_frechet_distance_ranks_real_spoilt_and_no_pictures(scorer):
    a, b = (score.real_pictures(400, seed)[0] for seed in (20, 21))
    spoilt = score.spoil(a.float() / 255, torch.Generator().manual_seed(0)).mul(255).byte()
    noise = torch.randint(0, 256, a.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    real, *others = (score.frechet_distance(scorer.features(p), scorer.features(b)) for p in (a, spoilt, noise))
    assert real < others[0] < others[1]
    assert others[1] > 20 * real


def test_pictures_may_be_pil_of_any_size(scorer):
    scenes = list(ALL_SCENES[::40])
    rng = np.random.default_rng(0)
    sides = [64, 128, 256, 96, 64, 512, 80, 72]
    pictures = [draw(scene, rng, side, side) for scene, side in zip(scenes, sides, strict=True)]
    assert scorer.read(pictures) == scenes
    assert scorer.features(pictures).shape == (8, score.FEATURES)
    doubled = torch.from_numpy(np.array(pictures[1])).permute(2, 0, 1)[None]
    torch.testing.assert_close(scorer.features(doubled), scorer.features(pictures[1:2]))


def test_pictures_of_another_kind_are_refused(scorer):
    with pytest.raises(ValueError, match="must be uint8"):
        scorer.read(torch.zeros(2, 3, 64, 64))
    with pytest.raises(ValueError, match="no pictures"):
        scorer.read([])
    with pytest.raises(ValueError, match="2 pictures but 1 captions"):
        score.caption_accuracy(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), [ALL_SCENES[0].caption])


def test_real_pictures_depend_on_their_seed_and_are_in_no_shard(tmp_path):
    """A picture depends on (seed, i) alone, and no shard of the same seed holds it."""
    pictures, captions = score.real_pictures(6, seed=0)
    again, _ = score.real_pictures(3, seed=0)
    other, _ = score.real_pictures(6, seed=1)
    assert torch.equal(pictures[:3], again) and not torch.equal(pictures, other)
    in_shards = [np.asarray(shards_module.make_picture(0, s, i)[0]).tobytes() for s in range(6) for i in range(6)]
    for picture in pictures:
        assert picture.permute(1, 2, 0).contiguous().numpy().tobytes() not in in_shards
    assert score.real_pictures(3, 0, captions[:2])[1] == [captions[0], captions[1], captions[0]]


def test_training_is_repeatable_and_depends_on_the_seed():
    options = {"steps": 6, "batch_size": 16, "pool": 64, "log_every": 0}
    once, again, other = score.train(seed=0, **options), score.train(seed=0, **options), score.train(seed=1, **options)
    for name, value in once.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(once.heads.weight, other.heads.weight)


def test_a_saved_scorer_loads_unchanged(scorer, tmp_path):
    scorer.save(tmp_path / "scorer.safetensors")
    for name, value in score.Scorer.load(tmp_path / "scorer.safetensors").state_dict().items():
        assert torch.equal(value, scorer.state_dict()[name]), name  # float16 already: nothing is lost
    assert [path.name for path in tmp_path.iterdir()] == ["scorer.safetensors"]
    with pytest.raises(UsageError, match="--train"):
        score.Scorer.load(tmp_path / "none.safetensors")


def _folder(path, n: int = 8):
    path.mkdir()
    pictures, captions = score.real_pictures(n, seed=30)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path / f"{i}.{'png' if i % 2 else 'jpg'}", quality=95)
        (path / f"{i}.txt").write_text(caption + "\n")
    return path


def test_a_folder_is_scored(tmp_path, capsys):
    score.main([str(_folder(tmp_path / "drawn"))])
    printed = capsys.readouterr().out
    assert "8 pictures" in printed and "caption accuracy 1.0000" in printed and "Fréchet distance to 2048" in printed


def test_mistakes_in_a_folder_are_reported(tmp_path, capsys):
    def message(folder) -> str:
        with pytest.raises(SystemExit):
            score.main([str(folder)])
        return capsys.readouterr().err

    assert "is not a folder" in message(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "holds no *.png or *.jpg" in message(tmp_path / "empty")
    folder = _folder(tmp_path / "drawn", 3)
    (folder / "1.txt").write_text("a cat")
    assert "1.txt: not a caption" in message(folder)
    (folder / "1.txt").unlink()
    assert "1.png has no caption" in message(folder)
    (folder / "0.jpg").write_bytes(b"no picture")
    assert "0.jpg cannot be read" in message(folder)


# ----------------------------------------------------------------------------------------- the teachers


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_teacher_generates_in_a_plain_pipeline_on_a_cpu(family, teachers):
    """Its text encoders' configs said float16, in which Transformers loaded them, beside a U-Net in float32."""
    pipeline = DiffusionPipeline.from_pretrained(teachers[family])
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    plain = pipeline("a large red circle on a black background", **options).images
    assert plain.dtype == torch.float32 and plain.isfinite().all()
    asked = DiffusionPipeline.from_pretrained(teachers[family], torch_dtype=torch.float32)
    for name in ("unet", "vae", "text_encoder", *["text_encoder_2"] * (family == "sdxl")):
        own, other = (getattr(one, name).state_dict() for one in (pipeline, asked))
        assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own), name


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_pipeline_in_half_precision_is_saved_as_the_committed_teachers_are(family, teachers, tmp_path):
    save_pipeline(tmp_path, DiffusionPipeline.from_pretrained(teachers[family], torch_dtype=torch.float16))
    for committed in sorted(Path(teachers[family]).glob("*/*")):
        saved = tmp_path / committed.relative_to(teachers[family])
        if committed.suffix == ".safetensors":
            ours, theirs = load_file(saved), load_file(committed)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
            assert {tensor.dtype for tensor in ours.values()} == {torch.float16}
        elif committed.parent.name.startswith("text_encoder"):
            assert json.loads(saved.read_text())["dtype"] == json.loads(committed.read_text())["dtype"] == "float32"


# --------------------------------------------------------------------------------------- the comparison


def test_students_are_named_by_kind_and_recipe():
    assert compare.label("sd", "full", "sd") == "LCM"
    assert compare.label("lora_sdxl-few", "lora", "sdxl") == "LCM-LoRA, few"
    assert compare.label("sdxl-few", "full", "sd") == compare.label("my-student", "full", "sd") == "LCM"


def test_the_demo_trains_each_recipe_of_each_program_in_its_own_folder(tmp_path, monkeypatch):
    runs: list[tuple[Any, ...]] = []
    compared: list[list[str]] = []
    monkeypatch.setattr(demo, "make_shards", lambda *_, **__: None)
    monkeypatch.setattr(
        demo, "distil", lambda program, stage, shards, *rest: runs.append((program, stage.steps, *rest))
    )
    monkeypatch.setattr(demo.compare, "main", compared.append)
    demo.main(["--programs", "sd", "lora_sdxl", "--recipes", "plain", "few", "--output_dir", str(tmp_path / "o")])
    out = tmp_path / "o"
    (plain,), (first, second) = ([stage.steps for stage in RECIPES[recipe]] for recipe in ("plain", "few"))
    assert runs == [
        ("sd", plain, out / "sd", None),
        ("sd", first, out / "sd-few-stage-1", None),
        ("sd", second, out / "sd-few", out / "sd-few-stage-1"),
        ("lora_sdxl", plain, out / "lora_sdxl", None),
        ("lora_sdxl", first, out / "lora_sdxl-few-stage-1", None),
        ("lora_sdxl", second, out / "lora_sdxl-few", out / "lora_sdxl-few-stage-1"),
    ]
    students = [str(out / name) for name in ("sd", "sd-few", "lora_sdxl", "lora_sdxl-few")]
    assert compared == [["--student", *students, "--output_dir", str(out), "--count", "192"]]


def launches_of_the_demo(monkeypatch, reason=None):
    """A list to which the demo's commands are added in place of being run; each ends for that `reason`, None: whole."""
    launched: list[list[str]] = []

    def run(command, **_):
        launched.append(command)
        folder = Path(command[command.index("--output_dir") + 1])
        folder.mkdir(exist_ok=True)
        Journal(folder, {"steps": 300}).end(120 if reason else 300, reason)

    monkeypatch.setattr(demo.subprocess, "run", run)
    monkeypatch.setattr(demo.compare, "main", lambda _: None)
    return launched


def test_the_demo_ends_where_one_of_its_runs_was_stopped(tmp_path, monkeypatch):
    """A program that is asked to stop exits with success: the demo went on, to a student that was not there."""
    launched = launches_of_the_demo(monkeypatch, "SIGTERM")
    with pytest.raises(SystemExit, match="sd-few-stage-1: SIGTERM; the same demo with --resume goes on"):
        demo.main(["--recipes", "few", "--output_dir", str(tmp_path)])
    assert len(launched) == 1


@pytest.mark.parametrize("resumed", [False, True])
def test_a_demo_that_was_stopped_goes_on(tmp_path, monkeypatch, resumed):
    launched = launches_of_the_demo(monkeypatch)
    shard, checkpoint = tmp_path / "shards" / "toy-000007.tar", tmp_path / "sd" / "checkpoint-100" / "run.json"
    make_shards(tmp_path / "shards", shards=8, samples_per_shard=1, seed=0)
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    drawn = shard.read_bytes()
    demo.main(["--output_dir", str(tmp_path), *(["--resume"] if resumed else [])])
    assert checkpoint.exists() == resumed and (shard.read_bytes() == drawn) == resumed
    (command,) = launched
    assert command[command.index("--resume_from_checkpoint") + 1] == "latest"


def test_the_comparison_writes_the_table_and_the_picture_of_the_readme(tmp_path, monkeypatch, capsys):
    pictures = [Image.new("RGB", (64, 64), "red")] * 10

    def row(model: str, steps: int, share: float, reference: bool = False) -> EvaluatedRow:
        values = {"caption_accuracy": share, "frechet_distance": 1000 * (1 - share)}
        return EvaluatedRow(model, steps, 4.0, values, 0.1, pictures, reference)

    rows = [row("SD DDIM", 50, 0.93, True)]
    models = ("SD DDIM", "SD untrained control", "SD LCM")
    rows += [row(model, steps, 0.1 * steps) for model in models for steps in compare.STEPS]
    monkeypatch.setattr(compare, "compare", lambda *_, **__: rows)
    compare.main(["--student", "x", "--output_dir", str(tmp_path)])
    assert (tmp_path / "wide_table.md").read_text().splitlines() == [
        "| model | 1 | 2 | 4 | 8 | Fréchet at 1 | 2 | 4 | 8 |",
        "|---|---|---|---|---|---|---|---|---|",
        "| SD teacher, DDIM (.93 and 70 at 50 steps) | .10 | .20 | .40 | .80 | 900 | 800 | 600 | 200 |",
        "| SD untrained control | .10 | .20 | .40 | .80 | 900 | 800 | 600 | 200 |",
        "| **SD LCM** | .10 | .20 | .40 | .80 | 900 | 800 | 600 | 200 |",
    ]
    jpeg, png = (Image.open(tmp_path / f"evaluation.{kind}") for kind in ("jpg", "png"))
    assert jpeg.format == "JPEG" and jpeg.size == png.size
    assert f"picture: {tmp_path / 'evaluation.png'}" in capsys.readouterr().out
