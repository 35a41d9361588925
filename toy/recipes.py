"""How the toy teachers are distilled: recipes of one stage or two, each stage a run of a program with these flags.

    plain     what the demo runs: a latent consistency model for 4 to 8 steps
    few       two stages for 1 to 2 steps, both with sampling from a lower timestep: consistency distillation on a
              coarser grid with that timestep drawn more often, then distribution matching, begun from its student
    lower     the first stage of few alone, for about as long as both take: what matching is compared with
    long      the same from the last timestep: what consistency distillation reaches without --top_timestep

The flags are for batches of 32 pictures of 64 pixels; docs/reference.md has the same recipes for real teachers.
"""

from dataclasses import dataclass

SHARED_FLAGS = (
    *("--resolution", "64", "--train_batch_size", "32"),
    *("--lr_scheduler", "cosine", "--lr_warmup_steps", "20"),
    *("--loss_type", "huber", "--huber_c", "0.01", "--adam_weight_decay", "0"),
)
# w of 1 to 5 for a guidance embedding to learn; a LoRA learns the one at which the comparison draws, 4 − 1.
FULL_FLAGS = ("--w_min", "1", "--w_max", "5")
LORA_FLAGS = ("--w_min", "3", "--w_max", "3", "--lora_alpha", "32", "--ema_decay", "0.95")


@dataclass(frozen=True)
class Stage:
    """A run of a program: its optimizer steps, its learning rates for full and for LoRA students, further flags."""

    steps: int
    full_rate: float
    lora_rate: float
    flags: tuple[str, ...] = ()

    def argv(self, program: str) -> list[str]:
        """The flags of the run, all but those that name teacher, shards, output folder and initial student."""
        is_lora = program.startswith("lora")
        return [
            *SHARED_FLAGS,
            *(LORA_FLAGS if is_lora else FULL_FLAGS),
            *("--learning_rate", str(self.lora_rate if is_lora else self.full_rate)),
            *("--max_train_steps", str(self.steps)),
            *self.flags,
        ]


_COARSE = ("--num_ddim_timesteps", "20", "--top_timestep_probability", "0.3")
_LOWER = ("--top_timestep", "699", "--num_ddim_timesteps", "14")
_LOWER_COARSE = (*_LOWER, "--top_timestep_probability", "0.4")
_MATCHING = (
    *_LOWER,
    *("--top_timestep_probability", "0.5", "--ema_decay", "0.98"),
    *("--dm_weight", "0.5", "--dm_rank", "64", "--dm_learning_rate", "1e-3"),
)
RECIPES: dict[str, list[Stage]] = {
    "plain": [Stage(300, 5e-4, 1e-3)],
    "few": [Stage(400, 5e-4, 1e-3, _LOWER_COARSE), Stage(200, 1e-4, 2e-4, _MATCHING)],
    "lower": [Stage(1000, 5e-4, 1e-3, _LOWER_COARSE)],
    "long": [Stage(1000, 5e-4, 1e-3, _COARSE)],
}
