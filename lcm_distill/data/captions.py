"""Finds a sample's captions: in which files, and under which keys of its JSON."""

import json
from collections.abc import Sequence

from lcm_distill.data.filters import look_up
from lcm_distill.data.raw import CAPTION_NOT_UTF8, CODE_EXTENSIONS, NO_CAPTION, PICTURE_EXTENSIONS, BadSample, RawSample
from lcm_distill.errors import UsageError

# The usual places, in the order in which they are tried; files come before the JSON's keys.
CAPTION_EXTENSIONS = ("txt", "text", "caption")
CAPTION_KEYS = ("caption", "text")
MAX_CAPTION_LENGTH = 4096  # characters; text encoders read about 77 tokens


def check_caption_column(column: str | None) -> str | None:
    """Returns `--caption_column` without surrounding spaces and a leading dot, as the readers take it; None for None.

    The column names a file of the sample by its extension (`txt`, `blip`, `blip.txt`), or a key of its JSON
    (`top_caption`; `meta.caption` is the key `caption` of the object `meta`). `json.KEY` can only be a key of the JSON.

    Raises:
        UsageError: it is empty, or the extension of a picture, of a JSON, or of a file that can contain code.
    """
    if column is None:
        return None
    cleaned = column.strip().removeprefix(".")
    remedy = "Give the extension of a text file in the samples, such as txt or blip.txt, or a key of their JSON"
    if not cleaned or cleaned.endswith("."):
        raise UsageError(f"--caption_column {column!r} names nothing. {remedy}.")
    if _is_json_only(cleaned):
        return cleaned
    parts = cleaned.lower().split(".")
    if CODE_EXTENSIONS.intersection(parts):
        raise UsageError(
            f"--caption_column {column}: files of that kind can contain code, and are never read. {remedy} "
            f"(as json.{cleaned}, if that is its name)."
        )
    if parts[-1] in (*PICTURE_EXTENSIONS, "json"):
        kind = "a complete JSON file" if parts[-1] == "json" else "a picture"
        raise UsageError(f"--caption_column {column}: that is {kind}, not a caption. {remedy}, such as caption.")
    return cleaned


def _is_json_only(column: str) -> bool:
    return column.lower().startswith("json.")


def json_key(column: str) -> str:
    """The key of the sample's JSON, or the path of keys, that a caption column stands for."""
    return column[len("json.") :] if _is_json_only(column) else column


def caption_files(column: str | None) -> tuple[str, ...]:
    """The extensions, in lower case, of the files that may hold a caption; `column` is from `check_caption_column`.

    The JSON is always the last: it also has the picture's original size.
    """
    if column is None:
        return (*CAPTION_EXTENSIONS, "json")
    return ("json",) if _is_json_only(column) else (column.lower(), "json")


def read_json(raw: RawSample) -> dict:
    """The sample's JSON; {} if it is missing, broken or not an object: none of these is a reason to drop a sample."""
    try:
        content = json.loads(raw.files.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def caption_reasons(column: str | None) -> tuple[str, str]:
    """The reasons to drop a sample without a caption, and one whose caption is not UTF-8."""
    if column is None:
        return NO_CAPTION, CAPTION_NOT_UTF8
    return f'no caption in "{column}" (--caption_column)', f'caption in "{column}" (--caption_column) is not UTF-8'


def read_captions(raw: RawSample, meta: dict, caption_column: str | None = None) -> tuple[list[str], str]:
    """Returns (the sample's captions, at least one and none of them empty; where they come from).

    Args:
        meta: its JSON, from `read_json`.
        caption_column: as `check_caption_column` returns it. Captions then come only from the file with this
            extension, or, if that has no text, from the JSON's key of this name. None: `CAPTION_EXTENSIONS`, then
            `CAPTION_KEYS`, in order.

    Raises:
        BadSample: it has no caption.
    """
    reason, not_utf8 = caption_reasons(caption_column)
    sources: dict[str, object] = {}
    for extension in caption_files(caption_column)[:-1]:  # without the JSON
        try:
            sources["." + extension] = raw.files.get(extension, b"").decode("utf-8-sig")
        except UnicodeDecodeError:
            reason = not_utf8
    keys = CAPTION_KEYS if caption_column is None else (json_key(caption_column),)
    sources |= {f'JSON "{key}"': look_up(meta, key) for key in keys}
    for source, value in sources.items():
        texts = value if isinstance(value, list) else [value]
        cleaned = [clean_text(text)[:MAX_CAPTION_LENGTH] for text in texts if isinstance(text, str)]
        if any(cleaned):
            return [text for text in cleaned if text], source
    raise BadSample(reason)


def clean_text(text: str) -> str:
    """`text` without surrounding spaces; lone surrogates, which JSON can contain and no tokenizer takes, become "?"."""
    return text.encode("utf-8", "replace").decode().strip()


def describe_cut(counted: Sequence[tuple[int, int]]) -> str | None:
    """How many captions or prompts a text encoder cuts, as "3 of 16 are longer than …"; None if it cuts none.

    `counted` has for each (its tokens, how many the text encoder reads), as from `lcm_distill.models.tokenizer`.
    """
    cut = [pair for pair in counted if pair[0] > pair[1]]
    if not cut:
        return None
    tokens, limit = max(cut)
    verb = "is" if len(cut) == 1 else "are"
    return (
        f"{len(cut)} of {len(counted)} {verb} longer than the {limit} tokens that the text encoder reads, and cut off "
        f"there (the longest has {tokens})"
    )
