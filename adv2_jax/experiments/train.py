"""Training a classifier: cross-entropy with label smoothing, on any source with labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from adv2_jax.data import ImageSet, load, shapes
from adv2_jax.experiments import fit
from adv2_jax.experiments.fit import NOWHERE, Filter, Images, Kept, Labels, Losses, Model, check_examples
from adv2_jax.losses import cross_entropy

TRAIN_SCENES, HELD_OUT_SCENES = 8000, 2000
PLAIN = 0.12  # share of plain scenes for a classifier: RTS and MASK ask it what is left of an object before such a ground


@dataclass(frozen=True, kw_only=True)
class Recipe(fit.Recipe):
    """How a classifier is trained.

    Attributes:
        smoothing: mass that label smoothing takes from the true class, in [0, 1).
        head_only: whether to train only what `head` reads; the features stay as they are, BatchNorm statistics included.

    Raises:
        ValueError: names the option that is out of its range.
    """

    epochs: int = 4
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    smoothing: float = 0.05
    head_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {self.smoothing}")


def train_classifier(model: Model, images: Images, labels: Labels, *, kept: Kept = NOWHERE, **options: Any) -> tuple[Model, Losses]:
    """Trains a copy of a classifier; the same arguments give the same weights, interrupted and resumed or not.

    Args:
        model: an NNX module whose `features` and `head` also take batches; its present weights are the start.
        images: uint8 `[N, H, W, 3]`, N >= `batch_size`.
        labels: integers `[N]` in 0..K-1.
        kept: where the run is kept and how it is followed.
        **options: the attributes of `Recipe`.

    Returns:
        The trained classifier, BatchNorm set to running statistics, and the loss of every step `[steps]`.

    Raises:
        ValueError: an option is out of its range; images and labels do not fit each other, the classifier or `batch_size`; or as
            for `fit.fit`.
    """
    recipe = Recipe(**options)
    check_examples(images, labels, recipe.batch_size, lambda image: jax.eval_shape(_logits, model, image).shape[-1])

    def loss(model: Any, constants: None, key: Array, x: Array, y: Array) -> Array:
        return jax.vmap(partial(cross_entropy, smoothing=recipe.smoothing))(_logits(model, x), y).mean()

    return fit.fit(
        model,
        loss,
        images,
        labels,
        recipe,
        kept,
        trainable=_read_by_head(model, images[0]) if recipe.head_only else nnx.Param,
        prepare=lambda trainee: trainee.eval() if recipe.head_only else trainee.train(),
    )


class Labelled(NamedTuple):
    """Images uint8 `[N, H, W, 3]`, their labels, integers `[N]`, and where the objects are, bool `[N, H, W]`, if known."""

    images: Images
    labels: Labels
    masks: NDArray[np.bool_] | None = None

    def take(self, index: NDArray[Any]) -> "Labelled":
        """The images at `index` [M]."""
        return Labelled(self.images[index], self.labels[index], None if self.masks is None else self.masks[index])


class TrainingSets(NamedTuple):
    """Images to train on, images held out to measure the accuracy, and the names of the classes where they are known."""

    train: Labelled
    held_out: Labelled
    classes: tuple[str, ...] | None = None

    @property
    def num_classes(self) -> int:
        """As many as there are names; without names, one more than the largest label of both sets."""
        if self.classes is not None:
            return len(self.classes)
        return int(max(self.train.labels.max(), self.held_out.labels.max())) + 1


def training_sets(source: str, *, held_out: str | None = None, seed: int = 0, plain: float = 0.0, **options: Any) -> TrainingSets:
    """The images to train on and those to measure the accuracy on.

    Args:
        source: what `data.load` takes; but `shapes` is 8000 scenes of another seed, and `shapes:N` is refused.
        held_out: a source of its own; None holds out 2000 scenes for `shapes`, and a tenth of the images for anything else.
        seed: of what is drawn from a source.
        plain: share of the scenes of `shapes` to train on that are hidden in part (see `shapes.generate`); of no other source.
        **options: of `data.load`, for both sources; `shapes` takes none.

    Raises:
        ValueError: one line that names the source that cannot be read, has no labels, fewer than ten images to take a tenth
            from, other classes than the first, or an option it does not take.
    """
    if source == "shapes":
        first, held_out = _scenes(options, plain), held_out or f"shapes:{HELD_OUT_SCENES}"
    elif source.startswith("shapes:"):
        raise ValueError(f"images {source!r}: shapes:N are the scenes held out for attacks; train on shapes or another source")
    else:
        first = load(source, seed=seed, **options)
    train = _labelled(source, first)
    if held_out is None:
        return TrainingSets(*_split(source, train, seed), first.classes)
    second = load(held_out, seed=seed, **options)
    if second.images.shape[1:] != first.images.shape[1:]:
        sizes = " and ".join("x".join(map(str, found.images.shape[1:3])) for found in (first, second))
        raise ValueError(f"images of {source} and {held_out} differ in size, {sizes}; --size makes them one")
    return TrainingSets(train, _labelled(held_out, second), _same_classes(source, first, held_out, second))


def _scenes(options: Mapping[str, Any], plain: float) -> ImageSet:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"images 'shapes': the embedded set is trained on as it is, without {', '.join(given)}")
    scenes = shapes.generate(TRAIN_SCENES, seed=0, plain=plain)
    return ImageSet(scenes.images, scenes.labels, masks=scenes.masks, classes=shapes.CLASSES)


def _labelled(source: str, images: ImageSet) -> Labelled:
    if images.labels is None:
        raise ValueError(f"{source} has no labels; training needs one an image")
    return Labelled(images.images, images.labels, images.masks)


def _split(source: str, images: Labelled, seed: int) -> tuple[Labelled, Labelled]:
    """Nine tenths and one tenth."""
    n = len(images.images)
    if n < 10:
        raise ValueError(f"{source} holds {n} images; training needs at least 10, one tenth is held out")
    order = np.random.default_rng(seed).permutation(n)
    return images.take(order[n // 10 :]), images.take(order[: n // 10])


def _same_classes(source: str, first: ImageSet, held_out: str, second: ImageSet) -> tuple[str, ...] | None:
    """The names of the classes, where either source knows them."""
    if first.classes and second.classes:
        for i, (name, other) in enumerate(zip_longest(first.classes, second.classes)):
            if name != other:
                raise ValueError(f"{held_out} must have the classes of {source}: class {i} is {other!r}, not {name!r}")
    return first.classes or second.classes


def accuracy(model: nnx.Module, images: Images, labels: Labels, *, batch_size: int = 256) -> float:
    """The share of images that a classifier gets right, in [0, 1].

    Args:
        model: classifier, its BatchNorm set to running statistics.
        images: uint8 `[N, H, W, 3]`, N >= 1.
        labels: integers `[N]`.
        batch_size: images at a time; changes memory and speed, not the result.
    """
    starts = range(0, len(images), batch_size)
    predictions = [_predict(model, images[i : i + batch_size] / np.float32(255)).argmax(-1) for i in starts]
    return float(np.mean(np.concatenate(predictions) == labels))


def _logits(model: Any, image: Array) -> Array:
    """`[..., H, W, 3]` in [0, 1] -> `[..., K]`."""
    return model.head(model.features(image))


_predict = jax.jit(jax.vmap(_logits, (None, 0)))


def _read_by_head(model: Any, image: NDArray[np.uint8]) -> Filter:
    """Selects the parameters that `head` reads, whatever they are called."""
    graph, (params, others) = nnx.graphdef(model), nnx.state(model, nnx.Param, ...)
    features = jax.eval_shape(model.features, image.astype(np.float32))
    program = jax.make_jaxpr(lambda params, x: nnx.merge(graph, params, others).head(x))(params, features).jaxpr
    read = {id(variable) for equation in program.eqns for variable in equation.invars}
    inputs = jax.tree.unflatten(jax.tree.structure((params, features)), program.invars)[0]
    paths = {path for path, variable in nnx.to_flat_state(inputs) if id(jax.tree.leaves(variable)[0]) in read}
    if not paths:
        raise ValueError(f"head_only: the head of {type(model).__name__} has no parameters")
    return lambda path, _: path in paths
