"""Pictures from teachers and students, and how good they are.

    generate        latents from prompts and seeds, with Diffusers' pipelines
    finished        finished students and LoRAs, put into a teacher's pipeline
    grid            labelled grids of pictures
    metrics         distances in latents, CLIP score, CMMD, FID

May import `errors`, `objective` and `models`.
"""
