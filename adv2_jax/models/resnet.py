"""Residual networks in Flax NNX (He et al. 2016): CIFAR style (§4.2), and ImageNet style (v1.5).

Attribute names are those of the widespread PyTorch implementations, so a state dict maps key by key
(`adv2_jax.models.convert`). Every method takes `[..., H, W, C]`: one image in the library, a batch
in training.
"""

from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from adv2_jax.activations import relu
from adv2_jax.models.layers import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    batch_norm,
    conv,
    normalise,
    stem_pool,
)
from adv2_jax.types import Activation, Features, Image, Logits


class Block(nnx.Module):
    """Residual block: two 3x3 convolutions, or a bottleneck (1x1, 3x3, 1x1) if `expansion` > 1."""

    def __init__(
        self, c_in: int, c: int, stride: int, *, expansion: int, projection: bool, rngs: nnx.Rngs
    ):
        c_out = c * expansion
        if expansion == 1:
            self.conv1, self.bn1 = conv(c_in, c, 3, stride, rngs), batch_norm(c, rngs)
            self.conv2, self.bn2 = conv(c, c, 3, 1, rngs), batch_norm(c, rngs)
        else:
            # v1.5: the stride is on the 3x3, where the paper has it on the first 1x1
            self.conv1, self.bn1 = conv(c_in, c, 1, 1, rngs), batch_norm(c, rngs)
            self.conv2, self.bn2 = conv(c, c, 3, stride, rngs), batch_norm(c, rngs)
            self.conv3, self.bn3 = conv(c, c_out, 1, 1, rngs), batch_norm(c_out, rngs)
        self.bottleneck = expansion > 1
        self.stride, self.widening = stride, c_out - c_in
        # torchvision's files hold a projection only where the shape changes
        self.projects = projection and (stride != 1 or c_in != c_out)
        if self.projects:
            self.downsample = nnx.List(
                [conv(c_in, c_out, 1, stride, rngs), batch_norm(c_out, rngs)]
            )

    def shortcut(self, x: Array) -> Array:
        """Return the input, projected by a 1x1 convolution or by option A where shapes change.

        Option A takes every stride-th pixel and pads channels with zeros on both sides.
        """
        if self.projects:
            return self.downsample[1](self.downsample[0](x))
        # the identity where stride is 1 and no channels are added
        x = x[..., :: self.stride, :: self.stride, :]
        # zeros on both sides of the channels, as in the PyTorch implementation whose weights are read
        before = self.widening // 2
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, self.widening - before)])

    def __call__(self, x: Array, act: Activation) -> Array:
        """Apply the block: [..., H, W, C_in] -> [..., H/stride, W/stride, C_out]."""
        y = self.bn2(self.conv2(act(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            y = self.bn3(self.conv3(act(y)))
        # the ReLU comes after the sum, so that features are never negative
        return act(y + self.shortcut(x))


def stage(
    c_in: int, c: int, depth: int, stride: int, *, expansion: int, projection: bool, rngs: nnx.Rngs
) -> nnx.List[Block]:
    """Return a stage of `depth` blocks; the first has the stride and changes the width."""
    widths = [c_in] + [c * expansion] * (depth - 1)
    strides = [stride] + [1] * (depth - 1)
    return nnx.List(
        [
            Block(w, c, s, expansion=expansion, projection=projection, rngs=rngs)
            for w, s in zip(widths, strides, strict=True)
        ]
    )


def run_all(stages: Sequence[nnx.List[Block]], x: Array, act: Activation) -> list[Array]:
    """Apply stages one after the other; return the output of each."""
    outputs = []
    for blocks in stages:
        for block in blocks:
            x = block(x, act)
        outputs.append(x)
    return outputs


class CifarResNet(nnx.Module):
    """ResNet-20/32/44/56/110 for small images.

    A 3x3 stem and three stages of widths w, 2w and 4w; features have 1/4 of the side of the image.

    Args:
        depth: blocks a stage (3, 5, 7, 9, 18).
        num_classes: K.
        width: channels of the first stage (16 in the paper).
        mean, std: normalisation of the [0, 1] image, one number a channel.
        image_size: side in pixels of the images it was trained on, and to which photographs are
            cropped.
        rngs: initialisation.
    """

    SIZES: ClassVar = {"num_classes": "linear.weight", "width": "conv1.weight"}

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        width: int = 16,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        image_size: int = 32,
        rngs: nnx.Rngs,
    ):
        def widen(c_in: int, c: int, stride: int) -> nnx.List[Block]:
            return stage(c_in, c, depth, stride, expansion=1, projection=False, rngs=rngs)

        self.mean, self.std, self.image_size = mean, std, image_size
        self.conv1, self.bn1 = conv(3, width, 3, 1, rngs), batch_norm(width, rngs)
        self.layer1 = widen(width, width, 1)
        self.layer2 = widen(width, 2 * width, 2)
        self.layer3 = widen(2 * width, 4 * width, 2)
        self.linear = nnx.Linear(4 * width, num_classes, rngs=rngs)

    def scales(self, image: Image, act: Activation = relu) -> list[Features]:
        """Return the output of each stage, [..., H/s, W/s, s width] for s = 1, 2, 4."""
        x = act(self.bn1(self.conv1(normalise(image, self.mean, self.std, self.conv1.kernel))))
        return run_all((self.layer1, self.layer2, self.layer3), x, act)

    def features(self, image: Image, act: Activation = relu) -> Features:
        """Return the last features: [..., H, W, 3] -> [..., H/4, W/4, 4 width]."""
        return self.scales(image, act)[-1]

    def head(self, features: Features) -> Logits:
        """Apply global average pooling and the linear layer: [..., h, w, C] -> [..., K]."""
        return self.linear(features.mean(axis=(-3, -2)))


class ImageNetResNet(nnx.Module):
    """ResNet-18/34/50/101/152 v1.5.

    A 7x7 stem with max pooling and four stages; features have 1/32 of the side of the image.

    Args:
        depths: blocks of the four stages.
        expansion: 1 for basic blocks (18, 34), 4 for bottlenecks.
        num_classes: K.
        width: channels of the first stage (64 in the paper).
        mean, std: normalisation of the [0, 1] image, one number a channel.
        image_size: side in pixels of the images it was trained on, and to which photographs are
            cropped.
        rngs: initialisation.
    """

    SIZES: ClassVar = {"num_classes": "fc.weight", "width": "conv1.weight"}

    def __init__(
        self,
        depths: Sequence[int],
        expansion: int,
        *,
        num_classes: int = 1000,
        width: int = 64,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        image_size: int = 224,
        rngs: nnx.Rngs,
    ):
        def widen(c_in: int, c: int, depth: int, stride: int) -> nnx.List[Block]:
            return stage(c_in, c, depth, stride, expansion=expansion, projection=True, rngs=rngs)

        out = width * expansion
        self.mean, self.std, self.image_size = mean, std, image_size
        self.conv1, self.bn1 = conv(3, width, 7, 2, rngs), batch_norm(width, rngs)
        self.layer1 = widen(width, width, depths[0], 1)
        self.layer2 = widen(out, 2 * width, depths[1], 2)
        self.layer3 = widen(2 * out, 4 * width, depths[2], 2)
        self.layer4 = widen(4 * out, 8 * width, depths[3], 2)
        self.fc = nnx.Linear(8 * out, num_classes, rngs=rngs)

    def scales(self, image: Image, act: Activation = relu) -> list[Features]:
        """Return the output of each stage, [..., H/s, W/s, s/4 width expansion], s = 4..32."""
        x = stem_pool(
            act(self.bn1(self.conv1(normalise(image, self.mean, self.std, self.conv1.kernel))))
        )
        return run_all((self.layer1, self.layer2, self.layer3, self.layer4), x, act)

    def features(self, image: Image, act: Activation = relu) -> Features:
        """Return the last features: [..., H, W, 3] -> [..., H/32, W/32, 8 width expansion]."""
        return self.scales(image, act)[-1]

    def head(self, features: Features) -> Logits:
        """Apply global average pooling and the linear layer: [..., h, w, C] -> [..., K]."""
        return self.fc(features.mean(axis=(-3, -2)))
