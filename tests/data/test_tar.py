"""Tar headers, against Python's tarfile."""

import random
import tarfile

import pytest
from hostile_shards import header

from lcm_distill.data.tar import _PLAIN_HEADER, _parse_header, remove_partials


@pytest.mark.hostile("shards")
def test_a_header_says_what_tarfile_reads_in_it():
    def outcome(read, block):
        try:
            info = read(block)
        except tarfile.HeaderError as error:
            return type(error), str(error)
        return info.name, info.size, info.type, info.isreg()

    rng = random.Random(0)
    starts = [header(name, size, prefix=prefix) for name in ("a.jpg", "\xff/b" * 25) for size in (0, 77, 8**11 - 1)
              for prefix in (b"", b"folder", b"\xff" * 155)]  # fmt: skip
    starts += [header("a/", kind=kind, magic=magic) for kind in (b"\0", b"0", b"5", b"L", b"S", b"x")
               for magic in (b"ustar\x0000", b"ustar  \0", b"\0" * 8)]  # fmt: skip
    starts += [header("a", 8**12), header("a", -5), header("a", more={329: b"0000001\0" * 2}), bytes(512)]
    plain = read = 0
    for _ in range(6000):
        block = bytearray(rng.choice(starts))
        for _ in range(rng.choice((0, 0, 1, 1, 2))):
            block[rng.choice((rng.randrange(512), rng.randrange(100, 158), rng.randrange(329, 346)))] = rng.choice(
                b"\0 017789-+_oxa/\x80\xc3\xff"
            )
        if rng.random() < 0.7:  # else the sum is wrong, if anything was changed
            total = sum(block) - sum(block[148:156]) + 256
            block[148:156] = rng.choice((b"%06o\0 ", b"%06o \0", b"%07o\0", b" %5o\0 ")) % total
        expected = outcome(lambda block: tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape"), bytes(block))
        assert outcome(_parse_header, bytes(block)) == expected, bytes(block)
        plain += _PLAIN_HEADER.match(block, 100) is not None
        read += len(expected) == 4
    assert 500 < plain < 4000 and 2000 < read < 5500


@pytest.mark.hostile("folders")
def test_only_what_was_left_of_tars_is_removed(tmp_path):
    """Every hidden file with the suffix was, whoever had written it; a folder of that name ended the packer."""
    others = [".download.partial", ".a.tar.partial", ".a.tar.x1.partial", ".manifest.jsonl.partial", "a.tar.1.partial"]
    ours = [".a.tar.1.partial", ".00001.tar.77-2.partial", ".b.tar.gz.5.partial"]
    for name in (*others, *ours):
        (tmp_path / name).touch()
    (tmp_path / ".c.tar.1.partial").mkdir()
    assert remove_partials(tmp_path) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, ".c.tar.1.partial"])


@pytest.mark.hostile("folders")
def test_of_links_with_the_name_of_a_leftover_only_the_link_is_removed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").write_text("mine")
    (tmp_path / ".a.tar.1.partial").symlink_to("mine")
    (tmp_path / ".a.tar.2.partial").symlink_to("mine/a")
    assert remove_partials(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and (tmp_path / "mine" / "a").read_text() == "mine"
