"""The masker of RTS: a network that draws the map itself (ADV² §3.4; Dabkowski & Gal, NIPS 2017).

An encoder sees the image at several scales, a selector gates its last features by their similarity
to the class, and a U-Net decoder turns them into a map.
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

BOTTLENECK = 4  # input channels for one inner channel in the residual block of a stage
# Bound of the logits of a map. Without it sigmoids round to 1 on large objects, and a map has a
# plateau in place of a peak.
LIMIT = 6.0
# Standard deviation of the blur of the logits, in sides of the map. Eq. 8 marks what the classifier
# needs of an object, which may be no more than its outline: a third of the peaks of sharp maps lay
# one pixel beside the object.
SMOOTHING = 1 / 16


class Stage(nnx.Module):
    """One step up the U-Net.

    A 3x3 convolution, pixel shuffle to twice the size, concatenation with the skip connection, and
    a residual block.
    """

    def __init__(self, c_in: int, c_skip: int, c: int, *, rngs: nnx.Rngs):
        joined = c + c_skip
        self.conv, self.bn = conv(c_in, 4 * c, 3, 1, rngs), batch_norm(4 * c, rngs)
        inner = joined // BOTTLENECK
        self.block = Block(joined, inner, 1, expansion=BOTTLENECK, projection=True, rngs=rngs)

    def __call__(self, x: Array, skip: Features) -> Features:
        """Apply the stage: [..., h, w, C_in] and [..., H, W, C_skip] -> [..., H, W, C]."""
        up = pixel_shuffle(relu(self.bn(self.conv(x))))
        # H is 2h - 1 or 2h: an odd side was rounded up when the encoder halved it
        height, width = skip.shape[-3:-1]
        return self.block(jnp.concatenate([up[..., :height, :width, :], skip], axis=-1), relu)


def pixel_shuffle(x: Array) -> Array:
    """Turn each four channels into 2 x 2 pixels: [..., h, w, 4 C] -> [..., 2h, 2w, C]."""
    *batch, h, w, c = x.shape
    blocks = jnp.moveaxis(x.reshape(*batch, h, w, 2, 2, c // 4), -3, -4)
    return blocks.reshape(*batch, 2 * h, 2 * w, c // 4)


def smoothed(logits: Array) -> Array:
    """Return a Gaussian blur of width `SMOOTHING`: [..., h, w] -> [..., h, w]."""
    # `blur` takes one map; in training there is a batch of them
    return jnp.vectorize(
        lambda one: blur(one, SMOOTHING * min(one.shape)), signature="(h,w)->(h,w)"
    )(logits)


class Masker(nnx.Module):
    """The network (image, class) -> map.

    With a CIFAR-style encoder the map has 1/2 of the side of the image (32² at 64²), with an
    ImageNet-style one 1/4 (56² at 224²).

    Args:
        encoder: a ResNet of this package; its present weights are the start, its head becomes the
            selector.
        rngs: initialisation of the decoder.

    Attributes:
        encoder: a copy.
        means: [K, C], the last features of each class, averaged over positions and images; zeros
            until measured.
    """

    def __init__(self, encoder: Encoder, *, rngs: nnx.Rngs):
        self.encoder = nnx.clone(encoder)
        size = self.encoder.image_size
        shapes = [scale.shape for scale in self._abstract_skips((size, size, 3))]
        deepest = shapes[-1][-1]
        # the weights of a linear head after global average pooling: the selector starts as CAM
        embedding = jax.jacobian(encoder.head)(jnp.zeros((1, 1, deepest)))
        self.embedding = nnx.Param(embedding.reshape(-1, deepest))
        self.threshold = nnx.Param(jnp.zeros(()))
        # no `Param`: saved with the weights, but never trained
        self.means = nnx.BatchStat(jnp.zeros((*embedding.shape[:1], deepest)))
        stages, c_in = [], deepest
        for *_, c_skip in reversed(shapes[:-1]):
            # a quarter: with ImageNet-style encoders what comes from below stays narrower than the
            # skip. 64 at least, so always with CIFAR-style ones (16 to 64 channels): it was 32
            # before the decoder was widened together with `area_power`, for maps with edges
            c = max(c_skip // 4, 64)
            stages.append(Stage(c_in, c_skip, c, rngs=rngs))
            c_in = (c + c_skip) // BOTTLENECK * BOTTLENECK  # what the block of the stage gives
        self.stages = nnx.List(stages)
        self.out = nnx.Conv(c_in, 1, (1, 1), rngs=rngs)

    def _abstract_skips(self, shape: tuple[int, ...]) -> list[Any]:
        return jax.eval_shape(self.skips, jax.ShapeDtypeStruct(shape, jnp.float32))

    def skips(self, image: Image) -> list[Features]:
        """Return the scales of the encoder up to half of the side of the image, finest first."""
        scales = self.encoder.scales(image)
        return [scale for scale in scales if 2 * scale.shape[-3] <= image.shape[-3]]

    def gate(self, features: Features, label: Label) -> Array:
        """Return the selector σ(features · embedding_c - threshold), near 1 where class c is.

        Args:
            features: [..., h, w, C].
            label: [...] the class c.

        Returns:
            [..., h, w] in (0, 1).
        """
        similarity = jnp.einsum("...hwc,...c->...hw", features, self.embedding[...][label])
        return nnx.sigmoid(similarity - self.threshold[...])

    def __call__(self, image: Image, label: Label) -> Map:
        """Draw maps: [..., H, W, 3] in [0, 1] and [...] -> [..., h, w] in [0, 1]."""
        *skips, deepest = self.skips(image)
        x = deepest * self.gate(deepest, label)[..., None]
        for stage, skip in zip(self.stages, reversed(skips), strict=True):
            x = stage(x, skip)
        # soft sign, unlike a clip, keeps a gradient and an order beyond the limit
        logits = LIMIT * nnx.soft_sign(self.out(x)[..., 0] / LIMIT)
        return nnx.sigmoid(smoothed(logits))

    def check(self, num_classes: int, shape: tuple[int, ...]) -> None:
        """Refuse classes or images that the masker was not made for.

        Args:
            num_classes: K of the classifier to be explained.
            shape: of the images, [H, W, 3].

        Raises:
            ValueError: gives the number of classes, or the size, that it was made for.
        """
        k = self.means.shape[0]
        if k != num_classes:
            raise ValueError(f"the masker draws maps of {k} classes, the network has {num_classes}")
        # small images of odd sides have one scale less: halves are rounded up, and are too large
        if len(self._abstract_skips(shape)) != len(self.stages) + 1:
            side = self.encoder.image_size
            raise ValueError(
                f"the masker cannot take images of {list(shape)}; it was made for {side} x {side}"
            )


# a pytree, so that the weights of both are arguments of a compiled program
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassifierWithMasker:
    """A classifier and the masker that explains it: the model of the interpreter `rts`.

    Attributes:
        classifier: any `types.Classifier`; its methods are those of this object too.
        masker: trained to explain it.
    """

    classifier: Classifier
    masker: Masker

    def __getattr__(self, name: str) -> Any:
        # its capabilities and no more: `classifier` itself is missing while a copy is made
        if name in ("logits", "features", "head"):
            return getattr(self.classifier, name)
        raise AttributeError(f"{type(self).__name__} has no {name}")
