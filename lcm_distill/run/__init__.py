"""One launch of a training program: everything around its loop.

    run             `Run`, which a program uses and which owns most of the other parts
    accelerator     starts Accelerate: engine, precision, logger, seed
    plan            the number of steps and the learning rate
    matching        distribution matching: the fake score's training, and what the student's loss takes from it
    optim           the optimizer and its schedule, and their settings in a resumed run
    randomness      the random generators, one for each batch
    checkpoint      `checkpoint-N`: saved, found, loaded, pruned
    record          run.json, and whether a checkpoint is what was written
    best            which checkpoint is the best
    stopping        signals, the time limit, a launcher that has died
    progress        the logged values: progress bar, trackers, journal
    trackers        tensorboard, wandb, …
    journal         `training.jsonl`: every logged value and every launch
    launch          what the journal records of a launch, and the command that resumes its run
    validation      pictures and distances while a run trains
    report          `report.html`, from the journal and the pictures

May import every other folder. `journal` and `report` import neither torch nor Diffusers.
"""
