"""How a result is used: the card's code runs as it stands, other programs' settings are those that they have."""

import json
import re
from pathlib import Path

import pytest
from diffusers import LCMScheduler
from safetensors import safe_open

from lcm_distill.export import usage
from lcm_distill.objective.schedule import NoiseSchedule, build_lcm_scheduler, sampling_sigmas

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_card_s_code_runs_as_it_stands(kind, family, finished):
    """It had `torch_dtype`, and an import below its use."""
    card = (Path(finished(kind, family)) / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert "torch_dtype" not in code and code.index("from diffusers") < code.index("pipe =")
    names: dict = {}
    exec(code, names)
    assert len(names["picture"].getcolors(1 << 24)) > 1
    assert isinstance(names["pipe"].scheduler, LCMScheduler)
    for word in ("ComfyUI", "sgm_uniform", "ModelSamplingDiscrete", "CFG 1", usage.WORKFLOW):
        assert word in card
    assert ("lcm_distill.export_model" in card) == (kind == "full")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_workflow_is_beside_the_model(kind, finished):
    folder = Path(finished(kind, "sd"))
    workflow = json.loads((folder / "comfyui_workflow.json").read_text())
    nodes = {node["class_type"]: node["inputs"] for node in workflow.values()}
    name = "sd.safetensors" if kind == "lora" else f"{folder.name}.safetensors"
    assert nodes["CheckpointLoaderSimple"]["ckpt_name"] == name
    assert ("LoraLoaderModelOnly" in nodes) == (kind == "lora")
    if kind == "lora":
        assert (folder / nodes["LoraLoaderModelOnly"]["lora_name"]).is_file()
        assert nodes["ModelSamplingDiscrete"]["model"] == ["2", 0]
    assert nodes["KSampler"]["sampler_name"] == "lcm" and nodes["KSampler"]["scheduler"] == "sgm_uniform"
    assert 1 <= nodes["KSampler"]["cfg"] <= 2 and 1 <= nodes["KSampler"]["steps"] <= 8
    for node in workflow.values():  # every link leads to a node that comes before
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in workflow


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_weight_file_of_a_run_describes_itself(kind, finished):
    files = [path for path in Path(finished(kind, "sdxl")).rglob("*.safetensors")]
    assert len(files) >= (4 if kind == "full" else 3)
    for path in files:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        suffix = "" if kind == "full" else "/lora"
        assert metadata["modelspec.architecture"] == f"stable-diffusion-xl-v1-base{suffix}"
        assert metadata["modelspec.usage_hint"] and metadata["ss_steps"] == "1" and metadata["format"] == "pt"
        if kind == "lora":  # of the file's own tensors: rank 2; alpha 4 only in PEFT's, whose config says it
            own = "4.0" if path.parent.name == "adapter" else "2.0"
            assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", own)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (build_lcm_scheduler(SD).config, None),
        (build_lcm_scheduler(SD, 25).config, "a grid of 25; .* have a grid of 50"),
        (build_lcm_scheduler(SD, 50, 4.0).config, "a timestep scaling of 4; .* a timestep scaling of 10"),
        (build_lcm_scheduler(SD | {"prediction_type": "v_prediction"}).config, "prediction_type v_prediction"),
        (build_lcm_scheduler(SD, 50, 10.0, 699).config, "of 700 timesteps; .* of 1000 timesteps .*; the sigmas in"),
        (build_lcm_scheduler({}).config, "beta_schedule linear, beta_start 0.0001 and beta_end 0.02"),
    ],
)
def test_what_other_programs_have_built_in_is_compared(config, words):
    found = usage.unlike_other_programs(config)
    if words is None:
        assert found is None
    else:
        assert re.search(words, found), found


def test_a_workflow_starts_where_sampling_starts():
    """KSampler starts at the last timestep of the schedule that ComfyUI has built in."""
    scheduler = build_lcm_scheduler(SD, 50, 10.0, 699)
    sigmas = sampling_sigmas(scheduler, 2)
    levels = NoiseSchedule.from_config(SD)
    expected = [float(levels.sigmas[t] / levels.alphas[t]) for t in (699, 349)]
    assert sigmas == pytest.approx([*expected, 0]) and len(scheduler.timesteps) == 700  # as before
    workflow = usage.build_workflow("a.safetensors", sigmas=sigmas)
    nodes = {node["class_type"]: node["inputs"] for node in workflow.values()}
    assert "KSampler" not in nodes and nodes["KSamplerSelect"] == {"sampler_name": "lcm"}
    assert [float(sigma) for sigma in nodes["ManualSigmas"]["sigmas"].split(", ")] == pytest.approx(sigmas, rel=1e-3)
    sampling = nodes["SamplerCustom"]
    assert workflow[sampling["sigmas"][0]]["class_type"] == "ManualSigmas"
    assert workflow[sampling["sampler"][0]]["class_type"] == "KSamplerSelect"
    assert (sampling["add_noise"], sampling["cfg"], sampling["model"]) == (True, 1.0, ["3", 0])
    assert nodes["VAEDecode"]["samples"] == [next(n for n, node in workflow.items() if node["inputs"] == sampling), 0]


def test_nothing_recommends_a_start_where_the_student_was_not_trained():
    recipes = (
        usage.lora_recipe,
        usage.single_file_recipe,
        lambda file, **lower: usage.full_recipe("a", file, 8, **lower),
    )
    for recipe in recipes:
        assert "sgm_uniform" in recipe("a.safetensors") and "sampler LCM" in recipe("a.safetensors")
        lower = recipe("a.safetensors", lower_start=True)
        assert "a.safetensors" in lower and "ManualSigmas" in lower and usage.WORKFLOW in lower
        assert "sgm_uniform" not in lower and "sampler LCM" not in lower


def test_a_workflow_of_another_model_is_not_replaced(tmp_path):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert usage.place_workflow(first, usage.build_workflow(first.name)).name == "comfyui_workflow.json"
    assert usage.place_workflow(second, usage.build_workflow(second.name)).name == "b_comfyui_workflow.json"
    assert usage.place_workflow(first, usage.build_workflow(first.name, resolution=64)).name == "comfyui_workflow.json"
    (tmp_path / "comfyui_workflow.json").write_text("not JSON")
    assert usage.place_workflow(first, usage.build_workflow(first.name)).name == "a_comfyui_workflow.json"
