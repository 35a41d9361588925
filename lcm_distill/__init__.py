"""What the four LCM distillation programs share; README.md maps the folders.

The order, lowest first: redaction, launcher; errors; flags, locks; environment; objective, distributed, data; models;
sampling; export; run; the commands. Nothing imports what comes after it.
"""

import logging

__version__ = "0.2.0"

# Three libraries warn at import of things that no user of this project can or need fix.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional 4-bit CPU kernel
logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)  # torchvision, which is not used
logging.getLogger("xformers").setLevel(logging.ERROR)  # its CUDA kernels; Diffusers imports it wherever it is installed
