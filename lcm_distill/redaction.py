"""Keeps secrets inside the process: logins and signatures in URLs, commands, tokens.

    install()                  # from here on nothing that is printed, logged, warned of or raised shows them
    protect(shards)            # these may be commands, or have logins and signatures
    public_flags(flags)        # what may be written to files, trackers and the Hub

What is secret is replaced by "…" or "***" at the few places that all text passes: the streams stdout and stderr (under
every tracker that records them), the records of all loggers, warnings, and the command line, in `sys.argv` and for
`ps`. Of URLs, the login and the query are secret, of commands all, of the rest what looks like a token or a signature.
"""

import bisect
import contextlib
import ctypes
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

_COMMAND = re.compile(r"\s*pipe:", re.IGNORECASE)

# The login in a URL, up to the last @ before its path. A password may hold an @, or a / that should have been %2F: what
# is between a colon and the path is a port only if it is a number.
_LOGIN = r"(?<=://)(?:[^/?#{0}]*@|[^/@:{0}]*:(?!\d{{1,5}}(?:[/?#{0}]|$))[^{0}]*@)"
_EXACT_LOGIN = re.compile(_LOGIN.format(r"\n"))  # of a URL that stands alone
_LOGIN_IN_TEXT = re.compile(_LOGIN.format(r"\s'\"<>"))

# URLs are looked for in one word of a text at a time, in a time that grows as its length: a server's message may be
# long, and made to be slow to read.
_WORD = re.compile(r"[^\s'\"<>]+")
_URL = re.compile(r"://|:\\/\\/")  # as it is, and as JSON may have it
_JSON_LOGIN = re.compile(r"(?<=:\\/\\/)[^\\]*@")
_QUERY = re.compile(r"\?(?!…)")
_PATH = re.compile(r"(?:^|[(=:])/")  # urllib3 writes the path alone
# What :// is when it is percent-encoded, once or repeatedly; then @ and ? likewise.
_ENCODED = re.compile(r"%(?:25)*3A(?:%(?:25)*2F|/){2}", re.IGNORECASE)
_ENCODED_LOGIN = re.compile(rf"({_ENCODED.pattern})(?:(?!%(?:25)*2F)[^/])*(%(?:25)*40)", re.IGNORECASE)
_ENCODED_QUERY = re.compile(r"%(?:25)*3F", re.IGNORECASE)


def _mask_word(match: re.Match[str]) -> str:
    """A word of a text without the logins and queries of the URLs in it, and without the query of a path."""
    word = match[0]
    path = _PATH.search(word)
    if url := _URL.search(word):
        logins_end = word.rfind("@") + 1
        logins = _JSON_LOGIN.sub("…@", _LOGIN_IN_TEXT.sub("…@", word[:logins_end]))
        word = _cut_query(logins + word[logins_end:], min(url.end(), path.end() if path else url.end()))
    elif path and "=" in word.partition("?")[2][1:]:
        word = _cut_query(word, path.end())
    if _ENCODED.search(word):
        word = "&".join(map(_mask_encoded, word.split("&")))
    return word


def _cut_query(word: str, start: int) -> str:
    """`word` with "…" for what follows the first question mark after `start`, but for the punctuation at its end."""
    mark = _QUERY.search(word, start)
    query = word[mark.end() :].rstrip(").,;:]}") if mark else ""
    return f"{word[: mark.end()]}…{word[mark.end() + len(query) :]}" if mark and query else word


def _mask_encoded(word: str) -> str:
    word = _ENCODED_LOGIN.sub(r"\1…\2", word)
    url = _ENCODED.search(word)
    query = _ENCODED_QUERY.search(word, url.end()) if url else None
    return word[: query.end()] + "…" if query and query.end() < len(word) else word


_IN_TEXT = [
    (re.compile(r"(?i)(\bauthorization\W{1,4})(?:(?:bearer|basic|token)\s+)?[^\s'\"\\,;]+"), r"\1…"),
    (re.compile(r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}"), r"\1…"),
    (
        re.compile(
            r"(?i)((?:signature|credential|security-token|access[_-]?key|access_token|api[_-]?key|password|passwd"
            r"|secret|\bsig|\btoken)=)[^\s&'\"<>,;)…]{4,}"
        ),
        r"\1…",
    ),
    (
        re.compile(
            r"(?i)((?:security-token|auth-token|access[_-]?key|access_token|api[_-]?key|password|passwd|client_secret)"
            r"['\"]?\s*:\s*['\"]?)[^\s'\"<>,;)…]{8,}"
        ),
        r"\1…",
    ),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "hf_…"),
    (re.compile(r"(?i)(\b(?:set-)?cookie['\"]?\s{0,4}:\s{0,4}['\"]?)[^\s=;,'\"]{1,100}=[^\n'\"]*"), r"\1…"),
]
_MAY_HOLD_SECRETS = re.compile(
    r"(?i)://|:\\/|%(?:25)*3A|pipe:|[?=]|authorization|bearer|hf_|token|key|passw|secret|cookie"
)

# What libraries find in the environment: WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD and others.
_VARIABLES = re.compile(
    r"(?:^|_)(?:TOKEN|API_?KEY|SECRET|SECRET_\w*KEY|STORAGE_KEY|ACCOUNT_KEY|SAS_TOKEN|PASSWORD|CONNECTION_STRING)$"
)

_tokens: set[str] = set()
_shards: list[str] = []  # those with secrets, as they are and as messages quote them; sorted
_shown: dict[str, str] = {}  # each of them, to what is shown instead


def mask_shards(spec: str) -> str:
    """What --train_shards_path_or_url names, without commands, logins and URL queries: each is cut to "…"."""
    return "::".join(map(_mask_shard, spec.split("::")))


def _mask_shard(shard: str) -> str:
    if _COMMAND.match(shard):
        return "pipe:…"
    if "://" not in shard:
        return shard
    address, query, _ = _EXACT_LOGIN.sub("…@", shard, count=1).partition("?")
    address, fragment, _ = address.partition("#") if "=" in address.partition("#")[2] else (address, "", "")
    return f"{address}{query or fragment}…" if query or fragment else address


def protect(shards: Iterable[str] = (), *, tokens: Iterable[str | None] = ()) -> None:
    """From here on `mask` knows these: paths, URLs and commands of `shards`, and `tokens`."""
    _tokens.update(token for token in tokens if token)
    found: dict[str, str] = {}
    for shard in shards:
        if (shown := _mask_shard(shard)) != shard:
            # As they are, and as repr, JSON and the shell write them.
            found |= dict.fromkeys((shard, repr(shard)[1:-1], json.dumps(shard)[1:-1]), shown)
    if new := found.keys() - _shown.keys():
        _shown.update(found)
        _shards.extend(new)
        _shards.sort()


def mask(text: str) -> str:
    """`text` without secrets."""
    for token in _tokens:
        text = text.replace(token, "***")
    if not _MAY_HOLD_SECRETS.search(text):
        return text
    if _shards:
        text = _mask_known(text)
    text = _WORD.sub(_mask_word, text)
    for pattern, instead in _IN_TEXT:
        text = pattern.sub(instead, text)
    return text


_CUT = re.compile(r"(?:\.\.\.|…|['\"<>\s)]|$)")  # what follows where a text was cut
_ANCHOR = re.compile(r"(?i)(?:pipe|[a-z][a-z0-9+.-]*(?=://)):")


def _mask_known(text: str) -> str:
    """`text` without the secrets of the shards that were given to `protect`, whatever characters they hold."""
    done, end = [], 0
    for anchor in _ANCHOR.finditer(text):
        start = anchor.start()
        if start < end:
            continue
        rest = text[start:]
        place = bisect.bisect_right(_shards, rest)
        nearest = max(
            _shards[max(0, place - 1) : place + 1], key=lambda shard: len(os.path.commonprefix([shard, rest]))
        )
        equal = len(os.path.commonprefix([nearest, rest]))
        if equal == len(nearest):
            done += [text[end:start], _shown[nearest]]
        elif _COMMAND.match(rest) and equal >= min(len(nearest), 16):  # cut short, or quoted in another way
            equal = len(rest.partition("\n")[0])
            done += [text[end:start], "pipe:…"]
        elif (login := _EXACT_LOGIN.search(nearest)) and equal > login.start() and equal < login.end():
            # Cut short before the @ by which a login is known. Of another URL of this host, or user, there is more.
            if not _CUT.match(text, start + equal):
                continue
            done += [text[end:start], nearest[: login.start()], "…"]
        else:
            continue
        end = start + equal
    return "".join([*done, text[end:]])


def public_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """`flags` without tokens, and without the commands (`pipe:`), logins and URL queries in them, cut to "…"."""
    public = {name: value for name, value in flags.items() if "token" not in name}
    return {name: _public(value, mask_shards if "shards" in name else _mask_urls) for name, value in public.items()}


def _public(value: Any, masked: Callable[[str], str]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_public(item, masked) for item in value)
    return masked(value) if isinstance(value, str) else value


def _mask_urls(value: str) -> str:
    """The value of any other flag: a prompt is as it was given, and so are its question marks."""
    return _WORD.sub(lambda word: _mask_word(word) if "://" in word[0] else word[0], value)


# ------------------------------------------------------------------------------------------------ the process's text


class _MaskedStream:
    """A text stream whose writes are masked first, and only then seen by whatever else has replaced its `write`.

    Trackers record the console by assigning to `write`: what they assign is called with text that is masked already.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._inner: Callable[[str], Any] = stream.write

    @property
    def write(self) -> Callable[[str], Any]:
        inner = self._inner

        def masked(text: str) -> Any:
            shown = mask(text) if isinstance(text, str) else text
            if shown == text:
                return inner(text)
            try:
                shown.encode(getattr(self._stream, "encoding", None) or "utf-8")
            except UnicodeEncodeError:
                shown = shown.replace("…", "...")
            inner(shown)
            return len(text)

        return masked

    @write.setter
    def write(self, function: Callable[[str], Any]) -> None:
        self._inner = function

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stream"], name)

    def __iter__(self) -> Any:
        return iter(self._stream)


def install(streams: Sequence[str] = ("stdout", "stderr")) -> None:
    """Masks everything that this process prints, logs, warns of or raises from here on. May be called again."""
    found = {value.strip() for name, value in os.environ.items() if _VARIABLES.search(name.upper())}
    protect(tokens=[value for value in found if len(value) >= 8])
    for name in streams:
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _MaskedStream):
            setattr(sys, name, _MaskedStream(stream))
    if not hasattr(logging.getLogRecordFactory(), "masks"):
        logging.setLogRecordFactory(_masking_records(logging.getLogRecordFactory()))
    if not hasattr(warnings.formatwarning, "masks"):
        warnings.formatwarning = _masking_warnings(warnings.formatwarning)


def _masking_records(make: Callable[..., logging.LogRecord]) -> Callable[..., logging.LogRecord]:
    def record(*args: Any, **options: Any) -> logging.LogRecord:
        made = make(*args, **options)
        with contextlib.suppress(Exception):  # a message that does not fit its arguments is reported by its handler
            text = made.getMessage()
            if (shown := mask(text)) != text:
                made.msg, made.args = shown, ()
        if made.exc_info and made.exc_info[0] is not None:
            made.exc_text = mask(logging.Formatter().formatException(made.exc_info))  # what formatters would do
        return made

    record.masks = True  # type: ignore[attr-defined]
    return record


def _masking_warnings(write: Callable[..., str]) -> Callable[..., str]:
    def warning(*args: Any, **options: Any) -> str:
        return mask(write(*args, **options))

    warning.masks = True  # type: ignore[attr-defined]
    return warning


# -------------------------------------------------------------------------------------------------- the command line


def hide_in_command_line(shards: str | None = None, token: str | None = None) -> None:
    """Masks the secrets in `sys.argv`, which trackers record, and in the command line that `ps` shows (on Linux).

    `shards` and `token` are the values of flags. A launcher's own command line, which has them too, stays as it is.
    """
    protect((shards or "").split("::"), tokens=[token])

    def masked(word: str) -> str:
        if shards:
            word = word.replace(shards, mask_shards(shards))
        return mask(word)

    secrets = [os.fsencode(secret) for secret in ([token] if token else []) + _secrets_of(shards or "")]
    sys.argv = list(map(masked, sys.argv))
    sys.orig_argv = list(map(masked, sys.orig_argv))
    if secrets:
        with contextlib.suppress(OSError, ValueError, IndexError):
            _overwrite_command_line(secrets)


def _secrets_of(spec: str) -> list[str]:
    """The parts of --train_shards_path_or_url that `mask_shards` leaves out."""
    found = []
    for shard in spec.split("::"):
        if command := _COMMAND.match(shard):
            found.append(shard[command.end() :])
        elif "://" in shard:
            login = _EXACT_LOGIN.search(shard)
            found += [login[0][:-1]] if login else []
            found.append(shard[login.end() if login else 0 :].partition("?")[2])
    return sorted(filter(None, found), key=len, reverse=True)


def _overwrite_command_line(secrets: Iterable[bytes]) -> None:
    """Overwrites the secrets by asterisks where Linux keeps the command line of this process."""
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, see proc(5)
    line = Path("/proc/self/cmdline").read_bytes()
    if not 0 < start < end or ctypes.string_at(start, end - start) != line:
        return
    for secret in secrets:
        line = line.replace(secret, b"*" * len(secret))
    ctypes.memmove(start, line, len(line))
