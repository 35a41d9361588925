"""From shards, wherever they are stored, to batches for training; and from pictures to shards.

    sources         opens a path, URL or command, and resumes after a broken connection
    tar             reads untrusted tars; writes tars that appear only when they are complete
    raw             undecoded samples, and the reasons to leave one out
    shards          expands --train_shards_path_or_url, reads and counts raw samples
    captions        where a sample's captions are
    filters         conditions on a sample's JSON
    sizes           a picture's original size, from a sample's JSON
    colour          a picture with a colour profile to sRGB
    decode          the file of a picture to 8-bit sRGB, upright
    encoded         the format of shards of latents and embeddings
    preparation     a raw sample to pixels (or latents) and a caption
    preflight       a first look into the shards, before any model is loaded
    stream          the endless, seeded, resumable stream of batches
    loader          its loader: data workers, state, workers that fail
    packing         a folder of pictures to shards

May import `errors`, `launcher`, `locks`, `flags`, `redaction` and `environment`. Only `preparation`, `stream` and
`loader` import torch, and `preflight` by way of `preparation`.
"""
