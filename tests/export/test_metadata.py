"""What weight files say about themselves, and that saying it changes no tensor."""

import base64
import hashlib
import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lcm_distill.errors import UsageError
from lcm_distill.export.card import read_licence
from lcm_distill.export.metadata import Description, last_picture, public_name, read_metadata, write_metadata

MUST = ("sai_model_spec", "architecture", "implementation", "title", "resolution")


def description(**more) -> Description:
    known = dict(title="lcm", base="sd_v1", prediction_type="epsilon", teacher="org/teacher", usage_hint="4 steps")
    return Description(**known | {"resolution": 512} | more)


def test_metadata_are_added_and_tensors_stay(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.zeros(0)}
    save_file(tensors, path, metadata={"format": "pt", "own": "kept"})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    data = path.read_bytes()[8 + length :]
    write_metadata(path, {"modelspec.title": "ä, 名", "format": "pt"})
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())
    with safe_open(path, "pt") as file:
        found = file.metadata()
    expected = f"0x{hashlib.sha256(data).hexdigest()}"
    assert found == {
        "format": "pt", "own": "kept", "modelspec.title": "ä, 名", "modelspec.hash_sha256": expected
    } == read_metadata(path)  # fmt: skip
    write_metadata(path, {"modelspec.title": "again"})
    assert read_metadata(path)["modelspec.hash_sha256"] == expected and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"[]", b"\x05" + bytes(7) + b"nojso"])
def test_what_is_no_weight_file_is_left_as_it_is(content, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is not a .safetensors file"):
        write_metadata(path, {"a": "b"})
    assert path.read_bytes() == content and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("base", "prediction", "architecture"),
    [
        ("sd_v1", "epsilon", "stable-diffusion-v1"),
        ("sd_v2", "epsilon", "stable-diffusion-v2-512"),
        ("sd_v2", "v_prediction", "stable-diffusion-v2-768-v"),
        ("sdxl_base_v1-0", "v_prediction", "stable-diffusion-xl-v1-base"),
    ],
)
def test_architecture_and_prediction_have_modelspec_s_names(base, prediction, architecture):
    known = description(base=base, prediction_type=prediction)
    for rank, suffix in ((None, ""), (8, "/lora")):
        found = known.metadata(layout="original", lora_rank=rank)
        assert found["modelspec.architecture"] == architecture + suffix
        assert found["modelspec.prediction_type"] == {"v_prediction": "v"}.get(prediction, prediction)
        assert all(found[f"modelspec.{name}"] for name in MUST)
        assert ("ss_network_dim" in found) == (rank is not None)


def test_settings_steps_licence_and_sources_are_told(tmp_path):
    picture = tmp_path / "step-000004.png"
    Image.new("RGB", (2000, 1000), "red").save(picture)
    found = description(
        steps=4,
        settings={"learning_rate": 1e-6, "seed": 7, "hub_token": "secret"},
        licence={"license": "other", "license_name": "openrail++"},
        picture=picture,
    ).metadata(layout="original", merged_from=["org/teacher", str(tmp_path / "my-lora")])
    assert (found["ss_steps"], found["ss_learning_rate"], found["ss_seed"]) == ("4", "1e-06", "7")
    assert found["ss_resolution"] == "(512, 512)" and found["ss_sd_model_name"] == "org/teacher"
    assert found["modelspec.license"] == "openrail++" and found["modelspec.merged_from"] == "org/teacher, my-lora"
    kind, _, encoded = found["modelspec.thumbnail"].partition(",")
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as small:
        assert kind == "data:image/jpeg;base64" and small.size == (512, 256) and small.format == "JPEG"
    assert "secret" not in str(found) and str(tmp_path) not in str(found)
    assert all(isinstance(value, str) for value in found.values())


def test_the_last_picture_up_to_a_step(tmp_path):
    assert last_picture(tmp_path) is None
    (tmp_path / "validation").mkdir()
    for name in ("step-000002.png", "step-000010.png", "step-x.png", "other.png"):
        (tmp_path / "validation" / name).touch()
    assert last_picture(tmp_path) == tmp_path / "validation" / "step-000010.png"
    assert last_picture(tmp_path, 9) == tmp_path / "validation" / "step-000002.png"
    assert last_picture(tmp_path, 1) is None
    assert "modelspec.thumbnail" not in description(picture=last_picture(tmp_path)).metadata(layout="diffusers")


def test_the_licence_of_a_local_teacher_is_its_card_s(tmp_path):
    assert read_licence(str(tmp_path)) == {} == read_licence("org/not-in-the-cache")
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE.md\n---\nText")
    assert read_licence(str(tmp_path)) == {"license": "other", "license_name": "mine"}
    for text in ("no metadata", "---\nlicense: [1, {]\n---\n", "---\nlicense: [a]\n---\n", "---\n- a\n---\n"):
        card.write_text(text)
        assert read_licence(str(tmp_path)) == {}
    assert public_name(str(tmp_path / "a" / "b.safetensors")) == "b.safetensors" and public_name("a/b") == "a/b"
    assert Path(public_name("~/models/x")).name == "x" == public_name("~/models/x")
