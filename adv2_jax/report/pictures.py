"""Pictures of a run as pixels and PNG files. Shapes: images [H, W, 3] uint8, maps [h, w] of values in [0, 1]."""

import math
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Pixels = NDArray[np.uint8]

MAX_SIDE = (
    112  # half of 224: larger pictures are shrunk, or 64 photographs would make a page of 100 MB
)

# The inferno colour map at 0, 1/8, ..., 1: its lightness rises, for colour-blind readers and in
# grey print too.
INFERNO = np.array(
    [
        [0, 0, 4],
        [31, 12, 72],
        [85, 15, 109],
        [136, 34, 106],
        [186, 54, 85],
        [227, 89, 51],
        [249, 140, 10],
        [249, 201, 50],
        [252, 255, 164],
    ]
)
LIGHTNESS = np.array([0.299, 0.587, 0.114])  # what red, green and blue add to grey


def colour_map(values: ArrayLike) -> Pixels:
    """Colours of map values, dark to light.

    Args:
        values: numbers [...] in [0, 1]; others are clipped.

    Returns:
        uint8 [..., 3].
    """
    anchors = np.linspace(0.0, 1.0, len(INFERNO))
    channels = [
        np.interp(np.asarray(values, np.float64), anchors, channel) for channel in INFERNO.T
    ]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def amplified_difference(image: Pixels, benign: Pixels, *, gain: float = 10.0) -> Pixels:
    """The change of an image around mid grey, uint8 [H, W, 3]: grey is unchanged, clipped where it leaves the range."""
    difference = image.astype(np.float64) - benign
    return np.clip(128 + gain * difference, 0, 255).astype(np.uint8)


def grey(image: Pixels) -> Pixels:
    """The lightness [H, W, 1] of an image [H, W, 3]."""
    lightness: NDArray[np.float64] = image @ LIGHTNESS
    return lightness.round().astype(np.uint8)[..., None]


def film(frames: Pixels, *, max_side: int = MAX_SIDE) -> Pixels:
    """Frames [S, H, W, C] side by side, each shrunk as `thumbnail` does: [H, S * W, C]."""
    return np.concatenate([thumbnail(frame, max_side=max_side) for frame in frames], axis=1)


def levels(values: ArrayLike) -> Pixels:
    """Map values [h, w] in [0, 1] as [h, w, 1], for a PNG file with a palette: a third of the size
    of one with colours.

    What is not a number, as in the map of an image on which an attack failed, is 0.
    """
    clipped: NDArray[np.float64] = np.clip(np.nan_to_num(np.asarray(values, np.float64)), 0, 1)
    return (255 * clipped).round().astype(np.uint8)[..., None]


def png(image: Pixels, *, palette: Pixels | None = None) -> bytes:
    """Return pixels as a PNG file.

    Args:
        image: uint8 [H, W, 3], or grey [H, W, 1].
        palette: [256, 3], the colours that a grey stands for.

    Returns:
        The file.
    """
    height, width, channels = image.shape
    filtered = image.copy()
    # filter 1, the difference to the left modulo 256: photographs get smaller
    filtered[:, 1:] -= image[:, :-1]
    lines = np.insert(filtered.reshape(height, -1), 0, 1, axis=1)
    colour_type = 3 if palette is not None else {1: 0, 3: 2}[channels]
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    colours = [] if palette is None else [(b"PLTE", palette.tobytes())]
    chunks = [
        (b"IHDR", header),
        *colours,
        (b"IDAT", zlib.compress(lines.tobytes())),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


def _chunk(name: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def thumbnail(pixels: Pixels, *, max_side: int = MAX_SIDE) -> Pixels:
    """Return a picture of which blocks of pixels are averaged until it is small enough for a page."""
    height, width, channels = pixels.shape
    block = math.ceil(max(height, width) / max_side)
    if block == 1 or block > min(height, width):
        return pixels
    height, width = height // block, width // block
    blocks = pixels[: height * block, : width * block].reshape(
        height, block, width, block, channels
    )
    return blocks.mean(axis=(1, 3)).round().astype(np.uint8)


def resample(values: NDArray[Any], height: int, width: int) -> NDArray[np.float64]:
    """Return [H, W, C] scaled to [height, width, C]: linear, and averages when it shrinks."""
    rows, columns = _weights(values.shape[0], height), _weights(values.shape[1], width)
    resampled: NDArray[np.float64] = np.einsum(
        "yh,hwc,xw->yxc", rows, values, columns, optimize=True
    )
    return resampled


def _weights(old: int, new: int) -> NDArray[np.float64]:
    """Return linear interpolation as a matrix [new, old]; averages when it shrinks."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    distance = np.abs(centres[:, None] - np.arange(old)) / max(1.0, old / new)
    weights = np.maximum(0.0, 1.0 - distance)
    return weights / weights.sum(axis=1, keepdims=True)
