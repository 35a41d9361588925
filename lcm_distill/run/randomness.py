"""Random draws of training depend on (seed, rank, batch) alone: a checkpoint need not save any generator's state."""

import numpy as np
import torch


class BatchGenerators:
    """The random generators of one rank, one for each batch that it trains on.

    A batch's draws do not depend on what happened before: not on the batches that a resume skips, nor on validation.
    Different ranks draw different numbers.
    """

    def __init__(self, seed: int, rank: int, device: torch.device | str):
        self.seed, self.rank = seed, rank
        self._generator = torch.Generator(device=device)

    def at(self, batch: int) -> torch.Generator:
        """The generator for batch number `batch` (0, 1, …) of this rank; also seeds torch's global generator.

        The global one is for dropout, which takes no generator.
        """
        state = int(np.random.SeedSequence((self.seed, self.rank, batch)).generate_state(1, np.uint64)[0])
        state &= 2**63 - 1
        torch.manual_seed(state ^ 1)
        return self._generator.manual_seed(state)
