"""What is not a result is not written as one."""

import math
from pathlib import Path

import finished_students
import pytest
import torch

from lcm_distill.errors import DivergenceError

pytestmark = pytest.mark.hostile("checkpoints")


@pytest.mark.parametrize("value", [math.inf, math.nan, -1e5], ids=str)
@pytest.mark.parametrize("kind", ["full_student", "lora_student"])
def test_weights_that_are_not_finite_or_too_large_for_float16_are_not_exported(
    kind, value, teacher, tmp_path, monkeypatch
):
    """At --learning_rate 1e38 such a model was the result, also where only its float16 copy was infinite."""

    def spoil(parameters, *_):
        with torch.no_grad():
            list(parameters)[-1].view(-1)[3] = value

    monkeypatch.setattr(finished_students, "_perturb", spoil)
    with pytest.raises(DivergenceError, match="^the result is not written: the student: values in .*finite.* lower"):
        getattr(finished_students, kind)(tmp_path / "out", teacher, "sd")
    assert not Path(tmp_path / "out").exists()
