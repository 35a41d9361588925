"""The mathematics of the distillation, in float32.

    schedule        noise schedule, DDIM solver, the student's sampler
    consistency     consistency function, guided teacher, loss, moving average, guidance embedding
    matching        distribution matching: the loss of the student's answers, the loss of the fake score

Imports nothing of the package but `errors`.
"""
