#!/usr/bin/env python
"""Distil a Stable Diffusion 1.x / 2.x teacher into a latent consistency model: a full U-Net student.

    accelerate launch train_lcm_distill_sd_wds.py \\
        --pretrained_teacher_model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --train_shards_path_or_url "data/{00000..00099}.tar" --output_dir lcm-sd15 \\
        --mixed_precision bf16 --learning_rate 1e-6 --loss_type huber --max_train_steps 4000 \\
        --train_batch_size 16 --gradient_checkpointing --use_8bit_adam --resume_from_checkpoint latest

The method is Algorithm 1 of arXiv 2310.04378. The result draws in 1 to 8 steps:

    unet = UNet2DConditionModel.from_pretrained("lcm-sd15", torch_dtype=torch.float16, variant="fp16")
    pipe = DiffusionPipeline.from_pretrained(TEACHER, unet=unet, torch_dtype=torch.float16, variant="fp16").to("cuda")
    pipe.scheduler = LCMScheduler.from_pretrained("lcm-sd15")
    picture = pipe("a castle at dusk", num_inference_steps=4, guidance_scale=8.0).images[0]
"""

import argparse
import logging
from pathlib import Path

import torch
from tqdm.auto import tqdm

from lcm_distill import flags, sd
from lcm_distill.checkpoint import (
    Checkpoints,
    changed_flags,
    check_resumable,
    find_checkpoint,
    public_flags,
    read_run,
)
from lcm_distill.consistency import (
    ConsistencyFunction,
    consistency_loss,
    guidance_embedding,
    guided_prediction,
    unet_output,
)
from lcm_distill.ema import update_ema
from lcm_distill.errors import run_program
from lcm_distill.export import HubUpload, export_full_student, model_card
from lcm_distill.latents import encode_pixels
from lcm_distill.optim import build_lr_scheduler, build_optimizer, scaled_learning_rate, training_steps
from lcm_distill.progress import Meter
from lcm_distill.randomness import BatchRandom
from lcm_distill.runtime import inference_dtype, parse_trackers, settle_seed, start_accelerator, start_trackers
from lcm_distill.schedule import DDIMSolver
from lcm_distill.stream import DropCounter, ShardStream, count_samples, expand_shards, inspect_shards, make_loader
from lcm_distill.unets import architecture, enable_xformers, student_from_teacher, target_from_student
from lcm_distill.validation import default_guidance_scale, draw, log_pictures, save_grid

PROGRAM = "train_lcm_distill_sd_wds"
logger = logging.getLogger(f"lcm_distill.{PROGRAM}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags.Parser(__doc__)
    flags.add_model_flags(parser)
    flags.add_data_flags(parser, resolution=512)
    flags.add_training_flags(parser)
    flags.add_distillation_flags(parser, w_min=5.0, vae_encode_batch_size=32)
    flags.add_full_student_flags(parser)
    flags.add_speed_flags(parser)
    flags.add_run_flags(parser)
    return parser.parse(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    # What can be wrong with the flags is said here, before anything is loaded.
    trackers = parse_trackers(args.report_to)
    shards = expand_shards(args.train_shards_path_or_url)
    configs = sd.read_configs(
        args.pretrained_teacher_model,
        resolution=args.resolution,
        num_ddim_timesteps=args.num_ddim_timesteps,
        vae=args.pretrained_vae_model_name_or_path,
        revision=args.teacher_revision,
        vae_revision=args.revision,
        cache_dir=args.cache_dir,
    )
    student_architecture = architecture(configs.unet | {"time_cond_proj_dim": args.unet_time_cond_proj_dim})
    checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    resumed = read_run(checkpoint) if checkpoint else {"global_step": 0, "batches": 0}
    if checkpoint:
        check_resumable(checkpoint, resumed, program=PROGRAM, architecture=student_architecture, seed=args.seed)
    accelerator = start_accelerator(
        output_dir=args.output_dir,
        logging_dir=args.logging_dir,
        trackers=[] if args.dry_run else trackers,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        allow_tf32=args.allow_tf32,
    )
    found = inspect_shards(shards, resolution=args.resolution)
    logger.info("%s", found)
    seed = settle_seed(resumed.get("seed", args.seed))
    layout = dict(
        batch_size=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        processes=accelerator.num_processes,
    )
    max_train_steps = 1 if args.dry_run else training_steps(
        max_steps=args.max_train_steps,
        epochs=args.num_train_epochs,
        samples=args.max_train_samples or (count_samples(shards) if args.max_train_steps is None else None),
        **layout,
    )
    learning_rate = args.learning_rate
    if args.scale_lr:
        learning_rate = scaled_learning_rate(learning_rate, **layout)
    hub = None
    if args.push_to_hub and accelerator.is_main_process and not args.dry_run:
        hub = HubUpload(args.hub_model_id, args.hub_token, args.output_dir)

    # Networks: the frozen parts with the teacher θ_pre, the student θ, and its slow copy, the target θ⁻.
    dtype = inference_dtype(accelerator)
    teacher_dtype = dtype if args.cast_teacher_unet else torch.float32
    frozen = sd.load_frozen(
        args.pretrained_teacher_model,
        device=accelerator.device,
        dtype=dtype,
        teacher_dtype=teacher_dtype,
        vae=args.pretrained_vae_model_name_or_path,
        revision=args.teacher_revision,
        vae_revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
    )
    student = student_from_teacher(frozen.unet, args.unet_time_cond_proj_dim).to(accelerator.device)
    target = target_from_student(student)
    if args.enable_xformers_memory_efficient_attention:
        if reason := enable_xformers(frozen.unet, student, target):
            logger.warning("xformers' attention is not used (%s); PyTorch's own takes its place", reason)
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing()

    optimizer = build_optimizer(
        student.parameters(),
        learning_rate=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        epsilon=args.adam_epsilon,
        use_8bit=args.use_8bit_adam,
    )
    lr_scheduler = build_lr_scheduler(
        args.lr_scheduler, optimizer, warmup_steps=args.lr_warmup_steps, training_steps=max_train_steps
    )
    student, optimizer = accelerator.prepare(student, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)

    # Data and randomness.
    stream = ShardStream(
        shards=shards,
        batch_size=args.train_batch_size,
        resolution=args.resolution,
        seed=seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        interpolation=args.interpolation_type,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        proportion_empty_prompts=args.proportion_empty_prompts,
    )
    loader = make_loader(stream, num_workers=args.dataloader_num_workers)
    random = BatchRandom(seed, accelerator.process_index, accelerator.device)
    dropped = DropCounter()

    # The objective: all in float32.
    schedule = frozen.schedule
    solver = DDIMSolver(schedule, args.num_ddim_timesteps)
    consistency = ConsistencyFunction(schedule, args.timestep_scaling_factor)
    unconditional = sd.encode_captions(frozen, [""])
    scheduler = sd.lcm_scheduler(
        frozen.scheduler_config,
        num_ddim_timesteps=args.num_ddim_timesteps,
        timestep_scaling=args.timestep_scaling_factor,
    )

    # Resume.
    checkpoints = Checkpoints(
        accelerator, args.output_dir, {"unet": student, "unet_target": target}, args.checkpoints_total_limit
    )
    global_step, batches = resumed["global_step"], resumed["batches"]
    if checkpoint:
        loader.load_state_dict(checkpoints.load(checkpoint))
        logger.info("resumed from %s at step %d", checkpoint, global_step)
        if changed := changed_flags(resumed, vars(args)):
            logger.info("flags that changed since: %s", "; ".join(changed))
    elif args.resume_from_checkpoint:
        logger.info("no checkpoint in %s yet: a new run", args.output_dir)
    run = dict(program=PROGRAM, architecture=student_architecture, seed=seed, flags=public_flags(vars(args)), **layout)

    logger.info(
        "%s; seed %d; steps %d to %d, each of %d pictures (%d per device × %d accumulated × %d devices); "
        "learning rate %.3g; %.1f M parameters train; precision %s",
        "a dry run" if args.dry_run else f"output in {args.output_dir}", seed, global_step, max_train_steps,
        args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes, args.train_batch_size,
        args.gradient_accumulation_steps, accelerator.num_processes, learning_rate,
        sum(parameter.numel() for parameter in student.parameters()) / 1e6, accelerator.mixed_precision,
    )
    if global_step >= max_train_steps:
        logger.info("this run is finished: step %d of %d; raise --max_train_steps to go on", global_step, max_train_steps)

    prompts = args.validation_prompts or found.captions
    guidance_scale = args.validation_guidance_scale
    if guidance_scale is None:
        guidance_scale = default_guidance_scale(args.w_min, args.w_max)

    def validate(name: str | None) -> None:
        """Draws with student and target; to `validation/{name}.png` and the trackers, or nowhere."""
        rows = {}
        for label, unet in (("student", accelerator.unwrap_model(student)), ("target", target)):
            with accelerator.autocast():
                rows[label] = draw(
                    sd.build_pipeline(frozen, unet, scheduler), prompts,
                    images_per_prompt=args.num_validation_images, inference_steps=args.validation_inference_steps,
                    guidance_scale=guidance_scale, resolution=args.resolution, seed=seed,
                )
        if name:
            save_grid(Path(args.output_dir) / "validation" / f"{name}.png", rows, prompts)
            log_pictures(accelerator, rows, global_step)

    # The loop.
    if not args.dry_run:
        start_trackers(accelerator, args.tracker_project_name, vars(args), Path(args.output_dir) / args.logging_dir)
    progress = tqdm(
        total=max_train_steps, initial=global_step, desc="steps", unit="step", dynamic_ncols=True,
        disable=not accelerator.is_main_process,
    )
    meter = Meter(accelerator)
    data = iter(loader)
    while global_step < max_train_steps:
        with accelerator.accumulate(student):
            # 1 batch → latents z, conditioning c
            with meter.waiting():
                batch = next(data)
            dropped.update(batch)
            generator = random.at(batches)
            latents = encode_pixels(
                frozen.vae, batch["pixels"], batch_size=args.vae_encode_batch_size, generator=generator
            )
            conditioning = sd.encode_captions(frozen, batch["captions"])
            size, device = len(latents), latents.device

            # 2 draw n, noise, w
            index = torch.randint(len(solver), (size,), generator=generator, device=device)
            noise = torch.randn(latents.shape, generator=generator, device=device)
            w = args.w_min + (args.w_max - args.w_min) * torch.rand(size, generator=generator, device=device)
            w_embedding = guidance_embedding(w, args.unet_time_cond_proj_dim)
            start, end = solver.timesteps[index], solver.previous_timesteps[index]

            # 3 z_{n+k}
            noisy = schedule.add_noise(latents, noise, start)

            # 4 student f_θ(z_{n+k}, w, c, t_{n+k})
            with accelerator.autocast():
                output = unet_output(student, noisy, start, conditioning, w_embedding)
            prediction = consistency(output, noisy, start)

            # 5 teacher with guidance, one solver step: ẑ_n
            with torch.no_grad(), accelerator.autocast():
                clean, epsilon = guided_prediction(
                    frozen.unet, schedule, noisy, start, conditioning, unconditional, w, dtype=teacher_dtype
                )
            previous = solver.step(clean, epsilon, index)

            # 6 target f_θ⁻(ẑ_n, w, c, t_n)
            with torch.no_grad(), accelerator.autocast():
                target_output = unet_output(target, previous, end, conditioning, w_embedding)
            goal = consistency(target_output, previous, end)

            # 7 loss
            loss = consistency_loss(prediction, goal, args.loss_type, args.huber_c)
            meter.add(loss, size)

            # 8 backward, clip, step
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(student.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            batches += 1
        if not accelerator.sync_gradients:
            continue
        if accelerator.optimizer_step_was_skipped:  # fp16: the gradients overflowed and the loss scale was lowered
            meter.read(global_step)
            continue
        lr_scheduler.step()
        update_ema(target.parameters(), student.parameters(), args.ema_decay)
        global_step += 1
        progress.update()

        # Log, checkpoint, validate
        last = global_step == max_train_steps
        save = last or global_step % args.checkpointing_steps == 0
        if save or global_step % args.logging_steps == 0:
            values = meter.read(global_step) | {"lr": lr_scheduler.get_last_lr()[0]}
            progress.set_postfix(
                loss=f"{values['loss']:.4g}", lr=f"{values['lr']:.2e}", pictures_s=f"{values['samples_per_second']:.1f}",
                data_wait=f"{values['data_wait']:.0%}",
            )
            accelerator.log(values, step=global_step)
            dropped.report_news(logger)
        if args.dry_run:
            continue
        with meter.paused():
            if save:
                checkpoints.save(global_step, run | {"batches": batches}, loader.state_dict())
            if accelerator.is_main_process and (last or global_step % args.validation_steps == 0):
                validate(f"step-{global_step:06d}")
            accelerator.wait_for_everyone()
    progress.close()
    logger.info("%s", dropped)

    if args.dry_run:
        validate(None)
        logger.info("dry run: shards, models, one training step and a validation drawing work; nothing was written")
    elif accelerator.is_main_process:
        pictures = Path("validation") / f"step-{global_step:06d}.png"
        card = model_card(
            title=Path(args.output_dir).resolve().name,
            teacher=args.pretrained_teacher_model,
            usage=sd.usage(args.pretrained_teacher_model, hub.repo_id if hub else args.output_dir, guidance_scale),
            settings=public_flags(vars(args)),
            tags=["stable-diffusion"],
            pictures=pictures if (Path(args.output_dir) / pictures).exists() else None,
        )
        export_full_student(args.output_dir, accelerator.unwrap_model(student), target, scheduler, card)
        logger.info("the model is in %s", args.output_dir)
        if hub:
            hub.push(f"LCM distilled for {global_step} steps")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_program(main)
