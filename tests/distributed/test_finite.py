"""Values that are not finite are found, wherever they are, and nothing else is."""

import math

import pytest
import torch

from lcm_distill.distributed.finite import HALF, check_finite, find_not_finite, tensors_in
from lcm_distill.errors import DivergenceError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
def test_one_value_is_found_at_every_place_and_size(dtype, value):
    for size in (1, 7, 33, 4097):
        good = torch.full((size,), torch.finfo(dtype).max, dtype=dtype)  # their sum is infinite
        assert find_not_finite([("good", good), ("empty", torch.empty(0)), ("numbers", torch.arange(9))]) is None
        for place in {0, size // 2, size - 1}:
            bad = good.clone()
            bad[place] = value
            assert find_not_finite([("good", good), ("bad", bad), ("worse", bad)]) == "bad"


def test_strides_and_dimensions_do_not_matter():
    tensor = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)
    assert find_not_finite([("x", tensor), ("y", torch.tensor(1.0)), ("z", tensor.transpose(0, 3)[::2])]) is None
    tensor[2, 3, 4, 5] = math.nan
    assert find_not_finite([("x", tensor[:2]), ("y", tensor)]) == "y"
    assert find_not_finite([("scalar", torch.tensor(math.inf))]) == "scalar"


def test_a_limit():
    exact = torch.tensor([HALF, -HALF])
    assert find_not_finite([("x", exact)], HALF) is None and exact.half().isfinite().all()
    assert find_not_finite([("x", -2 * exact)], HALF) == "x"
    with pytest.raises(DivergenceError, match=r"^the student: values in x are not finite, or beyond ±65504"):
        check_finite("the student", [("x", 2 * exact)], largest=HALF)
    check_finite("the student", [("x", 2 * exact)])


def test_the_state_of_an_optimizer_is_looked_through_at_any_depth():
    state = {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)}, 1: {"nested": [torch.tensor([math.nan])]}, 2: 3}
    assert [name for name, _ in tensors_in({"state": state})] == ["state.0.step", "state.0.exp_avg", "state.1.nested.0"]
    with pytest.raises(DivergenceError, match="^optimizer.bin: values in 1.nested.0 are not finite$"):
        check_finite("optimizer.bin", tensors_in(state))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_limit_does_not_hide_what_is_not_finite(value):
    assert find_not_finite([("x", torch.tensor([0.0, value]))], HALF) == "x"
    assert find_not_finite([("x", torch.tensor([0.0, value], dtype=torch.float16))], 1e9) == "x"


def test_parameters_are_looked_at_without_a_graph_and_stay_as_they_are():
    parameter = torch.nn.Parameter(torch.tensor([1.0, math.inf]))
    with pytest.raises(DivergenceError, match="^unet: values in weight are not finite$"):
        check_finite("unet", [("weight", parameter)], together=True)  # of a single process
    assert parameter.grad is None and parameter.requires_grad and parameter.tolist() == [1.0, math.inf]
    check_finite("unet", [("weight", parameter[:1])], together=True)


def test_without_tensors_there_is_nothing_to_find():
    assert find_not_finite([]) is None and list(tensors_in({"a": [1, "b", None], "c": {}})) == []
    check_finite("optimizer.bin", tensors_in({}))
