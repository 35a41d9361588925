"""The mathematics of latent consistency distillation, in float32.

    schedule        noise schedule, DDIM solver, the student's sampler
    consistency     consistency function, guided teacher, loss, moving average, guidance embedding

Imports nothing of the package but `errors`.
"""
