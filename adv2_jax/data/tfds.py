"""Data sets of TensorFlow Datasets, read without TensorFlow. The library is loaded when it is first needed."""

import contextlib
import difflib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from adv2_jax.data import photos
from adv2_jax.data.folder import Draw
from adv2_jax.data.images import ImageSet
from adv2_jax.errors import first_line

FORMAT = "array_record"  # the library's default, tfrecord, needs TensorFlow to be read


def load(source: str, *, size: int | None, draw: Draw) -> ImageSet:
    """The images of one split of a prepared data set. Nothing is downloaded.

    Args:
        source: `tfds:NAME/SPLIT`; NAME may have a config and a version, SPLIT a slice:
            `tfds:imagenette/160px:1.0.0/train[:500]`.
        size: side in pixels the network wants; None where all images have one size.
        draw: N -> the sorted positions of those to be read.

    Returns:
        images, as the library decodes them (it leaves EXIF rotation out); labels, None if there are
        none; names of the classes.

    Raises:
        ValueError: one line: unknown set or split, not prepared (and how to), no single image
            feature, unreadable.
    """
    name, _, split = source.removeprefix("tfds:").rpartition("/")
    if not name or not split:
        raise ValueError(
            f"images {source!r}: expected tfds:NAME/SPLIT, such as tfds:mnist/test or tfds:mnist:3.0.1/test[:500]"
        )
    with _quiet():
        builder = _builder(name)
        image, label = (
            _key(builder, "Image", source),
            _key(builder, "ClassLabel", source, needed=False),
        )
        with _explained(builder, name, source):
            data = builder.as_data_source(split=split)
        index = draw(len(data))
        pixels, labels = [], []
        for i in index:
            with _explained(builder, name, source):
                example = data[int(i)]
            pixels.append(
                photos.fit(
                    _rgb(example[image], builder.info.features[image], f"example {i} of {source}"),
                    size,
                )
            )
            labels.append(example[label] if label else -1)
    found = ImageSet(
        photos.stack(zip([f"example {i}" for i in index], pixels, strict=True)), positions=index
    )
    return (
        _labelled(found, np.array(labels, np.int32), builder.info.features[label].names, source)
        if label
        else found
    )


def _labelled(found: ImageSet, labels: np.ndarray, classes: list[str], source: str) -> ImageSet:
    """Images with labels [N] and the names of the classes; -1 is the library's label where there is none."""
    if (labels >= 0).any() and labels.min() < 0:
        raise ValueError(
            f"{source}: some images have labels and some have none; slice the split to one kind"
        )
    has = f"{source} has {len(classes)} classes"
    return found._replace(
        labels=labels if labels.min() >= 0 else None, classes=tuple(classes), classes_from=has
    )


def _builder(name: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, file_format=FORMAT)
    except tfds.core.DatasetNotFoundError:
        known = difflib.get_close_matches(
            name, tfds.list_builders(with_community_datasets=False), n=3
        )
        like = f"; did you mean {' or '.join(known)}?" if known else ""
        raise ValueError(
            f"TensorFlow Datasets has no data set {name!r}, and none of that name is prepared{like}"
        ) from None
    except Exception as error:  # asserts, imports, values: whatever the code of a data set raises
        reason = first_line(error).rpartition('": ')[2]
        other = (
            f"; prepare it as {FORMAT} in another folder (TFDS_DATA_DIR)"
            if "File format" in reason
            else ""
        )
        raise ValueError(f"cannot read tfds:{name}: {reason}{other}") from None


def _key(builder: Any, kind: str, source: str, *, needed: bool = True) -> Any:
    """The name of the feature of a kind, None if there is none; of several, the one that the set is meant to be learned from."""
    features = {key: type(feature).__name__ for key, feature in builder.info.features.items()}
    found = [key for key, name in features.items() if name == kind]
    if len(found) > 1:
        found = [key for key in found if key in (builder.info.supervised_keys or ())]
    if len(found) != 1 and (needed or kind in features.values()):
        listing = ", ".join(f"{key} ({name})" for key, name in features.items())
        raise ValueError(f"{source}: exactly one {kind} feature is wanted, the set has {listing}")
    return found[0] if found else None


def _rgb(pixels: np.ndarray, feature: Any, what: str) -> np.ndarray:
    """A decoded image [H, W, 1, 3 or 4] in RGB, transparent pixels over white."""
    channels = feature.shape[-1]
    if pixels.dtype != np.uint8 or channels not in (1, 3, 4) or pixels.shape[2:] != (channels,):
        raise ValueError(
            f"{what} must be uint8 with 1, 3 or 4 channels, got {pixels.dtype} {list(pixels.shape)}"
        )
    return photos.channels_to_rgb(pixels)


@contextlib.contextmanager
def _explained(builder: Any, name: str, source: str) -> Iterator[None]:
    """Turns whatever is raised while a data set is read into one line."""
    try:
        yield
    except Exception as error:  # the library, its readers and Pillow each raise their own
        if builder.is_prepared():
            raise ValueError(f"cannot read {source}: {first_line(error)}") from None
        raise ValueError(
            f"{source} is not prepared: there is none in {builder.data_dir}; {_recipe(builder, name)}"
        ) from None


def _recipe(builder: Any, name: str) -> str:
    """How to prepare a data set, in one line."""
    line = f"import tensorflow_datasets as tfds; tfds.builder({name!r}, file_format={FORMAT!r}).download_and_prepare()"
    recipe = f'prepare it once (needs pip install tensorflow): python -c "{line}"'
    if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        return recipe
    folder = (
        Path(builder.data_dir).parents[builder.info.full_name.count("/")] / "downloads" / "manual"
    )
    files = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
    return f"download its files by hand into {folder} ({files}), then {recipe}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the library's own warnings off the terminal: what matters of them is in the error."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
