"""Teachers as users have them: folders, variants, separate autoencoders, single files; and mistakes with them."""

import json
import logging
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from original_layout import open_clip, save_single_file
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lcm_distill.errors import UsageError
from lcm_distill.models import sd, sdxl
from lcm_distill.models.teacher import Teacher, read_configs
from lcm_distill.models.vae import vae_factor
from lcm_distill.objective.schedule import complete_schedule

CONFIGS = {"family": "sd", "resolution": 64, "num_ddim_timesteps": 50}
MODULES = {"sd": sd, "sdxl": sdxl}
PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


def pipeline_of(folder: str, family: str):
    return PIPELINES[family].from_pretrained(folder, torch_dtype=torch.float32)


def load(teacher: Teacher, family: str, dtype: torch.dtype = torch.float32):
    return MODULES[family].load_frozen(teacher, device="cpu", dtype=dtype)


def assert_same_networks(actual, expected) -> None:
    """The same networks with the same weights, bit for bit; frozen, in eval mode."""
    compared = [name for name in NETWORKS if hasattr(expected, name)]
    assert {"unet", "vae", "text_encoder"} <= set(compared)
    for name in NETWORKS:
        if hasattr(expected, name):
            network, state = getattr(actual, name), getattr(expected, name).state_dict()
            assert network.state_dict().keys() == state.keys()
            assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items()), name
            assert not network.training and not any(p.requires_grad for p in network.parameters())


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "a VAE of its own"])
def test_missing_weights_of_a_folder_are_reported(part, teacher, tmp_path):
    """The libraries initialized them at random, with only a warning: with an older Transformers, which had other names
    for a text encoder's tensors, a run trained on noise instead of captions."""
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    name = "vae" if part == "a VAE of its own" else part
    (file,) = (folder / name).glob("*.safetensors")
    tensors = load_file(file)
    missing = next(key for key in tensors if key.endswith("weight"))
    save_file({key: tensor for key, tensor in tensors.items() if key != missing}, file, metadata={"format": "pt"})
    kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}[name]
    broken = Teacher(teacher, vae=str(folder / "vae")) if part != name else Teacher(str(folder))
    flag = "--pretrained_vae_model_name_or_path" if part != name else "--pretrained_teacher_model"
    name_in_message = re.escape(missing.removeprefix("text_model."))  # older Transformers add it to the name
    with pytest.raises(UsageError, match=f"{flag}.*lacks 1 weights, such as .*{name_in_message}"):
        broken.load({name: kind}, {name: torch.float32})


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickled_weights_alone_are_read(part, teacher, tmp_path):
    """As in the first releases of Stable Diffusion: PyTorch reads them without running anything."""
    folder = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    (file,) = (folder / part).glob("*.safetensors")
    stem = "pytorch_model" if part == "text_encoder" else "diffusion_pytorch_model"
    torch.save(load_file(file), folder / part / f"{stem}.bin")
    file.unlink()
    read_configs(Teacher(str(folder)), **CONFIGS)
    assert_same_networks(load(Teacher(str(folder)), "sd"), load(Teacher(teacher), "sd"))


class RunsCode:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("kind", ["torch.save", "an older format", "pickle", "text"])
def test_a_pickle_of_anything_but_weights_is_refused(kind, part, configs_only, tmp_path):
    """A traceback after other networks had been loaded."""
    stem = "pytorch_model" if part == "text_encoder" else "diffusion_pytorch_model"
    path = configs_only / part / f"{stem}.bin"
    content = {"weight": torch.zeros(2), "code": RunsCode(tmp_path / "touched")}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif kind == "text":
        path.write_text("<html>404</html>")
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch.save")
    networks = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    message = f"--pretrained_teacher_model .*{path.name} is a pickle that holds code .*Path.*safetensors"
    with pytest.raises(UsageError, match=message if kind == "torch.save" else f"the weights of its {part}") as info:
        read_configs(Teacher(str(configs_only)), **CONFIGS)
        assert kind != "torch.save"  # of which the code is seen before any weights are read
        Teacher(str(configs_only)).load({part: networks[part]}, {part: torch.float32})
    assert "\n" not in str(info.value) and "--variant" not in str(info.value)
    assert not (tmp_path / "touched").exists()


@pytest.mark.hostile("teachers")
def test_a_separate_vae_that_holds_code_is_refused(teacher, tmp_path):
    shutil.copytree(f"{teacher}/vae", tmp_path / "vae", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"code": RunsCode(tmp_path / "touched")}, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(UsageError, match="--pretrained_vae_model_name_or_path .*model.bin is a pickle that holds code"):
        read_configs(Teacher(teacher, vae=str(tmp_path / "vae")), **CONFIGS)
    assert not (tmp_path / "touched").exists()


# A separate VAE


def scaled_vae(teacher: str, folder: Path, **entries) -> str:
    """A copy of the teacher's VAE with `entries` in its config; None removes one."""
    shutil.copytree(f"{teacher}/vae", folder)
    config = json.loads((folder / "config.json").read_text()) | entries
    config = {key: value for key, value in config.items() if entries.get(key, 0) is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    "entries, key, separate, own",
    [
        ({"scaling_factor": 0.13025}, "scaling_factor", 0.13025, 0.45),
        ({"scaling_factor": 1}, "scaling_factor", 1.0, 0.45),
        ({"scaling_factor": None}, "scaling_factor", 0.18215, 0.45),  # left out: Stable Diffusion's
        ({"shift_factor": 0.1}, "shift_factor", 0.1, None),
    ],
)
def test_a_separate_vae_with_another_scale_is_said(entries, key, separate, own, teacher, tmp_path, caplog):
    """Its latents have another size than those that the U-Net was trained on; nothing was said."""
    vae = scaled_vae(teacher, tmp_path / "vae", **entries)
    with caplog.at_level(logging.WARNING, "lcm_distill"):
        read_configs(Teacher(teacher, vae=vae), **CONFIGS)
    (record,) = caplog.records
    assert f"--pretrained_vae_model_name_or_path {vae}: its {key} is {separate}," in record.message
    assert f"the teacher's own VAE ({teacher}) {own}:" in record.message


@pytest.mark.parametrize("entries", [{}, {"shift_factor": 0.0}, {"force_upcast": True}, {"sample_size": 512}])
def test_nothing_is_said_of_a_vae_with_the_teacher_s_scale(entries, teacher, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "lcm_distill"):
        read_configs(Teacher(teacher, vae=scaled_vae(teacher, tmp_path / "vae", **entries)), **CONFIGS)
        read_configs(Teacher(teacher), **CONFIGS)
    assert not caplog.records


def test_a_teacher_without_a_vae_takes_a_separate_one(teacher, configs_only, caplog):
    shutil.rmtree(configs_only / "vae")
    with caplog.at_level(logging.WARNING, "lcm_distill"):
        read_configs(Teacher(str(configs_only), vae=f"{teacher}/vae"), **CONFIGS)
    assert not caplog.records
    with pytest.raises(UsageError, match="contains no vae/config.json"):
        read_configs(Teacher(str(configs_only)), **CONFIGS)


# Single files


@pytest.fixture(scope="module")
def single_files(teachers, tmp_path_factory) -> dict[str, str]:
    """The toy teachers as single files in the original layout."""
    folder = tmp_path_factory.mktemp("single_files")
    for family in PIPELINES:
        save_single_file(pipeline_of(teachers[family], family), str(folder / f"{family}.safetensors"))
    return {family: str(folder / f"{family}.safetensors") for family in PIPELINES}


@pytest.fixture()
def configs_only(teacher, tmp_path) -> Path:
    """A copy of the teacher without weights, from which nothing can be loaded."""
    return Path(shutil.copytree(teacher, tmp_path / "teacher", ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.mark.hostile("teachers")
def test_mistakes_are_found_in_the_configs_before_weights_are_read(teacher, configs_only, tmp_path):
    """Every message names its flag."""
    configs = read_configs(Teacher(teacher), **CONFIGS)
    assert vae_factor(configs.vae) == 4
    copy = str(configs_only)
    read_configs(Teacher(copy), **CONFIGS)
    with pytest.raises(UsageError, match=r"--resolution 66 is not a multiple of 8, .*64 and 72"):
        read_configs(Teacher(copy), **CONFIGS | {"resolution": 66})
    with pytest.raises(UsageError, match="--num_ddim_timesteps 1001"):
        read_configs(Teacher(copy), **CONFIGS | {"num_ddim_timesteps": 1001})
    with pytest.raises(UsageError, match="--pretrained_teacher_model .*nowhere"):
        read_configs(Teacher(str(tmp_path / "nowhere")), **CONFIGS)
    with pytest.raises(UsageError, match="--pretrained_vae_model_name_or_path .*config.json"):
        read_configs(Teacher(copy, vae=str(tmp_path)), **CONFIGS)
    with pytest.raises(UsageError, match="--teacher_config is for a single-file teacher"):
        read_configs(Teacher(copy, config=copy), **CONFIGS)


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize(
    "change, message",
    [
        ({"time_cond_proj_dim": 256}, "is an LCM"),
        ({"addition_embed_type": "text_time"}, "train_lcm_distill_sdxl_wds.py or train_lcm_distill_lora_sdxl_wds.py"),
        ({"in_channels": 9}, "is an inpainting model: its U-Net takes 9 channels, where latents have 4"),
    ],
)
def test_a_u_net_of_another_kind_is_refused(change, message, configs_only):
    path = configs_only / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match=message):
        read_configs(Teacher(str(configs_only)), **CONFIGS)


def with_scheduler(folder: Path, config: dict, listed: str | None = None) -> Teacher:
    """The teacher in `folder`, with another scheduler config and `listed` in its model_index.json, None: without."""
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    (folder / "model_index.json").unlink(missing_ok=True)  # the toy's own lists a scheduler
    if listed is not None:
        (folder / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", listed]}))
    return Teacher(str(folder))


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COSXL = {
    "_class_name": "EDMEulerScheduler", "num_train_timesteps": 1000, "prediction_type": "v_prediction",
    "sigma_data": 1.0, "sigma_max": 120.0, "sigma_min": 0.002, "sigma_schedule": "exponential",
}  # fmt: skip


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize(
    "config, listed, words",
    [
        (COSXL, None, r"EDMEulerScheduler\) has the continuous noise levels of EDM"),
        (COSXL, "DDIMScheduler", "EDM"),
        ({key: value for key, value in COSXL.items() if key != "_class_name"}, "DDIMScheduler", "EDM"),
        ({"num_train_timesteps": 1000}, "EDMEulerScheduler", "EDM"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}, None, "flow matching"),
        ({"_class_name": "DDIMScheduler"} | BETAS, "FlowMatchEulerDiscreteScheduler", "flow matching"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True} | BETAS, None, "flow matching"),
        ({"_class_name": "DDIMScheduler"} | BETAS, "MyScheduler", "MyScheduler.*not known"),
        ({"num_train_timesteps": 1000}, None, "has neither beta_start nor a _class_name"),
        ({"beta_start": 0.1, "beta_schedule": "linear"}, None, "has neither beta_end nor a _class_name"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "flow_prediction"} | BETAS, None, "flow_prediction"),
        ({"_class_name": "PNDMScheduler", "rescale_betas_zero_snr": True} | BETAS, None, "pure noise"),
    ],
)
def test_a_scheduler_that_cannot_be_distilled_is_refused(config, listed, words, configs_only):
    """Before any weights are read; a student of an EDM or flow-matching teacher was trained on invented betas."""
    with pytest.raises(UsageError, match=f"^--pretrained_teacher_model: its scheduler.*{words}"):
        read_configs(with_scheduler(configs_only, config, listed), **CONFIGS)


def test_the_class_that_decides_a_scheduler_s_defaults(configs_only, caplog):
    """The one that its config names, which wrote it; else the one that the pipeline's index lists."""

    def betas(config, listed=None):
        chosen = complete_schedule(read_configs(with_scheduler(configs_only, config, listed), **CONFIGS).scheduler)
        return chosen["beta_start"], chosen["beta_end"], chosen["beta_schedule"]

    assert betas({"_class_name": "DDPMScheduler"}) == (0.0001, 0.02, "linear")
    assert betas({"_class_name": "HeunDiscreteScheduler"}, "HeunDiscreteScheduler") == (0.00085, 0.012, "linear")
    assert betas({}, "TCDScheduler") == (0.00085, 0.012, "scaled_linear")
    assert betas({"_class_name": None, "beta_end": 0.03}, "DDIMScheduler") == (0.0001, 0.03, "linear")
    assert betas({"_class_name": "LCMScheduler"} | BETAS, "PNDMScheduler") == tuple(BETAS.values())
    assert betas({"_class_name": "DDIMScheduler"}, "PNDMScheduler") == (0.0001, 0.02, "linear")
    assert not caplog.records
    assert betas({"_class_name": "HeunDiscreteScheduler"}, "PNDMScheduler") == (0.00085, 0.012, "linear")
    assert "is of HeunDiscreteScheduler and leaves out beta_start" in caplog.text
    assert "lists PNDMScheduler, which has another default (0.00085 and 0.0001)" in caplog.text
    (configs_only / "model_index.json").unlink()
    assert betas(BETAS) == tuple(BETAS.values())  # there is nothing to decide


@pytest.mark.hostile("teachers")
def test_a_folder_without_a_u_net_is_refused(configs_only):
    shutil.rmtree(configs_only / "unet")
    with pytest.raises(UsageError, match="contains no unet/config.json"):
        read_configs(Teacher(str(configs_only)), **CONFIGS)


@pytest.mark.hostile("servers")
def test_a_hub_teacher_that_cannot_be_downloaded_is_refused():
    with pytest.raises(UsageError, match="--pretrained_teacher_model nobody/nothing"):
        read_configs(Teacher("nobody/nothing"), **CONFIGS)


@pytest.mark.hostile("teachers")
def test_a_teacher_of_the_other_family_is_refused(teachers):
    read_configs(Teacher(teachers["sdxl"]), **CONFIGS | {"family": "sdxl"})
    with pytest.raises(UsageError, match="train_lcm_distill_sdxl_wds.py"):
        read_configs(Teacher(teachers["sdxl"]), **CONFIGS)
    with pytest.raises(UsageError, match="train_lcm_distill_sd_wds.py"):
        read_configs(Teacher(teachers["sd"]), **CONFIGS | {"family": "sdxl"})


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_single_file_equals_its_folder(family, teachers, single_files):
    """A pipeline's `from_single_file` gives SDXL's second text encoder the first one's weights if as wide."""
    teacher = Teacher(single_files[family], config=teachers[family])
    read_configs(teacher, **CONFIGS | {"family": family})
    assert_same_networks(load(teacher, family), load(Teacher(teachers[family]), family))
    module, captions = MODULES[family], ["a small red circle on a black background", ""]
    ours, theirs = (
        module.encode_captions(load(t, family), captions)["encoder_hidden_states"]
        for t in (teacher, Teacher(teachers[family]))
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_single_file_is_loaded_in_the_requested_dtypes(family, teachers, single_files):
    frozen = load(Teacher(single_files[family], config=teachers[family]), family, torch.bfloat16)
    assert frozen.unet.dtype == torch.float32 and frozen.text_encoder.dtype == torch.bfloat16
    expected = load(Teacher(teachers[family]), family, torch.bfloat16)
    assert_same_networks(frozen, expected)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_half_precision_file_loads_into_float32(family, teachers, single_files, tmp_path):
    half = {k: v.half() if v.is_floating_point() else v for k, v in load_file(single_files[family]).items()}
    save_file(half, tmp_path / "half.safetensors")
    frozen = load(Teacher(str(tmp_path / "half.safetensors"), config=teachers[family]), family)
    expected = load(Teacher(teachers[family]), family)
    for name in NETWORKS:
        if hasattr(expected, name):
            torch.nn.Module.to(getattr(expected, name), torch.float16).to(torch.float32)
            assert getattr(frozen, name).dtype == torch.float32
    assert_same_networks(frozen, expected)


def test_a_stable_diffusion_2_file_has_an_open_clip_text_encoder(teacher, single_files, tmp_path):
    weights = {k: v for k, v in load_file(single_files["sd"]).items() if not k.startswith("cond_stage_model.")}
    text_encoder = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(teacher, subfolder="text_encoder"))
    named = open_clip(text_encoder.state_dict())
    save_file(
        weights | {f"cond_stage_model.model.{k}": v.detach().contiguous() for k, v in named.items()},
        tmp_path / "sd2.safetensors",
    )
    frozen = load(Teacher(str(tmp_path / "sd2.safetensors"), config=teacher), "sd")
    expected = {name.removeprefix("text_model."): tensor for name, tensor in text_encoder.state_dict().items()}
    for name, tensor in frozen.text_encoder.state_dict().items():
        assert torch.equal(tensor, expected[name.removeprefix("text_model.")]), name


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_single_file_loads_in_silence(family, teachers, single_files, capfd):
    """Diffusers showed a progress bar, and warned about missing modules and a flag that is not ours, --extract_ema."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar

    handler = logging.StreamHandler()
    diffusers_logging.add_handler(handler)
    disable_progress_bar()  # as a run does
    try:
        load(Teacher(single_files[family], config=teachers[family]), family)
    finally:
        enable_progress_bar()
        diffusers_logging.remove_handler(handler)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_only_the_requested_parts_are_loaded(teacher, single_files, monkeypatch):
    """A separate autoencoder was always loaded."""
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda *_, **__: pytest.fail("the VAE was loaded"))
    for model, config in ((teacher, None), (single_files["sd"], teacher)):
        loading = Teacher(model, config=config, vae=f"{teacher}/vae")
        parts = loading.load({"text_encoder": CLIPTextModel}, {"text_encoder": torch.float32})
        assert list(parts) == ["text_encoder"]


def test_a_single_file_without_an_autoencoder_takes_a_separate_one(teacher, single_files, tmp_path):
    """Diffusers needs all parts in the file, although the autoencoder is replaced."""
    weights = {k: v for k, v in load_file(single_files["sd"]).items() if not k.startswith("first_stage_model.")}
    path = str(tmp_path / "no_vae.safetensors")
    save_file(weights, path)
    with pytest.raises(UsageError, match="contains no vae; pass one as --pretrained_vae_model_name_or_path"):
        load(Teacher(path, config=teacher), "sd")
    frozen = load(Teacher(path, config=teacher, vae=f"{teacher}/vae"), "sd")
    assert_same_networks(frozen, load(Teacher(teacher), "sd"))


@pytest.mark.hostile("teachers")
def test_a_single_file_that_cannot_be_a_teacher_is_refused(teacher, single_files, tmp_path):
    """While configs are read, before any weights are."""
    path = Path(single_files["sd"])
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(path.read_bytes()[:-1000])
    pickled = tmp_path / "model.ckpt"
    torch.save({}, pickled)
    (tmp_path / "page.safetensors").write_text("<html>404</html>")
    missing = str(tmp_path / "missing.safetensors")
    for wrong, message in [
        (Teacher(str(truncated), config=teacher), "--pretrained_teacher_model .*not a complete .safetensors file"),
        (Teacher(str(tmp_path / "page.safetensors"), config=teacher), "not a complete .safetensors file"),
        (Teacher(str(pickled), config=teacher), r"--pretrained_teacher_model .*only \.safetensors files"),
        (Teacher(missing, config=teacher), "--pretrained_teacher_model .*missing.safetensors: no such file"),
        (Teacher(str(path), config=teacher, variant="fp16"), "leave out --variant"),
        (Teacher(str(path), config=teacher, revision="main"), "leave out .*--teacher_revision"),
        (Teacher(str(path), config=str(tmp_path)), "--teacher_config .*contains no unet/config.json"),
        (Teacher(str(path), config="nobody/nothing"), "--teacher_config nobody/nothing"),
    ]:
        with pytest.raises(UsageError, match=message):
            read_configs(wrong, **CONFIGS)


@pytest.mark.hostile("teachers")
def test_a_single_file_whose_configs_cannot_be_read_is_refused(single_files, tmp_path):
    """The message named a model on the Hub that the user had never heard of, without an explanation."""
    with pytest.raises(UsageError, match="--pretrained_teacher_model .*sd.safetensors .*--teacher_config") as info:
        read_configs(Teacher(single_files["sd"], cache_dir=str(tmp_path)), **CONFIGS)
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in str(info.value)


@pytest.mark.hostile("teachers")
def test_a_file_whose_weights_do_not_fit_its_configs_is_refused(teacher, single_files, tmp_path):
    """Diffusers left missing weights on the meta device, and dropped those that the config has no place for."""
    weights = load_file(single_files["sd"])
    path = str(tmp_path / "other.safetensors")
    first = "model.diffusion_model.input_blocks.0.0.weight"
    text = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    for change in (
        {first: None},  # lacks a layer
        {first: torch.zeros(8, 4, 3, 3)},  # another width
        {"model.diffusion_model.time_embed.cond_proj.weight": torch.zeros(8, 8)},  # an LCM
        {text: None},
    ):
        save_file({k: v for k, v in (weights | change).items() if v is not None}, path)
        with pytest.raises(UsageError, match="its weights do not fit the configs of .*--teacher_config"):
            load(Teacher(path, config=teacher), "sd")


@pytest.mark.parametrize(
    "shapes, source",
    [
        (
            {
                "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
                "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
                "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
            },
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ),
        (
            {
                "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
                "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,),
            },
            "stabilityai/stable-diffusion-xl-base-1.0",
        ),
    ],
)
def test_the_model_that_a_file_is_taken_for(shapes, source, tmp_path):
    """Inferred from names and shapes alone."""
    path = str(tmp_path / "model.safetensors")
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    assert Teacher(path).config_source == source
    assert Teacher(path, config="some/model").config_source == "some/model"


def test_a_single_file_of_sd_2_needs_a_config(tmp_path):
    """Diffusers takes all of them for 2.1, which predicts v; 2.0 base, of the same shapes, predicts noise."""
    path = str(tmp_path / "model.safetensors")
    name = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({name: torch.zeros(320, 1024)}, path)
    with pytest.raises(UsageError, match="Stable Diffusion 2 .*--teacher_config"):
        Teacher(path).config_source  # noqa: B018
    assert Teacher(path, config="some/model").config_source == "some/model"


@pytest.mark.parametrize("kind", ["folder", "variant", "vae", "single file"])
def test_the_model_card_s_code_loads_the_teacher(kind, teachers, tmp_path):
    """It named a single file as a Hub id, and left out the variant: the code did not run."""
    folder = teachers["sd"]
    if kind == "variant":
        StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16).save_pretrained(
            tmp_path / "half", variant="fp16"
        )
        teacher = Teacher(str(tmp_path / "half"), variant="fp16")
    elif kind == "single file":
        pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        save_single_file(pipeline, tmp_path / "teacher.safetensors")
        teacher = Teacher(str(tmp_path / "teacher.safetensors"), config=folder)
    else:
        teacher = Teacher(folder, vae=f"{folder}/vae" if kind == "vae" else None)
    code = teacher.loading_code(StableDiffusionPipeline, "safety_checker=None")
    assert code.endswith('.to("cuda")')
    names: dict = {"torch": torch}
    exec(code.replace('.to("cuda")', ""), names)
    assert isinstance(names["pipe"], StableDiffusionPipeline) and names["pipe"].unet.dtype == torch.float16
    assert (names["pipe"].vae is names.get("vae")) == (kind == "vae")


@pytest.mark.hostile("teachers")
def test_a_file_marked_as_predicting_v_needs_a_config(tmp_path):
    """It is taken for SDXL base, whose config has ε prediction: the teacher would silently generate noise."""
    path = str(tmp_path / "v.safetensors")
    xl = {"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": torch.zeros(1280)}
    save_file(xl | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, path)
    with pytest.raises(UsageError, match="predicts v and ends at zero SNR.*--teacher_config"):
        _ = Teacher(path).config_source


# The Hub's cache


def put_into_cache(cache: Path, model: str, revisions: dict[str, str | Path]) -> None:
    """Fills a Hub cache as downloads do: each revision's name, and its commit, stand for a folder's content."""
    root = cache / f"models--{model.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    for number, (revision, folder) in enumerate(revisions.items()):
        commit = f"{number:x}" * 40
        (root / "refs" / revision).write_text(commit)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                blob = root / "blobs" / f"{commit}-{len(list(root.glob('blobs/*')))}"
                blob.parent.mkdir(exist_ok=True)
                shutil.copy(file, blob)
                link = root / "snapshots" / commit / file.relative_to(folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(blob)


@pytest.fixture(scope="module")
def hub_cache(teachers, tmp_path_factory) -> str:
    """Both toy teachers and the autoencoder: as they are in revision main, modified in revision v2."""
    cache, changed = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("changed")
    for family in PIPELINES:
        pipeline = pipeline_of(teachers[family], family)
        pipeline.scheduler.register_to_config(num_train_timesteps=500)
        pipeline.vae.register_to_config(scaling_factor=0.9)
        with torch.no_grad():
            for network in (pipeline.unet.conv_out, pipeline.vae.quant_conv, pipeline.text_encoder):
                for parameter in network.parameters():
                    parameter.add_(1)
        pipeline.save_pretrained(changed / family)
        put_into_cache(cache, f"toys/{family}", {"main": teachers[family], "v2": changed / family})
    put_into_cache(cache, "toys/vae", {"main": Path(teachers["sd"]) / "vae", "v2": changed / "sd" / "vae"})
    return str(cache)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_hub_teacher_is_read_from_its_cache_in_its_revision(family, teachers, hub_cache):
    """Published programs use --cache_dir and --teacher_revision for some parts only."""
    model, commit = f"toys/{family}", "1" * 40
    for revision, timesteps in ((None, 1000), ("main", 1000), ("v2", 500), (commit, 500)):
        teacher = Teacher(model, revision=revision, cache_dir=hub_cache)
        configs = read_configs(teacher, **CONFIGS | {"family": family})
        assert configs.scheduler["num_train_timesteps"] == timesteps
        assert (configs.vae["scaling_factor"] == 0.9) == (timesteps == 500)
        folder = teachers[family]
        if timesteps == 500:
            folder = str(Path(hub_cache) / f"models--toys--{family}" / "snapshots" / commit)
        assert_same_networks(load(teacher, family), load(Teacher(folder), family))
    with pytest.raises(UsageError, match=f"--pretrained_teacher_model {model}.*revision"):
        read_configs(Teacher(model, revision="v3", cache_dir=hub_cache), **CONFIGS)
    with pytest.raises(UsageError, match=f"--pretrained_teacher_model {model}"):
        read_configs(Teacher(model), **CONFIGS)  # another cache: the user's own


def test_a_separate_autoencoder_has_a_revision_of_its_own(teacher, hub_cache):
    for revision, commit in ((None, "0" * 40), ("v2", "1" * 40)):
        chosen = Teacher(teacher, vae="toys/vae", vae_revision=revision, cache_dir=hub_cache)
        assert (read_configs(chosen, **CONFIGS).vae["scaling_factor"] == 0.9) == (revision == "v2")
        folder = Path(hub_cache) / "models--toys--vae" / "snapshots" / commit
        expected = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).state_dict()
        vae = load(chosen, "sd").vae
        assert all(torch.equal(tensor, expected[name]) for name, tensor in vae.state_dict().items())
    # The teacher's revision is not the autoencoder's.
    mixed = Teacher("toys/sd", revision="v2", vae="toys/vae", cache_dir=hub_cache)
    configs = read_configs(mixed, **CONFIGS)
    assert configs.scheduler["num_train_timesteps"] == 500 and configs.vae["scaling_factor"] != 0.9
    wrong = Teacher(teacher, vae="toys/vae", vae_revision="v3", cache_dir=hub_cache)
    with pytest.raises(UsageError, match="--pretrained_vae_model_name_or_path toys/vae"):
        read_configs(wrong, **CONFIGS)
    with pytest.raises(UsageError, match="--pretrained_vae_model_name_or_path toys/vae: its weights"):
        load(wrong, "sd")


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_single_file_takes_its_configs_from_the_cache(family, teachers, single_files, hub_cache):
    """Diffusers reads the configs of single networks from the user's default cache, whatever cache_dir is."""
    teacher = Teacher(single_files[family], config=f"toys/{family}", cache_dir=hub_cache)
    read_configs(teacher, **CONFIGS | {"family": family})
    assert_same_networks(load(teacher, family), load(Teacher(teachers[family]), family))


# Variants


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_folder_of_half_precision_files_needs_the_variant(family, teachers, tmp_path):
    pipeline = pipeline_of(teachers[family], family)
    half = PIPELINES[family].from_pretrained(teachers[family], torch_dtype=torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    frozen = load(Teacher(str(tmp_path), variant="fp16"), family)
    for name in NETWORKS:
        if hasattr(pipeline, name):
            assert getattr(frozen, name).dtype == torch.float32
    expected = load(Teacher(teachers[family]), family)
    for name in NETWORKS:
        if hasattr(expected, name):
            torch.nn.Module.to(getattr(expected, name), torch.float16).to(torch.float32)
    assert_same_networks(frozen, expected)
    with pytest.raises(UsageError, match="--pretrained_teacher_model .*pass --variant fp16"):
        load(Teacher(str(tmp_path)), family)
    with pytest.raises(UsageError, match="in the variant fp16; .*leave out --variant"):
        load(Teacher(teachers[family], variant="fp16"), family)


# Weights that do not fit the configs


def with_weights(folder: Path, part: str, **tensors: torch.Tensor) -> None:
    (file,) = (folder / part).glob("*.safetensors")
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize(
    "kind", ["an LCM", "fewer layers", "no middle", "a VAE without quant_conv", "a VAE of its own"]
)
def test_weights_that_a_config_has_no_place_for_are_refused(kind, teacher, tmp_path):
    """Diffusers leaves them out with a warning: an LCM was distilled as if it were its teacher."""
    folder = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    part, entries = "unet", {}
    if kind == "an LCM":
        with_weights(folder, "unet", **{"time_embedding.cond_proj.weight": torch.zeros(24, 64)})
    elif kind == "fewer layers":
        entries = {"transformer_layers_per_block": 0}
    elif kind == "no middle":
        entries = {"mid_block_type": None}
    else:
        part, entries = "vae", {"use_quant_conv": False}
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    given = Teacher(teacher, vae=str(folder / "vae")) if kind == "a VAE of its own" else Teacher(str(folder))
    networks = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    with pytest.raises(UsageError, match="weights that its config has no place for, such as") as info:
        given.load({part: networks[part]}, {part: torch.float32})
    assert "download" not in str(info.value)


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x08\0\0\0\0\0\0\0{}"])
@pytest.mark.parametrize("given", ["teacher", "vae"])
def test_the_fingerprint_of_damaged_weights_is_refused(content, given, teacher, tmp_path):
    """Encoded shards are checked before weights are loaded: a traceback."""
    folder = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    (file,) = (folder / "vae").glob("*.safetensors")
    file.write_bytes(content)
    broken = Teacher(str(folder)) if given == "teacher" else Teacher(teacher, vae=str(folder / "vae"))
    flag = "--pretrained_teacher_model" if given == "teacher" else "--pretrained_vae_model_name_or_path"
    with pytest.raises(UsageError, match=f"{flag}.*{file.name}.* not a complete .safetensors file"):
        broken.fingerprint("vae", AutoencoderKL)


@pytest.mark.parametrize("half", [("unet",), ("vae",), ("text_encoder", "unet")])
def test_a_folder_of_which_some_parts_come_in_the_variant(half, teacher, tmp_path):
    """As Diffusers' pipelines take it. Each of two messages asked for what the other refused."""
    folder = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    for part in half:
        (file,) = (folder / part).glob("*.safetensors")
        file.rename(file.with_suffix(".fp16.safetensors"))
    frozen = load(Teacher(str(folder), variant="fp16"), "sd")
    assert_same_networks(frozen, load(Teacher(teacher), "sd"))
    for part, kind in {"vae": AutoencoderKL, "unet": UNet2DConditionModel}.items():
        expected = Teacher(teacher).fingerprint(part, kind)
        assert Teacher(str(folder), variant="fp16").fingerprint(part, kind) == expected


@pytest.mark.hostile("teachers")
def test_what_is_no_vae_folder_gets_a_remedy(teacher, tmp_path):
    """It was to pass a pipeline folder, which is what had been passed."""
    (tmp_path / "vae.safetensors").touch()
    (tmp_path / "empty").mkdir()
    for vae, message in {
        teacher: f"contains no config.json; pass its folder {teacher}/vae",
        str(tmp_path / "vae.safetensors"): "is a file; pass a folder or Hub id",
        str(tmp_path / "empty"): "contains no config.json; pass the folder of a Diffusers VAE",
    }.items():
        with pytest.raises(UsageError, match=f"--pretrained_vae_model_name_or_path {vae} {message}"):
            read_configs(Teacher(teacher, vae=vae), **CONFIGS)
