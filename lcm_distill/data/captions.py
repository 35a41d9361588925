"""Where a sample's captions are: which files and which keys of its JSON."""

import json

from lcm_distill.data.filters import look_up
from lcm_distill.data.raw import CAPTION_NOT_UTF8, CODE_BEARING, NO_CAPTION, PICTURES, BadSample, RawSample
from lcm_distill.errors import UsageError

CAPTIONS = ("txt", "text", "caption")


def check_caption_column(column: str | None) -> str | None:
    """`--caption_column` as the readers take it, without spaces around it or a dot before it. None stays None.

    The column names a file of the sample by its extension (`txt`, `blip`, `blip.txt`), or a key of its JSON
    (`top_caption`; `meta.caption` is the key `caption` of the object `meta`). `json.KEY` names the JSON's key only.

    Raises:
        UsageError: nothing given, or the extension of a picture, of a JSON, or of a file that can hold code.
    """
    if column is None:
        return None
    cleaned = column.strip().removeprefix(".")
    instead = "Give the extension of a text file in the samples, such as txt or blip.txt, or a key of their JSON"
    if not cleaned or cleaned.endswith("."):
        raise UsageError(f"--caption_column {column!r} names nothing. {instead}.")
    if _in_json_only(cleaned):
        return cleaned
    parts = cleaned.lower().split(".")
    if CODE_BEARING.intersection(parts):
        raise UsageError(
            f"--caption_column {column}: files of that kind can hold code, and are never read. {instead} "
            f"(written json.{cleaned} if the key is called so)."
        )
    if parts[-1] in (*PICTURES, "json"):
        what = "a whole JSON file" if parts[-1] == "json" else "a picture"
        raise UsageError(f"--caption_column {column}: that is {what}, not a caption. {instead}, such as caption.")
    return cleaned


def _in_json_only(column: str) -> bool:
    return column.lower().startswith("json.")


def json_key(column: str) -> str:
    """The key, or the path of keys, that a caption column names in the sample's JSON."""
    return column[len("json.") :] if _in_json_only(column) else column


def caption_files(column: str | None) -> tuple[str, ...]:
    """The extensions, in lower case, of the files in which a caption may be; `column` as `check_caption_column` gives.

    The JSON always is the last: it also tells the picture's original size.
    """
    if column is None:
        return (*CAPTIONS, "json")
    return ("json",) if _in_json_only(column) else (column.lower(), "json")


CAPTION_KEYS = ("caption", "text")
MAX_CAPTION = 4096  # characters; text encoders read some 77 tokens


def read_json(raw: RawSample) -> dict:
    """The sample's JSON; {} for none, a broken one, or one that is not an object: JSON is never a reason to drop."""
    try:
        content = json.loads(raw.files.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def caption_reasons(column: str | None) -> tuple[str, str]:
    """Why a sample without a caption is dropped, and one whose caption is not UTF-8."""
    if column is None:
        return NO_CAPTION, CAPTION_NOT_UTF8
    return f'no caption in "{column}" (--caption_column)', f'caption in "{column}" (--caption_column) is not UTF-8'


def read_captions(raw: RawSample, meta: dict, caption_column: str | None = None) -> tuple[list[str], str]:
    """(the sample's captions, where they come from); empty ones do not count.

    Args:
        meta: its JSON, by `read_json`.
        caption_column: as `check_caption_column` gives it: the file with this extension, or, if that has no text,
            the JSON's key of this name, are the only places to look. None: `CAPTIONS` and `CAPTION_KEYS`, in order.

    Raises:
        BadSample: there is none.
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
        # JSON can spell half a surrogate pair, which no tokenizer takes.
        cleaned = [t.encode("utf-8", "replace").decode().strip()[:MAX_CAPTION] for t in texts if isinstance(t, str)]
        if any(cleaned):
            return [text for text in cleaned if text], source
    raise BadSample(reason)
