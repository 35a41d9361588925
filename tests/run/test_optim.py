"""The optimizer and the learning-rate schedule, and which of their settings a resumed run has."""

import copy

import pytest
import torch

from lcm_distill.errors import UsageError
from lcm_distill.flags import OptimizationFlags
from lcm_distill.run.optim import build_lr_scheduler, build_optimizer, keeping_hyperparameters


def optimizer_of(parameters, *, learning_rate=0.1, fused=True, **options):
    flags = OptimizationFlags(**{"adam_beta2": 0.99, "adam_weight_decay": 0.0} | options)
    return build_optimizer(parameters, flags, learning_rate, fused=fused)


def scheduler_of(optimizer, name, *, warmup, steps):
    return build_lr_scheduler(optimizer, OptimizationFlags(lr_scheduler=name, lr_warmup_steps=warmup), steps=steps)


def test_8bit_adam_is_bitsandbytes_and_close_to_adamw():
    pytest.importorskip("bitsandbytes")
    results = []
    for use_8bit in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(128, 128)
        start = layer.weight.detach().clone()
        optimizer = optimizer_of(layer.parameters(), learning_rate=1e-2, adam_weight_decay=0.1, use_8bit_adam=use_8bit)
        for _ in range(5):
            optimizer.zero_grad()
            (layer(torch.randn(16, 128)) - 1).square().mean().backward()
            optimizer.step()
        results.append(layer.weight.detach())
        assert ("bitsandbytes" in type(optimizer).__module__) == use_8bit
    full, eight = results
    assert 0 < (full - eight).norm() < 0.1 * (full - start).norm()


@pytest.mark.parametrize("use_8bit", [False, True])
def test_every_hyperparameter_reaches_the_optimizer(use_8bit):
    if use_8bit:
        pytest.importorskip("bitsandbytes")
    options = {"adam_beta1": 0.7, "adam_beta2": 0.8, "adam_weight_decay": 0.03, "adam_epsilon": 1e-5}
    parameter = torch.nn.Parameter(torch.ones(1))
    (group,) = optimizer_of([parameter], learning_rate=0.2, use_8bit_adam=use_8bit, **options).param_groups
    found = (group["lr"], *group["betas"], group["weight_decay"], group["eps"])
    assert found == (0.2, 0.7, 0.8, 0.03, 1e-5)


def test_an_overflowed_step_is_known_to_be_left_out():
    """A fused AdamW leaves an overflowed update out inside its kernel: the step then counted as taken."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = optimizer_of([parameter], learning_rate=1.0, fused=False)
    wrapped = AcceleratedOptimizer(optimizer, scaler=torch.amp.GradScaler("cpu"))
    for gradient, skipped in ((float("inf"), True), (1.0, False)):
        wrapped.scaler.scale(torch.ones(1))
        parameter.grad = torch.full_like(parameter, gradient)
        wrapped.step()
        assert wrapped.step_was_skipped == skipped and torch.equal(parameter.detach(), torch.ones(4)) == skipped


SETTINGS = {"learning_rate": 0.3, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-8, "adam_weight_decay": 0.1}
CHANGED = {"learning_rate": 0.7, "adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 1e-4, "adam_weight_decay": 0.0}


@pytest.mark.parametrize("changed", [None, *SETTINGS])
def test_a_resumed_optimizer_has_the_settings_of_the_flags(changed):
    """A learning rate changed for a resume was announced, then overwritten by the checkpoint's.

    All settings are those of the flags, and only these: the moments, and with unchanged flags every number, are the
    checkpoint's. The next step is worked out by hand.
    """

    def make(settings):
        parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = optimizer_of([parameter], **settings)
        return parameter, optimizer, scheduler_of(optimizer, "linear", warmup=3, steps=10)

    parameter, optimizer, scheduler = make(SETTINGS)
    for number in range(5):
        parameter.grad = torch.full_like(parameter, 1.0 + number)
        optimizer.step()
        scheduler.step()
    settings = SETTINGS if changed is None else SETTINGS | {changed: CHANGED[changed]}
    resumed, again, schedule = make(settings)
    with torch.no_grad():
        resumed.copy_(parameter)
    with keeping_hyperparameters(again, schedule):
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        schedule.load_state_dict(scheduler.state_dict())
    group = again.param_groups[0]
    rate, beta1, beta2, epsilon, decay = settings.values()
    assert (*group["betas"], group["eps"], group["weight_decay"]) == (beta1, beta2, epsilon, decay)
    assert schedule.last_epoch == 5
    assert group["lr"] == schedule.get_last_lr()[0] == pytest.approx(rate * 5 / 7)

    moments = optimizer.state[parameter]
    mean, square = moments["exp_avg"].item(), moments["exp_avg_sq"].item()
    mean, square = beta1 * mean + (1 - beta1) * 2.0, beta2 * square + (1 - beta2) * 4.0
    update = mean / (1 - beta1**6) / ((square / (1 - beta2**6)) ** 0.5 + epsilon)
    lr = rate * 5 / 7
    expected = parameter.item() * (1 - lr * decay) - lr * update
    resumed.grad = torch.full_like(resumed, 2.0)
    again.step()
    assert resumed.item() == pytest.approx(expected, rel=1e-9)
    schedule.step()
    assert group["lr"] == pytest.approx(rate * 4 / 7)
    if changed is None:
        parameter.grad = torch.full_like(parameter, 2.0)
        optimizer.step()
        assert torch.equal(parameter, resumed)


@pytest.mark.hostile("checkpoints")
def test_a_schedule_that_the_flags_do_not_allow_is_refused():
    optimizer = optimizer_of([torch.nn.Parameter(torch.ones(1))], learning_rate=1e-8)
    with pytest.raises(UsageError, match="--lr_scheduler polynomial"):
        scheduler_of(optimizer, "polynomial", warmup=0, steps=5)


@pytest.mark.parametrize("before, after", [(True, False), (False, True)])
def test_a_resumed_optimizer_is_fused_as_its_precision_needs(before, after):
    """After fp16 a run in bf16 kept the slow optimizer, which the checkpoint had brought along."""

    def make(fused):
        parameter = torch.nn.Parameter(torch.ones(2))
        parameter.grad = torch.ones(2)
        optimizer = optimizer_of([parameter], fused=fused)
        return optimizer, scheduler_of(optimizer, "constant", warmup=0, steps=10)

    optimizer, scheduler = make(before)
    optimizer.step()
    again, schedule = make(after)
    with keeping_hyperparameters(again, schedule):
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        schedule.load_state_dict(scheduler.state_dict())
    assert again.param_groups[0]["fused"] is (True if after else None)  # False is one tensor at a time on a GPU
    again.step()
    optimizer.step()
    (mine,), (other,) = again.param_groups[0]["params"], optimizer.param_groups[0]["params"]
    assert again.state[mine]["step"] == 2
    assert torch.allclose(again.state[mine]["exp_avg"], optimizer.state[other]["exp_avg"])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("formats", [("channels_last", "contiguous_format"), ("contiguous_format", "channels_last")])
def test_moments_take_the_memory_format_of_their_parameter(fused, formats):
    """The fused kernel for CPUs ignores strides: moments of another memory format went to other weights."""
    torch.manual_seed(0)
    weights, *gradients = torch.randn(3, 4, 3, 3, 3)

    def make(start, memory_format):
        parameter = torch.nn.Parameter(start.clone(memory_format=memory_format))
        optimizer = optimizer_of([parameter], fused=fused)
        return parameter, optimizer, scheduler_of(optimizer, "constant", warmup=0, steps=10)

    def step(parameter, optimizer, gradient):
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.step()

    saved, resumed = (getattr(torch, name) for name in formats)
    expected, optimizer, scheduler = make(weights, saved)
    step(expected, optimizer, gradients[0])
    parameter, again, schedule = make(expected.detach(), resumed)
    with keeping_hyperparameters(again, schedule):
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        schedule.load_state_dict(scheduler.state_dict())
    step(expected, optimizer, gradients[1])
    step(parameter, again, gradients[1])
    torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-6)


def test_learning_rate_warms_up_by_optimizer_steps():
    optimizer = optimizer_of([torch.nn.Parameter(torch.ones(1))], learning_rate=1.0)
    scheduler = scheduler_of(optimizer, "cosine", warmup=4, steps=8)
    rates = []
    for _ in range(8):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[-1] == pytest.approx(0, abs=1e-9)
