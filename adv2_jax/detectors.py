"""Detectors of adversarial images: pure functions of (model, image), fitted on benign images.

    features        (model, image) -> [F], large where an image is suspicious
    score           their largest, their mean, or the sum that a logistic head weighs
    threshold       5 % of held-out benign images have a score above it

A kind of detector is a `Features`; what was fitted are the arrays of a `Detector`. Values are those
that the defender computes. Derivatives are the adversary's: where a feature has none, or one that
vanishes, it has that of a smooth feature beside it (Athalye et al. 2018). `Guarded` is a classifier
with its detector: an attack on it evades the detector too.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.scipy.stats import rankdata

from adv2_jax.capabilities import StaticLeaves, logits_of, pre_activations
from adv2_jax.errors import first_line
from adv2_jax.files import intact, read_arrays, write_arrays
from adv2_jax.identity import tree_fingerprint
from adv2_jax.interpreters import INTERPRETERS, Context
from adv2_jax.options import Bound, bind, shared, shown
from adv2_jax.types import Classifier, Image, Logits, Map

Arrays = tuple[Array, ...]
FALSE_POSITIVES = 0.05  # share of held-out benign images above the threshold
LEAST_BENIGN = round(1 / FALSE_POSITIVES)  # of fewer, no share is that small
# standard deviations of benign scores that an attack stays below the threshold: results are computed
# in other batches, and at another precision, than attack steps
SPARE = 0.05
TAU = 0.01  # squared width of the curvature that gradient maps get, midway in the course of attacks
TOP = 0.1  # share of the entries of a map that count as its top
TINY = 1e-12
# of a feature, all of which are of order 1: one that is constant on benign images would drown others
LEAST_SCALE = 0.01
FITTED = ("centre", "scale", "weights", "threshold", "spread")  # arrays of a detector's file


class Features(NamedTuple):
    """One kind of detector with its options.

    Attributes:
        name: key of `DETECTORS`.
        compute: (model, image, reference) -> [F], large where an image is suspicious.
        largest: whether the largest feature is the score of the threshold head; else the mean of
            all, each in units of its standard deviation over benign images.
        look: (model, image) -> arrays, what is remembered of a benign image; None remembers nothing.
        gather: (arrays of M images, their classes [M], K) -> reference, a tuple of arrays.
        interpreters: names of those whose maps it looks at.
        made: the factory bound to its options, by which a file holds it.
    """

    name: str
    compute: Callable[[Any, Image, Arrays], Array]
    largest: bool = False
    look: Callable[[Any, Image], Arrays] | None = None
    gather: Callable[[Arrays, Any, int], Arrays] | None = None
    interpreters: tuple[str, ...] = ()
    made: Bound | None = None

    def __repr__(self) -> str:
        return shown(self.made)


@shared
def squeezing(bits: tuple[int, ...] = (5,), medians: tuple[int, ...] = (2,)) -> Features:
    """Return feature squeezing (Xu et al. 2018): the L1 distance to the softmax of squeezed images.

    Its derivative is that of their cross-entropy, which does not vanish where both are confident.

    Args:
        bits: depths of colour, 1 to 7 each; with `medians`, the pair that Xu et al. find best.
        medians: sides of median filters, 2 or more.

    Raises:
        ValueError: if an option is out of its range, or there is no squeezer.
    """
    if not (bits or medians) or not all(0 < b < 8 for b in bits) or min(medians, default=2) < 2:
        raise ValueError(f"bits = {bits} must be 1 to 7, medians = {medians} 2 or more")
    compute = bind(_squeezed, bits=bits, medians=medians)
    made = bind(squeezing, bits=bits, medians=medians)
    return Features("squeezing", compute, largest=True, made=made)


def _squeezed(
    model: Classifier, image: Image, _: Arrays, *, bits: Sequence[int], medians: Sequence[int]
) -> Array:
    squeezed = [reduce_depth(image, b) for b in bits] + [median(image, side) for side in medians]
    logits = jax.vmap(partial(logits_of, model))(jnp.stack([image, *squeezed]))
    f = jax.nn.softmax(logits)
    entropy = optax.softmax_cross_entropy(logits[1:], jax.lax.stop_gradient(f[0]))
    return _value(jnp.abs(f[0] - f[1:]).sum(-1), entropy)


def _value(value: Any, smooth: Any) -> Array:
    """Return a value with the derivative of another."""
    return smooth + jax.lax.stop_gradient(value - smooth)


def reduce_depth(image: Image, bits: int) -> Image:
    """Return an image of 2^bits levels a colour; its derivative is that of the image."""
    levels = 2**bits - 1
    return _value(jnp.round(image * levels) / levels, image)


def median(image: Image, side: int) -> Image:
    """Return the median over side x side pixels, of an even number the upper one: [H, W, 3].

    The window of an even side reaches further up and left; the border is mirrored.
    """
    before = side // 2
    edge = (before, side - 1 - before)
    padded = jnp.pad(image, (edge, edge, (0, 0)), mode="symmetric")
    h, w, _ = image.shape
    values = [padded[i : i + h, j : j + w] for i in range(side) for j in range(side)]
    # a network of exchanges (odd-even transposition): the gradient of `sort` scatters, which takes
    # XLA:CPU longer than the network does
    for turn in range(len(values)):
        for i in range(turn % 2, len(values) - 1, 2):
            values[i : i + 2] = jnp.minimum(*values[i : i + 2]), jnp.maximum(*values[i : i + 2])
    return values[len(values) // 2]


@shared
def lid(k: int = 10) -> Features:
    """Return the local intrinsic dimension of what enters each ReLU (Ma et al. 2018), [layers].

    Activations are averaged over positions (as by Lee et al. 2018). The reference are those of
    benign images.

    Args:
        k: number of neighbours, 2 or more.

    Raises:
        ValueError: if k is below 2.
    """
    if k < 2:
        raise ValueError(f"k = {k} must be 2 or more")
    return Features(
        "lid", bind(_lids, k=k), look=_activations, gather=_as_they_are, made=bind(lid, k=k)
    )


def _activations(model: Classifier, image: Image) -> Arrays:
    entering = pre_activations(model, image)
    return tuple(z.reshape(-1, z.shape[-1]).mean(0) for z in entering)


def _as_they_are(seen: Arrays, classes: Any, count: int) -> Arrays:
    return seen


def _lids(model: Classifier, image: Image, reference: Arrays, *, k: int) -> Array:
    points = _activations(model, image)
    return jnp.stack([dimension(*pair, k) for pair in zip(points, reference, strict=True)])


def dimension(point: Array, others: Array, k: int) -> Array:
    """Return the local intrinsic dimension of a point [D] among others [M, D], M >= k; [] > 0.

    The maximum-likelihood estimate -1 / mean log(r_i / r_k) from the k smallest distances r.
    """
    squares = ((others - point) ** 2).sum(-1)
    nearest = jnp.maximum(-jax.lax.top_k(-squares, k)[0], TINY)
    # squared distances: half their logarithm is that of the distance
    return 2 / jnp.maximum(-jnp.log(nearest / nearest[-1]).mean(), 1e-3)


@shared
def agreement(interpreters: tuple[str, ...] = ("grad", "cam")) -> Features:
    """Return how far interpreters disagree on the predicted class: three numbers a pair.

    1 - IoU of the largest tenths of both maps, 1 - cosine, and 1 - rank correlation, with maps at
    the coarsest of their sizes. The derivatives of the first and the last are those of 1 -
    Pearson's correlation.

    Args:
        interpreters: keys of `INTERPRETERS`, two or more.

    Raises:
        ValueError: for fewer, or one that is not known or a descent itself.
    """
    names = _known(interpreters)
    if len(names) < 2:
        raise ValueError(f"agreement needs two interpreters or more, got {', '.join(names)}")
    made = bind(agreement, interpreters=names)
    return Features("agreement", bind(_disagreements, names=names), interpreters=names, made=made)


@shared
def discrepancy(interpreters: tuple[str, ...] = ("grad", "cam")) -> Features:
    """Return how far maps of the predicted class are from those of benign images of the class.

    Two numbers for each interpreter: the mean distance from the class's mean map, in standard
    deviations of each pixel, and 1 - cosine with it. A class of fewer than two reference images has
    the statistics of all.

    Args:
        interpreters: keys of `INTERPRETERS`.

    Raises:
        ValueError: for one that is not known or a descent itself.
    """
    names = _known(interpreters)
    return Features(
        "discrepancy",
        bind(_discrepancies, names=names),
        look=bind(_maps_of_prediction, names=names),
        gather=_statistics,
        interpreters=names,
        made=bind(discrepancy, interpreters=names),
    )


def _known(names: Sequence[str]) -> tuple[str, ...]:
    able = [name for name, make in INTERPRETERS.items() if make().solver is None]
    for name in names:
        if name not in able:
            raise ValueError(f"detectors take the interpreters {', '.join(able)}, not {name!r}")
    return tuple(dict.fromkeys(names))


def _seen(model: Classifier, image: Image, names: Sequence[str]) -> tuple[Logits, list[Map]]:
    """Return logits, and maps for the predicted class with the derivatives of surrogates."""
    logits = logits_of(model, image)
    label, key = logits.argmax().astype(jnp.int32), jax.random.key(0)
    maps = []
    for name in names:
        one = INTERPRETERS[name]()
        memory = None if one.init is None else one.init(model, image)
        m = one.surrogate(model, image, label, Context(jnp.float32(TAU), key, memory=memory)).map
        maps.append(m if one.faithful else _value(one.explain(model, image, label), m))
    return logits, maps


def _maps_of_prediction(model: Classifier, image: Image, *, names: Sequence[str]) -> Arrays:
    return tuple(_seen(model, image, names)[1])


def _disagreements(
    model: Classifier, image: Image, reference: Arrays, *, names: Sequence[str]
) -> Array:
    maps = _seen(model, image, names)[1]
    coarsest = min((m.shape for m in maps), key=np.prod)
    vectors = [jax.image.resize(m, coarsest, "linear").reshape(-1) for m in maps]
    measures = (_overlap, _cosine, _rank_correlation)
    return jnp.stack([1 - of(a, b) for a, b in combinations(vectors, 2) for of in measures])


def _overlap(a: Array, b: Array) -> Array:
    """Return the IoU of the largest tenths of two maps [n]; none of a map's minimum is of them."""
    k = max(round(TOP * len(a)), 1)
    last = [jax.lax.top_k(m, k)[0][-1] for m in (a, b)]
    pair = zip((a, b), last, strict=True)
    tops = [jnp.where(edge > m.min(), m >= edge, m > edge) for m, edge in pair]
    union = (tops[0] | tops[1]).sum()
    overlap = jnp.where(union > 0, (tops[0] & tops[1]).sum() / jnp.maximum(union, 1), 1.0)
    return _value(overlap, _correlation(a, b))


def _cosine(a: Array, b: Array) -> Array:
    return (a * b).sum() / jnp.sqrt(jnp.maximum((a * a).sum() * (b * b).sum(), TINY))


def _correlation(a: Array, b: Array) -> Array:
    return _cosine(a - a.mean(), b - b.mean())


def _rank_correlation(a: Array, b: Array) -> Array:
    # as shares of n, so that their squares do not make float32 sums inexact
    ranks = [rankdata(jax.lax.stop_gradient(m)) / len(m) for m in (a, b)]
    return _value(_correlation(*ranks), _correlation(a, b))


def _discrepancies(
    model: Classifier, image: Image, reference: Arrays, *, names: Sequence[str]
) -> Array:
    logits, maps = _seen(model, image, names)
    c, features = logits.argmax(), []
    for m, mean, spread in zip(maps, reference[::2], reference[1::2], strict=True):
        features += [(jnp.abs(m - mean[c]) / spread[c]).mean(), 1 - _cosine(m, mean[c])]
    return jnp.stack(features)


def _statistics(seen: Arrays, classes: Any, count: int) -> Arrays:
    """Return mean and standard deviation of the maps of each class, [K, h, w] each, by turns."""
    reference = []
    groups = [np.flatnonzero(np.asarray(classes) == c) for c in range(count)]
    for maps in map(np.asarray, seen):
        of_class = [maps[group] if len(group) > 1 else maps for group in groups]
        # .05: a pixel that is 0 in all maps of a class would weigh infinitely
        spreads = [np.maximum(of.std(0), 0.05) for of in of_class]
        reference += [np.stack([of.mean(0) for of in of_class]), np.stack(spreads)]
    return tuple(jnp.asarray(values, jnp.float32) for values in reference)


DETECTORS: dict[str, Callable[..., Features]] = {
    "squeezing": squeezing,
    "lid": lid,
    "agreement": agreement,
    "discrepancy": discrepancy,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Detector:
    """A fitted detector.

    Attributes:
        kind: of its features.
        reference: what it remembers of benign images.
        centre, scale: [F], mean and standard deviation of the features of benign images.
        weights: [F] of the logistic head; None for the threshold head.
        threshold: [], of the score.
        spread: [], standard deviation of benign scores.
    """

    kind: Features = dataclasses.field(metadata={"static": True})
    reference: Arrays
    centre: Array
    scale: Array
    weights: Array | None
    threshold: Array
    spread: Array

    @property
    def members(self) -> tuple["Detector", ...]:
        """Itself alone: what an `Ensemble` of one has."""
        return (self,)

    def features(self, model: Classifier, image: Image) -> Array:
        """Return the features [F] of an image."""
        return self.kind.compute(model, image, self.reference)

    def scores(self, features: Array) -> Array:
        """Return the scores [S] of features [F], the largest of which counts."""
        standard = (features - self.centre) / self.scale
        if self.weights is not None:
            return (standard @ self.weights)[None]
        return features if self.kind.largest else standard.mean(keepdims=True)

    def score(self, model: Classifier, image: Image) -> Array:
        """Return the score [] of an image; above the threshold it is taken for adversarial."""
        return self.scores(self.features(model, image)).max()

    def excess(self, model: Classifier, image: Image) -> Array:
        """Return by how much each score [S] is above what an attack aims at, in `spread`s."""
        over = self.scores(self.features(model, image)) - self.threshold
        return over / self.spread + SPARE


def fit(
    kind: Features,
    reference: Arrays,
    benign: np.ndarray,
    attacked: np.ndarray | None = None,
    *,
    logistic: Callable[[np.ndarray, np.ndarray], Any] | None = None,
) -> Detector:
    """Return a detector that passes all but `FALSE_POSITIVES` of some benign images.

    Args:
        kind: of its features.
        reference: what they remember of other benign images.
        benign: features [N, F]. With a logistic head its first half teaches the head, and the
            second half sets the threshold.
        attacked: features [M, F] of adversarial images, for a logistic head; None leaves the
            threshold head.
        logistic: (features [n, F], whether attacked [n]) -> weights [F]; `logistic_weights` unless
            given. That of scikit-learn: `lambda x, y: LogisticRegression().fit(x, y).coef_[0]`.

    Raises:
        ValueError: for fewer images than it takes to fix the threshold, or features that are not
            finite.
    """
    taught, held = (benign, benign) if attacked is None else (benign[::2], benign[1::2])
    if len(held) < LEAST_BENIGN:
        raise ValueError(f"a threshold needs {LEAST_BENIGN} benign images, there are {len(held)}")
    if not all(np.isfinite(x).all() for x in (benign, attacked) if x is not None):
        raise ValueError("the detector's features of some images are not finite numbers")
    centre, scale = taught.mean(0), np.maximum(taught.std(0), LEAST_SCALE)
    weights = None
    if attacked is not None:
        both = (np.concatenate([taught, attacked]) - centre) / scale
        is_attacked = np.arange(len(both)) >= len(taught)
        weights = jnp.asarray((logistic or logistic_weights)(both, is_attacked), jnp.float32)
    centre, scale = (jnp.asarray(values, jnp.float32) for values in (centre, scale))
    one = jnp.ones((), jnp.float32)
    detector = Detector(kind, reference, centre, scale, weights, one, one)
    scores = np.sort([detector.scores(jnp.asarray(x, jnp.float32)).max() for x in held])
    # strictly above it: no more than the share that is allowed
    threshold = scores[-1 - int(FALSE_POSITIVES * len(scores))]
    spread = max(float(scores.std()), 1e-6)
    return dataclasses.replace(
        detector, threshold=jnp.float32(threshold), spread=jnp.float32(spread)
    )


def logistic_weights(features: np.ndarray, attacked: np.ndarray, *, steps: int = 100) -> Array:
    """Return the weights [F] of logistic regression: Σ log losses + ‖w‖²/2, both classes as heavy.

    By L-BFGS of optax, on [n, F] and [n] booleans.
    """
    x, y = jnp.asarray(features, jnp.float32), jnp.asarray(attacked, jnp.float32)
    heavy = len(y) / 2 * (y / y.sum() + (1 - y) / (1 - y).sum())

    def loss(params: tuple[Array, Array]) -> Array:
        weights, bias = params
        losses = optax.sigmoid_binary_cross_entropy(x @ weights + bias, y)
        return (heavy * losses).sum() + (weights**2).sum() / 2

    solver = optax.lbfgs()
    slope = optax.value_and_grad_from_state(loss)

    def step(_: Any, carry: Any) -> Any:
        params, state = carry
        value, gradient = slope(params, state=state)
        down, state = solver.update(
            gradient, state, params, value=value, grad=gradient, value_fn=loss
        )
        return optax.apply_updates(params, down), state

    start = jnp.zeros(x.shape[1], x.dtype), jnp.zeros((), x.dtype)
    return jax.lax.fori_loop(0, steps, step, (start, solver.init(start)))[0][0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Several detectors of one classifier: an image is suspicious if it is to one of them.

    Attributes:
        members: one or more.
    """

    members: tuple[Detector, ...]

    def excess(self, model: Classifier, image: Image) -> Array:
        """Return by how much the scores of all members are above what an attack aims at."""
        return jnp.concatenate([one.excess(model, image) for one in self.members])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guarded:
    """A classifier with a detector of its inputs: what is attacked must evade the detector too.

    Attributes:
        classifier: any `types.Classifier`; its methods are those of this object too.
        detector: fitted on it, or an `Ensemble` of such.
    """

    classifier: Classifier
    detector: Detector | Ensemble

    def __getattr__(self, name: str) -> Any:
        if name in ("logits", "features", "head", "masker"):
            return getattr(self.classifier, name)
        raise AttributeError(f"{type(self).__name__} has no {name}")


def parts_of(model: Any) -> tuple[Any, Detector | Ensemble | None]:
    """Return a classifier without its detector, and the detector; None where it has none."""
    whole = model.whole() if isinstance(model, StaticLeaves) else model
    return (whole.classifier, whole.detector) if isinstance(whole, Guarded) else (model, None)


class Record(NamedTuple):
    """How a detector was fitted.

    Attributes:
        network: fingerprint of the classifier.
        seen: int64 [M], hashes of the images that it was fitted on.
        attacks: kinds of attacks that a logistic head was fitted on; () for the threshold head.
    """

    network: str
    seen: np.ndarray
    attacks: tuple[str, ...] = ()


def save(path: str | os.PathLike[str], detector: Detector, record: Record) -> None:
    """Write a detector as `.npz`, without pickle."""
    made = detector.kind.made
    assert made is not None
    about = {
        "kind": detector.kind.name,
        "options": dict(made.options),
        "network": record.network,
        "attacks": record.attacks,
    }
    arrays = {f"reference/{i:03d}": values for i, values in enumerate(detector.reference)}
    fields = {name: getattr(detector, name) for name in FITTED}
    arrays |= {name: values for name, values in fields.items() if values is not None}
    plain = {name: np.asarray(values) for name, values in arrays.items()}
    write_arrays(path, {**plain, "seen": record.seen, "about": np.array(json.dumps(about))})


def load(path: str | os.PathLike[str]) -> tuple[Detector, Record]:
    """Read a detector.

    Raises:
        ValueError: one line: the file is missing, damaged, or holds no detector.
    """
    arrays = read_arrays(path)
    with intact(Path(path)):
        about: Mapping[str, Any] = json.loads(str(arrays["about"]))
        options = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in about["options"].items()
        }
        names = sorted(name for name in arrays if name.startswith("reference/"))
        held = {name: jnp.asarray(arrays[name]) for name in (*names, *FITTED) if name in arrays}
        if not all(np.isfinite(values).all() for values in held.values()):
            raise ValueError("a number in it is not finite")
        if held["threshold"].shape or held["spread"].shape or arrays["seen"].dtype != np.int64:
            raise ValueError("threshold and spread must be single numbers, seen int64")
        detector = Detector(
            DETECTORS[about["kind"]](**options),
            tuple(held[name] for name in names),
            **dict[str, Any](
                {name: held.get(name) if name == "weights" else held[name] for name in FITTED}
            ),
        )
        return detector, Record(about["network"], arrays["seen"], tuple(about["attacks"]))


def check(detector: Detector, record: Record, model: Classifier, shape: Sequence[int]) -> None:
    """Refuse a detector of another network, or one that does not fit images [H, W, 3].

    Raises:
        ValueError: one line that says why.
    """
    held = tree_fingerprint(model)
    if record.network != held:
        raise ValueError(f"the detector is of a network of {record.network}, this one holds {held}")
    image = jax.ShapeDtypeStruct(tuple(shape), np.float32)
    try:
        jax.eval_shape(detector.score, model, image)
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"the detector does not fit images of {list(shape)}: {first_line(error)}"
        ) from None
