"""Threat models as data: what the adversary may change, as functions on one image.

An attack optimises parameters; a threat model says where they start, which image they make, how
they are brought back into the allowed set, what they cost and which way is down. Factories are
cached, so equal options give the same object.

What is delivered is an 8-bit image, so the radius of a ball is promised for that: `round` stays
inside.
"""

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
HALVINGS = 12  # of the interval in which `l2` looks for a factor
# corners of the 3 x 3 window that starts one pixel up and left
DIAGONALS = ((0, 0), (0, 2), (2, 0), (2, 2))


def free(params: Params) -> Array:
    """The penalty of a threat model that has none: 0."""
    return jnp.zeros(())


def nearest(x: Image, params: Params, image: Image) -> Image:
    """The nearest image that an 8-bit file can hold: values k/255; of jax or NumPy, in the type of x."""
    return x.__array_namespace__().round(x * 255) / 255


def any_image(image: np.ndarray) -> None:
    """Nothing to refuse."""


class Threat(NamedTuple):
    """What an adversary may do to one image.

    Attributes:
        name: as in results.
        init: image [H, W, 3] -> parameters (any pytree) of the unchanged image.
        apply: (parameters, image) -> adversarial image in [0, 1].
        project: (parameters, image) -> allowed parameters near them.
        penalty: parameters -> [], added to every loss; its gradient must be finite, at the start
            too.
        steepest: makes the optax transformation from gradients (or their moving sum) to the
            directions that steps go along. Step sizes are in pixel values, as for `linf`; a threat
            model with another unit scales to it here.
        optimiser: the like, with a memory of its own, for steps without momentum, plain PGD among
            them; None is `steepest`.
        displacement: parameters -> flow [H, W, 2] in pixels, where they have one.
        round: (x, parameters, benign image) -> the nearest *allowed* image to x = apply(parameters,
            image) that an 8-bit file can hold, values k/255. Is called with arrays of jax in the
            loop, and with float64 arrays of NumPy for what is delivered.
        check: raises a ValueError for a benign image, float64 [H, W, 3], that has no allowed 8-bit
            image.
    """

    name: str
    init: Callable[[Image], Params]
    apply: Callable[[Params, Image], Image]
    project: Callable[[Params, Image], Params]
    penalty: Callable[[Params], Array] = free
    steepest: Transformation = optax.scale_by_sign
    optimiser: Transformation | None = None
    displacement: Callable[[Params], Array] | None = None
    round: Callable[[Image, Params, Image], Image] = nearest
    check: Callable[[np.ndarray], None] = any_image

    def __repr__(self) -> str:
        return shown(self)


@shared
def linf(epsilon: float = 8 / 255) -> Threat:
    """|| x - x° ||_inf <= epsilon and x in [0, 1] (ADV² eq. 4), for the 8-bit image that is
    delivered too.

    Args:
        epsilon: radius in units of pixel value, in [1/255, 1]. The paper uses 8/255. Of an 8-bit
            image whole levels can be changed: the 0.031 of the released code, 7.9 levels, allows 7.

    Raises:
        ValueError: if epsilon is outside [1/255, 1].
    """
    _check_radius(epsilon, epsilon <= 1, "lie in [1/255, 1]")

    return Threat(
        "linf",
        jnp.zeros_like,
        _add,
        bind(_into_box, epsilon=epsilon),
        round=bind(_round_in_box, epsilon=epsilon),
    )


def _into_box(delta: Array, image: Image, *, epsilon: float) -> Array:
    low, high = jnp.maximum(-epsilon, -image), jnp.minimum(epsilon, 1 - image)
    return optax.projections.projection_box(delta, low, high)


def _round_in_box(x: Image, params: Params, image: Image, *, epsilon: float) -> Image:
    xp = x.__array_namespace__()
    # half-way errors of the products below: without it the bound of an image on the 8-bit grid
    # might fall a level short
    slack = 2048 * xp.finfo(x.dtype).eps
    low, high = xp.ceil((image - epsilon) * 255 - slack), xp.floor((image + epsilon) * 255 + slack)
    return xp.clip(xp.round(x * 255), xp.maximum(low, 0), xp.minimum(high, 255)) / 255


def _check_radius(epsilon: float, holds: bool, allowed: str) -> None:
    if not (holds and epsilon >= PIXEL * (1 - 1e-9)):
        raise ValueError(
            f"epsilon = {epsilon} must {allowed}, in units of pixel value (8/255 = 0.0314): "
            "a change below 1/255 is lost when an image is rounded to 8 bits"
        )


@shared
def l2(epsilon: float = 0.5) -> Threat:
    """|| x - x° ||_2 <= epsilon and x in [0, 1], for the 8-bit image that is delivered too.

    `project` clips to [0, 1], then shrinks the change into the ball: the box is convex and holds
    the benign image, so the shrunk change stays in it. (It is not the Euclidean projection on the
    intersection.) `round` shrinks the change, by bisection, until its rounded image is in the ball.
    Steps go along the normalised gradient; one of 1/255 is a quarter of the radius long.

    Args:
        epsilon: radius in units of pixel value, 1/255 or more.

    Raises:
        ValueError: if epsilon is below 1/255 or not finite.
    """
    _check_radius(epsilon, epsilon < float("inf"), "be a finite number, 1/255 or more")

    functions: dict[str, Callable[..., Any]] = {
        "project": _into_ball,
        "steepest": _along_gradient,
        "round": _round_in_ball,
        "check": _check_near_grid,
    }
    return Threat(
        "l2",
        jnp.zeros_like,
        _add,
        **{field: bind(f, epsilon=epsilon) for field, f in functions.items()},
    )


def _into_ball(delta: Array, image: Image, *, epsilon: float) -> Array:
    return optax.projections.projection_l2_ball(
        optax.projections.projection_box(delta, -image, 1 - image), epsilon
    )


def _along_gradient(*, epsilon: float) -> optax.GradientTransformation:
    return optax.chain(optax.normalize_by_update_norm(), optax.scale(epsilon / 4 / PIXEL))


def _round_in_ball(x: Image, params: Params, image: Image, *, epsilon: float) -> Image:
    xp = x.__array_namespace__()

    def shrunk(share: Any) -> tuple[Image, Any]:
        rounded = nearest(image + share * (x - image), params, image)
        return rounded, xp.sqrt(xp.sum((rounded - image) ** 2)) <= epsilon * (
            1 - 8 * xp.finfo(x.dtype).eps
        )

    whole, fits = shrunk(1)
    low, high = xp.zeros_like(x[0, 0, 0]), xp.ones_like(x[0, 0, 0])
    # each value of the rounded change grows with the share, so its norm does
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        inside = shrunk(middle)[1]
        low, high = xp.where(inside, middle, low), xp.where(inside, high, middle)
    return xp.where(fits, whole, shrunk(low)[0])


def _check_near_grid(image: np.ndarray, *, epsilon: float) -> None:
    distance = np.linalg.norm(np.round(image * 255) / 255 - image)
    if distance > epsilon:
        raise ValueError(
            f"the image is {distance:.3g} (L2) away from the nearest 8-bit image, more than epsilon = {epsilon}: "
            "give 8-bit images or a larger epsilon"
        )


@shared
def flow(penalty: float = 5e-4) -> Threat:
    """x = x° sampled at displaced places, at a price for flows that are not smooth (StAdv, Xiao et
    al. 2018).

    The parameters are the flow [H, W, 2], (dy, dx) in pixels; it is zero at the start, where `warp`
    has a gradient, and unbounded. A step of 1/255 moves by .02 pixels, by the sign; or, without
    momentum, by Adam with amsgrad at the released code's learning rate, .01. Behind momentum the
    sign finds closer maps than Adam, and smoother flows.

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
        project=_as_it_is,
        penalty=bind(_weighted_penalty, weight=penalty),
        steepest=_sign_of_flow,
        optimiser=_adam_of_flow,
        displacement=_as_it_is,
    )


def _no_flow(image: Image) -> Array:
    return jnp.zeros((*image.shape[:2], 2), image.dtype)


def _warped(flow: Array, image: Image) -> Image:
    return warp(image, flow)


def _as_it_is(flow: Array, image: Any = None) -> Array:
    return flow


def _weighted_penalty(flow: Array, *, weight: float) -> Array:
    return weight * flow_penalty(flow)


def _sign_of_flow() -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_sign(), optax.scale(0.02 / PIXEL))


def _adam_of_flow() -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_amsgrad(), optax.scale(0.01 / PIXEL))


class Moved(NamedTuple):
    """Parameters of `linf_flow`: a flow [H, W, 2], and the change [H, W, 3] of what it makes."""

    flow: Array
    delta: Array


@shared
def linf_flow(epsilon: float = 8 / 255, penalty: float = 5e-4) -> Threat:
    """`flow` first, and a change within `linf` of the warped image.

    Args:
        epsilon: as for `linf`.
        penalty: as for `flow`.

    Raises:
        ValueError: as these two.
    """
    ball, moving = linf(epsilon), flow(penalty)
    return Threat(
        "linf+flow",
        _no_move,
        bind(_moved, ball=ball),
        bind(_move_into_box, ball=ball),
        penalty=bind(_of_flow, function=moving.penalty),
        steepest=bind(_partition, flow=moving.steepest, delta=ball.steepest),
        optimiser=bind(_partition, flow=moving.optimiser, delta=ball.steepest),
        displacement=bind(_of_flow, function=moving.displacement),
        round=bind(_round_moved, ball=ball),
    )


def _no_move(image: Image) -> Moved:
    return Moved(_no_flow(image), jnp.zeros_like(image))


def _moved(params: Moved, image: Image, *, ball: Threat) -> Image:
    return _clipped(ball.apply(params.delta, warp(image, params.flow)))


def _move_into_box(params: Moved, image: Image, *, ball: Threat) -> Moved:
    return params._replace(delta=ball.project(params.delta, warp(image, params.flow)))


def _round_moved(x: Image, params: Moved, image: Image, *, ball: Threat) -> Image:
    moved = jax.jit(warp)(*jax.device_put((image, params.flow)))
    return ball.round(x, params.delta, x.__array_namespace__().asarray(moved))


def _of_flow(params: Moved, *, function: Callable[[Array], Array]) -> Array:
    return function(params.flow)


def _partition(*, flow: Transformation, delta: Transformation) -> optax.GradientTransformation:
    return optax.partition({"flow": flow(), "delta": delta()}, Moved._make(Moved._fields))


THREATS: dict[str, Callable[..., Threat]] = {
    "linf": linf,
    "l2": l2,
    "flow": flow,
    "linf+flow": linf_flow,
}


def warp(image: Image, flow: Array) -> Image:
    """x(p) = x°(p + flow(p)), bilinear; coordinates are clamped to the image.

    Between the pixels q and q + 1 the slope is that from q to q + 1, also at q itself: so it is not
    zero at zero flow. It is in the last row (downwards) and the last column (to the right), since
    what is beyond them is the same.

    Args:
        image: [H, W, 3] in [0, 1].
        flow: [H, W, 2], (dy, dx) in pixels.

    Returns:
        [H, W, 3] in [0, 1].
    """
    rows, columns = jnp.mgrid[: image.shape[0], : image.shape[1]]
    places = [rows + flow[..., 0], columns + flow[..., 1]]
    x = jax.vmap(
        lambda channel: map_coordinates(channel, places, order=1, mode="nearest"),
        in_axes=2,
        out_axes=2,
    )(image)
    return _clipped(x)


def flow_penalty(flow: Array) -> Array:
    """Σ_p Σ_{q in N(p)} √(Δdy² + Δdx² + 1e-8), N the four diagonal neighbours, the border repeated:
    [H, W, 2] -> [] > 0.

    The released code's form of StAdv's flow loss. The constant keeps the gradient finite where
    neighbours agree.
    """
    h, w, _ = flow.shape
    padded = jnp.pad(flow, ((1, 1), (1, 1), (0, 0)), mode="edge")
    apart = jnp.stack([padded[i : i + h, j : j + w] - flow for i, j in DIAGONALS])
    return jnp.sqrt((apart**2).sum(-1) + 1e-8).sum()


def _clipped(image: Image) -> Image:
    """The image within [0, 1], which float32 sums leave by a hair; the gradient passes straight through."""
    return image + jax.lax.stop_gradient(jnp.clip(image, 0, 1) - image)


def _add(delta: Array, image: Image) -> Image:
    return image + delta
