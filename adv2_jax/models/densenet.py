"""Densely connected networks in Flax NNX: DenseNet-BC for ImageNet (Huang et al. 2017).

Attribute names are those of torchvision but for `trunk`, which is called `features` there
(`adv2_jax.models.convert`). Every method takes `[..., H, W, C]`: one image in the library, a batch
in training.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

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


class DenseLayer(nnx.Module):
    """A layer that appends `growth` channels to its input.

    A 1x1 convolution to 4 growth channels, then a 3x3; BatchNorm and ReLU before each.
    """

    def __init__(self, c_in: int, growth: int, *, rngs: nnx.Rngs):
        self.norm1, self.conv1 = batch_norm(c_in, rngs), conv(c_in, 4 * growth, 1, 1, rngs)
        self.norm2, self.conv2 = batch_norm(4 * growth, rngs), conv(4 * growth, growth, 3, 1, rngs)

    def __call__(self, x: Array, act: Activation) -> Array:
        """Apply the layer: [..., H, W, C_in] -> [..., H, W, C_in + growth]."""
        y = self.conv1(act(self.norm1(x)))
        y = self.conv2(act(self.norm2(y)))
        return jnp.concatenate([x, y], axis=-1)


class Transition(nnx.Module):
    """The layer between two blocks, which halves the channels and the side."""

    def __init__(self, c_in: int, *, rngs: nnx.Rngs):
        self.norm, self.conv = batch_norm(c_in, rngs), conv(c_in, c_in // 2, 1, 1, rngs)

    def __call__(self, x: Array, act: Activation) -> Array:
        """Apply the layer: [..., H, W, C_in] -> [..., floor(H/2), floor(W/2), C_in / 2]."""
        return nnx.avg_pool(self.conv(act(self.norm(x))), (2, 2), (2, 2))


def dense_block(c_in: int, growth: int, depth: int, rngs: nnx.Rngs) -> nnx.Dict[DenseLayer]:
    """Return the layers of a block by name; each sees all channels appended before it."""
    # by name, not a list: torchvision counts its layers from 1
    return nnx.Dict(
        {
            f"denselayer{i + 1}": DenseLayer(c_in + i * growth, growth, rngs=rngs)
            for i in range(depth)
        }
    )


class DenseNet(nnx.Module):
    """DenseNet-121/161/169/201.

    A 7x7 stem with max pooling and four dense blocks; features have 1/32 of the side of the image.

    Args:
        depths: layers of the blocks.
        num_classes: K.
        growth: channels that a layer appends (32; 48 in DenseNet-161).
        width: channels of the stem (2 growth in the paper).
        mean, std: normalisation of the [0, 1] image, one number a channel.
        image_size: side in pixels of the images it was trained on, and to which photographs are
            cropped.
        rngs: initialisation.
    """

    SIZES: ClassVar = {
        "num_classes": "classifier.weight",
        "growth": "features.denseblock1.denselayer1.conv2.weight",
        "width": "features.conv0.weight",
    }

    def __init__(
        self,
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        growth: int = 32,
        width: int = 64,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        image_size: int = 224,
        rngs: nnx.Rngs,
    ):
        self.depths = tuple(depths)
        self.mean, self.std, self.image_size = mean, std, image_size
        # named by torchvision, whose `features` is a method here
        trunk: dict[str, Any] = {
            "conv0": conv(3, width, 7, 2, rngs),
            "norm0": batch_norm(width, rngs),
        }
        channels = width
        for i, depth in enumerate(depths, 1):
            if i > 1:
                trunk[f"transition{i - 1}"] = Transition(channels, rngs=rngs)
                channels //= 2
            trunk[f"denseblock{i}"] = dense_block(channels, growth, depth, rngs)
            channels += depth * growth
        self.trunk: nnx.Dict[Any] = nnx.Dict(trunk | {"norm5": batch_norm(channels, rngs)})
        self.classifier = nnx.Linear(channels, num_classes, rngs=rngs)

    def features(self, image: Image, act: Activation = relu) -> Features:
        """Return the last features, a ReLU: [..., H, W, 3] -> [..., H/32, W/32, C]."""
        trunk = self.trunk
        x = stem_pool(
            act(trunk.norm0(trunk.conv0(normalise(image, self.mean, self.std, trunk.conv0.kernel))))
        )
        for i, depth in enumerate(self.depths, 1):
            x = trunk[f"transition{i - 1}"](x, act) if i > 1 else x
            for j in range(depth):
                x = trunk[f"denseblock{i}"][f"denselayer{j + 1}"](x, act)
        # torchvision applies this ReLU after its `features`; here they are what CAM weighs
        return act(trunk.norm5(x))

    def head(self, features: Features) -> Logits:
        """Apply global average pooling and the linear layer: [..., h, w, C] -> [..., K]."""
        return self.classifier(features.mean(axis=(-3, -2)))
