"""The trackers' names."""

import pytest

from lcm_distill.errors import UsageError
from lcm_distill.run.trackers import parse_trackers


def test_trackers_are_parsed_and_checked():
    assert parse_trackers("none") == [] == parse_trackers(None)
    assert parse_trackers("tensorboard,wandb") == ["tensorboard", "wandb"] == parse_trackers("wandb tensorboard")[::-1]
    assert {"tensorboard", "wandb"} <= set(parse_trackers("all"))
    with pytest.raises(UsageError, match="--report_to tensorbord.*tensorboard"):
        parse_trackers("tensorbord")
