"""What a single file says about itself counts: its prediction, the kind of model that it is, the parts it has."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from original_layout import save_single_file
from safetensors.torch import load_file, save_file

from lcm_distill.errors import UsageError
from lcm_distill.models.teacher import Teacher, read_configs

FIRST, LAST = "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.out.2.weight"
SDXL = {"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": torch.zeros(1280)}
SD2 = {"model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 1024)}
SD1 = {FIRST: torch.zeros(320, 4, 3, 3)}


@pytest.fixture(scope="module")
def weights(teacher, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The toy teacher in the original layout."""
    pipeline = StableDiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32)
    return save_single_file(pipeline, str(tmp_path_factory.mktemp("file") / "sd.safetensors"))


@pytest.fixture()
def write(tmp_path):
    """`write(tensors, metadata)`: the path of a file with these."""

    def save(tensors, metadata=None) -> str:
        path = str(tmp_path / "model.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
        return path

    return save


def read(path: str, config: str | None):
    return read_configs(Teacher(path, config=config), family="sd", resolution=64, num_ddim_timesteps=50)


SPEC, COMFY = "modelspec.prediction_type", "modelspec.predict_key"
SAYS_V = [
    {SPEC: "v"},
    {SPEC: "V"},
    {SPEC: " v_prediction "},
    {COMFY: "v"},
    {SPEC: "v", "modelspec.architecture": "stable-diffusion-xl-v1-base"},
]
SAYS_EPSILON = [{SPEC: "epsilon"}, {SPEC: "eps"}, {COMFY: "epsilon"}]
SAYS_NOTHING = [None, {}, {"modelspec.title": "v"}, {SPEC: ""}, {"format": "pt"}]


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("metadata", SAYS_V, ids=str)
def test_a_file_whose_metadata_says_v_is_trained_as_v_or_refused(metadata, weights, write, changed):
    """It was taken for ε, whatever it said, if the configs beside it had ε."""
    path = write(weights, metadata)
    predicts_v = changed("sd", "scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert read(path, str(predicts_v)).scheduler["prediction_type"] == "v_prediction"
    with pytest.raises(UsageError, match=r"--pretrained_teacher_model .*says that it predicts v_prediction .* epsilon"):
        read(path, str(changed("sd")))
    with pytest.raises(UsageError, match="predicts v: pass .* --teacher_config"):  # of the model that it seems to be
        Teacher(write(SDXL, metadata)).config_source  # noqa: B018


@pytest.mark.parametrize("metadata", SAYS_EPSILON, ids=str)
def test_a_file_whose_metadata_says_epsilon_is_not_trained_as_v(metadata, weights, write, changed):
    path = write(weights, metadata)
    assert read(path, str(changed("sd"))).scheduler["prediction_type"] == "epsilon"
    predicts_v = changed("sd", "scheduler/scheduler_config.json", prediction_type="v_prediction")
    with pytest.raises(UsageError, match="says that it predicts epsilon .* v_prediction"):
        read(path, str(predicts_v))
    assert Teacher(write(SDXL, metadata)).config_source == "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.mark.parametrize("metadata", SAYS_NOTHING, ids=str)
def test_a_file_whose_metadata_says_nothing_takes_its_configs_prediction(metadata, weights, write, changed):
    path = write(weights, metadata)
    for prediction in ("epsilon", "v_prediction", "sample"):
        folder = changed("sd", "scheduler/scheduler_config.json", prediction_type=prediction)
        assert read(path, str(folder)).scheduler["prediction_type"] == prediction


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("said", ["flow", "rectified_flow", "edm", "1"])
def test_a_prediction_that_is_not_known_is_refused(said, weights, write, changed):
    with pytest.raises(UsageError, match=f"modelspec.prediction_type: '{said}', which is not supported"):
        read(write(weights, {SPEC: said}), str(changed("sd")))


def test_the_markers_of_a_file_count_beside_configs_too(weights, write, changed):
    """Tensors without values, as in NoobAI-XL: with --teacher_config they were not looked at."""
    path = write(weights | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    file, v = "scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}
    with pytest.raises(UsageError, match="says that it predicts v_prediction"):
        read(path, str(changed("sd")))
    with pytest.raises(UsageError, match="says that it ends at zero SNR .*rescale_betas_zero_snr"):
        read(path, str(changed("sd", file, **v)))
    read(path, str(changed("sd", file, **v, rescale_betas_zero_snr=True)))


def test_metadata_decides_between_the_two_predictions_of_stable_diffusion_2(write):
    assert Teacher(write(SD2, {SPEC: "v"})).config_source.endswith("stable-diffusion-2-1")
    for metadata in (None, {SPEC: "epsilon"}):  # 2.0 base, which Diffusers never infers
        with pytest.raises(UsageError, match="Stable Diffusion 2 .*--teacher_config"):
            Teacher(write(SD2, metadata)).config_source  # noqa: B018


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize(
    "channels, message",
    [((9, 4), "is an inpainting model"), ((8, 4), "instruct-pix2pix"), ((5, 4), "depth"), ((4, 8), "predicts 8")],
)
def test_a_file_of_another_kind_is_refused_whatever_its_configs_say(channels, message, weights, write, teacher):
    """ "its weights do not fit the configs" was said, after they had been read."""
    taken, predicted = channels
    other = {FIRST: torch.zeros(24, taken, 3, 3), LAST: torch.zeros(predicted, 24, 3, 3)}
    with pytest.raises(UsageError, match=f"--pretrained_teacher_model .*{message}"):
        read(write(weights | other), teacher)


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize(
    "tensors, kind",
    [
        ({"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(8)}, "flux-schnell"),
        ({"joint_blocks.37.x_block.mlp.fc1.weight": torch.zeros(8, 8)}, "sd35_large"),
        ({"controlnet_cond_embedding.conv_in.weight": torch.zeros(8, 8)}, "controlnet"),
    ],
)
def test_a_file_of_another_architecture_is_refused_by_its_name(tensors, kind, write, teacher):
    with pytest.raises(UsageError, match=f"is a model of another kind, {kind}"):
        read(write(tensors), teacher)


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize(
    "missing, message",
    [
        ("model.diffusion_model.", "contains no unet; use a file with all parts"),
        ("first_stage_model.", "contains no vae; pass one as --pretrained_vae_model_name_or_path"),
        ("cond_stage_model.", "contains no text_encoder; use a file with all parts"),
    ],
)
def test_a_missing_part_is_named_before_weights_are_read(missing, message, weights, write, teacher):
    path = write({name: tensor for name, tensor in weights.items() if not name.startswith(missing)})
    with pytest.raises(UsageError, match=message):
        read(path, teacher)
    if "vae" in message:
        read_configs(
            Teacher(path, config=teacher, vae=f"{teacher}/vae"), family="sd", resolution=64, num_ddim_timesteps=50
        )


@pytest.mark.hostile("teachers")
def test_a_lora_is_called_one(write, teacher):
    path = write({"lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 8)})
    with pytest.raises(UsageError, match="contains no unet .it is a LoRA.; use a file with all parts"):
        read(path, teacher)


@pytest.mark.hostile("teachers")
def test_the_header_alone_is_read(weights, write, teacher, monkeypatch):
    path = write(weights)
    monkeypatch.setattr("lcm_distill.models.single_file.SingleFile.read", lambda *_: pytest.fail("weights were read"))
    read(path, teacher)
    assert load_file(path).keys() == weights.keys()


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("markers", [("edm_vpred.sigma_max", "edm_vpred.sigma_min"), ("edm_mean", "edm_std")])
def test_a_file_with_edm_s_markers_is_refused_whatever_its_configs_say(markers, weights, write, changed):
    """CosXL's and Playground v2.5's: trained on betas that the model was never trained with."""
    with pytest.raises(UsageError, match=f"EDM \\(its marker {markers[0]}\\)"):
        read(write(weights | dict.fromkeys(markers, torch.zeros(4)) | {markers[1]: torch.ones(4)}), str(changed("sd")))


@pytest.mark.parametrize("suffix", ["", "/dreambooth"])
def test_an_architecture_that_predicts_v_counts(suffix, weights, write, changed):
    path = write(weights, {"modelspec.architecture": f"stable-diffusion-v2-768-v{suffix}"})
    with pytest.raises(UsageError, match="says that it predicts v_prediction"):
        read(path, str(changed("sd")))


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("metadata", [{SPEC: "epsilon", COMFY: "v"}, {SPEC: "v", COMFY: "eps"}], ids=str)
def test_metadata_that_contradict_each_other_are_refused(metadata, weights, write, changed):
    with pytest.raises(UsageError, match="metadata contradict each other .*epsilon"):
        read(write(weights, metadata), str(changed("sd")))
