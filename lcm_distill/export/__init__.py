"""The result of a run, and its upload.

    weights         the student in Diffusers' formats, and for ComfyUI and A1111; what of it is uploaded
    card            the model card
    hub             the upload to the Hub: retried, and never the end of a run
    hub_client      the process that sends one request to the Hub; imports nothing of the package

May import `errors`, `distributed`, `models` and what these may import.
"""
