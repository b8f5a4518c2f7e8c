"""Training a classifier: AdamW with warm-up and cosine decay on mirrored and shifted images.

The only place where BatchNorm uses batch statistics. The update step is pure and jitted, and the host feeds it batches:
XLA:CPU compiles convolutions inside loops to slow code.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from adv2_jax.data import ImageSet, load, shapes
from adv2_jax.losses import cross_entropy

EPOCHS, BATCH_SIZE, LEARNING_RATE = 4, 32, 3e-3
TRAIN_SCENES, HELD_OUT_SCENES = 8000, 2000

Model = TypeVar("Model", bound=nnx.Module)
Images = NDArray[np.uint8]
Labels = NDArray[np.integer[Any]]


class State(NamedTuple):
    """What an update step carries: trained variables, the others (BatchNorm statistics), and the optimiser's memory."""

    params: Any
    others: Any
    memory: optax.OptState


Step = Callable[[State, Images, Labels], tuple[State, Array]]


def train_classifier(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
    weight_decay: float = 0.05,
    smoothing: float = 0.05,
    shift: int = 4,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[Model, NDArray[np.float32]]:
    """Trains a copy of a classifier; the same arguments give the same weights.

    Args:
        model: an NNX module whose `features` and `head` also take batches; its present weights are the start.
        images: uint8 `[N, H, W, 3]`, N >= `batch_size`; the rest of an epoch that does not fill a batch is left out.
        labels: integers `[N]` in 0..K-1.
        seed: of the order of the images and of their augmentation.
        epochs: passes over the images.
        batch_size: images a step.
        learning_rate: peak, reached after a twentieth of the steps; then it falls to zero along a cosine.
        weight_decay: decoupled, times the learning rate; of kernels, not of biases and BatchNorm.
        smoothing: mass that label smoothing takes from the true class, in [0, 1).
        shift: largest random shift in pixels, in each direction.
        on_step: called with the number of steps done and the loss of the last one.

    Returns:
        The trained classifier, BatchNorm set to running statistics, and the loss of every step `[steps]`.

    Raises:
        ValueError: an option is out of its range, or images and labels do not fit each other, the classifier or `batch_size`;
            or the loss stops being finite.
    """
    _check_options(epochs, learning_rate, weight_decay, smoothing, shift)
    _check_images(model, images, labels, batch_size)
    steps = epochs * (len(images) // batch_size)
    optimiser = _optimiser(learning_rate, weight_decay, steps)
    trainee = nnx.clone(model)
    trainee.train()
    graph = nnx.graphdef(trainee)
    params, others = nnx.state(trainee, nnx.Param, ...)
    step = _make_step(graph, optimiser, smoothing)
    state, losses = State(params, others, optimiser.init(params)), []
    for batch, batch_labels in _batches(images, labels, epochs, batch_size, shift, seed):
        state, loss = step(state, batch, batch_labels)
        losses.append(loss)
        if on_step:
            on_step(len(losses), float(loss))
    if not np.isfinite(losses).all():
        raise ValueError(f"training diverged; a lower learning rate than {learning_rate} may help")
    trained = nnx.merge(graph, state.params, state.others)
    trained.eval()
    return trained, np.array(losses, np.float32)


class TrainingSets(NamedTuple):
    """Images to train on, and images held out to measure the accuracy."""

    train: ImageSet
    held_out: ImageSet


def training_sets(source: str, *, seed: int = 0) -> TrainingSets:
    """The two sets of a source: for `shapes`, scenes of two seeds; for a file, nine tenths and one tenth drawn from the seed.

    Raises:
        ValueError: if the source cannot be read, or a file holds fewer than ten images.
    """
    if source == "shapes":
        scenes = shapes.generate(TRAIN_SCENES, seed=0)
        return TrainingSets(ImageSet(scenes.images, scenes.labels), load(f"shapes:{HELD_OUT_SCENES}"))
    if source.startswith("shapes"):
        raise ValueError(f"images {source!r}: shapes:N are the scenes held out for attacks; train on shapes or an .npz file")
    images = load(source)
    n = len(images.images)
    if n < 10:
        raise ValueError(f"{source} holds {n} images; training needs at least 10, one tenth is held out")
    order = np.random.default_rng(seed).permutation(n)
    return TrainingSets(images.take(order[n // 10 :]), images.take(order[: n // 10]))


def accuracy(model: nnx.Module, images: Images, labels: Labels, *, batch_size: int = 256) -> float:
    """The share of images that a classifier gets right, in [0, 1].

    Args:
        model: classifier, its BatchNorm set to running statistics.
        images: uint8 `[N, H, W, 3]`, N >= 1.
        labels: integers `[N]`.
        batch_size: images at a time; changes memory and speed, not the result.
    """
    starts = range(0, len(images), batch_size)
    predictions = [_predict(model, images[i : i + batch_size]).argmax(-1) for i in starts]
    return float(np.mean(np.concatenate(predictions) == labels))


def _logits(model: Any, image: Array) -> Array:
    """uint8 `[..., H, W, 3]` -> `[..., K]`."""
    return model.head(model.features(image.astype(jnp.float32) / 255))


_predict = jax.jit(jax.vmap(_logits, (None, 0)))


def _check_options(epochs: int, learning_rate: float, weight_decay: float, smoothing: float, shift: int) -> None:
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate must be positive and finite, got {learning_rate}")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be finite and not negative, got {weight_decay}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}")
    if shift < 0:
        raise ValueError(f"shift must be at least 0, got {shift}")


def _check_images(model: nnx.Module, images: Images, labels: Labels, batch_size: int) -> None:
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}")
    if len(labels) != len(images):
        raise ValueError(f"there must be one label an image, got {len(labels)} for {len(images)} images")
    if not 1 <= batch_size <= len(images):
        raise ValueError(f"batch_size must lie in 1..{len(images)}, the number of images, got {batch_size}")
    k = jax.eval_shape(_logits, model, images[0]).shape[-1]
    if k < 2:
        raise ValueError(f"a classifier needs 2 classes or more, got {k}")
    if labels.min() < 0 or labels.max() >= k:
        raise ValueError(f"labels must lie in 0..{k - 1}, the model's classes, got {labels.min()}..{labels.max()}")


def _optimiser(learning_rate: float, weight_decay: float, steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps)
    return optax.adamw(schedule, weight_decay=weight_decay, mask=partial(jax.tree.map, lambda x: x.ndim > 1))


def _make_step(graph: nnx.GraphDef[Any], optimiser: optax.GradientTransformation, smoothing: float) -> Step:
    """The jitted update step of one architecture: (state, images, labels) -> (state, loss)."""

    def loss_of(params: Any, others: Any, images: Array, labels: Array) -> tuple[Array, Any]:
        # a copy: variables must not be written from inside another trace
        model = nnx.merge(graph, params, others, copy=True)
        loss = jax.vmap(partial(cross_entropy, smoothing=smoothing))(_logits(model, images), labels).mean()
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    @jax.jit
    def step(state: State, images: Array, labels: Array) -> tuple[State, Array]:
        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
        (loss, others), grads = value_and_grad(state.params, state.others, images, labels)
        updates, memory = optimiser.update(grads, state.memory, state.params)
        return State(optax.apply_updates(state.params, updates), others, memory), loss

    return step


def _batches(
    images: Images, labels: Labels, epochs: int, batch_size: int, shift: int, seed: int
) -> Iterator[tuple[Images, Labels]]:
    """Augmented batches, in a new order each epoch."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for i in range(0, len(images) - batch_size + 1, batch_size):
            chosen = order[i : i + batch_size]
            yield _augment(rng, images[chosen], shift), labels[chosen]


def _augment(rng: np.random.Generator, images: Images, shift: int) -> Images:
    """Shifts each image by up to `shift` pixels (edges are repeated) and mirrors every second one, by chance."""
    n, (height, width) = len(images), images.shape[1:3]
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    top, left = rng.integers(0, 2 * shift + 1, (2, n))
    shifted = np.moveaxis(windows[np.arange(n), top, left], 1, -1)
    mirrored = rng.random(n) < 0.5
    return np.where(mirrored[:, None, None, None], shifted[:, :, ::-1], shifted)
