"""--compile: the same training, the same names, a bounded number of compiled graphs.

PyTorch's "eager" backend replaces the code generator: it runs the captured graph with the same operations, so that
equality is bit for bit; and only one kind of block is compiled, so that it is fast. tests/test_gpu.py has the real one.
"""

from types import SimpleNamespace

import pytest
import torch
from test_matching_runs import equal_fake_scores
from test_programs import family, result, same
from torch._dynamo.utils import counters

from lcm_distill.distributed import compiling
from lcm_distill.distributed.compiling import compile_networks
from lcm_distill.errors import UsageError
from lcm_distill.models.sd import load_frozen
from lcm_distill.models.teacher import Teacher
from lcm_distill.models.vae import decode_latents, encode_moments
from lcm_distill.run.progress import Progress


@pytest.fixture(autouse=True)
def _capture_only(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    monkeypatch.setattr(compiling, "BLOCKS", ("BasicTransformerBlock",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/nowhere")  # or it would stay set for other tests
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("matching", [{}, {"dm_weight": 0.5, "dm_rank": 4, "dm_steps": 2}], ids=["", "matching"])
@pytest.mark.parametrize("program", ["train_lcm_distill_sd_wds", "train_lcm_distill_lora_sd_wds"])
def test_a_run_resumes_compiled_bit_for_bit(program, matching, command, run, tmp_path, monkeypatch):
    """From another run's checkpoint, with accumulated batches, recomputed activations, dropout and a moving average.

    The weights would show it if the teacher's pass were compiled with the adapter, or the target's with another.
    """
    options = {"family": family(program), "learning_rate": 1e-2, "lr_warmup_steps": 0, "gradient_accumulation_steps": 2}
    options |= {"gradient_checkpointing": True, "ema_decay": 0.5, "checkpointing_steps": 1, "teacher_batch_size": 2}
    options |= matching
    if "lora" in program:
        options |= {"lora_rank": 4, "lora_dropout": 0.3}
    run(program, command("uncompiled", steps=3, **options))
    assert not counters["stats"]
    graphs = []
    step = Progress.step

    def counting(self, grad_norm):
        graphs.append(counters["stats"]["unique_graphs"])
        step(self, grad_norm)

    monkeypatch.setattr(Progress, "step", counting)
    resumed = {"resume_from_checkpoint": str(tmp_path / "uncompiled" / "checkpoint-1"), "compile": True}
    run(program, command("compiled", steps=3, **options, **resumed))
    assert same(result(tmp_path / "uncompiled"), result(tmp_path / "compiled"))
    if matching:
        ends = [tmp_path / name / "checkpoint-3" for name in ("uncompiled", "compiled")]
        assert equal_fake_scores(*ends)
    assert len(graphs) == 2 and 3 <= graphs[0] == graphs[1] <= 24  # nothing is compiled twice
    assert counters["stats"]["unique_graphs"] == graphs[1]  # nor for validation, with its other batch size


@pytest.mark.parametrize("mode", ["regional", "whole"])
def test_compiled_networks_keep_their_names_gradients_and_values(mode):
    class BasicTransformerBlock(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).sin()

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = BasicTransformerBlock(4, 4), BasicTransformerBlock(4, 5)

        def forward(self, x):
            return self.second(self.first(x))

    network = Network()
    names, x = list(network.state_dict()), torch.randn(3, 4)
    expected = network(x)
    gradients = torch.autograd.grad(expected.sum(), list(network.parameters()))
    compile_networks(mode, network)
    compiled = network(x)
    assert counters["stats"]["unique_graphs"] == (1 if mode == "whole" else 2)
    assert torch.equal(compiled, expected) and list(network.state_dict()) == names
    for new, old in zip(torch.autograd.grad(compiled.sum(), list(network.parameters())), gradients, strict=True):
        assert torch.equal(new, old)
    assert torch._dynamo.config.recompile_limit >= 100


@pytest.mark.parametrize("mode, least", [("regional", 3), ("whole", 1)])
def test_the_vae_s_encoder_is_compiled_and_its_decoder_is_not(mode, least, teacher, monkeypatch):
    monkeypatch.setattr(compiling, "BLOCKS", ("ResnetBlock2D",))
    frozen = load_frozen(Teacher(teacher), device="cpu", dtype=torch.float32)
    names = list(frozen.vae.state_dict())
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    expected = encode_moments(frozen.vae, pixels, 2)
    frozen.compile_encoder(mode)
    assert torch.equal(encode_moments(frozen.vae, pixels, 2), expected)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= least
    with frozen.all_on_device():
        decode_latents(frozen.vae, expected[:, :4], 2)
    assert torch.equal(encode_moments(frozen.vae, pixels, 2), expected)
    assert counters["stats"]["unique_graphs"] == graphs
    assert list(frozen.vae.state_dict()) == names


def test_a_vae_that_training_does_not_use_is_neither_loaded_nor_compiled(teacher, monkeypatch):
    """With encoded shards it is loaded for the first validation picture, and decodes alone."""
    compiled = []
    monkeypatch.setattr("lcm_distill.models.frozen.compile_networks", lambda *given: compiled.append(given))
    frozen = load_frozen(Teacher(teacher), device="cpu", dtype=torch.float32, encoding=SimpleNamespace(text=None))
    frozen.compile_encoder("whole")
    assert not compiled and "vae" not in vars(frozen)


def test_no_mode_compiles_nothing():
    network = torch.nn.Linear(2, 2)
    compile_networks(None, network)
    network(torch.zeros(1, 2))
    assert not counters["stats"]


def test_compiled_code_is_cached_for_the_next_run(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_networks("whole", torch.nn.Linear(2, 2))
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    assert cache_dir() == str(tmp_path / "lcm_distill" / "inductor")


@pytest.mark.parametrize("gpu, needed", [(False, "g\\+\\+"), (True, "gcc")])
def test_a_missing_compiler_is_reported(gpu, needed, monkeypatch):
    """Triton needs one too: on a GPU the run failed with its traceback at the first step."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match=f"--compile needs a compiler: install {needed} or clang"):
        compile_networks("regional", torch.nn.Linear(2, 2))
