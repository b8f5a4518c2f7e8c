"""The pass over a classifier, and what one trace tells of it: what it can do, its shapes, that it is set to inference."""

import inspect
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax import Array

from adv2_jax.cost import subprograms
from adv2_jax.errors import first_line
from adv2_jax.precision import at_least_float32
from adv2_jax.types import Activation, Classifier, Features, HasFeatures, Image, Logits

PROTOCOL = (
    "a classifier is a pytree with logits(image, act=relu) -> [K], "
    "or with features(image, act=relu) -> [h, w, C] and head(features) -> [K]"
)


def has(model: Any, *methods: str) -> bool:
    """Whether a model has all these methods."""
    return all(callable(getattr(model, method, None)) for method in methods)


def logits_of(model: Classifier, image: Image, act: Activation | None = None) -> Logits:
    """The logits [K] of an image, float32 or wider whatever the network computes in.

    Args:
        model: with `features` and `head`, which have precedence, or with `logits`.
        image: [H, W, 3] in [0, 1].
        act: stands in for every ReLU; None, or a network that takes none, leaves it as it is (see
            `check_activation`).
    """
    network, pooled = cast(Any, model), has(model, "features", "head")
    method = network.features if pooled else network.logits
    value = method(image) if act is None or not _takes(method, "act") else method(image, act=act)
    return head_of(network, value) if pooled else at_least_float32(value)


def head_of(model: HasFeatures, features: Features) -> Logits:
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
        return jax.tree.unflatten(
            self._structure, [next(arrays) if leaf is Array else leaf[1] for leaf in self._rest]
        )

    def tree_flatten(self) -> tuple[list[Array], tuple[Any, ...]]:
        """The arrays, and everything else."""
        return self._arrays, (self._rest, self._structure)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], arrays: Any) -> "StaticLeaves":
        """The inverse of `tree_flatten`."""
        return cls(list(arrays), *static)


def static_leaves(model: Any) -> Any:
    """The model itself if all its leaves are arrays; else one whose other leaves are static under
    `jit` and compare by value.

    Raises:
        ValueError: if one of them, or what the model declares static, is not hashable; names it.
    """
    leaves, structure = jax.tree.flatten(model)
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    # by its type too: 1, 1.0 and True are equal
    rest = tuple(Array if _is_array(leaf) else (type(leaf), leaf) for leaf in leaves)
    if not _is_hashable(structure):
        raise ValueError(f"what {type(model).__name__} declares static must be hashable, no array")
    if not _is_hashable(rest):
        path, leaf = next(
            (path, leaf)
            for path, leaf in jax.tree.leaves_with_path(model)
            if not _is_array(leaf) and not _is_hashable(leaf)
        )
        where = f"{type(model).__name__}{jax.tree_util.keystr(path)}"
        raise ValueError(
            f"{where} is neither an array of numbers nor hashable, but {type(leaf).__name__}: {leaf}"
        )
    return model if len(arrays) == len(rest) else StaticLeaves(arrays, rest, structure)


def _is_array(leaf: Any) -> bool:
    return (
        hasattr(leaf, "shape")
        and getattr(getattr(leaf, "dtype", None), "kind", "V") not in "OSUTMm"
    )


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
        return jax.tree.unflatten(
            self.structure, [jax.ShapeDtypeStruct(*kind) for kind in self.kinds]
        )


def architecture(model: Any) -> Architecture:
    """The architecture of a model; takes milliseconds."""
    leaves, structure = jax.tree.flatten(static_leaves(model))
    return Architecture(
        structure,
        tuple((leaf.shape, leaf.dtype) for leaf in leaves),
        jax.dtypes.canonicalize_dtype(float).itemsize == 8,
    )


class Inspected(NamedTuple):
    """What one trace tells of a network, for images of one shape.

    Attributes:
        logits: shape and type of the logits [K].
        features: those of the features, which need not be an array [h, w, C]; None without features
            and head.
        relus: how many ReLUs are left where `act` is another function.
    """

    logits: jax.ShapeDtypeStruct
    features: Any
    relus: int


def num_classes(model: Classifier, shape: tuple[int, ...]) -> int:
    """K, the number of classes of a network for images of a shape [H, W, 3]; see `inspected`."""
    return inspected(model, shape).logits.shape[0]


def inspected(model: Classifier, shape: tuple[int, ...]) -> Inspected:
    """What there is to know of a network without running it, for images of a shape [H, W, 3].

    The network is traced once for each architecture and shape; nothing is computed.

    Raises:
        ValueError: if the model is not a classifier (`adv2_jax.types.Classifier`), is set to
            training, or cannot take such images.
    """
    if any(leaf is model for leaf in jax.tree.leaves(model)) and (
        has(model, "features") or has(model, "logits")
    ):
        raise ValueError(
            f"{type(model).__name__} is not a pytree: {PROTOCOL}; a Linen module needs its weights beside it"
        )
    return _inspected(architecture(model), tuple(shape), type(model).__name__)


def check_features(model: HasFeatures, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Shape and type of the features [h, w, C] of a network that has features and head.

    Raises:
        ValueError: if they are no such array.
    """
    features = inspected(model, shape).features
    _check_shape(f"{type(model).__name__}.features", features, 3, "[h, w, C]")
    return cast(jax.ShapeDtypeStruct, features)


def check_activation(model: Classifier, shape: tuple[int, ...]) -> None:
    """Refuse a network with ReLUs that `act` does not replace: its map has no second derivative,
    and an attack is blind to it.

    Raises:
        ValueError: says how many there are, and what to write.
    """
    left = inspected(model, shape).relus
    if left:
        raise ValueError(
            f"{type(model).__name__} does not pass act on: {left} ReLUs stay where act is another function, and the curvature of "
            "maps with them; take act as an argument and call it in place of every ReLU"
        )


@lru_cache(maxsize=64)  # a run asks some dozen times a batch
def _inspected(known: Architecture, shape: tuple[int, ...], name: str) -> Inspected:
    model = known.model()
    method = "features" if has(model, "features", "head") else "logits"
    if not has(model, method):
        missing = "no methods logits, or features and head"
        for one, other in (("features", "head"), ("head", "features")):
            if has(model, one):
                missing = f"{one} but no method {other}"
        raise ValueError(f"{name} has {missing}: {PROTOCOL}")
    training = next(_in_training(model.whole() if isinstance(model, StaticLeaves) else model), None)
    if training is not None:
        raise ValueError(training)
    # an activation that is no ReLU: whatever ReLU is found all the same does not come of `act`
    given = {"act": jnp.tanh} if _takes(getattr(model, method), "act") else {}
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    traced, program = _traced(
        lambda model, x: getattr(model, method)(x, **given),
        model,
        image,
        f"the network cannot take images of {list(shape)}",
    )
    relus = count_relus(program, shape)
    if method == "logits":
        return Inspected(_check_logits(f"{name}.logits", traced), None, relus)
    shown = (
        list(traced.shape) if isinstance(traced, jax.ShapeDtypeStruct) else type(traced).__name__
    )
    logits, program = _traced(
        lambda model, a: model.head(a),
        model,
        traced,
        f"{name}.head cannot take features of {shown}",
    )
    return Inspected(
        _check_logits(f"{name}.head", logits), traced, relus + count_relus(program, shape)
    )


def _takes(method: Callable[..., Any], option: str) -> bool:
    """Whether a method can be called with an option by name; True where that cannot be told."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(
        parameter.name == option or parameter.kind is parameter.VAR_KEYWORD
        for parameter in parameters
    )


def count_relus(program: Any, shape: tuple[int, ...]) -> int:
    """How many ReLUs, max(z, 0), are in a traced program.

    None are those of the image itself [..., H, W, 3] and those with a min after them, which keep
    values in a range, or of a difference, as a variance E x² - (E x)² is kept from being negative.

    Args:
        program: a jaxpr.
        shape: of the image, [H, W, 3].
    """
    equations = getattr(program, "jaxpr", program).eqns
    made_by = {out: equation.primitive.name for equation in equations for out in equation.outvars}
    clipped = {
        v
        for equation in equations
        if equation.primitive.name == "min"
        for v in equation.invars
        if not hasattr(v, "val")
    }
    found = 0
    for equation in equations:
        if equation.primitive.name == "max" and equation.outvars[0] not in clipped:
            values = [v for v in equation.invars if not hasattr(v, "val")]
            against_zero = len(values) == 1 and any(
                hasattr(v, "val") and float(v.val) == 0 for v in equation.invars
            )
            found += (
                against_zero
                and values[0].aval.shape[1:] != shape
                and made_by.get(values[0]) != "sub"
            )
        found += sum(count_relus(inner, shape) for inner in subprograms(equation.params))
    return found


class _InTraining(Exception):
    """Says what is set to training, and what to do."""


def _in_training(model: Any) -> Iterator[str]:
    """What in NNX modules, wrapped or not, depends on the batch or on chance: BatchNorm and dropout do until told otherwise."""
    for network in jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, nnx.Module)):
        for path, module in nnx.iter_graph(network) if isinstance(network, nnx.Module) else ():
            where = ".".join(map(str, path)) or "it"
            found = (
                f"{type(network).__name__} is set to training: {where} ({type(module).__name__})"
            )
            if getattr(module, "use_running_average", None) is False:
                yield f"{found} uses batch statistics; call its eval() first"
            if getattr(module, "deterministic", None) is False:
                yield f"{found} is random; call its eval() first"


def _refuse_training(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Interceptor of Linen's methods: their mode is known only while they are called."""
    module = context.module

    def is_off(option: str) -> bool:
        return (
            context.method_name == "__call__"
            and kwargs.get(option, getattr(module, option, None)) is False
        )

    where = (
        f"the network is set to training: {'.'.join(module.path) or 'it'} ({type(module).__name__})"
    )
    if isinstance(module, linen.BatchNorm) and is_off("use_running_average"):
        raise _InTraining(f"{where} uses batch statistics; give it use_running_average=True")
    if isinstance(module, linen.Dropout) and is_off("deterministic") and module.rate > 0:
        raise _InTraining(f"{where} is random; give it deterministic=True")
    return call(*args, **kwargs)


def _traced(
    f: Callable[[Any, Any], Any], model: Any, argument: Any, failure: str
) -> tuple[Any, Any]:
    """Shapes of what f gives of an argument, and its program; under `vmap`, as it will run: a network must not write to itself."""
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), argument)
    try:
        with linen.intercept_methods(_refuse_training):
            program, value = jax.make_jaxpr(
                lambda m, xs: jax.vmap(partial(f, m))(xs), return_shape=True
            )(model, batch)
    except _InTraining as error:
        raise ValueError(str(error)) from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's code raises
        raise ValueError(f"{failure}: {type(error).__name__}: {first_line(error)}") from error
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), value
    ), program


def _check_logits(what: str, logits: Any) -> jax.ShapeDtypeStruct:
    _check_shape(what, logits, 1, "logits [K]")
    if logits.shape[0] < 2:
        raise ValueError(
            f"{what} gives {logits.shape[0]} logits, a classifier has at least 2: for one logit z of two classes "
            "return jnp.stack([0, z]) of it, which has the same probabilities"
        )
    return cast(jax.ShapeDtypeStruct, logits)


def _check_shape(what: str, value: Any, rank: int, expected: str) -> None:
    if not isinstance(value, jax.ShapeDtypeStruct):
        raise ValueError(f"{what} must give one array {expected}, got {type(value).__name__}")
    if len(value.shape) != rank or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"{what} must give floating-point {expected}, got {value.dtype} {list(value.shape)}"
        )
