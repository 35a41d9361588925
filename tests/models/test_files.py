"""The JSON in a model's files: what no config can hold is refused by name."""

import json
from pathlib import Path

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from lcm_distill.errors import UsageError
from lcm_distill.models import files
from lcm_distill.models.files import ModelFiles

FLAG = "--pretrained_teacher_model"


def read(folder, content: str | bytes):
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    return ModelFiles(str(folder), FLAG).read_json("config.json")


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize(
    "content, message",
    [
        ("[1]", "holds a list"),
        ("null", "holds a NoneType"),
        ('"text"', "holds a str"),
        ("", "cannot be read"),
        ('{"in_channels": 4', "cannot be read"),
        ("<html>404</html>", "cannot be read"),
        (b'{"name": "\xff"}', "cannot be read"),
        ('{"steps": ' + "9" * 5000 + "}", "cannot be read"),  # Python parses no number that long
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),  # RecursionError
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"a": ' + "[" * 200 + "]" * 200 + "}", "nested too deeply"),  # is parsed, but fails where it is copied
        ('{"scaling_factor": NaN}', "scaling_factor is nan"),
        ('{"beta_end": Infinity}', "beta_end is inf"),
        ('{"beta_end": 1e999}', "beta_end is inf"),
        ('{"trained_betas": [0.1, NaN]}', "trained_betas is nan"),
        ('{"inner": {"deep": [{"eps": -Infinity}]}}', "eps is -inf"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_what_no_config_can_hold_is_refused(content, message, tmp_path):
    """Tracebacks of the JSON parser, and NaN that became the latents' scale."""
    with pytest.raises(UsageError, match=f"{FLAG} .*config.json.* {message}") as info:
        read(tmp_path, content)
    assert "\n" not in str(info.value) and len(str(info.value)) < 700


@pytest.mark.parametrize(
    "config",
    [
        {"lambda_min_clipped": float("-inf")},  # DPMSolverMultistepScheduler's default, as Diffusers writes it
        {"block_out_channels": [[1, [2]], {"a": None}], "é": "ü"},
        {},
    ],
)
def test_what_real_configs_hold_is_read(config, tmp_path):
    assert read(tmp_path, json.dumps(config)) == config


@pytest.mark.hostile("teachers")
def test_missing_files(tmp_path):
    folder = ModelFiles(str(tmp_path), FLAG)
    assert folder.find("a.json") is None and folder.read_optional_json("a.json") == {}
    with pytest.raises(UsageError, match=f"{FLAG} .* contains no a.json"):
        folder.read_json("a.json")
    (tmp_path / "b.json").mkdir()
    with pytest.raises(UsageError, match="contains no b.json"):
        folder.read_json("b.json")


@pytest.mark.hostile("folders")
@pytest.mark.parametrize("model", ["./nowhere", "/no/where", "~/nowhere", "a/b/c"])
def test_a_folder_that_does_not_exist_is_not_looked_up_on_the_hub(model, monkeypatch):
    monkeypatch.setattr(files, "hf_hub_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    with pytest.raises(UsageError, match="no such folder"):
        ModelFiles(model, FLAG).find("config.json")


@pytest.mark.hostile("servers")
@pytest.mark.parametrize("kind", [RepositoryNotFoundError, GatedRepoError, ConnectionError, ValueError])
def test_a_model_that_the_hub_does_not_provide_is_named(kind, monkeypatch):
    def fail(*_, **__):
        raise kind.__new__(kind)

    monkeypatch.setattr(files, "hf_hub_download", fail)
    with pytest.raises(UsageError, match=f"{FLAG} some/model: neither a local folder .*{kind.__name__}"):
        ModelFiles("some/model", FLAG).read_optional_json("config.json")


@pytest.mark.hostile("folders")
@pytest.mark.parametrize("name", ["exists", "is_file"])
def test_a_folder_that_may_not_be_read_is_named(name, tmp_path, monkeypatch):
    """Of another user: a traceback."""

    def denied(path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, name, denied)
    with pytest.raises(UsageError, match=f"{FLAG} {tmp_path}.* cannot be read.*Permission denied"):
        ModelFiles(str(tmp_path), FLAG).read_json("unet/config.json")
