"""Tokenizers as people have them: each layout gives the same tokens; what does not fit the text encoder is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import CLIPTextConfig, CLIPTokenizer

from lcm_distill.data.captions import describe_cut
from lcm_distill.errors import UsageError
from lcm_distill.models import sd, sdxl
from lcm_distill.models.families import FAMILIES
from lcm_distill.models.files import ModelFiles
from lcm_distill.models.teacher import Teacher, read_configs
from lcm_distill.models.tokenizer import count_tokens, load_tokenizer

CAPTIONS = ["a small red circle on a black background", "Two BLUE squares,  naïve & 7 ünïcode", "", "word " * 40]
CONFIG = "tokenizer/tokenizer_config.json"
READ = {"resolution": 64, "num_ddim_timesteps": 50}
END = 597


def reference(folder: str) -> list[list[int]]:
    """The captions' tokens by Rust's tokenizers alone, from the toy's tokenizer.json, which cuts and pads to 16."""
    return [
        encoding.ids for encoding in Tokenizer.from_file(f"{folder}/tokenizer/tokenizer.json").encode_batch(CAPTIONS)
    ]


def tokens(tokenizer: CLIPTokenizer) -> list[list[int]]:
    length = tokenizer.model_max_length
    return tokenizer(CAPTIONS, padding="max_length", max_length=length, truncation=True).input_ids


def split(folder: Path, part: str = "tokenizer") -> None:
    """Writes the tokenizer as the first releases of Stable Diffusion have it: vocab.json and merges.txt."""
    path = folder / part / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    (folder / part / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / part / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]))
    path.unlink()


def edit(folder: Path, change) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def assert_refused(folder: Path, message: str, family: str = "sd") -> None:
    with pytest.raises(UsageError, match=f"--pretrained_teacher_model .*{message}") as info:
        read_configs(Teacher(str(folder)), family=family, **READ)
    assert "--variant" not in str(info.value)


# What works


@pytest.mark.parametrize(
    "layout", ["tokenizer.json", "vocab.json and merges.txt", "saved anew", "an older config", "both"]
)
def test_each_layout_gives_the_same_tokens(layout, teacher, changed):
    folder = changed("sd")
    if layout == "vocab.json and merges.txt":
        split(folder)
    elif layout == "both":
        split(folder)
        shutil.copy(f"{teacher}/tokenizer/tokenizer.json", folder / "tokenizer")
    elif layout == "saved anew":
        CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer").save_pretrained(folder / "tokenizer")
    elif layout == "an older config":  # as in Stable Diffusion 1.5
        split(folder)
        token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        special = {f"{which}_token": token | {"content": "<|endoftext|>"} for which in ("eos", "unk")}
        special |= {"bos_token": token | {"content": "<|startoftext|>"}, "pad_token": "<|endoftext|>"}
        (folder / "tokenizer" / "special_tokens_map.json").write_text(json.dumps(special))
        more = {"do_lower_case": True, "errors": "replace", "model_max_length": 16, "tokenizer_class": "CLIPTokenizer"}
        (folder / CONFIG).write_text(json.dumps(special | more))
    read_configs(Teacher(str(folder)), family="sd", **READ)
    assert tokens(Teacher(str(folder)).tokenizer("tokenizer")) == reference(teacher)


@pytest.mark.parametrize(
    "entries",
    [
        {"tokenizer_class": "CLIPTokenizerFast"},
        {"tokenizer_class": None},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"add_prefix_space": False, "anything": "else"},
    ],
    ids=str,
)
def test_configs_of_other_releases_give_the_same_tokens(entries, teacher, changed):
    assert tokens(Teacher(str(changed("sd", CONFIG, **entries))).tokenizer("tokenizer")) == reference(teacher)


def test_open_clip_pads_with_another_token(changed):
    """As in Stable Diffusion 2 and in SDXL's second tokenizer."""
    folder = changed("sdxl", "tokenizer_2/tokenizer_config.json", pad_token="!")
    split(folder, "tokenizer_2")
    read_configs(Teacher(str(folder)), family="sdxl", **READ)
    first, second = (tokens(Teacher(str(folder)).tokenizer(part)) for part in ("tokenizer", "tokenizer_2"))
    assert first[2][2:] == [END] * 14 and second[2][2:] == [0] * 14  # the empty caption's; "!" is the first letter
    assert first[3] == second[3]  # a long one has no padding


def test_tokens_that_were_added_to_both_are_kept(changed):
    """Textual inversions: the text encoder has a row more for each."""
    folder = changed("sd", "text_encoder/config.json", vocab_size=599)
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    tokenizer.add_tokens("<my-cat>")
    tokenizer.save_pretrained(folder / "tokenizer")
    read_configs(Teacher(str(folder)), family="sd", **READ)
    assert Teacher(str(folder)).tokenizer("tokenizer")("<my-cat>").input_ids[1] == 598


def test_an_old_text_encoder_does_not_say_how_captions_end(changed):
    """Stable Diffusion's own configs say 2, whatever the vocabulary."""
    folder = changed("sd", "text_encoder/config.json", bos_token_id=0, eos_token_id=2, pad_token_id=1)
    read_configs(Teacher(str(folder)), family="sd", **READ)


# What is refused


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("family, part", [("sd", "tokenizer"), ("sdxl", "tokenizer"), ("sdxl", "tokenizer_2")])
@pytest.mark.parametrize("missing", ["tokenizer.json", "vocab.json", "merges.txt", "the folder"])
def test_a_tokenizer_without_its_vocabulary_is_refused(family, part, missing, changed):
    """Transformers made one of three tokens: all captions had the same embedding, and the run worked."""
    folder = changed(family)
    if missing == "tokenizer.json":
        (folder / part / missing).unlink()
    elif missing == "the folder":
        shutil.rmtree(folder / part)
    else:
        split(folder, part)
        (folder / part / missing).unlink()
    what = missing if missing.endswith("txt") or missing == "vocab.json" else "vocabulary"
    assert_refused(folder, f"its {part} has no {what}: it needs {part}/tokenizer.json, or {part}/vocab.json", family)
    with pytest.raises(UsageError, match=f"its {part} has no {what}"):  # by whatever way it is loaded
        Teacher(str(folder)).load({part: CLIPTokenizer}, {})


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t["model"].update(merges=[]), "no merges for 84 of its 598 tokens"),
        (lambda t: t["model"].update(merges=t["model"]["merges"][:40]), "no merges for 44 of its 598 tokens"),
        (lambda t: t["model"].update(vocab={}, merges=[]), "no tokens for 512 of CLIP's 512 letters"),
        (lambda t: t["model"]["vocab"].pop("Ā"), "no tokens for 1 of CLIP's 512 letters"),
        (lambda t: t["model"].update(vocab={}), "cannot be loaded"),
        (lambda t: t.pop("model"), "cannot be loaded|has no tokens"),
        (lambda t: t["model"].update(type="Unigram", vocab=[["a", -1.0]]), "of another kind .*Unigram"),
        (lambda t: t["model"].update(type="WordPiece"), "of another kind .*WordPiece"),
        (lambda t: t["model"].update(end_of_word_suffix=""), "of another kind .*BPE"),  # GPT-2's
        (
            lambda t: t["model"].update(vocab={token: id + 1 for token, id in t["model"]["vocab"].items()}),
            "token ids up to 598, the text encoder 598 tokens",
        ),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_tokenizer_is_refused(change, message, changed):
    folder = changed("sd")
    edit(folder, change)
    assert_refused(folder, message)


@pytest.mark.hostile("teachers")
def test_merges_that_were_cut_off_are_refused(changed):
    folder = changed("sd")
    split(folder)
    path = folder / "tokenizer" / "merges.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:50]))
    assert_refused(folder, "its tokenizer has no merges for 35 of its 598 tokens")


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize(
    "file, kind", [("spiece.model", None), ("tokenizer.model", None), ("spiece.model", "T5Tokenizer")]
)
def test_a_sentencepiece_folder_is_refused(file, kind, changed):
    folder = changed("sd", CONFIG, json.dumps({"model_max_length": 16} | ({"tokenizer_class": kind} if kind else {})))
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / file).write_bytes(b"\n\x0f\n\x05<unk>")
    assert_refused(folder, f"its tokenizer is {f'of the class {kind}' if kind else f'a SentencePiece .*{file}'}")


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("kind", ["T5TokenizerFast", "BertTokenizer", "XLMRobertaTokenizer", "ChatGLMTokenizer"])
def test_a_tokenizer_of_another_class_is_refused(kind, changed):
    assert_refused(changed("sd", CONFIG, tokenizer_class=kind), f"its tokenizer is of the class {kind}")


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize(
    "length, said",
    [
        (None, "there is no model_max_length"),
        (1000000000000000019884624838656, "there is no model_max_length"),  # what Transformers writes for none
        (77, "model_max_length is 77"),
        (2, "model_max_length is 2"),
        (0, "model_max_length is 0"),
        (-1, "model_max_length is -1"),
        ("16", "model_max_length is '16'"),
        (16.0, "model_max_length is 16.0"),
        (True, "model_max_length is True"),
    ],
)
def test_a_length_that_the_text_encoder_does_not_take_is_refused(length, said, changed):
    """Without one, captions were cut to 10^30 tokens: OverflowError after all weights were loaded."""
    folder = changed("sd", CONFIG, model_max_length=length)
    assert_refused(folder, f'tokenizer_config.json: {said}.* write "model_max_length": 16')


@pytest.mark.hostile("teachers")
def test_a_tokenizer_config_that_is_missing_is_refused(changed):
    folder = changed("sd", CONFIG, None)
    assert_refused(folder, "tokenizer_config.json: there is no model_max_length")


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("content", ["[1]", "null", "", "{", "[" * 100_000])
def test_a_tokenizer_config_that_is_none_is_refused(content, changed):
    assert_refused(changed("sd", CONFIG, content or " "), "tokenizer/tokenizer_config.json")


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize(
    "file, entries, message",
    [
        ("text_encoder/config.json", {"vocab_size": 100}, "token ids up to 597, the text encoder 100 tokens"),
        ("text_encoder/config.json", {"vocab_size": 597}, "token ids up to 597, the text encoder 597 tokens"),
        ("text_encoder/config.json", {"eos_token_id": 5}, "ends captions with the token 597, .* expects 5"),
        (
            "text_encoder/config.json",
            {"vocab_size": 49408, "eos_token_id": 2},
            "has 598 tokens, the text encoder 49408",
        ),
        (CONFIG, {"pad_token": "[PAD]"}, "token ids up to 598"),  # Transformers adds what a vocabulary has not
        (CONFIG, {"bos_token": "<s>"}, "token ids up to 598"),
        (CONFIG, {"eos_token": "a</w>"}, "ends captions with the token 320"),
        (CONFIG, {"bos_token": None}, "cannot be loaded"),
        (CONFIG, {"pad_token": None}, "has no pad_token"),
        (CONFIG, {"bos_token": 5}, "cannot be loaded"),
        (CONFIG, {"padding_side": "left"}, "turns the caption 'a' into the tokens .597, 597"),
    ],
)
def test_a_vocabulary_that_does_not_fit_its_text_encoder_is_refused(file, entries, message, changed):
    assert_refused(changed("sd", file, **entries), f"its tokenizer .*{message}")


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_two_captions_differ(family, teachers):
    """What a tokenizer without its vocabulary lost."""
    module = {"sd": sd, "sdxl": sdxl}[family]
    frozen = module.Frozen(Teacher(teachers[family]), device="cpu", dtype=torch.float32)
    states = module.encode_captions(frozen, ["a small red circle", "a large blue square"])["encoder_hidden_states"]
    assert (states[0] - states[1]).abs().max() > 0.5


def test_a_tokenizer_is_read_once(teacher):
    source = Teacher(teacher)
    assert source.tokenizer("tokenizer") is source.load({"tokenizer": CLIPTokenizer}, {})["tokenizer"]


def test_the_check_takes_the_text_encoder_s_config(teacher):
    config = CLIPTextConfig(vocab_size=598, max_position_embeddings=16, eos_token_id=END)
    loaded = load_tokenizer(ModelFiles(teacher, "--teacher_config"), "tokenizer", config)
    assert tokens(loaded) == reference(teacher)
    with pytest.raises(UsageError, match="--teacher_config .*its tokenizer has token ids up to 597"):
        load_tokenizer(ModelFiles(teacher, "--teacher_config"), "tokenizer", CLIPTextConfig(vocab_size=10))


# How many tokens captions have, against the ids that the text encoder is given.

COUNTED = ["", "a small red circle", "a " * 500, "no such words " * 3]


def ids(tokenizer, caption, **options):
    return tokenizer(caption, verbose=False, **options).input_ids


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_tokens_are_those_of_the_teacher_s_tokenizers(teachers, family):
    tokenizer = CLIPTokenizer.from_pretrained(teachers[family], subfolder="tokenizer")
    limit = tokenizer.model_max_length
    counted = FAMILIES[family].count_tokens(Teacher(teachers[family]), COUNTED)
    assert counted == [(len(ids(tokenizer, caption)), limit) for caption in COUNTED]
    for caption, (tokens, _) in zip(COUNTED, counted, strict=True):
        assert (tokens > limit) == (ids(tokenizer, caption) != ids(tokenizer, caption, truncation=True))


def test_of_two_tokenizers_the_one_that_cuts_more_counts(teacher):
    first, second = (CLIPTokenizer.from_pretrained(teacher, subfolder="tokenizer") for _ in range(2))
    second.model_max_length = 5
    tokens = len(ids(first, COUNTED[1]))
    assert tokens > 5 and count_tokens([first, second], [COUNTED[1]]) == [(tokens, 5)]
    assert count_tokens([first], []) == []


@pytest.mark.parametrize(
    ("counted", "expected"),
    [
        ([], None),
        ([(77, 77), (2, 77)], None),
        ([(78, 77), (2, 77)], "1 of 2 is longer than the 77 tokens .*the longest has 78"),
        ([(78, 77), (90, 77), (3, 77)], "2 of 3 are longer than the 77 tokens .*the longest has 90"),
    ],
)
def test_describe_cut(counted, expected):
    found = describe_cut(counted)
    assert found is None if expected is None else re.match(expected, found)


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("layout", ["tokenizer.json", "merges.txt"])
def test_merges_in_another_order_are_refused(layout, changed):
    """Each token can still be formed, but a caption becomes others."""
    folder = changed("sd")
    edit(folder, lambda content: content["model"]["merges"].reverse())
    if layout == "merges.txt":
        split(folder)
    assert_refused(folder, "merges in another order")


def test_the_caption_that_differs_is_named(changed):
    assert_refused(changed("sd", CONFIG, extra_special_tokens={"name": "b"}), "turns the caption 'b' into")
