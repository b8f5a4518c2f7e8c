"""Maps from gradients averaged over many images: Integrated Gradients and SmoothGrad.

The images lie on the path from a baseline to the image, or around the image. An attack that went
through all of them could afford few steps. Its surrogate therefore draws a few of them anew at each
step, and remembers the mean gradient of the steps before (`_running`).
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from adv2_jax.activations import relu_curved
from adv2_jax.capabilities import logits_of
from adv2_jax.interpreters.base import Context, Interpreter, Seen, interpreter_factory
from adv2_jax.interpreters.gradients import attribution_map, input_gradient
from adv2_jax.losses import log_odds
from adv2_jax.options import bind
from adv2_jax.types import Activation, Classifier, Image, Label, Map, Score

AT_ONCE = 4  # images of `mean_gradient` in memory; a GPU is busy with these times the batch
DECAY = 0.9  # of the running mean of an attack, in a step


def mean_gradient(
    model: Classifier,
    images: Array,
    label: Label,
    *,
    act: Activation | None = None,
    score: Score = log_odds,
) -> Array:
    """Return the mean of `input_gradient` over images, a few at a time: [n, H, W, 3] -> [H, W, 3].

    A backward pass through more than `AT_ONCE` takes each gradient a second time, so that it needs
    no more memory either.
    """

    def gradients(group: Array) -> Array:
        return jax.vmap(lambda x: input_gradient(model, x, label, act=act, score=score)[0])(group)

    n = len(images)
    if n <= AT_ONCE:
        return gradients(images).mean(axis=0)
    groups = images.reshape(-1, math.gcd(n, AT_ONCE), *images.shape[1:])
    total, _ = jax.lax.scan(
        jax.checkpoint(lambda total, group: (total + gradients(group).sum(axis=0), None)),
        jnp.zeros_like(images[0]),
        groups,
        # XLA:CPU compiles convolutions inside loops to code that is 7 times slower (issue 12868)
        unroll=jax.default_backend() == "cpu",
    )
    return total / n


def integrated_gradients(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    act: Activation | None = None,
    pool: int | None = None,
    score: Score = log_odds,
    baseline: float = 0.0,
    points: int = 16,
) -> Map:
    """Return the map of Integrated Gradients (Sundararajan et al. 2017).

    The attribution (x - x') ∫ ∂s/∂x (x' + a (x - x')) da over a in [0, 1], x' the baseline, by the
    midpoint rule. It is complete: its sum tends to s(x) - s(x') as the points increase. The score s
    is the log-odds; unlike GRAD, other scores give other maps, since their gradients differ along
    the path by factors that are not constant.

    Args:
        model: the classifier.
        image: x, [H, W, 3] in [0, 1].
        label: [] the class c the map explains.
        act: replaces every ReLU.
        pool: as in `grad`.
        score: (logits, label) -> [].
        baseline: x', the same value for all pixels and colours; 0 is black.
        points: of the path, each one gradient.

    Returns:
        [H/pool, W/pool] in [0, 1].
    """
    attribution = path_attribution(
        model, image, label, act=act, score=score, baseline=baseline, points=points
    )
    return attribution_map(attribution, pool)


def path_attribution(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    act: Activation | None = None,
    score: Score = log_odds,
    baseline: float = 0.0,
    points: int = 16,
) -> Array:
    """Return the attribution of `integrated_gradients`, with its signs, [H, W, 3]."""
    middles = jnp.full(points, 0.5, image.dtype)
    images = _on_path(image, middles, baseline=baseline)
    return (image - baseline) * mean_gradient(model, images, label, act=act, score=score)


def _on_path(image: Image, offsets: Array, *, baseline: float) -> Array:
    """Return a point of each of n equal parts of the path: offsets [n] in [0, 1]."""
    n = len(offsets)
    shares = (jnp.arange(n, dtype=image.dtype) + offsets) / n
    return baseline + shares[:, None, None, None] * (image - baseline)[None]


def smooth_grad(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    act: Activation | None = None,
    pool: int | None = None,
    score: Score = log_odds,
    noise: float = 0.1,
    samples: int = 16,
    seed: int = 0,
) -> Map:
    """Return the map of SmoothGrad: GRAD of the mean gradient under noise (Smilkov et al. 2017).

    Args:
        model: the classifier.
        image: [H, W, 3] in [0, 1].
        label: [] the class c the map explains.
        act: replaces every ReLU.
        pool: as in `grad`.
        score: (logits, label) -> []; that of other scores is another map, as for
            `integrated_gradients`.
        noise: standard deviation of the Gaussian noise, as a share of the range of pixel values,
            which is 1. Noisy images are not clipped.
        samples: noisy images, each one gradient.
        seed: of the noise, the same for all images.

    Returns:
        [H/pool, W/pool] in [0, 1].
    """
    images = _around(image, jax.random.key(seed), noise=noise, n=samples)
    return attribution_map(mean_gradient(model, images, label, act=act, score=score), pool)


def _around(image: Image, key: Array, *, noise: float, n: int) -> Array:
    """Return n noisy images, [n, H, W, 3]."""
    return image[None] + noise * jax.random.normal(key, (n, *image.shape), image.dtype)


@interpreter_factory
def integrated_gradients_interpreter(
    *,
    pool: int | None = None,
    score: Score = log_odds,
    baseline: float = 0.0,
    points: int = 16,
    draws: int = 2,
) -> Interpreter:
    """Integrated Gradients, attacked through a few points of the path, drawn anew at each step.

    Args:
        pool, score, baseline, points: options of the explained map, as in `integrated_gradients`.
        draws: points of the surrogate in a step, one in each of as many equal parts of the path.

    Returns:
        An interpreter; equal options give the same object.

    Raises:
        ValueError: names the option that is out of its range.
    """
    _check_whole(points=points, draws=draws)
    options = {"pool": pool, "score": score, "baseline": baseline}
    return Interpreter(
        "integrated_gradients",
        bind(integrated_gradients, **options, points=points),
        bind(_drawn_from_path, **options, draws=draws),
        faithful=False,
        init=_no_gradient,
        needs=("act",),
    )


@interpreter_factory
def smooth_grad_interpreter(
    *,
    pool: int | None = None,
    score: Score = log_odds,
    noise: float = 0.1,
    samples: int = 16,
    seed: int = 0,
    draws: int = 4,
    fresh: bool = False,
) -> Interpreter:
    """SmoothGrad, attacked through some of its noisy images, drawn anew at each step.

    Args:
        pool, score, noise, samples, seed: options of the explained map, as in `smooth_grad`.
        draws: noisy images of the surrogate in a step, at most `samples`.
        fresh: draw new noise at each step. The adversary then does not use the noise that is
            explained, except to compare its iterates.

    Returns:
        An interpreter; equal options give the same object.

    Raises:
        ValueError: names the option that is out of its range.
    """
    _check_whole(samples=samples, draws=draws)
    if draws > samples:
        raise ValueError(f"draws = {draws} must be at most samples = {samples}")
    options = {"pool": pool, "score": score, "noise": noise, "samples": samples, "seed": seed}
    return Interpreter(
        "smooth_grad",
        bind(smooth_grad, **options),
        bind(_drawn_around, **options, draws=draws, fresh=fresh),
        faithful=False,
        init=_no_gradient,
        needs=("act",),
    )


def _check_whole(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"{name} = {value} must be 1 or more")


def _no_gradient(model: Classifier, image: Image) -> Array:
    """Return the memory of the surrogates before the first step, which replaces it whole."""
    return jnp.zeros_like(image)


def _drawn_from_path(
    model: Classifier,
    image: Image,
    label: Label,
    context: Context,
    *,
    pool: int | None,
    score: Score,
    baseline: float,
    draws: int,
) -> Seen:
    # any points: those of the midpoint rule alone led the attack to no closer map
    offsets = jax.random.uniform(_key(context), (draws,), image.dtype)
    images = _on_path(image, offsets, baseline=baseline)
    gradient, memory = _running(model, images, label, context, score)
    m = attribution_map((image - baseline) * gradient, pool)
    return Seen(logits_of(model, image), m, memory=memory)


def _drawn_around(
    model: Classifier,
    image: Image,
    label: Label,
    context: Context,
    *,
    pool: int | None,
    score: Score,
    noise: float,
    samples: int,
    seed: int,
    draws: int,
    fresh: bool,
) -> Seen:
    key = _key(context)
    if fresh:
        images = _around(image, key, noise=noise, n=draws)
    else:
        # of the noise that is explained: the maps of two seeds differ more than an attack may leave
        chosen = jax.random.choice(key, samples, (draws,), replace=False)
        images = _around(image, jax.random.key(seed), noise=noise, n=samples)[chosen]
    gradient, memory = _running(model, images, label, context, score)
    return Seen(logits_of(model, image), attribution_map(gradient, pool), memory=memory)


def _key(context: Context) -> Array:
    """Return the key of this step; without one all images draw the same."""
    if context.key is not None:
        return context.key
    return jax.random.fold_in(jax.random.key(0), context.step)


def _running(
    model: Classifier, images: Array, label: Label, context: Context, score: Score
) -> tuple[Array, Array | None]:
    """Return the mean gradient over all steps, differentiated in this one; and the next memory.

    Few images draw a map that is mostly noise; its absolute values and its largest entry are then
    far from those of the explained map. An image moves little in a step, so gradients of the steps
    before still serve as values, at no cost.
    """
    act = lambda z: relu_curved(z, context.tau)  # noqa: E731
    gradient = mean_gradient(model, images, label, act=act, score=score)
    if context.memory is None:
        # outside of an attack, as in `curvature.map_jacobian`
        return gradient, None
    # a plain mean at first, then one that forgets
    share = jnp.maximum(1 - DECAY, 1 / (jnp.asarray(context.step, gradient.dtype) + 1))
    mean = context.memory + share * (jax.lax.stop_gradient(gradient) - context.memory)
    # the value of the mean with the derivative of all of the gradient
    return gradient + jax.lax.stop_gradient(mean - gradient), mean
