"""The upload to the Hub: a refusal is known before training, a failure is retried and never ends a run.

Each request runs in a process of its own, `hub_client`, since only a process can be stopped: uploads go through the
client's Xet library, compiled code that respects no timeout of httpx.
"""

import json
import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import get_token

from lcm_distill.errors import UsageError

logger = logging.getLogger(__name__)


class _Refused(Exception):
    """The Hub refuses, and would refuse the same request again."""


class _Unreachable(Exception):
    """No answer, or an error that another try may not have."""


class HubUpload:
    """The upload of a run's result. A wrong token or name is an error at once, before training.

    If the Hub cannot be reached then, that is a warning, and the repository is created at the end instead.

    Args:
        timeout: seconds without a byte after which a request fails.
        retry_delays: seconds between two tries at the end.
        time_limit: seconds for one action at the end, with all its tries and delays; an upload has the time that its
            files take at 1 MB/s in addition.

    Raises:
        UsageError: no token, no write access, an invalid name, the client's offline mode.
    """

    def __init__(
        self,
        repo_id: str | None,
        token: str | None,
        output_dir: str,
        *,
        timeout: float = 60.0,
        retry_delays: Sequence[float] = (10.0, 30.0, 90.0),
        time_limit: float = 600.0,
    ):
        self.repo_id = repo_id or Path(output_dir).resolve().name
        self._folder = Path(output_dir)
        self._timeout, self._retry_delays, self._time_limit = timeout, tuple(retry_delays), time_limit
        self._staged: tuple[list[str], str] = [], ""
        self._missing: str | None = None  # why the repository could not be created
        self._token = token or get_token()
        if not self._token:
            raise UsageError(
                "--push_to_hub: there is no token. Set HF_TOKEN, log in with `hf auth login`, or give --hub_token."
            )
        try:
            self.repo_id = self._ask("create", 2 * timeout, repo_id=self.repo_id)["repo_id"]
        except _Refused as error:
            raise UsageError(
                f"--push_to_hub: the Hub refused the repository {self.repo_id!r} ({error}). Check --hub_model_id "
                "(NAME, or OWNER/NAME), that the token (--hub_token, HF_TOKEN or `hf auth login`) has write access, "
                "and that HF_HUB_OFFLINE is not set; or leave out --push_to_hub."
            ) from None
        except _Unreachable as error:
            self._missing = str(error)
            logger.warning(
                "--push_to_hub: the Hub cannot be reached now (%s). The run continues; whether it can write to %s is "
                "checked at its end.",
                error,
                self.repo_id,
            )

    def ensure_repository(self, base_model: str | None) -> dict[str, Any]:
        """Creates the repository unless it exists, so that `repo_id` has its owner. Never raises.

        Returns the licence of `base_model`, a Hub id, as a card's `license`, `license_name` and `license_link`; empty
        without one, or if it cannot be read.
        """
        if self._missing:
            try:
                self.repo_id = self._retry("create", repo_id=self.repo_id)["repo_id"]
                self._missing = None
            except (_Refused, _Unreachable) as error:
                self._missing = str(error)
        if not base_model or self._missing:
            return {}
        try:
            licence: dict[str, Any] = self._retry("read_licence", tries=2, repo_id=base_model)["licence"]
        except (_Refused, _Unreachable) as error:
            logger.warning("the licence of %s could not be read (%s); the model card names none", base_model, error)
            return {}
        if "://" not in licence.get("license_link", "://"):  # a file of that repository
            licence["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{licence['license_link']}"
        return licence

    def stage(self, files: Sequence[str], message: str) -> None:
        """Sets the `files` that `push` uploads, relative to the output folder, and the commit's message."""
        self._staged = list(files), message

    def push(self) -> bool:
        """Uploads the staged files in one commit; returns False if that failed.

        It may take longer than other ranks can wait, so a program calls it last. A failure is logged with the command
        that uploads the result, never raised: the result is on the disk.
        """
        files, message = self._staged
        if not files:
            return True
        time_limit = self._time_limit + sum((self._folder / name).stat().st_size for name in files) / 1e6
        request: dict[str, Any] = dict(folder=str(self._folder.resolve()), files=files, message=message)
        try:
            if self._missing:
                raise _Unreachable(self._missing)
            answer = self._retry("upload", time_limit=time_limit, repo_id=self.repo_id, **request)
        except (_Refused, _Unreachable) as error:
            chosen = [word for name in files for word in ("--include", name)]
            logger.error(
                "the upload to %s failed (%s). The result is complete in %s; upload it with: %s",
                self.repo_id,
                error,
                self._folder,
                shlex.join(["hf", "upload", self.repo_id, str(self._folder), ".", *chosen]),
            )
            return False
        logger.info("uploaded: %s", answer["url"])
        return True

    def _retry(
        self, action: str, *, tries: int | None = None, time_limit: float | None = None, **request: Any
    ) -> dict[str, Any]:
        """Asks until there is an answer, at most `tries` times (None: once, and once after each delay)."""
        end = time.monotonic() + (self._time_limit if time_limit is None else time_limit)
        delays = iter(self._retry_delays if tries is None else self._retry_delays[: tries - 1])
        while True:
            try:
                return self._ask(action, end - time.monotonic(), **request)
            except _Unreachable as error:
                delay = next(delays, None)
                if delay is None or time.monotonic() + delay >= end:
                    raise
                logger.warning("the Hub cannot be reached now (%s); trying again in %g s", error, delay)
                time.sleep(delay)

    def _ask(self, action: str, seconds: float, **request: Any) -> dict[str, Any]:
        """The answer of `hub_client`, which is killed after `seconds`."""
        request |= {"action": action, "token": self._token, "timeout": self._timeout}
        try:
            done = subprocess.run(
                [sys.executable, "-m", f"{__package__}.hub_client"],
                input=json.dumps(request),
                stdout=subprocess.PIPE,
                text=True,
                timeout=seconds,
                cwd=Path(__file__).parents[2],  # so that the package is found if it is not installed
            )
            answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            raise _Unreachable(f"not done after {seconds:.0f} s") from None
        except (OSError, IndexError, ValueError) as error:
            raise _Unreachable(f"the Hub's client exited without an answer, {type(error).__name__}") from None
        if "error" in answer:
            raise (_Refused if answer["refused"] else _Unreachable)(answer["error"])
        return answer


def open_hub(accelerator: Accelerator, repo_id: str | None, token: str | None, output_dir: str) -> HubUpload | None:
    """A `HubUpload` on the main process, None on the others; a refusal is a `UsageError` on all of them."""
    upload, refusal = None, None
    if accelerator.is_main_process:
        try:
            upload = HubUpload(repo_id, token, output_dir)
        except UsageError as error:
            refusal = str(error)
    if refusal := broadcast_object_list([refusal])[0]:
        raise UsageError(refusal)
    return upload
