"""Threat models as data: what the adversary may change, as functions on one image.

An attack optimises parameters; a threat model says where they start, which image they make, how
they are projected onto the allowed set, what they cost and which way is down. Factories are
memoised, so equal options give the same object.

The result is an 8-bit image. The radius of a ball is a promise about that image: `round` stays
inside the ball.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.scipy.ndimage import map_coordinates

from adv2_jax.options import bind, shared, shown
from adv2_jax.types import Image

Params = Any
Transformation = Callable[[], optax.GradientTransformation]

PIXEL = 1 / 255
BISECTIONS = 12  # so `l2` knows its shrinking factor to 2^-12
SHIFT = 0.2  # pixels, of random flows; attacks by `flow` move CIFAR-10 images by .16 to .25
# offsets of the diagonal neighbours in an image that is padded by one pixel
DIAGONALS = ((0, 0), (0, 2), (2, 0), (2, 2))


def no_penalty(params: Params) -> Array:
    """Return 0, the penalty of a threat model that has none."""
    return jnp.zeros(())


def nearest(x: Image, params: Params, image: Image) -> Image:
    """Return the nearest image with values k/255, by NumPy or jax.numpy, in the dtype of x."""
    return x.__array_namespace__().round(x * 255) / 255


def accept(image: np.ndarray) -> None:
    """Accept any benign image."""


class Threat(NamedTuple):
    """A threat model: the changes of one image that an adversary may make.

    Attributes:
        name: as in results.
        init: image [H, W, 3] -> parameters (any pytree) of the unchanged image.
        apply: (parameters, image) -> adversarial image in [0, 1].
        project: (parameters, image) -> allowed parameters near them.
        penalty: parameters -> [], added to every loss. Its gradient must be finite, also at the
            start.
        steepest: makes the optax transformation from gradients (or their running sum) to step
            directions. Step sizes are in pixel values, as for `linf`; a threat model with another
            unit scales to it here.
        optimiser: the same for steps without momentum, plain PGD included; may have a state of its
            own (Adam). None is `steepest`.
        stride: length of a step by Adam at a step size of one pixel value (`Options.second_moment`);
            None steps by `steepest` there too.
        displacement: parameters -> flow [H, W, 2] in pixels, for threat models that have one.
        round: (x, parameters, benign image) -> the nearest *allowed* image to x = apply(parameters,
            image) with values k/255. It gets JAX arrays in the loop, and float64 NumPy arrays for
            the image that is returned.
        check: raises a ValueError for a benign image, float64 [H, W, 3], that has no allowed 8-bit
            image.
        noise: (PRNG key, image) -> random parameters whose change is in [0, 1] and, once rounded by
            `round`, as large as is allowed: a control beside attacks. Runs have none without it.
    """

    name: str
    init: Callable[[Image], Params]
    apply: Callable[[Params, Image], Image]
    project: Callable[[Params, Image], Params]
    penalty: Callable[[Params], Array] = no_penalty
    steepest: Transformation = optax.scale_by_sign
    optimiser: Transformation | None = None
    stride: float | None = None
    displacement: Callable[[Params], Array] | None = None
    round: Callable[[Image, Params, Image], Image] = nearest
    check: Callable[[np.ndarray], None] = accept
    noise: Callable[[Array, Image], Params] | None = None

    def __repr__(self) -> str:
        return shown(self)


@shared
def linf(epsilon: float = 8 / 255) -> Threat:
    """Return the threat model || x - x° ||_inf <= epsilon with x in [0, 1] (ADV² eq. 4).

    It holds for the float image and for the 8-bit image that is returned.

    Args:
        epsilon: radius in units of pixel value, in [1/255, 1]. The paper uses 8/255. An 8-bit image
            changes by whole grey levels: the 0.031 of the released code is 7.9 levels and allows 7.

    Raises:
        ValueError: if epsilon is outside [1/255, 1].
    """
    _check_radius(epsilon, epsilon <= 1, "lie in [1/255, 1]")

    return Threat(
        "linf",
        jnp.zeros_like,
        operator.add,
        bind(_into_box, epsilon=epsilon),
        # an eighth of the radius: at 8/255 a step size of one pixel value is one
        stride=epsilon / 8,
        round=bind(_round_in_box, epsilon=epsilon),
        noise=bind(_random_signs, epsilon=epsilon),
    )


def _into_box(delta: Array, image: Image, *, epsilon: float) -> Array:
    low, high = jnp.maximum(-epsilon, -image), jnp.minimum(epsilon, 1 - image)
    return optax.projections.projection_box(delta, low, high)


def _random_signs(key: Array, image: Image, *, epsilon: float) -> Array:
    signs = jax.random.rademacher(key, image.shape, image.dtype)
    return _into_box(epsilon * signs, image, epsilon=epsilon)


def _round_in_box(x: Image, params: Params, image: Image, *, epsilon: float) -> Image:
    xp = x.__array_namespace__()
    # On the 8-bit grid (image ± epsilon) * 255 is a whole number up to rounding errors; ceil and
    # floor would lose a level to them. Products stay below 510, so 2048 eps covers a few roundings
    slack = 2048 * xp.finfo(x.dtype).eps
    low, high = xp.ceil((image - epsilon) * 255 - slack), xp.floor((image + epsilon) * 255 + slack)
    return xp.clip(xp.round(x * 255), xp.maximum(low, 0), xp.minimum(high, 255)) / 255


def _check_radius(epsilon: float, below_limit: bool, allowed: str) -> None:
    # 1e-9: 1/255 may be written in decimals
    if not (below_limit and epsilon >= PIXEL * (1 - 1e-9)):
        raise ValueError(
            f"epsilon = {epsilon} must {allowed}, in units of pixel value (8/255 = 0.0314): "
            "a change below 1/255 is lost when an image is rounded to 8 bits"
        )


@shared
def l2(epsilon: float = 0.5) -> Threat:
    """Return the threat model || x - x° ||_2 <= epsilon with x in [0, 1].

    It holds for the float image and for the 8-bit image that is returned. `project` clips to
    [0, 1], then shrinks the change into the ball: the box is convex and contains the benign image,
    so the shrunk change stays in it. (It is not the Euclidean projection on the intersection.)
    `round` shrinks the change, by bisection, until its rounded image is in the ball. Steps go along
    the normalised gradient.

    Args:
        epsilon: radius in units of pixel value, 1/255 or more.

    Raises:
        ValueError: if epsilon is below 1/255 or not finite.
    """
    _check_radius(epsilon, epsilon < float("inf"), "be a finite number, 1/255 or more")

    return Threat(
        "l2",
        jnp.zeros_like,
        operator.add,
        bind(_into_ball, epsilon=epsilon),
        # a step of one pixel value is a quarter of the radius long
        steepest=bind(_scaled, direction=optax.normalize_by_update_norm, length=epsilon / 4),
        round=bind(_round_in_ball, epsilon=epsilon),
        check=bind(_check_near_grid, epsilon=epsilon),
        noise=bind(_random_direction, epsilon=epsilon),
    )


def _into_ball(delta: Array, image: Image, *, epsilon: float) -> Array:
    return optax.projections.projection_l2_ball(
        optax.projections.projection_box(delta, -image, 1 - image), epsilon
    )


def _scaled(*, direction: Transformation, length: float) -> optax.GradientTransformation:
    """Return a direction scaled so that a step size of one pixel value moves by `length`."""
    return optax.chain(direction(), optax.scale(length / PIXEL))


def _round_in_ball(x: Image, params: Params, image: Image, *, epsilon: float) -> Image:
    xp = x.__array_namespace__()
    # the norm below is a rounded sum itself
    radius = epsilon * (1 - 8 * xp.finfo(x.dtype).eps)

    def shrink(factor: Any) -> tuple[Image, Any]:
        rounded = nearest(image + factor * (x - image), params, image)
        return rounded, xp.sqrt(xp.sum((rounded - image) ** 2)) <= radius

    unshrunk, fits = shrink(1)
    low, high = xp.zeros_like(x[0, 0, 0]), xp.ones_like(x[0, 0, 0])
    # each value of the rounded change grows with the factor, so its norm does, and bisection holds
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        inside = shrink(middle)[1]
        low, high = xp.where(inside, middle, low), xp.where(inside, high, middle)
    return xp.where(fits, unshrunk, shrink(low)[0])


def _random_direction(key: Array, image: Image, *, epsilon: float) -> Array:
    """Return a change along a random direction that `round` has to shrink into the ball."""
    direction = jax.random.normal(key, image.shape, image.dtype)
    # spread over all pixels ε may be less than half a level each, and rounded to nothing: at a
    # level each the rounded change is longer than ε, and is shrunk until it just fits
    length = max(2 * epsilon, PIXEL * image.size**0.5)
    delta = direction * (length / jnp.linalg.norm(direction))
    return optax.projections.projection_box(delta, -image, 1 - image)


def _check_near_grid(image: np.ndarray, *, epsilon: float) -> None:
    distance = np.linalg.norm(np.round(image * 255) / 255 - image)
    if distance > epsilon:
        raise ValueError(
            f"the image is {distance:.3g} (L2) away from the nearest 8-bit image, "
            f"more than epsilon = {epsilon}: give 8-bit images or a larger epsilon"
        )


@shared
def flow(penalty: float = 5e-4) -> Threat:
    """Return the threat model that samples x° along a smooth flow (StAdv, Xiao et al. 2018).

    The parameters are the flow [H, W, 2], (dy, dx) in pixels. It starts at zero, where `warp` has a
    gradient, and has no bound, but a penalty where it is not smooth. With momentum a step of 1/255
    moves by .02 pixels along the sign; without, by Adam with amsgrad at learning rate .01, as in
    the released code.

    Args:
        penalty: weight of `flow_penalty`, 0 or more.

    Raises:
        ValueError: if the weight is negative or not finite.
    """
    if not 0 <= penalty < float("inf"):
        raise ValueError(f"penalty = {penalty} must be a finite number, 0 or more")

    return Threat(
        "flow",
        _no_flow,
        apply=_warped,
        project=_same,
        penalty=bind(flow_penalty, weight=penalty),
        # behind momentum the sign finds closer maps than Adam, and smoother flows
        steepest=bind(_scaled, direction=optax.scale_by_sign, length=0.02),
        optimiser=bind(_scaled, direction=optax.scale_by_amsgrad, length=0.01),
        displacement=_same,
        noise=_random_flow,
    )


def _random_flow(key: Array, image: Image) -> Array:
    direction = jax.random.normal(key, (*image.shape[:2], 2), image.dtype)
    return SHIFT * direction / jnp.linalg.norm(direction, axis=-1, keepdims=True)


def _no_flow(image: Image) -> Array:
    return jnp.zeros((*image.shape[:2], 2), image.dtype)


def _warped(flow: Array, image: Image) -> Image:
    return warp(image, flow)


def _same(flow: Array, image: Any = None) -> Array:
    return flow


class FlowDelta(NamedTuple):
    """Parameters of `linf_flow`: a flow [H, W, 2], and a change [H, W, 3] of the warped image."""

    flow: Array
    delta: Array


@shared
def linf_flow(epsilon: float = 8 / 255, penalty: float = 5e-4) -> Threat:
    """Return the threat model of a `flow`, then a change within `linf` of the warped image.

    Args:
        epsilon: as for `linf`.
        penalty: as for `flow`.

    Raises:
        ValueError: as these two.
    """
    ball, warping = linf(epsilon), flow(penalty)
    return Threat(
        "linf+flow",
        _zeros,
        bind(_warp_and_add, ball=ball),
        bind(_project_delta, ball=ball),
        penalty=bind(_of_flow, function=warping.penalty),
        steepest=bind(_partition, flow=warping.steepest, delta=ball.steepest),
        optimiser=bind(_partition, flow=warping.optimiser, delta=ball.steepest),
        displacement=bind(_of_flow, function=warping.displacement),
        round=bind(_round_delta, ball=ball),
        noise=bind(_random_flow_and_delta, ball=ball),
    )


def _random_flow_and_delta(key: Array, image: Image, *, ball: Threat) -> FlowDelta:
    assert ball.noise is not None
    of_flow, of_delta = jax.random.split(key)
    flow = _random_flow(of_flow, image)
    return FlowDelta(flow, ball.noise(of_delta, warp(image, flow)))


def _zeros(image: Image) -> FlowDelta:
    return FlowDelta(_no_flow(image), jnp.zeros_like(image))


def _warp_and_add(params: FlowDelta, image: Image, *, ball: Threat) -> Image:
    return _clip_straight_through(ball.apply(params.delta, warp(image, params.flow)))


def _project_delta(params: FlowDelta, image: Image, *, ball: Threat) -> FlowDelta:
    return params._replace(delta=ball.project(params.delta, warp(image, params.flow)))


def _round_delta(x: Image, params: FlowDelta, image: Image, *, ball: Threat) -> Image:
    # `round` may be called with NumPy arrays, which `warp` does not take as they are
    warped = jax.jit(warp)(*jax.device_put((image, params.flow)))
    return ball.round(x, params.delta, x.__array_namespace__().asarray(warped))


def _of_flow(params: FlowDelta, *, function: Callable[[Array], Array]) -> Array:
    return function(params.flow)


def _partition(*, flow: Transformation, delta: Transformation) -> optax.GradientTransformation:
    return optax.partition({"flow": flow(), "delta": delta()}, FlowDelta._make(FlowDelta._fields))


THREATS: dict[str, Callable[..., Threat]] = {
    "linf": linf,
    "l2": l2,
    "flow": flow,
    "linf+flow": linf_flow,
}


def warp(image: Image, flow: Array) -> Image:
    """Return x(p) = x°(p + flow(p)), bilinear; coordinates are clamped to the image.

    The gradient at a pixel q is the slope towards q + 1, so it is not zero at zero flow. It is zero
    only in the last row (downwards) and the last column (to the right), where the image is constant
    beyond.

    Args:
        image: [H, W, 3] in [0, 1].
        flow: [H, W, 2], (dy, dx) in pixels.

    Returns:
        [H, W, 3] in [0, 1].
    """
    rows, columns = jnp.mgrid[: image.shape[0], : image.shape[1]]
    coordinates = [rows + flow[..., 0], columns + flow[..., 1]]
    warped = jax.vmap(
        lambda channel: map_coordinates(channel, coordinates, order=1, mode="nearest"),
        in_axes=2,
        out_axes=2,
    )(image)
    return _clip_straight_through(warped)


def flow_penalty(flow: Array, weight: float = 1.0) -> Array:
    """Return weight Σ_p Σ_{q in N(p)} √(Δdy² + Δdx² + 1e-8): [H, W, 2] -> [] >= 0.

    N are the four diagonal neighbours, the border repeated: the released code's form of StAdv's
    flow loss.
    """
    h, w, _ = flow.shape
    padded = jnp.pad(flow, ((1, 1), (1, 1), (0, 0)), mode="edge")
    differences = jnp.stack([padded[i : i + h, j : j + w] - flow for i, j in DIAGONALS])
    # 1e-8, as released: the gradient of √ is infinite at 0, where every flow starts
    return weight * jnp.sqrt((differences**2).sum(-1) + 1e-8).sum()


def _clip_straight_through(image: Image) -> Image:
    # float32 sums leave [0, 1] by an ulp; the gradient of a clip would be 0 there
    return image + jax.lax.stop_gradient(jnp.clip(image, 0, 1) - image)
