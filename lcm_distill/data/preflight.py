"""The preflight: a first look into the shards, before any model is loaded.

report = inspect_shards(shards, preparation)        # UsageError if nothing can be trained on
print(report)                                       # files, captions, sizes, what is dropped and why
preparation = report.preparation                    # with the encoding of the shards, if they are encoded
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from lcm_distill.data.captions import caption_reasons, describe_cut, read_captions, read_json
from lcm_distill.data.encoded import Encoding, read_encoding
from lcm_distill.data.filters import is_filtered
from lcm_distill.data.preparation import MixedShards, Preparation, filters_that_cannot_compare, prepare_sample
from lcm_distill.data.raw import DOTTED_NAME, UNREADABLE_SHARD, BadSample, RawSample, list_counts, printable
from lcm_distill.data.shards import SHARD_FORMAT, read_shard
from lcm_distill.errors import UsageError
from lcm_distill.flags import SHARDS_FLAG


@dataclass
class ShardReport:
    """What a first look into the shards found; print it."""

    shards: int  # number of shards
    preparation: Preparation  # for the stream: with the encoding of the shards, if they are encoded
    opened: int = 0  # shards that were looked into
    seen: int = 0  # samples that were tried
    usable: int = 0  # samples that can be trained on and pass the filters
    enlarged: int = 0  # usable samples whose picture is smaller than the resolution
    extensions: Counter = field(default_factory=Counter)  # of all files, also of those that are not read
    caption_sources: Counter = field(default_factory=Counter)
    json_keys: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    not_compared: Counter = field(default_factory=Counter)  # of samples that a filter could not judge
    smallest: tuple[int, int] | None = None  # (height, width) of the usable picture with the fewest pixels
    largest: tuple[int, int] | None = None
    colours: Counter = field(default_factory=Counter)  # colour profiles, and what is done about them
    captions: list[str] = field(default_factory=list)  # the first four distinct ones
    cut: str | None = None  # how many captions are longer than the text encoder, in words; None: none is
    problems: list[str] = field(default_factory=list)  # shards that cannot be read, and why

    @property
    def filtered(self) -> int:
        """The number of samples that filters left out."""
        return sum(count for reason, count in self.dropped.items() if is_filtered(reason))

    def __str__(self) -> str:
        lines = [
            f"{self.usable} of {self.seen} samples usable, in the first {self.opened} of {self.shards} shards",
            f"  file extensions: {list_counts(self.extensions)}",
            f"  captions from:   {list_counts(self.caption_sources)}",
            f"  JSON keys:       {list_counts(self.json_keys)}",
        ]
        if self.cut:
            lines.insert(3, f"  captions cut:    {self.cut}")
        if self.preparation.encoding is not None:
            lines.insert(1, f"  {self.preparation.encoding}")
        if self.smallest and self.largest:
            smallest, largest = (f"{width}x{height}" for height, width in (self.smallest, self.largest))
            lines.append(f"  picture sizes:   {smallest} to {largest} (width x height)")
        if self.colours:
            lines.append(f"  colour profiles: {list_counts(self.colours)}")
        if self.enlarged:
            resolution = self.preparation.resolution
            lines.append(f"  {self.enlarged} of {self.usable} pictures are enlarged to --resolution {resolution}")
        if self.preparation.min_image_size or self.preparation.filters:
            lines.append(f"  filters:         {self.seen - self.filtered} of {self.seen} samples pass")
        if self.not_compared:
            lines.append(f"  not compared:    {list_counts(self.not_compared)}; these samples pass")
        if self.dropped:
            lines.append(f"  dropped:         {list_counts(self.dropped)}")
        return "\n".join(lines + [f"  unreadable:      {printable(problem, 1000)}" for problem in self.problems[:3]])


def inspect_shards(
    shards: list[str],
    preparation: Preparation,
    *,
    count_tokens: Callable[[list[str]], list[tuple[int, int]]] | None = None,
    limit: int = 16,
    max_samples: int | None = 1000,
    max_shards: int | None = 32,
) -> ShardReport:
    """Opens the first shards, tries their first samples, and reports what they contain.

    Args:
        shards: as returned by `expand_shards`.
        preparation: as the flags describe it.
        count_tokens: for each of some captions (its tokens, how many of them the text encoder reads); called once, with
            all captions of the usable samples, unless the shards have these encoded. None: their length is not checked.
        limit: samples to try. If none of them is usable, the search continues:
        max_samples: through at most this many samples (None: no limit),
        max_shards: in at most this many shards (None: no limit).

    Raises:
        UsageError: no sample that was tried is usable; the message has how many were dropped and why, which files and
            JSON keys were found, and what a shard must contain. Or encoded samples are mixed with others, or
            contradict the flags.
    """
    report = ShardReport(shards=len(shards), preparation=preparation)
    captions: list[str] = []

    def is_done() -> bool:
        enough = report.usable > 0 and report.seen >= limit
        return enough or (max_samples is not None and report.seen >= max_samples)

    for shard in shards[:max_shards]:
        report.opened += 1
        try:
            if not report.seen:
                report.preparation = _match_encoding(preparation, read_encoding(shard))
            column = report.preparation.caption_column
            samples = read_shard(
                shard,
                caption_column=column,
                extensions=report.extensions,
                on_dotted=lambda _: report.dropped.update([DOTTED_NAME]),
            )
            for raw in samples:
                captions += _inspect_sample(raw, report)
                if is_done():
                    break
        except MixedShards as error:
            raise UsageError(f"{error} It is in {printable(shard)}.") from None
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001 - as in the stream
            report.dropped[UNREADABLE_SHARD] += 1
            report.problems.append(f"{shard}: {error}")
        if is_done():
            break
    if report.usable:
        encoding = report.preparation.encoding
        if count_tokens is not None and not (encoding and encoding.text):
            report.cut = describe_cut(count_tokens(captions))
        return report
    raise _nothing_usable(report, all_seen=report.opened == len(shards) and not is_done())


def _nothing_usable(report: ShardReport, *, all_seen: bool) -> UsageError:
    """The error for shards of which no sample that was tried is usable; `all_seen`: all samples were tried."""
    so_far = "" if all_seen else " as far as this first look went"
    if report.filtered:
        return UsageError(
            f"{SHARDS_FLAG} gives nothing to train on{so_far}, and {report.filtered} of {report.seen} samples are "
            f"filtered out: give milder filters. {report}"
        )
    column = report.preparation.caption_column
    if column is not None and any(report.dropped[reason] for reason in caption_reasons(column)):
        return UsageError(
            f"--caption_column {column} gives nothing to train on{so_far}. Give one of the file extensions or "
            f"JSON keys that exist, or omit the flag to look in the usual places: {report}"
        )
    return UsageError(f"{SHARDS_FLAG} gives nothing to train on{so_far}: {report}\n{SHARD_FORMAT}")


def _match_encoding(preparation: Preparation, encoding: Encoding | None) -> Preparation:
    """How samples of this encoding are prepared; `UsageError` if the flags ask for something else."""
    if encoding is None:
        return preparation
    remedy = "omit the flag, or encode the pictures again with it."
    if preparation.resolution != encoding.resolution:
        raise UsageError(
            f"--resolution {preparation.resolution}: the latents in {SHARDS_FLAG} are of {encoding.resolution} "
            f"pixels; give --resolution {encoding.resolution}, or encode the pictures again."
        )
    if preparation.center_crop and not encoding.center_crop:
        raise UsageError(f"--center_crop: the latents in {SHARDS_FLAG} are of random crops; {remedy}")
    if preparation.random_flip and not encoding.random_flip:
        raise UsageError(f"--random_flip: the latents in {SHARDS_FLAG} include no mirrored pictures; {remedy}")
    if preparation.interpolation not in (Preparation.interpolation, encoding.interpolation):
        raise UsageError(
            f"--interpolation_type {preparation.interpolation}: the pictures in {SHARDS_FLAG} were resized with "
            f"{encoding.interpolation}; {remedy}"
        )
    if encoding.text and preparation.caption_column not in (None, encoding.caption_column):
        source = "the usual places" if encoding.caption_column is None else printable(encoding.caption_column)
        raise UsageError(
            f"--caption_column {preparation.caption_column}: the embeddings in {SHARDS_FLAG} are of the captions from "
            f"{source}; {remedy}"
        )
    return replace(
        preparation,
        interpolation=encoding.interpolation,
        center_crop=encoding.center_crop,
        caption_column=preparation.caption_column or encoding.caption_column,
        encoding=encoding,
    )


def _inspect_sample(raw: RawSample, report: ShardReport) -> list[str]:
    """Tries a sample and adds what it finds to the report; returns its captions, none if it is not usable."""
    report.seen += 1
    meta = read_json(raw)
    report.json_keys.update(meta.keys())
    filters = report.preparation.filters
    report.not_compared.update(filters_that_cannot_compare(meta, filters))
    report.not_compared.update(f"{one.flag} (no such key, or null)" for one in filters if one.finds_nothing(meta))
    try:
        # Only whether it decodes matters, so resize quickly. (The resolution of latents is that of the encoding.)
        quick = replace(report.preparation, resolution=1, interpolation="nearest", proportion_empty_prompts=0.0)
        sample = prepare_sample(raw, quick, draws=np.zeros(5))
        captions, source = read_captions(raw, meta, report.preparation.caption_column)
    except BadSample as bad:
        report.dropped[bad.reason] += 1
        return []
    height, width = sample.picture_size
    report.usable += 1
    report.caption_sources[source] += 1
    report.colours.update([sample.colours] * bool(sample.colours))
    report.enlarged += min(height, width) < report.preparation.resolution
    report.smallest = min(report.smallest or sample.picture_size, sample.picture_size, key=math.prod)
    report.largest = max(report.largest or sample.picture_size, sample.picture_size, key=math.prod)
    if sample.caption not in report.captions and len(report.captions) < 4:
        report.captions.append(sample.caption)
    return captions
