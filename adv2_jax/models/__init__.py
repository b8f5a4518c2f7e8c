"""Classifiers by name, and their weights.

model = adv2.models.load("cifar_resnet20", "weights.npz")
"""

import os
from collections.abc import Callable
from importlib import resources
from typing import Any

from flax import nnx

from adv2_jax.files import read_arrays
from adv2_jax.models import convert, resnet
from adv2_jax.models.resnet import CifarResNet, ImageNetResNet

__all__ = ["MODELS", "CifarResNet", "ImageNetResNet", "build", "convert", "embedded", "load", "resnet"]

ResNet = CifarResNet | ImageNetResNet

MODELS: dict[str, Callable[..., ResNet]] = {
    "cifar_resnet20": resnet.cifar(3),
    "cifar_resnet32": resnet.cifar(5),
    "cifar_resnet44": resnet.cifar(7),
    "cifar_resnet56": resnet.cifar(9),
    "cifar_resnet110": resnet.cifar(18),
    "resnet18": resnet.imagenet((2, 2, 2, 2), 1),
    "resnet34": resnet.imagenet((3, 4, 6, 3), 1),
    "resnet50": resnet.imagenet((3, 4, 6, 3), 4),
    "resnet101": resnet.imagenet((3, 4, 23, 3), 4),
    "resnet152": resnet.imagenet((3, 8, 36, 3), 4),
}


def build(name: str, *, seed: int = 0, **options: Any) -> ResNet:
    """A freshly initialised network.

    Args:
        name: a key of `MODELS`.
        seed: of the initialisation.
        **options: `num_classes`, `width`, `mean`, `std` (see the module's class).

    Raises:
        ValueError: for an unknown name; lists the valid ones.
    """
    _check_name(name)
    return MODELS[name](rngs=nnx.Rngs(seed), **options)


def load(name: str, path: str | os.PathLike[str], **options: Any) -> ResNet:
    """A network with the weights of a torch-style state dict in an `.npz` or `.safetensors` file.

    Args:
        name: a key of `MODELS`.
        path: the file. Width and number of classes are read off its first and last layer unless given.
        **options: as for `build`.

    Raises:
        ValueError: for an unknown name, an unreadable file, or weights that do not fit (every key that does not match is listed
            with the expected and the found shape).
    """
    _check_name(name)
    arrays = read_arrays(path)
    abstract = nnx.eval_shape(lambda: build(name, **{**_sizes(arrays), **options}))
    try:
        return convert.from_state_dict(abstract, arrays)
    except ValueError as error:
        raise ValueError(f"weights {path} do not fit {name}: {error}") from None


def embedded() -> ResNet:
    """The network that comes with the package: a CIFAR-style ResNet-20 trained on `data.shapes` (64 x 64, 10 classes)."""
    with resources.as_file(resources.files("adv2_jax") / "weights" / "shapes_resnet20.npz") as path:
        return load("cifar_resnet20", path)


def _check_name(name: str) -> None:
    if name not in MODELS:
        raise ValueError(f"model {name!r} is not one of {', '.join(MODELS)}")


def _sizes(arrays: dict[str, Any]) -> dict[str, int]:
    """Width and number of classes of a ResNet state dict, as far as it tells."""
    arrays = {key.removeprefix("module."): value for key, value in arrays.items()}
    sizes = {"width": arrays.get("conv1.weight"), "num_classes": arrays.get("linear.weight", arrays.get("fc.weight"))}
    return {key: value.shape[0] for key, value in sizes.items() if value is not None and value.ndim > 1}
