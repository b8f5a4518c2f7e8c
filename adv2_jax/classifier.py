"""The pass over a classifier, and what can be told without running it: the two methods, the shapes, that it is set to inference."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import jax
from flax import linen, nnx
from jax import Array

from adv2_jax.activations import relu
from adv2_jax.errors import first_line
from adv2_jax.precision import at_least_float32
from adv2_jax.types import Activation, Classifier, Features, Image, Logits

PROTOCOL = "a classifier is a pytree with features(image, act=relu) -> [h, w, C] and head(features) -> [K]"


def logits_of(model: Classifier, image: Image, act: Activation = relu) -> Logits:
    """The logits [K] of an image, float32 or wider whatever the network computes in."""
    return head_of(model, model.features(image, act=act))


def head_of(model: Classifier, features: Features) -> Logits:
    """The logits [K] of features, float32 or wider whatever the network computes in."""
    return at_least_float32(model.head(features))


@jax.tree_util.register_pytree_node_class
class StaticLeaves:
    """A model whose leaves that are not arrays (functions, strings, numbers of Python) are static; made by `static_leaves`."""

    def __init__(self, arrays: list[Array], rest: tuple[Any, ...], structure: Any):
        self._arrays, self._rest, self._structure = arrays, rest, structure

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of an object that is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.whole(), name)

    def whole(self) -> Any:
        """The model as it was."""
        arrays = iter(self._arrays)
        return jax.tree.unflatten(self._structure, [next(arrays) if leaf is Array else leaf[1] for leaf in self._rest])

    def tree_flatten(self) -> tuple[list[Array], tuple[Any, ...]]:
        """The arrays, and everything else."""
        return self._arrays, (self._rest, self._structure)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], arrays: Any) -> "StaticLeaves":
        """The inverse of `tree_flatten`."""
        return cls(list(arrays), *static)


def static_leaves(model: Any) -> Any:
    """The model itself if all its leaves are arrays; else one whose other leaves are static under `jit` and compare by value.

    Raises:
        ValueError: if one of them, or what the model declares static, is not hashable; names it.
    """
    leaves, structure = jax.tree.flatten(model)
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    rest = tuple(Array if _is_array(leaf) else (type(leaf), leaf) for leaf in leaves)  # by its type too: 1, 1.0 and True are equal
    if not _is_hashable(structure):
        raise ValueError(f"what {type(model).__name__} declares static must be hashable, no array")
    if not _is_hashable(rest):
        path, leaf = next(
            (path, leaf) for path, leaf in jax.tree.leaves_with_path(model) if not _is_array(leaf) and not _is_hashable(leaf)
        )
        where = f"{type(model).__name__}{jax.tree_util.keystr(path)}"
        raise ValueError(f"{where} is neither an array of numbers nor hashable, but {type(leaf).__name__}: {leaf}")
    return model if len(arrays) == len(rest) else StaticLeaves(arrays, rest, structure)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and getattr(getattr(leaf, "dtype", None), "kind", "V") not in "OSUTMm"


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except (TypeError, ValueError):
        return False
    return True


class Architecture(NamedTuple):
    """All of a model but its numbers: what a cache can know it by.

    Attributes:
        structure: the pytree structure of the model with static leaves.
        kinds: shape and type of each array.
        wide: whether JAX knows 64-bit types at present, on which the types of results depend.
    """

    structure: Any
    kinds: tuple[tuple[tuple[int, ...], Any], ...]
    wide: bool

    def model(self) -> Any:
        """The model with abstract arrays, to be traced."""
        return jax.tree.unflatten(self.structure, [jax.ShapeDtypeStruct(*kind) for kind in self.kinds])


def architecture(model: Any) -> Architecture:
    """The architecture of a model; takes milliseconds."""
    leaves, structure = jax.tree.flatten(static_leaves(model))
    return Architecture(
        structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves), jax.dtypes.canonicalize_dtype(float).itemsize == 8
    )


def num_classes(model: Classifier, shape: tuple[int, ...]) -> int:
    """K, the number of classes of a network for images of a shape [H, W, 3]; see `abstract_pass`."""
    return abstract_pass(model, shape)[1].shape[0]


def abstract_pass(model: Classifier, shape: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes and types of the features [h, w, C] and logits [K] that a network makes of an image [H, W, 3].

    Nothing is computed; the network is traced, once for each architecture and shape.

    Raises:
        ValueError: if the model is not a classifier (`adv2_jax.types.Classifier`), is set to training, or cannot take such images.
    """
    if any(leaf is model for leaf in jax.tree.leaves(model)) and callable(getattr(model, "features", None)):
        raise ValueError(f"{type(model).__name__} is not a pytree: {PROTOCOL}; a Linen module needs its weights beside it")
    return _abstract_pass(architecture(model), tuple(shape), type(model).__name__)


@lru_cache(maxsize=64)  # a run asks some dozen times a batch
def _abstract_pass(known: Architecture, shape: tuple[int, ...], name: str) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    model = known.model()
    for method in ("features", "head"):
        if not callable(getattr(model, method, None)):
            raise ValueError(f"{name} has no method {method}: {PROTOCOL}")
    training = next(_in_training(model.whole() if isinstance(model, StaticLeaves) else model), None)
    if training is not None:
        raise ValueError(training)
    image = jax.ShapeDtypeStruct(shape, jax.numpy.float32)
    features = _traced(_features, model, image, f"the network cannot take images of {list(shape)}")
    _check_shape(f"{name}.features", features, 3, "[h, w, C]")
    logits = _traced(_head, model, features, f"{name}.head cannot take features of {list(features.shape)}")
    _check_shape(f"{name}.head", logits, 1, "logits [K]")
    if logits.shape[0] < 2:
        raise ValueError(
            f"{name}.head gives {logits.shape[0]} logits, a classifier has at least 2: for one logit z of two classes "
            "return jnp.stack([0, z]) of it, which has the same probabilities"
        )
    return features, logits


def _features(model: Any, images: Array) -> Features:
    return jax.vmap(lambda x: model.features(x, act=relu))(images)


def _head(model: Any, features: Features) -> Logits:
    return jax.vmap(model.head)(features)


class _InTraining(Exception):
    """Says what is set to training, and what to do."""


def _in_training(model: Any) -> Iterator[str]:
    """What in NNX modules, wrapped or not, depends on the batch or on chance: BatchNorm and dropout do until told otherwise."""
    for network in jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, nnx.Module)):
        for path, module in nnx.iter_graph(network) if isinstance(network, nnx.Module) else ():
            where = ".".join(map(str, path)) or "it"
            found = f"{type(network).__name__} is set to training: {where} ({type(module).__name__})"
            if getattr(module, "use_running_average", None) is False:
                yield f"{found} uses batch statistics; call its eval() first"
            if getattr(module, "deterministic", None) is False:
                yield f"{found} is random; call its eval() first"


def _refuse_training(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Interceptor of Linen's methods: their mode is known only while they are called."""
    module = context.module

    def is_off(option: str) -> bool:
        return context.method_name == "__call__" and kwargs.get(option, getattr(module, option, None)) is False

    where = f"the network is set to training: {'.'.join(module.path) or 'it'} ({type(module).__name__})"
    if isinstance(module, linen.BatchNorm) and is_off("use_running_average"):
        raise _InTraining(f"{where} uses batch statistics; give it use_running_average=True")
    if isinstance(module, linen.Dropout) and is_off("deterministic") and module.rate > 0:
        raise _InTraining(f"{where} is random; give it deterministic=True")
    return call(*args, **kwargs)


def _traced(f: Callable[[Any, Any], Any], model: Any, argument: jax.ShapeDtypeStruct, failure: str) -> Any:
    """What f(model, [argument]) gives; f runs under `vmap`, as it will be run, where a network must not write to itself."""
    batch = jax.ShapeDtypeStruct((1, *argument.shape), argument.dtype)
    try:
        with linen.intercept_methods(_refuse_training):
            value = jax.eval_shape(f, model, batch)
    except _InTraining as error:
        raise ValueError(str(error)) from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's code raises
        raise ValueError(f"{failure}: {type(error).__name__}: {first_line(error)}") from error
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), value)


def _check_shape(what: str, value: Any, rank: int, expected: str) -> None:
    if not isinstance(value, jax.ShapeDtypeStruct):
        raise ValueError(f"{what} must give one array {expected}, got {type(value).__name__}")
    if len(value.shape) != rank or not jax.numpy.issubdtype(value.dtype, jax.numpy.floating):
        raise ValueError(f"{what} must give floating-point {expected}, got {value.dtype} {list(value.shape)}")
