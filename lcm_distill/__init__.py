"""What the four LCM distillation programs share; README.md maps the folders.

The order, lowest first: redaction, launcher, machine; errors; flags, locks, bars; environment; objective, distributed,
data; models; sampling; export; run; the commands. Nothing imports what comes after it.
"""

import logging

__version__ = "0.2.0"

# Four libraries report things at import that no user of this project can or need fix.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional 4-bit CPU kernel
logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)  # torchvision, which is not used
# Accelerate imports it wherever it is installed; the run itself logs its device.
logging.getLogger("DeepSpeed").addFilter(lambda record: not record.getMessage().startswith("Setting "))
logging.getLogger("xformers").setLevel(logging.ERROR)  # its CUDA kernels; Diffusers imports it wherever it is installed
