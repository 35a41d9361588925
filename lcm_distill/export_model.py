"""Write a finished student as one model that every program loads: a single file, a Diffusers pipeline, or both.

    python -m lcm_distill.export_model lcm-sd15 --single_file lcm-sd15.safetensors --guidance_scale 8
    python -m lcm_distill.export_model lcm-sd15/checkpoint-2000 --output_dir lcm-sd15-pipeline
    python -m lcm_distill.export_model lcm-lora-sd15 --fuse_lora --single_file fast.safetensors

--single_file writes U-Net, VAE and text encoders into one .safetensors file in the original layout (LDM, SGM), for
ComfyUI, A1111, Forge, InvokeAI and `from_single_file`, with metadata (ModelSpec) and beside it comfyui_workflow.json.
--output_dir writes the folder of a Diffusers pipeline, which loads with one line.

A full student takes its guidance from an input that only Diffusers has: here one --guidance_scale is put into its
weights, which is exact, and then it generates at guidance_scale (CFG) 1. An LCM-LoRA has its guidance in its weights;
with --fuse_lora it is merged into its teacher, or into the fine-tune of it that --pretrained_teacher_model names.
Without that flag the teacher is the one that the run's records name; VAE and text encoders are the teacher's.
"""

import argparse

from lcm_distill import flags
from lcm_distill.errors import SaveError, UsageError, brief, run_program


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags.CommandParser(
        "python -m lcm_distill.export_model",
        __doc__,
        "%(prog)s STUDENT [--single_file FILE] [--output_dir FOLDER] [--guidance_scale 8] [--fuse_lora] [flags]",
    )
    parser.add_argument(
        "student",
        type=flags.path,
        metavar="STUDENT",
        help="the output folder of a run, a checkpoint of one, a Hub id, or a LoRA's .safetensors file",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--single_file", type=flags.path, metavar="FILE", help="write this .safetensors file, in the original layout"
    )
    group.add_argument("--output_dir", type=flags.path, metavar="FOLDER", help="write a Diffusers pipeline here")
    group.add_argument("--dtype", choices=flags.DTYPES, default="fp16", help="precision of the weights")
    group = parser.add_argument_group("student")
    group.add_argument(
        "--guidance_scale",
        type=flags.non_negative,
        help="w + 1, put into the weights of a full student (default: 8, or the nearest that was trained)",
    )
    group.add_argument("--fuse_lora", action="store_true", help="merge an LCM-LoRA into its teacher")
    flags.add_group(parser, flags.TeacherFlags, {"pretrained_teacher_model": None})
    args = parser.parse_args(argv)
    if not args.single_file and not args.output_dir:
        parser.error("pass --single_file FILE.safetensors, --output_dir FOLDER, or both")
    return args


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered here, before the seconds that the imports below take

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from lcm_distill.distributed.finite import HALF, check_finite
from lcm_distill.environment import quiet_libraries, respect_umask
from lcm_distill.export import usage
from lcm_distill.export.card import build_model_card, parse_hub_id, read_licence
from lcm_distill.export.metadata import Description, last_picture, public_name, read_metadata, write_metadata
from lcm_distill.export.original import pipeline_tensors
from lcm_distill.export.weights import save_pipeline
from lcm_distill.models.families import Family, family_of
from lcm_distill.models.teacher import Teacher, TeacherConfigs, read_configs
from lcm_distill.models.unets import bake_guidance
from lcm_distill.objective.schedule import sampling_sigmas
from lcm_distill.run import journal
from lcm_distill.run.record import DamageError, read_record
from lcm_distill.sampling.finished import PARTS, RECORD, Student, WeightedLora, check_same_teacher, find_student

logger = logging.getLogger(__name__)

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_OURS = "latent consistency distillation"  # how the comment in the metadata of what this command writes begins


@dataclasses.dataclass(frozen=True)
class Origin:
    """What is known about a student's run: its flags by name, its step, its output folder, where it was launched."""

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    step: int | None = None
    folder: Path | None = None
    launched_in: str = ""

    @classmethod
    def find(cls, source: str) -> "Origin":
        """That of a student, from the run.json of a checkpoint or the journal of a run; empty if it has neither."""
        path = Path(source).expanduser().resolve()
        folder = path.parent if path.is_file() else path
        folders = [folder, folder.parent] if folder.name in PARTS else [folder]
        for place in folders:
            if (place / RECORD).is_file():
                try:
                    record = read_record(place)
                except DamageError as error:
                    raise UsageError(f"{place} is damaged: {error}; export another checkpoint.") from None
                launch = cls._last_launch(place.parent)
                return cls(record.get("flags", {}), record["global_step"], place.parent, launch.get("folder", ""))
            if launch := cls._last_launch(place):
                return cls(launch.get("flags", {}), launch["end"]["global_step"], place, launch.get("folder", ""))
        return cls()

    @staticmethod
    def _last_launch(folder: Path) -> dict[str, Any]:
        """The last launch in a run's journal, with its "end"; empty without a journal."""
        try:
            launches, entries = journal.read_journal(folder / journal.NAME)
        except OSError:
            return {}
        last = max([0, *(entry["step"] for entry in entries)])
        return {"end": {"global_step": last}, **launches[-1]} if launches else {}

    def teacher_flags(self, given: flags.TeacherFlags, source: str) -> flags.TeacherFlags:
        """The teacher's flags: those `given`, or those of the run; `UsageError` if none names a teacher."""
        if given.pretrained_teacher_model:
            return given
        found: dict[str, Any] = {}
        for field in dataclasses.fields(given):
            value = self.settings.get(field.name)
            if isinstance(value, str):
                found[field.name] = self._from_here(value) if field.name in _PLACES else value
        found |= {name: value for name, value in vars(given).items() if value is not None}
        found.setdefault("pretrained_teacher_model", _base_model(source))
        if not found["pretrained_teacher_model"]:
            raise UsageError(
                f"{source} does not say what it was distilled from: pass that as --pretrained_teacher_model; its VAE "
                "and text encoders are part of the model."
            )
        return flags.TeacherFlags(**found)

    def _from_here(self, place: str) -> str:
        """A path as the run was given it, relative to where it was launched; Hub ids and others stay."""
        there = Path(self.launched_in, place)
        return str(there) if self.launched_in and not Path(place).exists() and there.exists() else place

    def trained_guidance(self) -> tuple[float, float]:
        """The least and the largest guidance_scale that a full student was trained with, (1, ∞) if it is unknown."""
        low, high = self.settings.get("w_min"), self.settings.get("w_max")
        if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
            return 1.0, math.inf
        return 1.0 + low, 1.0 + high


_PLACES = ("pretrained_teacher_model", "teacher_config", "pretrained_vae_model_name_or_path")


def _base_model(source: str) -> str | None:
    """The teacher that the model card in a folder or on the Hub names."""
    card = Path(source) / "README.md"
    if not card.is_file() and parse_hub_id(source) is None:
        return None
    with contextlib.suppress(Exception):  # no card, no connection, a card of another kind
        return ModelCard.load(str(card) if card.is_file() else source).data.get("base_model") or None
    return None


def choose_guidance(given: float | None, student: Student, origin: Origin) -> float | None:
    """The guidance_scale to put into a student's weights; None for one that has no input for it.

    `UsageError` if one is `given` for such a student. One beyond what was trained is warned of.
    """
    if not student.has_guidance_embedding:
        if given is not None:
            raise UsageError(
                f"--guidance_scale {given:g}: {student.source} has no guidance input, its guidance is in its weights "
                "already; leave the flag out."
            )
        return None
    low, high = origin.trained_guidance()
    if given is None:
        return min(max(8.0, low), high)
    if not low <= given <= high:
        logger.warning(
            "--guidance_scale %g: this student was trained with %g to %g (w + 1), and may be worse beyond that",
            given, low, high,
        )  # fmt: skip
    return given


def build_pipeline(
    student: Student, teacher: Teacher, configs: TeacherConfigs, family: Family, guidance_scale: float | None
) -> Any:
    """The pipeline of a student, float32 on the CPU: a U-Net without guidance embedding and LoRA, and its sampler.

    `UsageError` if the student cannot be loaded or is not of this teacher.
    """
    frozen = family.Frozen(teacher, device="cpu", dtype=torch.float32)  # each part is loaded where it is used
    scheduler = student.sampler(configs.scheduler)
    if student.kind == "full":
        check_same_teacher(student.load_config(), configs.unet, student.source)
        unet = student.load_unet(torch.float32)
        if guidance_scale is not None:
            unet = bake_guidance(unet, guidance_scale - 1)
        return family.build_pipeline(frozen, unet, scheduler)
    pipeline = family.build_pipeline(frozen, frozen.unet, scheduler)
    WeightedLora(student.source, flag="STUDENT", cache_dir=student.cache_dir).load(pipeline, "student")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline


def check_output(single_file: str | None, output_dir: str | None, student: Student, teacher: Teacher) -> None:
    """`UsageError` if the output would replace a model that is read, or one that this command has not written."""
    inputs = [teacher.model, teacher.config, teacher.vae, student.source]
    read = {os.path.realpath(name) for name in inputs if name and os.path.exists(name)}
    for flag, place in (("--single_file", single_file), ("--output_dir", output_dir)):
        if place and os.path.realpath(place) in read:
            raise UsageError(f"{flag} {place} is a model that is read; give another name.")
    if single_file and os.path.lexists(single_file) and not _is_ours(Path(single_file)):
        raise UsageError(
            f"--single_file {single_file} exists, and this command has not written it; give another name, or remove it."
        )
    folder = Path(output_dir or ".")
    if output_dir and os.path.lexists(folder) and not folder.is_dir():
        raise UsageError(f"--output_dir {folder} is not a folder; give another name.")
    written = list((folder / "unet").glob("*.safetensors"))
    if output_dir and folder.is_dir() and any(folder.iterdir()) and not (written and _is_ours(written[0])):
        raise UsageError(
            f"--output_dir {folder} holds files that this command has not written; give a new or empty folder."
        )


def _is_ours(path: Path) -> bool:
    """Whether this command has written a file."""
    with contextlib.suppress(OSError, UsageError):
        found = read_metadata(path)
        return found.get("ss_training_comment", "").startswith(_OURS) and "modelspec.merged_from" in found
    return False


@contextlib.contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except (UsageError, SaveError):
        raise
    except Exception as error:  # a full disk is a different exception in each writer
        raise SaveError(
            f"{place} could not be written ({brief(error)}): free disk space, or give another place."
        ) from None


def write_single_file(path: Path, pipeline: Any, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Writes a pipeline's networks in the original layout, under a temporary name until the file is complete."""
    tensors = pipeline_tensors(pipeline, dtype)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.incomplete")
        try:
            save_file(tensors, partial, metadata={"format": "pt"})
            write_metadata(partial, metadata)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_pipeline(folder: Path, pipeline: Any, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Writes the folder of a Diffusers pipeline; its networks are then in `dtype`."""
    networks: list[Any] = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    for network in networks:
        torch.nn.Module.to(network, dtype=dtype)  # Diffusers' own cast warns about modules that are missing
        if hasattr(network, "register_to_config"):
            network.register_to_config(_name_or_path="")  # else the config has a path on this machine
    with _writing(folder):
        save_pipeline(folder, pipeline)
        for path in (folder / "unet").glob("*.safetensors"):
            write_metadata(path, metadata)
        respect_umask(folder)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    quiet_libraries()

    # Mistakes in the flags are reported here, before any weights are loaded.
    if args.single_file and not args.single_file.endswith(".safetensors"):
        raise UsageError(f"--single_file {args.single_file} has to end in .safetensors, by which programs know it.")
    student = find_student(args.student, args.cache_dir, flag="STUDENT")
    origin = Origin.find(student.source)
    if student.kind == "lora" and not args.fuse_lora:
        raise UsageError(
            f"{student.source} is a LoRA: pass --fuse_lora to merge it into its teacher. (Programs that load LoRAs "
            "take the kohya_lora_weights.safetensors of a finished run as it is.)"
        )
    if student.kind == "full" and args.fuse_lora:
        raise UsageError(f"--fuse_lora: {student.source} is a whole U-Net, not a LoRA; leave the flag out.")
    guidance_scale = choose_guidance(args.guidance_scale, student, origin)
    given = flags.take(flags.TeacherFlags, args)
    teacher = Teacher.from_flags(origin.teacher_flags(given, student.source))
    family = family_of(teacher.read_config(UNet2DConditionModel, "unet"))
    configs = read_configs(teacher, family=family.NAME, resolution=0, num_ddim_timesteps=1)
    check_output(args.single_file, args.output_dir, student, teacher)

    pipeline = build_pipeline(student, teacher, configs, family, guidance_scale)
    dtype = _DTYPES[args.dtype]
    largest = HALF if dtype == torch.float16 else math.inf
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(pipeline, name, None) is not None:
            check_finite(f"the {name} to export", getattr(pipeline, name).state_dict().items(), largest=largest)
    scheduler = pipeline.scheduler.config
    if args.single_file and (warning := usage.unlike_other_programs(scheduler)):
        logger.warning("%s.", warning)

    lower_start = usage.starts_lower(scheduler)
    title = student.name.replace("/", " ")
    sample_size = configs.unet.get("sample_size")
    resolution = origin.settings.get("resolution") or (8 * sample_size if isinstance(sample_size, int) else 512)
    licence = read_licence(teacher.model, args.cache_dir)
    picture = last_picture(origin.folder, origin.step) if origin.folder else None
    description = Description(
        title,
        family.base_model_version(configs.unet),
        scheduler.prediction_type,
        teacher.model,
        usage.usage_hint("baked", lower_start=lower_start),
        resolution=resolution,
        steps=origin.step,
        settings=origin.settings,
        licence=licence,
        picture=picture,
    )
    baked = "" if guidance_scale is None else f" at guidance_scale {guidance_scale:g}"
    merged = [teacher.model, f"{public_name(student.source)}{baked}"]
    if args.single_file:
        path = Path(args.single_file)
        metadata = dataclasses.replace(description, title=path.stem).metadata(layout="original", merged_from=merged)
        write_single_file(path, pipeline, dtype, metadata)
        workflow = usage.build_workflow(
            path.name,
            resolution=resolution,
            zsnr=bool(scheduler.rescale_betas_zero_snr),
            prefix=path.stem,
            sigmas=sampling_sigmas(pipeline.scheduler, 4) if lower_start else None,
        )
        beside = usage.place_workflow(path, workflow)
        others = "" if lower_start else ", A1111, Forge"
        print(f"{path}: {path.stat().st_size / 1e9:.2f} GB, for ComfyUI ({beside}){others}; CFG 1, sampler lcm")
    if args.output_dir:
        folder = Path(args.output_dir)
        named = dataclasses.replace(description, title=folder.resolve().name)
        write_pipeline(folder, pipeline, dtype, named.metadata(layout="diffusers", merged_from=merged))
        with _writing(folder):
            build_model_card(
                named.title,
                base_model=teacher.model,
                relation="merge" if student.kind == "lora" else "finetune",
                usage=usage.pipeline_code(str(folder)),
                note=f"The guidance of the training{baked} is in the weights: use a `guidance_scale` of 1.",
                settings=origin.settings,
                tags=family.TAGS,
                licence=licence,
            ).save(folder / "README.md")
        print(f"{folder}: a Diffusers pipeline; how to use it is in {folder / 'README.md'}")


if __name__ == "__main__":
    run_program(main, resume_hint="")
