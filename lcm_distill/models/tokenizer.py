"""A teacher's tokenizers: CLIP's, checked to fit the text encoders that they feed; how many tokens captions have.

A tokenizer without its vocabulary or its merges still turns every caption into tokens, just not those that the text
encoder was trained on: the libraries say nothing, and the student learns from captions that are all the same.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTokenizer

from lcm_distill.errors import UsageError, brief
from lcm_distill.models.files import ModelFiles, parse_object

# Of `tokenizer_class`: CLIP's, and what Transformers calls a tokenizer of which it knows the files alone.
_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
_SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
_ONLY_CLIP = "only CLIP's is supported, that of Stable Diffusion 1.x, 2.x and SDXL"
_WORD_END = "</w>"
# Before 4.24, Transformers wrote this id for the end of a caption whatever the vocabulary; it then takes the place of
# the highest id as the end.
_UNKNOWN_END = 2
_CAN_BE_CAPTIONS = 3  # the first token, the last, and one between


def load_tokenizer(files: ModelFiles, part: str, text_encoder: CLIPTextConfig) -> CLIPTokenizer:
    """The tokenizer in the folder `part` of `files`, which feeds a text encoder with the config `text_encoder`.

    `UsageError` unless it is CLIP's, is complete, and its tokens are those of the text encoder.
    """
    name = f"{files}: its {part}"
    config = files.read_optional_json(f"{part}/tokenizer_config.json")
    _check_files(files, part, config, name)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(
            files.model, subfolder=part, revision=files.revision, cache_dir=files.cache_dir
        )
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    except Exception as error:  # Rust's errors are plain Exceptions, those of odd values of every class
        raise UsageError(f"{name} cannot be loaded; download its files again. ({brief(error)})") from None
    _check_vocabulary(tokenizer, model, name)
    _check_fit(tokenizer, text_encoder, name)
    _check_length(tokenizer, text_encoder, f"{files}: {part}/tokenizer_config.json")
    _try_out(tokenizer, name)
    return tokenizer


def _check_files(files: ModelFiles, part: str, config: dict[str, Any], name: str) -> None:
    """`UsageError` unless the files are those of a CLIP tokenizer, with its vocabulary and merges."""
    kind = config.get("tokenizer_class") or _CLASSES[0]
    if kind not in _CLASSES:
        raise UsageError(f"{name} is of the class {kind}; {_ONLY_CLIP}.")
    complete, vocabulary, merges = (
        files.find(f"{part}/{file}") for file in ("tokenizer.json", "vocab.json", "merges.txt")
    )
    if complete is not None:
        model = parse_object(complete, f"{files}: {part}/tokenizer.json").get("model")
        model = model if isinstance(model, dict) else {}
        if model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix", _WORD_END) != _WORD_END:
            raise UsageError(
                f"{name} is not CLIP's but of another kind (tokenizer.json: {model.get('type', 'BPE')}); {_ONLY_CLIP}."
            )
        return
    if vocabulary is None or merges is None:
        other = [file for file in _SENTENCEPIECE if files.find(f"{part}/{file}") is not None]
        missing = "vocab.json" if merges is not None else "merges.txt" if vocabulary is not None else "vocabulary"
        raise UsageError(
            f"{name} is a SentencePiece tokenizer ({other[0]}), as T5 has; {_ONLY_CLIP}."
            if other
            else f"{name} has no {missing}: it needs {part}/tokenizer.json, or {part}/vocab.json and "
            f"{part}/merges.txt; copy them from the model that the teacher was made from."
        )


def _check_vocabulary(tokenizer: CLIPTokenizer, model: dict[str, Any], name: str) -> None:
    """`UsageError` if part of the vocabulary is missing, or if merges are that would form its tokens."""
    vocabulary: dict[str, int] = model["vocab"]
    letters = set(ByteLevel.alphabet())  # one for each byte, alone and as the end of a word
    missing = len((letters | {letter + _WORD_END for letter in letters}) - vocabulary.keys())
    if missing:
        raise UsageError(
            f"{name} has no tokens for {missing} of CLIP's 512 letters: its vocabulary is not complete; copy it from "
            "the model that the teacher was made from."
        )
    for which in ("bos_token", "eos_token", "pad_token"):
        if getattr(tokenizer, which) is None:
            raise UsageError(
                f"{name} has no {which}; copy its tokenizer_config.json from the model that the teacher was made from."
            )
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    words = {token for token in vocabulary.keys() - special if len(token.removesuffix(_WORD_END)) > 1}
    unreachable = len(words - {first + second for first, second in model["merges"]})
    if unreachable:
        raise UsageError(
            f"{name} has no merges for {unreachable} of its {len(vocabulary)} tokens (merges.txt, or tokenizer.json): "
            "they are not complete; copy them from the model that the teacher was made from."
        )
    formed = [vocabulary[first + second] for first, second in model["merges"] if first + second in vocabulary]
    if formed != sorted(formed):  # CLIP's tokens have the order in which they are merged
        raise UsageError(
            f"{name} has its merges in another order than its tokens, so that other tokens would be formed; copy "
            "merges.txt, or tokenizer.json, from the model that the teacher was made from."
        )


def _check_fit(tokenizer: CLIPTokenizer, text_encoder: CLIPTextConfig, name: str) -> None:
    """`UsageError` unless the tokens' ids are those of the text encoder."""
    ids, rows = tokenizer.get_vocab().values(), text_encoder.vocab_size
    remedy = "does not fit its text encoder; pass the two of the same model."
    if max(ids) >= rows:
        raise UsageError(f"{name} has token ids up to {max(ids)}, the text encoder {rows} tokens: it {remedy}")
    end = tokenizer.eos_token_id
    if text_encoder.eos_token_id not in (_UNKNOWN_END, end):
        raise UsageError(
            f"{name} ends captions with the token {end}, the text encoder expects {text_encoder.eos_token_id} "
            f"(eos_token_id): it {remedy}"
        )
    if text_encoder.eos_token_id == _UNKNOWN_END and len(ids) < 0.9 * rows:  # a text encoder may have a few more
        raise UsageError(f"{name} has {len(ids)} tokens, the text encoder {rows}: it {remedy}")


def _check_length(tokenizer: CLIPTokenizer, text_encoder: CLIPTextConfig, name: str) -> None:
    length, longest = tokenizer.model_max_length, text_encoder.max_position_embeddings
    if isinstance(length, int) and not isinstance(length, bool) and _CAN_BE_CAPTIONS <= length <= longest:
        return
    given = f"model_max_length is {length!r}"
    if isinstance(length, int) and length > 10**6:  # what Transformers takes where there is none
        given = "there is no model_max_length, the length that captions are cut to"
    raise UsageError(f'{name}: {given}; write "model_max_length": {longest}, the tokens that the text encoder takes.')


def _try_out(tokenizer: CLIPTokenizer, name: str) -> None:
    """`UsageError` unless two captions become different tokens, framed and padded as CLIP's are."""
    length = tokenizer.model_max_length
    ids = [tokenizer.encode(text, padding="max_length", max_length=length, truncation=True) for text in ("a", "b")]
    first, last, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    tokens = tokenizer.convert_tokens_to_ids(["a" + _WORD_END, "b" + _WORD_END])
    expected = [[first, token, last, *[pad] * (length - _CAN_BE_CAPTIONS)] for token in tokens]
    for caption, found, right in zip("ab", ids, expected, strict=True):
        if found != right:
            raise UsageError(
                f"{name} turns the caption {caption!r} into the tokens {found[:5]} …, where CLIP's gives "
                f"{right[:5]} …; copy its files from the model that the teacher was made from."
            )


def count_tokens(tokenizers: Iterable[CLIPTokenizer], captions: Sequence[str]) -> list[tuple[int, int]]:
    """For each caption (its tokens, with those of its start and end; how many the text encoder reads).

    Of several tokenizers, those of the one that cuts the most off.
    """
    if not captions:
        return []
    counted = []
    for tokenizer in tokenizers:
        ids = tokenizer(list(captions), verbose=False).input_ids  # verbose: it warns of what is only counted here
        counted.append([(len(of_caption), tokenizer.model_max_length) for of_caption in ids])
    return [max(pairs, key=lambda pair: pair[0] - pair[1]) for pairs in zip(*counted, strict=True)]
