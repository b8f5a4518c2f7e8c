"""The terms of the joint loss (ADV² eq. 3), each for one image."""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from adv2_jax.types import Label, Logits, Map


def log_odds(logits: Logits, label: Label) -> Array:
    """u_c = z_c - logsumexp_{j != c} z_j, the log of f_c / (1 - f_c).

    In float32 f_c rounds to exactly 1 for confident networks and its gradient is lost; u_c never
    saturates.

    Args:
        logits: [K], K >= 2.
        label: [] the class c.

    Returns:
        [] any real number; positive iff class c holds more than half of the probability.
    """
    return logits[label] - jax.nn.logsumexp(logits, where=jnp.arange(logits.shape[-1]) != label)


def cross_entropy(logits: Logits, label: Label, *, smoothing: float = 0.0) -> Array:
    """-sum_j q_j log f_j with q_label = 1 - smoothing and the rest spread evenly (ADV² §3.6).

    Args:
        logits: [K].
        label: [] the target class.
        smoothing: mass taken from the target, in [0, 1).

    Returns:
        [] >= 0.
    """
    k = logits.shape[-1]
    # optax spreads its alpha over all K classes, the target included; ours goes to the K-1 others
    targets = optax.smooth_labels(jax.nn.one_hot(label, k), smoothing * k / (k - 1))
    return optax.softmax_cross_entropy(logits, targets)


def map_l2(map: Map, target_map: Map) -> Array:
    """Sum of squared differences, || m - m_t ||² of eq. 3: [h, w] x [h, w] -> []."""
    return jnp.sum((map - target_map) ** 2)


def logit(logits: Logits, label: Label) -> Array:
    """z_c itself."""
    return logits[label]


def probability(logits: Logits, label: Label) -> Array:
    """f_c, the softmax probability the paper differentiates. Its float32 gradient is void once f_c rounds to 1 (see `log_odds`)."""
    return jax.nn.softmax(logits)[label]


def map_mse(map: Map, target_map: Map) -> Array:
    """Mean of squared differences, as the released code weighs CAM, RTS and MASK: [h, w] x [h, w] -> []."""
    return jnp.mean((map - target_map) ** 2)
