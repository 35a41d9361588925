"""The upload to the Hub: refused before training or not at all, retried, and never the end of a run."""

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
    """The Hub says no, and would say it again."""


class _Unreachable(Exception):
    """No answer, or one that a later try may better."""


class HubUpload:
    """The upload of a run's result. What is wrong with token or name shows at once, before training.

    A Hub that cannot be reached then is told as a warning; the repository is made at the end instead. `silence`:
    seconds without a byte after which a request fails. `pauses`: seconds between two tries at the end. `patience`:
    seconds that one thing may take at the end, its tries and pauses together; an upload has those of a line of 1 MB/s
    besides.

    Raises:
        UsageError: no token, no right to write, a name that cannot be, the client's offline mode.
    """

    def __init__(
        self,
        repo_id: str | None,
        token: str | None,
        output_dir: str,
        *,
        silence: float = 60.0,
        pauses: Sequence[float] = (10.0, 30.0, 90.0),
        patience: float = 600.0,
    ):
        self.repo_id = repo_id or Path(output_dir).resolve().name
        self._folder = Path(output_dir)
        self._silence, self._pauses, self._patience = silence, tuple(pauses), patience
        self._staged: tuple[list[str], str] = [], ""
        self._missing: str | None = None  # why the repository is not there
        self._token = token or get_token()
        if not self._token:
            raise UsageError(
                "--push_to_hub: there is no token. Set HF_TOKEN, log in with `hf auth login`, or give --hub_token."
            )
        try:
            self.repo_id = self._ask("create", 2 * silence, repo_id=self.repo_id)["repo_id"]
        except _Refused as error:
            raise UsageError(
                f"--push_to_hub: the Hub refused the repository {self.repo_id!r} ({error}). Check --hub_model_id "
                "(NAME, or OWNER/NAME), that the token (--hub_token, HF_TOKEN or `hf auth login`) may write there, "
                "and that HF_HUB_OFFLINE is not set; or leave out --push_to_hub."
            ) from None
        except _Unreachable as error:
            self._missing = str(error)
            logger.warning(
                "--push_to_hub: the Hub cannot be reached now (%s). The run goes on; whether it may write to %s shows "
                "at its end.",
                error,
                self.repo_id,
            )

    def ensure_repository(self, base_model: str | None) -> dict[str, Any]:
        """Makes the repository if it is not there yet, so that `repo_id` has its owner. Never raises.

        Returns the licence of `base_model`, a Hub id, as a card's `license`, `license_name` and `license_link`; empty
        without one, or if the Hub does not tell.
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
        """What `push` shall upload: `files`, named relative to the output folder."""
        self._staged = list(files), message

    def push(self) -> bool:
        """Uploads what is staged in one commit; whether it is there now (True too if there is nothing).

        It may take longer than other ranks can be kept waiting: a program calls it last of all. A failure is told with
        the command that mends it, never raised: the result is on the disk.
        """
        files, message = self._staged
        if not files:
            return True
        patience = self._patience + sum((self._folder / name).stat().st_size for name in files) / 1e6
        request: dict[str, Any] = dict(folder=str(self._folder.resolve()), files=files, message=message)
        try:
            if self._missing:
                raise _Unreachable(self._missing)
            answer = self._retry("upload", patience=patience, repo_id=self.repo_id, **request)
        except (_Refused, _Unreachable) as error:
            chosen = [word for name in files for word in ("--include", name)]
            logger.error(
                "the upload to %s failed (%s). The result is whole in %s; upload it with: %s",
                self.repo_id,
                error,
                self._folder,
                shlex.join(["hf", "upload", self.repo_id, str(self._folder), ".", *chosen]),
            )
            return False
        logger.info("uploaded: %s", answer["url"])
        return True

    def _retry(
        self, action: str, *, tries: int | None = None, patience: float | None = None, **request: Any
    ) -> dict[str, Any]:
        """Asks until there is an answer, at most `tries` times (None: once more than there are pauses)."""
        end = time.monotonic() + (self._patience if patience is None else patience)
        pauses = iter(self._pauses if tries is None else self._pauses[: tries - 1])
        while True:
            try:
                return self._ask(action, end - time.monotonic(), **request)
            except _Unreachable as error:
                pause = next(pauses, None)
                if pause is None or time.monotonic() + pause >= end:
                    raise
                logger.warning("the Hub cannot be reached now (%s); tried again in %g s", error, pause)
                time.sleep(pause)

    def _ask(self, action: str, seconds: float, **request: Any) -> dict[str, Any]:
        """The answer of `hub_client`, which is stopped after so many `seconds`."""
        request |= {"action": action, "token": self._token, "silence": self._silence}
        try:
            done = subprocess.run(
                [sys.executable, "-m", f"{__package__}.hub_client"],
                input=json.dumps(request),
                stdout=subprocess.PIPE,
                text=True,
                timeout=seconds,
                cwd=Path(__file__).parents[2],  # where the package is found, installed or not
            )
            answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            raise _Unreachable(f"not done after {seconds:.0f} s") from None
        except (OSError, IndexError, ValueError) as error:
            raise _Unreachable(f"the Hub's client ended without an answer, {type(error).__name__}") from None
        if "error" in answer:
            raise (_Refused if answer["refused"] else _Unreachable)(answer["error"])
        return answer


def open_hub(accelerator: Accelerator, repo_id: str | None, token: str | None, output_dir: str) -> HubUpload | None:
    """The upload on the main process, None on the others; a refusal is a `UsageError` on all of them."""
    upload, refusal = None, None
    if accelerator.is_main_process:
        try:
            upload = HubUpload(repo_id, token, output_dir)
        except UsageError as error:
            refusal = str(error)
    if refusal := broadcast_object_list([refusal])[0]:
        raise UsageError(refusal)
    return upload
