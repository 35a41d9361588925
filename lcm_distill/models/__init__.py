"""The networks of a distillation.

    teacher         where a teacher's weights and configs come from: folder, Hub, single file
    files           a model's files, and the JSON in them
    code            the Python code that loads a teacher, for cards and reports; imports nothing heavy
    single_file     what the header of a single file says
    support         which models can be teachers, by their configs (docs/teachers.md)
    tokenizer       CLIP's tokenizers, checked to fit their text encoders
    frozen          its parts that do not train, loaded on first use
    sd, sdxl        the two families: text encoders, conditioning, pipeline
    families        the interface of a family, and which one a teacher belongs to
    vae             pictures to latents, and back
    unets           full students, their targets, speed and memory flags
    norms           the precision of their norms
    lora            LoRA students
    low_rank        the layers of a LoRA
    fake_score      the network that distribution matching trains beside a student

May import `errors`, `flags`, `objective`, `distributed` and `data`.
"""
