"""Curvature of a score at the images of a run or of a source, image by image, into two files.

`curvature.json` has means with intervals, `curvature.npz` the numbers of each image.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from numpy.typing import NDArray

from adv2_jax import losses
from adv2_jax.activations import TAU, relu_boxed, relu_curved, relu_h, relu_sigmoid
from adv2_jax.attacks import batches, check_interpreter, finite, image_keys, to_unit
from adv2_jax.capabilities import check_activation, num_classes, pre_activations, static_leaves
from adv2_jax.curvature import (
    WIDTH,
    Activations,
    Eigenpairs,
    Matched,
    eigenpairs,
    fidelity,
    gradient,
    hessian,
    map_jacobian,
    moments,
    network_term,
    singular_values,
    softmax_spectrum,
    softmax_term,
    spectral_density,
)
from adv2_jax.data import ImageSet, targets
from adv2_jax.data.lazy import Images
from adv2_jax.descent import OnStep, by_host
from adv2_jax.files import intact, restored, write_summary
from adv2_jax.identity import environment, tree_fingerprint
from adv2_jax.interpreters import Context, Interpreter
from adv2_jax.presets import look_up
from adv2_jax.runs.run import Progress, identity
from adv2_jax.runs.schema import (
    ATTACKS,
    CURVATURE,
    Compared,
    Examined,
    Row,
    rank_correlation,
    results_path,
    row,
)
from adv2_jax.runs.select import select
from adv2_jax.runs.store import CURVATURE_FILES, SETTINGS, Parts
from adv2_jax.runs.transfer import Run
from adv2_jax.threats import PIXEL
from adv2_jax.types import Classifier, Image, Label, Score

SUMMARY, ARRAYS = CURVATURE_FILES
FOLDER = "curvature"  # of finished parts
UNFINISHED = f"{FOLDER}/{SETTINGS}"

SCORES: dict[str, Score] = losses.SCORES | {"cross_entropy": losses.cross_entropy}
CLASSES = ("true", "target")  # whose score is studied
LARGEST = 10  # eigenvalues of the exact Hessian that are kept
# classes up to which K gradients and a K x K matrix are cheaper than products
DENSE = 100
PROBES_PER_DENSITY = 8  # a density is averaged over fewer probes than the moments

# of a secant, in pixel values (1/255): `default` walks from .35 down to 1/40
STEPS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
WIDTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # τ of `relu_curved`
SURROGATES: dict[str, Activations | Matched] = {
    "exact": None,
    f"relu_h {TAU:g}": Partial(relu_h, tau=TAU),
    "relu_sigmoid": relu_sigmoid(1.0),
    **{f"relu_curved {tau:g}": Partial(relu_curved, tau=tau) for tau in WIDTHS},
    # a layer moves by twice its mean: found best among factors
    "matched layer": Matched(0.0, 2.0),
    "matched neuron": Matched(),
    "matched neuron box": Matched(kernel=relu_boxed),
}


class Options(NamedTuple):
    """Options of a measurement.

    Attributes:
        interpreter: whose map's Jacobian is measured.
        score: (logits, label) -> [].
        tau: squared width of the surrogate, `relu_curved`.
        depth: products of an eigenvalue.
        probes: random vectors of trace and Frobenius norm; an eighth of them, of the density.
    """

    interpreter: Interpreter
    score: Score = losses.log_odds
    tau: float = WIDTH
    depth: int = 32
    probes: int = 32


class Sample(NamedTuple):
    """N images whose curvature is measured.

    Attributes:
        name: in the results: benign, pgd or adv2.
        images: uint8 [N, H, W, 3].
        classes: [N], whose score is studied.
        benign: uint8 [N, H, W, 3], before the attack; None for benign images.
        map_l1: [N], how far the attack's map is from its target map; None for benign images.
    """

    name: str
    images: Images
    classes: np.ndarray
    benign: np.ndarray | None = None
    map_l1: np.ndarray | None = None


class Study(NamedTuple):
    """The samples of one set of images, of N images each; the first one is benign.

    Attributes:
        samples: benign images, and those that attacks made of them.
        indices: [N], positions in the source.
        names: [N] of files, or None.
        left_out: number of images left out because the network gets them wrong.
    """

    samples: Sequence[Sample]
    indices: np.ndarray
    names: np.ndarray | None = None
    left_out: int = 0


def of_run(
    run: Run, interpreter: str, *, label: str | None = None, limit: int | None = None
) -> Study:
    """Return the images of a finished run: benign, and those of both attacks on an interpreter.

    Args:
        run: the run.
        interpreter: a name of its interpreters.
        label: of `CLASSES`; None studies benign images for their label, others for their target.
        limit: at most so many images, the first ones.
    """
    results = run.results
    with intact(results_path(run.directory)):
        some = slice(limit)
        classes = {"true": results.labels[some], "target": results.targets[some]}
        benign = results.images[some]
        samples = [Sample("benign", benign, classes[label or "true"])]
        for attack in ATTACKS:
            made = results.attacked(interpreter, attack)
            classes["target"] = results.classes(interpreter, attack)[some]
            attacked = made.images[some], classes[label or "target"], benign, made.map_l1[some]
            samples.append(Sample(attack, *attacked))
        names = results.names
        return Study(samples, results.indices[some], names if names is None else names[some])


def of_source(
    model: Classifier,
    image_set: ImageSet,
    *,
    label: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Study:
    """Return the images of a set that the network gets right.

    Args:
        model: the classifier.
        image_set: the images.
        label: of `CLASSES`; None is "true". Target classes are the set's own, or drawn.
        limit: at most so many images, after leaving out.
        batch_size: images at a time, when they are selected.
        seed: of target classes.
    """
    selection = select(model, image_set, limit=limit, batch_size=batch_size)
    chosen, indices = selection.images, selection.indices
    classes = chosen.labels if label != "target" else chosen.targets
    if classes is None:
        assert chosen.labels is not None
        classes = targets.random_targets(
            chosen.labels, selection.num_classes, seed=seed, indices=indices
        )
    sample = Sample("benign", chosen.images, classes)
    return Study([sample], indices, chosen.names, selection.left_out)


def examine(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    change: Array | None = None,
    key: Array,
    options: Options,
) -> dict[str, Array]:
    """Measure the curvature of a score at one image.

    Costs about (depth + 2 probes + depth probes / 8) Hessian-vector products, K gradients or
    `depth` products of the softmax term, and `depth` products of the map's Jacobian, both ways.

    Args:
        model: a classifier whose ReLUs `act` replaces.
        image: [H, W, 3] in [0, 1].
        label: [] the class.
        change: [H, W, 3] x' - x of an attacked image x'.
        key: of all random vectors.
        options: static.

    Returns:
        arrays by the names of `schema.Examined`, without the axis of images.
    """
    score, tau, depth, probes = options[1:]
    act = Partial(relu_curved, tau=tau)
    # no two estimates share their random vectors
    keys = list(jax.random.split(key, 6))
    slope = gradient(model, image, label, score=score)
    exact = _exact(model, image, label, score=score, depth=depth, key=keys[0])
    # where the exact Hessian is zero, its eigenvectors are any
    exact_vector = jnp.where(exact.values[0] == 0, 0, exact.vectors[0])
    surrogate = hessian(model, image, label, act=act, score=score)
    top = eigenpairs(surrogate, image, 1, depth=depth, key=keys[1])
    sums = moments(surrogate, image, probes=probes, key=keys[2])
    density = spectral_density(
        network_term(model, image, label, act=act, score=score),
        image,
        depth=depth,
        probes=max(probes // PROBES_PER_DENSITY, 1),
        key=keys[3],
    )
    jacobian = map_jacobian(options.interpreter, model, image, label, Context(tau, keys[4]))
    moved = singular_values(jacobian, image, 1, depth=depth, key=keys[5])
    # an indefinite Hessian: what counts as curvature is the size of the value, whatever its sign
    surrogate_top, norm = jnp.abs(top.values[0]), jnp.linalg.norm(slope)
    cosines = {"gradient": slope} | ({} if change is None else {"change": change})
    return dict(
        softmax_values=exact.values,
        softmax_vector=exact_vector,
        softmax_residual=exact.residuals[0],
        softmax_top=jnp.abs(exact.values[0]),
        surrogate_value=top.values[0],
        surrogate_vector=top.vectors[0],
        surrogate_residual=top.residuals[0],
        surrogate_top=surrogate_top,
        **{name: value for name, (value, _) in sums._asdict().items()},
        **{f"{name}_error": error for name, (_, error) in sums._asdict().items()},
        gradient_norm=norm,
        normalised=surrogate_top / norm,
        map_jacobian=moved.values[0],
        map_residual=moved.residuals[0],
        density_nodes=density.nodes,
        density_weights=density.weights,
        **{
            f"{kind}_cosine_{name}": _cosine(vector, direction)
            for kind, vector in (("softmax", exact_vector), ("surrogate", top.vectors[0]))
            for name, direction in cosines.items()
        },
    )


def _exact(
    model: Classifier, image: Image, label: Label, *, score: Score, depth: int, key: Array
) -> Eigenpairs:
    """Return the largest eigenpairs of the exact Hessian: without iteration for few classes."""
    classes = num_classes(model, image.shape)
    if classes <= DENSE:
        return softmax_spectrum(model, image, label, score=score, k=min(LARGEST, classes))
    operator = softmax_term(model, image, label, score=score)
    return eigenpairs(operator, image, min(LARGEST, depth), depth=depth, key=key)


@jax.jit
def _cosine(a: Array, b: Array) -> Array:
    """Return |a·b| / ‖a‖‖b‖, 0 where one of them is zero."""
    # eigenvectors have no sign: of the cosine only the size means anything
    size = jnp.linalg.norm(a) * jnp.linalg.norm(b)
    return jnp.abs(jnp.vdot(a, b)) / jnp.where(size > 0, size, 1)


@partial(jax.jit, static_argnames="options")
def _examine_together(
    model: Classifier, images: Any, labels: Any, changes: Any, keys: Array, *, options: Options
) -> dict[str, Array]:
    def one(image: Image, label: Label, change: Any, key: Array) -> dict[str, Array]:
        return examine(model, image, label, change=change, key=key, options=options)

    return jax.vmap(one)(images, labels, changes, keys)


def examine_batch(
    model: Classifier, sample: Sample, keys: np.ndarray, options: Options
) -> dict[str, NDArray[Any]]:
    """Return the arrays of `schema.Examined` of some images; see `examine`.

    Args:
        model: the classifier, with static leaves.
        sample: the images.
        keys: `attacks.image_keys`.
        options: static.
    """
    images = jnp.asarray(to_unit(np.asarray(sample.images), np.float32))
    labels = jnp.asarray(sample.classes, jnp.int32)
    # `Sample` in NumPy, 8 bits: only one batch is on the device in float32
    benign = sample.benign
    changes = None if benign is None else images - to_unit(benign, np.float32)
    inputs = images, labels, changes, jax.random.wrap_key_data(jnp.asarray(keys))
    if by_host("auto", inputs):
        # programs without loops are shared by all images; loops of convolutions compile to slow
        # code on CPU (jax issue 12868)
        each = [
            examine(model, image, label, change=change, key=key, options=options)
            for image, label, change, key in (
                jax.tree.map(lambda values, i=i: values[i], inputs) for i in range(len(images))
            )
        ]
        measured = {name: np.stack([one[name] for one in each]) for name in each[0]}
    else:
        measured = jax.device_get(_examine_together(model, *inputs, options=options))
    failed = ~finite(measured)
    arrays = {
        # all of its numbers, or the means of two columns would be over different images
        name: np.where(failed.reshape(-1, *[1] * (values.ndim - 1)), np.float32("nan"), values)
        for name, values in measured.items()
    }
    known = {"images": sample.images, "classes": sample.classes, "map_l1": sample.map_l1}
    return Examined.named(failed=failed, **known, **arrays)


def study(
    model: Classifier,
    images: Study,
    options: Options,
    directory: Path,
    *,
    compared: int = 8,
    batch_size: int = 32,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: Progress = lambda images, steps, done: lambda new: None,
    publish: Callable[[Path], object] = lambda directory: None,
) -> dict[str, Any]:
    """Measure the curvature at some images, and how true surrogates are, into a directory.

    Finished images stay in the directory until all are; nothing else in it changes before.

    Args:
        model: the classifier.
        images: the samples.
        options: of the measurement.
        directory: an existing one, for `curvature.json` and `curvature.npz`.
        compared: number of benign images, the first ones, at which surrogates are compared.
        batch_size: images at a time on accelerators; on CPU they are measured one by one.
        seed: of random vectors and of the bootstrap.
        config, resume, progress: as for `run`; a step is an image.
        publish: called with the directory when its files are there; if it fails, they are put back
            as they were.

    Returns:
        The content of `curvature.json`.

    Raises:
        ValueError: one line: what is wrong, the value, and what is allowed.
        KeyboardInterrupt: says what is finished, and how to resume.
    """
    samples, n = images.samples, len(images.indices)
    check(model, samples[0].images.shape[1:], options)
    pictures = [(one.images, one.classes, one.map_l1) for one in samples]
    # of the very pixels that are measured, not of their source: a finished run may have been
    # replaced meanwhile
    prints = {"network": tree_fingerprint(model), "images": tree_fingerprint(pictures)}
    model = static_leaves(model)
    parts = [(one.name, i) for one in samples for i in range(n)]
    parts += [("fidelity", i) for i in range(min(compared, n))]
    asked = identity(config or {}, prints)
    store = Parts(directory, asked, parts, folder=FOLDER, results=ARRAYS)
    # what an interrupted run left may be damaged
    reading = partial(intact, directory) if resume else nullcontext
    with store.kept():
        store.begin(resume=resume)
        on_step = progress(n * len(samples), len(parts), sum(map(store.has, parts)))
        keys = image_keys(seed, images.indices)
        for sample in samples:
            _examine_sample(model, sample, keys, options, batch_size, store, on_step)
        for part in filter(lambda part: part[0] == "fidelity" and not store.has(part), parts):
            store.save(part, _compare(model, samples[0], part[1], keys, options))
            on_step(1)
        with reading():
            summary, failed = _summarise(store, samples, seed)
        positions = images.indices if images.names is None else images.names
        summary = {
            "config": dict(config or {}),
            "environment": environment(),
            "counts": {"images": n, "left_out": images.left_out, "failed": int(failed.sum())},
            "failed": positions[failed].tolist(),
            "fingerprints": prints,
        } | summary
        # summary and arrays belong together: both are new, or both stay as they were
        with restored(directory / SUMMARY, directory / ARRAYS):
            named = {} if images.names is None else {"names": images.names}
            store.write_results({"indices": images.indices} | named)
            write_summary(directory, summary, SUMMARY)
            with reading():
                publish(directory)
    store.remove()
    return summary


def check(model: Classifier, shape: tuple[int, ...], options: Options) -> None:
    """Refuse what cannot be measured on images [H, W, 3].

    Raises:
        ValueError: the network does not pass `act` on or has no ReLU, or the interpreter takes
            steps or does not fit the network; one line.
    """
    check_activation(model, shape)
    # of a smooth network the softmax term would not be the exact Hessian
    jax.eval_shape(pre_activations, static_leaves(model), jax.ShapeDtypeStruct(shape, jnp.float32))
    check_interpreter(model, shape, options.interpreter, attacked=True)
    if options.interpreter.solver is not None:
        raise ValueError(
            f"the map of {options.interpreter.name} is made in steps, and has no Jacobian "
            "without them: name an interpreter that takes none, such as grad"
        )
    for name, least in (("depth", 1), ("probes", 2)):
        if (value := getattr(options, name)) < least:
            raise ValueError(f"{name} = {value} must be {least} or more")
    if not 0 < options.tau < np.inf:
        raise ValueError(f"tau = {options.tau} must be a finite number above 0")


def _examine_sample(
    model: Classifier,
    sample: Sample,
    keys: np.ndarray,
    options: Options,
    batch_size: int,
    store: Parts,
    on_step: OnStep,
) -> None:
    """Measure the images of a sample that are not finished yet, a batch after the other."""
    size = 1 if by_host("auto", ()) else batch_size
    for places in batches(np.arange(len(keys)), size):
        # `batches` repeats the last image to fill a batch; without `unique` it would be saved twice
        lacking = [i for i in np.unique(places) if not store.has((sample.name, i))]
        if not lacking:
            continue
        some = Sample(sample.name, *jax.tree.map(itemgetter(places), sample[1:]))
        arrays = examine_batch(model, some, keys[places], options)
        for i in lacking:
            # a slice, not an index: parts have an axis of images, along which they are put together
            place = slice(i - places[0], i - places[0] + 1)
            store.save((sample.name, i), {name: one[place] for name, one in arrays.items()})
            on_step(1)


def _compare(
    model: Classifier, sample: Sample, i: int, keys: np.ndarray, options: Options
) -> dict[str, NDArray[Any]]:
    """Return the arrays of `schema.Compared` of an image; driven by the host on any device."""
    # one program of all surrogates and steps would take minutes to compile
    compared = fidelity(
        model,
        jnp.asarray(to_unit(sample.images[i], np.float32)),
        jnp.asarray(sample.classes[i], jnp.int32),
        surrogates=list(SURROGATES.values()),
        steps=[step * PIXEL for step in STEPS],
        key=jax.random.wrap_key_data(jnp.asarray(keys[i])),
        score=options.score,
    )
    return Compared.named(**{name: np.asarray(one) for name, one in compared._asdict().items()})


def _summarise(
    store: Parts, samples: Sequence[Sample], seed: int
) -> tuple[dict[str, Any], NDArray[np.bool_]]:
    """Return rows, fidelity and correlation, and which images [N] failed in some sample."""
    keys = {"failed", *(one.key for one in CURVATURE)}
    measured = {one.name: store.read([one.name], keys.__contains__) for one in samples}
    compared = store.read(["fidelity"], lambda name: True)
    summary = {
        "rows": [
            {"images": name, **row(numbers, seed=seed, totals=CURVATURE)}
            for name, numbers in measured.items()
        ],
        "fidelity": {
            "n": len(compared["cosine"]),
            "steps": list(STEPS),
            "surrogates": list(SURROGATES),
            "widths": [_width(one) for one in SURROGATES.values()],
            **{name: _medians(values) for name, values in compared.items()},
        },
    }
    correlation: list[Row] = [
        {
            "measure": key,
            "attack": one.name,
            **rank_correlation(measured["benign"][key], one.map_l1, seed=seed),
        }
        for key in ("normalised", "map_jacobian")
        for one in samples
        if one.map_l1 is not None
    ]
    if correlation:
        summary["correlation"] = correlation
    return summary, np.any([numbers["failed"] for numbers in measured.values()], axis=0)


def _width(surrogate: Activations | Matched) -> float | None:
    """Return τ of a `relu_curved`; others have none that a schedule could change."""
    if isinstance(surrogate, Partial) and surrogate.func is relu_curved:
        return float(surrogate.keywords["tau"])
    return None


def _medians(values: NDArray[Any]) -> list[list[float | None]]:
    """Return medians over images [F, S, T], None where no image has a finite number."""

    def median(numbers: NDArray[Any]) -> float | None:
        # a failed image counts in no median
        numbers = numbers[np.isfinite(numbers)]
        return float(np.median(numbers)) if len(numbers) else None

    return [[median(numbers) for numbers in steps] for steps in np.moveaxis(values, 0, -1)]


def interpreter_of_run(run: Run, name: str | None) -> str:
    """Return the name of an interpreter of a run: grad unless given, or its first.

    Raises:
        ValueError: the run has no interpreter of this name; lists those that it has.
    """
    usual = "grad" if "grad" in run.interpreters else next(iter(run.interpreters))
    look_up(run.interpreters, f"interpreter of {run.directory}", name or usual)
    return name or usual
