#!/usr/bin/env python
"""Distil a Stable Diffusion 1.x / 2.x teacher into a latent consistency model: a full U-Net student.

    accelerate launch train_lcm_distill_sd_wds.py \\
        --pretrained_teacher_model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --train_shards_path_or_url "data/{00000..00099}.tar" --output_dir lcm-sd15 \\
        --mixed_precision bf16 --learning_rate 1e-6 --loss_type huber --max_train_steps 4000 \\
        --train_batch_size 16 --resume_from_checkpoint latest

By computation this takes 36 GB of a GPU; with --gradient_checkpointing --use_8bit_adam, slower, 16 GB.

The method is Algorithm 1 of arXiv 2310.04378. The result generates in 1 to 8 steps:

    unet = UNet2DConditionModel.from_pretrained("lcm-sd15", dtype=torch.float16, variant="fp16")
    pipe = DiffusionPipeline.from_pretrained(TEACHER, unet=unet, dtype=torch.float16).to("cuda")
    pipe.scheduler = LCMScheduler.from_pretrained("lcm-sd15")
    picture = pipe("a castle at dusk", num_inference_steps=4, guidance_scale=8.0).images[0]
"""

from lcm_distill import flags
from lcm_distill.errors import run_program

PROGRAM = "train_lcm_distill_sd_wds"


def parse_args(argv: list[str] | None = None) -> flags.ProgramFlags[flags.FullStudentFlags]:
    return flags.parse(__doc__, argv, defaults=flags.SD, student=flags.FullStudentFlags)


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered here, before the seconds that the imports below take

from functools import partial

import torch

from lcm_distill.data.loader import open_loader
from lcm_distill.data.preparation import Preparation
from lcm_distill.data.shards import count_samples, expand_shards
from lcm_distill.distributed.fsdp import device_before_split, optimizer_parts, prepare_for_training, split
from lcm_distill.export.weights import export_full_student
from lcm_distill.models import sd as family
from lcm_distill.models import unets
from lcm_distill.models.fake_score import FakeScore
from lcm_distill.models.frozen import batch_latents, check_encoding
from lcm_distill.models.teacher import Teacher, read_configs
from lcm_distill.objective import consistency as lcd
from lcm_distill.objective.schedule import DDIMSolver, NoiseSchedule, build_lcm_scheduler
from lcm_distill.run.accelerator import autocast_over, inference_dtype
from lcm_distill.run.matching import DistributionMatching, check_matching
from lcm_distill.run.optim import build_lr_scheduler, build_optimizer
from lcm_distill.run.run import Run
from lcm_distill.run.validation import Validation, check_validation, validation_guidance_scale
from lcm_distill.sampling.generate import build_teacher_sampler
from lcm_distill.sampling.initial import InitialStudent


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    distillation, resolution = args.distillation, args.preparation.resolution
    steps, w_min, w_max = distillation.num_ddim_timesteps, distillation.w_min, distillation.w_max

    # Mistakes in the flags are reported here, before any weights are loaded.
    shards = expand_shards(args.streaming.train_shards_path_or_url, args.streaming.allow_pipe_in_lists)
    preparation = Preparation.from_flags(args.preparation)
    teacher = Teacher.from_flags(args.teacher)
    configs = read_configs(teacher, family=family.NAME, resolution=resolution, num_ddim_timesteps=steps)
    sampler = build_lcm_scheduler(
        configs.scheduler, steps, distillation.timestep_scaling_factor, distillation.top_timestep
    )
    ddim = build_teacher_sampler(configs.scheduler)
    prompts = check_validation(args.validation, sampler, ddim)
    architecture = unets.full_student_architecture(configs.unet, args.student)
    run = Run(PROGRAM, args.launch, args.streaming, architecture, args.flat(), argv=argv, can_split=True)
    accelerator, device = run.accelerator, run.accelerator.device
    check_matching(args.matching, accelerator)
    initial = InitialStudent.find(None if run.resumed else args.student, args.teacher, family, configs, sampler)
    preflight = run.inspect(shards, preparation, partial(family.count_tokens, teacher))
    preparation = preflight.preparation
    check_encoding(preparation.encoding, teacher, family)
    counted = partial(count_samples, shards, caption_column=preparation.caption_column)
    plan = run.plan(args.length, args.optimization, args.streaming.train_batch_size, counted)
    run.connect()

    # The networks: the frozen parts with the teacher, the student θ, and its slow copy, the target θ⁻.
    dtype = inference_dtype(accelerator)
    teacher_dtype = dtype if args.speed.cast_teacher_unet else torch.float32
    frozen = family.load_frozen(teacher, device=device, dtype=dtype, encoding=preparation.encoding)
    student = unets.student_from_teacher(frozen.unet, args.student.unet_time_cond_proj_dim)
    if initial:
        initial.load_into(student)
    student.to(device_before_split(accelerator))
    target = unets.target_from_student(student)
    unets.cast(frozen.unet, teacher_dtype)
    width = args.student.unet_time_cond_proj_dim if w_min < w_max else None
    fake_score = FakeScore.from_flags(args.matching, frozen.unet, time_cond_proj_dim=width)
    unets.apply_speed_flags(args.speed, student, target, frozen.unet)
    frozen.compile_encoder(args.speed.compile)
    split(accelerator, student, target, frozen.unet)
    optimizer = build_optimizer(
        student.parameters(), args.optimization, plan.learning_rate, fused=accelerator.mixed_precision != "fp16"
    )
    lr_scheduler = build_lr_scheduler(optimizer, args.optimization, steps=plan.steps)
    student, optimizer = prepare_for_training(accelerator, student, optimizer)
    student_unet = accelerator.unwrap_model(student)

    # The data, and the objective.
    loader = open_loader(run.streaming, shards, preparation, run.seed, accelerator)
    schedule = NoiseSchedule.from_config(configs.scheduler).to(device)
    solver = DDIMSolver(schedule, steps, distillation.top_timestep)
    consistency = lcd.ConsistencyFunction(schedule, distillation.timestep_scaling_factor)
    guided = partial(
        lcd.guided_prediction, frozen.unet, schedule, dtype=teacher_dtype, batch_size=args.speed.teacher_batch_size
    )
    matching = DistributionMatching(
        run, args.matching, args.optimization, fake_score, schedule, guided, dtype=teacher_dtype
    )
    pipeline = partial(family.build_pipeline, frozen)
    guidance_scale = validation_guidance_scale(args.validation, distillation)
    validation = Validation(
        run,
        args.validation,
        {"student": partial(pipeline, student_unet, sampler), "target": partial(pipeline, target, sampler)},
        partial(pipeline, frozen.unet, ddim),
        prompts=prompts or preflight.captions,
        batch_size=args.streaming.train_batch_size,
        guidance_scale=guidance_scale,
        teacher_guidance_scale=guidance_scale,
        resolution=resolution,
        all_loaded=frozen.all_on_device,
    )

    parts = {"unet": unets.UNetPart(student_unet), "unet_target": unets.UNetPart(target)}
    parts |= optimizer_parts(accelerator, optimizer) | matching.parts()
    run.start(parts, loader, optimizer, lr_scheduler, student, validation)
    for batch, generator in run.batches():
        with accelerator.accumulate(student):
            # 1 batch → latents z, conditioning c
            latents = batch_latents(frozen, batch, args.speed.vae_encode_batch_size, generator)
            conditioning, unconditional = family.batch_conditioning(frozen, batch)
            size = len(latents)

            # 2 draw n, noise, w
            index = solver.draw_index(size, distillation.top_timestep_probability, generator)
            noise = torch.randn(latents.shape, generator=generator, device=device)
            w = w_min + (w_max - w_min) * torch.rand(size, generator=generator, device=device)  # to be embedded
            w_embedding = lcd.guidance_embedding(w, args.student.unet_time_cond_proj_dim)
            start, end = solver.timesteps[index], solver.previous_timesteps[index]

            # 3 z_{n+k}
            noisy = solver.add_noise(latents, noise, index)

            # 4 teacher with guidance, one solver step: ẑ_n
            with torch.no_grad(), autocast_over(accelerator, teacher_dtype):
                x0, epsilon = guided(noisy, start, conditioning, unconditional, w)
            previous = solver.step(x0, epsilon, index)

            # 5 target f_θ⁻(ẑ_n, w, c, t_n)
            with torch.no_grad(), accelerator.autocast():
                output = lcd.unet_output(target, previous, end, conditioning, w_embedding)
            target_prediction = consistency(output, previous, end)

            # 6 student f_θ(z_{n+k}, w, c, t_{n+k})
            with accelerator.autocast():
                output = lcd.unet_output(student, noisy, start, conditioning, w_embedding)
            prediction = consistency(output, noisy, start)

            # 7 loss, in float32; that of distribution matching is of x = f_θ(z_{n+k}, w, c, t_{n+k})
            loss = lcd.consistency_loss(prediction, target_prediction, distillation.loss_type, distillation.huber_c)
            run.add_loss(loss, size)
            if matching.begun(run.global_step):
                dm_loss = matching.loss(prediction, conditioning, unconditional, w, w_embedding, generator)
                loss = args.matching.dm_consistency_weight * loss + args.matching.dm_weight * dm_loss

            # 8 backward, clip, step; then the fake score's own steps, on x
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(student.parameters(), args.optimization.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if matching.begun(run.global_step):
                matching.train_fake_score(prediction, conditioning, w_embedding, generator)
        if run.skipped():
            continue

        # A real step: EMA, log, checkpoint, validate
        lr_scheduler.step()
        lcd.update_ema(target.parameters(), student.parameters(), args.student.ema_decay)
        due = run.step(grad_norm)
        if due.log:
            run.log()
        if due.save:
            run.save()
        if due.validate:
            run.validate()

    if run.finish():
        export_full_student(
            args.launch.output_dir,
            student=student_unet,
            target=target,
            scheduler=sampler,
            teacher=teacher,
            family=family,
            guidance_scale=guidance_scale,
            global_step=run.global_step,
            settings=run.public_flags,
            measured=validation.measured,
            hub=run.hub,
        )
    run.end()


if __name__ == "__main__":
    run_program(main)
