"""Spectra from products, against dense linear algebra in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from adv2_jax import spectra

SHAPE = (4, 5, 2)  # of the vectors: 40 numbers
KEY = jax.random.key(3)


def dense(values, seed=0):
    """A symmetric matrix of these eigenvalues, with its eigenvectors in columns."""
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((40, 40)))[0]
    return basis * values @ basis.T, basis


def product(matrix, v):
    return (matrix @ v.ravel()).reshape(v.shape)


def operator(matrix):
    """Operator as a pytree: other matrices of its size need no new program."""
    return Partial(product, jnp.asarray(matrix))


@pytest.fixture
def like(double):
    return jnp.zeros(SHAPE)


@pytest.fixture
def spread(double):
    """Eigenvalues of both signs, the largest well apart."""
    values = np.concatenate([[9.0, -7, 5], np.linspace(-1, 1, 37)])
    return values, *dense(values)


@pytest.mark.parametrize("driver", ["host", "fori"])
def test_eigenpairs_are_those_of_dense_algebra(spread, like, driver):
    _, matrix, basis = spread
    pairs = spectra.eigenpairs(operator(matrix), like, 3, depth=25, key=KEY, driver=driver)
    # 25 products leave residuals of 1e-5; an eigenvalue is off by the square of it
    np.testing.assert_allclose(pairs.values, [9, -7, 5], rtol=1e-8)
    overlaps = np.abs(pairs.vectors.reshape(3, -1) @ basis[:, :3])
    np.testing.assert_allclose(overlaps, np.eye(3), atol=1e-4)
    assert pairs.products == 25


def test_residuals_are_those_of_the_pairs(spread, like):
    _, matrix, _ = spread
    pairs = spectra.eigenpairs(operator(matrix), like, 5, depth=10, key=KEY)
    for value, vector, residual in zip(pairs.values, pairs.vectors, pairs.residuals, strict=True):
        true = np.linalg.norm(matrix @ vector.ravel() - value * vector.ravel())
        np.testing.assert_allclose(residual, true, rtol=1e-6, atol=1e-9)
    assert pairs.residuals[-1] > 1e-3  # ten products are too few for five pairs


def test_many_steps_leave_no_copies_of_a_value(like):
    """Without reorthogonalisation a value that has converged appears again."""
    matrix, _ = dense(np.concatenate([[100.0], np.linspace(0, 1, 39)]))
    pairs = spectra.eigenpairs(operator(matrix), like, 2, depth=40, key=KEY)
    np.testing.assert_allclose(pairs.values, [100, 1], rtol=1e-9)


def test_the_whole_spectrum_at_full_depth(spread, like):
    values, matrix, _ = spread
    # more than there are dimensions: the rest is not asked for
    pairs = spectra.eigenpairs(operator(matrix), like, 50, depth=60, key=KEY)
    np.testing.assert_allclose(np.sort(pairs.values), np.sort(values), atol=1e-8)


def test_zero_operator_has_zeros(like):
    pairs = spectra.eigenpairs(operator(np.zeros((40, 40))), like, 3, depth=8, key=KEY)
    assert not pairs.values.any() and not pairs.residuals.any() and not pairs.vectors[1:].any()
    assert pairs.products == 1
    sums = spectra.moments(operator(np.zeros((40, 40))), like, probes=4, key=KEY)
    assert not np.any(jax.tree.leaves(sums))
    density = spectra.spectral_density(
        operator(np.zeros((40, 40))), like, depth=4, probes=2, key=KEY
    )
    np.testing.assert_allclose(density.weights.sum(-1), 1)
    assert density.moment(2) == 0


def test_breakdown_ends_the_search(like):
    """An operator of rank 2 has a Krylov space of 3 dimensions: two values, and zeros."""
    matrix, _ = dense(np.concatenate([[3.0, -2], np.zeros(38)]))
    pairs = spectra.eigenpairs(operator(matrix), like, 4, depth=12, key=KEY)
    np.testing.assert_allclose(pairs.values, [3, -2, 0, 0], atol=1e-12)
    assert pairs.products == 3


def test_identity_breaks_down_at_once(like):
    pairs = spectra.eigenpairs(Partial(lambda v: 2.5 * v), like, 2, depth=6, key=KEY)
    np.testing.assert_allclose(pairs.values, [2.5, 0])
    assert pairs.products == 1


@pytest.mark.parametrize("k, depth", [(0, 5), (6, 5)])
def test_a_bad_number_of_pairs_is_refused(like, k, depth):
    with pytest.raises(ValueError, match=f"k = {k} must lie in 1..depth = {depth}"):
        spectra.eigenpairs(Partial(lambda v: v), like, k, depth=depth, key=KEY)


def test_a_plain_function_is_an_operator(spread, like):
    _, matrix, _ = spread
    plain = partial(product, matrix)
    pairs = spectra.eigenpairs(plain, like, 1, depth=20, key=KEY)
    np.testing.assert_allclose(pairs.values, [9], rtol=1e-8)
    v = jnp.ones(SHAPE)
    assert spectra.along(plain, v) == pytest.approx(matrix.sum() / 40)


def test_they_compose_with_jit_and_vmap(like):
    """Two operators at a time give what each gives by itself."""
    matrices = jnp.stack([dense(np.linspace(-i, 4, 40), seed=i)[0] for i in (1, 2)])

    def examined(matrix):
        one = operator(matrix)
        pairs = spectra.eigenpairs(one, like, 2, depth=10, key=KEY)
        density = spectra.spectral_density(one, like, depth=5, probes=2, key=KEY)
        return pairs, density, spectra.moments(one, like, probes=3, key=KEY)

    together = jax.jit(jax.vmap(examined))(matrices)
    for i, matrix in enumerate(matrices):
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(examined(matrix)), strict=True):
            np.testing.assert_allclose(np.abs(a[i]), np.abs(b), rtol=1e-8, atol=1e-8)


def test_density_has_the_moments_of_the_spectrum(spread, like):
    values, matrix, _ = spread
    density = spectra.spectral_density(operator(matrix), like, depth=12, probes=200, key=KEY)
    np.testing.assert_allclose(density.weights.sum(-1), 1)
    assert density.weights.shape == density.nodes.shape == (200, 12)
    probes = np.random.default_rng(0)
    for power in (1, 2, 3, 4):
        signs = probes.choice([-1.0, 1.0], (2000, 40))
        each = np.einsum("pi,ij,pj->p", signs, np.linalg.matrix_power(matrix, power), signs) / 40
        # Gauss quadrature of 12 nodes is exact up to power 23; what is left is the noise of 200
        # probes, four standard errors
        assert abs(density.moment(power) - (values**power).mean()) < 4 * each.std() / 200**0.5


def test_smoothed_density_is_one_in_all_and_sits_on_the_eigenvalues(spread, like):
    values, matrix, _ = spread
    density = spectra.spectral_density(
        operator(matrix), like, depth=30, probes=400, key=KEY, driver="fori"
    )
    points = jnp.linspace(-12, 12, 2401)
    smooth = density.at(points, 0.5)
    np.testing.assert_allclose(jnp.trapezoid(smooth, points), 1, atol=1e-6)
    true = np.exp(-0.5 * ((points[:, None] - values) / 0.5) ** 2).mean(1) / (
        0.5 * np.sqrt(2 * np.pi)
    )
    # a spike of one in forty eigenvalues is seen by 400 probes to within a tenth
    np.testing.assert_allclose(smooth, true, atol=0.1 * true.max())


def test_moments_lie_within_their_errors(spread, like):
    values, matrix, _ = spread
    sums = spectra.moments(operator(matrix), like, probes=300, key=KEY)
    true = (values.sum(), (values**2).sum() ** 0.5, (values**2).sum() ** 2 / (values**4).sum())
    for estimate, value in zip(sums, true, strict=True):
        assert abs(estimate.value - value) < 4 * estimate.error
        assert 0 < estimate.error < 0.2 * abs(value)


def test_errors_are_those_of_repeated_estimates(spread, like):
    """The jackknife's error is the scatter of the estimate over other keys."""
    _, matrix, _ = spread
    runs = [
        spectra.moments(operator(matrix), like, probes=32, key=jax.random.key(i)) for i in range(60)
    ]
    for i in range(3):
        scatter = np.std([run[i].value for run in runs])
        # the standard deviation of 60 numbers is known to a tenth, errors from 32 probes to a tenth
        np.testing.assert_allclose(np.mean([run[i].error for run in runs]), scatter, rtol=0.4)


def test_equal_eigenvalues_have_no_error(like):
    sums = spectra.moments(Partial(lambda v: -3 * v), like, probes=2, key=KEY)
    np.testing.assert_allclose([one.value for one in sums], [-120, 3 * 40**0.5, 40])
    np.testing.assert_allclose([one.error for one in sums], 0, atol=1e-9)


def test_one_probe_has_no_error(like):
    with pytest.raises(ValueError, match="probes = 1 must be 2 or more"):
        spectra.moments(Partial(lambda v: v), like, probes=1, key=KEY)


def test_probes_do_not_depend_on_their_number(spread, like):
    _, matrix, _ = spread
    few, many = (
        spectra.spectral_density(operator(matrix), like, depth=3, probes=n, key=KEY) for n in (2, 4)
    )
    np.testing.assert_array_equal(few.nodes, many.nodes[:2])


@pytest.mark.parametrize("rows", [12, 60])
def test_singular_values_are_those_of_dense_algebra(like, rows):
    matrix = np.random.default_rng(1).standard_normal((rows, 40))
    linear = Partial(lambda m, v: m @ v.ravel(), jnp.asarray(matrix))
    pairs = spectra.singular_values(linear, like, 2, depth=30, key=KEY)
    _, values, right = np.linalg.svd(matrix)
    np.testing.assert_allclose(pairs.values, values[:2], rtol=1e-6)
    overlaps = np.abs(pairs.vectors.reshape(2, -1) @ right[:2].T)
    np.testing.assert_allclose(overlaps, np.eye(2), atol=1e-3)
    v = np.random.default_rng(2).standard_normal(SHAPE)
    np.testing.assert_allclose(
        spectra.gram(linear)(v).ravel(), matrix.T @ (matrix @ v.ravel()), rtol=1e-9
    )


def test_float32_images_of_half_precision_have_float32_spectra():
    pairs = spectra.eigenpairs(
        Partial(lambda v: 2 * v), jnp.zeros(SHAPE, jnp.bfloat16), 1, depth=2, key=KEY
    )
    assert pairs.values.dtype == pairs.vectors.dtype == jnp.float32


def test_matfree_finds_the_same_values(spread, like):
    matfree = pytest.importorskip("matfree")
    from matfree import decomp, eig

    assert matfree
    _, matrix, _ = spread
    own = spectra.eigenpairs(operator(matrix), like, 3, depth=25, key=KEY)
    tridiagonal = decomp.tridiag_sym(25, reortho="full", materialize=True)
    values, _ = eig.eigh_partial(tridiagonal)(
        lambda v: jnp.asarray(matrix) @ v, jax.random.normal(KEY, (40,))
    )
    largest = values[jnp.argsort(-jnp.abs(values))[:3]]
    np.testing.assert_allclose(own.values, largest, rtol=1e-8)
