"""Leaves out of a run's flags what must not be written to files, trackers or the Hub."""

import re
import sys
from collections.abc import Mapping
from typing import Any


def public_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """`flags` without tokens, and without the commands (`pipe:`), logins and URL queries in the shards, cut to "…"."""
    public = {name: value for name, value in flags.items() if "token" not in name}
    if shards := public.get("train_shards_path_or_url"):
        for secret, instead in ((r"\?.*?(?=::|$)", "?…"), (r"://[^/@]*@", "://…@"), (r"pipe:.*", "pipe:…")):
            shards = re.sub(secret, instead, shards, flags=re.DOTALL)  # a command may have several lines
        public["train_shards_path_or_url"] = shards
    return public


def hide_in_command_line(secret: str) -> None:
    """Replaces `secret` by *** in sys.argv, which trackers record."""
    sys.argv = [word.replace(secret, "***") for word in sys.argv]
