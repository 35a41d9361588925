"""The LoRA student: one U-Net that is teacher, student and target in turn; its exported files in pipelines."""

import gc
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import PeftModel, get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from lcm_distill.errors import UsageError
from lcm_distill.export.original import original_name, unet_modules
from lcm_distill.export.weights import export_lora_student, save_lora
from lcm_distill.models import sd
from lcm_distill.models.families import FAMILIES
from lcm_distill.models.lora import (
    STUDENT,
    TARGET,
    TARGET_MODULES,
    AdapterShape,
    Lora,
    parse_target_modules,
    prepare_without_autocast,
)
from lcm_distill.models.teacher import Teacher
from lcm_distill.models.unets import student_from_teacher
from lcm_distill.objective.consistency import update_ema
from lcm_distill.objective.schedule import build_lcm_scheduler

PIPELINES = {
    "sd": (
        StableDiffusionPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
        StableDiffusionControlNetPipeline,
    ),
    "sdxl": (
        StableDiffusionXLPipeline,
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLInpaintPipeline,
        StableDiffusionXLControlNetPipeline,
    ),
}
VERSIONS = {"sd": "sd_v1", "sdxl": "sdxl_base_v1-0"}
PROMPT = "a small red circle on a black background"
SDXL_CONFIG = dict(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)


def load_unet(teachers, family="sd", dtype=torch.float32) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(teachers[family], subfolder="unet", torch_dtype=dtype)


def perturb(lora: Lora, adapter=STUDENT, spread=0.05, seed=1) -> None:
    """Changes the weights as training would: the second factors are no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora.parameters(adapter):
        parameter.data += spread * torch.randn(parameter.shape, generator=generator)


def inputs(unet, batch=2) -> tuple:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(batch, 4, 16, 16, generator=generator)
    states = torch.randn(batch, 16, unet.config.cross_attention_dim, generator=generator)
    return noisy, torch.tensor([500] * batch), states


@pytest.mark.parametrize(
    "config, millions", [({"cross_attention_dim": 768}, 67.25), (SDXL_CONFIG, 196.75)], ids=["sd15", "sdxl"]
)
def test_the_adapter_has_the_published_size(config, millions):
    """LCM-LoRA's report: 67.25 M parameters on SD 1.5, 196.75 M on SDXL, at rank 64."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        lora = Lora(unet, rank=64, alpha=64)
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in lora.parameters())
    assert round(trained / 1e6, 2) == millions


def test_a_new_adapter_changes_nothing_and_off_is_the_teacher(teachers):
    unet = load_unet(teachers)
    noisy, timesteps, states = inputs(unet)
    with torch.no_grad():
        teacher = unet(noisy, timesteps, states).sample
        lora = Lora(unet, rank=4, alpha=8)
        assert torch.equal(unet(noisy, timesteps, states).sample, teacher)
        perturb(lora)
        student = unet(noisy, timesteps, states).sample
        assert not torch.allclose(student, teacher, atol=1e-3)
        with lora.off():
            assert torch.equal(unet(noisy, timesteps, states).sample, teacher)
        assert torch.equal(unet(noisy, timesteps, states).sample, student)
        with pytest.raises(ZeroDivisionError), lora.off():
            raise ZeroDivisionError
        assert torch.equal(unet(noisy, timesteps, states).sample, student)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_passes_between_forward_and_backward_do_not_change_the_gradients(teachers, checkpointing):
    """Gradient checkpointing runs the student again in the backward pass, when the adapter must be on again."""
    gradients = []
    for between in (False, True):
        unet = load_unet(teachers)
        torch.manual_seed(0)
        lora = Lora(unet, rank=4, alpha=4, average=True)
        perturb(lora)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        noisy, timesteps, states = inputs(unet)
        output = unet(noisy, timesteps, states).sample
        if between:
            with torch.no_grad(), lora.off():
                unet(noisy, timesteps, states)
            with torch.no_grad(), lora.target():
                unet(noisy, timesteps, states)
        output.square().mean().backward()
        assert all(p.grad is None for p in unet.parameters() if not p.requires_grad)
        gradients.append([p.grad for p in lora.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


def test_dropout_acts_in_the_student_s_pass_only(teachers):
    unet = load_unet(teachers)
    teacher = load_unet(teachers)
    lora = Lora(unet, rank=4, alpha=4, dropout=0.5)
    perturb(lora)
    noisy, timesteps, states = inputs(unet)

    def twice():
        return [unet(noisy, timesteps, states).sample for _ in range(2)]

    with torch.no_grad():
        first, second = twice()
        assert not torch.equal(first, second)
        with lora.off():
            first, second = twice()
        assert torch.equal(first, second) and torch.equal(first, teacher(noisy, timesteps, states).sample)
        with lora.target():
            first, second = twice()
        assert torch.equal(first, second)
        first, second = twice()
        assert not torch.equal(first, second)


def test_the_averaged_adapter_is_a_target_of_its_own(teachers):
    unet = load_unet(teachers)
    lora = Lora(unet, rank=4, alpha=4, average=True)
    assert {p.requires_grad for p in lora.parameters()} == {True}
    assert {p.requires_grad for p in lora.parameters(TARGET)} == {False}
    assert sum(p.requires_grad for p in unet.parameters()) == len(lora.parameters())
    start = [p.detach().clone() for p in lora.parameters(TARGET)]
    assert all(torch.equal(a, b) for a, b in zip(start, lora.parameters(), strict=True))
    noisy, timesteps, states = inputs(unet)
    with torch.no_grad():
        untouched = unet(noisy, timesteps, states).sample
        perturb(lora)
        with lora.target():
            assert torch.equal(unet(noisy, timesteps, states).sample, untouched)
        student = unet(noisy, timesteps, states).sample
        assert not torch.equal(student, untouched)
    update_ema(lora.parameters(TARGET), lora.parameters(), 0.75)
    for old, new, source in zip(start, lora.parameters(TARGET), lora.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * source)


def test_without_average_the_target_is_the_student(teachers):
    unet = load_unet(teachers)
    lora = Lora(unet, rank=4, alpha=4)
    perturb(lora)
    noisy, timesteps, states = inputs(unet)
    with torch.no_grad():
        student = unet(noisy, timesteps, states).sample
        with lora.target():
            assert torch.equal(unet(noisy, timesteps, states).sample, student)


def test_the_adapter_is_float32_on_a_base_in_half_precision(teachers):
    unet = load_unet(teachers, dtype=torch.bfloat16)
    lora = Lora(unet, rank=4, alpha=4, average=True)
    assert {p.dtype for p in (*lora.parameters(), *lora.parameters(TARGET))} == {torch.float32}
    own = {p.dtype for name, p in unet.named_parameters() if "lora_" not in name}
    assert own == {torch.bfloat16}


@pytest.mark.hostile("teachers")
def test_target_modules_are_checked_without_weights(teachers):
    config = UNet2DConditionModel.load_config(teachers["sd"], subfolder="unet")
    assert parse_target_modules(None, config) == sorted(TARGET_MODULES)
    assert parse_target_modules("to_q, to_k,to_q", config) == ["to_k", "to_q"]
    for wrong in ("to_x", "attn1", "norm1", ",", "o_q"):
        with pytest.raises(UsageError, match="--lora_target_modules"):
            parse_target_modules(wrong, config)


def test_the_names_by_which_checkpoints_record_an_adapter():
    """They are in the run.json of every checkpoint: with other names, none could be resumed."""
    shape = AdapterShape(rank=4, alpha=8, target_modules=["to_k", "to_q"], average=True)
    assert shape.architecture() == {
        "--lora_rank": 4,
        "--lora_alpha": 8,
        "--lora_target_modules": ["to_k", "to_q"],
        "--ema_decay above 0": True,
    }


def test_autocast_is_only_where_the_program_sets_it():
    """Accelerate wraps autocast around every pass, even those of a teacher in half precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    seen = []

    class Network(torch.nn.Linear):
        def forward(self, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().forward(x)

    for prepare in (Accelerator.prepare, prepare_without_autocast):
        network = Network(2, 2)
        student, _ = prepare(accelerator, network, torch.optim.AdamW(network.parameters()))
        student(torch.ones(1, 2))
        with accelerator.autocast():
            student(torch.ones(1, 2))
    accelerator.free_memory()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert seen == [True, True, False, True]


@pytest.mark.parametrize("adapter", [STUDENT, TARGET])
def test_a_saved_adapter_is_restored_bitwise_and_loads_with_peft(adapter, teachers, tmp_path):
    unet = load_unet(teachers)
    lora = Lora(unet, rank=4, alpha=8, average=True)
    perturb(lora, adapter)
    lora.part(adapter).save(tmp_path / "adapter")
    again = Lora(load_unet(teachers), rank=4, alpha=8, average=True)
    again.part(adapter).load(tmp_path / "adapter")
    assert all(torch.equal(a, b) for a, b in zip(lora.parameters(adapter), again.parameters(adapter), strict=True))
    other = Lora(load_unet(teachers), rank=4, alpha=8, target_modules=["to_q"])
    with pytest.raises(ValueError, match="other modules"):
        other.part().load(tmp_path / "adapter")

    peft = PeftModel.from_pretrained(load_unet(teachers), str(tmp_path / "adapter")).eval()
    noisy, timesteps, states = inputs(unet)
    unet.eval()
    with torch.no_grad(), lora.target() if adapter == TARGET else torch.no_grad():
        expected = unet(noisy, timesteps, states).sample
        torch.testing.assert_close(peft(noisy, timesteps, states).sample, expected, rtol=0, atol=0)


# --- the exported files in pipelines


def pipeline_of(teachers, family, unet=None):
    more = {} if unet is None else {"unet": unet}
    pipeline = PIPELINES[family][0].from_pretrained(teachers[family], torch_dtype=torch.float32, **more)
    pipeline.scheduler = build_lcm_scheduler(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def exported(request, teachers, tmp_path_factory):
    """(family, folder of a LoRA with alpha = 3 · rank, the U-Net with that adapter)."""
    folder = tmp_path_factory.mktemp(f"lora-{request.param}")
    unet = load_unet(teachers, request.param)
    lora = Lora(unet, rank=4, alpha=12)
    perturb(lora)
    save_lora(folder, lora, STUDENT, family=FAMILIES[request.param])
    for name, parameter in unet.named_parameters():  # rounded as in the file, which has the scale in the second factor
        if "lora_A" in name:
            parameter.data = parameter.data.half().float()
        elif "lora_B" in name:
            parameter.data = (3 * parameter.data).half().float() / 3
    return request.param, folder, unet.eval()


def latents(pipeline, **options) -> torch.Tensor:
    chosen = dict(num_inference_steps=2, guidance_scale=1.0, output_type="latent", height=64, width=64) | options
    return pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **chosen).images


def test_the_lora_loads_at_its_strength_and_generates_what_the_student_does(exported, teachers):
    """The public programs' files had keys that no pipeline accepts, and no alpha."""
    family, folder, unet = exported
    without = latents(pipeline_of(teachers, family))
    pipeline = pipeline_of(teachers, family)
    pipeline.load_lora_weights(folder)
    assert next(iter(pipeline.unet.peft_config.values())).lora_alpha == 4  # the scale is in the weights
    generated = latents(pipeline)
    torch.testing.assert_close(generated, latents(pipeline_of(teachers, family, unet)), rtol=1e-4, atol=1e-4)
    assert (generated - without).abs().max() > 0.01
    pipeline.unload_lora_weights()
    torch.testing.assert_close(latents(pipeline), without, rtol=0, atol=0)


def test_other_ranks_leave_the_export_to_the_main_process(teachers, tmp_path, monkeypatch):
    monkeypatch.setattr("lcm_distill.export.weights.PartialState", lambda: SimpleNamespace(is_main_process=False))
    export_lora_student(
        str(tmp_path), lora=Lora(load_unet(teachers), rank=2, alpha=2), scheduler=build_lcm_scheduler({}), family=sd,
        teacher=Teacher(teachers["sd"]), global_step=1, settings={},
    )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_lora_trained_with_dropout_generates_without_it(teachers, tmp_path):
    """Diffusers created dropout layers from the file's metadata, in training mode: no two pictures were equal."""
    lora = Lora(load_unet(teachers), rank=4, alpha=4, dropout=0.5)
    perturb(lora)
    save_lora(tmp_path, lora, STUDENT, family=sd)
    pipeline = pipeline_of(teachers, "sd")
    pipeline.load_lora_weights(tmp_path)
    assert torch.equal(latents(pipeline), latents(pipeline))


def test_the_kohya_file_converts_back_to_bitwise_the_same_weights(exported, teachers):
    family, folder, _ = exported
    with safe_open(folder / "kohya_lora_weights.safetensors", "pt") as file:
        names, metadata = list(file.keys()), file.metadata()
    assert metadata["ss_base_model_version"] == VERSIONS[family] and metadata["ss_network_alpha"] == "4.0"
    assert all(name.startswith("lora_unet_") and name.count(".") <= 2 for name in names)
    loaded = []
    for file_name in ("pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"):
        pipeline = pipeline_of(teachers, family)
        pipeline.load_lora_weights(folder, weight_name=file_name, adapter_name="lcm")
        scalings = {m.scaling["lcm"] for m in pipeline.unet.modules() if hasattr(m, "lora_A")}
        assert scalings == {1.0}  # the 3 of the training is in the weights
        loaded.append(get_peft_model_state_dict(pipeline.unet, adapter_name="lcm"))
    assert len(names) / 3 == len(loaded[0]) / 2 and loaded[0].keys() == loaded[1].keys()
    assert all(torch.equal(loaded[0][name], loaded[1][name]) for name in loaded[0])


def test_kohya_names_are_those_of_the_published_lcm_loras(exported):
    """`lora_unet_` and the module's path with underscores, of SDXL the original one."""
    family, folder, unet = exported
    file = load_file(folder / "kohya_lora_weights.safetensors")
    modules = {name for name, module in unet.named_modules() if hasattr(module, "lora_A")}
    expected = {f"lora_unet_{name.replace('.', '_')}" for name in modules}
    found = {name.split(".")[0] for name in file}
    assert len(found) == len(expected)
    if family == "sd":
        assert found == expected and "lora_unet_down_blocks_0_resnets_0_conv1" in expected
    else:
        assert {"lora_unet_input_blocks_1_0_in_layers_2", "lora_unet_middle_block_0_emb_layers_1"} < found
        assert not any("blocks_0_resnets" in name for name in found)
    assert {name.split(".", 1)[1] for name in file} == {"lora_down.weight", "lora_up.weight", "alpha"}


def test_the_kohya_file_generates_the_same(exported, teachers):
    family, folder, _ = exported
    generated = []
    for file in ("pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"):
        pipeline = pipeline_of(teachers, family)
        pipeline.load_lora_weights(folder, weight_name=file)
        generated.append(latents(pipeline))
    torch.testing.assert_close(*generated, rtol=0, atol=0)


@pytest.mark.parametrize("alpha", [64, 1])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_every_reader_finds_the_strength_that_was_trained(kind, alpha, teachers, tmp_path):
    """Rank 16 with alpha 64: readers that see tensors alone, and Diffusers before 0.34, took a quarter of it."""
    unet = load_unet(teachers, kind)
    lora = Lora(unet, rank=16, alpha=alpha)
    perturb(lora)
    save_lora(tmp_path, lora, STUDENT, family=FAMILIES[kind])
    lora.part().save(tmp_path / "adapter")
    trained = {}
    for path, layer in unet.named_modules():
        if hasattr(layer, "lora_A"):
            down, up = layer.lora_A[STUDENT].weight.flatten(1), layer.lora_B[STUDENT].weight.flatten(1)
            trained[path] = (up @ down * alpha / 16).detach()
    largest = max(float(change.abs().max()) for change in trained.values())

    def agrees(found: dict[str, torch.Tensor]) -> None:
        assert found.keys() == trained.keys()
        for path, change in found.items():
            torch.testing.assert_close(change, trained[path], rtol=5e-3, atol=2e-3 * largest)

    def product(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return up.float().flatten(1) @ down.float().flatten(1)

    file = load_file(tmp_path / "pytorch_lora_weights.safetensors")  # by tensors alone: B A
    agrees({p: product(file[f"unet.{p}.lora_B.weight"], file[f"unet.{p}.lora_A.weight"]) for p in trained})
    kohya = load_file(tmp_path / "kohya_lora_weights.safetensors")
    assert {float(tensor) for name, tensor in kohya.items() if name.endswith(".alpha")} == {16.0}
    names = unet_modules(unet.config) if kind == "sdxl" else {}
    keys = {p: f"lora_unet_{(original_name(p, names) if names else p).replace('.', '_')}" for p in trained}
    agrees({p: product(kohya[f"{key}.lora_up.weight"], kohya[f"{key}.lora_down.weight"]) for p, key in keys.items()})

    def fused(network: UNet2DConditionModel) -> dict[str, torch.Tensor]:
        before = load_unet(teachers, kind).state_dict()
        state = network.state_dict()
        return {p: (state[f"{p}.weight"] - before[f"{p}.weight"]).flatten(1) for p in trained}

    for name in ("pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"):  # by Diffusers
        pipeline = pipeline_of(teachers, kind)
        pipeline.load_lora_weights(tmp_path, weight_name=name)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        agrees(fused(pipeline.unet))
    peft = PeftModel.from_pretrained(load_unet(teachers, kind), tmp_path / "adapter").merge_and_unload()
    agrees(fused(peft))


def test_the_lora_with_a_style_lora_fused_and_unloaded(exported, teachers, tmp_path):
    family, folder, _ = exported
    style = Lora(load_unet(teachers, family), rank=2, alpha=2, target_modules=["to_q", "to_v"])
    perturb(style, seed=7, spread=0.1)
    save_lora(tmp_path / "style", style, STUDENT, family=FAMILIES[family])
    pipeline = pipeline_of(teachers, family)
    without = latents(pipeline)
    pipeline.load_lora_weights(folder, adapter_name="lcm")
    lcm = latents(pipeline)
    pipeline.load_lora_weights(tmp_path / "style", adapter_name="style")
    pipeline.set_adapters(["lcm", "style"], [1.0, 0.8])
    both = latents(pipeline)
    assert (both - lcm).abs().max() > 1e-3
    with_negative = latents(pipeline, guidance_scale=1.5, negative_prompt="blue")
    assert (with_negative - both).abs().max() > 1e-3
    other_negative = latents(pipeline, guidance_scale=1.5, negative_prompt="a large green square")
    assert (with_negative - other_negative).abs().max() > 0
    pipeline.fuse_lora(adapter_names=["lcm", "style"])
    torch.testing.assert_close(latents(pipeline), both, rtol=1e-2, atol=1e-2)
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(latents(pipeline), without, rtol=1e-3, atol=1e-3)


def test_the_lora_loads_into_a_fine_tuned_copy_of_the_teacher(exported, teachers):
    family, folder, _ = exported
    unet = load_unet(teachers, family)
    generator = torch.Generator().manual_seed(3)
    for parameter in unet.parameters():
        parameter.data += 0.02 * parameter.data.std().nan_to_num(0) * torch.randn(parameter.shape, generator=generator)
    pipeline = pipeline_of(teachers, family, unet)
    before = latents(pipeline)
    pipeline.load_lora_weights(folder)
    assert (latents(pipeline) - before).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("task", ["img2img", "inpaint", "controlnet"])
def test_other_pipelines_generate_with_both_kinds_of_student(task, kind, exported, teachers):
    family, folder, _ = exported
    _, img2img, inpaint, controlnet = PIPELINES[family]
    unet = load_unet(teachers, family)
    if kind == "full":
        unet = student_from_teacher(unet, 256).eval()
        torch.nn.init.normal_(unet.time_embedding.cond_proj.weight, std=0.02)
    base = pipeline_of(teachers, family, unet)
    if kind == "lora":
        base.load_lora_weights(folder)
    picture, mask = Image.new("RGB", (64, 64), "navy"), Image.new("L", (64, 64), 255)
    common = dict(num_inference_steps=4, generator=torch.Generator().manual_seed(0))
    common["guidance_scale"] = 1.0 if kind == "lora" else 4.0
    if task == "img2img":
        pipeline, own = img2img.from_pipe(base), dict(image=picture, strength=0.5)
    elif task == "inpaint":
        pipeline, own = inpaint.from_pipe(base), dict(image=picture, mask_image=mask, height=64, width=64)
    else:
        # The ControlNet downsamples its picture by 8, the toy VAE by 4: halve the stride.
        network = ControlNetModel.from_unet(load_unet(teachers, family), load_weights_from_unet=False)
        network.controlnet_cond_embedding.blocks[-1].stride = (1, 1)
        torch.nn.init.normal_(network.controlnet_mid_block.weight, std=0.1)
        pipeline, own = controlnet.from_pipe(base, controlnet=network), dict(image=picture, height=64, width=64)
    pipeline.set_progress_bar_config(disable=True)
    generated = pipeline(PROMPT, **common, **own).images[0]
    assert generated.size == (64, 64) and max(high - low for low, high in generated.getextrema()) > 0


def test_there_is_one_u_net_beside_the_adapters(teachers):
    """The public LoRA programs keep two U-Nets in memory."""
    gc.collect()
    before = {id(o) for o in gc.get_objects() if isinstance(o, UNet2DConditionModel)}
    unet = load_unet(teachers)
    size = sum(p.numel() for p in unet.parameters())
    lora = Lora(unet, rank=4, alpha=4, average=True)
    gc.collect()
    alive = [o for o in gc.get_objects() if isinstance(o, UNet2DConditionModel) and id(o) not in before]
    assert alive == [unet]
    adapter = sum(p.numel() for name in (STUDENT, TARGET) for p in lora.parameters(name))
    assert sum(p.numel() for p in unet.parameters()) == size + adapter
