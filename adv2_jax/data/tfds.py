"""Data sets of TensorFlow Datasets, read without TensorFlow.

The library is loaded when it is first needed.
"""

import contextlib
import copy
import difflib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from adv2_jax.data import photos
from adv2_jax.data.images import Draw, ImageSet
from adv2_jax.data.lazy import LazyImages
from adv2_jax.errors import first_line

FORMAT = "array_record"  # the library's default, tfrecord, needs TensorFlow to be read


def load(source: str, *, size: int | None, draw: Draw) -> ImageSet:
    """Read the images of one split of a prepared data set. Nothing is downloaded.

    Args:
        source: `tfds:NAME/SPLIT`; NAME may have a config and a version, SPLIT a slice:
            `tfds:imagenette/160px:1.0.0/train[:500]`.
        size: side in pixels the network wants; None where all images have one size.
        draw: N -> the sorted indices of those to be read.

    Returns:
        images, decoded on demand by the library (which leaves EXIF rotation out); labels, None if
        there are none; names of the classes.

    Raises:
        ValueError: one line: unknown set or split, not prepared (and how to), no single image
            feature, unreadable.
    """
    name, _, split = source.removeprefix("tfds:").rpartition("/")
    if not name or not split:
        raise ValueError(
            f"images {source!r}: expected tfds:NAME/SPLIT, "
            "such as tfds:mnist/test or tfds:mnist:3.0.1/test[:500]"
        )
    logger = logging.getLogger("absl")
    with contextlib.ExitStack() as stack:
        # the library's warnings stay off the terminal: what matters of them is in the error
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        builder = _builder(name)
        from tensorflow_datasets import decode

        image = _feature(builder, "Image", source)
        label = _feature(builder, "ClassLabel", source, needed=False)
        with _in_one_line(builder, name, source):
            data = builder.as_data_source(split=split)
            indices = draw(len(data))
            names = [f"example {i}" for i in indices]
            channels = builder.info.features[image].shape[-1]
            # the same reader, which leaves the images as they are stored: labels are read in seconds
            encoded = copy.copy(data)
            encoded.decoders = {image: decode.SkipDecoding()}
            # the library's label where there is none is -1
            labels = np.array([encoded[int(i)][label] if label else -1 for i in indices], np.int32)

        def read(i: int) -> np.ndarray:
            with _in_one_line(builder, name, f"{source}, {names[i]}"):
                pixels = photos.channels_to_rgb(data[int(indices[i])][image], channels)
                return photos.fit(pixels, size)

        images = LazyImages(names, read)
    labelled = labels >= 0
    if labelled.any() and not labelled.all():
        raise ValueError(
            f"{source}: some images have labels and some have none; slice the split to one kind"
        )
    classes = tuple(builder.info.features[label].names) if label else None
    return ImageSet(
        images,
        labels if labelled.all() else None,
        classes=classes,
        positions=indices,
        classes_from=None if classes is None else f"{source} has {len(classes)} classes",
    )


def _builder(name: str) -> Any:
    """Return the library's object for a data set of this name, prepared or not."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, file_format=FORMAT)
    except tfds.core.DatasetNotFoundError:
        # without those of the community, which the library lists online
        similar = difflib.get_close_matches(
            name, tfds.list_builders(with_community_datasets=False), n=3
        )
        raise ValueError(
            f"TensorFlow Datasets has no data set {name!r}, and none of that name is prepared"
            + (f"; did you mean {' or '.join(similar)}?" if similar else "")
        ) from None
    except Exception as error:  # asserts, imports, values: whatever the code of a data set raises
        # the library puts the name and all arguments before the reason, in quotes
        reason = first_line(error).rpartition('": ')[2]
        if "File format" in reason:
            reason += f"; prepare it as {FORMAT} in another folder (TFDS_DATA_DIR)"
        raise ValueError(f"cannot read tfds:{name}: {reason}") from None


def _feature(builder: Any, kind: str, source: str, *, needed: bool = True) -> str | None:
    """Return the key of the feature of a kind, None if there is none.

    Of several, the one that the set is meant to be learned from.
    """
    kinds = {key: type(feature).__name__ for key, feature in builder.info.features.items()}
    keys = [key for key in kinds if kinds[key] == kind]
    if len(keys) > 1:
        keys = [key for key in keys if key in (builder.info.supervised_keys or ())]
    if len(keys) != 1 and (needed or kind in kinds.values()):
        raise ValueError(
            f"{source}: exactly one {kind} feature is wanted, the set has "
            + ", ".join(f"{key} ({name})" for key, name in kinds.items())
        )
    return keys[0] if keys else None


@contextlib.contextmanager
def _in_one_line(builder: Any, name: str, source: str) -> Iterator[None]:
    """Turn whatever is raised while a data set is read into one line."""
    try:
        yield
    except Exception as error:  # the library, its readers and Pillow each raise their own
        # asked only now: data sets made for tests are read, and are not prepared
        if builder.is_prepared():
            raise ValueError(f"cannot read {source}: {first_line(error)}") from None
        raise ValueError(
            f"{source} is not prepared: there is none in {builder.data_dir}; "
            f"{_recipe(builder, name)}"
        ) from None


def _recipe(builder: Any, name: str) -> str:
    """Say how to prepare a data set, in one line."""
    # the folder of a set ends with its name, config and version
    data_dir = Path(builder.data_dir).parents[builder.info.full_name.count("/")]
    manual = " ".join((builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "").split())
    download = f"download its files by hand into {data_dir}/downloads/manual ({manual}), then "
    return (
        f"{download if manual else ''}prepare it once (needs pip install tensorflow): "
        'python -c "import tensorflow_datasets as tfds; '
        f'tfds.builder({name!r}, file_format={FORMAT!r}).download_and_prepare()"'
    )
