"""The programs on encoded shards: the same runs as on pictures, without loading VAE and text encoders."""

import pytest
import torch
from test_encode_shards import reshaped, vae_copy
from test_programs import LORA_PROGRAMS, PROGRAMS, captured_losses, family, result, same

from lcm_distill.data.encoded import read_encoding
from lcm_distill.data.preparation import Preparation
from lcm_distill.data.shards import expand_shards
from lcm_distill.encode_shards import encode_shards
from lcm_distill.errors import UsageError
from lcm_distill.models.frozen import FrozenParts
from lcm_distill.models.teacher import Teacher

NOT_NEEDED = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@pytest.fixture(scope="module")
def encoded(shards, teachers, tmp_path_factory):
    """`encoded(family, captions)`: the shards' centre crops and their mirror images, encoded by the toy teacher."""
    folder = tmp_path_factory.mktemp("encoded")

    def build(of: str, captions: bool = True) -> str:
        out = folder / f"{of}-{captions}"
        preparation = Preparation(resolution=64, center_crop=True, random_flip=True)
        encode_shards(
            expand_shards(shards), out, teacher=Teacher(teachers[of]), preparation=preparation, captions=captions
        )
        return str(out)

    return build


@pytest.fixture()
def loaded(monkeypatch) -> list[str]:
    """The names of the parts that are loaded from now on."""
    names: list[str] = []
    load = Teacher.load
    monkeypatch.setattr(Teacher, "load", lambda self, parts, dtypes: names.extend(parts) or load(self, parts, dtypes))
    return names


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_from_latents_is_the_run_from_pictures(program, command, run, encoded, loaded, tmp_path, monkeypatch):
    """The same losses to float16 from the same draws; only the U-Net is loaded; 2 + 2 resumed steps equal 4."""
    losses = captured_losses(monkeypatch)
    options = {"family": family(program), "learning_rate": 1e-3, "random_flip": True, "center_crop": True,
               "proportion_empty_prompts": 0.3, "ema_decay": 0.9, "num_validation_images": 0}  # fmt: skip
    if program in LORA_PROGRAMS:
        options |= {"lora_rank": 4}
    run(program, command("pictures", steps=2, **options))
    from_pictures = [loss for _, loss in losses]
    assert set(NOT_NEEDED) & set(loaded) and not (tmp_path / "pictures" / "validation").exists()
    loaded.clear()
    losses.clear()
    options["train_shards_path_or_url"] = encoded(family(program))
    loaded.clear()
    run(program, command("uninterrupted", steps=4, checkpointing_steps=2, **options))
    assert loaded == ["unet"]
    from_latents = [loss for _, loss in losses]
    assert from_latents[:2] != from_pictures  # the latents are rounded,
    assert from_latents[0] == pytest.approx(from_pictures[0], rel=1e-4)
    assert from_latents[1] == pytest.approx(from_pictures[1], rel=1e-2)  # and a step amplifies that

    half = str(tmp_path / "uninterrupted" / "checkpoint-2")
    run(program, command("resumed", steps=4, resume_from_checkpoint=half, **options))
    assert [loss for _, loss in losses] == from_latents + from_latents[2:]
    assert same(result(tmp_path / "uninterrupted"), result(tmp_path / "resumed"))


def test_validation_parts_are_loaded_for_the_first_picture(command, run, encoded, loaded, tmp_path, monkeypatch):
    from lcm_distill.run.validation import Validation

    before: list[list[str]] = []
    draw = Validation.__call__
    monkeypatch.setattr(Validation, "__call__", lambda self, step: before.append(list(loaded)) or draw(self, step))
    shards = encoded("sd", captions=False)
    loaded.clear()
    run(PROGRAMS[0], command(steps=4, validation_steps=2, train_shards_path_or_url=shards, validation_teacher_steps=2))
    text = ["tokenizer", "text_encoder"]
    assert sorted(before[0]) == sorted([*text, "unet"])  # the captions are not encoded
    assert sorted(before[1]) == sorted(loaded) == sorted([*text, "unet", "vae"])  # once
    assert sorted(path.name for path in (tmp_path / "out" / "validation").iterdir()) == [
        "step-000002.png", "step-000004.png",
    ]  # fmt: skip


def test_a_dry_run_from_latents_validates(command, run, encoded, loaded, caplog, tmp_path):
    shards = encoded("sdxl")
    loaded.clear()
    program = "train_lcm_distill_lora_sdxl_wds"
    run(program, command(family="sdxl", dry_run=True, lora_rank=4, train_shards_path_or_url=shards))
    assert "dry run: shards, models, a training step and validation all work" in caplog.text
    assert "encoded by sdxl in float32; latents of 64x64, centre crop, with their mirror images" in caplog.text
    assert sorted(loaded) == sorted([*NOT_NEEDED, "unet"]) and not (tmp_path / "out").exists()


@pytest.mark.hostile("shards")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 32}, "--resolution 32: .*give --resolution 64"),
        ({"interpolation_type": "box"}, "--interpolation_type box: "),
        ({"family": "sdxl"}, "the captions were encoded with other text encoders"),
        ({"pretrained_vae_model_name_or_path": "other"}, r"another VAE, sd\..* --pretrained_vae"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_latents_that_do_not_fit_are_refused_before_anything_is_loaded(
    options, message, command, run, encoded, small_teacher, tmp_path, monkeypatch
):
    shards = encoded("sd")
    options = dict(options)
    if "pretrained_vae_model_name_or_path" in options:
        other = vae_copy(small_teacher, tmp_path / "vae", lambda name, weight: weight * 1.01)
        options["pretrained_vae_model_name_or_path"] = other
    monkeypatch.setattr(Teacher, "load", lambda *_: pytest.fail("a model was loaded"))
    program = PROGRAMS[1] if options.get("family") == "sdxl" else PROGRAMS[0]
    with pytest.raises(UsageError, match=message):
        run(program, command(train_shards_path_or_url=shards, **options))


@pytest.mark.hostile("shards")
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", ["moments", "encoder_hidden_states"])
def test_arrays_of_other_shapes_are_refused_before_anything_is_loaded(
    program, name, command, run, encoded, tmp_path, monkeypatch
):
    shard = expand_shards(encoded(family(program)))[0]
    shape = (8, 1, 1) if name == "moments" else (77, 8)
    bad = reshaped(shard, tmp_path / "0.tar", {name: shape})
    monkeypatch.setattr(Teacher, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match=rf"its arrays are .*{name} {'x'.join(map(str, shape))}"):
        run(program, command(train_shards_path_or_url=bad, family=family(program)))


class Network(torch.nn.Module):
    """Records its device."""

    def __init__(self, name):
        super().__init__()
        self.name, self.device = name, "cpu"

    def to(self, device, *_, **__):
        self.device = str(device)
        return self


class StubTeacher:
    """A teacher that records the names of the parts that are loaded."""

    def __init__(self):
        self.loaded = []

    def load(self, parts, dtypes):
        self.loaded += parts
        return {name: Network(name) for name in parts}


@pytest.mark.parametrize("captions", [False, True])
def test_what_no_step_needs_is_on_the_device_only_for_validation(encoded, captions):
    """While no picture is generated, training can use the memory of VAE and text encoders."""
    encoding = read_encoding(expand_shards(encoded("sd", captions))[0])
    names = ("text_encoder", "vae", "unet")
    parts = FrozenParts(
        StubTeacher(), device="cuda:3", kinds=dict.fromkeys(names), dtypes=dict.fromkeys(names, torch.float16),
        text=("text_encoder",), encoding=encoding,
    )  # fmt: skip
    parts.load_for_training()
    assert parts._teacher.loaded == (["unet"] if captions else ["text_encoder", "unet"])
    idle = ("vae", "text_encoder") if captions else ("vae",)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a full disk"), parts.all_on_device():
            assert {getattr(parts, name).device for name in names} == {"cuda:3"}
            raise RuntimeError("a full disk")
        assert {name: getattr(parts, name).device for name in names} == {
            name: "cpu" if name in idle else "cuda:3" for name in names
        }
    assert sorted(parts._teacher.loaded) == sorted(names)
    assert not hasattr(parts, "scheduler")


def test_an_embedding_is_moved_before_it_is_cast():
    """A cast in main memory left pinned memory, and the host waited for the GPU in each step."""

    class Stored:
        moves: list = []

        def to(self, *given, **options):
            self.moves.append((given, options))
            return self

    frozen = FrozenParts(None, device="cpu", kinds={}, dtypes={"text_encoder": torch.bfloat16}, text=())
    frozen.to_embedding(Stored())
    assert Stored.moves == [((torch.device("cpu"),), {"non_blocking": True}), ((torch.bfloat16,), {})]
