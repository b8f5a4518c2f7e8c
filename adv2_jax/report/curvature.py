"""Curvature in a report: tables, and three pictures, which need matplotlib.

The pictures are functions of what `adv2 curvature` wrote, for notebooks too:

    laboratory = report.curvature.read("run")
    report.curvature.agreement(laboratory.summary["fidelity"])
"""

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adv2_jax.files import optional, read_arrays, read_summary
from adv2_jax.presets import PRESETS
from adv2_jax.report import tables, words
from adv2_jax.runs.schema import Arrays, Examined, Row, attack_name, rank_correlation
from adv2_jax.runs.store import CURVATURE_FILES
from adv2_jax.threats import PIXEL

INSTALL = "pip install 'adv2_jax[plots]'"
WIDTH = 11.0  # of a figure, in inches
DPI = 160  # 1760 pixels: sharp on the widest page
# Okabe & Ito's colours, which colour-blind readers tell apart; markers tell apart in grey print
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "o^sDvP"
PREDICTORS = {
    "normalised": "normalised curvature |λ| / ‖∇s‖ (per unit of pixel value)",
    "map_jacobian": "largest singular value of the map's Jacobian",
}


class Laboratory(NamedTuple):
    """What `adv2 curvature` wrote: the content of `curvature.json` and `curvature.npz`."""

    summary: Mapping[str, Any]
    arrays: Arrays

    @property
    def samples(self) -> dict[str, Examined]:
        """Return the arrays of each set of images, by its name: benign, pgd, adv2."""
        names = [row["images"] for row in self.summary["rows"]]
        return {name: Examined(self.arrays, f"{name}/") for name in names}


def read(directory: Path | str, *, pictures: int | None = None) -> Laboratory:
    """Read what `adv2 curvature` wrote into a folder, with pictures of the first images only."""
    folder, (summary, arrays) = Path(directory), CURVATURE_FILES
    values = read_arrays(folder / arrays, pictures=pictures)
    return Laboratory(read_summary(folder, summary), values)


def content(laboratory: Laboratory) -> str:
    """Return tables and pictures as HTML; without matplotlib, tables and what to install."""
    summary = laboratory.summary
    fidelity, correlation = summary["fidelity"], summary.get("correlation", [])
    parts = [tables.curvature(summary["rows"]), f'<p class="note">{TABLE}</p>']
    numbers = [tables.fidelity(fidelity)]
    numbers += [tables.correlation(correlation)] if correlation else []
    if find_spec("matplotlib") is None:
        return "\n".join(
            [*parts, f'<p class="note">Pictures need matplotlib: {INSTALL}</p>', *numbers]
        )
    parts.append(as_html(agreement(fidelity), _agreement_words(fidelity), AGREEMENT))
    parts.append(as_html(spectra(laboratory), _spectra_words(laboratory), SPECTRA))
    if correlation:
        model = str(summary.get("config", {}).get("model") or "network")
        figure = fragility({model: laboratory})
        parts.append(as_html(figure, _fragility_words(correlation), FRAGILITY))
    parts.append(
        f"<details><summary>The numbers of the pictures</summary>{''.join(numbers)}</details>"
    )
    return "\n".join(parts)


TABLE = """Means over the images, in units of the score and of the pixel range [0, 1]: 1/255 is
one pixel value. Exact |λ|: largest eigenvalue of the Hessian of the network as it is, whose ReLUs have no
curvature. Surrogate |λ|, trace, Frobenius norm and (effective) rank: of the Hessian that an attack on GRAD
follows, with a curved second derivative. |λ| / |∇s|: by about this much times its length a step turns the
gradient. Map σ: largest singular value of the map's derivative, how fast a map can move. In small print:
95 % intervals."""
AGREEMENT = """<b>How true is the surrogate?</b> Products of surrogate Hessians with random signs, compared
with the change of the true network's gradient over a step of that size: cosine, and norm ratio. Above,
ReLU with a curved second derivative of squared width τ, and the path of the default preset from its
first step to its last; below, other surrogates. Medians over the images."""
SPECTRA = """<b>Where is the curvature?</b> One typical image. Spikes: all eigenvalues of the exact Hessian
(10 at most). Area: density of the eigenvalues of the surrogate's network term, from random probes: exact at the
ends, coarse near 0. Below, the image and the
top eigenvectors of the exact and of the surrogate Hessian, grey where they are 0, with their absolute
cosines with the gradient ∇s and with the attack's change δ."""
FRAGILITY = """<b>Does curvature predict fragility?</b> One point an image: curvature at the benign image against
how far the attack's map is from its target map. In the title Spearman's rank correlation with its 95 %
interval."""


def agreement(fidelity: Mapping[str, Any]) -> Any:
    """Draw how true surrogate Hessians are, over steps and widths.

    Args:
        fidelity: as in `curvature.json`.

    Returns:
        A matplotlib figure: cosine and norm ratio, and the path of the default preset.
    """
    figures, colors = library("figure"), library("colors")
    steps, names, widths = (fidelity[key] for key in ("steps", "surrogates", "widths"))
    # widest at the top
    curved = sorted((i for i, tau in enumerate(widths) if tau is not None), key=lambda i: widths[i])
    others = [i for i, tau in enumerate(widths) if tau is None]
    scales: dict[str, tuple[str, Any, Any, Callable[[float], str]]] = {
        "cosine": ("Cosine with the secant", "viridis", colors.Normalize(0, 1), _cosine_text),
        # white where the norms agree
        "ratio": ("Norm over the secant's", "PuOr", colors.LogNorm(1 / 32, 32), _ratio_text),
    }
    # not by pyplot, which would keep every figure, and needs a backend
    figure = figures.Figure(figsize=(WIDTH, 5.6), layout="constrained")
    axes = figure.subplots(
        2, 2, sharex=True, sharey="row", height_ratios=[len(curved), len(others)]
    )
    for column, (key, (title, colours, norm, text)) in zip(axes.T, scales.items(), strict=True):
        numbers = np.array(fidelity[key], float)  # None becomes NaN
        for axis, rows in zip(column, (curved, others), strict=True):
            image = axis.imshow(
                numbers[rows], cmap=colours, norm=norm, aspect="auto", origin="lower"
            )
            _write_numbers(axis, numbers[rows], image, text)
        column[0].set_title(title)
        column[0].set_yticks(range(len(curved)), [f"{widths[i]:g}" for i in curved])
        column[1].set_yticks(range(len(others)), [names[i] for i in others])
        column[1].set_xticks(range(len(steps)), [str(Fraction(step)) for step in steps])
        column[1].set_xlabel("step h, in pixel values (1/255)")
        figure.colorbar(image, ax=column, extend="both" if key == "ratio" else "neither", pad=0.01)
        _draw_schedule(column[0], steps, [widths[i] for i in curved])
    axes[0, 0].set_ylabel("squared width τ of relu_curved")
    return figure


def _cosine_text(value: float) -> str:
    return f"{round(float(value), 2) + 0.0:.2f}".replace("0.", ".", 1)  # -0.0 + 0.0 is 0.0


def _ratio_text(value: float) -> str:
    return f"{value:.2g}" if value >= 0.1 else f"{value:.3f}".removeprefix("0")


def _write_numbers(
    axis: Any, numbers: NDArray[Any], image: Any, text: Callable[[float], str]
) -> None:
    for (i, j), value in np.ndenumerate(numbers):
        if np.isfinite(value):
            # ink that can be read: lightness by ITU-R BT.601
            light = image.cmap(image.norm(value))[:3] @ np.array([0.299, 0.587, 0.114]) > 0.5
            ink = "black" if light else "white"
            axis.text(j, i, text(value), ha="center", va="center", color=ink, fontsize=8)


def _draw_schedule(axis: Any, steps: Sequence[float], widths: Sequence[float]) -> None:
    """Draw the path of the default preset of GRAD over a grid of steps and widths."""
    effects = library("patheffects")
    preset = PRESETS["default"]["grad"]
    n, indices = preset.steps, np.arange(preset.steps)
    path = [
        # the grids are geometric: a cell is a constant factor
        np.log(np.asarray(course(n)(indices)) / unit / grid[0]) / np.log(grid[1] / grid[0])
        for course, unit, grid in ((preset.step_size, PIXEL, steps), (preset.tau, 1, widths))
    ]
    outline = [effects.withStroke(linewidth=4, foreground="black")]
    axis.plot(*path, color="white", linewidth=2, path_effects=outline)
    for place, marker in ((0, "o"), (-1, "s")):
        axis.plot(path[0][place], path[1][place], marker, color="white", markeredgecolor="black")
    axis.annotate(
        "default preset",
        (path[0][0], path[1][0]),
        (8, 8),
        textcoords="offset points",
        color="white",
        path_effects=[effects.withStroke(linewidth=3, foreground="black")],
    )


def spectra(laboratory: Laboratory, image: int | None = None) -> Any:
    """Draw where the curvature of a score is, before and after attacks.

    Args:
        laboratory: of a run or a source.
        image: which; unless given, the one whose largest surrogate eigenvalue is in the middle.

    Returns:
        A matplotlib figure: a column for each set of images, with exact eigenvalues as spikes over
        the spectral density of the surrogate's network term, and top eigenvectors.
    """
    samples = laboratory.samples
    place = _typical(samples) if image is None else image
    count = len(samples)
    figure = library("figure").Figure(figsize=(WIDTH * max(count, 2) / 3, 5), layout="constrained")
    grid = figure.add_gridspec(2, count, height_ratios=[2.2, 1])
    nodes = np.concatenate([one.density_nodes[place].ravel() for one in samples.values()])
    exact = np.concatenate([one.softmax_values[place] for one in samples.values()])
    # not 0, where a network has no curvature at all: the axis takes its logarithm
    largest = np.nanmax(np.abs([*nodes, *exact]), initial=1e-12)
    unit = largest / 1000  # below it the axis is linear
    for column, (name, sample) in enumerate(samples.items()):
        axis = figure.add_subplot(grid[0, column])
        _draw_spectrum(axis, sample, place, unit, largest)
        axis.set_title(_sample_name(name))
        axis.set_xlabel("eigenvalue λ (score / pixel range²)")
        axis.tick_params(labelleft=column == 0)
        if column == 0:
            axis.set_ylabel("density of eigenvalues, per e-fold")
            axis.legend(loc="upper left", fontsize=8)
        tiles = figure.add_subfigure(grid[1, column]).subplots(1, 3)
        _draw_vectors(tiles, sample, place)
    return figure


def _typical(samples: Mapping[str, Examined]) -> int:
    """Return the image in the middle of the order by the benign surrogate's largest eigenvalue."""
    # only the first images have pictures in memory, see `read`
    top = np.array([one.surrogate_top[: len(one.images)] for one in samples.values()])
    # those that failed somewhere come last
    order = np.argsort(np.where(np.isfinite(top).all(0), top[0], np.inf))
    return int(order[(np.isfinite(top).all(0).sum() - 1) // 2])


def _draw_spectrum(axis: Any, sample: Examined, place: int, unit: float, largest: float) -> None:
    nodes, weights = sample.density_nodes[place], sample.density_weights[place]
    axis.set_xscale("asinh", linear_width=unit)
    axis.set_yscale("log")
    # 1e-9: a largest value that is a power of ten gets its tick in spite of rounding
    powers = 10.0 ** np.arange(math.ceil(math.log10(10 * unit)), math.log10(largest) + 1e-9)
    axis.set_xticks(np.unique([-1, 0, 1] * powers[::-2, None]))
    axis.minorticks_off()
    points = np.linspace(-1.08, 1.08, 800) * np.arcsinh(largest / unit)
    # nodes are points of a quadrature: only the outer ones are eigenvalues
    spread = 0.25
    kernels = np.exp(-0.5 * ((points[:, None, None] - np.arcsinh(nodes / unit)) / spread) ** 2)
    density = (weights * kernels).sum(-1).mean(-1) / (spread * math.sqrt(2 * math.pi))
    label = "surrogate's network term"
    axis.fill_between(
        unit * np.sinh(points), density, 1e-6, color=COLOURS[5], alpha=0.6, label=label
    )
    values = sample.softmax_values[place]
    axis.vlines(values, 1e-4, 3, color=COLOURS[1], linewidth=1.5, label="exact Hessian")
    axis.set_ylim(1e-4, 30)  # with room for the legend
    axis.set_xlim(*unit * np.sinh(points[[0, -1]]))


def _draw_vectors(tiles: Any, sample: Examined, place: int) -> None:
    """Draw an image and its top eigenvectors, with their cosines."""
    pictures = {"image": sample.images[place] / 255}
    for kind, title in (("softmax", "exact"), ("surrogate", "surrogate")):
        vector = getattr(sample, f"{kind}_vector")[place]
        # a few pixels hold most of an eigenvector: scaled by the largest, the rest would be grey.
        # Cutting 1 in 200 entries is a convention; a zero vector stays grey
        size = np.quantile(np.abs(vector), 0.995) or 1.0
        cosines = [f"∇s {_cosine_text(getattr(sample, f'{kind}_cosine_gradient')[place])}"]
        change = getattr(sample, f"{kind}_cosine_change")
        cosines += [] if change is None else [f"δ {_cosine_text(change[place])}"]
        pictures[f"{title} v\ncos {', '.join(cosines)}"] = np.clip(0.5 + vector / size / 2, 0, 1)
    for tile, (title, picture) in zip(tiles, pictures.items(), strict=True):
        tile.imshow(np.nan_to_num(picture))
        tile.set_title(title, fontsize=7)
        tile.set_axis_off()


def fragility(networks: Mapping[str, Laboratory]) -> Any:
    """Draw curvature at benign images against how far the maps of attacks are from their targets.

    Args:
        networks: laboratories of finished runs, by the name of the network; a colour for each.

    Returns:
        A matplotlib figure: a row for each attack, a column for each predictor, Spearman's rank
        correlation with its interval in the titles.
    """
    attacks = [
        name for name, one in next(iter(networks.values())).samples.items() if name != "benign"
    ]
    ticker = library("ticker")
    figure = library("figure").Figure(figsize=(WIDTH, 3.3 * len(attacks)), layout="constrained")
    axes = figure.subplots(len(attacks), len(PREDICTORS), sharex="col", sharey="row", squeeze=False)
    for row, attack in zip(axes, attacks, strict=True):
        row[0].set_ylabel(f"map L1 that {attack_name(attack, None)} leaves")
        for axis, key in zip(row, PREDICTORS, strict=True):
            titles = []
            for i, (network, laboratory) in enumerate(networks.items()):
                x = getattr(laboratory.samples["benign"], key)
                x = np.where(x > 0, x, np.nan)  # the axis is logarithmic
                y = laboratory.samples[attack].map_l1
                style = {"color": COLOURS[i % 6], "marker": MARKERS[i % 6], "label": network}
                axis.scatter(x, y, s=18, alpha=0.7, linewidths=0, **style)
                titles.append(f"{network}: {_spearman_text(rank_correlation(x, np.asarray(y)))}")
            axis.set_title("\n".join(titles), fontsize=9)
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            # minor labels would overlap those of 1, 2 and 5
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    for axis, label in zip(axes[-1], PREDICTORS.values(), strict=True):
        axis.set_xlabel(label)
    if len(networks) > 1:
        axes[0, 0].legend(fontsize=8)
    return figure


def _spearman_text(correlation: Row) -> str:
    value, ends = correlation["spearman"], correlation["ci"] or ()
    if value is None:
        return f"n = {correlation['n']}, no correlation"
    low, high = (words.number(end, 2, sign="+") for end in ends)
    return f"Spearman {words.number(value, 2, sign='+')} [{low}, {high}], n = {correlation['n']}"


def _sample_name(name: str) -> str:
    return attack_name(name, None)


def library(module: str) -> Any:
    """Return a module of matplotlib, which is optional."""
    return optional(f"matplotlib.{module}", "a picture", INSTALL)


def as_html(figure: Any, alt: str, caption: str) -> str:
    """Return a figure as HTML, with a description in words."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    address = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return (
        f'<figure class="plot"><img class="plot" width="{110 * figure.get_figwidth():.0f}" '
        f'src="{address}" alt="{escape(alt)}">'
        f'<figcaption class="note">{caption}</figcaption></figure>'
    )


def _agreement_words(fidelity: Mapping[str, Any]) -> str:
    """Return which surrogate is closest at each step."""
    cosines = np.nan_to_num(np.array(fidelity["cosine"], float))
    best = [
        f"at {Fraction(step)} {fidelity['surrogates'][i]} ({cosines[i, j]:.2f})"
        for j, (step, i) in enumerate(zip(fidelity["steps"], cosines.argmax(0), strict=True))
    ]
    return f"Heat maps of cosine and norm ratio. Largest cosine by step: {', '.join(best)}."


def _spectra_words(laboratory: Laboratory) -> str:
    samples = laboratory.samples
    place = _typical(samples)
    facts = [
        f"{_sample_name(name)}: exact eigenvalues down to {one.softmax_values[place].min():.3g} "
        f"and up to {one.softmax_values[place].max():.3g}, surrogate's largest "
        f"{one.surrogate_value[place]:.3g}"
        for name, one in samples.items()
    ]
    return f"Spectra and top eigenvectors of one image. {'; '.join(facts)}."


def _fragility_words(correlation: Sequence[Row]) -> str:
    facts = [
        f"{row['measure'].replace('_', ' ')} with {attack_name(row['attack'], None)}: "
        f"{_spearman_text(row)}"
        for row in correlation
    ]
    return f"Scatter plots of curvature against map distance. {'; '.join(facts)}."
