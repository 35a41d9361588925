"""The result of a run, its forms for other programs, and its upload.

    weights         the student in Diffusers' formats, and for ComfyUI and A1111; what of it is uploaded
    original        the original layout (LDM, SGM) of single files, in which other programs read models
    metadata        what the files say about themselves: ModelSpec's and kohya's keys
    usage           how a result is used: code for Diffusers, settings and a workflow for ComfyUI
    card            the model card
    hub             the upload to the Hub: retried, and never the end of a run
    hub_client      the process that sends one request to the Hub; imports nothing of the package

May import `errors`, `distributed`, `models` and what these may import.
"""
