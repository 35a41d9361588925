"""Pack a folder of captioned pictures into WebDataset shards for the training programs.

    python -m lcm_distill.pack_shards photos shards
    python -m lcm_distill.pack_shards photos shards --max_size 1024 --caption_column blip

IMAGES is searched with all its subfolders. Hidden files are skipped, and so are links to folders and links to files
outside IMAGES: to pack what links point to, copy the folder with cp -rL. (Links of a snapshot in Hugging Face's cache
into its own blobs are followed.) The caption of cats/a.jpg
is in the text file cats/a.txt (or a.text, a.caption), or else in a row of a metadata.jsonl or metadata.csv:

    {"file_name": "cats/a.jpg", "text": "a cat on a mat", "licence": "CC0"}

There, file_name is relative to the metadata's folder, and the column caption, or else text, is a caption or a list of
captions; several rows for one picture give it several captions. With --caption_column only that column is used. All
other columns go into the sample's JSON; original_width and original_height, if given, become SDXL's original size (of a
picture that EXIF turns by 90 degrees, whether they are from before or after that).

JPEG, PNG and WebP files are stored byte for byte; others (BMP, TIFF, AVIF, the first frame of a GIF) become PNG, and so
does HEIC where pillow-heif is installed (pip install pillow-heif). What is not stored byte for byte becomes sRGB by its
colour profile; training does the same with the others. Each picture is decoded once to check it: what cannot be trained
on is skipped, and listed in OUT/manifest.jsonl, as are pictures of kinds that are not read.

The same files and flags give the same shards, bit for bit. A shard gets its name only when it is complete: after a
kill, a full disk or Ctrl-C the same command continues with the others.
"""

import argparse
import shlex
import sys
from pathlib import Path

from lcm_distill import flags
from lcm_distill.data.packing import MANIFEST, Settings, describe_skipped, pack_shards
from lcm_distill.data.raw import printable
from lcm_distill.data.tar import RESUME_HINT
from lcm_distill.errors import run_program, shown
from lcm_distill.flags import SHARDS_FLAG


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags.CommandParser("python -m lcm_distill.pack_shards", __doc__, "%(prog)s IMAGES OUT [flags]")
    add = parser.add_argument
    add("images", type=flags.path, metavar="IMAGES", help="folder of pictures and their captions")
    add(
        "out",
        type=flags.path,
        metavar="OUT",
        help="folder for the shards: new, empty, or from an earlier run to continue",
    )
    add("--caption_column", help="take captions only from this column of the metadata, and from no text file")
    add(
        "--max_size",
        type=flags.positive_int,
        help="shrink pictures whose shorter side has more pixels to this many: JPEG and WebP become JPEG of quality "
        "95, others PNG; the JSON has the original size (default: keep all sizes)",
    )
    add(
        "--samples_per_shard",
        type=flags.positive_int,
        default=1000,
        help="maximum samples per shard; all shards get about as many",
    )
    add("--max_shard_mb", type=flags.positive_int, default=2000, help="approximate maximum megabytes per shard")
    add("--seed", type=flags.number(int), default=0, help="seed of the random order of all pictures")
    add(
        "--num_workers",
        type=flags.positive_int,
        help="processes, each of which writes one shard at a time (default: one per CPU core that it may use)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    settings = vars(parse_args(argv))
    images, out, num_workers = (settings.pop(name) for name in ("images", "out", "num_workers"))
    try:
        packed = pack_shards(images, out, Settings(**settings), num_workers)
    except KeyboardInterrupt:
        print(f"interrupted. {RESUME_HINT}", file=sys.stderr)
        sys.exit(130)
    if packed.skipped:
        listed = printable(str(Path(out, MANIFEST)), 1000)
        print(f"skipped; all of them are listed in {listed}:\n{describe_skipped(packed.skipped)}")
    print(
        f"{packed.shards} shard{'s' * (packed.shards != 1)}, {packed.samples} samples, {packed.bytes / 10**6:.1f} MB: "
        f"train with {SHARDS_FLAG} {shown(shlex.quote(out))}"
    )


if __name__ == "__main__":
    run_program(main, resume_hint="")
