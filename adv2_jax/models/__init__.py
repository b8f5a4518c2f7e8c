"""Classifiers by name, and their weights.

model = adv2.models.load("resnet50", "resnet50.pth")
"""

import inspect
import logging
import os
from functools import partial
from importlib import resources
from typing import Any

import numpy as np
from flax import nnx

from adv2_jax.errors import first_line
from adv2_jax.files import check_writable, read_arrays, write_arrays
from adv2_jax.models import convert, densenet, resnet, user
from adv2_jax.models.densenet import DenseNet
from adv2_jax.models.masker import ClassifierWithMasker, Encoder, Masker
from adv2_jax.models.resnet import CifarResNet, ImageNetResNet

__all__ = [
    "EMBEDDED",
    "MODELS",
    "CifarResNet",
    "ClassifierWithMasker",
    "DenseNet",
    "Encoder",
    "ImageNetResNet",
    "Masker",
    "Network",
    "build",
    "check_encoder",
    "check_name",
    "convert",
    "convert_file",
    "densenet",
    "embedded",
    "embedded_masker",
    "image_size",
    "load",
    "load_masker",
    "resnet",
    "save_masker",
    "user",
    "with_new_head",
]

log = logging.getLogger(__name__)

EMBEDDED = "cifar_resnet20"  # kind of the network that comes with the package
OPTION, ENCODER = "option/", "encoder."  # before the names of a masker's arrays
Network = CifarResNet | ImageNetResNet | DenseNet

MODELS: dict[str, partial[Any]] = {
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
    "densenet121": densenet.imagenet((6, 12, 24, 16)),
    "densenet161": densenet.imagenet((6, 12, 36, 24), growth=48),
    "densenet169": densenet.imagenet((6, 12, 32, 32)),
    "densenet201": densenet.imagenet((6, 12, 48, 32)),
}


def build(name: str, *, seed: int = 0, **options: Any) -> Network:
    """A freshly initialised network.

    Args:
        name: a key of `MODELS`.
        seed: of the initialisation.
        **options: `num_classes`, `width`, `mean`, `std`, `image_size`; `growth` of a DenseNet (see
            the module's class).

    Raises:
        ValueError: for an unknown name; lists the valid ones.
    """
    check_name(name)
    return MODELS[name](rngs=nnx.Rngs(seed), **options)


def load(
    name: str, path: str | os.PathLike[str], *, key: str | None = None, **options: Any
) -> Network:
    """A network with the weights of a torch-style state dict, under the names of torchvision or
    timm.

    The largest set of keys that fits the network under one prefix is taken. What the file holds
    beside it is logged as a warning.

    Args:
        name: a key of `MODELS`.
        path: of the file, as for `files.read_arrays`. Width, growth and number of classes are read
            off it unless given.
        key: which weights, where a file holds several (`state_dict_ema`, `module.model`), as for
            `files.read_arrays`.
        **options: as for `build`.

    Raises:
        ValueError: for an unknown name, an unreadable file, or weights that do not fit (says which
            keys, with the expected and the found shape).
    """
    model, found = _read(name, path, key, options)
    for line in found.losses():
        log.warning("%s: %s", path, line)
    return model


def convert_file(
    path: str | os.PathLike[str], name: str, out: str | os.PathLike[str], *, key: str | None = None
) -> list[str]:
    """Rewrite a file of weights under torchvision's names, once they are known to fit a network.

    Args:
        path: as for `load`.
        name: a key of `MODELS`.
        out: `.npz` or `.safetensors`, written atomically.
        key: as for `load`.

    Returns:
        What was found and done, a line each.

    Raises:
        ValueError: as for `load`, or `out` has another suffix.
    """
    check_writable(out)
    model, found = _read(name, path, key, {})
    arrays = convert.to_state_dict(model)
    write_arrays(out, arrays)
    sizes = (f"{option.replace('_', ' ')} {size}" for option, size in _sizes(name, arrays).items())
    return [
        f"{len(arrays)} of {len(arrays)} keys fit {name}: {', '.join(sizes)}",
        *found.changes(),
        f"written: {out}",
    ]


def with_new_head(model: Network, num_classes: int, *, seed: int = 0) -> Network:
    """The same network with a freshly initialised head, to be trained on other classes.

    Args:
        model: a network of this package; stays as it is.
        num_classes: K of the new head, 2 or more.
        seed: of the initialisation.

    Returns:
        A network of the same weights up to the last features.

    Raises:
        ValueError: for fewer than 2 classes.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be 2 or more, got {num_classes}")
    name = model.SIZES["num_classes"].removesuffix(".weight")
    copy = nnx.clone(model)
    setattr(
        copy, name, nnx.Linear(getattr(copy, name).in_features, num_classes, rngs=nnx.Rngs(seed))
    )
    return copy


def embedded() -> Network:
    """The network that comes with the package: a CIFAR-style ResNet-20 trained on `data.shapes` (64 x 64, 10 classes)."""
    with resources.as_file(resources.files("adv2_jax") / "weights" / "shapes_resnet20.npz") as path:
        return load(EMBEDDED, path, image_size=64)


def embedded_masker() -> Masker:
    """The masker that comes with the package: it explains the `embedded` network by RTS."""
    with resources.as_file(resources.files("adv2_jax") / "weights" / "shapes_masker.npz") as path:
        return load_masker(path)


def save_masker(masker: Masker, name: str, path: str | os.PathLike[str]) -> None:
    """Write a masker, and what its encoder is, atomically.

    Args:
        masker: what to write.
        name: of its encoder, a key of `MODELS`.
        path: `.npz`.

    Raises:
        ValueError: for an unknown name, or another suffix.
    """
    check_name(name)
    encoder = masker.encoder
    options = {
        "name": name,
        "mean": encoder.mean,
        "std": encoder.std,
        "image_size": encoder.image_size,
    }
    write_arrays(
        path,
        convert.to_state_dict(masker)
        | {OPTION + key: np.asarray(value) for key, value in options.items()},
    )


def load_masker(path: str | os.PathLike[str]) -> Masker:
    """A masker that `save_masker` wrote.

    Raises:
        ValueError: for an unreadable file, or one that holds no masker (says which keys, with the
            expected and the found shape).
    """
    arrays = read_arrays(path)
    options = {
        key.removeprefix(OPTION): _plain(array)
        for key, array in arrays.items()
        if key.startswith(OPTION)
    }
    weights = {key: array for key, array in arrays.items() if not key.startswith(OPTION)}
    encoder = {
        key.removeprefix(ENCODER): array
        for key, array in weights.items()
        if key.startswith(ENCODER)
    }
    try:
        if "name" not in options:
            raise ValueError("it does not name its encoder; `adv2 train rts` writes maskers")
        name = str(options.pop("name"))
        check_name(name)
        abstract = nnx.eval_shape(
            lambda: Masker(
                check_encoder(build(name, **_sizes(name, encoder), **options)), rngs=nnx.Rngs(0)
            )
        )
        return convert.from_state_dict(abstract, weights)
    except Exception as error:  # options that no network has fail anywhere in it
        raise ValueError(f"{path} holds no masker: {first_line(error)}") from None


def _plain(array: np.ndarray) -> Any:
    """A number, a string, or a tuple of them: what an option was before it was written."""
    value = array.tolist()
    return tuple(value) if isinstance(value, list) else value


def check_encoder(network: object) -> Encoder:
    """A network that a masker can be built on.

    Raises:
        ValueError: for another network than a ResNet of this package.
    """
    if not isinstance(network, Encoder):
        names = ", ".join(
            name for name, kind in MODELS.items() if kind.func in (CifarResNet, ImageNetResNet)
        )
        raise ValueError(
            f"the encoder of a masker must be one of {names}, not a {type(network).__name__}"
        )
    return network


def image_size(name: str) -> int:
    """The side of the images that networks of a name are made for.

    Raises:
        ValueError: for an unknown name; lists the valid ones.
    """
    check_name(name)
    network: Any = MODELS[name].func
    return inspect.signature(network.__init__).parameters["image_size"].default


def check_name(name: str) -> None:
    """Refuse a name that is not in `MODELS`.

    Raises:
        ValueError: lists the valid ones.
    """
    if name not in MODELS:
        own = "; only `adv2 attack` takes path/to/file.py:name" if user.is_reference(name) else ""
        raise ValueError(f"model {name!r} is not one of {', '.join(MODELS)}{own}")


def _read(
    name: str, path: str | os.PathLike[str], key: str | None, options: dict[str, Any]
) -> tuple[Network, convert.Canonical]:
    """The network filled with the arrays of a file, and what had to be done to them."""
    check_name(name)
    arrays = read_arrays(path, key)
    network: Any = MODELS[name].func
    try:
        sizes = _sizes(name, convert.canonical(arrays, network.SIZES.values()).arrays)
        abstract = nnx.eval_shape(lambda: build(name, **{**sizes, **options}))
        expected = convert.shapes(abstract)
        found = convert.canonical(arrays, expected)
        fits = not convert.mismatches(
            expected, {key: array.shape for key, array in found.arrays.items()}
        )
        return convert.from_state_dict(abstract, found.arrays if fits else arrays), found
    except ValueError as error:
        raise ValueError(f"weights {path} do not fit {name}: {error}") from None


def _sizes(name: str, arrays: dict[str, np.ndarray]) -> dict[str, int]:
    """The options that a canonical state dict tells: each is the length of one array."""
    network: Any = MODELS[name].func
    found = {option: arrays.get(key) for option, key in network.SIZES.items()}
    return {
        option: array.shape[0]
        for option, array in found.items()
        if array is not None and array.ndim > 1
    }
