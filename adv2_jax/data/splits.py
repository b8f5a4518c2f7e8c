"""The images to train on and those held out, of any source with labels."""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from adv2_jax.data import shapes
from adv2_jax.data.images import ImageSet
from adv2_jax.data.sources import load

TRAIN_SCENES, HELD_OUT_SCENES = 8000, 2000
# Share of plain scenes for a classifier: RTS and MASK show it objects before such a ground. Without
# them it loses half of its confidence there, whatever the map that cut the object out.
PLAIN = 0.12


class TrainingSets(NamedTuple):
    """Images to train on and images held out to measure the accuracy.

    Attributes:
        train: images with labels.
        held_out: images with labels, of the same size.
        classes: names of the classes, where they are known.
    """

    train: ImageSet
    held_out: ImageSet
    classes: tuple[str, ...] | None = None

    @property
    def num_classes(self) -> int:
        """The number of names; without names, one more than the largest label of both sets."""
        if self.classes is not None:
            return len(self.classes)
        assert self.train.labels is not None and self.held_out.labels is not None
        return int(max(self.train.labels.max(), self.held_out.labels.max())) + 1


def training_sets(
    source: str, *, held_out: str | None = None, seed: int = 0, plain: float = 0.0, **options: Any
) -> TrainingSets:
    """Read the images to train on and those to measure the accuracy on.

    Args:
        source: what `data.load` takes; but `shapes` is 8000 scenes of another seed, and `shapes:N`
            is refused.
        held_out: a source of its own; None holds out 2000 scenes for `shapes`, and a tenth of the
            images for anything else.
        seed: of what is drawn from a source.
        plain: share of the scenes of `shapes` to train on that are hidden in part (see
            `shapes.generate`); of no other source.
        **options: of `data.load`, for both sources; `shapes` takes none.

    Raises:
        ValueError: one line that names the source that cannot be read, has no labels, fewer than
            ten images to take a tenth from, other classes than the first, or an option it does not
            take.
    """
    if source == "shapes":
        first, held_out = _scenes(options, plain), held_out or f"shapes:{HELD_OUT_SCENES}"
    elif source.startswith("shapes:"):
        raise ValueError(
            f"images {source!r}: shapes:N are the scenes held out for attacks; "
            "train on shapes or another source"
        )
    else:
        first = load(source, seed=seed, **options)
    train = _labelled(source, first)
    if held_out is None:
        return TrainingSets(*_split(source, train, seed), first.classes)
    second = load(held_out, seed=seed, **options)
    if second.images.shape[1:] != first.images.shape[1:]:
        sizes = " and ".join(
            "x".join(map(str, image_set.images.shape[1:3])) for image_set in (first, second)
        )
        raise ValueError(
            f"images of {source} and {held_out} differ in size, {sizes}; --size makes them one"
        )
    return TrainingSets(
        train, _labelled(held_out, second), _same_classes(source, first, held_out, second)
    )


def _scenes(options: Mapping[str, Any], plain: float) -> ImageSet:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(
            f"images 'shapes': the embedded set is trained on as it is, without {', '.join(given)}"
        )
    return shapes.generate(TRAIN_SCENES, seed=0, plain=plain)


def _labelled(source: str, images: ImageSet) -> ImageSet:
    if images.labels is None:
        raise ValueError(f"{source} has no labels; training needs one an image")
    return images


def _split(source: str, images: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    """Draw nine tenths and one tenth."""
    n = len(images.images)
    if n < 10:
        raise ValueError(
            f"{source} holds {n} images; training needs at least 10, one tenth is held out"
        )
    order = np.random.default_rng(seed).permutation(n)
    return images.take(order[n // 10 :]), images.take(order[: n // 10])


def _same_classes(
    source: str, first: ImageSet, held_out: str, second: ImageSet
) -> tuple[str, ...] | None:
    """Return the names of the classes, where either source knows them."""
    if first.classes and second.classes:
        for i, (name, other) in enumerate(zip_longest(first.classes, second.classes)):
            if name != other:
                raise ValueError(
                    f"{held_out} must have the classes of {source}: "
                    f"class {i} is {other!r}, not {name!r}"
                )
    return first.classes or second.classes
