#!/usr/bin/env python
"""Distil a Stable Diffusion 1.x / 2.x teacher into an LCM-LoRA: an adapter for 1 to 8 steps.

    accelerate launch train_lcm_distill_lora_sd_wds.py \\
        --pretrained_teacher_model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --train_shards_path_or_url "data/{00000..00099}.tar" --output_dir lcm-lora-sd15 \\
        --mixed_precision bf16 --learning_rate 1e-4 --loss_type huber --max_train_steps 4000 \\
        --train_batch_size 12 --lora_rank 64 --resume_from_checkpoint latest

By computation this takes 17 GB of a GPU; with --gradient_checkpointing, slower, 6 GB.

The method is that of arXiv 2311.05556. The result generates in 1 to 8 steps, on the teacher and its fine-tunes:

    pipe = DiffusionPipeline.from_pretrained(TEACHER, dtype=torch.float16).to("cuda")
    pipe.scheduler = LCMScheduler.from_pretrained("lcm-lora-sd15")
    pipe.load_lora_weights("lcm-lora-sd15")
    picture = pipe("a castle at dusk", num_inference_steps=4, guidance_scale=1.0).images[0]
"""

from lcm_distill import flags
from lcm_distill.errors import run_program

PROGRAM = "train_lcm_distill_lora_sd_wds"


def parse_args(argv: list[str] | None = None) -> flags.ProgramFlags[flags.LoraFlags]:
    return flags.parse(__doc__, argv, defaults=flags.SD, student=flags.LoraFlags)


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered here, before the seconds that the imports below take

from functools import partial

import torch

from lcm_distill.data.loader import open_loader
from lcm_distill.data.preparation import Preparation
from lcm_distill.data.shards import count_samples, expand_shards
from lcm_distill.export.weights import export_lora_student
from lcm_distill.models import sd as family
from lcm_distill.models import unets
from lcm_distill.models.fake_score import FakeScore
from lcm_distill.models.frozen import batch_latents, check_encoding
from lcm_distill.models.lora import TARGET, AdapterShape, Lora, prepare_without_autocast
from lcm_distill.models.teacher import Teacher, read_configs
from lcm_distill.objective import consistency as lcd
from lcm_distill.objective.schedule import DDIMSolver, NoiseSchedule, build_lcm_scheduler
from lcm_distill.run.accelerator import autocast_over, inference_dtype
from lcm_distill.run.matching import DistributionMatching
from lcm_distill.run.optim import build_lr_scheduler, build_optimizer
from lcm_distill.run.run import Run
from lcm_distill.run.validation import Validation, check_validation
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
    shape = AdapterShape.from_flags(args.student, configs.unet)
    architecture = unets.architecture(configs.unet) | shape.architecture()
    not_given = args.student.not_given
    run = Run(PROGRAM, args.launch, args.streaming, architecture, args.flat(), argv=argv, not_given=not_given)
    shape = shape.resumed(run.architecture)
    accelerator, device = run.accelerator, run.accelerator.device
    initial = InitialStudent.find(None if run.resumed else args.student, args.teacher, family, configs, sampler)
    preflight = run.inspect(shards, preparation, partial(family.count_tokens, teacher))
    preparation = preflight.preparation
    check_encoding(preparation.encoding, teacher, family)
    counted = partial(count_samples, shards, caption_column=preparation.caption_column)
    plan = run.plan(args.length, args.optimization, args.streaming.train_batch_size, counted)
    run.connect()

    # The networks: one U-Net, which is the teacher while its adapter is off; the adapter is the student θ.
    dtype = inference_dtype(accelerator)
    base_dtype = dtype if args.speed.cast_teacher_unet else torch.float32
    frozen = family.load_frozen(
        teacher, device=device, dtype=dtype, unet_dtype=base_dtype, encoding=preparation.encoding
    )
    unet = frozen.unet
    lora = Lora(unet, **vars(shape), dropout=args.student.lora_dropout)
    if initial:
        lora.begin_from(initial.read_adapter(configs.unet))
    fake_score = FakeScore.from_flags(args.matching, unet, target_modules=shape.target_modules)
    unets.apply_speed_flags(args.speed, unet)
    frozen.compile_encoder(args.speed.compile)
    optimizer = build_optimizer(
        lora.parameters(), args.optimization, plan.learning_rate, fused=accelerator.mixed_precision != "fp16"
    )
    lr_scheduler = build_lr_scheduler(optimizer, args.optimization, steps=plan.steps)
    student, optimizer = prepare_without_autocast(accelerator, unet, optimizer)

    # The data, and the objective.
    loader = open_loader(run.streaming, shards, preparation, run.seed, accelerator)
    schedule = NoiseSchedule.from_config(configs.scheduler).to(device)
    solver = DDIMSolver(schedule, steps, distillation.top_timestep)
    consistency = lcd.ConsistencyFunction(schedule, distillation.timestep_scaling_factor)
    guided = partial(lcd.guided_prediction, unet, schedule, dtype=base_dtype, batch_size=args.speed.teacher_batch_size)
    matching = DistributionMatching(
        run, args.matching, args.optimization, fake_score, schedule, guided, lora.off, dtype=base_dtype
    )
    pipelines = {"student": partial(family.build_pipeline, frozen, unet, sampler)}
    if lora.average:
        pipelines["target"] = pipelines["student"]
    guidance_scale = args.validation.validation_guidance_scale
    validation = Validation(
        run,
        args.validation,
        pipelines,
        partial(family.build_pipeline, frozen, unet, ddim),
        prompts=prompts or preflight.captions,
        batch_size=args.streaming.train_batch_size,
        guidance_scale=1.0 if guidance_scale is None else guidance_scale,
        teacher_guidance_scale=1 + (w_min + w_max) / 2,
        resolution=resolution,
        all_loaded=frozen.all_on_device,
        contexts={"teacher": lora.off, "target": lora.target},
    )

    parts = lora.parts() | matching.parts()
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
            w = lcd.draw_guidance(w_min, w_max, size, generator, device)
            start, end = solver.timesteps[index], solver.previous_timesteps[index]

            # 3 z_{n+k}
            noisy = solver.add_noise(latents, noise, index)

            # 4 teacher with guidance, one solver step: ẑ_n
            with torch.no_grad(), autocast_over(accelerator, base_dtype), lora.off():
                x0, epsilon = guided(noisy, start, conditioning, unconditional, w)
            previous = solver.step(x0, epsilon, index)

            # 5 target f_θ⁻(ẑ_n, c, t_n)
            with torch.no_grad(), accelerator.autocast(), lora.target():
                output = lcd.unet_output(unet, previous, end, conditioning, dtype=base_dtype)
            target_prediction = consistency(output, previous, end)

            # 6 student f_θ(z_{n+k}, c, t_{n+k})
            with accelerator.autocast():
                output = lcd.unet_output(student, noisy, start, conditioning, dtype=base_dtype)
            prediction = consistency(output, noisy, start)

            # 7 loss, in float32; that of distribution matching is of x = f_θ(z_{n+k}, c, t_{n+k})
            loss = lcd.consistency_loss(prediction, target_prediction, distillation.loss_type, distillation.huber_c)
            run.add_loss(loss, size)
            if matching.begun(run.global_step):
                dm_loss = matching.loss(prediction, conditioning, unconditional, w, None, generator)
                loss = args.matching.dm_consistency_weight * loss + args.matching.dm_weight * dm_loss

            # 8 backward, clip, step; then the fake score's own steps, on x
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(lora.parameters(), args.optimization.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if matching.begun(run.global_step):
                matching.train_fake_score(prediction, conditioning, None, generator)
        if run.skipped():
            continue

        # A real step: EMA, log, checkpoint, validate
        lr_scheduler.step()
        if lora.average:
            lcd.update_ema(lora.parameters(TARGET), lora.parameters(), args.student.ema_decay)
        due = run.step(grad_norm)
        if due.log:
            run.log()
        if due.save:
            run.save()
        if due.validate:
            run.validate()

    if run.finish():
        export_lora_student(
            args.launch.output_dir,
            lora=lora,
            scheduler=sampler,
            teacher=teacher,
            family=family,
            global_step=run.global_step,
            settings=run.public_flags,
            measured=validation.measured,
            hub=run.hub,
        )
    run.end()


if __name__ == "__main__":
    run_program(main)
