"""How many tokens captions have, and how many of them the text encoders read."""

from collections.abc import Iterable, Sequence

from transformers import CLIPTokenizer


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
