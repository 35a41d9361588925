"""A tiny captioned-picture world with its own trained teachers: the whole suite on a laptop.

    python -m toy.make_shards OUT_DIR      write captioned pictures as WebDataset shards
    python -m toy.train_teacher sd         retrain toy/teachers/sd (or sdxl) from nothing
    python -m toy.score                    how well the scorer reads held-out pictures
    python -m toy.demo                     distil the SD teacher and draw the comparison

`toy.world` says what a picture is, `toy.recipes` with which flags students are distilled; everything else draws, learns
or reads those pictures.
"""

import lcm_distill  # noqa: F401 - it keeps the libraries' import-time notices out of sight
