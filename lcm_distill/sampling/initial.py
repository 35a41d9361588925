"""The finished student that a run begins from (--init_student), in place of a copy of its teacher.

    a full student begins from      another full student, or its teacher with a LoRA merged into it, such as an LCM-LoRA
    a LoRA student begins from      a LoRA: another LoRA student, a published LCM-LoRA, a kohya file

What a student is, and where it is found, is that of every other command (`sampling.finished`).
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import LCMScheduler, UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.tuners.lora import LoraLayer

from lcm_distill.distributed.finite import find_not_finite
from lcm_distill.environment import refused_lora
from lcm_distill.errors import UsageError, brief
from lcm_distill.flags import FullStudentFlags, StudentFlags, TeacherFlags
from lcm_distill.models.families import Family
from lcm_distill.models.teacher import TeacherConfigs
from lcm_distill.sampling.finished import Student, check_same_teacher, find_student, lora_source

logger = logging.getLogger(__name__)

FLAG = "--init_student"
_ADAPTER = "initial"  # the name of a LoRA while it is read


@dataclasses.dataclass(frozen=True)
class InitialStudent:
    """A finished student whose weights a new one takes; creating it loads none of them."""

    student: Student
    family: Family

    @classmethod
    def find(
        cls,
        flags: StudentFlags | None,
        teacher: TeacherFlags,
        family: Family,
        configs: TeacherConfigs,
        sampler: LCMScheduler,
    ) -> "InitialStudent | None":
        """The student that --init_student names, a folder, file or Hub id; None without it, and without `flags`.

        `flags` and `sampler` are those of the new student, `configs` are the teacher's. `UsageError` if there is no
        student, if it was not distilled from such a teacher, or if it is a U-Net, from which a LoRA cannot begin, or
        one whose guidance embedding has another width. A warning if it starts from a lower timestep than the new
        student, and so was never trained on those above.
        """
        if flags is None or flags.init_student is None:
            return None
        source = flags.init_student
        student = find_student(source, teacher.cache_dir, flag=FLAG)
        if student.kind == "full":
            if not isinstance(flags, FullStudentFlags):
                raise UsageError(
                    f"{FLAG} {source} is a whole U-Net, from which a LoRA cannot begin: give a LoRA, or distil a full "
                    f"student (train_lcm_distill_{family.NAME}_wds.py)."
                )
            config, own = student.load_config(), flags.unet_time_cond_proj_dim
            check_same_teacher(config, configs.unet, f"{FLAG} {source}")
            width = config.get("time_cond_proj_dim")
            if width not in (None, own):
                raise UsageError(
                    f"{FLAG} {source} has a guidance embedding of width {width}, not {own}: pass "
                    f"--unet_time_cond_proj_dim {width}."
                )
        top, own_top = (each.config.num_train_timesteps - 1 for each in (student.sampler(configs.scheduler), sampler))
        if top < own_top:
            logger.warning(
                "%s %s starts from timestep %d and was not trained above it, but this run's student starts from %d: "
                "pass --top_timestep %d to go on from where it starts.",
                *(FLAG, source, top, own_top, top),
            )
        return cls(student, family)

    def load_into(self, student: UNet2DConditionModel) -> None:
        """Gives its weights to a float32 `student` that was copied from the teacher, in place.

        One without a guidance embedding leaves the projection of the new student's at zero.
        """
        if self.student.kind == "lora":
            self._load_lora(student)
            student.fuse_lora()
            student.unload_lora()
        else:
            weights = self.student.load_unet(torch.float32).state_dict()
            self._check(weights)
            student.load_state_dict(student.state_dict() | weights)
        logger.info("the student begins as %s", self.student.source)

    def read_adapter(self, unet_config: Mapping[str, Any]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The factors of its LoRA by module, float32: the first, and the second times the LoRA's scale.

        `unet_config` is that of the teacher's U-Net. Diffusers loads the LoRA into a U-Net without memory, from which
        modules and scales are read; the values are the file's, since a loaded adapter takes the U-Net's precision.
        """
        with init_empty_weights():
            unet = UNet2DConditionModel.from_config(dict(unet_config))
        state = self._load_lora(unet)
        if not any("lora_A" in name for name in state):
            state = convert_unet_state_dict_to_peft(state)
        layers: list[tuple[str, Any]] = [(path, m) for path, m in unet.named_modules() if isinstance(m, LoraLayer)]
        logger.info("the student begins as %s", self.student.source)
        return {
            path: (
                state[f"{path}.lora_A.weight"].float(),
                state[f"{path}.lora_B.weight"].float() * layer.scaling[_ADAPTER],
            )
            for path, layer in layers
        }

    def _load_lora(self, unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
        """Loads its LoRA into `unet` as the one adapter; its tensors by name, without "unet.".

        `UsageError` if it cannot be loaded, does not fit, or also changes text encoders.
        """
        source = self.student.source
        try:
            weights, where = lora_source(source)
            state, alphas, metadata = self.family.PIPELINE.lora_state_dict(
                weights,
                cache_dir=self.student.cache_dir,
                use_safetensors=True,  # Diffusers also loads pickled files otherwise, which can run any code
                unet_config=unet.config,
                return_lora_metadata=True,
                **where,
            )
            foreign = sorted({key.partition(".")[0] for key in state} - {"unet"})
            if not foreign:
                with refused_lora():
                    self.family.PIPELINE.load_lora_into_unet(
                        state,
                        network_alphas=alphas,
                        unet=unet,
                        adapter_name=_ADAPTER,
                        low_cpu_mem_usage=True,
                        metadata=metadata,
                    )
        except Exception as error:  # no such file, other shapes, another model's names: each raises another class
            raise UsageError(
                f"{FLAG} {source}: this LoRA cannot be loaded into the teacher ({brief(error)}). Pass a .safetensors "
                "LoRA, and the teacher that it was trained on or one of the same architecture."
            ) from None
        if foreign:
            raise UsageError(
                f"{FLAG} {source}: this LoRA also changes {' and '.join(foreign)}, which a student does not have; pass "
                "one of the U-Net alone, such as an LCM-LoRA."
            )
        self._check(state)
        return {name.removeprefix("unet."): tensor for name, tensor in state.items()}

    def _check(self, weights: Mapping[str, torch.Tensor]) -> None:
        """`UsageError` if values are not finite: no loss would be, and the run would blame its learning rate."""
        if name := find_not_finite(weights.items()):
            raise UsageError(
                f"{FLAG} {self.student.source}: values in {name} are not finite; pass a whole student, or leave "
                "the flag out to begin from the teacher."
            )
