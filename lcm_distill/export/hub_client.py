"""Sends the Hub one request, in a process of its own: `python -m lcm_distill.export.hub_client`, JSON in and JSON out.

A process can be killed; inside the run's own, a client that hangs, its threads and its compiled code cannot. The
request comes on stdin, since it holds the token, and other users of a machine can see command lines. Progress bars and
warnings go to stderr. Only the Hub's client is imported: a request takes half a second.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_session, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from lcm_distill import redaction

# The 4xx that a later try may not have: timeout, conflict, precondition, too early, too many requests.
_TEMPORARY = (408, 409, 412, 425, 429)


def create(api: HfApi, repo_id: str) -> dict[str, Any]:
    """Creates the repository unless it exists; its `repo_id` with the owner. Raises without write access."""
    full_id = api.create_repo(repo_id, exist_ok=True).repo_id
    try:
        api.auth_check(full_id, write=True)  # if it exists, create_repo accepts a token that can only read
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise
    return {"repo_id": full_id}


def read_licence(api: HfApi, repo_id: str) -> dict[str, Any]:
    """The licence in the model's card, with the card's keys; empty if it names none."""
    card = api.model_info(repo_id, expand=["cardData"]).card_data
    known = card.to_dict() if card else {}
    names = ("license", "license_name", "license_link")
    return {"licence": {name: known[name] for name in names if known.get(name)}}


def upload(api: HfApi, repo_id: str, folder: str, files: list[str], message: str) -> dict[str, Any]:
    """Uploads the `files` of `folder`, named relative to it, in one commit: all of them or none."""
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=Path(folder) / name) for name in files]
    return {"url": api.create_commit(repo_id, additions, commit_message=message).commit_url}


_ACTIONS: dict[str, Callable[..., dict[str, Any]]] = {"create": create, "read_licence": read_licence, "upload": upload}


def _set_timeout(seconds: float) -> None:
    """Makes every request fail after so many seconds without a byte; by default the client waits forever."""
    session = get_session()
    kind, hooks = type(session), session.event_hooks  # versions of the client differ in their HTTP library
    set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=seconds))


def _is_refusal(error: Exception) -> bool:
    """Whether the same request would fail again: no access, an invalid name, not a temporary error."""
    if isinstance(error, HfHubHTTPError):
        return 400 <= error.response.status_code < 500 and error.response.status_code not in _TEMPORARY
    return isinstance(error, (HFValidationError, OfflineModeIsEnabled))


def _brief(error: BaseException, token: str) -> str:
    """The first lines of an error and of its cause, without the token and the queries of signed URLs."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [f"{type(e).__name__}: {(str(e).strip() or '-').splitlines()[0]}" for e in (error, cause)]
    return redaction.mask(re.sub(r"\?[^\s'\"]+", "?…", "; ".join(dict.fromkeys(lines))).replace(token, "***"))


def main() -> None:
    request = json.load(sys.stdin)
    action, token, timeout = request.pop("action"), request.pop("token"), request.pop("timeout")
    redaction.protect(tokens=[token])
    redaction.install(["stderr"])  # the client warns of its retries, with signed URLs; the answer is what it is
    _set_timeout(timeout)
    try:
        answer = _ACTIONS[action](HfApi(token=token), **request)
    except (
        Exception
    ) as error:  # no connection, no access, an invalid name, an answer that is not JSON: each its own class
        answer = {"error": _brief(error, token), "refused": _is_refusal(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
