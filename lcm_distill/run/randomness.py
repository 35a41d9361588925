"""Every random draw of training comes from (seed, rank, batch): nothing to save, nothing to disturb."""

import numpy as np
import torch


class BatchGenerators:
    """Random generators of one rank, one for each batch that it trains on.

    A batch's draws depend on nothing that happened before it: not on the batches skipped by a resume, nor on
    validation. Ranks draw different numbers.
    """

    def __init__(self, seed: int, rank: int, device: torch.device | str):
        self.seed, self.rank = seed, rank
        self._generator = torch.Generator(device=device)

    def at(self, batch: int) -> torch.Generator:
        """The generator for the `batch`-th batch (0, 1, …) of this rank; torch's global one is seeded alike.

        The global generator serves what takes no generator: dropout.
        """
        state = int(np.random.SeedSequence((self.seed, self.rank, batch)).generate_state(1, np.uint64)[0])
        state &= 2**63 - 1
        torch.manual_seed(state ^ 1)
        return self._generator.manual_seed(state)
