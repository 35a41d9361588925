"""Write captioned pictures of the toy world as WebDataset shards.

    python -m toy.make_shards OUT_DIR --shards 4 --samples_per_shard 256 --seed 0
    python -m toy.make_shards OUT_DIR --resolution 64 --varied_sizes --format png

A shard `toy-000000.tar` holds, for each picture, `KEY.jpg` (or `.png`), its caption `KEY.txt` and `KEY.json` with
its width and height. Picture i of shard s depends on (seed, s, i) alone, so that the same command always writes
the same bytes, and more shards or longer ones begin with the same pictures.
"""

import argparse
import io
import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from lcm_distill import flags
from lcm_distill.errors import UsageError
from toy.world import Scene, draw, random_scene

FORMATS = ("jpg", "png")
_MAX_ASPECT = 1.5  # width : height is between 2:3 and 3:2 with --varied_sizes


def _varied_size(rng: np.random.Generator, resolution: int) -> tuple[int, int]:
    """(width, height): shorter side in resolution/2 … 2·resolution, aspect ratio log-uniform in 2:3 … 3:2."""
    short = int(rng.integers(-(-resolution // 2), 2 * resolution + 1))
    log_aspect = rng.uniform(-math.log(_MAX_ASPECT), math.log(_MAX_ASPECT))
    long = int(short * math.exp(abs(log_aspect)))  # rounded down: the ratio never passes 3:2
    return (long, short) if log_aspect > 0 else (short, long)


def make_picture(
    seed: int, shard: int, index: int, resolution: int = 64, varied_sizes: bool = False
) -> tuple[Image.Image, Scene]:
    """Picture `index` of shard `shard` and what it shows."""
    rng = np.random.default_rng(np.random.SeedSequence((seed, shard, index)))
    scene = random_scene(rng)
    width, height = _varied_size(rng, resolution) if varied_sizes else (resolution, resolution)
    return draw(scene, rng, width, height), scene


def _encode(picture: Image.Image, picture_format: str) -> bytes:
    file = io.BytesIO()
    if picture_format == "jpg":
        picture.save(file, "JPEG", quality=95, subsampling=0)  # a small shape's colour would bleed with subsampling
    else:
        picture.save(file, "PNG")
    return file.getvalue()


def make_shards(
    out_dir: str | os.PathLike,
    *,
    shards: int = 4,
    samples_per_shard: int = 256,
    seed: int = 0,
    picture_format: str = "jpg",
    resolution: int = 64,
    varied_sizes: bool = False,
) -> list[Path]:
    """Write `shards` tars of `samples_per_shard` pictures each into `out_dir` and return their paths in order.

    A tar has its final name only when it is complete; one of the same name is replaced. `UsageError`, before
    anything is written, for a value out of range or a folder that holds toy shards beyond those to be written
    (they would be read as part of the same data).
    """
    for flag, value, low, high in (
        ("--shards", shards, 1, 999_999),
        ("--samples_per_shard", samples_per_shard, 1, 999_999),
        ("--seed", seed, 0, 2**32 - 1),
        ("--resolution", resolution, 16, 1024),
    ):
        if not low <= value <= high:
            raise UsageError(f"{flag} must lie in {low} … {high}, not {value}")
    if picture_format not in FORMATS:
        raise UsageError(f"--format must be one of {', '.join(FORMATS)}, not {picture_format!r}")
    out_dir = Path(out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise UsageError(f"OUT_DIR {out_dir} is not a folder")
    paths = [out_dir / f"toy-{shard:06d}.tar" for shard in range(shards)]
    others = sorted(path.name for path in set(out_dir.glob("toy-*.tar")) - set(paths))
    if others:
        raise UsageError(
            f"OUT_DIR {out_dir} already holds {len(others)} toy shards beyond --shards {shards} ({others[0]} …): "
            "remove them or choose another folder"
        )

    out_dir.mkdir(parents=True, exist_ok=True)
    for shard, path in enumerate(paths):
        # A folder of its own, so that a run that is killed leaves nothing that a glob for *.tar would find.
        with tempfile.TemporaryDirectory(dir=out_dir, prefix=".writing-") as unfinished:
            with (
                open(Path(unfinished, path.name), "wb") as file,
                webdataset.TarWriter(file, encoder=False, mtime=0) as writer,
            ):
                for index in range(samples_per_shard):
                    picture, scene = make_picture(seed, shard, index, resolution, varied_sizes)
                    writer.write(
                        {
                            "__key__": f"{shard:06d}-{index:06d}",
                            picture_format: _encode(picture, picture_format),
                            "txt": scene.caption.encode(),
                            "json": json.dumps({"width": picture.width, "height": picture.height}).encode(),
                        }
                    )
            os.replace(Path(unfinished, path.name), path)
    return paths


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m toy.make_shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "out_dir", type=flags.path, metavar="OUT_DIR", help="folder to write into; made if it does not exist"
    )
    parser.add_argument("--shards", type=int, default=4, help="number of tars (default %(default)s)")
    parser.add_argument("--samples_per_shard", type=int, default=256, help="pictures in each tar (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="0 … 2³² − 1 (default %(default)s)")
    parser.add_argument("--format", choices=FORMATS, default="jpg", help="default %(default)s; JPEG quality is 95")
    parser.add_argument("--resolution", type=int, default=64, help="side in pixels (default %(default)s)")
    parser.add_argument(
        "--varied_sizes",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="each picture has its own size: shorter side from resolution/2 to 2·resolution, aspect ratio 2:3 to 3:2",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        paths = make_shards(
            args.out_dir,
            shards=args.shards,
            samples_per_shard=args.samples_per_shard,
            seed=args.seed,
            picture_format=args.format,
            resolution=args.resolution,
            varied_sizes=args.varied_sizes,
        )
    except UsageError as error:
        parser.error(str(error))
    size = sum(path.stat().st_size for path in paths)
    print(f"wrote {args.samples_per_shard} pictures to each of {len(paths)} shards ({size / 2**20:.1f} MiB):")
    print(*paths, sep="\n")


if __name__ == "__main__":
    main()
