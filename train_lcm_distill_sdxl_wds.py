#!/usr/bin/env python
"""Distil a Stable Diffusion XL teacher (SSD-1B too) into a latent consistency model: a full U-Net student.

    accelerate launch train_lcm_distill_sdxl_wds.py \\
        --pretrained_teacher_model stabilityai/stable-diffusion-xl-base-1.0 \\
        --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \\
        --train_shards_path_or_url "data/{00000..00099}.tar" --output_dir lcm-sdxl \\
        --mixed_precision bf16 --learning_rate 1e-6 --loss_type huber --max_train_steps 4000 \\
        --train_batch_size 12 --gradient_checkpointing --use_8bit_adam --resume_from_checkpoint latest

The method is Algorithm 1 of arXiv 2310.04378. The result draws in 1 to 8 steps:

    unet = UNet2DConditionModel.from_pretrained("lcm-sdxl", torch_dtype=torch.float16, variant="fp16")
    pipe = DiffusionPipeline.from_pretrained(TEACHER, unet=unet, torch_dtype=torch.float16).to("cuda")
    pipe.scheduler = LCMScheduler.from_pretrained("lcm-sdxl")
    picture = pipe("a castle at dusk", num_inference_steps=4, guidance_scale=8.0).images[0]
"""

import argparse
import logging
from functools import partial

import torch

from lcm_distill import flags
from lcm_distill.data.filters import parse_filters
from lcm_distill.data.preflight import inspect_shards
from lcm_distill.data.preparation import Preparation
from lcm_distill.data.shards import count_samples, expand_shards
from lcm_distill.data.stream import ShardStream, make_loader
from lcm_distill.distributed.compiling import compile_networks
from lcm_distill.distributed.fsdp import optimizer_parts, prepare, shard, whole_device
from lcm_distill.errors import run_program
from lcm_distill.export.hub import open_hub
from lcm_distill.export.weights import export_full_student
from lcm_distill.models import sdxl
from lcm_distill.models import student as unets
from lcm_distill.models.frozen import batch_latents, check_encoding
from lcm_distill.models.teacher import Teacher, read_configs
from lcm_distill.objective.consistency import (
    ConsistencyFunction,
    consistency_loss,
    guidance_embedding,
    guided_prediction,
    unet_output,
    update_ema,
)
from lcm_distill.objective.schedule import DDIMSolver, NoiseSchedule, lcm_scheduler
from lcm_distill.redaction import public_flags
from lcm_distill.run.accelerator import autocast_over, inference_dtype, settle_seed, start_accelerator
from lcm_distill.run.checkpoint import Checkpoints, find_run
from lcm_distill.run.optim import build_lr_scheduler, build_optimizer, keeping_settings
from lcm_distill.run.plan import announce, plan_training
from lcm_distill.run.progress import start_progress
from lcm_distill.run.randomness import BatchRandom
from lcm_distill.run.stopping import Ending
from lcm_distill.run.trackers import end_training, parse_trackers, start_trackers
from lcm_distill.run.validation import Validation, validation_guidance_scale
from lcm_distill.sampling.generate import check_steps, read_prompts, teacher_sampler

PROGRAM = "train_lcm_distill_sdxl_wds"
logger = logging.getLogger(f"lcm_distill.{PROGRAM}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags.Parser(__doc__)
    flags.add_model_flags(parser)
    flags.add_data_flags(parser, resolution=1024)
    flags.add_training_flags(parser)
    flags.add_distillation_flags(parser, w_min=3.0, vae_encode_batch_size=8)
    flags.add_sdxl_flags(parser)
    flags.add_full_student_flags(parser)
    flags.add_speed_flags(parser)
    flags.add_run_flags(parser, guidance_default="8, brought into the trained range of w + 1")
    return parser.parse(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    # What can be wrong with the flags is said here, before anything is loaded.
    trackers = parse_trackers(args.report_to)
    shards = expand_shards(args.train_shards_path_or_url)
    preparation = Preparation(
        resolution=args.resolution,
        interpolation=args.interpolation_type,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        proportion_empty_prompts=args.proportion_empty_prompts,
        caption_column=args.caption_column,
        min_image_size=args.min_image_size,
        filters=parse_filters(args.filter, max_pwatermark=args.max_pwatermark, min_aesthetic=args.min_aesthetic),
    )
    teacher = Teacher(
        args.pretrained_teacher_model,
        revision=args.teacher_revision,
        variant=args.variant,
        config=args.teacher_config,
        vae=args.pretrained_vae_model_name_or_path,
        vae_revision=args.revision,
        cache_dir=args.cache_dir,
    )
    configs = read_configs(
        teacher, family="sdxl", resolution=args.resolution, num_ddim_timesteps=args.num_ddim_timesteps
    )
    design = unets.architecture(configs.unet | {"time_cond_proj_dim": args.unet_time_cond_proj_dim})
    checkpoint, resumed = find_run(
        args.resume_from_checkpoint, args.output_dir, PROGRAM, design, seed=args.seed, dry_run=args.dry_run
    )
    sampler = lcm_scheduler(configs.scheduler, args.num_ddim_timesteps, args.timestep_scaling_factor)
    undistilled = teacher_sampler(configs.scheduler)
    check_steps("--validation_inference_steps", max(args.validation_inference_steps), sampler)
    check_steps("--validation_teacher_steps", args.validation_teacher_steps, undistilled)
    prompts = read_prompts(args.validation_prompts)
    accelerator = start_accelerator(
        output_dir=args.output_dir,
        logging_dir=args.logging_dir,
        trackers=trackers,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        allow_tf32=args.allow_tf32,
        local_rank=args.local_rank,
        dry_run=args.dry_run,
        can_shard=True,
    )
    preflight = inspect_shards(shards, preparation)
    logger.info("%s", preflight)
    preparation = preflight.preparation
    check_encoding(preparation.encoding, teacher, sdxl.text_fingerprint)
    seed = settle_seed(resumed.get("seed", args.seed))
    flags_to_record = public_flags(vars(args))
    plan = plan_training(
        accelerator,
        max_steps=resumed.get("global_step", 0) + 1 if args.dry_run else args.max_train_steps,
        epochs=args.num_train_epochs,
        samples=lambda: args.max_train_samples or count_samples(shards, caption_column=preparation.caption_column),
        batch_size=args.train_batch_size,
        learning_rate=args.learning_rate,
        scale_lr=args.scale_lr,
    )
    push = args.push_to_hub and not args.dry_run
    hub = open_hub(accelerator, args.hub_model_id, args.hub_token, args.output_dir) if push else None
    tracked = start_trackers(accelerator, args.tracker_project_name, flags_to_record, resumed=resumed)
    run = dict(program=PROGRAM, architecture=design, seed=seed, flags=flags_to_record, trackers=tracked)

    # The networks: the frozen parts with the teacher, the student θ, and its slow copy, the target θ⁻.
    dtype = inference_dtype(accelerator)
    frozen = sdxl.load_frozen(teacher, device=accelerator.device, dtype=dtype, encoding=preparation.encoding)
    student = unets.student_from_teacher(frozen.unet, args.unet_time_cond_proj_dim).to(whole_device(accelerator))
    target = unets.target_from_student(student)
    teacher_dtype = dtype if args.cast_teacher_unet else torch.float32
    unets.cast(frozen.unet, teacher_dtype)
    if args.enable_xformers_memory_efficient_attention:
        unets.enable_xformers(frozen.unet, student, target)
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    unets.to_channels_last(frozen.unet)
    if not args.use_8bit_adam:  # which lays out anew what it trains
        unets.to_channels_last(student, target)
    compile_networks(args.compile, student, target, frozen.unet)
    shard(accelerator, student, target, frozen.unet)
    optimizer = build_optimizer(
        student.parameters(),
        learning_rate=plan.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        epsilon=args.adam_epsilon,
        use_8bit=args.use_8bit_adam,
        fused=accelerator.mixed_precision != "fp16",
    )
    lr_scheduler = build_lr_scheduler(args.lr_scheduler, optimizer, warmup=args.lr_warmup_steps, steps=plan.steps)
    student, optimizer = prepare(accelerator, student, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)

    # The data and the random draws.
    stream = ShardStream(
        shards=shards,
        preparation=preparation,
        batch_size=args.train_batch_size,
        seed=seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        max_bad_fraction=args.max_bad_fraction,
        shuffle_window=args.shuffle_window,
        resampled=args.resampled_shards,
    )
    loader = make_loader(stream, num_workers=args.dataloader_num_workers)
    random = BatchRandom(seed, accelerator.process_index, accelerator.device)

    # The objective and the sampler that fits it.
    schedule = NoiseSchedule.from_config(configs.scheduler).to(accelerator.device)
    solver = DDIMSolver(schedule, args.num_ddim_timesteps)
    consistency = ConsistencyFunction(schedule, args.timestep_scaling_factor)
    guided = partial(guided_prediction, frozen.unet, schedule, dtype=teacher_dtype, batch_size=args.teacher_batch_size)
    empty = sdxl.empty_conditioning(frozen)
    plain = accelerator.unwrap_model(student)
    pipelines = {
        "student": partial(sdxl.build_pipeline, frozen, plain, sampler),
        "target": partial(sdxl.build_pipeline, frozen, target, sampler),
    }
    guidance_scale = validation_guidance_scale(args.validation_guidance_scale, args.w_min, args.w_max)
    validation = Validation(
        accelerator,
        pipelines,
        partial(sdxl.build_pipeline, frozen, frozen.unet, undistilled),
        prompts=prompts or preflight.captions,
        images_per_prompt=args.num_validation_images,
        batch_size=args.train_batch_size,
        inference_steps=args.validation_inference_steps,
        guidance_scale=guidance_scale,
        teacher_steps=args.validation_teacher_steps,
        teacher_guidance_scale=guidance_scale,
        resolution=args.resolution,
        seed=seed,
        output_dir=None if args.dry_run else args.output_dir,
        at_hand=frozen.complete,
    )

    # Resume, or start.
    parts = {"unet": unets.UNetPart(plain), "unet_target": unets.UNetPart(target)}
    parts |= optimizer_parts(accelerator, optimizer)
    checkpoints = Checkpoints(accelerator, args.output_dir, parts, args.checkpoints_total_limit, dry_run=args.dry_run)
    global_step, batches = resumed.get("global_step", 0), resumed.get("batches", 0)
    if checkpoint:
        with keeping_settings(optimizer, lr_scheduler):
            loader.load_state_dict(checkpoints.load(checkpoint))
    announce(plan, accelerator, student, run, checkpoint=checkpoint, resumed=resumed)

    progress = start_progress(
        accelerator, args.output_dir, run, steps=plan.steps, global_step=global_step, argv=argv, dry_run=args.dry_run
    )
    ending = Ending(accelerator, args.max_train_time)
    data = progress.batches(loader)
    while global_step < plan.steps:
        with accelerator.accumulate(student):
            # 1 batch → latents z, conditioning c
            batch = next(data)
            generator = random.at(batches)
            latents = batch_latents(frozen, batch, args.vae_encode_batch_size, generator)
            time_ids = sdxl.time_ids(
                batch["original_sizes"], batch["crop_top_lefts"], args.resolution, fixed=args.use_fix_crop_and_size
            )
            conditioning = sdxl.with_time_ids(sdxl.batch_conditioning(frozen, batch), time_ids)
            unconditional = sdxl.with_time_ids(empty, time_ids)
            size, device = len(latents), latents.device

            # 2 draw n, noise, w
            index = torch.randint(len(solver), (size,), generator=generator, device=device)
            noise = torch.randn(latents.shape, generator=generator, device=device)
            w = args.w_min + (args.w_max - args.w_min) * torch.rand(size, generator=generator, device=device)
            w_embedding = guidance_embedding(w, args.unet_time_cond_proj_dim)
            start, end = solver.timesteps[index], solver.previous_timesteps[index]

            # 3 z_{n+k}
            noisy = schedule.add_noise(latents, noise, start)

            # 4 teacher with guidance, one solver step: ẑ_n
            with torch.no_grad(), autocast_over(accelerator, teacher_dtype):
                clean, epsilon = guided(noisy, start, conditioning, unconditional, w)
            previous = solver.step(clean, epsilon, index)

            # 5 target f_θ⁻(ẑ_n, w, c, t_n)
            with torch.no_grad(), accelerator.autocast():
                output = unet_output(target, previous, end, conditioning, w_embedding)
            goal = consistency(output, previous, end)

            # 6 student f_θ(z_{n+k}, w, c, t_{n+k})
            with accelerator.autocast():
                output = unet_output(student, noisy, start, conditioning, w_embedding)
            prediction = consistency(output, noisy, start)

            # 7 loss
            loss = consistency_loss(prediction, goal, args.loss_type, args.huber_c)
            progress.add(loss, size)

            # 8 backward, clip, step
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(student.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            batches += 1
        if not accelerator.sync_gradients:
            continue
        if accelerator.optimizer_step_was_skipped:
            progress.skip(global_step)
            continue

        # A real step: EMA, log, checkpoint, validate
        lr_scheduler.step()
        update_ema(target.parameters(), student.parameters(), args.ema_decay)
        global_step += 1
        progress.step(grad_norm)
        run["batches"] = batches
        last = global_step == plan.steps
        stop = ending.asked() and not last
        save = last or stop or global_step % args.checkpointing_steps == 0
        if save or global_step % args.logging_steps == 0:
            progress.log(global_step, lr_scheduler)
        if save:
            with progress.paused():
                checkpoints.save(global_step, run, loader.state_dict(), must=stop)
        if stop:
            break
        if last or global_step % args.validation_steps == 0:
            with progress.paused():
                distances = validation(global_step)
                progress.record(distances, global_step)
                if args.keep_best:
                    checkpoints.keep_if_best(distances["distance/student"], global_step, run, loader.state_dict())
    progress.close(global_step, ending.reason)
    ending.close()

    # Export.
    if args.dry_run:
        logger.info("dry run: shards, models, a training step and a drawing all work; nothing was written")
    elif global_step >= plan.steps:
        export_full_student(
            args.output_dir,
            student=plain,
            target=target,
            scheduler=sampler,
            teacher=teacher,
            family=sdxl,
            guidance_scale=guidance_scale,
            global_step=global_step,
            settings=flags_to_record,
            measured=validation.measured,
            hub=hub,
        )
    end_training(accelerator, hub)


if __name__ == "__main__":
    run_program(main)
