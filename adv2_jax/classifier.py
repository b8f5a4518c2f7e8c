"""Is it a classifier? What can be told without running it: the two methods, the shapes, and that it is set to inference."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from adv2_jax.activations import relu
from adv2_jax.errors import first_line
from adv2_jax.types import Classifier

PROTOCOL = "a classifier is a pytree with features(image, act=relu) -> [h, w, C] and head(features) -> [K]"


def num_classes(model: Classifier, shape: tuple[int, ...]) -> int:
    """K, the number of classes of a network for images of a shape [H, W, 3].

    Nothing is computed; the network is traced.

    Raises:
        ValueError: if the model is not a classifier (`adv2_jax.types.Classifier`), is set to training, or cannot take such images.
    """
    name = type(model).__name__
    for method in ("features", "head"):
        if not callable(getattr(model, method, None)):
            raise ValueError(f"{name} has no method {method}: {PROTOCOL}")
    if any(leaf is model for leaf in jax.tree.leaves(model)):
        raise ValueError(f"{name} is not a pytree: {PROTOCOL}; a Linen module needs its weights beside it")
    training = next(_in_training(model), None)
    if training is not None:
        raise ValueError(f"{training}; call its eval() first")
    image = jax.ShapeDtypeStruct(shape, jax.numpy.float32)
    features = _traced(lambda m, x: m.features(x, act=relu), model, image, f"the network cannot take images of {list(shape)}")
    _check_shape(f"{name}.features", features, 3, "[h, w, C]")
    logits = _traced(lambda m, x: m.head(x), model, features, f"{name}.head cannot take features of {list(features.shape)}")
    _check_shape(f"{name}.head", logits, 1, "logits [K]")
    return logits.shape[0]


def _in_training(model: Any) -> Iterator[str]:
    """What in NNX modules, wrapped or not, depends on the batch or on chance: BatchNorm and dropout do until told otherwise."""
    for network in jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, nnx.Module)):
        for path, module in nnx.iter_modules(network) if isinstance(network, nnx.Module) else ():
            where = ".".join(map(str, path)) or "it"
            found = f"{type(network).__name__} is set to training: {where} ({type(module).__name__})"
            if getattr(module, "use_running_average", None) is False:
                yield f"{found} uses batch statistics"
            if getattr(module, "deterministic", None) is False:
                yield f"{found} is random"


def _traced(f: Callable[[Any, Any], Any], model: Any, argument: jax.ShapeDtypeStruct, failure: str) -> Any:
    """What f(model, argument) gives; traced under `vmap`, as it will be run, where a network must not write to itself."""
    batch = jax.ShapeDtypeStruct((1, *argument.shape), argument.dtype)
    try:
        value = jax.eval_shape(lambda m, xs: jax.vmap(lambda x: f(m, x))(xs), model, batch)
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"{failure}: {type(error).__name__}: {first_line(error)}") from error
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), value)


def _check_shape(what: str, value: Any, rank: int, expected: str) -> None:
    if not isinstance(value, jax.ShapeDtypeStruct):
        raise ValueError(f"{what} must give one array {expected}, got {type(value).__name__}")
    if len(value.shape) != rank or not jax.numpy.issubdtype(value.dtype, jax.numpy.floating):
        raise ValueError(f"{what} must give floating-point {expected}, got {value.dtype} {list(value.shape)}")
