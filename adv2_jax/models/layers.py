"""Layers that behave as those of torch, and the normalisation of the image."""

from collections.abc import Sequence
from functools import reduce

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from adv2_jax.types import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# one object for all layers: in flax 0.12.0, two networks with an initialiser each differ in their
# pytree structure, and `jit` would compile for both
KERNEL_INIT = nnx.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


def conv(c_in: int, c_out: int, size: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    """Return a square convolution without bias that pads size // 2 pixels on every side."""
    # as torch pads; at stride 2 `SAME` pads fewer on the left and top, and shifts the features
    return nnx.Conv(
        c_in,
        c_out,
        (size, size),
        stride,
        padding=size // 2,
        use_bias=False,
        kernel_init=KERNEL_INIT,
        rngs=rngs,
    )


def batch_norm(channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Return a BatchNorm that uses its running statistics until set to training."""
    # torch's momentum of .1 is the share of the new batch, NNX's .9 that of the old statistics
    # NNX defaults to batch statistics, by which images of a batch would see each other
    return nnx.BatchNorm(channels, use_running_average=True, momentum=0.9, epsilon=1e-5, rngs=rngs)


def normalise(
    image: Image, mean: Sequence[float], std: Sequence[float], weights: Array | nnx.Param[Array]
) -> Array:
    """Return (image - mean) / std, channel by channel: [..., H, W, 3] -> [..., H, W, 3].

    In the type of the image, or in that of the weights it meets if they are of half precision.
    """
    # of the image's rank: broadcasting must not depend on `jax_numpy_rank_promotion`
    shift, scale = (
        jnp.asarray(values, image.dtype).reshape((1,) * (image.ndim - 1) + (-1,))
        for values in (mean, std)
    )
    x = (image - shift) / scale
    # cast last: in [.5, 1) bfloat16 has steps of 1/256, and an attack has steps of a tenth of that
    return x.astype(weights.dtype) if jnp.finfo(weights.dtype).bits < 32 else x


def stem_pool(x: Array) -> Array:
    """Return 3x3 maxima at stride 2: [..., H, W, C] -> [..., ceil(H/2), ceil(W/2), C].

    Pads one pixel on every side, and of equal values takes the first, as torch does.
    """
    # over columns, then over rows, of shifted images. The gradient of `nnx.max_pool` is a
    # select-and-scatter, which takes twice as long on CPUs, adds in any order on GPUs, and is
    # refused there under --xla_gpu_deterministic_ops
    for axis in (x.ndim - 2, x.ndim - 3):
        size = (x.shape[axis] + 1) // 2
        padding = [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)]
        padded = jnp.pad(x, padding, constant_values=-jnp.inf)
        shifted = (jax.lax.slice_in_dim(padded, i, i + 2 * size - 1, 2, axis) for i in range(3))
        x = reduce(lambda a, b: jnp.where((b > a) | jnp.isnan(b), b, a), shifted)
    return x
