"""The forward pass of any classifier, and checks of its methods, shapes and mode by one trace."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax import Array

from adv2_jax.cost import is_literal, subprograms
from adv2_jax.errors import first_line
from adv2_jax.precision import at_least_float32
from adv2_jax.types import Activation, Classifier, Features, HasFeatures, Image, Logits

PROTOCOL = (
    "a classifier is a pytree with logits(image, act=relu) -> [K], "
    "or with features(image, act=relu) -> [h, w, C] and head(features) -> [K]"
)


# options of BatchNorm and dropout that are False in training, and the effect of it
TRAINING = {"use_running_average": "uses batch statistics", "deterministic": "is random"}


def lacks(model: Any, *needs: str) -> list[str]:
    """Return those of some needs that a model lacks: methods, or a "masker".

    "act" and "attend" are no methods, but options of `logits`; for the first see
    `check_activation`.
    """

    def has(need: str) -> bool:
        if need == "attend":
            return takes(getattr(model, "logits", None), need)
        return need == "act" or callable(getattr(model, need, None))

    return [need for need in needs if not has(need)]


def logits_of(
    model: Classifier, image: Image, act: Activation | Sequence[Activation] | None = None
) -> Logits:
    """Return the logits [K] of an image, float32 or wider whatever the network computes in.

    Args:
        model: with `features` and `head`, which have precedence, or with `logits`.
        image: [H, W, 3] in [0, 1].
        act: replaces every ReLU, or a sequence has one for each, in the order in which the network
            calls them; None, or a network without this option, leaves them (see
            `check_activation`).
    """
    if act is not None and not callable(act):
        rest = iter(act)
        # a network calls its activations in one order at every trace, so position can stand for a
        # name
        return logits_of(model, image, lambda z: next(rest)(z))
    network, pooled = cast(Any, model), not lacks(model, "features", "head")
    method = network.features if pooled else network.logits
    value = method(image) if act is None or not takes(method, "act") else method(image, act=act)
    return head_of(network, value) if pooled else at_least_float32(value)


def pre_activations(model: Classifier, image: Image) -> list[Array]:
    """Return what enters each ReLU of a network, in the order in which it calls them.

    Raises:
        ValueError: if the network calls no activation that it is given.
    """
    entering: list[Array] = []

    def record(z: Array) -> Array:
        entering.append(z)
        # true values go on, so that later layers see what they see without the recorder
        return jax.nn.relu(z)

    logits_of(model, image, record)
    if not entering:
        raise ValueError(f"{type(model).__name__} does not call the activation that it is given")
    return entering


def head_of(model: HasFeatures, features: Features) -> Logits:
    """Return the logits [K] of features, float32 or wider whatever the network computes in."""
    return at_least_float32(model.head(features))


@jax.tree_util.register_pytree_node_class
class StaticLeaves:
    """A model whose leaves other than arrays (functions, …) are static; see `static_leaves`."""

    def __init__(self, arrays: list[Array], rest: tuple[Any, ...], structure: Any):
        self._arrays, self._rest, self._structure = arrays, rest, structure

    def __getattr__(self, name: str) -> Any:
        # copy and pickle ask for private names before the attributes are set: `whole` would recurse
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    def whole(self) -> Any:
        """Return the original model."""
        arrays = iter(self._arrays)
        return jax.tree.unflatten(
            self._structure, [next(arrays) if leaf is Array else leaf[1] for leaf in self._rest]
        )

    def tree_flatten(self) -> tuple[list[Array], tuple[Any, ...]]:
        """Return the arrays, and all else as static data."""
        return self._arrays, (self._rest, self._structure)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], arrays: Any) -> "StaticLeaves":
        """Return a model from static data and arrays, the inverse of `tree_flatten`."""
        return cls(list(arrays), *static)


def static_leaves(model: Any) -> Any:
    """Return the model, its leaves other than arrays made static under `jit`, compared by value.

    A model with arrays only is returned as it is.

    Raises:
        ValueError: names a leaf, or static data of the model, that is not hashable.
    """
    leaves, structure = jax.tree.flatten(model)
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    # by type too: 1, 1.0 and True are equal, and would share one compiled program
    rest = tuple(Array if _is_array(leaf) else (type(leaf), leaf) for leaf in leaves)
    if not _is_hashable(structure):
        raise ValueError(f"what {type(model).__name__} declares static must be hashable, no array")
    if not _is_hashable(rest):
        # searched again, with paths, only once a message is needed: paths are slow
        path, leaf = next(
            (path, leaf)
            for path, leaf in jax.tree.leaves_with_path(model)
            if not _is_array(leaf) and not _is_hashable(leaf)
        )
        raise ValueError(
            f"{type(model).__name__}{jax.tree_util.keystr(path)} is neither an array of numbers "
            f"nor hashable, but {type(leaf).__name__}: {leaf}"
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
    """A model without its numbers: hashable, the key of caches of traces.

    Attributes:
        structure: the pytree structure of the model with static leaves.
        kinds: shape and type of each array.
        wide: whether x64 is enabled at present, since it changes the types of results.
    """

    structure: Any
    kinds: tuple[tuple[tuple[int, ...], Any], ...]
    wide: bool

    def model(self) -> Any:
        """Return the model with abstract arrays, to be traced."""
        return jax.tree.unflatten(
            self.structure, [jax.ShapeDtypeStruct(*kind) for kind in self.kinds]
        )


def architecture(model: Any) -> Architecture:
    """Return the architecture of a model; takes milliseconds."""
    leaves, structure = jax.tree.flatten(static_leaves(model))
    return Architecture(
        structure,
        tuple((leaf.shape, leaf.dtype) for leaf in leaves),
        # asked by effect: the flag may be set by a context manager for this thread alone
        jax.dtypes.canonicalize_dtype(float).itemsize == 8,
    )


class Inspected(NamedTuple):
    """The facts about a network that one trace gives, for images of one shape.

    Attributes:
        logits: shape and type of the logits [K].
        features: those of the features, which need not be an array [h, w, C]; None without features
            and head.
        relus: the number of ReLUs that `act` does not replace.
    """

    logits: jax.ShapeDtypeStruct
    features: Any
    relus: int


def num_classes(model: Classifier, shape: tuple[int, ...]) -> int:
    """Return K, the number of classes of a network for images [H, W, 3]; see `inspected`."""
    return inspected(model, shape).logits.shape[0]


def inspected(model: Classifier, shape: tuple[int, ...]) -> Inspected:
    """Return the facts about a network for images [H, W, 3], traced, not computed.

    Traces are cached by architecture and shape.

    Raises:
        ValueError: if the model is not a classifier (`adv2_jax.types.Classifier`), is set to
            training, or cannot take such images.
    """
    # JAX takes an object that it does not know for a leaf
    unregistered = any(leaf is model for leaf in jax.tree.leaves(model))
    if unregistered and len(lacks(model, "features", "logits")) < 2:
        raise ValueError(
            f"{type(model).__name__} is not a pytree: {PROTOCOL}; "
            "a Linen module needs its weights beside it"
        )
    return _inspected(architecture(model), tuple(shape), type(model).__name__)


def check_features(model: HasFeatures, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Return shape and type of the features [h, w, C] of a network with features and head.

    Raises:
        ValueError: if the features are no such array.
    """
    features = inspected(model, shape).features
    _check_shape(f"{type(model).__name__}.features", features, 3, "[h, w, C]")
    return cast(jax.ShapeDtypeStruct, features)


def check_activation(model: Classifier, shape: tuple[int, ...]) -> None:
    """Refuse a network with ReLUs that `act` does not replace.

    The map of such a network has no second derivative, so an attack has no gradient.

    Raises:
        ValueError: says how many there are, and what to write.
    """
    if count := inspected(model, shape).relus:
        raise ValueError(
            f"{type(model).__name__} does not pass act on: {count} ReLUs stay where act is another "
            "function, and the curvature of maps with them; take act as an argument and call it in place of every ReLU"
        )


@lru_cache(maxsize=64)  # a run asks some dozen times a batch
def _inspected(known: Architecture, shape: tuple[int, ...], name: str) -> Inspected:
    model = known.model()
    lacking = lacks(model, "features", "head")
    method = "logits" if lacking else "features"
    if lacks(model, method):
        absent = "no methods logits, or features and head"
        if len(lacking) == 1:
            (other,) = {"features", "head"} - set(lacking)
            absent = f"{other} but no method {lacking[0]}"
        raise ValueError(f"{name} has {absent}: {PROTOCOL}")
    # before the trace: BatchNorm in training would fail there with a message about vmap or mutation
    training = next(_in_training(model.whole() if isinstance(model, StaticLeaves) else model), None)
    if training is not None:
        raise ValueError(training)
    # with an activation that is no ReLU, any ReLU in the program does not come from `act`
    options = {"act": jnp.tanh} if takes(getattr(model, method), "act") else {}
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    traced, program = _traced(
        lambda model, x: getattr(model, method)(x, **options),
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


def takes(method: Callable[..., Any] | None, option: str) -> bool:
    """Return whether a method takes an option by name; True if its signature is not known."""
    if method is None:
        return False
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(
        parameter.name == option or parameter.kind is parameter.VAR_KEYWORD
        for parameter in parameters
    )


def count_relus(program: Any, shape: tuple[int, ...]) -> int:
    """Return the number of ReLUs, max(z, 0), in a traced program.

    Not counted are those of the image itself [..., H, W, 3], those followed by a min, which clip to
    a range, and those of a difference: a variance E x² - (E x)² is kept from being negative so.

    Args:
        program: a jaxpr.
        shape: of the image, [H, W, 3].
    """
    equations = getattr(program, "jaxpr", program).eqns
    # jaxprs do not link a value to its equation
    made_by = {out: equation.primitive.name for equation in equations for out in equation.outvars}
    clipped = {
        v
        for equation in equations
        if equation.primitive.name == "min"
        for v in equation.invars
        if not is_literal(v)
    }
    count = 0
    for equation in equations:
        # jit, custom_jvp, scan and the like hold programs of their own
        count += sum(count_relus(inner, shape) for inner in subprograms(equation.params))
        if equation.primitive.name == "max" and equation.outvars[0] not in clipped:
            values = [v for v in equation.invars if not is_literal(v)]
            zeros = [v for v in equation.invars if is_literal(v) and float(v.val) == 0]
            count += (
                len(values) == 1 == len(zeros)
                and values[0].aval.shape[1:] != shape
                and made_by.get(values[0]) != "sub"
            )
    return count


class _InTraining(ValueError):
    """A network is set to training."""


def _in_training(model: Any) -> Iterator[str]:
    """Yield a message for each NNX module, wrapped or not, that is set to training."""
    for network in jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, nnx.Module)):
        for path, module in nnx.iter_graph(network) if isinstance(network, nnx.Module) else ():
            for option, effect in TRAINING.items():
                if getattr(module, option, None) is False:
                    yield (
                        f"{_set_to_training(type(network).__name__, path, module)} {effect}; "
                        "call its eval() first"
                    )


def _refuse_training(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Intercept the methods of Linen: the mode of a module is known only while it is called."""
    module = context.module
    # dropout of rate 0 is the same in both modes
    random = isinstance(module, linen.Dropout) and module.rate > 0
    if context.method_name == "__call__" and (random or isinstance(module, linen.BatchNorm)):
        for option, effect in TRAINING.items():
            if kwargs.get(option, getattr(module, option, None)) is False:
                message = _set_to_training("the network", module.path, module)
                raise _InTraining(f"{message} {effect}; give it {option}=True")
    return call(*args, **kwargs)


def _set_to_training(network: str, path: Iterable[Any], module: Any) -> str:
    name = ".".join(map(str, path)) or "it"
    return f"{network} is set to training: {name} ({type(module).__name__})"


def _traced(
    f: Callable[[Any, Any], Any], model: Any, argument: Any, failure: str
) -> tuple[Any, Any]:
    """Return the shapes of f(model, argument), and its program.

    Traced under `vmap`, as it will run: there JAX refuses a network that writes to itself.
    """
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), argument)
    try:
        with linen.intercept_methods(_refuse_training):
            program, value = jax.make_jaxpr(
                lambda m, xs: jax.vmap(partial(f, m))(xs), return_shape=True
            )(model, batch)
    # already says what to do, and Ctrl-C is no fault of the network
    except (_InTraining, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever the user's code raises
        raise ValueError(f"{failure}: {type(error).__name__}: {first_line(error)}") from error
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), value)
    return shapes, program


def _check_logits(what: str, logits: Any) -> jax.ShapeDtypeStruct:
    _check_shape(what, logits, 1, "logits [K]")
    if logits.shape[0] < 2:
        raise ValueError(
            f"{what} gives {logits.shape[0]} logits, a classifier has at least 2: "
            "for one logit z of two classes return jnp.stack([0, z]) of it, which has the same probabilities"
        )
    return cast(jax.ShapeDtypeStruct, logits)


def _check_shape(what: str, value: Any, rank: int, expected: str) -> None:
    if not isinstance(value, jax.ShapeDtypeStruct):
        raise ValueError(f"{what} must give one array {expected}, got {type(value).__name__}")
    if len(value.shape) != rank or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"{what} must give floating-point {expected}, got {value.dtype} {list(value.shape)}"
        )
