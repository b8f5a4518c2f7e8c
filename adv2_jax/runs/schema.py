"""The schema of a run: measures, rows of their means with intervals, and arrays of results.npz.

Every key has its one owner here. To add a measure, add a row to `MEASURES`: summary, log, tables
and report read it there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray

from adv2_jax import metrics
from adv2_jax.attacks import finite
from adv2_jax.files import Headers, intact, read_arrays, read_summary, stored
from adv2_jax.threats import flow_penalty

Row = dict[str, Any]
Arrays = Mapping[str, NDArray[Any]]
Measures = Mapping[str, NDArray[Any]]  # by key, [N] numbers, one an image

RESAMPLES = 2000  # of a bootstrap
BLOCK = 2**20  # numbers held at a time: the resamples of all images at once would not fit memory

ATTACKS = ("pgd", "adv2")  # as in files
CONTROL = "noise"  # no attack: random changes under the same threat model, in a row of its own
JOINT = "joint"  # ADV² on all interpreters by one image
KINDS = (CONTROL, *ATTACKS, JOINT)  # of rows, in their order
# the two forms of results, and what a folder of shards has that no other has
RESULTS, SHARDS, INDEX = "results.npz", "results", "index.json"
FORMS = ("auto", "npz", "shards")
# which arrays a run keeps, by the last word of their names; None: all
KEPT = {
    "all": None,
    "adversarial": ("images", "confidence", "success", "classes", "map_l1", "map_iou75"),
}


def attack_name(attack: str, threat: str | None) -> str:
    """Return the name of an attack for readers; plain PGD on a flow is known as StAdv."""
    names = {"pgd": "StAdv" if threat == "flow" else "PGD", "adv2": "ADV²", JOINT: "ADV², joint"}
    return names.get(attack, attack)


def kind_of(row: Row) -> str:
    """Return which of `KINDS` a row is of."""
    return JOINT if row.get("joint") else str(row["attack"])


def row_name(row: Row) -> str:
    """Return the name of the attack of a row."""
    return attack_name(kind_of(row), row.get("threat"))


def detection_marks(row: Row) -> str:
    """Return what is to be known of a row under a detector: that it evaded it, or taught it."""
    adaptive = " (adaptive)" if row.get("adaptive") and row["attack"] in ATTACKS else ""
    return adaptive + (" (taught the head)" if row.get("fitted") else "")


class Evaluated(NamedTuple):
    """N images under an attack, the arguments of measures. What is not known is None.

    Attributes:
        benign: uint8 [N, H, W, 3], before the attack.
        targets: [N] target classes.
        objects: bool [N, H, W], where the labelled objects are.
        benign_maps, target_maps: [N, h, w] in [0, 1].
        images: uint8 [N, H, W, 3], adversarial.
        logits: [N, K] of them.
        maps: [N, h, w] of them.
        float_maps: [N, h, w] of the images before they were rounded to 8 bits.
        flows: [N, H, W, 2] displacements in pixels, under a threat model that has them.
    """

    benign: Any = None
    targets: Any = None
    objects: Any = None
    benign_maps: Any = None
    target_maps: Any = None
    images: Any = None
    logits: Any = None
    maps: Any = None
    float_maps: Any = None
    flows: Any = None


@dataclass(frozen=True)
class Column:
    """A number of a row and its display: heading, decimals, factor from the row to the page.

    Without decimals it is shown by three significant digits: its size depends on the network.
    """

    key: str
    heading: str
    decimals: int | None = field(default=3, kw_only=True)
    factor: float = field(default=1.0, kw_only=True)


@dataclass(frozen=True)
class Total(Column):
    """A column that sums up a number of each image.

    Attributes:
        total: numbers of the images that did not fail -> the number of the row.
        of_successes: whether only images on which the attack succeeds count.
        interval: whether the row holds its 95 % interval.
    """

    total: Callable[[NDArray[Any]], Any] = field(default=np.mean, kw_only=True)
    of_successes: bool = field(default=False, kw_only=True)
    interval: bool = field(default=True, kw_only=True)


@dataclass(frozen=True)
class Measure(Total):
    """A number for each image that is computed from what an attack made of it.

    Attributes:
        function: -> [N] numbers, or booleans for a proportion.
        of: its arguments, entries of `Evaluated`; where one is None, it is not measured.
        direction: "↑" if larger is better for the adversary, "↓" if smaller is.
        paired: whether attacks are compared image by image, and maps are in a transfer.
        page_only: whether it is left out of the table after a run, and of its log.
    """

    function: Callable[..., ArrayLike]
    of: tuple[str, ...]
    direction: str = field(default="", kw_only=True)
    paired: bool = field(default=False, kw_only=True)
    page_only: bool = field(default=False, kw_only=True)


OUTPUT, MAPS, IMAGES = ("logits", "targets"), ("maps", "target_maps"), ("images", "benign")
EXACT_MAPS = ("float_maps", "target_maps")
MEASURES = (
    Measure("asr", "ASR", metrics.success, OUTPUT, direction="↑"),
    Measure("mc", "MC", metrics.confidence, OUTPUT, direction="↑", of_successes=True),
    Measure("map_l1", "Map L1", metrics.map_l1, MAPS, decimals=4, direction="↓", paired=True),
    Measure("map_l2", "Map L2", metrics.map_l2, MAPS, decimals=4, direction="↓", page_only=True),
    Measure("map_iou75", "IoU@75", metrics.iou_quantile, MAPS, direction="↑", paired=True),
    Measure("map_iou50", "IoU@.5", metrics.iou_threshold, MAPS, direction="↑", page_only=True),
    Measure("map_top10", "Top 10 %", metrics.top_intersection, MAPS, direction="↑", page_only=True),
    Measure(
        "map_top10_near",
        "Top 10 %, ±1",
        partial(metrics.top_intersection, radius=1),
        MAPS,
        direction="↑",
        page_only=True,
    ),
    Measure("map_spearman", "Spearman", metrics.spearman, MAPS, direction="↑", page_only=True),
    Measure("map_kendall", "Kendall", metrics.kendall, MAPS, direction="↑", page_only=True),
    Measure("map_ssim", "SSIM", metrics.ssim, MAPS, direction="↑", page_only=True),
    Measure(
        "linf",
        "L∞ · 255",
        metrics.linf,
        IMAGES,
        decimals=2,
        factor=255.0,
        total=np.max,
        interval=False,
        page_only=True,
    ),
    Measure("l2", "L2", metrics.l2, IMAGES, interval=False, page_only=True),
    Measure(
        "mean_displacement",
        "Shift, px",
        metrics.mean_displacement,
        ("flows",),
        interval=False,
        page_only=True,
    ),
    Measure(
        "flow_penalty",
        "Flow penalty",
        jax.vmap(flow_penalty),
        ("flows",),
        decimals=2,
        interval=False,
        page_only=True,
    ),
    Measure(
        "pointing_game", "Pointing game", metrics.pointing_game, ("maps", "objects"), page_only=True
    ),
    Measure(
        "benign_pointing_game",
        "Pointing game, benign",
        metrics.pointing_game,
        ("benign_maps", "objects"),
        page_only=True,
    ),
    Measure(
        "float_map_l1",
        "Map L1, not rounded",
        metrics.map_l1,
        EXACT_MAPS,
        decimals=4,
        interval=False,
        page_only=True,
    ),
    Measure(
        "float_map_iou75",
        "IoU@75, not rounded",
        metrics.iou_quantile,
        EXACT_MAPS,
        interval=False,
        page_only=True,
    ),
)
# of a set of images; the numbers of each image are arrays of `Examined`
CURVATURE = tuple(
    Total(key, heading, decimals=None)
    for key, heading in {
        "softmax_top": "Exact |λ|",
        "surrogate_top": "Surrogate |λ|",
        "trace": "Trace",
        "frobenius": "Frobenius",
        "effective_rank": "Rank",
        "normalised": "|λ| / |∇s|",
        "map_jacobian": "Map σ",
    }.items()
)
# of the images of an attack under a detector; the success rate is that of `MEASURES`
DETECTION = tuple(
    Total(key, heading)
    for key, heading in {"auc": "ROC-AUC", "detected": "Detected", "evades": "Evades"}.items()
)
COUNTS = (Column("n", "Images", decimals=0), Column("failed", "Failed", decimals=0))
COST = "gradient_evaluations"  # [N], of each image
COSTS = (
    Column(COST, "Gradients", decimals=1),
    Column("seconds", "Seconds", decimals=1),
)


def columns() -> dict[str, Column]:
    """Return all columns of numbers that a row may have, by key, in the order of a page."""
    return {column.key: column for column in (*COUNTS, *MEASURES, *CURVATURE, *DETECTION, *COSTS)}


def as_text(value: float, decimals: int | None, form: str = "") -> str:
    """Return a number rounded to decimals, or to three significant digits; `form` as of Python."""
    return f"{float(f'{value:.3g}'):{form}g}" if decimals is None else f"{value:{form}.{decimals}f}"


def measure(evaluated: Evaluated) -> dict[str, NDArray[Any]]:
    """Return [N] numbers by key, one an image (method: ADV² §4.1), on the 8-bit images.

    `failed` says which images gave no finite numbers: what else is said of these means nothing.
    """
    known = {name: value for name, value in evaluated._asdict().items() if value is not None}
    numbers = {
        one.key: np.asarray(one.function(*(known[name] for name in one.of)))
        for one in MEASURES
        if known.keys() >= set(one.of)
    }
    maps = (evaluated.maps, evaluated.float_maps, evaluated.target_maps)
    return {"failed": ~finite((evaluated.logits, maps)), **numbers}


def mean(values: NDArray[Any], total: Any = np.mean) -> float | None:
    """Return the mean of some numbers, or another total; None of none."""
    return float(total(values)) if len(values) else None


def interval(values: ArrayLike, *, seed: int = 0, confidence: float = 0.95) -> list[float] | None:
    """Return the percentile bootstrap interval of a mean, or Wilson's of a proportion.

    Wilson's is wide where all images agree, [.81, 1] for 16 of 16; a bootstrap would say [1, 1].

    Args:
        values: numbers [N], one an image; booleans are those of a proportion.
        seed: of the resampling; equal values and seed give the same interval.
        confidence: share of intervals that hold the true mean or proportion.

    Returns:
        [low, high]; None of no image, and of a single number, which says nothing of how much
        images differ.
    """
    from scipy.stats import binomtest, bootstrap  # takes a second: only where it is used

    values = np.asarray(values)
    proportion, n = values.dtype == bool, len(values)
    if n == 0 or (n == 1 and not proportion):
        return None
    if proportion:
        ends = binomtest(int(values.sum()), n).proportion_ci(confidence, method="wilson")
    else:
        ends = bootstrap(
            (values.astype(np.float64),),
            np.mean,
            axis=0,
            method="percentile",
            n_resamples=RESAMPLES,
            batch=max(BLOCK // n, 1),
            confidence_level=confidence,
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return [float(ends.low), float(ends.high)]


def rank_correlation(x: ArrayLike, y: ArrayLike, *, seed: int = 0) -> Row:
    """Return Spearman's rank correlation of two numbers of the same images, with its interval.

    Args:
        x, y: [N]; images on which one of them is not finite do not count.
        seed: of the bootstrap, which draws images.

    Returns:
        `n`, `spearman`, and `ci`, the 95 % percentile interval; both None where they say nothing:
        of fewer than three images, or where one of the numbers is the same for all.
    """
    pairs = np.stack([np.asarray(x, float), np.asarray(y, float)])
    a, b = pairs[:, np.isfinite(pairs).all(0)]
    n = len(a)
    if n < 3 or not np.isfinite(value := metrics.rank_correlation(a, b)):
        return {"n": n, "spearman": None, "ci": None}
    drawn = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    # NaN: a resample may hold copies of one image only
    ends = np.nanquantile(metrics.rank_correlation(a[drawn], b[drawn]), [0.025, 0.975])
    return {"n": n, "spearman": float(value), "ci": ends.tolist()}


def roc_auc(benign: NDArray[Any], attacked: NDArray[Any], *, seed: int = 0) -> Row:
    """Return the area under the ROC curve of the scores of images, benign and attacked: [N], [N].

    Args:
        benign, attacked: of the same images in the same order.
        seed: of the bootstrap, which draws images with what was made of them.

    Returns:
        `auc`, None of no images; `ci`, its 95 % percentile interval, None of fewer than two.
    """
    n = len(benign)
    if n == 0:
        return {"auc": None, "ci": None}
    value = float(metrics.roc_auc(benign, attacked))
    if n < 2:
        return {"auc": value, "ci": None}
    drawn = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    ends = np.quantile(metrics.roc_auc(benign[drawn], attacked[drawn]), [0.025, 0.975])
    return {"auc": value, "ci": ends.tolist()}


def row(
    measures: Measures, *, seed: int | None = None, totals: Sequence[Total] | None = None
) -> Row:
    """Return the numbers of a row: totals over the `n` images that did not fail.

    Args:
        measures: [N] numbers by key, `failed` among them, as `measure` returns them.
        seed: of the bootstrap; without it there are no intervals.
        totals: what to sum up; `MEASURES` unless given.

    Returns:
        `n`; `failed`, the number of images that did; a total for each measure, None where there
        is nothing to be averaged; `ci`, the intervals of most.
    """
    good = ~measures["failed"]
    numbers: Row = {"n": int(good.sum()), "failed": int((~good).sum())}
    intervals = {}
    for one in MEASURES if totals is None else totals:
        if one.key in measures:
            counted = good & measures["asr"] if one.of_successes else good
            values = measures[one.key][counted]
            numbers[one.key] = mean(values, one.total)
            if one.interval and seed is not None and (ends := interval(values, seed=seed)):
                intervals[one.key] = ends
    return numbers | {"ci": intervals}


def paired(before: Measures, after: Measures, *, seed: int) -> list[Row]:
    """Return after - before on the images on which neither failed, a row for each paired measure."""
    both = ~(before["failed"] | after["failed"])
    rows = []
    for one in MEASURES:
        if one.paired:
            values = (after[one.key] - before[one.key])[both]
            numbers = {"n": len(values), "difference": mean(values)}
            rows.append({"measure": one.key, **numbers, "ci": interval(values, seed=seed)})
    return rows


class Entry:
    """An array of results.npz, read when it is asked for; a KeyError where there is none."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, view: "View", owner: type) -> NDArray[Any]:
        return view.arrays[view.prefix + self.name]


class OptionalEntry(Entry):
    """An array that a run may lack; None where it does."""

    def __get__(self, view: "View", owner: type) -> NDArray[Any] | None:  # type: ignore[override]
        return view.arrays.get(view.prefix + self.name)


class SharedEntry(OptionalEntry):
    """An array without an axis of images: all batches have the same."""


@dataclass(frozen=True)
class View:
    """Some arrays of results.npz, those whose names begin with a prefix; N images."""

    arrays: Arrays
    prefix: str = ""

    @classmethod
    def entries(cls) -> list[Entry]:
        """Return the arrays that there may be under the prefix."""
        return [entry for entry in vars(cls).values() if isinstance(entry, Entry)]

    @classmethod
    def named(cls, prefix: str = "", /, **values: Any) -> dict[str, NDArray[Any]]:
        """Return arrays under the names that the file has for them; None is left out."""
        names = {entry.name for entry in cls.entries()}
        assert names.issuperset(values), f"{set(values) - names} has no place in {cls.__name__}"
        return {f"{prefix}{name}": value for name, value in values.items() if value is not None}


class Images(View):
    """The attacked images: uint8 [N, H, W, 3], classes [N], positions in the source [N]."""

    images = Entry()
    labels = Entry()
    targets = Entry()
    indices = Entry()
    masks = OptionalEntry()  # bool [N, H, W], the labelled objects
    names = OptionalEntry()  # unicode [N], of files


class Aim(View):
    """The maps of an interpreter before an attack, and its target maps: [N, h, w] in [0, 1]."""

    benign_maps = Entry()
    target_maps = Entry()


class Attacked(View):
    """The outcome of an attack, as an interpreter sees it. Curves are thinned to S steps.

    Snapshots, pictures on the way, are of the first M images, at T steps.
    """

    images = Entry()  # uint8 [N, H, W, 3]
    maps = Entry()  # [N, h, w]
    confidence = Entry()  # [N], f_t
    success = Entry()  # bool [N]
    classes = OptionalEntry()  # [N], taken for, or the strongest beside the label; if untargeted
    map_l1 = Entry()  # [N]
    map_iou75 = Entry()  # [N]
    flow = OptionalEntry()  # [N, H, W, 2], (dy, dx) in pixels
    curve_steps = SharedEntry()  # [S]
    curve_loss = OptionalEntry()  # [N, S]
    curve_confidence = OptionalEntry()  # [N, S]
    curve_map_l1 = OptionalEntry()  # [N, S]
    snapshot_steps = SharedEntry()  # [T]
    snapshot_images = OptionalEntry()  # uint8 [M, T, H, W, 3]
    snapshot_maps = OptionalEntry()  # [M, T, h, w]
    snapshot_confidence = OptionalEntry()  # [M, T]


class Examined(View):
    """The curvature at a set of images, as `runs.curvature.examine` measures it; N images.

    "Softmax" is of the exact Hessian of the score, "surrogate" of the Hessian with a curved ReLU,
    both in units of the score per squared unit of pixel value. Cosines are absolute values.
    """

    images = Entry()  # uint8 [N, H, W, 3]
    classes = Entry()  # [N], whose score it is
    failed = Entry()  # bool [N]; everything else of an image that failed is NaN
    softmax_values = Entry()  # [N, r], the largest eigenvalues by absolute value
    softmax_vector = Entry()  # [N, H, W, 3], eigenvector of the first; 0 where it is 0
    softmax_residual = Entry()  # [N], ‖H v - λ v‖
    softmax_top = Entry()  # [N], the largest absolute value
    surrogate_value = Entry()  # [N], eigenvalue of the largest absolute value
    surrogate_vector = Entry()  # [N, H, W, 3], its eigenvector
    surrogate_residual = Entry()  # [N]
    surrogate_top = Entry()  # [N], its absolute value
    trace = Entry()  # [N], of the surrogate
    trace_error = Entry()  # [N], standard error
    frobenius = Entry()  # [N]
    frobenius_error = Entry()  # [N]
    effective_rank = Entry()  # [N]
    effective_rank_error = Entry()  # [N]
    gradient_norm = Entry()  # [N], ‖∇s‖
    normalised = Entry()  # [N], surrogate_top / gradient_norm
    map_jacobian = Entry()  # [N], largest singular value of the map's Jacobian
    map_residual = Entry()  # [N]
    density_nodes = Entry()  # [N, probes, depth], of the surrogate's network term
    density_weights = Entry()  # [N, probes, depth], those of a probe sum to 1
    softmax_cosine_gradient = Entry()  # [N], of softmax_vector and ∇s
    surrogate_cosine_gradient = Entry()  # [N]
    softmax_cosine_change = OptionalEntry()  # [N], and x' - x, of attacked images
    surrogate_cosine_change = OptionalEntry()  # [N]
    map_l1 = OptionalEntry()  # [N], of the attack's map from the target map


class Compared(View):
    """The fidelity of S surrogates to secants of T steps, of F images (`curvature.fidelity`)."""

    cosine = Entry()  # [F, S, T]
    ratio = Entry()  # [F, S, T], norm of the surrogate's product over the secant's


SHARED = {entry.name for entry in Attacked.entries() if isinstance(entry, SharedEntry)}


class Results(Images):
    """The arrays of results.npz: those of all images, and by interpreter and attack."""

    def aim(self, interpreter: str) -> Aim:
        """Return the arrays of an interpreter that no attack made."""
        return Aim(self.arrays, f"{interpreter}/")

    def attacked(self, interpreter: str, attack: str) -> Attacked:
        """Return the arrays of an attack on an interpreter."""
        return Attacked(self.arrays, f"{interpreter}/{attack}/")

    def classes(self, interpreter: str, attack: str) -> NDArray[Any]:
        """Return the classes [N] that the images of an attack are explained for."""
        classes = self.attacked(interpreter, attack).classes
        return self.targets if classes is None else classes

    def explained(self, interpreter: str) -> bool:
        """Return whether there are maps of an interpreter."""
        return f"{interpreter}/benign_maps" in self.arrays

    def attacks(self, interpreter: str) -> list[str]:
        """Return the names of the attacks on an interpreter whose images there are."""
        names = (*ATTACKS, JOINT)
        return [name for name in names if f"{interpreter}/{name}/images" in self.arrays]


class Stored(Mapping[str, NDArray[Any]]):
    """The arrays of an .npz, or of a folder of shards, each read whenever it is asked for.

    Attributes:
        paths: the files, in the order of their images.
        headers: shape and type by name.

    Raises:
        ValueError: here and whenever arrays are read: names a file that is damaged, or does not go
            with those before it.
    """

    def __init__(self, path: Path):
        self.paths = _shards(path) if path.is_dir() else [path]
        self.headers: Headers = {}
        self._files: dict[str, list[Path]] = {}
        for path in self.paths:
            for name, (shape, dtype) in stored(path).items():
                if name not in self.headers:
                    self._files[name] = [path]
                elif name.rpartition("/")[2] in SHARED:
                    continue
                else:
                    (n, *rest), kind = self.headers[name]
                    if (tuple(rest), kind) != (shape[1:], dtype):
                        raise ValueError(f"cannot read {path}: {name} is {dtype} {list(shape)}")
                    shape = (n + shape[0], *rest)
                    self._files[name].append(path)
                self.headers[name] = shape, dtype

    def __contains__(self, name: object) -> bool:  # that of `Mapping` would read the array
        return name in self.headers

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    def read(self, name: str, pictures: int | None = None) -> NDArray[Any]:
        """Return an array, or so many entries of one with three axes or more (`read_arrays`)."""
        parts, is_picture = [], len(self.headers[name][0]) > 2
        for path in self._files[name]:
            parts.append(read_arrays(path, name.__eq__, pictures=pictures)[name])
            if is_picture and pictures is not None:
                pictures -= len(parts[-1])
                if pictures == 0:
                    break
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _shards(folder: Path) -> list[Path]:
    index = read_summary(folder, INDEX)
    with intact(folder / INDEX):
        # a name alone: an index leads to no other folder
        return [folder / Path(shard["file"]).name for shard in index["shards"]]


def results_path(directory: Path) -> Path:
    """Return where the results of a finished run are: results.npz, or a folder of shards."""
    folder = directory / SHARDS
    return folder if (folder / INDEX).exists() else directory / RESULTS


def read_results(directory: Path, *, pictures: int | None = None) -> dict[str, NDArray[Any]]:
    """Read the arrays of a finished run, with so many pictures, or all, from either form.

    Raises:
        ValueError: as `Stored`.
    """
    arrays = Stored(results_path(directory))
    return {name: arrays.read(name, pictures) for name in arrays}
