"""An attack, or a curvature, as figures for notebooks: `adv2.show`, `adv2.show_curvature`.

They need matplotlib. A figure is shown where it is the last line of a notebook cell; elsewhere by
`IPython.display.display(figure)`, or `figure.savefig(path)`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from adv2_jax import metrics
from adv2_jax.attacks import Result, to_uint8, to_unit
from adv2_jax.files import optional
from adv2_jax.report import curvature, words
from adv2_jax.report.cards import CURVES
from adv2_jax.report.pictures import amplified_difference, colour_map, grey

SIDE = 1.7  # of a picture, in inches
SEEN = 0.3  # how much of the image is seen below its map


def show(
    result: Result,
    images: ArrayLike,
    targets: ArrayLike,
    target_maps: Any = None,
    *,
    titles: Sequence[str] = (),
    classes: Sequence[str] | None = None,
    limit: int = 4,
) -> Any:
    """Draw images before and after an attack, their maps, and the curves of the attack.

    Args:
        result: of `attack`, of N images.
        images: benign, uint8 [N, H, W, 3] or in [0, 1].
        targets: [N] target classes.
        target_maps: as for `attack`; None without an interpreter.
        titles: names of the interpreters, in the order of the maps.
        classes: names of the classes.
        limit: number of images that are drawn, the first; curves are of all.

    Returns:
        A matplotlib figure: a row for each image with the benign image, target map and attacked
        image, its map with its L1 distance from the target map, and the change times ten; below,
        the mean and the quartiles of loss, confidence and map L1 over the steps.

    Raises:
        ValueError: matplotlib is not installed.
    """
    benign, targets = to_uint8(to_unit(np.asarray(images))), np.asarray(targets)
    wanted = [np.asarray(m) for m in _listed(target_maps)]
    maps = [np.asarray(m) for m in _listed(result.maps)] if wanted else []
    names = [*titles, *(f"map {k + 1}" for k in range(len(titles), len(maps)))]
    if len(maps) == 1 and not titles:
        names = ["map"]
    confidence = metrics.confidence(result.logits, targets)
    shown, columns = min(limit, len(benign)), 3 + 2 * len(maps)
    width = max(columns * SIDE, 8.0)
    figure = _figure(width, SIDE * 1.25 * shown + 2.4)
    above, below = figure.subfigures(2, 1, height_ratios=[SIDE * 1.25 * shown, 2.4])
    tiles = above.subplots(shown, columns, squeeze=False)
    for i, row in enumerate(tiles):
        old, new = benign[i], result.images[i]
        target = words.class_name(classes, int(targets[i]))
        pictures = [("benign", old)]
        pictures += [
            (f"{name}, wanted", _over(old, m[i])) for name, m in zip(names, wanted, strict=True)
        ]
        pictures.append((f"p({target}) {words.number(confidence[i], 2)}", new))
        for name, m, goal in zip(names, maps, wanted, strict=True):
            off = metrics.map_l1(m[i : i + 1], goal[i : i + 1])[0]
            pictures.append((f"{name}, L1 {words.number(off, 3)}", _over(new, m[i])))
        pictures.append(("change ×10", amplified_difference(new, old)))
        for tile, (title, pixels) in zip(row, pictures, strict=True):
            tile.imshow(pixels, interpolation="nearest")
            tile.set_title(title, fontsize=8)
            tile.set_axis_off()
    _draw_curves(below, result, names)
    return figure


class Figures(list[Any]):
    """Matplotlib figures, which a notebook shows one below the other."""

    def _ipython_display_(self) -> None:
        from IPython.display import display

        for figure in self:
            display(figure)


def show_curvature(directory: Path | str | curvature.Laboratory) -> Figures:
    """Draw what `adv2 curvature` wrote: fidelity of surrogates, spectra, and, of a run, fragility.

    Args:
        directory: the folder of `curvature.json` and `curvature.npz`, or what `report.curvature.read`
            returns.

    Returns:
        A list of matplotlib figures.

    Raises:
        ValueError: a file is missing or cannot be read, or matplotlib is not installed.
    """
    found = directory if isinstance(directory, curvature.Laboratory) else curvature.read(directory)
    # empty: the first figure of pyplot tells a notebook how to show figures, those of others too
    _figure(1, 1)
    figures = Figures([curvature.agreement(found.summary["fidelity"]), curvature.spectra(found)])
    if found.summary.get("correlation"):
        figures.append(curvature.fragility({"images": found}))
    return figures


def _listed(maps: Any) -> list[Any]:
    """Return the maps of each interpreter."""
    if maps is None:
        return []
    return list(maps) if isinstance(maps, tuple | list) else [maps]


def _figure(width: float, height: float) -> Any:
    # by pyplot, which tells a notebook how to show figures; closed, or it would be shown twice
    pyplot = optional("matplotlib.pyplot", "a figure", curvature.INSTALL)
    figure = pyplot.figure(figsize=(width, height), layout="constrained")
    pyplot.close(figure)
    return figure


def _over(image: Any, m: Any) -> Any:
    """Return a map over its image in grey, uint8 [H, W, 3]."""
    height, width = image.shape[:2]
    # the nearest entry: a coarse map looks as coarse as it is
    rows, columns = (np.arange(n) * k // n for n, k in zip((height, width), m.shape, strict=True))
    colours = colour_map(np.nan_to_num(m))[rows][:, columns]
    return np.round(SEEN * grey(image) + (1 - SEEN) * colours).astype(np.uint8)


def _draw_curves(figure: Any, result: Result, names: Sequence[str]) -> None:
    """Draw mean and quartiles over the images of what the steps reported."""
    curves = {title: np.asarray(getattr(result.curves, key), float) for key, title, _ in CURVES}
    # plain PGD reports no map
    curves = {title: values for title, values in curves.items() if not np.isnan(values).all()}
    axes = figure.subplots(1, max(len(curves), 1), squeeze=False)[0]
    for axis, (title, values) in zip(axes, curves.items(), strict=False):
        many = values[..., None] if values.ndim == 2 else values
        for k in range(many.shape[-1]):
            curve = many[..., k]
            known = ~np.isnan(curve).all(axis=0)
            steps = np.flatnonzero(known)
            low, high = np.nanquantile(curve[:, known], [0.25, 0.75], axis=0)
            colour = curvature.COLOURS[k % len(curvature.COLOURS)]
            label = names[k] if many.shape[-1] > 1 else None
            axis.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0)
            axis.plot(steps, np.nanmean(curve[:, known], axis=0), color=colour, label=label)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step")
        if many.shape[-1] > 1:
            axis.legend(fontsize=7)
