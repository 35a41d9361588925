"""A sample before it is decoded: its files, the known kinds of files, and the reasons to leave a sample out."""

from dataclasses import dataclass, field

PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "avif", "jfif", "bmp", "gif", "tif", "tiff")
LATENTS_EXTENSION = "latents.safetensors"  # in place of a picture: `lcm_distill.data.encoded`
# What other readers unpickle or run. Never read here, not even as the text of a caption.
CODE_EXTENSIONS = frozenset("pyd pkl pickle dill joblib pth pt ckpt bin npy npz ten tb py pyc sh so dll exe".split())

# Why a sample is left out. These are stored in the shards of `encode_shards` and the manifests of `pack_shards`.
NO_PICTURE = "no picture (.jpg, .png, .webp or another known kind)"
NO_CAPTION = "no caption (.txt, .text, .caption or a JSON caption)"
CAPTION_NOT_UTF8 = "caption is not UTF-8"
NOT_A_PICTURE = "picture file holds no picture"
DAMAGED_PICTURE = "picture is damaged or cut short"
UNKNOWN_RANGE = "grey values of an unknown range (save the picture with 8 or 16 bits)"
NOT_ALL_BITS = "16-bit colour whose upper bits are empty (save the picture with 8 bits)"
OTHER_KIND = "picture of a kind that is not read (save it as JPEG, PNG, WebP or TIFF)"
UNREAD_TIFF = "TIFF of a kind that is not read (save the picture with 8 or 16 bits)"
HEIC = "HEIC (for pack_shards to read it: pip install pillow-heif)"
NO_AVIF = "AVIF, which this Pillow does not read"
HUGE_PICTURE = "picture is too large (a decompression bomb)"
LARGE_PICTURE = "picture takes more memory to decode than --max_decode_mb allows"
HUGE_FILE = "file is too large"
DOTTED_NAME = "dots in a picture's name, of which the first begins the extension (write a_b.jpg, not a.b.jpg)"
DUPLICATE_NAME = "two files of one name in a sample"
UNREADABLE_SHARD = "shard cannot be read, or not to its end"
CHANGED_SHARD = "shard has changed since the checkpoint (its samples may be missing, or come twice)"
NO_LATENTS = "no latents (.latents.safetensors), as the other samples have"
DAMAGED_LATENTS = "latents are damaged, or not what the shard says"


class BadSample(Exception):
    """A sample that cannot be used; `reason` is a constant above, one of `caption_reasons`, or a filter's."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass
class RawSample:
    """The undecoded files of one sample: extension (lower case) to content."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    duplicate: bool = False  # a name came twice, so it is unknown which caption belongs to which picture
    too_large: bool = False  # one of its files was too large to be read
    end: int | None = None  # the byte of the shard at which the next sample begins; None: not known
    last: bool = False  # it is the last of its shard

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.files.values()))


def list_counts(counts: dict[str, int]) -> str:
    """ "3 x .jpg, 1 x .txt", the most frequent first, at most twenty kinds; "nothing" if there are none."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listed = [f"{count} x {printable(name)}" for name, count in ordered[:20]]
    if ordered[20:]:
        listed.append(f"{len(ordered) - 20} more kinds")
    return ", ".join(listed) or "nothing"


def printable(text: str, most: int = 200) -> str:
    """At most so many characters of `text`, without control characters: names in a hostile tar can be anything."""
    shown = "".join(character if character.isprintable() else "?" for character in text[:most])
    return shown + "..." * (len(text) > most)
