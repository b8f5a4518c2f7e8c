"""Training a classifier: AdamW with warm-up and cosine decay on mirrored and shifted images.

The only place where BatchNorm uses batch statistics. The update step is pure and jitted, and the host feeds it batches:
XLA:CPU compiles convolutions inside loops to slow code. What is random is drawn apart from the work it is for, so a resumed run
passes over the steps it has done.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, zip_longest
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from adv2_jax.data import ImageSet, load, shapes
from adv2_jax.experiments.checkpoints import Checkpoints, fingerprint
from adv2_jax.losses import cross_entropy

EPOCHS, BATCH_SIZE, LEARNING_RATE = 4, 32, 3e-3
TRAIN_SCENES, HELD_OUT_SCENES = 8000, 2000

Model = TypeVar("Model", bound=nnx.Module)
Images = NDArray[np.uint8]
Labels = NDArray[np.integer[Any]]
Losses = NDArray[np.float32]
OnStep = Callable[[int, float], None]
Filter = Callable[[Any, Any], bool]


class State(NamedTuple):
    """What an update step carries: trained variables, the others (BatchNorm statistics), and the optimiser's memory."""

    params: Any
    others: Any
    memory: optax.OptState


class Progress(NamedTuple):
    """What a checkpoint keeps: the state, and the loss of every step `[steps]`, 0 for those to come."""

    state: State
    losses: Losses


class Draw(NamedTuple):
    """What is random about a batch of B images.

    Attributes:
        chosen: `[B]` positions of the images.
        down, right: `[B]` how far the part that is seen is shifted, in -`shift`..`shift`.
        mirrored: bool `[B]`.
    """

    chosen: NDArray[np.integer[Any]]
    down: NDArray[np.integer[Any]]
    right: NDArray[np.integer[Any]]
    mirrored: NDArray[np.bool_]


Step = Callable[[State, Images, Labels], tuple[State, Array]]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a classifier is trained.

    Attributes:
        seed: of the order of the images and of their augmentation, 0 or more.
        epochs: passes over the images, at least 1.
        batch_size: images a step, at least 1; the rest of an epoch that does not fill a batch is left out.
        learning_rate: peak, reached after a twentieth of the steps; then it falls to zero along a cosine.
        weight_decay: decoupled, times the learning rate; of kernels, not of biases and BatchNorm.
        smoothing: mass that label smoothing takes from the true class, in [0, 1).
        shift: largest random shift in pixels, in each direction.
        mirror: whether to mirror every second image, by chance; not for text, digits and the like.
        head_only: whether to train only what `head` reads; the features stay as they are, BatchNorm statistics included.

    Raises:
        ValueError: names the option that is out of its range.
    """

    seed: int = 0
    epochs: int = EPOCHS
    batch_size: int = BATCH_SIZE
    learning_rate: float = LEARNING_RATE
    weight_decay: float = 0.05
    smoothing: float = 0.05
    shift: int = 4
    mirror: bool = True
    head_only: bool = False

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("epochs", 1), ("batch_size", 1), ("shift", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be finite and not negative, got {self.weight_decay}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {self.smoothing}")


def train_classifier(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    checkpoints: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    on_step: OnStep | None = None,
    **options: Any,
) -> tuple[Model, Losses]:
    """Trains a copy of a classifier; the same arguments give the same weights, interrupted and resumed or not.

    Args:
        model: an NNX module whose `features` and `head` also take batches; its present weights are the start.
        images: uint8 `[N, H, W, 3]`, N >= `batch_size`.
        labels: integers `[N]` in 0..K-1.
        checkpoints: folder in which the latest checkpoint is kept; None keeps none.
        checkpoint_every: steps from one checkpoint, and one look at whether the loss is finite, to the next; an epoch unless
            given. The last step is followed by one in any case.
        resume: whether to go on from the checkpoint; it must have been made with the same arguments.
        on_step: called with the number of steps done and the loss of the last one; not for steps done before resuming.
        **options: the attributes of `Recipe`.

    Returns:
        The trained classifier, BatchNorm set to running statistics, and the loss of every step `[steps]`.

    Raises:
        ValueError: an option is out of its range; images and labels do not fit each other, the classifier or `batch_size`; the
            loss stops being finite; or the folder does not hold what `resume` says (see `Checkpoints.begin`).
    """
    recipe = Recipe(**options)
    _check_images(model, images, labels, recipe.batch_size)
    an_epoch = len(images) // recipe.batch_size
    every = an_epoch if checkpoint_every is None else checkpoint_every
    _check_checkpoints(checkpoints, every, resume)

    step, state = _prepare(model, images[0], recipe, recipe.epochs * an_epoch)
    done, losses, store = 0, np.zeros(recipe.epochs * an_epoch, np.float32), None
    if checkpoints is not None:
        store = Checkpoints(checkpoints, _settings(model, images, labels, recipe))
        done, (state, losses) = store.begin(Progress(state, losses), resume=resume)

    draws = islice(_draws(len(images), recipe), done, None)
    batches = ((_augment(images, draw), labels[draw.chosen]) for draw in draws)
    while done < len(losses):
        state, new = _advance(step, state, islice(batches, every), done, on_step)
        losses[done : done + len(new)] = new
        done += len(new)
        if not np.isfinite(new).all():
            raise ValueError(f"training diverged by step {done}; a lower learning rate than {recipe.learning_rate} may help")
        if store:
            store.save(done, Progress(state, losses))
    return _finished(model, state), losses


class Labelled(NamedTuple):
    """Images uint8 `[N, H, W, 3]` and their labels, integers `[N]`."""

    images: Images
    labels: Labels

    def take(self, index: NDArray[Any]) -> "Labelled":
        """The images at `index` [M]."""
        return Labelled(self.images[index], self.labels[index])


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


def training_sets(source: str, *, held_out: str | None = None, seed: int = 0, **options: Any) -> TrainingSets:
    """The images to train on and those to measure the accuracy on.

    Args:
        source: what `data.load` takes; but `shapes` is 8000 scenes of another seed, and `shapes:N` is refused.
        held_out: a source of its own; None holds out 2000 scenes for `shapes`, and a tenth of the images for anything else.
        seed: of what is drawn from a source.
        **options: of `data.load`, for both sources; `shapes` takes none.

    Raises:
        ValueError: one line that names the source that cannot be read, has no labels, fewer than ten images to take a tenth
            from, other classes than the first, or an option it does not take.
    """
    if source == "shapes":
        first, held_out = _scenes(options), held_out or f"shapes:{HELD_OUT_SCENES}"
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


def _scenes(options: Mapping[str, Any]) -> ImageSet:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"images 'shapes': the embedded set is trained on as it is, without {', '.join(given)}")
    scenes = shapes.generate(TRAIN_SCENES, seed=0)
    return ImageSet(scenes.images, scenes.labels, classes=shapes.CLASSES)


def _labelled(source: str, images: ImageSet) -> Labelled:
    if images.labels is None:
        raise ValueError(f"{source} has no labels; training needs one an image")
    return Labelled(images.images, images.labels)


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
    predictions = [_predict(model, images[i : i + batch_size]).argmax(-1) for i in starts]
    return float(np.mean(np.concatenate(predictions) == labels))


def _logits(model: Any, image: Array) -> Array:
    """uint8 `[..., H, W, 3]` -> `[..., K]`."""
    return model.head(model.features(image.astype(jnp.float32) / 255))


_predict = jax.jit(jax.vmap(_logits, (None, 0)))


def _check_images(model: nnx.Module, images: Images, labels: Labels, batch_size: int) -> None:
    n = len(images)
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images must be uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}")
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers [{n}], one an image, got {labels.dtype} {list(labels.shape)}")
    if batch_size > n:
        raise ValueError(f"batch_size must lie in 1..{n}, the number of images, got {batch_size}")
    k = jax.eval_shape(_logits, model, images[0]).shape[-1]
    if k < 2:
        raise ValueError(f"a classifier needs 2 classes or more, got {k}")
    if labels.min() < 0 or labels.max() >= k:
        raise ValueError(f"labels must lie in 0..{k - 1}, the model's classes, got {labels.min()}..{labels.max()}")


def _check_checkpoints(checkpoints: str | os.PathLike[str] | None, every: int, resume: bool) -> None:
    if every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {every}")
    if resume and checkpoints is None:
        raise ValueError("resume needs checkpoints, the folder of the run to go on with")


def _settings(model: nnx.Module, images: Images, labels: Labels, recipe: Recipe) -> dict[str, Any]:
    """What a run is made of, in words and numbers: two runs with the same have the same result."""
    weights = nnx.state(model, (nnx.Param, nnx.BatchStat))
    return asdict(recipe) | {
        "model": type(model).__name__,
        "initial weights": fingerprint(jax.tree.leaves(weights)),
        "images": fingerprint([images]),
        "labels": fingerprint([labels]),
    }


def _prepare(model: nnx.Module, image: NDArray[np.uint8], recipe: Recipe, steps: int) -> tuple[Step, State]:
    """The update step, and the state before the first one."""
    trainee = nnx.clone(model)
    trainee.eval() if recipe.head_only else trainee.train()
    trainable = _read_by_head(model, image) if recipe.head_only else nnx.Param
    params, others = nnx.state(trainee, trainable, ...)
    optimiser = _optimiser(recipe.learning_rate, recipe.weight_decay, steps)
    step = _make_step(nnx.graphdef(trainee), trainable, optimiser, recipe.smoothing)
    return step, State(params, others, optimiser.init(params))


def _read_by_head(model: Any, image: NDArray[np.uint8]) -> Filter:
    """Selects the parameters that `head` reads, whatever they are called."""
    graph, (params, others) = nnx.graphdef(model), nnx.state(model, nnx.Param, ...)
    features = jax.eval_shape(model.features, image.astype(np.float32))
    program = jax.make_jaxpr(lambda params, x: nnx.merge(graph, params, others).head(x))(params, features).jaxpr
    read = {id(variable) for equation in program.eqns for variable in equation.invars}
    inputs = jax.tree.unflatten(jax.tree.structure((params, features)), program.invars)[0]
    paths = {path for path, variable in nnx.to_flat_state(inputs) if id(variable.get_value()) in read}
    if not paths:
        raise ValueError(f"head_only: the head of {type(model).__name__} has no parameters")
    return lambda path, _: path in paths


def _finished(model: Model, state: State) -> Model:
    trained = nnx.clone(model)
    nnx.update(trained, state.params, state.others)
    trained.eval()
    return trained


def _optimiser(learning_rate: float, weight_decay: float, steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps)
    return optax.adamw(schedule, weight_decay=weight_decay, mask=partial(jax.tree.map, lambda x: x.ndim > 1))


def _make_step(graph: nnx.GraphDef[Any], trainable: Any, optimiser: optax.GradientTransformation, smoothing: float) -> Step:
    """The jitted update step of one architecture: (state, images, labels) -> (state, loss)."""

    def loss_of(params: Any, others: Any, images: Array, labels: Array) -> tuple[Array, Any]:
        # a copy: variables must not be written from inside another trace
        model = nnx.merge(graph, params, others, copy=True)
        loss = jax.vmap(partial(cross_entropy, smoothing=smoothing))(_logits(model, images), labels).mean()
        return loss, nnx.state(model, nnx.Not(trainable))

    @jax.jit
    def step(state: State, images: Array, labels: Array) -> tuple[State, Array]:
        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
        (loss, others), grads = value_and_grad(state.params, state.others, images, labels)
        updates, memory = optimiser.update(grads, state.memory, state.params)
        return State(optax.apply_updates(state.params, updates), others, memory), loss

    return step


def _advance(
    step: Step, state: State, batches: Iterable[tuple[Images, Labels]], done: int, on_step: OnStep | None
) -> tuple[State, Losses]:
    """The state after some more batches, and their losses; waits for the device at the end only, unless `on_step` is given."""
    losses: list[Array] = []
    for images, labels in batches:
        state, loss = step(state, images, labels)
        losses.append(loss)
        if on_step:
            on_step(done + len(losses), float(loss))
    return state, np.array(losses, np.float32)


def _draws(n: int, recipe: Recipe) -> Iterator[Draw]:
    """What is random about every batch; n images come in a new order each epoch."""
    rng = np.random.default_rng(recipe.seed)
    size, shift = recipe.batch_size, recipe.shift
    for _ in range(recipe.epochs):
        order = rng.permutation(n)
        for i in range(0, n - size + 1, size):
            down, right = rng.integers(0, 2 * shift + 1, (2, size)) - shift
            yield Draw(order[i : i + size], down, right, rng.random(size) < (0.5 if recipe.mirror else 0))


def _augment(images: Images, draw: Draw) -> Images:
    """The images of a batch, shifted (edges are repeated) and mirrored: `[N, H, W, 3]` -> `[B, H, W, 3]`."""
    height, width = images.shape[1:3]
    rows = np.clip(np.arange(height) + draw.down[:, None], 0, height - 1)
    columns = np.clip(np.arange(width) + draw.right[:, None], 0, width - 1)
    columns = np.where(draw.mirrored[:, None], columns[:, ::-1], columns)
    return images[draw.chosen[:, None, None], rows[:, :, None], columns[:, None]]
