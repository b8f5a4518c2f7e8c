"""Training: AdamW with warm-up and cosine decay on mirrored and shifted images, whatever the loss
is.

The only place where BatchNorm uses batch statistics. The update step is pure and jitted, and the
host feeds it batches: XLA:CPU compiles convolutions inside loops to slow code. What is random is
drawn apart from the work it is for, so a resumed run passes over the steps it has done.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from adv2_jax.identity import fingerprint
from adv2_jax.training.checkpoints import Checkpoints

Model = TypeVar("Model", bound=nnx.Module)
Images = NDArray[np.uint8]
Labels = NDArray[np.integer[Any]]
Losses = NDArray[np.float32]
OnStep = Callable[[int, float], None]
Filter = Callable[[Any, Any], bool]
Loss = Callable[[Any, Any, Array, Array, Array], Array]


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


Step = Callable[..., tuple[State, Array]]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained.

    Attributes:
        seed: of the order of the images, of their augmentation and of what is random in the loss,
            in 0..2³² - 1.
        epochs: passes over the images, at least 1.
        batch_size: images a step, at least 1; the rest of an epoch that does not fill a batch is
            left out.
        learning_rate: peak, reached after a twentieth of the steps; then it falls to zero along a
            cosine.
        weight_decay: decoupled, times the learning rate; of kernels, not of biases and BatchNorm.
        shift: largest random shift in pixels, in each direction.
        mirror: whether to mirror every second image, by chance; not for text, digits and the like.

    Raises:
        ValueError: names the option that is out of its range.
    """

    seed: int = 0
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    shift: int = 4
    mirror: bool = True

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("epochs", 1), ("batch_size", 1), ("shift", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(
                f"weight_decay must be finite and not negative, got {self.weight_decay}"
            )

    def steps(self, n: int) -> int:
        """Updates in all for n images."""
        return self.epochs * (n // self.batch_size)


class Checkpointing(NamedTuple):
    """Where a run is kept and how it is followed.

    Attributes:
        checkpoints: folder in which the latest checkpoint is kept; None keeps none.
        checkpoint_every: steps from one checkpoint, and one look at whether the loss is finite, to
            the next; an epoch unless given. The last step is followed by one in any case.
        resume: whether to go on from the checkpoint; it must have been made with the same
            arguments.
        on_step: called with the number of steps done and the loss of the last one, once the next is
            under way; not for steps done before resuming.
    """

    checkpoints: str | os.PathLike[str] | None = None
    checkpoint_every: int | None = None
    resume: bool = False
    on_step: OnStep | None = None


NO_CHECKPOINTS = Checkpointing()


def fit(
    model: Model,
    loss: Loss,
    images: Images,
    labels: Labels,
    recipe: Recipe,
    checkpointing: Checkpointing,
    *,
    constants: Any = None,
    trainable: Any = nnx.Param,
    prepare: Callable[[Any], None] = lambda model: model.train(),
) -> tuple[Model, Losses]:
    """Trains a copy of a network; the same arguments give the same weights, interrupted and resumed
    or not.

    Args:
        model: its present weights are the start.
        loss: (model, constants, key, images [B, H, W, 3] in [0, 1], labels [B]) -> [], the mean
            over a batch; `key` is another one at each step.
        images: uint8 `[N, H, W, 3]`, checked (`check_examples`).
        labels: integers `[N]`.
        recipe: how; part of what must be the same when resuming.
        checkpointing: where it is kept and how it is followed.
        constants: pytree that the loss needs and does not train.
        trainable: filter of the variables that are trained; NNX's.
        prepare: sets the copy to training, all of it unless told otherwise.

    Returns:
        The trained network, set to inference, and the loss of every step `[steps]`.

    Raises:
        ValueError: the loss stops being finite, or the folder does not hold what `resume` says (see
            `Checkpoints.begin`).
    """
    every = (
        len(images) // recipe.batch_size
        if checkpointing.checkpoint_every is None
        else checkpointing.checkpoint_every
    )
    _check_checkpointing(checkpointing, every)
    done, losses, store = 0, np.zeros(recipe.steps(len(images)), np.float32), None
    step, state = _prepare(model, loss, constants, recipe, len(losses), trainable, prepare)
    if checkpointing.checkpoints is not None:
        store = Checkpoints(
            checkpointing.checkpoints, _settings(model, constants, images, labels, recipe)
        )
        done, (state, losses) = store.begin(Progress(state, losses), resume=checkpointing.resume)

    draws = islice(enumerate(_draws(len(images), recipe)), done, None)
    batches = ((np.uint32(i), _augment(images, draw), labels[draw.chosen]) for i, draw in draws)
    while done < len(losses):
        state, new = _advance(step, state, islice(batches, every), done, checkpointing.on_step)
        losses[done : done + len(new)] = new
        done += len(new)
        if not np.isfinite(new).all():
            raise ValueError(
                f"training diverged by step {done}; a lower learning rate than {recipe.learning_rate} may help"
            )
        if store:
            store.save(done, Progress(state, losses))
    return _finished(model, state), losses


def check_examples(
    images: Images,
    labels: Labels,
    batch_size: int,
    count: Callable[[NDArray[np.floating[Any]]], int],
) -> None:
    """Refuse images and labels that nothing can be trained on.

    Args:
        images: to be uint8 `[N, H, W, 3]`, N >= `batch_size`.
        labels: to be integers `[N]` in 0..K-1.
        batch_size: images a step.
        count: image [H, W, 3] in [0, 1] -> K, the classes of the network.

    Raises:
        ValueError: one line: what is wrong, the value, and what is allowed.
    """
    n = len(images)
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"images must be uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}"
        )
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels must be integers [{n}], one an image, got {labels.dtype} {list(labels.shape)}"
        )
    if batch_size > n:
        raise ValueError(f"batch_size must lie in 1..{n}, the number of images, got {batch_size}")
    k = count(images[0] / np.float32(255))
    if k < 2:
        raise ValueError(f"a classifier needs 2 classes or more, got {k}")
    if labels.min() < 0 or labels.max() >= k:
        raise ValueError(
            f"labels must lie in 0..{k - 1}, the model's classes, got {labels.min()}..{labels.max()}"
        )


def _check_checkpointing(checkpointing: Checkpointing, every: int) -> None:
    if every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {every}")
    if checkpointing.resume and checkpointing.checkpoints is None:
        raise ValueError("resume needs checkpoints, the folder of the run to go on with")


def _settings(
    model: nnx.Module, constants: Any, images: Images, labels: Labels, recipe: Recipe
) -> dict[str, Any]:
    """What a run is made of, in words and numbers: two runs with the same have the same result."""
    weights = nnx.state(model, (nnx.Param, nnx.BatchStat))
    found = asdict(recipe) | {
        "model": type(model).__name__,
        "initial weights": fingerprint(jax.tree.leaves(weights)),
        "images": fingerprint([images]),
        "labels": fingerprint([labels]),
    }
    return (
        found
        if constants is None
        else found | {"constants": fingerprint(jax.tree.leaves(constants))}
    )


def _prepare(
    model: nnx.Module,
    loss: Loss,
    constants: Any,
    recipe: Recipe,
    steps: int,
    trainable: Any,
    prepare: Callable[[Any], None],
) -> tuple[Step, State]:
    """The update step, and the state before the first one."""
    trainee = nnx.clone(model)
    prepare(trainee)
    params, others = nnx.state(trainee, trainable, ...)
    optimiser = _optimiser(recipe.learning_rate, recipe.weight_decay, steps)
    step = _make_step(nnx.graphdef(trainee), trainable, optimiser, loss, recipe.seed)
    # each step overwrites the state it is given
    start = jax.tree.map(jnp.copy, State(params, others, optimiser.init(params)))
    return partial(step, constants), start


def _finished(model: Model, state: State) -> Model:
    trained = nnx.clone(model)
    nnx.update(trained, state.params, state.others)
    trained.eval()
    return trained


def _optimiser(
    learning_rate: float, weight_decay: float, steps: int
) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps)
    return optax.adamw(
        schedule, weight_decay=weight_decay, mask=partial(jax.tree.map, lambda x: x.ndim > 1)
    )


def _make_step(
    graph: nnx.GraphDef[Any],
    trainable: Any,
    optimiser: optax.GradientTransformation,
    loss: Loss,
    seed: int,
) -> Callable[..., tuple[State, Array]]:
    """The jitted update step of one architecture: (constants, state, number of the step, images, labels) -> (state, loss)."""

    def loss_of(
        params: Any, others: Any, constants: Any, key: Array, images: Array, labels: Array
    ) -> tuple[Array, Any]:
        # a copy: variables must not be written from inside another trace
        model = nnx.merge(graph, params, others, copy=True)
        value = loss(model, constants, key, images.astype(jnp.float32) / 255, labels)
        return value, nnx.state(model, nnx.Not(trainable))

    @partial(jax.jit, donate_argnames="state")
    def step(
        constants: Any, state: State, i: Array, images: Array, labels: Array
    ) -> tuple[State, Array]:
        key = jax.random.fold_in(jax.random.key(seed), i)
        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
        (value, others), grads = value_and_grad(
            state.params, state.others, constants, key, images, labels
        )
        updates, memory = optimiser.update(grads, state.memory, state.params)
        return State(optax.apply_updates(state.params, updates), others, memory), value

    return step


def _advance(
    step: Step,
    state: State,
    batches: Iterable[tuple[Any, Images, Labels]],
    done: int,
    on_step: OnStep | None,
) -> tuple[State, Losses]:
    """The state after some more batches, and their losses. The host is a step ahead: it makes a batch while the device works."""
    losses: list[Array] = []

    def tell(count: int) -> None:
        if on_step and count:
            on_step(done + count, float(losses[count - 1]))

    for batch in batches:
        state, loss = step(state, *batch)
        losses.append(loss)
        tell(len(losses) - 1)
    tell(len(losses))
    return state, np.array(losses, np.float32)


def _draws(n: int, recipe: Recipe) -> Iterator[Draw]:
    """What is random about every batch; n images come in a new order each epoch."""
    rng = np.random.default_rng(recipe.seed)
    size, shift = recipe.batch_size, recipe.shift
    for _ in range(recipe.epochs):
        order = rng.permutation(n)
        for i in range(0, n - size + 1, size):
            down, right = rng.integers(0, 2 * shift + 1, (2, size)) - shift
            yield Draw(
                order[i : i + size], down, right, rng.random(size) < (0.5 if recipe.mirror else 0)
            )


def _augment(images: Images, draw: Draw) -> Images:
    """The images of a batch, shifted (edges are repeated) and mirrored: `[N, H, W, 3]` -> `[B, H, W, 3]`."""
    height, width = images.shape[1:3]
    rows = np.clip(np.arange(height) + draw.down[:, None], 0, height - 1)
    columns = np.clip(np.arange(width) + draw.right[:, None], 0, width - 1)
    columns = np.where(draw.mirrored[:, None], columns[:, ::-1], columns)
    return images[draw.chosen[:, None, None], rows[:, :, None], columns[:, None]]
