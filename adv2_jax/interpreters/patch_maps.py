"""Occlusion: how far the class score drops where a grey patch hides the image (black-box).

Zeiler & Fergus 2014, §4.2. Notation: u_p the score with the patch at position p, of n positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adv2_jax import maps
from adv2_jax.capabilities import logits_of
from adv2_jax.interpreters.base import Context, Interpreter, Seen, Solver, interpreter_factory
from adv2_jax.losses import log_odds
from adv2_jax.options import Bound, bind
from adv2_jax.types import Classifier, Image, Label, Map, Score


class Memory(NamedTuple):
    """State of a slow look at all positions, n_h x n_w of them.

    Attributes:
        scores: u_p as they were last computed, [n_h, n_w].
        rows, columns: those that the patch hides, bool [n_h, H], [n_w, W].
        step: [] int32, number of steps taken.
    """

    scores: Array
    rows: Array
    columns: Array
    step: Array


def occlusion(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    patch: int | None = None,
    stride: int | None = None,
    fill: float | None = 0.5,
    score: Score = log_odds,
) -> Map:
    """Return the occlusion map: for each pixel the mean of u - u_p over the patches that hide it.

    The score u of the whole image is the same for all: min-max takes it out, and it is not
    computed. Log-odds do not saturate: the probability of a confident network may not move at all.

    Args:
        model: the classifier; only its logits are asked for, n times.
        image: [H, W, 3] in [0, 1].
        label: [] the class c the map explains.
        patch: side in pixels; None is a quarter of the shorter side.
        stride: pixels from one position to the next; None is half of the patch: 7 x 7 positions on
            a square image whose side 8 divides. The last patch may reach over the border.
        fill: grey level of the patch; None is the mean colour of the image.
        score: (logits, label) -> [].

    Returns:
        [H, W] in [0, 1].

    Raises:
        ValueError: if not 1 <= stride <= patch < shorter side.
    """
    memory = _start(image, patch=patch, stride=stride)
    n = memory.scores.size
    # one position after another: it takes no more memory than a forward pass
    step = bind(_renew, fill=fill, score=score, shares=n)
    return _read(jax.lax.fori_loop(0, n, lambda _, m: step(model, image, label, m), memory))


def _start(image: Image, *, patch: int | None, stride: int | None) -> Memory:
    """Return the memory before the first step: where the patches are, and no scores."""
    short = min(image.shape[:2])
    patch = max(short // 4, 1) if patch is None else patch
    stride = max(patch // 2, 1) if stride is None else stride
    if not 1 <= stride <= patch < short:
        raise ValueError(
            f"stride = {stride} and patch = {patch} must be 1 <= stride <= patch < {short}, "
            "the shorter side of the image"
        )
    # so many positions that the last is the first whose patch reaches the border
    inside = [
        np.arange(side) - np.arange(0, side - patch + stride, stride)[:, None]
        for side in image.shape[:2]
    ]
    rows, columns = (jnp.asarray((one >= 0) & (one < patch)) for one in inside)
    dtype = jnp.promote_types(image.dtype, jnp.float32)
    return Memory(
        jnp.zeros((len(rows), len(columns)), dtype), rows, columns, jnp.zeros((), jnp.int32)
    )


def _renew(
    model: Classifier,
    image: Image,
    label: Label,
    memory: Memory,
    *,
    fill: float | None,
    shares: int,
    score: Score = log_odds,
) -> Memory:
    """Return the memory with the scores of the next n / shares positions, rounded up, computed."""
    scores, rows, columns, step = memory
    size = -(-scores.size // shares)
    # in a fixed disorder, so that the positions of a step lie all over the image
    order = jnp.asarray(np.random.default_rng(0).permutation(scores.size), jnp.int32)
    positions = order[(step * size + jnp.arange(size, dtype=jnp.int32)) % scores.size]
    colour = image.mean(axis=(0, 1), keepdims=True) if fill is None else fill

    def one(position: Array) -> Array:
        hidden = rows[position // len(columns)][:, None] & columns[position % len(columns)][None]
        return score(logits_of(model, jnp.where(hidden[..., None], colour, image)), label)

    # the memory's type: a float64 network must not change it
    computed = jax.vmap(one)(positions).astype(scores.dtype)
    renewed = scores.ravel().at[positions].set(computed).reshape(scores.shape)
    return memory._replace(scores=renewed, step=step + 1)


def _read(memory: Memory) -> Map:
    # over a pixel lie as many patches as over its row, times those over its column
    hides = (one.astype(memory.scores.dtype) for one in (memory.rows, memory.columns))
    rows, columns = (one / one.sum(axis=0, keepdims=True) for one in hides)
    return maps.min_max(rows.T @ -memory.scores @ columns)


@interpreter_factory
def occlusion_interpreter(
    *,
    patch: int | None = None,
    stride: int | None = None,
    fill: float | None = 0.5,
    shares: int = 7,
) -> Interpreter:
    """Occlusion, attacked through the scores of a share of the positions at each step.

    The gradient of the whole map would cost n gradients. An attack remembers all scores instead;
    each step computes those of n / shares positions, and differentiates the map through these
    alone. The explained map, and each comparison of iterates, computes all, share by share.

    Args:
        patch, stride, fill: as in `occlusion`.
        shares: 1 or more; with 1 the map of the attack is exact, at n gradients a step.

    Returns:
        An interpreter; equal options give the same object.

    Raises:
        ValueError: names the option that is out of its range.
    """
    if shares < 1:
        raise ValueError(f"shares = {shares} must be 1 or more")
    renew = bind(_renew, fill=fill, shares=shares)
    return Interpreter(
        "occlusion",
        bind(occlusion, patch=patch, stride=stride, fill=fill),
        bind(_renewed, renew=renew),
        # with more shares the map has scores of earlier images
        faithful=shares == 1,
        solver=Solver(bind(_start, patch=patch, stride=stride), renew, _read, shares),
    )


def _renewed(
    model: Classifier, image: Image, label: Label, context: Context, *, renew: Bound
) -> Seen:
    memory = renew(model, image, label, jax.lax.stop_gradient(context.memory))
    return Seen(logits_of(model, image), _read(memory), memory=jax.lax.stop_gradient(memory))
