"""Pack a folder of captioned pictures into WebDataset shards, as the training programs read them.

    python -m lcm_distill.pack_shards photos shards
    python -m lcm_distill.pack_shards photos shards --max_size 1024 --caption_column blip

IMAGES is searched with all folders in it (hidden files and links to folders are passed over). The caption of
cats/a.jpg is the text file cats/a.txt (or a.text, a.caption), else its row in a metadata.jsonl or metadata.csv:

    {"file_name": "cats/a.jpg", "text": "a cat on a mat", "licence": "CC0"}

There file_name starts at the metadata's folder, and the column caption, else text, is a caption or a list of them;
several rows for one picture give it several captions. With --caption_column only that column counts. All other
columns go into the sample's JSON; original_width and original_height, if there, are what SDXL is told.

JPEG, PNG and WebP files are stored byte for byte; others (BMP, TIFF, AVIF, the first frame of a GIF) become PNG. Each
picture is decoded once: what cannot be trained on is skipped, and named in OUT/manifest.jsonl.

The same files and flags give the same shards, bit for bit. A shard that has its name is whole: after a kill, a full
disk or Ctrl-C the same command goes on with the others.
"""

import argparse
import shlex
import sys
from pathlib import Path

from lcm_distill import flags
from lcm_distill.data.packing import KEPT, MANIFEST, Settings, describe_skipped, pack_shards
from lcm_distill.errors import run_program
from lcm_distill.flags import SHARDS_FLAG


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags.CommandParser("python -m lcm_distill.pack_shards", __doc__, "%(prog)s IMAGES OUT [flags]")
    add = parser.add_argument
    add("images", metavar="IMAGES", help="folder with the pictures and their captions")
    add("out", metavar="OUT", help="folder for the shards: a new or empty one, or one to go on with")
    add("--caption_column", help="the only column of the metadata to take captions from; no text file counts then")
    add(
        "--max_size",
        type=int,
        help="shrink pictures whose shorter side has more pixels to this many: JPEG and WebP to JPEG of quality 95, "
        "others to PNG; the JSON tells the original size",
    )
    add("--samples_per_shard", type=int, default=1000, help="at most; shards are even")
    add("--max_shard_mb", type=int, default=2000, help="about the most megabytes in a shard")
    add("--seed", type=int, default=0, help="of the order, in which all pictures are mixed")
    add("--num_workers", type=int, help="processes, each of which writes a shard at a time (default: one for each CPU)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    settings = vars(parse_args(argv))
    images, out, num_workers = (settings.pop(name) for name in ("images", "out", "num_workers"))
    try:
        packed = pack_shards(images, out, Settings(**settings), num_workers)
    except KeyboardInterrupt:
        print(f"interrupted. {KEPT}", file=sys.stderr)
        sys.exit(130)
    if packed.skipped:
        print(f"skipped, all named in {Path(out, MANIFEST)}:\n{describe_skipped(packed.skipped)}")
    print(
        f"{packed.shards} shard{'s' * (packed.shards != 1)}, {packed.samples} samples, {packed.bytes / 10**6:.1f} MB: "
        f"train with {SHARDS_FLAG} {shlex.quote(out)}"
    )


if __name__ == "__main__":
    run_program(main)
