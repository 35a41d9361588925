"""How networks are split over ranks, and compiled.

    fsdp            networks split over the ranks (FSDP2); the same calls for one process, DDP and ZeRO-2
    zero            gradients and optimizer state split over the ranks (DeepSpeed's ZeRO-2)
    compiling       torch.compile

Imports nothing of the package but `errors`.
"""
