"""Pictures of a run as pixels and PNG files.

Shapes: images uint8 [H, W, 3], maps [h, w] of values in [0, 1].
"""

import math
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Pixels = NDArray[np.uint8]

# Half of 224: larger pictures shrink, or 64 photographs would make a page of 100 MB.
MAX_SIDE = 112

# The inferno colour map at 0, 1/8, ..., 1. Its lightness rises: it reads in grey print and for
# colour-blind readers.
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


def colour_map(values: ArrayLike) -> Pixels:
    """Return the colours of map values, dark to light.

    Args:
        values: numbers [...] in [0, 1]; others are clipped.

    Returns:
        uint8 [..., 3].
    """
    anchors = np.linspace(0.0, 1.0, len(INFERNO))
    channels = [np.interp(np.asarray(values, float), anchors, channel) for channel in INFERNO.T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def amplified_difference(image: Pixels, benign: Pixels, *, gain: float = 10.0) -> Pixels:
    """Return the amplified change of an image, uint8 [H, W, 3], clipped; mid grey is no change."""
    # in floats: a difference of uint8 would wrap around
    amplified = 128 + gain * (image.astype(np.float64) - benign)
    return np.clip(amplified, 0, 255).astype(np.uint8)


def grey(image: Pixels) -> Pixels:
    """Return the lightness [H, W, 1] of an image [H, W, 3]."""
    weights = [0.299, 0.587, 0.114]  # of red, green and blue (ITU-R BT.601)
    return np.round(image @ weights).astype(np.uint8)[..., None]


def levels(values: ArrayLike) -> Pixels:
    """Return map values [h, w] in [0, 1] as uint8 [h, w, 1], for a PNG file with a palette.

    Such a file has a third of the size of one with colours. NaN, as in the map of an image on which
    an attack failed, becomes 0.
    """
    return np.round(255 * np.clip(np.nan_to_num(values), 0, 1)).astype(np.uint8)[..., None]


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
    # filter 2, the difference to the pixel above modulo 256, deflates better than plain pixels
    filtered[1:] -= image[:-1]
    # each line begins with the number of its filter
    lines = np.insert(filtered.reshape(height, -1), 0, 2, axis=1)
    colour_type = 3 if palette is not None else {1: 0, 3: 2}[channels]
    colours = [] if palette is None else [(b"PLTE", palette.tobytes())]
    # IHDR: 8 bits a sample; colour type 0 is grey, 2 RGB, 3 palette; no interlacing
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)),
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
    """Return a picture [H, W, C] with blocks averaged until no side is longer than `max_side`.

    The averages are rounded to 64 levels: nobody sees it, and the file is half as large. A picture
    that is small enough, or narrower than a block, is returned as it is.
    """
    height, width, channels = pixels.shape
    block = math.ceil(max(height, width) / max_side)
    if block == 1 or block > min(height, width):
        return pixels
    height, width = height // block, width // block
    whole = pixels[: height * block, : width * block]
    blocks = whole.reshape(height, block, width, block, channels)
    return np.round(np.round(blocks.mean(axis=(1, 3)) * 63 / 255) * 255 / 63).astype(np.uint8)


def resample(values: NDArray[Any], height: int, width: int) -> NDArray[np.float64]:
    """Return [H, W, C] scaled to [height, width, C]: linear, and averages where it shrinks."""
    rows, columns = _weights(values.shape[0], height), _weights(values.shape[1], width)
    return np.asarray(np.einsum("yh,hwc,xw->yxc", rows, values, columns, optimize=True))


def _weights(size: int, new: int) -> NDArray[np.float64]:
    """Return linear interpolation as a matrix [new, size]."""
    centres = (np.arange(new) + 0.5) * size / new - 0.5
    # when it shrinks, the triangle is as much wider as the new pixels are: it averages
    distance = np.abs(centres[:, None] - np.arange(size)) / max(1.0, size / new)
    weights = np.maximum(0.0, 1.0 - distance)
    # at the edges a part of the triangle lies outside
    return weights / weights.sum(axis=1, keepdims=True)
