"""What may be written down of a run: nothing secret."""

import re
from collections.abc import Mapping
from typing import Any


def public_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags as they may be written down: no tokens, and of shards no commands, logins and queries of URLs."""
    public = {name: value for name, value in flags.items() if "token" not in name}
    if shards := public.get("train_shards_path_or_url"):
        for secret, instead in ((r"\?.*?(?=::|$)", "?…"), (r"://[^/@]*@", "://…@"), (r"pipe:.*", "pipe:…")):
            shards = re.sub(secret, instead, shards, flags=re.DOTALL)  # a command may have several lines
        public["train_shards_path_or_url"] = shards
    return public
