"""Python code that loads a teacher's pipeline, for model cards and reports. Imports nothing heavy."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LoadingCode:
    """Code that ends with the pipeline as `pipe`, and the names that it needs from Diffusers."""

    imports: frozenset[str]
    lines: tuple[str, ...]


def loading_code(
    model: str,
    pipeline: str,
    *arguments: str,
    revision: str | None = None,
    variant: str | None = None,
    config: str | None = None,
    vae: str | None = None,
    vae_revision: str | None = None,
    dtype: str = "torch.float16",
    device: str = '"cuda"',
) -> LoadingCode:
    """Code that loads a teacher, given as `Teacher` has it.

    `pipeline` names the class of its pipeline, which loads single files; `arguments` are added to the call. `dtype` and
    `device` are expressions.
    """
    lines = []
    given = [f"revision={revision!r}"] * bool(revision) + [f"variant={variant!r}"] * bool(variant)
    source = "DiffusionPipeline.from_pretrained"
    if model.endswith(".safetensors"):
        source = f"{pipeline}.from_single_file"
        given = [f"config={config!r}"] * bool(config)
    if vae:
        own = f", revision={vae_revision!r}" if vae_revision else ""
        lines += [f"vae = AutoencoderKL.from_pretrained({vae!r}{own}, dtype={dtype})"]
        given += ["vae=vae"]
    given = [*given, *arguments, f"dtype={dtype}"]
    lines += [f"pipe = {source}({', '.join([repr(model), *given])}).to({device})"]
    return LoadingCode(frozenset({source.partition(".")[0], *["AutoencoderKL"] * bool(vae)}), tuple(lines))
