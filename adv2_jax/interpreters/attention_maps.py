"""Attention rollout: the map is what flows from each patch to the class token of a transformer.

A network takes part if its `logits` has an option `attend`, which it calls with the attention
[heads, T, T] of each block (`models.VisionTransformer`). Tokens are the class token, then the
patches of a square grid, row by row. Attention is a smooth function of the image, so the surrogates
are the maps themselves.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from adv2_jax import maps
from adv2_jax.interpreters.base import Context, Interpreter, Seen, interpreter_factory
from adv2_jax.precision import at_least_float32
from adv2_jax.types import HasAttention, Image, Label, Logits, Map


def attentions(
    model: HasAttention, image: Image, added: Sequence[Array] | None = None
) -> tuple[Logits, list[Array]]:
    """Return the logits [K] and the attention [heads, T, T] of each block from one pass.

    Args:
        model: the transformer.
        image: [H, W, 3] in [0, 1].
        added: numbers to add to each attention, whose gradient is then that of the attention.
    """
    seen: list[Array] = []

    def attend(attention: Array) -> Array:
        seen.append(attention)
        return attention if added is None else attention + added[len(seen) - 1]

    return at_least_float32(model.logits(image, attend=attend)), seen


def rolled_out(weights: Sequence[Array]) -> Map:
    """Return the class token's row of the product of T x T matrices, over the patches: [h, w]."""
    # only one row is wanted: vector products from the last block backwards
    row = jnp.zeros(len(weights[0])).at[0].set(1.0)
    for matrix in reversed(weights):
        row = row @ matrix
    return maps.min_max(maps.of_tokens(row))


def _rollout(
    model: HasAttention, image: Image, label: Label, context: Context | None = None
) -> Seen:
    logits, seen = attentions(model, image)
    # rows of an attention sum to 1, and so do those of its mean with the identity
    return Seen(logits, rolled_out([(a.mean(0) + jnp.eye(a.shape[-1])) / 2 for a in seen]))


def attention_rollout(model: HasAttention, image: Image, label: Label) -> Map:
    """Return the attention rollout (Abnar & Zuidema 2020, eq. 1): the same for every class.

    The product over blocks of (A + I) / 2, A the mean attention of the heads. Half of the identity
    stands for the residual connection.

    Args:
        model: a transformer with a class token.
        image: [H, W, 3] in [0, 1].
        label: [] not used.

    Returns:
        [h, w] in [0, 1], one entry a patch.
    """
    return _rollout(model, image, label).map


def _gradient_rollout(
    model: HasAttention, image: Image, label: Label, context: Context | None = None
) -> Seen:
    _, shapes = jax.eval_shape(partial(attentions, model), image)
    zeros = [jnp.zeros(a.shape, a.dtype) for a in shapes]

    def score(added: list[Array]) -> tuple[Array, tuple[Logits, list[Array]]]:
        logits, seen = attentions(model, image, added)
        return logits[label], (logits, seen)

    slopes, (logits, seen) = jax.grad(score, has_aux=True)(zeros)
    weighted = [jnp.maximum(a * g, 0).mean(0) for a, g in zip(seen, slopes, strict=True)]
    return Seen(logits, rolled_out([a + jnp.eye(len(a)) for a in weighted]))


def gradient_rollout(model: HasAttention, image: Image, label: Label) -> Map:
    """Return the gradient-weighted rollout of a class (Chefer et al. 2021b, eq. 5 and 6).

    The product over blocks of I + E_heads[ReLU(A ⊙ ∂z_c/∂A)], A the attention, z_c the logit.

    Args:
        model: a transformer with a class token.
        image: [H, W, 3] in [0, 1].
        label: [] the class c the map explains.

    Returns:
        [h, w] in [0, 1], one entry a patch.
    """
    return _gradient_rollout(model, image, label).map


def check_tokens(model: HasAttention, shape: tuple[int, ...]) -> None:
    """Refuse networks whose tokens are no class token and square grid of patches.

    Raises:
        ValueError: says how many tokens there are.
    """
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    _, seen = jax.eval_shape(partial(attentions, model), image)
    tokens = sorted({a.shape[-1] for a in seen})
    if len(tokens) != 1 or not maps.are_tokens(tokens[0]):
        raise ValueError(
            f"rollout needs a class token and a square of patches: {type(model).__name__} has "
            f"attentions of {tokens} tokens"
        )


@interpreter_factory
def attention_rollout_interpreter() -> Interpreter:
    """Attention rollout; analyst and adversary use the same function, which is smooth."""
    return Interpreter(
        "attention_rollout", attention_rollout, _rollout, check=check_tokens, needs=("attend",)
    )


@interpreter_factory
def gradient_rollout_interpreter() -> Interpreter:
    """Gradient-weighted rollout; analyst and adversary use the same function.

    Its derivative is a second one of the network, and exact: GELU and softmax are smooth.
    """
    return Interpreter(
        "gradient_rollout",
        gradient_rollout,
        _gradient_rollout,
        check=check_tokens,
        needs=("attend",),
    )
