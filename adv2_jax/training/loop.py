"""Training: AdamW with warm-up and cosine decay on mirrored and shifted images, for any loss.

This is the only place where BatchNorm uses batch statistics. The update step is pure and jitted,
and the host feeds it batches, because XLA:CPU compiles convolutions inside loops to slow code
(jax issue 12868). All augmentations are drawn from one generator before the work that needs them,
so a resumed run skips the draws of finished steps and meets the same random numbers.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from adv2_jax.data.images import check_integers, check_range
from adv2_jax.data.lazy import Images, ahead
from adv2_jax.devices import number_of_devices, replicate, spread
from adv2_jax.identity import tree_fingerprint
from adv2_jax.training.checkpoints import Checkpoints

Model = TypeVar("Model", bound=nnx.Module)
Labels = NDArray[np.integer[Any]]
Losses = NDArray[np.float32]
OnLoss = Callable[[int, float], None]
Loss = Callable[[Any, Any, Array, Any, Array], Array]
Adversary = Callable[[Any, Any, Array, Array, Array], Any]
Range = tuple[str, Callable[[Any], bool]]  # in words, and as a test; None passes all


class TrainState(NamedTuple):
    """The state that an update step carries.

    Attributes:
        params: the variables that are trained.
        others: all other variables, such as BatchNorm statistics.
        memory: the state of the optimiser.
    """

    params: Any
    others: Any
    memory: optax.OptState


class Checkpoint(NamedTuple):
    """The content of a checkpoint: the state, and the losses `[steps]`, 0 for steps to come."""

    state: TrainState
    losses: Losses


class Augmentation(NamedTuple):
    """The random choices for a batch of B images.

    Attributes:
        indices: `[B]` into the images of the training set.
        down, right: `[B]` shifts of the window in pixels, in -`shift`..`shift`.
        mirrored: bool `[B]`.
    """

    indices: NDArray[np.integer[Any]]
    down: NDArray[np.integer[Any]]
    right: NDArray[np.integer[Any]]
    mirrored: NDArray[np.bool_]


UpdateStep = Callable[..., tuple[TrainState, Array]]

ATTACK = 1 << 31  # word of the keys of an adversary, far from those that a loss splits off

NOT_NEGATIVE: Range = ("be finite and not negative", lambda value: 0 <= value < np.inf)
SHARE: Range = ("lie in [0, 1)", lambda value: 0 <= value < 1)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The hyper-parameters of a training.

    Attributes:
        seed: of the order of the images, of their augmentation and of random numbers in the loss,
            in 0..2³² - 1.
        epochs: passes over the images, at least 1.
        batch_size: images a step, at least 1; the last images of an epoch that do not fill a batch
            are left out.
        learning_rate: its peak, reached after a twentieth of the steps; then it falls to zero along
            a cosine.
        weight_decay: decoupled, multiplied with the learning rate; applies to kernels, not to
            biases and BatchNorm.
        shift: largest random shift in pixels, in each direction.
        mirror: whether to mirror images with probability 1/2; not for text, digits and the like.

    Raises:
        ValueError: names the option that is out of its range.
    """

    RANGES: ClassVar[dict[str, Range]] = {
        **dict.fromkeys(("seed", "shift"), ("be at least 0", lambda value: value >= 0)),
        **dict.fromkeys(("epochs", "batch_size"), ("be at least 1", lambda value: value >= 1)),
        "learning_rate": ("be positive and finite", lambda value: 0 < value < np.inf),
        "weight_decay": NOT_NEGATIVE,
    }

    seed: int = 0
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    shift: int = 4
    mirror: bool = True

    def __post_init__(self) -> None:
        for name, (words, allows) in self.RANGES.items():
            value = getattr(self, name)
            if value is not None and not allows(value):
                raise ValueError(f"{name} must {words}, got {value}")

    def steps(self, n: int) -> int:
        """Return the number of steps on n images; what fills no batch of an epoch is left out."""
        return self.epochs * (n // self.batch_size)


class Checkpointing(NamedTuple):
    """Where to keep checkpoints, and whom to tell the losses.

    Attributes:
        checkpoints: folder of the latest checkpoint; None writes none.
        checkpoint_every: steps between two checkpoints, and between two tests whether the loss is
            finite; an epoch unless given. The last step is always followed by one.
        resume: whether to continue from the checkpoint; it must have been written with the same
            arguments.
        on_loss: called with the number of steps done and the loss of the last one, once the next
            step is under way; not for steps done before resuming.
    """

    checkpoints: str | os.PathLike[str] | None = None
    checkpoint_every: int | None = None
    resume: bool = False
    on_loss: OnLoss | None = None


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
    set_mode: Callable[[Any], None] = lambda model: model.train(),
    adversary: Adversary | None = None,
    devices: int | None = None,
) -> tuple[Model, Losses]:
    """Train a copy of a network.

    The same arguments give the same weights, whether the run was interrupted and resumed or not.
    Another number of devices sums gradients and batch statistics in another order: the same to
    rounding.

    Args:
        model: its present weights are the start.
        loss: (model, constants, key, images [B, H, W, 3] in [0, 1], labels [B]) -> [], the mean
            over a batch; `key` is another one at each step.
        images: uint8 `[N, H, W, 3]`, checked (`check_examples`). Those that are decoded on demand
            are all read once before the first step, for the fingerprint: a damaged one is met then.
        labels: integers `[N]`.
        recipe: the hyper-parameters; must be equal when resuming.
        checkpointing: where to keep checkpoints, and whom to tell the losses.
        constants: pytree that the loss needs and does not train.
        trainable: NNX filter of the variables that are trained.
        set_mode: sets the copy to training; all of it unless given.
        adversary: (the network in inference mode, constants, key, images, labels) -> what the loss
            gets as images, a pytree [B, ...]; called before each step, outside of its program, so
            that an attack has the driver that suits the device. None changes no image.
        devices: number of devices of this host that share each batch; unless given, as many as
            divide it evenly.

    Returns:
        The trained network, set to inference, and the loss of every step `[steps]`.

    Raises:
        ValueError: the loss is no longer finite, `checkpoint_every` is below 1, the devices do not
            divide the batch evenly, or the folder does not hold what `resume` says (see
            `Checkpoints.begin`).
    """
    every = checkpointing.checkpoint_every
    if every is None:
        every = len(images) // recipe.batch_size
    if every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {every}")
    if checkpointing.resume and checkpointing.checkpoints is None:
        raise ValueError("resume needs checkpoints, the folder of the run to go on with")
    count = number_of_devices(devices)
    if devices is None:
        count = math.gcd(count, recipe.batch_size)
    elif recipe.batch_size % count:
        raise ValueError(
            f"batch_size must be a multiple of the {count} devices, got {recipe.batch_size}"
        )
    trained = nnx.clone(model)
    set_mode(trained)
    done, losses, store = 0, np.zeros(recipe.steps(len(images)), np.float32), None
    step, state = _begin(trained, loss, recipe, len(losses), trainable)
    if checkpointing.checkpoints is not None:
        store = Checkpoints(
            checkpointing.checkpoints, _settings(model, constants, images, labels, recipe)
        )
        done, (state, losses) = store.begin(Checkpoint(state, losses), resume=checkpointing.resume)
    # XLA sums the gradients of the devices by itself, and the statistics of BatchNorm: the program
    # says what a batch is, not where
    state, constants = replicate((state, constants), count)
    if adversary is not None:
        step = _attacked(step, trained, recipe.seed, adversary)

    # drawn from the first step on, done or not: the generator must pass over what it drew before
    draws = islice(enumerate(_augmentations(len(images), recipe)), done, None)
    # uint32 is what `fold_in` takes: a Python number would be int64 under x64, another program for
    # the same keys
    made = (
        (np.uint32(i), *spread((_augment(images, draw), labels[draw.indices]), count))
        for i, draw in draws
    )
    with closing(ahead(made)) as batches:
        while done < len(losses):
            state, new = _advance(
                partial(step, constants), state, islice(batches, every), done, checkpointing.on_loss
            )
            losses[done : done + len(new)] = new
            done += len(new)
            if not np.isfinite(new).all():  # before it is saved: a checkpoint can always be resumed
                raise ValueError(
                    f"training diverged by step {done}; a lower learning rate than {recipe.learning_rate} may help"
                )
            if store:
                store.save(done, Checkpoint(state, losses))
    nnx.update(trained, state.params, state.others)
    trained.eval()
    return trained, losses


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
        count: image [H, W, 3] in [0, 1] -> K, the number of classes of the network.

    Raises:
        ValueError: one line: what is wrong, the value, and what is allowed.
    """
    n = len(images)
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"images must be uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}"
        )
    check_integers("labels", labels, n)
    if batch_size > n:
        raise ValueError(f"batch_size must lie in 1..{n}, the number of images, got {batch_size}")
    # by a float32: uint8 by a Python number is float64 in NumPy
    k = count(images[0] / np.float32(255))
    if k < 2:
        raise ValueError(f"a classifier needs 2 classes or more, got {k}")
    check_range("labels", labels, k)


def _settings(
    model: nnx.Module, constants: Any, images: Images, labels: Labels, recipe: Recipe
) -> dict[str, Any]:
    """Return all that determines the result of a run, in words and numbers."""
    return asdict(recipe) | {
        "model": type(model).__name__,
        "initial weights": tree_fingerprint(nnx.state(model, (nnx.Param, nnx.BatchStat))),
        "images": tree_fingerprint(images),
        "labels": tree_fingerprint(labels),
        "constants": None if constants is None else tree_fingerprint(constants),
    }


def _begin(
    trainee: nnx.Module, loss: Loss, recipe: Recipe, steps: int, trainable: Any
) -> tuple[UpdateStep, TrainState]:
    """Return the update step of a network set to training, and the state before the first one."""
    params, others = nnx.state(trainee, trainable, ...)
    optimiser = _optimiser(recipe.learning_rate, recipe.weight_decay, steps)
    step = _make_step(nnx.graphdef(trainee), trainable, optimiser, loss, recipe.seed)
    # a copy: each step donates the memory of the state it is given, and the caller keeps its model
    start = TrainState(params, others, optimiser.init(params))
    return step, jax.tree.map(jnp.copy, start)


def _optimiser(
    learning_rate: float, weight_decay: float, steps: int
) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps)
    # kernels only, as usual: biases and BatchNorm parameters (vectors) are not decayed
    return optax.adamw(
        schedule, weight_decay=weight_decay, mask=partial(jax.tree.map, lambda x: x.ndim > 1)
    )


def _make_step(
    graph: nnx.GraphDef[Any],
    trainable: Any,
    optimiser: optax.GradientTransformation,
    loss: Loss,
    seed: int,
) -> UpdateStep:
    """Return the jitted update step of one architecture.

    It takes (constants, state, number of the step [], images uint8 [B, H, W, 3], labels [B]) and
    returns (state, loss []).
    """

    def loss_of(
        params: Any, others: Any, constants: Any, key: Array, images: Array, labels: Array
    ) -> tuple[Array, Any]:
        # a copy: NNX forbids to write variables from inside another trace
        model = nnx.merge(graph, params, others, copy=True)
        # converted here: bytes are a quarter of what float32 would take to the device
        value = loss(model, constants, key, _unit(images), labels)
        return value, nnx.state(model, nnx.Not(trainable))

    # donated: the new state overwrites the old one in memory
    # constants are an argument, since XLA would bake weights that it closes over into the program
    @partial(jax.jit, donate_argnames="state")
    def step(
        constants: Any, state: TrainState, i: Array, images: Array, labels: Array
    ) -> tuple[TrainState, Array]:
        # by the number of the step, so that a resumed run has the keys of one never stopped
        key = jax.random.fold_in(jax.random.key(seed), i)
        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
        (value, others), grads = value_and_grad(
            state.params, state.others, constants, key, images, labels
        )
        updates, memory = optimiser.update(grads, state.memory, state.params)
        return TrainState(optax.apply_updates(state.params, updates), others, memory), value

    return step


@jax.jit
def _unit(images: Any) -> Any:
    """Return images in [0, 1]; those of an adversary are that already."""
    bytes_only = lambda x: x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x  # noqa: E731
    return jax.tree.map(bytes_only, images)


def _attacked(step: UpdateStep, trainee: nnx.Module, seed: int, adversary: Adversary) -> UpdateStep:
    """Return an update step on what an adversary makes of the images of its batch."""
    attacked = nnx.clone(trainee)
    attacked.eval()
    graph = nnx.graphdef(attacked)

    def attacked_step(
        constants: Any, state: TrainState, i: Array, images: Array, labels: Array
    ) -> tuple[TrainState, Array]:
        model = nnx.merge(graph, state.params, state.others)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), i), ATTACK)
        seen = adversary(model, constants, key, _unit(images), labels)
        return step(constants, state, i, seen, labels)

    return attacked_step


def _advance(
    step: UpdateStep,
    state: TrainState,
    batches: Iterable[tuple[Any, Images, Labels]],
    done: int,
    on_loss: OnLoss | None,
) -> tuple[TrainState, Losses]:
    """Return the state after some more batches, and their losses.

    A loss is read only once the next step is handed over: JAX runs steps asynchronously, so the
    device never waits for the host.
    """
    losses: list[Array] = []
    for batch in batches:
        state, loss = step(state, *batch)
        if on_loss and losses:
            on_loss(done + len(losses), float(losses[-1]))
        losses.append(loss)
    if on_loss and losses:
        on_loss(done + len(losses), float(losses[-1]))
    return state, np.array(losses, np.float32)


def _augmentations(n: int, recipe: Recipe) -> Iterator[Augmentation]:
    """Draw the augmentation of every batch; n images come in a new order each epoch."""
    rng = np.random.default_rng(recipe.seed)
    size, shift = recipe.batch_size, recipe.shift
    for _ in range(recipe.epochs):
        order = rng.permutation(n)
        # full batches only: a smaller one would compile the step once more
        for i in range(0, n - size + 1, size):
            down, right = rng.integers(0, 2 * shift + 1, (2, size)) - shift
            # drawn even where nothing is mirrored: the other choices stay those of the seed
            mirrored = rng.random(size) < (0.5 if recipe.mirror else 0)
            yield Augmentation(order[i : i + size], down, right, mirrored)


def _augment(images: Images, draw: Augmentation) -> Images:
    """Return a batch, shifted (edges are repeated) and mirrored: [N, H, W, 3] -> [B, H, W, 3]."""
    batch, (height, width) = images[draw.indices], images.shape[1:3]
    # clipped indices repeat the edge without a padded copy of the images
    rows = np.clip(np.arange(height) + draw.down[:, None], 0, height - 1)
    columns = np.clip(np.arange(width) + draw.right[:, None], 0, width - 1)
    columns = np.where(draw.mirrored[:, None], columns[:, ::-1], columns)
    # one gather: the shifted and mirrored images are never made one by one
    return batch[np.arange(len(batch))[:, None, None], rows[:, :, None], columns[:, None]]
