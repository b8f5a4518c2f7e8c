"""Class scores, and the terms of the joint loss (ADV² eq. 3), for one image."""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from adv2_jax.types import Label, Logits, Map, Score


def log_odds(logits: Logits, label: Label) -> Array:
    """Return the log-odds u_c = z_c - logsumexp_{j != c} z_j = log(f_c / (1 - f_c)).

    In float32 f_c rounds to exactly 1 for confident networks, and its gradient is lost; u_c does
    not saturate.

    Args:
        logits: [K], K >= 2.
        label: [] the class c.

    Returns:
        [] any real number; positive if and only if f_c > 1/2.
    """
    # `where` leaves c out of the sum; subtracting its term would cancel all digits where f_c ≈ 1
    return logits[label] - jax.nn.logsumexp(logits, where=jnp.arange(logits.shape[-1]) != label)


def cross_entropy(logits: Logits, label: Label, *, smoothing: float = 0.0) -> Array:
    """Return -sum_j q_j log f_j with q_label = 1 - smoothing, the rest spread evenly (ADV² §3.6).

    Args:
        logits: [K].
        label: [] the target class.
        smoothing: probability taken from the target, in [0, 1).

    Returns:
        [] >= 0.
    """
    k = logits.shape[-1]
    # optax spreads its alpha over all K classes, the target included; the paper's over the others
    targets = optax.smooth_labels(jax.nn.one_hot(label, k), smoothing * k / (k - 1))
    return optax.softmax_cross_entropy(logits, targets)


def strongest_other(logits: Logits, label: Label) -> Array:
    """Return the class with the largest logit of those that are not the label: [K], [] -> [] int32."""
    others = jnp.where(jnp.arange(logits.shape[-1]) == label, -jnp.inf, logits)
    return others.argmax(-1).astype(jnp.int32)


def map_l2(map: Map, target_map: Map) -> Array:
    """Return the sum of squared differences, ‖m - m_t‖² of eq. 3: [h, w], [h, w] -> []."""
    return optax.squared_error(map, target_map).sum()


def logit(logits: Logits, label: Label) -> Array:
    """Return the logit z_c, []."""
    return logits[label]


def probability(logits: Logits, label: Label) -> Array:
    """Return the softmax probability f_c, [], which the paper differentiates.

    Its float32 gradient is rounding noise once f_c rounds to 1 (see `log_odds`).
    """
    return jax.nn.softmax(logits)[label]


# class scores by name; larger where the class is likelier
SCORES: dict[str, Score] = {score.__name__: score for score in (log_odds, probability, logit)}


def map_mse(map: Map, target_map: Map) -> Array:
    """Return the mean of squared differences: [h, w], [h, w] -> [].

    The released code uses it for CAM, RTS and MASK, and the sum for GRAD.
    """
    return optax.squared_error(map, target_map).mean()
