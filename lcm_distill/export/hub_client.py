"""Asks the Hub one thing, in a process of its own: `python -m lcm_distill.export.hub_client`, JSON in and JSON out.

A process can be stopped; in the run's own, a client that waits for ever, its threads and compiled code cannot. The
request comes on stdin, since it holds the token, and a machine's other users see command lines. Progress bars and
warnings go to stderr. Only the Hub's client is imported: asking takes half a second.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_session, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

# Too slow, two at once, too early, too many: of the 4xx, what a later try may mend.
_PASSING = (408, 409, 412, 425, 429)


def create(api: HfApi, repo_id: str) -> dict[str, Any]:
    """Makes the repository unless there is one; its `repo_id` with the owner. An error without the right to write."""
    made = api.create_repo(repo_id, exist_ok=True).repo_id
    try:
        api.auth_check(made, write=True)  # of one that exists, create_repo is content with the right to read
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise
    return {"repo_id": made}


def read_licence(api: HfApi, repo_id: str) -> dict[str, Any]:
    """What the model's card says of its licence, under a card's own names; empty if it says nothing."""
    card = api.model_info(repo_id, expand=["cardData"]).card_data
    known = card.to_dict() if card else {}
    names = ("license", "license_name", "license_link")
    return {"licence": {name: known[name] for name in names if known.get(name)}}


def upload(api: HfApi, repo_id: str, folder: str, files: list[str], message: str) -> dict[str, Any]:
    """Uploads the `files` of `folder`, named relative to it, in one commit: all of them arrive, or none."""
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=Path(folder) / name) for name in files]
    return {"url": api.create_commit(repo_id, additions, commit_message=message).commit_url}


_ACTIONS: dict[str, Callable[..., dict[str, Any]]] = {"create": create, "read_licence": read_licence, "upload": upload}


def _limit_silence(seconds: float) -> None:
    """Every request of the client fails after so long without a byte; its own sessions wait for ever."""
    session = get_session()
    kind, hooks = type(session), session.event_hooks  # versions differ in the HTTP library that they stand on
    set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=seconds))


def _is_refusal(error: Exception) -> bool:
    """Whether the same request would fail again: no right, no such name, and not a matter of the moment."""
    if isinstance(error, HfHubHTTPError):
        return 400 <= error.response.status_code < 500 and error.response.status_code not in _PASSING
    return isinstance(error, (HFValidationError, OfflineModeIsEnabled))


def _brief(error: BaseException, token: str) -> str:
    """The first lines of an error and of what it came from, without the token and the queries of signed URLs."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [f"{type(e).__name__}: {(str(e).strip() or '-').splitlines()[0]}" for e in (error, cause)]
    return re.sub(r"\?[^\s'\"]+", "?…", "; ".join(dict.fromkeys(lines))).replace(token, "***")


def main() -> None:
    request = json.load(sys.stdin)
    action, token, silence = request.pop("action"), request.pop("token"), request.pop("silence")
    _limit_silence(silence)
    try:
        answer = _ACTIONS[action](HfApi(token=token), **request)
    except Exception as error:  # no connection, no right, no such name, no JSON in the answer: each its own class
        answer = {"error": _brief(error, token), "refused": _is_refusal(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
