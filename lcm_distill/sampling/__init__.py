"""Pictures from teachers and students, and how good they are.

    generate        latents from prompts and seeds, with Diffusers' pipelines
    finished        finished students and LoRAs, put into a teacher's pipeline
    initial         the finished student that a run begins from
    grid            labelled grids of pictures; labels: their text, in any script, with the font in fonts/
    metrics         distances in latents, CLIP score, CMMD, FID

May import `errors`, `environment`, `objective` and `models`.
"""
