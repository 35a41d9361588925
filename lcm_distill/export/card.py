"""The model card: what a model is, how to draw with it, what it drew, what was measured, how it was trained."""

import os
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_LOCAL = re.compile(r"[~/\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]")


def hub_id(model: str) -> str | None:
    """`model` if it names a model on the Hub, None if it is a folder or a file."""
    return model if not os.path.exists(model) and re.fullmatch(r"[\w.-]+/[\w.-]+", model) else None


def without_folders(value: Any) -> Any:
    """A flag's value as the public may see it: of local paths the last part alone, in lists and in shards joined by ::.

    Hub ids, URLs, numbers and prompts stay as they are.
    """
    if isinstance(value, (list, tuple)):
        return [without_folders(item) for item in value]
    return "::".join(_last_part(part) for part in value.split("::")) if isinstance(value, str) else value


def _last_part(text: str) -> str:
    path = re.sub(r"^file:(//)?", "", text).rstrip("/\\")
    return re.split(r"[/\\]", path)[-1] if _LOCAL.match(path) or os.path.exists(path) else text


def model_card(
    title: str,
    *,
    base_model: str,
    relation: str,
    usage: str,
    note: str,
    settings: Mapping[str, Any],
    tags: list[str],
    picture: str | None = None,
    measured: Mapping[str, float] | None = None,
    licence: Mapping[str, Any] | None = None,
) -> ModelCard:
    """A card for a model that was distilled from `base_model`, which is linked when it is a Hub id.

    `relation` is the Hub's word for what the model is to it: "finetune", "adapter". `usage` is Python code, `note`
    what to say below it, `picture` a file beside the card, `measured` numbers by their names in words, `settings` the
    run's flags. `licence` is the base model's, under a card's own names; without one the card has none.
    """
    base = hub_id(base_model)
    known: dict[str, Any] = dict(licence or {}) | ({"base_model_relation": relation} if base else {})
    data = ModelCardData(
        **known,
        base_model=base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["lcm", "latent-consistency-models", "text-to-image", "diffusers", *tags],
    )
    teacher = f"[{base}](https://huggingface.co/{base})" if base else f"`{_last_part(base_model)}`"
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        f"A latent consistency model distilled from {teacher}: it draws in 1 to 8 steps.",
    ]
    if licence and "license" in licence:
        name = licence.get("license_name") or licence["license"]
        link = licence.get("license_link")
        sections.append(f"Its licence is that of {teacher}: {f'[{name}]({link})' if link else name}.")
    if picture:
        sections.append(f"![What it drew at the end of the training]({picture})")
    sections += ["## Use", f"```python\n{usage}\n```", note]
    if measured:
        sections += ["## Measured", _table("what", "value", {name: f"{value:.4g}" for name, value in measured.items()})]
    public = {f"`--{name}`": without_folders(value) for name, value in settings.items() if value is not None}
    sections += ["## Training", _table("flag", "value", public)]
    return ModelCard("\n\n".join(sections) + "\n")


def _table(left: str, right: str, rows: Mapping[str, Any]) -> str:
    cells = {name: re.sub(r"\s*\n\s*", " ", str(value)).replace("|", "\\|") for name, value in rows.items()}
    lines = [f"| {name} | {value} |" for name, value in cells.items()]
    return "\n".join([f"| {left} | {right} |", "|---|---|", *lines])
