"""Vision transformers in Flax NNX (Dosovitskiy et al. 2021; DeiT: Touvron et al. 2021).

Attribute names are those of timm; files of torchvision are renamed (`adv2_jax.models.convert`).
Every method takes `[..., H, W, 3]`: one image in the library, a batch in training. Tokens are the
class token, then the patches row by row: T = 1 + h w.
"""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from adv2_jax.models.layers import IMAGENET_MEAN, IMAGENET_STD, normalise
from adv2_jax.precision import at_least_float32
from adv2_jax.types import Features, Image, Logits

Attend = Callable[[Array], Array]
INIT = nnx.initializers.truncated_normal(0.02)  # of both papers


def as_it_is(attention: Array) -> Array:
    """Return an attention unchanged."""
    return attention


def layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Return a layer normalisation as in timm and torchvision, whose ε of ViTs is not torch's."""
    # the fast variance E x² - (E x)² cancels where the mean is large
    return nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, rngs=rngs)


class Attention(nnx.Module):
    """Self-attention of several heads."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.qkv = nnx.Linear(width, 3 * width, kernel_init=INIT, rngs=rngs)
        self.proj = nnx.Linear(width, width, kernel_init=INIT, rngs=rngs)

    def __call__(self, x: Array, attend: Attend) -> Array:
        """Apply the layer: [..., T, D] -> [..., T, D]; `attend` sees [..., heads, T, T]."""
        *batch, tokens, width = x.shape
        parts = self.qkv(x).reshape(*batch, tokens, 3, self.heads, width // self.heads)
        queries, keys, values = (parts[..., i, :, :] for i in range(3))
        scores = jnp.einsum("...qhd,...khd->...hqk", queries, keys) * (width // self.heads) ** -0.5
        # half precision would round the small ones away
        attention = attend(jax.nn.softmax(at_least_float32(scores))).astype(values.dtype)
        mixed = jnp.einsum("...hqk,...khd->...qhd", attention, values)
        return self.proj(mixed.reshape(*batch, tokens, width))


class Block(nnx.Module):
    """Pre-norm block: attention, and a perceptron of 4 D hidden units with GELU."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = layer_norm(width, rngs), layer_norm(width, rngs)
        self.attn = Attention(width, heads, rngs=rngs)
        self.mlp = nnx.Dict(
            fc1=nnx.Linear(width, 4 * width, kernel_init=INIT, rngs=rngs),
            fc2=nnx.Linear(4 * width, width, kernel_init=INIT, rngs=rngs),
        )

    def __call__(self, x: Array, attend: Attend) -> Array:
        """Apply the block: [..., T, D] -> [..., T, D]."""
        x = x + self.attn(self.norm1(x), attend)
        # exact, as in torch: JAX's default is an approximation by tanh
        hidden = jax.nn.gelu(self.mlp["fc1"](self.norm2(x)), approximate=False)
        return x + self.mlp["fc2"](hidden)


class VisionTransformer(nnx.Module):
    """ViT and DeiT with a class token: tiny, small, base, large.

    GELU is smooth, so there is no `act`: the second derivatives of a GRAD map exist as they are.

    Args:
        depth: blocks.
        heads: of each attention.
        patch: side of the patches in pixels.
        width: D.
        num_classes: K.
        mean, std: normalisation of the [0, 1] image, one number a channel.
        image_size: side in pixels of the images, a multiple of `patch`: each position has weights.
        rngs: initialisation.

    Raises:
        ValueError: `patch` does not divide `image_size`, or `heads` the width.
    """

    SIZES: ClassVar = {"num_classes": "head.weight", "width": "patch_embed.proj.weight"}

    def __init__(
        self,
        depth: int,
        heads: int,
        *,
        patch: int = 16,
        width: int,
        num_classes: int = 1000,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        image_size: int = 224,
        rngs: nnx.Rngs,
    ):
        if image_size % patch or width % heads:
            raise ValueError(
                f"patches of {patch} pixels must divide images of {image_size}, "
                f"and {heads} heads a width of {width}"
            )
        self.mean, self.std, self.image_size, self.patch = mean, std, image_size, patch
        proj = nnx.Conv(
            3,
            width,
            kernel_size=(patch, patch),
            strides=patch,
            padding="VALID",
            kernel_init=INIT,
            rngs=rngs,
        )
        self.patch_embed = nnx.Dict(proj=proj)
        tokens = 1 + (image_size // patch) ** 2
        self.cls_token = nnx.Param(INIT(rngs.params(), (1, 1, width)))
        self.pos_embed = nnx.Param(INIT(rngs.params(), (1, tokens, width)))
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(depth)])
        self.norm = layer_norm(width, rngs)
        # named by timm, whose `head` is a method here
        self.classes = nnx.Linear(width, num_classes, kernel_init=INIT, rngs=rngs)

    def features(self, image: Image, attend: Attend = as_it_is) -> Features:
        """Return the tokens that enter the last block: [..., H, W, 3] -> [..., T, D].

        Args:
            image: in [0, 1].
            attend: called with the attention [..., heads, T, T] of each block, in their order; what
                it returns takes its place.
        """
        proj = self.patch_embed["proj"]
        patches = proj(normalise(image, self.mean, self.std, proj.kernel))
        *batch, height, width, channels = patches.shape
        first = jnp.broadcast_to(self.cls_token[...].reshape(channels), (*batch, 1, channels))
        x = jnp.concatenate([first, patches.reshape(*batch, height * width, channels)], axis=-2)
        x = x + jnp.broadcast_to(self.pos_embed[...].reshape(-1, channels), x.shape)
        for block in self.blocks[:-1]:
            x = block(x, attend)
        return x

    def head(self, features: Features, attend: Attend = as_it_is) -> Logits:
        """Apply the last block, and the linear layer to its class token: [..., T, D] -> [..., K]."""
        x = self.blocks[-1](features, attend)
        return self.classes(self.norm(x[..., 0, :]))

    def logits(self, image: Image, attend: Attend = as_it_is) -> Logits:
        """Return the logits: [..., H, W, 3] -> [..., K]."""
        return self.head(self.features(image, attend), attend)
