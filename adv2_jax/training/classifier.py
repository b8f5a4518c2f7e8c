"""Training a classifier: cross-entropy with label smoothing, on any source with labels."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import jax
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from adv2_jax.attacks import check_interpreter, explain, no_map
from adv2_jax.losses import cross_entropy
from adv2_jax.presets import Preset
from adv2_jax.training import robust
from adv2_jax.training.loop import (
    NO_CHECKPOINTS,
    NOT_NEGATIVE,
    SHARE,
    Checkpointing,
    Images,
    Labels,
    Losses,
    Model,
    Range,
    Recipe,
    check_examples,
    fit,
)
from adv2_jax.types import Classifier


@dataclass(frozen=True, kw_only=True)
class ClassifierRecipe(Recipe):
    """The hyper-parameters of a training of a classifier.

    Attributes:
        smoothing: mass that label smoothing takes from the true class, in [0, 1).
        head_only: whether to train only the parameters that `head` reads; the features stay as they
            are, BatchNorm statistics included.
        robust: what is trained against, one of `robust.ROBUST`, or None.
        epsilon: radius of the L∞ ball of "pgd" and "adv2", and step of "curvature", in [1/255, 1].
        attack_steps: of "pgd" and "adv2", at least 1.
        interpreter: that "adv2" attacks.
        penalty: weight of "gradient", "curvature" or "ssr", not negative; None is that of
            `robust.PENALTIES`.

    Raises:
        ValueError: names the option that is out of its range.
    """

    RANGES: ClassVar[dict[str, Range]] = {
        **Recipe.RANGES,
        **robust.RANGES,
        "smoothing": SHARE,
        "robust": (f"be one of {', '.join(robust.ROBUST)}", lambda name: name in robust.ROBUST),
        "penalty": NOT_NEGATIVE,
    }

    epochs: int = 4
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    smoothing: float = 0.05
    head_only: bool = False
    robust: str | None = None
    epsilon: float = 8 / 255
    attack_steps: int = 7
    interpreter: str = "cam"
    penalty: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty is not None and self.robust not in robust.PENALTIES:
            raise ValueError(f"penalty goes with robust {', '.join(robust.PENALTIES)}")

    @property
    def attack(self) -> Preset | None:
        """The attack on each batch, None without one."""
        if self.robust not in robust.ATTACKS:
            return None
        interpreter = self.interpreter if self.robust == "adv2" else None
        return robust.inner_attack(interpreter, self.attack_steps, self.epsilon)


def train_classifier(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    checkpointing: Checkpointing = NO_CHECKPOINTS,
    devices: int | None = None,
    **options: Any,
) -> tuple[Model, Losses]:
    """Train a copy of a classifier.

    The same arguments give the same weights, whether the run was interrupted and resumed or not.

    Args:
        model: an NNX module whose `features` and `head` also take batches; its present weights are
            the start.
        images: uint8 `[N, H, W, 3]`, N >= `batch_size`.
        labels: integers `[N]` in 0..K-1.
        checkpointing: where to keep checkpoints, and whom to tell the losses.
        devices: as `loop.fit`.
        **options: the attributes of `ClassifierRecipe`.

    Returns:
        The trained classifier, BatchNorm set to running statistics, and the loss of every step
        `[steps]`.

    Raises:
        ValueError: an option is out of its range; images and labels do not fit each other, the
            classifier or `batch_size`; the classifier lacks what the interpreter under attack
            needs; or as `loop.fit`.
    """
    recipe = ClassifierRecipe(**options)
    attack = recipe.attack
    check_examples(
        images,
        labels,
        recipe.batch_size,
        lambda image: jax.eval_shape(_logits, model, image).shape[-1],
    )
    for one in attack.interpreters if attack else ():
        check_interpreter(cast(Classifier, model), images.shape[1:], one, attacked=True)

    penalty, usual = robust.PENALTIES.get(recipe.robust or "", (None, 0.0))
    weight = usual if recipe.penalty is None else recipe.penalty

    def loss(model: Any, constants: None, key: Array, x: Array, y: Array) -> Array:
        # the batch goes through the network as a whole, for the statistics of BatchNorm
        logits = _logits(model, x)
        each = jax.vmap(partial(cross_entropy, smoothing=recipe.smoothing))(logits, y)
        if penalty is not None:
            # of a copy: a derivative in the image must not write statistics
            again = lambda x: _logits(nnx.clone(model), x)  # noqa: E731
            each += weight * penalty(again, robust.at_inference(model), x, y, recipe.epsilon)
        return each.mean()

    def adversary(model: Any, constants: None, key: Array, x: Array, y: Array) -> Array:
        assert attack is not None
        return robust.adversarial(model, key, x, y, attack, recipe.epsilon)

    return fit(
        model,
        loss,
        images,
        labels,
        recipe,
        checkpointing,
        trainable=_read_by_head(model, images[0]) if recipe.head_only else nnx.Param,
        # a head alone is trained on the features that it will see, those of running statistics
        set_mode=lambda trainee: trainee.eval() if recipe.head_only else trainee.train(),
        adversary=adversary if attack else None,
        devices=devices,
    )


def accuracy(model: Any, images: Images, labels: Labels, *, batch_size: int = 256) -> float:
    """Return the share of images that a classifier gets right, in [0, 1].

    Args:
        model: classifier, its BatchNorm set to running statistics.
        images: uint8 `[N, H, W, 3]`, N >= 1.
        labels: integers `[N]` in 0..K-1.
        batch_size: images at a time; changes memory and speed, not the result.

    Raises:
        ValueError: as `explain`.
    """
    logits = explain(model, images, labels, interpreter=no_map, batch_size=batch_size)[0]
    return float((logits.argmax(-1) == labels).mean())


def _logits(model: Any, image: Array) -> Array:
    """Return the logits of one image or a batch: [..., H, W, 3] in [0, 1] -> [..., K]."""
    return model.head(model.features(image))


def _read_by_head(model: Any, image: NDArray[np.uint8]) -> Callable[[Any, Any], bool]:
    """Return an NNX filter of the parameters that `head` reads, whatever their names."""
    graph, (params, others) = nnx.graphdef(model), nnx.state(model, nnx.Param, ...)
    # shapes suffice to trace the head: the features are never computed
    features = jax.eval_shape(model.features, image.astype(np.float32))
    # every parameter is an input of the traced program; no equation reads those of the features
    program = jax.make_jaxpr(lambda params, x: nnx.merge(graph, params, others).head(x))(
        params, features
    ).jaxpr
    # by identity: equations read literals too, which need not be hashable
    read = {id(variable) for equation in program.eqns for variable in equation.invars}
    inputs = jax.tree.unflatten(jax.tree.structure((params, features)), program.invars)[0]
    paths = {
        path
        for path, variable in nnx.to_flat_state(inputs)
        if id(jax.tree.leaves(variable)[0]) in read
    }
    if not paths:
        raise ValueError(f"head_only: the head of {type(model).__name__} has no parameters")
    return lambda path, _: path in paths
