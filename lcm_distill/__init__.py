"""The parts that the four LCM distillation programs share; see `docs/` and the README for the map."""

import logging

# Two libraries warn at import of things that no user of this project can mend or needs to.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional 4-bit CPU kernel
logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)  # torchvision, which is not used
