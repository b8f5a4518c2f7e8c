"""Losses against their formulas in float64, and where float32 has no digits left."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax import losses

LOGITS = np.array([1.5, -0.3, 0.7, 4.0, -2.0])
PROBABILITIES = np.exp(LOGITS) / np.exp(LOGITS).sum()


def smoothed(label, smoothing):
    return np.where(np.arange(5) == label, 1 - smoothing, smoothing / 4)


SCORES = {
    losses.log_odds: lambda c: np.log(PROBABILITIES[c] / (1 - PROBABILITIES[c])),
    losses.logit: lambda c: LOGITS[c],
    losses.probability: lambda c: PROBABILITIES[c],
    losses.cross_entropy: lambda c: -np.log(PROBABILITIES[c]),
}


@pytest.mark.parametrize("label", range(5))
@pytest.mark.parametrize("score", SCORES)
def test_scores_are_their_formulas(score, label):
    assert score(jnp.asarray(LOGITS, jnp.float32), label) == pytest.approx(
        SCORES[score](label), rel=2e-6
    )


@partial(jax.jit, static_argnames="score")
def derivatives(score, logits, label):
    return score(logits, label), jax.grad(score)(logits, label), jax.hessian(score)(logits, label)


@pytest.mark.parametrize("score", SCORES)
def test_derivatives_are_central_differences(score, double, slope):
    v = np.random.default_rng(0).normal(size=5)
    _, gradient, hessian = derivatives(score, LOGITS, 2)
    np.testing.assert_allclose(
        gradient @ v, slope(lambda z: derivatives(score, z, 2)[0], LOGITS, v), rtol=1e-8
    )
    expected = slope(lambda z: derivatives(score, z, 2)[1], LOGITS, v)
    np.testing.assert_allclose(hessian @ v, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.05, 0.5])
def test_smoothing_takes_its_mass_from_the_target_and_spreads_it_over_the_others(smoothing):
    expected = -smoothed(1, smoothing) @ np.log(PROBABILITIES)
    actual = losses.cross_entropy(jnp.asarray(LOGITS, jnp.float32), 1, smoothing=smoothing)
    assert actual == pytest.approx(expected, rel=2e-6)


def test_smoothed_loss_is_least_at_the_smoothed_distribution():
    gradient = jax.grad(lambda z: losses.cross_entropy(z, 1, smoothing=0.2))(
        jnp.log(smoothed(1, 0.2))
    )
    np.testing.assert_allclose(gradient, np.zeros(5), atol=1e-7)


def test_log_odds_keep_their_gradient_where_the_probability_has_none():
    confident = jnp.array([40.0, 0.0, 0.0])
    assert losses.probability(confident, 0) == 1
    assert jnp.abs(jax.grad(losses.probability)(confident, 0)).max() < 1e-16
    np.testing.assert_allclose(jax.grad(losses.log_odds)(confident, 0), [1, -0.5, -0.5])
    assert losses.log_odds(confident, 0) == pytest.approx(40 - np.log(2))


def test_log_odds_change_sign_at_one_half():
    assert losses.log_odds(jnp.array([np.log(2.0), 0.0, 0.0]), 0) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("logits", [[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]])
@pytest.mark.parametrize("score", SCORES)
def test_extreme_logits_give_finite_numbers(score, logits):
    for label in range(3):
        assert all(
            np.isfinite(actual).all() for actual in derivatives(score, jnp.array(logits), label)
        )


@pytest.mark.parametrize(("loss", "expected"), [(losses.map_l2, 0.3), (losses.map_mse, 0.05)])
def test_map_losses(loss, expected):
    m, target = (
        jnp.array([[0.0, 1.0, 0.5], [0.2, 0.4, 0.0]]),
        jnp.array([[0.5, 0.8, 0.5], [0.2, 0.3, 0.0]]),
    )
    assert loss(m, target) == pytest.approx(expected, rel=1e-6)
    assert loss(m, m) == 0
    np.testing.assert_array_equal(jax.grad(loss)(m, m), np.zeros((2, 3)))
