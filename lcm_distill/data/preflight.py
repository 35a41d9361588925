"""The preflight: a first look into the shards, before any model is loaded."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from lcm_distill.data.captions import caption_reasons, read_captions, read_json
from lcm_distill.data.encoded import Encoding, read_encoding
from lcm_distill.data.filters import is_filtered
from lcm_distill.data.preparation import MixedShards, Preparation, prepare_sample
from lcm_distill.data.raw import UNREADABLE_SHARD, BadSample, RawSample, list_counts, printable
from lcm_distill.data.shards import SHARD_FORMAT, read_shard
from lcm_distill.errors import UsageError
from lcm_distill.flags import SHARDS_FLAG


@dataclass
class ShardReport:
    """What a first look into the shards found; print it."""

    shards: int  # how many there are
    preparation: Preparation  # as the training's stream needs it: with the encoding of the shards, if they are encoded
    opened: int = 0  # how many were looked into
    seen: int = 0  # samples
    usable: int = 0  # and not left out by a filter
    enlarged: int = 0  # usable samples whose picture is smaller than the resolution
    extensions: Counter = field(default_factory=Counter)  # of all files, the unread ones too
    caption_sources: Counter = field(default_factory=Counter)
    json_keys: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    smallest: tuple[int, int] | None = None  # (height, width) of the usable picture with the fewest pixels
    largest: tuple[int, int] | None = None
    captions: list[str] = field(default_factory=list)  # the first distinct ones, at most 4
    problems: list[str] = field(default_factory=list)  # shards that could not be read, and why

    def __str__(self) -> str:
        lines = [
            f"{self.usable} of {self.seen} samples usable, in the first {self.opened} of {self.shards} shards",
            f"  file extensions: {list_counts(self.extensions)}",
            f"  captions from:   {list_counts(self.caption_sources)}",
            f"  JSON keys:       {list_counts(self.json_keys)}",
        ]
        if self.preparation.encoding is not None:
            lines.insert(1, f"  {self.preparation.encoding}")
        if self.smallest and self.largest:
            (h, w), (H, W) = self.smallest, self.largest
            lines.append(f"  picture sizes:   {w}x{h} to {W}x{H} (width x height)")
        if self.enlarged:
            resolution = self.preparation.resolution
            lines.append(f"  {self.enlarged} of {self.usable} pictures are enlarged to --resolution {resolution}")
        if self.preparation.min_image_size or self.preparation.filters:
            filtered = sum(count for reason, count in self.dropped.items() if is_filtered(reason))
            lines.append(f"  filters:         {self.seen - filtered} of {self.seen} samples pass")
        if self.dropped:
            lines.append(f"  dropped:         {list_counts(self.dropped)}")
        return "\n".join(lines + [f"  unreadable:      {problem}" for problem in self.problems[:3]])


def inspect_shards(
    shards: list[str],
    preparation: Preparation,
    *,
    limit: int = 16,
    max_samples: int | None = 1000,
    max_shards: int | None = 32,
) -> ShardReport:
    """The preflight: open the first shards, try their first samples, and tell what is there.

    Args:
        shards: as `expand_shards` gives them.
        preparation: as the flags say it.
        limit: samples to look at. As long as none of them is usable the search goes on, up to
        max_samples: samples, in up to
        max_shards: shards; None for no bound.

    Raises:
        UsageError: no usable sample in what was looked at; says how many were dropped and why, which files and JSON
            keys were found, and what a shard needs. Or encoded samples that are mixed with others, or that the flags
            contradict.
    """
    report = ShardReport(shards=len(shards), preparation=preparation)
    column = preparation.caption_column

    def done() -> bool:
        enough = report.usable and report.seen >= limit
        return bool(enough or (max_samples is not None and report.seen >= max_samples))

    for shard in shards[:max_shards]:
        report.opened += 1
        try:
            if not report.seen:
                report.preparation = _as_encoded(preparation, read_encoding(shard))
                column = report.preparation.caption_column
            for raw in read_shard(shard, caption_column=column, extensions=report.extensions):
                _inspect_sample(raw, report)
                if done():
                    break
        except MixedShards as error:
            raise UsageError(f"{error} It is in {printable(shard)}.") from None
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001 - as in the stream
            report.dropped[UNREADABLE_SHARD] += 1
            report.problems.append(f"{shard}: {error}")
        if done():
            break
    if report.usable:
        return report
    all_seen = report.opened == report.shards and (max_samples is None or report.seen < max_samples)
    so_far = "" if all_seen else " as far as this first look went"
    filtered = sum(count for reason, count in report.dropped.items() if is_filtered(reason))
    if filtered:
        raise UsageError(
            f"{SHARDS_FLAG} gives nothing to train on{so_far}, and {filtered} of {report.seen} samples are filtered "
            f"out: give milder filters. {report}"
        )
    without = sum(report.dropped[reason] for reason in caption_reasons(column))
    if column is not None and without:
        raise UsageError(
            f"--caption_column {column} gives nothing to train on{so_far}. Name one of the file extensions or "
            f"JSON keys that there are, or leave the flag out to look in the usual places: {report}"
        )
    raise UsageError(f"{SHARDS_FLAG} gives nothing to train on{so_far}: {report}\n{SHARD_FORMAT}")


def _as_encoded(preparation: Preparation, encoding: Encoding | None) -> Preparation:
    """How samples of this encoding are prepared; `UsageError` if that is not what the flags ask for."""
    if encoding is None:
        return preparation
    again = "or encode the pictures again"
    if preparation.resolution != encoding.resolution:
        raise UsageError(
            f"--resolution {preparation.resolution}: the latents in {SHARDS_FLAG} are of {encoding.resolution} "
            f"pixels; give --resolution {encoding.resolution}, {again}."
        )
    if preparation.center_crop and not encoding.center_crop:
        raise UsageError(
            f"--center_crop: the latents in {SHARDS_FLAG} are of random crops; leave it out, {again} with it."
        )
    if preparation.random_flip and not encoding.random_flip:
        raise UsageError(
            f"--random_flip: no mirrored pictures are among the latents in {SHARDS_FLAG}; leave it out, {again} with "
            "it."
        )
    if preparation.interpolation not in (Preparation.interpolation, encoding.interpolation):
        raise UsageError(
            f"--interpolation_type {preparation.interpolation}: the pictures in {SHARDS_FLAG} were resized with "
            f"{encoding.interpolation}; leave it out, {again} with it."
        )
    if encoding.text and preparation.caption_column not in (None, encoding.caption_column):
        told = "the usual places" if encoding.caption_column is None else encoding.caption_column
        raise UsageError(
            f"--caption_column {preparation.caption_column}: the embeddings in {SHARDS_FLAG} are of the captions from "
            f"{told}; leave it out, {again} with it."
        )
    return replace(
        preparation,
        interpolation=encoding.interpolation,
        center_crop=encoding.center_crop,
        caption_column=preparation.caption_column or encoding.caption_column,
        encoding=encoding,
    )


def _inspect_sample(raw: RawSample, report: ShardReport) -> None:
    report.seen += 1
    meta = read_json(raw)
    report.json_keys.update(meta.keys())
    try:
        # Whether it decodes is the question, not how it looks. (Of latents the encoding says the resolution.)
        quick = replace(report.preparation, resolution=1, interpolation="nearest", proportion_empty_prompts=0.0)
        sample = prepare_sample(raw, quick, draws=np.zeros(5))
        _, source = read_captions(raw, meta, report.preparation.caption_column)
    except BadSample as bad:
        report.dropped[bad.reason] += 1
        return
    height, width = sample.picture_size
    report.usable += 1
    report.caption_sources[source] += 1
    report.enlarged += min(height, width) < report.preparation.resolution
    report.smallest = min(report.smallest or sample.picture_size, sample.picture_size, key=math.prod)
    report.largest = max(report.largest or sample.picture_size, sample.picture_size, key=math.prod)
    if sample.caption not in report.captions and len(report.captions) < 4:
        report.captions.append(sample.caption)
