"""Folders, devices and memory."""

import logging
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from lcm_distill.environment import check_writable, choose_device, memory_errors, respect_umask
from lcm_distill.errors import UsageError


@pytest.mark.hostile("folders")
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--output_dir .*file"):
        check_writable(str(tmp_path / "file"))
    with pytest.raises(UsageError, match="--output_dir .*file/in/it"):
        check_writable(str(tmp_path / "file" / "in" / "it"))
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(UsageError, match="--output_dir .*link"):
        check_writable(str(tmp_path / "link"))


def test_a_folder_that_can_be_written_to_is_not_created_yet(tmp_path, monkeypatch):
    """A run that was refused for another reason left it empty."""
    check_writable(str(tmp_path / "new" / "folder"))
    monkeypatch.chdir(tmp_path)
    check_writable("new")
    check_writable(".")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "available, device, dtype, expected",
    [((), None, None, ("cpu", torch.float32)), ((), "cpu", "bf16", ("cpu", torch.bfloat16)),
     (("cuda", "mps"), None, None, ("cuda", torch.float16)), (("mps",), None, None, ("mps", torch.float16)),
     (("cuda",), "cuda:1", "bf16", ("cuda:1", torch.bfloat16)), (("cuda",), "cpu", None, ("cpu", torch.float32)),
     (("mps",), None, "fp32", ("mps", torch.float32))],
)  # fmt: skip
def test_the_default_is_the_best_available_device(available, device, dtype, expected, monkeypatch):
    for name in ("cuda", "mps"):
        monkeypatch.setattr(getattr(torch, name), "is_available", lambda name=name: name in available)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert choose_device(device, dtype) == (torch.device(expected[0]), expected[1])


@pytest.mark.parametrize(
    "available, device, dtype, words",
    [((), "cuda", None, "--device cuda: .* available: cpu"), ((), "gpu", None, "--device gpu is not a device"),
     (("cuda",), "mps", None, "available: cuda, cpu"), (("cuda",), "cuda:2", None, "the last GPU is cuda:1"),
     (("cuda",), "meta", None, "--device meta"), (("cuda",), "cpu", "fp16", "--dtype fp16 needs a GPU")],
)  # fmt: skip
def test_an_unavailable_device_is_refused(available, device, dtype, words, monkeypatch):
    for name in ("cuda", "mps"):
        monkeypatch.setattr(getattr(torch, name), "is_available", lambda name=name: name in available)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UsageError, match=words):
        choose_device(device, dtype)


@pytest.mark.hostile("disks")
def test_out_of_memory_is_a_message_with_a_remedy():
    with pytest.raises(UsageError, match="Tried 2 GiB.*: take less"), memory_errors("take less"):
        raise torch.OutOfMemoryError("Tried 2 GiB\nand more")
    with pytest.raises(KeyError), memory_errors("take less"):
        raise KeyError


@pytest.mark.parametrize(
    "message, shown",
    [("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.", False),
     ("Setting ds_accelerator to cuda (auto detect)", False), ("the gradients overflowed", True)],
)  # fmt: skip
def test_deepspeed_does_not_say_which_accelerator_it_found(message, shown):
    """Accelerate imports it wherever it is installed, and on a CPU each run began with that warning."""
    record = logging.LogRecord("DeepSpeed", logging.WARNING, "", 0, message, (), None)
    assert bool(logging.getLogger("DeepSpeed").filter(record)) is shown


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_have_the_permissions_that_the_umask_leaves(umask, mode, tmp_path):
    """safetensors 0.8 gives them to their owner alone, whatever the umask."""
    others = tmp_path / "others.safetensors"
    others.touch()
    others.chmod(0o400)
    (tmp_path / "in" / "it").mkdir(parents=True)
    files = [tmp_path / "a.safetensors", tmp_path / "in" / "it" / "b.safetensors"]
    before = os.umask(umask)
    try:
        for file in files:
            save_file({"x": torch.zeros(2)}, file)
        (tmp_path / "in" / "link.safetensors").symlink_to(others)
        respect_umask(files[0], tmp_path / "in")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [mode, mode]
    assert stat.S_IMODE(others.stat().st_mode) == 0o400
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "in", "others.safetensors"]
