"""What the fork server of `processes` imports: the programs, and with them the libraries that they use."""

import torch

import train_lcm_distill_lora_sd_wds
import train_lcm_distill_lora_sdxl_wds
import train_lcm_distill_sd_wds
import train_lcm_distill_sdxl_wds

__all__ = [
    "train_lcm_distill_lora_sd_wds", "train_lcm_distill_lora_sdxl_wds", "train_lcm_distill_sd_wds",
    "train_lcm_distill_sdxl_wds",
]  # fmt: skip
torch.set_num_threads(1)
