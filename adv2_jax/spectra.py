"""Spectra of symmetric linear operators that are known only by their products with vectors.

An operator maps an image-shaped array v to H v of the same shape. Those of `curvature` are pytrees
too, so that one compiled program serves the operators of all images. On CPU the host drives the
products one by one; under `jit` and `vmap`, and on accelerators, a loop is one program (see
`descent.drive`). Inner products are taken at the highest precision.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from adv2_jax.descent import Driver, by_host
from adv2_jax.precision import at_least_float32, highest

Operator = Callable[[Array], Array]


class Eigenpairs(NamedTuple):
    """Some eigenpairs of an operator, sorted by decreasing absolute eigenvalue.

    Attributes:
        values: [k].
        vectors: [k, ...], of unit norm; zeros where the operator has fewer than k that can be
            reached from the start.
        residuals: [k], norms of H v - λ v, in the units of `values`.
        products: [] int32, the number of products that were of use, at most the depth.
    """

    values: Array
    vectors: Array
    residuals: Array
    products: Array


class Estimate(NamedTuple):
    """A number estimated from random probes, [], and its standard error, []."""

    value: Array
    error: Array


class Moments(NamedTuple):
    """Sums over all eigenvalues λ of an operator.

    Attributes:
        trace: Σ λ.
        frobenius: √Σ λ².
        effective_rank: (Σ λ²)² / Σ λ⁴, the number of eigenvalues that matter: r if r of them have
            one size and the others are 0.
    """

    trace: Estimate
    frobenius: Estimate
    effective_rank: Estimate


class Density(NamedTuple):
    """A spectral density, as points with weights; it says where eigenvalues are, not which.

    Attributes:
        nodes: [probes, depth].
        weights: [probes, depth], those of each probe sum to 1.
    """

    nodes: Array
    weights: Array

    def at(self, points: Array, width: float | Array) -> Array:
        """Return the density at some points, each node spread to a Gaussian: [n] -> [n].

        Args:
            points: [n], in the units of the eigenvalues.
            width: standard deviation of the Gaussians, in the same units.
        """
        offsets = (points[:, None, None] - self.nodes) / width
        return (self.weights * jax.scipy.stats.norm.pdf(offsets)).sum(-1).mean(-1) / width

    def moment(self, power: int) -> Array:
        """Return the mean of λ^power over all eigenvalues, []."""
        return (self.weights * self.nodes**power).sum(-1).mean()


class _Lanczos(NamedTuple):
    """The state of Lanczos' method at depth n on operators of D numbers.

    Attributes:
        basis: [n + 1, D], orthonormal rows; zeros from a breakdown on.
        diagonal: [n] of the tridiagonal matrix.
        beside: [n], entries beside the diagonal; the last one leads out of the matrix.
    """

    basis: Array
    diagonal: Array
    beside: Array


def eigenpairs(
    operator: Operator, like: Array, k: int, *, depth: int, key: Array, driver: Driver = "auto"
) -> Eigenpairs:
    """Return the k eigenpairs of largest absolute value, by Lanczos' method.

    With full reorthogonalisation (Golub & Van Loan, §10.3). The values at both ends of the spectrum
    converge first; the residuals say how far. Costs `depth` products, and `depth` times the memory
    of an image.

    Args:
        operator: symmetric, [...] -> [...].
        like: [...], an array of the shape and type of its argument; values do not matter.
        k: number of pairs, at most the depth.
        depth: number of products. It ends early, at zeros, where the start lies in an invariant
            subspace; so a zero operator gives zeros.
        key: of the random start.
        driver: see `descent.drive`.

    Raises:
        ValueError: if not 1 <= k <= depth.
    """
    if not 1 <= k <= depth:
        raise ValueError(f"k = {k} must lie in 1..depth = {depth}")
    # Gaussian, not signs: every direction alike, so that no eigenvector is missed for its shape
    start = jax.random.normal(key, like.shape, at_least_float32(like).dtype)
    return _largest(_lanczos(_pytree(operator), start, depth, driver), k, like.shape)


def gram(linear: Operator) -> Operator:
    """Return JᵀJ of a linear map J from images to any other array; a product costs one of each."""
    return Partial(_gram, _pytree(linear))


@jax.jit
@highest
def _gram(linear: Operator, v: Array) -> Array:
    return jax.linear_transpose(linear, v)(linear(v))[0]


def singular_values(
    linear: Operator, like: Array, k: int, *, depth: int, key: Array, driver: Driver = "auto"
) -> Eigenpairs:
    """Return the k largest singular values σ of a linear map J, with right singular vectors v.

    They are the roots of the eigenvalues of JᵀJ; the residuals are ‖JᵀJ v - σ² v‖ / σ.

    Args:
        linear: [...] -> any shape.
        like, k, depth, key, driver: as for `eigenpairs`.
    """
    pairs = eigenpairs(gram(linear), like, k, depth=depth, key=key, driver=driver)
    # JᵀJ has no eigenvalue below 0 but by rounding
    sigma = jnp.sqrt(jnp.maximum(pairs.values, 0))
    residuals = jnp.where(sigma > 0, pairs.residuals / jnp.where(sigma > 0, sigma, 1), 0)
    return pairs._replace(values=sigma, residuals=residuals)


def spectral_density(
    operator: Operator, like: Array, *, depth: int, probes: int, key: Array, driver: Driver = "auto"
) -> Density:
    """Return the density of the eigenvalues, by stochastic Lanczos quadrature.

    (Golub & Meurant; Ghorbani, Krishnan & Xiao 2019 for networks.) Costs `probes` times `depth`
    products.

    Args:
        operator, like, depth, driver: as for `eigenpairs`.
        probes: number of random starts, 1 or more.
        key: of the starts.
    """

    def one(operator: Operator, start: Array) -> Density:
        return _quadrature(_lanczos(operator, start, depth, driver))

    density: Density = _for_each_probe(one, _pytree(operator), like, probes, key, driver)
    return density


def moments(
    operator: Operator, like: Array, *, probes: int, key: Array, driver: Driver = "auto"
) -> Moments:
    """Return trace, Frobenius norm and effective rank, by Hutchinson's random probes.

    E[v·Hv] = tr H, E‖Hv‖² = ‖H‖_F² and E‖HHv‖² = tr H⁴ for independent random signs v. Standard
    errors are those of the jackknife over the probes. Costs two products a probe.

    Args:
        operator, like, driver: as for `eigenpairs`.
        probes: number of random vectors, 2 or more.
        key: of them.

    Raises:
        ValueError: for fewer than 2 probes, which give no error.
    """
    if probes < 2:
        raise ValueError(f"probes = {probes} must be 2 or more: one gives no standard error")
    return _moments(_for_each_probe(_powers, _pytree(operator), like, probes, key, driver))


def along(operator: Operator, direction: Array) -> Array:
    """Return v·Hv / ‖v‖², the curvature along a direction: [...] -> []; one product."""
    return _along(_pytree(operator), direction)


@jax.jit
@highest
def _along(operator: Operator, v: Array) -> Array:
    return _dot(v, operator(v)) / _dot(v, v)


def _dot(a: Array, b: Array) -> Array:
    return jnp.vdot(at_least_float32(a), at_least_float32(b))


def _pytree(operator: Operator) -> Operator:
    """Return the operator as a pytree; a plain function becomes one without leaves."""
    return operator if isinstance(operator, Partial) else Partial(operator)


def _for_each_probe(
    function: Callable[[Operator, Array], Any],
    operator: Operator,
    like: Array,
    probes: int,
    key: Array,
    driver: Driver,
) -> Any:
    """Return the results of a function of (operator, random signs), stacked over the probes."""
    dtype = at_least_float32(like).dtype
    # the key of a probe does not depend on how many there are
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(probes))

    def one(key: Array) -> Any:
        # signs: of all independent entries of unit variance they give the trace the least variance
        return function(operator, jax.random.rademacher(key, like.shape, dtype))

    if by_host(driver, (operator, like, key)):
        return jax.tree.map(lambda *each: jnp.stack(each), *map(one, keys))
    return jax.lax.map(one, keys)


@jax.jit
@highest
def _powers(operator: Operator, v: Array) -> Array:
    """Return v·Hv, ‖Hv‖² and ‖HHv‖², [3]."""
    once = operator(v)
    twice = operator(once)
    return jnp.stack([_dot(v, once), _dot(once, once), _dot(twice, twice)])


@jax.jit
def _moments(powers: Array) -> Moments:
    n = len(powers)

    def statistics(means: Array) -> Array:
        trace, squares, fourth = means
        # double where, as in `maps.min_max`: the zero operator has rank 0
        rank = jnp.where(fourth > 0, squares**2 / jnp.where(fourth > 0, fourth, 1), 0)
        return jnp.stack([trace, jnp.sqrt(squares), rank])

    left_out = jax.vmap(statistics)((powers.sum(0) - powers) / (n - 1))
    # jackknife, since root and ratio are no means: (n-1)/n times the sum of squares about the mean
    errors = jnp.sqrt((n - 1) * left_out.var(0))
    return Moments(*map(Estimate, statistics(powers.mean(0)), errors))


def _lanczos(operator: Operator, start: Array, depth: int, driver: Driver) -> _Lanczos:
    """Return the state after `depth` products, or as many as the space has dimensions."""
    n = min(depth, start.size)
    state = _begin(start, n)
    if by_host(driver, (operator, start)):
        for i in range(n):
            state = _advance(operator, state, np.int32(i), start.shape)
        return state
    return jax.lax.fori_loop(
        0, n, lambda i, state: _advance(operator, state, i, start.shape), state
    )


@partial(jax.jit, static_argnames="n")
def _begin(start: Array, n: int) -> _Lanczos:
    flat = start.ravel()
    basis = jnp.zeros((n + 1, flat.size), flat.dtype).at[0].set(flat / jnp.linalg.norm(flat))
    return _Lanczos(basis, *jnp.zeros((2, n), flat.dtype))


@partial(jax.jit, static_argnames="shape")
@highest
def _advance(operator: Operator, state: _Lanczos, i: Any, shape: tuple[int, ...]) -> _Lanczos:
    """Take one step of Lanczos' method: one product, and a new row of the basis."""
    basis, diagonal, beside = state
    q = basis[i]
    w = at_least_float32(operator(q.reshape(shape))).ravel()
    diagonal = diagonal.at[i].set(q @ w)
    # against all rows, not only the last two, or eigenvalues that converged return as copies;
    # twice, because the first pass leaves rounding errors of its own ("twice is enough", Parlett)
    for _ in range(2):
        w -= (basis @ w) @ basis
    length = jnp.linalg.norm(w)
    # what is left after two passes is a few roundings long where the Krylov space is exhausted
    scale = jnp.maximum(jnp.abs(diagonal).max(), beside.max())
    broken = length <= 32 * jnp.finfo(w.dtype).eps * scale
    length = jnp.where(broken, 0, length)
    basis = basis.at[i + 1].set(jnp.where(broken, 0, w / jnp.where(broken, 1, length)))
    return _Lanczos(basis, diagonal, beside.at[i].set(length))


def _ritz(state: _Lanczos) -> tuple[Array, Array]:
    """Return eigenvalues [n] and eigenvectors [n, n], in columns, of the tridiagonal matrix."""
    beside = state.beside[:-1]
    matrix = jnp.diag(state.diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1)
    return jnp.linalg.eigh(matrix)


@partial(jax.jit, static_argnames=("k", "shape"))
@highest
def _largest(state: _Lanczos, k: int, shape: tuple[int, ...]) -> Eigenpairs:
    values, vectors = _ritz(state)
    # a space of fewer than k dimensions has fewer values
    order = jnp.argsort(-jnp.abs(values))[:k]
    values, vectors = values[order], vectors[:, order]
    return Eigenpairs(
        values,
        (vectors.T @ state.basis[:-1]).reshape(-1, *shape),
        jnp.abs(state.beside[-1] * vectors[-1]),
        (jnp.linalg.norm(state.basis[:-1], axis=1) > 0).sum(),
    )


@jax.jit
@highest
def _quadrature(state: _Lanczos) -> Density:
    values, vectors = _ritz(state)
    return Density(values, vectors[0] ** 2)
