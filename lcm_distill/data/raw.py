"""A sample before it is decoded: its files, the kinds of files there are, and why a sample is left out."""

from dataclasses import dataclass, field

PICTURES = ("jpg", "jpeg", "png", "webp", "avif", "jfif", "bmp", "gif", "tif", "tiff")
LATENTS = "latents.safetensors"  # in place of a picture: `lcm_distill.data.encoded`
# What other readers unpickle or run: never read here, not even as the text of a caption.
CODE_BEARING = frozenset("pyd pkl pickle dill joblib pth pt ckpt bin npy npz ten tb py pyc sh so dll exe".split())


# Why a sample is left out.
NO_PICTURE = "no picture (.jpg, .png, .webp or another known kind)"
NO_CAPTION = "no caption (.txt, .text, .caption or a JSON caption)"
CAPTION_NOT_UTF8 = "caption is not UTF-8"
NOT_A_PICTURE = "picture file holds no picture"
DAMAGED_PICTURE = "picture is damaged or cut short"
HUGE_PICTURE = "picture is too large (a decompression bomb)"
HUGE_FILE = "file is too large"
DUPLICATE_NAME = "two files of one name in a sample"
UNREADABLE_SHARD = "shard cannot be read, or not to its end"
NO_LATENTS = "no latents (.latents.safetensors), as the other samples have"
DAMAGED_LATENTS = "latents are damaged, or not what the shard says"


class BadSample(Exception):
    """This sample is not used; `reason` is one of the constants above, of `caption_reasons`, or a filter's."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass
class RawSample:
    """The undecoded files of one sample: extension (lower case) to content."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    duplicate: bool = False  # a name came twice: which caption goes with which picture cannot be known
    too_large: bool = False  # one of its files was left unread
    end: int | None = None  # the byte of the shard from which on the other samples are read; None: not known
    last: bool = False  # the shard ends with it

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.files.values()))


def list_counts(counts: dict[str, int]) -> str:
    """ "3 x .jpg, 1 x .txt", the most frequent first, at most twenty kinds; "nothing" for none."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listed = [f"{count} x {printable(what)}" for what, count in ordered[:20]]
    if ordered[20:]:
        listed.append(f"{len(ordered) - 20} more kinds")
    return ", ".join(listed) or "nothing"


def printable(text: str) -> str:
    """Names in a hostile tar may hold what no terminal can show, what it would obey, or a megabyte."""
    shown = "".join(character if character.isprintable() else "?" for character in text[:200])
    return shown + "..." * (len(text) > 200)
