"""Target classes."""

import numpy as np


def random_targets(labels: np.ndarray, num_classes: int, *, seed: int = 0, indices: np.ndarray | None = None) -> np.ndarray:
    """A uniformly random other class for each image (ADV² §4.1).

    Args:
        labels: integers [N] in 0..K-1.
        num_classes: K >= 2.
        seed: of the draw.
        indices: [N] positions of the images in their source; each image's draw depends on the seed and its own position only, so
            leaving images out changes nothing for the others. 0..N-1 unless given.

    Returns:
        int32 [N], never equal to the label.

    Raises:
        ValueError: for fewer than two classes.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes = {num_classes} must be at least 2 for a target other than the label")
    where = np.arange(len(labels)) if indices is None else indices
    shifts = [np.random.default_rng([seed, int(i)]).integers(1, num_classes) for i in where]
    return ((np.asarray(labels) + np.array(shifts, int)) % num_classes).astype(np.int32)
