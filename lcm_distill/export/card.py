"""The model card: what a model is, how to use it, a sample, what was measured, how it was trained."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

_LOCAL = re.compile(r"[~/\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]")


def parse_hub_id(model: str) -> str | None:
    """`model` if it is the id of a model on the Hub, None if it is a folder or a file."""
    return model if not os.path.exists(model) and re.fullmatch(r"[\w.-]+/[\w.-]+", model) else None


def read_licence(model: str, cache_dir: str | None = None) -> dict[str, Any]:
    """The licence in the card of a model, a folder or a Hub id whose card is in the cache; empty if none is known.

    As a card's `license`, `license_name` and `license_link`.
    """
    found: Any = Path(model) / "README.md"
    if hub_id := parse_hub_id(model):
        found = try_to_load_from_cache(hub_id, "README.md", cache_dir=cache_dir)
    if not isinstance(found, (str, Path)) or not os.path.isfile(found):
        return {}
    try:
        known = ModelCard(Path(found).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # anyone may have written it, and YAML's errors are of many classes
        return {}
    names = ("license", "license_name", "license_link")
    licence = {name: known[name] for name in names if isinstance(known.get(name), str)}
    if "://" not in licence.get("license_link", "://"):  # a file beside the card
        link = licence.pop("license_link")
        licence |= {"license_link": f"https://huggingface.co/{hub_id}/blob/main/{link}"} if hub_id else {}
    return licence


def strip_folders(value: Any) -> Any:
    """A flag's value for the public: local paths are cut to their last part, in lists and in shards joined by :: too.

    Hub ids, URLs, numbers and prompts are unchanged.
    """
    if isinstance(value, (list, tuple)):
        return [strip_folders(item) for item in value]
    return "::".join(_last_part(part) for part in value.split("::")) if isinstance(value, str) else value


def _last_part(text: str) -> str:
    path = re.sub(r"^file:(//)?", "", text).rstrip("/\\")
    return re.split(r"[/\\]", path)[-1] if _LOCAL.match(path) or os.path.exists(path) else text


def build_model_card(
    title: str,
    *,
    base_model: str,
    relation: str,
    usage: str,
    note: str,
    elsewhere: str = "",
    settings: Mapping[str, Any],
    tags: list[str],
    picture: str | None = None,
    measured: Mapping[str, float] | None = None,
    licence: Mapping[str, Any] | None = None,
) -> ModelCard:
    """A card for a model that was distilled from `base_model`, which is linked when it is a Hub id.

    `relation` is the Hub's word for the model's relation to it: "finetune", "adapter", "merge". `usage` is Python code,
    `note` the text below it, `elsewhere` how to use it in other programs, `picture` a file beside the card, `measured`
    numbers by a description, `settings` the run's flags. `licence` is the base model's, with the keys of a card's
    metadata; without one the card names no licence.
    """
    base = parse_hub_id(base_model)
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
        f"A latent consistency model distilled from {teacher}: it generates pictures in 1 to 8 steps.",
    ]
    if licence and "license" in licence:
        name = licence.get("license_name") or licence["license"]
        link = licence.get("license_link")
        sections.append(f"Its licence is that of {teacher}: {f'[{name}]({link})' if link else name}.")
    if picture:
        sections.append(f"![Generated at the end of the training]({picture})")
    sections += ["## Use", f"```python\n{usage}\n```", note]
    if elsewhere:
        sections += ["### In other programs", elsewhere]
    if measured:
        sections += ["## Measured", _table("what", "value", {name: f"{value:.4g}" for name, value in measured.items()})]
    public = {f"`--{name}`": strip_folders(value) for name, value in settings.items() if value is not None}
    sections += ["## Training", _table("flag", "value", public)]
    return ModelCard("\n\n".join(sections) + "\n")


def _table(left: str, right: str, rows: Mapping[str, Any]) -> str:
    cells = {name: re.sub(r"\s*\n\s*", " ", str(value)).replace("|", "\\|") for name, value in rows.items()}
    lines = [f"| {name} | {value} |" for name, value in cells.items()]
    return "\n".join([f"| {left} | {right} |", "|---|---|", *lines])
