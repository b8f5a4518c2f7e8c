"""Photographs: from a file to pixels, and from any size to the network's. Pillow is loaded when it is first needed."""

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adv2_jax.errors import first_line

if TYPE_CHECKING:
    from PIL import Image

# Pillow hands some others to programs outside
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
STRIP = 8  # times as long as wide: of a longer image only the middle is resized, so that memory does not grow with the length
DARK = 1 << 12  # of 1 << 16: what 12-bit numbers reach


def fit(pixels: np.ndarray, size: int | None, *, nearest: bool = False) -> np.ndarray:
    """An image at the size the network wants.

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
    image, filtered = (
        pillow.fromarray(pixels),
        pillow.Resampling.NEAREST if nearest else pillow.Resampling.BILINEAR,
    )
    side, short = round(size * 256 / 224), min(height, width)
    across, down = round(side * width / short), round(side * height / short)
    left, top = (across - size) // 2, (down - size) // 2
    crop = (left, top, left + size, top + size)
    if max(height, width) <= STRIP * short:
        return np.asarray(image.resize((across, down), filtered).crop(crop))
    box = np.minimum(np.multiply(crop, [width / across, height / down] * 2), [width, height] * 2)
    # the same but for the last digit
    return np.asarray(image.resize((size, size), filtered, tuple(box)))


def read(path: str | os.PathLike[str], size: int | None = None) -> NDArray[np.uint8]:
    """An image file, upright and in RGB, at the size the network wants (see `fit`).

    EXIF rotation is applied if it can be read, colour profiles are not; transparent pixels lie over
    white; 16-bit greyscale is divided by 257.

    Args:
        path: of a single image in one of `FORMATS`.
        size: side in pixels; None keeps the image's own.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: one line that names the file: damaged, no image, too large, several frames,
            numbers that are no brightness.
    """
    return _decode(path, size)[0]


def _decode(path: str | os.PathLike[str], size: int | None) -> tuple[NDArray[np.uint8], int | None]:
    """An image as `read` gives it, and the largest number of the file if its numbers have 16 bits."""
    pillow = _pillow()
    try:
        with pillow.open(path, formats=FORMATS) as image:
            wide = image.mode.startswith("I") or any(";16" in str(tile) for tile in image.tile)
            upright = _upright(image)
            return fit(np.asarray(to_rgb(upright)), size), _largest(upright) if wide else None
    except pillow.UnidentifiedImageError:
        raise ValueError(
            f"cannot read {path}: damaged, or not an image ({', '.join(FORMATS)})"
        ) from None
    except Exception as error:  # every decoder raises its own on a damaged file
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise ValueError(f"cannot read {path}: {reason}") from None


def _largest(image: "Image.Image") -> int:
    """The largest of the 16-bit numbers of a file; of colours an upper bound, as Pillow keeps their upper eight bits alone."""
    bands = zip(image.getbands(), image.split(), strict=True)
    top = max(int(np.max(np.asarray(band))) for name, band in bands if name != "A")
    return top if image.mode.startswith("I") or top == 0 else top << 8 | 255


def read_all(folder: Path, names: Sequence[str], size: int | None) -> NDArray[np.uint8]:
    """The images [N, H, W, 3] at `names` below a folder, decoded side by side.

    Raises:
        ValueError: as `read`; images differ in size and none is asked for; all 16-bit images
            together use less than a sixteenth of their range, as 12-bit numbers do: they would be
            black.
    """
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with _bombs_refused(), _silenced():
            decoded = list(pool.map(lambda name: _decode(folder / name, size), names))
    finally:
        pool.shutdown(cancel_futures=True)
    largest = max((peak for _, peak in decoded if peak is not None), default=0)
    if 0 < largest < DARK:
        raise ValueError(
            f"the 16-bit images of {folder} hold no number above {largest}, of 65535, and would be black: "
            "multiply them to the full range (12-bit numbers by 16), or save them with 8 bits"
        )
    return stack(zip(names, (pixels for pixels, _ in decoded), strict=True))


def stack(named: Iterable[tuple[str, np.ndarray]]) -> np.ndarray:
    """Images of one size [N, H, W, 3] from pairs of name and image.

    Raises:
        ValueError: names two images that differ in size.
    """
    names: list[str] = []
    images: list[np.ndarray] = []
    for name, image in named:
        if images and image.shape != images[0].shape:
            (h, w, _), (other_h, other_w, _) = images[0].shape, image.shape
            raise ValueError(
                f"{names[0]} is {w} x {h} pixels, {name} {other_w} x {other_h}: --size N brings images to one size"
            )
        names.append(name)
        images.append(image)
    return np.stack(images)


def to_rgb(image: "Image.Image") -> "Image.Image":
    """An image of any mode in RGB, transparent pixels over white.

    Raises:
        ValueError: its numbers are no brightness (floats, whole numbers beyond 16 bits).
    """
    pillow = _pillow()
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise ValueError(
            "it holds floats or 32-bit numbers; 8-bit images and 16-bit greyscale are read"
        )
    if image.mode.startswith("I"):
        return pillow.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = pillow.new("RGBA", image.size, "white")
    return pillow.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def channels_to_rgb(pixels: np.ndarray) -> NDArray[np.uint8]:
    """Decoded pixels uint8 [H, W, 1, 3 or 4] (grey, RGB or RGBA) in RGB [H, W, 3], transparent ones over white."""
    grey = pixels.shape[-1] == 1
    return np.asarray(to_rgb(_pillow().fromarray(pixels[..., 0] if grey else pixels)))


def _upright(image: "Image.Image") -> "Image.Image":
    """The only frame, turned as the camera was held; keeps what `to_rgb` asks about."""
    from PIL import ImageOps

    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a phone's JPEG, with its previews as further frames
        raise ValueError(f"it holds {frames} frames; single images are read")
    image.load()  # what is damaged is found here
    # malformed EXIF says nothing: other programs show such images as they are stored
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


@contextlib.contextmanager
def _bombs_refused() -> Iterator[None]:
    """Pillow's warning about gigantic images is an error, its others (odd metadata) are not the user's concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", _pillow().DecompressionBombWarning)
        yield


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Nothing goes to stderr: libtiff writes there what it finds wrong, past Python, and raises besides."""
    try:
        saved = os.dup(2)
    except OSError:  # there is none
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ValueError(
            "reading or resizing images needs Pillow: pip install 'adv2_jax[images]'"
        ) from None
    return Image
