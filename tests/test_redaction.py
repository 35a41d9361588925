"""Secrets stay inside the process: in URLs, commands, tokens; in what is printed, logged, warned of and raised."""

import io
import json
import logging
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from processes import environment

from lcm_distill import redaction
from lcm_distill.data.shards import expand_shards
from lcm_distill.redaction import _MaskedStream, mask, mask_shards, protect, public_flags

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.hostile("servers")


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    for name, empty in (("_tokens", set()), ("_shards", []), ("_shown", {})):
        monkeypatch.setattr(redaction, name, empty)


LOGINS = [
    ("https://user:s3cret@host/0.tar", "https://…@host/0.tar"),
    ("https://user:s3c@ret@host/0.tar", "https://…@host/0.tar"),  # was masked up to the first @ alone
    ("https://user:s3c/ret@host/0.tar", "https://…@host/0.tar"),
    ("https://user:s3c?ret@host/0.tar", "https://…@host/0.tar"),
    ("https://user:s3c#r@et@host:8443/0.tar", "https://…@host:8443/0.tar"),
    ("https://s3cret@host/a@b.tar", "https://…@host/a@b.tar"),
    ("ftp://:s3cret@host/0.tar", "ftp://…@host/0.tar"),
    ("https://host/0.tar?X-Amz-Signature=s3cret&x=s3cret", "https://host/0.tar?…"),
    ("https://host/0.tar?s3cret", "https://host/0.tar?…"),
    ("s3://s3cret:s3cret@bucket/0.tar?versionId=s3cret", "s3://…@bucket/0.tar?…"),
]
KEPT = [
    "https://host:8080/a@b.tar",
    "hf://datasets/org/name@main/{0..9}.tar",
    "s3://bucket/a:b@c.tar",
    "data/0?.tar",
    "file:///data/a@b.tar",
]


@pytest.mark.parametrize(("shard", "shown"), LOGINS)
def test_logins_and_queries_are_masked_alone_and_in_sentences(shard, shown):
    assert mask_shards(shard) == shown
    assert mask_shards(f"a.tar::{shard}::b.tar") == f"a.tar::{shown}::b.tar"
    for sentence in (
        "%s: gone (byte 7); retrying",
        "cannot open '%s'.",
        "(see %s)",
        '{"url": "%s"}',
        "GET %s HTTP/1.1",
    ):
        masked = mask(sentence % shard)
        assert "s3c" not in masked and "ret@" not in masked and masked == sentence % shown, masked


@pytest.mark.parametrize("shard", KEPT)
def test_what_is_no_secret_is_kept(shard):
    assert mask_shards(shard) == shard and mask(f"cannot open {shard}: gone") == f"cannot open {shard}: gone"


@pytest.mark.parametrize(
    "line",
    [
        "Retrying (Retry(total=2)) after connection broken by 'X': /a/0.tar?X-Amz-Signature=s3cret",  # urllib3
        "HTTPSConnectionPool(host='h', port=443): Max retries exceeded with url: /0.tar?sig=s3cret (Caused by X)",
        "HTTP Error 503 thrown while requesting GET https://h/0.tar?Expires=1&Signature=s3cret",  # huggingface_hub
        "curl -H 'Authorization: Bearer s3cretS3cret'",
        "{'Authorization': 'Basic s3cretS3cret'}",
        "aws_secret_access_key=s3cretS3cret",
        "token hf_s3cretS3cretS3cretS3cret is not valid",
        "(/0.tar?sig=s3cret,https://h/0.tar),https://h/0.tar?…,https://h/1.tar?sig=s3cret",
        "Cookie: session=s3cret; other=s3cret",
        "{'Set-Cookie': 'id=s3cret; Path=/; HttpOnly'}",
        r'{"url": "https:\/\/u:s3cret@h\/0.tar"}',  # JSON as many servers write it
        r'{"url": "https:\/\/h\/0.tar?sig=s3cret&x=s3cret"}',
        "no proxy for https%3A%2F%2Fu%3As3cret%40h%2F0.tar",  # in the query or the path of another URL
        "GET /cache/https%3a%2f%2fh%2f0.tar%3fsig%3ds3cret HTTP/1.1",
        "next=https%253A%252F%252Fu%253As3cret%2540h%252F0.tar",
    ],
)
def test_what_libraries_write_of_urls_and_headers_is_masked(line):
    if "hf_" in line:
        line = line.replace("s3cretS3cretS3cretS3cret", "abcdefghijklmnopqrst")
        assert "abcdef" not in mask(line)
    assert "s3cret" not in mask(line)


COMMAND = "pipe:curl -H 'X-Key: s3cret' \"https://h/{0..1}.tar\" \\\n  | grep -v 's3cret'"


@pytest.mark.parametrize(
    "part",
    [
        "://a",
        "://a:b",
        "://u@",
        ":\\/\\/a",
        "%3A//a",
        "%3A%2F%2F",
        "%25",
        "(/a",
        "/a?b",
        "=/a?",
        "-cookie:a",
        "token=a",
    ],
)
def test_a_long_message_is_masked_in_no_time(part):
    """A quarter of a megabyte of "://a" took minutes: each was the start of a URL that had no end."""
    text = part * (250_000 // len(part))
    start = time.process_time()
    mask(text), mask("@" + text), mask(text + "@"), mask("?" + text), mask(text + "?b=c")
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    "line",
    [
        "a cookie: with = signs, s. 3",
        "Cookie Clicker",
        r'{"url": "https:\/\/h\/a@b.tar"}',
        "GET /cache/https%3A%2F%2Fh%2F0.tar HTTP/1.1",
        "100%3A 50%40",
    ],
)
def test_what_only_looks_like_it_is_kept(line):
    assert mask(line) == line


def test_commands_are_masked_whole_however_a_message_quotes_them():
    shards = expand_shards(COMMAND)
    assert len(shards) == 2
    for shard in [COMMAND, *shards]:
        for text in (shard, repr(shard), json.dumps(shard), f"{shard}\nnext", shard[:40], f"a {shard!r} b {shard} c"):
            masked = mask(f"{text} failed. The remedy.")
            assert "s3cret" not in masked and "pipe:…" in masked, masked
        assert mask(f"{shard!r} failed. The remedy.").endswith("failed. The remedy.")
    assert public_flags({"train_shards_path_or_url": f"a.tar::{COMMAND}"}) == {
        "train_shards_path_or_url": "a.tar::pipe:…"
    }
    # What is no command of the run is a message's own.
    assert mask("Give 'pipe:aws s3 cp s3://b/0.tar -'.") == "Give 'pipe:aws s3 cp s3://b/0.tar -'."


def test_other_flags_lose_logins_and_queries_too_and_prompts_stay():
    flags = {"init_student": "https://u:p@h/x?sig=s", "hub_token": "t", "validation_prompts": ["what? a=b", "pipe: a"]}
    assert public_flags(flags) == {
        "init_student": "https://…@h/x?…", "validation_prompts": ["what? a=b", "pipe: a"]
    }  # fmt: skip


def test_tokens_are_masked_everywhere():
    protect(tokens=["hf_mine", None, ""])
    assert mask("hf_mine hf_mine'") == "*** ***'"


def test_a_stream_masks_before_a_tracker_sees_it_and_after_it_is_gone():
    """wandb replaces `write` to record the console."""
    protect(tokens=["s3cret"])
    below, recorded = io.StringIO(), []
    stream = _MaskedStream(below)
    original = stream.write

    def recording(text):
        recorded.append(text)
        return original(text)

    stream.write = recording
    print("s3cret https://u:p@h/", file=stream)
    assert "".join(recorded) == below.getvalue() == "*** https://…@h/\n"
    stream.write = original
    print("s3cret", file=stream)
    stream.writelines(["s3cret\n"])
    assert below.getvalue().endswith("***\n***\n") and stream.isatty() is False


def test_a_stream_that_cannot_write_the_ellipsis_does_not_fail():
    below = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print("https://u:p@h/", file=_MaskedStream(below), flush=True)
    assert below.buffer.getvalue() == b"https://...@h/\n"


SECRETS = """
import logging, sys, threading, warnings
from lcm_distill.redaction import hide_in_command_line, install, protect
install(); install()
hide_in_command_line("https://u:s3cret@h/0.tar?sig=s3cret::pipe:cat s3cret", "s3cret")
url = "https://u:pass@word@h/0.tar?sig=signature"
logging.basicConfig(format="%(message)s")
logging.getLogger("urllib3").warning("Retrying: %s", "/0.tar?sig=signature")
warnings.warn(url)
print(url, "s3cret"); print(url, file=sys.stderr)
try:
    raise OSError(url)
except OSError:
    logging.exception("failed")
thread = threading.Thread(target=lambda: 1 / len(int(url)))
thread.start(); thread.join()  # else two tracebacks are mixed
print(sys.argv, open("/proc/self/cmdline", "rb").read() if sys.platform == "linux" else "")
raise RuntimeError(url)
"""


def test_nothing_a_process_writes_has_secrets_tracebacks_warnings_and_its_command_line_included():
    argv = ["--shards", "https://u:s3cret@h/0.tar?sig=s3cret::pipe:cat s3cret", "--hub_token=s3cret", "--lr", "1"]
    done = subprocess.run([sys.executable, "-c", SECRETS, *argv], cwd=ROOT, capture_output=True, text=True)
    everything = done.stdout + done.stderr
    for secret in ("s3cret", "pass", "word@", "signature"):
        assert secret not in everything, everything
    assert "RuntimeError: https://…@h/0.tar?…" in done.stderr and "OSError: https://…@h/0.tar?…" in done.stderr
    assert "'--shards', 'https://…@h/0.tar?…::pipe:…', '--hub_token=***', '--lr', '1'" in done.stdout
    if sys.platform == "linux":
        assert r"--hub_token=******\x00--lr" in done.stdout


def test_records_and_warnings_are_masked_for_every_handler(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    before = logging.getLogRecordFactory()
    try:
        redaction.install(streams=())
        records = []
        logger = logging.getLogger("a library")
        monkeypatch.setattr(logger, "propagate", False)
        handler = logging.Handler()
        handler.emit = records.append
        logger.addHandler(handler)
        try:
            raise ValueError("https://u:p@h/")
        except ValueError:
            logger.exception("%s of %d", "https://u:p@h/?x", 3)
        logger.warning("%d", "not a number")  # its handler reports that
        assert records[0].getMessage() == "https://…@h/?… of 3" and "ValueError: https://…@h/" in records[0].exc_text
        assert records[0].exc_text.startswith("Traceback") and "u:p" not in records[0].exc_text
        assert "https://…@h/" in warnings.formatwarning("https://u:p@h/", UserWarning, "f.py", 1)
    finally:
        logging.setLogRecordFactory(before)
        logger.removeHandler(handler)


def test_a_run_shows_wandb_no_secrets(command, tmp_path):
    """They were in wandb's metadata by way of `sys.argv`, and in its log of the console."""
    pytest.importorskip("wandb")
    shards = command()[command().index("--train_shards_path_or_url") + 1]
    tar = sorted(Path(shards).glob("*.tar"))[0]
    spec = f"pipe:cat {tar} # s3cret"
    argv = command(steps=1, train_shards_path_or_url=spec, report_to="wandb,tensorboard", hub_token="t0ken-t0ken")
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys, runpy, warnings\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from lcm_distill.run.run import Run\nstart = Run.start\n"
        "def noisy(self, *args, **options):\n    start(self, *args, **options)\n"
        f"    print({spec!r}, 't0ken-t0ken', flush=True)\n    warnings.warn('https://u:s3cret@h/?s3cret')\n"
        "Run.start = noisy\n"
        f"runpy.run_path({str(ROOT / 'train_lcm_distill_sd_wds.py')!r}, run_name='__main__')\n"
    )
    command_line = [sys.executable, str(program), *argv]  # not forked: the system's own command line has secrets, too
    done = subprocess.run(command_line, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pipe:…" in done.stdout and "https://…@h/?…" in done.stderr
    places = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in places)
    for path in places:
        content = path.read_bytes()
        assert b"s3cret" not in content and b"t0ken-t0ken" not in content, path
    assert "s3cret" not in done.stdout + done.stderr


def test_masking_is_quick():
    protect([f"https://u:p@host/{number}.tar?sig={number}" for number in range(20_000)])
    import time

    start = time.perf_counter()
    for number in range(1000):
        mask(f"steps:  {number}/1000 [00:00<00:00, 1.23step/s, loss 0.01]")
        assert mask(f"https://u:p@host/{number}.tar?sig={number}: gone") == f"https://…@host/{number}.tar?…: gone"
    assert time.perf_counter() - start < 2


def test_a_login_that_was_cut_short_is_masked():
    """Messages cut long names: a token of 200 characters was shown without the @ that marks it as a login."""
    shard = "https://oauth2:" + "s3cret" * 60 + "@host/0.tar"
    protect([shard, "https://oauth2:other@host/1.tar"])
    for cut in (20, 100, 200, len(shard) - 12):
        for end in ("...", "…", "'", ")", "", " is missing"):
            masked = mask(f"the braces of '{shard[:cut]}{end}")
            assert masked == f"the braces of 'https://…{end}", masked
    assert mask(f"{shard}: gone") == "https://…@host/0.tar: gone"
    assert mask("https://oauth2.org/a: gone, https://o/b") == "https://oauth2.org/a: gone, https://o/b"


def test_a_fragment_that_holds_values_is_masked():
    assert mask_shards("https://host/0.tar#token=s3cret") == "https://host/0.tar#…"
    assert mask_shards("https://host/0.tar#part") == "https://host/0.tar#part"
    protect(["https://host/0.tar#x=s3cret"])
    assert mask("https://host/0.tar#x=s3cret: gone") == "https://host/0.tar#…: gone"


@pytest.mark.parametrize(
    "name",
    ["COMET_API_KEY", "MLFLOW_TRACKING_PASSWORD", "AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN", "GITHUB_TOKEN",
     "AZURE_STORAGE_CONNECTION_STRING", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HF_TOKEN", "CLIENT_SECRET"],
)  # fmt: skip
def test_tokens_of_every_library_are_found_in_the_environment(monkeypatch, name):
    """Of five names alone: those of other trackers and storages were printed."""
    monkeypatch.setenv(name, "a-s3cret-of-mine\n")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-false")
    monkeypatch.setenv("MONKEY", "not-a-s3cret")
    redaction.install(streams=())
    assert mask("error 401 for a-s3cret-of-mine: denied") == "error 401 for ***: denied"
    assert mask("false-false not-a-s3cret") == "false-false not-a-s3cret"


@pytest.mark.parametrize(
    "line",
    [
        "{'X-Amz-Security-Token': 'a-s3cret-of-mine'}",
        "X-Auth-Token: a-s3cret-of-mine",
        '{"api_key": "a-s3cret-of-mine"}',
        '{"password" : "a-s3cret-of-mine"}',
        "aws_secret_access_key: a-s3cret-of-mine",
        "password: a-s3cret-of-mine",
    ],
)
def test_headers_and_json_are_masked(line):
    assert mask(line) == line.replace("a-s3cret-of-mine", "…")
