"""Random draws depend on seed, rank and batch, and on nothing else."""

import torch

from lcm_distill.run.randomness import BatchGenerators


def test_a_batch_s_draws_depend_on_seed_rank_and_batch_alone():
    def numbers(seed=0, rank=0, batch=0):
        generator = BatchGenerators(seed, rank, "cpu").at(batch)
        return tuple(torch.rand(4, generator=generator).tolist() + torch.rand(4).tolist())

    torch.rand(100)
    assert numbers() == numbers()
    others = {numbers(seed=1), numbers(rank=1), numbers(batch=1), numbers(seed=1, rank=1), numbers()}
    assert len(others) == 5
    one = BatchGenerators(0, 0, "cpu")
    one.at(0), one.at(1)
    assert torch.rand(4, generator=one.at(5)).tolist() == list(numbers(batch=5)[:4])
