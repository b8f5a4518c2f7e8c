"""Photographs: from a file to pixels, and from any size to the network's.

Pillow is loaded when it is first needed.
"""

import contextlib
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adv2_jax.errors import first_line

if TYPE_CHECKING:
    from PIL import Image

# of some others Pillow hands files to programs outside
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (
    ".bmp",
    ".gif",
    ".jp2",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
# Times as long as wide: of a longer image only the middle is resized, so that memory does not grow
# with the length.
STRIP = 8
DARK = 2**12  # what 12-bit numbers stay below
PILLOW = r"PIL\."  # the modules whose warnings are ignored
ONE_AT_A_TIME = threading.Lock()  # those who turn stderr away and back


def fit(pixels: np.ndarray, size: int | None, *, nearest: bool = False) -> np.ndarray:
    """Bring an image to the size the network wants.

    The one preprocessing there is: every image goes through it, whether it is attacked or only
    lends its map as a target, so that two pictures of one file are always the same pixels.

    Args:
        pixels: uint8 [H, W, 3] or [H, W].
        size: side in pixels; None leaves the image as it is.
        nearest: take the nearest pixel in place of an average (for masks).

    Returns:
        uint8 [size, size, ...]: the very same pixels if they have that size already; otherwise the
        short side is resized to 256/224 of `size`, with antialiasing, and the centre cropped.

    Raises:
        ValueError: Pillow is needed and missing.
    """
    height, width = pixels.shape[:2]
    if size is None or (height, width) == (size, size):
        return pixels
    pillow = _pillow()
    image = pillow.fromarray(pixels)
    resampling = pillow.Resampling.NEAREST if nearest else pillow.Resampling.BILINEAR
    # as networks are usually tested on ImageNet: short side to 256, crop of 224
    side, short = round(size * 256 / 224), min(height, width)
    across, down = round(side * width / short), round(side * height / short)
    left, top = (across - size) // 2, (down - size) // 2
    crop = (left, top, left + size, top + size)
    if max(height, width) <= STRIP * short:
        return np.asarray(image.resize((across, down), resampling).crop(crop))
    # the same but for the last digit: Pillow keeps boxes in float32
    # clipped, since Pillow refuses a box that rounding leads past the edge
    box = np.minimum(np.multiply(crop, [width / across, height / down] * 2), [width, height] * 2)
    return np.asarray(image.resize((size, size), resampling, tuple(box)))


def read(
    path: str | os.PathLike[str], size: int | None = None
) -> tuple[NDArray[np.uint8], int | None]:
    """Read an image file, upright and in RGB, at the size the network wants (see `fit`).

    EXIF rotation is applied if it can be read, colour profiles are not; transparent pixels lie over
    white; 16-bit greyscale is divided by 257.

    Args:
        path: of a single image in one of `FORMATS`.
        size: side in pixels; None keeps the image's own.

    Returns:
        uint8 [H, W, 3], and the largest number in the file if its numbers have 16 bits.

    Raises:
        ValueError: one line that names the file: damaged, no image, too large, several frames,
            numbers that are no brightness.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # to read a pipe would wait for ever
        raise ValueError(f"{path} is not a file but a pipe, socket, device or folder")
    pillow = _pillow()
    try:
        with pillow.open(path, formats=FORMATS) as image:
            # before loading, which empties `tile`: of 16-bit colour only the tiles tell
            wide = image.mode.startswith("I") or any(";16" in str(tile) for tile in image.tile)
            # Pillow itself warns only, up to twice its limit
            pixels, limit = image.width * image.height, pillow.MAX_IMAGE_PIXELS
            if limit is not None and pixels > limit:
                raise ValueError(f"Image size ({pixels} pixels) exceeds limit of {limit} pixels")
            with _stderr_discarded() if image.format == "TIFF" else contextlib.nullcontext():
                _load_upright(image)
            return fit(np.asarray(to_rgb(image)), size), _largest(image) if wide else None
    except pillow.UnidentifiedImageError:
        raise ValueError(
            f"cannot read {path}: damaged, or not an image ({', '.join(FORMATS)})"
        ) from None
    except Exception as error:  # every decoder raises its own on a damaged file
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise ValueError(f"cannot read {path}: {reason}") from None


def _load_upright(image: "Image.Image") -> None:
    """Decode the only frame, and turn it as the camera was held.

    In place, which keeps what `to_rgb` asks about.
    """
    from PIL import ImageOps

    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a phone's JPEG, with its previews as further frames
        raise ValueError(f"it holds {frames} frames; single images are read")
    image.load()  # what is damaged is found here
    # malformed EXIF says nothing: other programs show such images as they are stored
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def _largest(image: "Image.Image") -> int:
    """Return the largest number of a 16-bit file, or a bound on it.

    Of colours Pillow keeps the upper eight bits alone; what was in the others is taken for all
    ones.
    """
    top = max(
        int(np.max(np.asarray(band)))
        for name, band in zip(image.getbands(), image.split(), strict=True)
        if name != "A"
    )
    return top if image.mode.startswith("I") or top == 0 else top << 8 | 255


def reader(
    folder: Path, names: Sequence[str], size: int | None
) -> Callable[[int], NDArray[np.uint8]]:
    """Return a function that reads one of the images at `names` below a folder: index -> pixels.

    It may be called from several threads, and raises what `read` does; and a ValueError for a
    16-bit image if all 16-bit images together use less than a sixteenth of their range, as 12-bit
    numbers do: they would be black.
    """

    @cache
    def largest() -> int:
        """Return the largest of all 16-bit numbers, or that of the first bright image."""
        top = 0
        for name in names:
            top = max(top, read(folder / name)[1] or 0)
            if top >= DARK:
                break
        return top

    def decode(i: int) -> NDArray[np.uint8]:
        _silence_pillow()
        pixels, peak = read(folder / names[i], size)
        # one bright image vouches for the set: only a dark one makes the others be looked at
        if peak and peak < DARK and largest() < DARK:
            raise ValueError(
                f"the 16-bit images of {folder} hold no number above {largest()}, of 65535, and "
                "would be black: multiply them to the full range (12-bit numbers by 16), or save "
                "them with 8 bits"
            )
        return pixels

    return decode


def _silence_pillow() -> None:
    """Ignore Pillow's warnings: odd metadata is not the user's concern."""
    # for good, since images are read in threads: `catch_warnings` would restore the filters of others
    if ("ignore", None, Warning, re.compile(PILLOW), 0) not in warnings.filters:
        warnings.filterwarnings("ignore", module=PILLOW)


def to_rgb(image: "Image.Image") -> "Image.Image":
    """Convert an image of any mode to RGB, transparent pixels over white.

    Raises:
        ValueError: its numbers are no brightness (floats, whole numbers beyond 16 bits).
    """
    pillow = _pillow()
    # 16-bit PGM and PPM have mode I too; Pillow scales their numbers to 0..65535
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise ValueError(
            "it holds floats or 32-bit numbers; 8-bit images and 16-bit greyscale are read"
        )
    if image.mode.startswith("I"):
        # 65535 / 257 is 255 exactly; a shift by 8 bits would round down
        return pillow.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = pillow.new("RGBA", image.size, "white")
    return pillow.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def channels_to_rgb(pixels: np.ndarray, channels: int) -> NDArray[np.uint8]:
    """Convert uint8 [H, W, channels], grey, RGB or RGBA, to [H, W, 3], transparency over white.

    Raises:
        ValueError: the image has another form.
    """
    if pixels.dtype != np.uint8 or channels not in (1, 3, 4) or pixels.shape[2:] != (channels,):
        raise ValueError(
            f"it must be uint8 with 1, 3 or 4 channels, got {pixels.dtype} {list(pixels.shape)}"
        )
    return np.asarray(to_rgb(_pillow().fromarray(pixels[..., 0] if channels == 1 else pixels)))


@contextlib.contextmanager
def _stderr_discarded() -> Iterator[None]:
    """Discard what is written to stderr.

    libtiff writes there what it finds wrong, past Python, and raises besides.
    """
    with ONE_AT_A_TIME:
        try:
            saved = os.dup(2)
        except OSError:  # there is none
            yield
            return
        with open(os.devnull, "wb") as null, open(saved, "wb"):
            os.dup2(null.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(saved, 2)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ValueError(
            "reading or resizing images needs Pillow: pip install 'adv2_jax[images]'"
        ) from None
    return Image
