"""The model of RTS: a network that draws the map itself (ADV² §3.4; Dabkowski & Gal, NIPS 2017).

An encoder sees the image at several scales, a selector asks its last features where the class is,
and a U-Net decoder makes a map of the answer.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from adv2_jax.activations import relu
from adv2_jax.maps import blur
from adv2_jax.models.layers import batch_norm, conv
from adv2_jax.models.resnet import Block, CifarResNet, ImageNetResNet
from adv2_jax.types import Classifier, Features, Image, Label, Map

Encoder = CifarResNet | ImageNetResNet

BOTTLENECK = 4  # inputs an inner channel of the residual block of a stage
LIMIT = 6.0  # of the scores that a map is the sigmoid of: they never reach it, so a map has one peak, not a plateau of ones
# Standard deviation of the blur of the scores, in sides of the map. Eq. 8 marks what the classifier
# needs of an object, which may be no more than its outline: of sharp maps every third peak lay a
# pixel beside the object
SMOOTHING = 1 / 16


class Stage(nnx.Module):
    """One step up the U-Net: 3x3 convolution, twice the size by pixel shuffle, the skip connection beside it, a residual block."""

    def __init__(self, c_in: int, c_skip: int, c: int, *, rngs: nnx.Rngs):
        joined = c + c_skip
        self.conv, self.bn = conv(c_in, 4 * c, 3, 1, rngs), batch_norm(4 * c, rngs)
        inner = joined // BOTTLENECK
        self.block = Block(joined, inner, 1, expansion=BOTTLENECK, projection=True, rngs=rngs)

    def __call__(self, x: Array, skip: Features) -> Features:
        """[..., h, w, C_in] and [..., H, W, C_skip], H in 2h - 1..2h -> [..., H, W, C]."""
        up = pixel_shuffle(relu(self.bn(self.conv(x))))
        height, width = skip.shape[-3:-1]
        return self.block(jnp.concatenate([up[..., :height, :width, :], skip], axis=-1), relu)


def pixel_shuffle(x: Array) -> Array:
    """Four channels become 2 x 2 pixels: [..., h, w, 4 C] -> [..., 2h, 2w, C]."""
    *batch, h, w, c = x.shape
    blocks = jnp.moveaxis(x.reshape(*batch, h, w, 2, 2, c // 4), -3, -4)
    return blocks.reshape(*batch, 2 * h, 2 * w, c // 4)


def smoothed(scores: Array) -> Array:
    """A Gaussian blur of `SMOOTHING`: [..., h, w] -> [..., h, w]."""
    return jnp.vectorize(
        lambda one: blur(one, SMOOTHING * min(one.shape)), signature="(h,w)->(h,w)"
    )(scores)


class Masker(nnx.Module):
    """(image, class) -> map. The map has 1/4 of the side of large images (56² at 224²), 1/2 of
    small ones (32² at 64²).

    Args:
        encoder: a ResNet of this package; its present weights are the start, its head becomes the
            selector.
        rngs: initialisation of the decoder.

    Attributes:
        encoder: a copy.
        means: [K, C], the last features of each class averaged over positions and images; zeros
            until measured.
    """

    def __init__(self, encoder: Encoder, *, rngs: nnx.Rngs):
        self.encoder = nnx.clone(encoder)
        shapes = [scale.shape for scale in self._abstract_skips()]
        deepest = shapes[-1][-1]
        # with global average pooling and a linear head these are its weights, and the selector
        # starts as CAM
        embedding = jax.jacobian(encoder.head)(jnp.zeros((1, 1, deepest)))
        self.embedding = nnx.Param(embedding.reshape(-1, deepest))
        self.threshold = nnx.Param(jnp.zeros(()))
        self.means = nnx.BatchStat(jnp.zeros((*embedding.shape[:1], deepest)))
        stages, c_in = [], deepest
        for *_, c_skip in reversed(shapes[:-1]):
            c = max(c_skip // 4, 64)
            stages.append(Stage(c_in, c_skip, c, rngs=rngs))
            c_in = (c + c_skip) // BOTTLENECK * BOTTLENECK
        self.stages = nnx.List(stages)
        self.out = nnx.Conv(c_in, 1, (1, 1), rngs=rngs)

    def _abstract_skips(self) -> list[Any]:
        size = self.encoder.image_size
        return jax.eval_shape(self.skips, jax.ShapeDtypeStruct((size, size, 3), jnp.float32))

    def skips(self, image: Image) -> list[Features]:
        """The scales of the encoder that are not finer than the map, finest first."""
        scales = self.encoder.scales(image)
        return [scale for scale in scales if 2 * scale.shape[-3] <= image.shape[-3]]

    def gate(self, features: Features, label: Label) -> Array:
        """Where the class is: σ(features · embedding_c - threshold), [..., h, w, C] and [...] -> [..., h, w] in (0, 1)."""
        embedding = self.embedding[...][label]
        return nnx.sigmoid(
            jnp.einsum("...hwc,...c->...hw", features, embedding) - self.threshold[...]
        )

    def __call__(self, image: Image, label: Label) -> Map:
        """[..., H, W, 3] in [0, 1] and [...] -> [..., h, w] in [0, 1]."""
        *skips, deepest = self.skips(image)
        x = deepest * self.gate(deepest, label)[..., None]
        for stage, skip in zip(self.stages, reversed(skips), strict=True):
            x = stage(x, skip)
        scores = LIMIT * nnx.soft_sign(self.out(x)[..., 0] / LIMIT)
        return nnx.sigmoid(smoothed(scores))

    def check(self, num_classes: int, shape: tuple[int, ...]) -> None:
        """Refuse a classifier with `num_classes` classes, or images of `shape` [H, W, 3], that the
        masker was not made for.

        Raises:
            ValueError: says what it was made for.
        """
        own = self.means.shape[0]
        if own != num_classes:
            raise ValueError(
                f"the masker draws maps of {own} classes, the network has {num_classes}"
            )
        image = jax.ShapeDtypeStruct(shape, jnp.float32)
        if len(jax.eval_shape(self.skips, image)) != len(self.stages) + 1:
            side = self.encoder.image_size
            raise ValueError(
                f"the masker cannot take images of {list(shape)}; it was made for {side} x {side}"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassifierWithMasker:
    """A classifier and the masker that explains it: what the interpreter `rts` takes for its model.

    Attributes:
        classifier: any `types.Classifier`; its methods are those of this object too.
        masker: trained to explain it.
    """

    classifier: Classifier
    masker: Masker

    def __getattr__(self, name: str) -> Any:
        if name in ("logits", "features", "head"):  # what the classifier can do, and no more
            return getattr(self.classifier, name)
        raise AttributeError(f"{type(self).__name__} has no {name}")
