"""Colour profiles (ICC version 2) for the tests, from the numbers that define their colour spaces."""

import struct

import numpy as np

# Chromaticities of red, green, blue and white.
D65, D50 = (0.3127, 0.3290), (0.3457, 0.3585)
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), D65)
DISPLAY_P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06), D65)
PROPHOTO = ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001), D50)
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), D65)
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
SRGB_CURVE = [(x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4) for x in np.linspace(0, 1, 1024)]


def _xyz(chromaticity):
    x, y = chromaticity
    return np.array([x / y, 1, (1 - x - y) / y])


def to_xyz(space):
    """The matrix from linear RGB to XYZ of the white D50."""
    red, green, blue, white = map(_xyz, space)
    primaries = np.stack([red, green, blue], 1)
    matrix = primaries * np.linalg.solve(primaries, white)
    cones = BRADFORD @ _xyz(D50) / (BRADFORD @ white)
    return np.linalg.inv(BRADFORD) @ np.diag(cones) @ BRADFORD @ matrix


def _fixed(*values):
    return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in values)


def _curve(curve):
    """A gamma, or values at evenly spaced places."""
    if isinstance(curve, (int, float)):
        return b"curv" + bytes(4) + struct.pack(">IH", 1, round(curve * 256))
    return b"curv" + bytes(4) + struct.pack(f">I{len(curve)}H", len(curve), *(round(v * 65535) for v in curve))


def _profile(name, kind, space, connection, tags):
    text = name.encode() + b"\0"
    description = b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78)
    tags = {
        b"desc": description,
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": b"XYZ " + bytes(4) + _fixed(*_xyz(D50)),
    } | tags
    offset, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", offset + len(data), len(content))
        data += content
    header = struct.pack(">I4sI4s4s4s", offset + len(data), bytes(4), 0x02400000, kind, space, connection)
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _fixed(*_xyz(D50))
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def rgb_profile(name, space, curve):
    matrix = to_xyz(space)
    tags = {f"{c}XYZ".encode(): b"XYZ " + bytes(4) + _fixed(*matrix[:, i]) for i, c in enumerate("rgb")}
    return _profile(name, b"mntr", b"RGB ", b"XYZ ", tags | {f"{c}TRC".encode(): _curve(curve) for c in "rgb"})


def grey_profile(name, curve):
    return _profile(name, b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _curve(curve)})


def cmyk_profile(name, lightness):
    """Inks of which each makes white paper darker: L* = 100 minus the sum of `lightness` times their amounts."""
    corners = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(-1, 4)
    light = np.clip(100 - corners @ np.asarray(lightness), 0, 100)
    lab = np.stack([light / 100 * 65280, *[np.full(16, 32768)] * 2], 1).round().astype(">u2")  # the encoding of v2
    table = b"mft2" + bytes(4) + struct.pack(">4B", 4, 3, 2, 0) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += (
        struct.pack(">2H", 2, 2) + struct.pack(">2H", 0, 65535) * 4 + lab.tobytes() + struct.pack(">2H", 0, 65535) * 3
    )
    return _profile(name, b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})


def to_srgb(values, space, gamma):
    """uint8 [..., 3] of an RGB space to sRGB in float64, clipped and unrounded: 0 to 255."""
    linear = np.asarray(values, np.float64) / 255
    linear = linear**gamma @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(space)).T
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
