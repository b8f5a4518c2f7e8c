"""Targets of an attack: classes, and maps that are not the image's own."""

from collections.abc import Sequence

import numpy as np

TARGET_MAPS = ("benign", "image", "patch")
# streams of the seed; never 0, which NumPy takes for none: the stream of the embedded scenes
DONOR, PATCH, TARGET = (1, 2, 3)


def random_targets(
    labels: np.ndarray, num_classes: int, *, seed: int = 0, indices: np.ndarray | None = None
) -> np.ndarray:
    """Draw a uniformly random other class for each image (ADV² §4.1).

    Args:
        labels: integers [N] in 0..K-1.
        num_classes: K >= 2.
        seed: of the draw.
        indices: [N] positions of the images in their source; each image's draw depends on the seed
            and its own position only, so leaving images out changes nothing for the others. 0..N-1
            unless given.

    Returns:
        int32 [N], never equal to the label.

    Raises:
        ValueError: for fewer than two classes.
    """
    if num_classes < 2:
        raise ValueError(
            f"num_classes = {num_classes} must be at least 2 for a target other than the label"
        )
    indices = np.arange(len(labels)) if indices is None else indices
    draws = [
        np.random.default_rng([seed, int(i), TARGET]).integers(1, num_classes) for i in indices
    ]
    # 1..K-1 steps on from the label, in a circle: every other class once
    return ((np.asarray(labels) + np.array(draws, int)) % num_classes).astype(np.int32)


def donors(
    source_labels: np.ndarray,
    targets: np.ndarray,
    indices: np.ndarray,
    *,
    seed: int = 0,
    classes: Sequence[str] | None = None,
) -> np.ndarray:
    """Draw for each attacked image one of its target class, whose map is to be shown.

    Args:
        source_labels: integers [M], classes of all images of the source, those that are left out of
            the attack included.
        targets: integers [N], target classes.
        indices: [N] positions of the attacked images in their source: a draw depends on nothing
            else of the attacked images.
        seed: of the draw.
        classes: names of the classes, for the message.

    Returns:
        int32 [N], indices into the M images; never the attacked image itself, whose class is not
        its target.

    Raises:
        ValueError: names a target class that no image of the source has.
    """
    members = {int(t): np.flatnonzero(source_labels == t) for t in np.unique(targets)}
    for t, images in members.items():
        if not len(images):
            name = f" ({classes[t]})" if classes is not None and t < len(classes) else ""
            raise ValueError(
                f"no image of target class {t}{name} among the {len(source_labels)} images read: "
                "it has no map to show"
            )
    return np.array(
        [
            np.random.default_rng([seed, int(i), DONOR]).choice(members[int(t)])
            for i, t in zip(indices, targets, strict=True)
        ],
        np.int32,
    )


def patch(shape: tuple[int, int], *, seed: int, index: int) -> np.ndarray:
    """Draw a circle or a rotated rectangle, 1 inside and 0 outside: an arbitrary interpretation.

    A pure function of its arguments; the same `seed` and `index` give the same figure at every
    size.

    Args:
        shape: h, w of the map.
        seed: of the draw.
        index: position of the image in its source.

    Returns:
        float32 [h, w]; at least the pixel nearest to the centre of the figure is inside.
    """
    rng = np.random.default_rng([seed, index, PATCH])
    centre, angle = rng.uniform(0.3, 0.7, 2), rng.uniform(0, np.pi)
    sides = rng.uniform(0.12, 0.3, 2)
    # the centres of the pixels in a unit square, as seen from the centre of the figure
    axes = ((np.arange(n) + 0.5) / n - c for n, c in zip(shape, centre, strict=True))
    y, x = np.meshgrid(*axes, indexing="ij")
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    distance = np.hypot(x, y)
    circle = distance <= sides.mean()
    rectangle = (abs(along) <= sides[0]) & (abs(across) <= sides[1])
    inside = circle if rng.random() < 0.5 else rectangle
    # on coarse maps a figure may miss every pixel centre
    return (inside | (distance == distance.min())).astype(np.float32)
