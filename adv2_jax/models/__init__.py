"""Networks by name, and their weights.

model = adv2.models.load("resnet50", "resnet50.pth")
"""

import inspect
import logging
import os
import zipfile
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from adv2_jax.errors import first_line
from adv2_jax.files import check_writable, read_arrays, write_arrays
from adv2_jax.models import convert, user
from adv2_jax.models.densenet import DenseNet
from adv2_jax.models.masker import ClassifierWithMasker, Encoder, Masker
from adv2_jax.models.resnet import CifarResNet, ImageNetResNet
from adv2_jax.models.vit import VisionTransformer
from adv2_jax.state_dicts import read_weights

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
    "VisionTransformer",
    "build",
    "check_encoder",
    "check_name",
    "convert",
    "convert_file",
    "embedded",
    "embedded_masker",
    "image_size",
    "load",
    "load_masker",
    "save",
    "save_masker",
    "saved_options",
    "user",
    "with_new_head",
]

log = logging.getLogger(__name__)

EMBEDDED = "cifar_resnet20"  # name of the network that is shipped with the package
# prefixes of arrays in our own files: what the network is, beside its weights; a masker's encoder
OPTION, ENCODER = "option/", "encoder."
Network = CifarResNet | ImageNetResNet | DenseNet | VisionTransformer

MODELS: dict[str, partial[Any]] = {
    "cifar_resnet20": partial(CifarResNet, 3),
    "cifar_resnet32": partial(CifarResNet, 5),
    "cifar_resnet44": partial(CifarResNet, 7),
    "cifar_resnet56": partial(CifarResNet, 9),
    "cifar_resnet110": partial(CifarResNet, 18),
    "resnet18": partial(ImageNetResNet, (2, 2, 2, 2), 1),
    "resnet34": partial(ImageNetResNet, (3, 4, 6, 3), 1),
    "resnet50": partial(ImageNetResNet, (3, 4, 6, 3), 4),
    "resnet101": partial(ImageNetResNet, (3, 4, 23, 3), 4),
    "resnet152": partial(ImageNetResNet, (3, 8, 36, 3), 4),
    "densenet121": partial(DenseNet, (6, 12, 24, 16)),
    "densenet161": partial(DenseNet, (6, 12, 36, 24), growth=48, width=96),
    "densenet169": partial(DenseNet, (6, 12, 32, 32)),
    "densenet201": partial(DenseNet, (6, 12, 48, 32)),
    "vit_tiny_patch16": partial(VisionTransformer, 12, 3, width=192),
    "vit_small_patch16": partial(VisionTransformer, 12, 6, width=384),
    "vit_base_patch16": partial(VisionTransformer, 12, 12, width=768),
    "vit_base_patch32": partial(VisionTransformer, 12, 12, width=768, patch=32),
    "vit_large_patch16": partial(VisionTransformer, 24, 16, width=1024),
}


def build(name: str, *, seed: int = 0, **options: Any) -> Network:
    """Return a freshly initialised network.

    Args:
        name: a key of `MODELS`.
        seed: of the initialisation.
        **options: `num_classes`, `width`, `mean`, `std`, `image_size`; `growth` of a DenseNet (see
            the class).

    Raises:
        ValueError: the name is unknown; lists the valid ones.
    """
    check_name(name)
    return MODELS[name](rngs=nnx.Rngs(seed), **options)


def load(
    name: str | None, path: str | os.PathLike[str], *, key: str | None = None, **options: Any
) -> Network:
    """Load a network from a torch-style state dict under the names of torchvision or timm.

    The largest set of keys that fits the network under one prefix is taken. Other arrays in the
    file are logged as a warning.

    Args:
        name: a key of `MODELS`; None for a file that says it (`save`).
        path: of the file, as for `state_dicts.read_weights`. Width, growth and number of classes
            are taken from its shapes unless given.
        key: which weights, where a file holds several (`state_dict_ema`, `module.model`), as for
            `state_dicts.read_weights`.
        **options: as for `build`; mean, std and image_size are those of a file that says them.

    Raises:
        ValueError: the name is unknown or another than that of the file, the file cannot be read,
            or the weights do not fit (lists the keys, with the expected and the found shape).
    """
    model, source = _read(name, path, key, options)
    for line in source.losses():
        log.warning("%s: %s", path, line)
    return model


def convert_file(
    path: str | os.PathLike[str], name: str, out: str | os.PathLike[str], *, key: str | None = None
) -> list[str]:
    """Check that weights fit a network, and write them under torchvision's names.

    Args:
        path: as for `load`.
        name: a key of `MODELS`.
        out: `.npz` or `.safetensors`, written atomically.
        key: as for `load`.

    Returns:
        The sizes of the network and the changes of names, a line each.

    Raises:
        ValueError: as `load`, or `out` has another suffix.
    """
    # before the weights, which may take long to read
    check_writable(out)
    model, source = _read(name, path, key, {})
    arrays, said = convert.to_state_dict(model), saved_options(path)
    # safetensors holds no text
    if said and Path(out).suffix == ".npz":
        save(model, name, out, classes=said.get("classes"))
    else:
        write_arrays(out, arrays)
    sizes = (f"{option.replace('_', ' ')} {size}" for option, size in _sizes(name, arrays).items())
    return [
        f"{len(arrays)} of {len(arrays)} keys fit {name}: {', '.join(sizes)}",
        *source.changes(),
        f"written: {out}",
    ]


def with_new_head(model: Network, num_classes: int, *, seed: int = 0) -> Network:
    """Return a copy of a network with a freshly initialised head, to be trained on other classes.

    Args:
        model: a network of this package; not changed.
        num_classes: K of the new head, 2 or more.
        seed: of the initialisation.

    Returns:
        A network with the same weights up to the last features.

    Raises:
        ValueError: there are fewer than 2 classes.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be 2 or more, got {num_classes}")
    name = model.SIZES["num_classes"].removesuffix(".weight")
    attributes = {torch: own for own, torch in convert.TORCH_ATTRIBUTE.items()}
    name, copy = attributes.get(name, name), nnx.clone(model)
    # the head is the one layer whose size is the number of classes
    setattr(
        copy, name, nnx.Linear(getattr(copy, name).in_features, num_classes, rngs=nnx.Rngs(seed))
    )
    return copy


def embedded() -> Network:
    """Load the network that is shipped with the package.

    A CIFAR-style ResNet-20, trained on `data.shapes` (64 x 64 pixels, 10 classes).
    """
    # the package may lie in a zip file: `as_file` then unpacks this one
    with resources.as_file(resources.files("adv2_jax") / "weights" / "shapes_resnet20.npz") as path:
        return load(EMBEDDED, path, image_size=64)


def embedded_masker() -> Masker:
    """Load the masker that is shipped with the package; it explains the `embedded` network."""
    with resources.as_file(resources.files("adv2_jax") / "weights" / "shapes_masker.npz") as path:
        return load_masker(path)


def save(
    model: Network,
    name: str,
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
) -> None:
    """Write the weights of a network, and what it is, atomically: `load(None, path)` reads both.

    Args:
        model: the network.
        name: a key of `MODELS`.
        path: `.npz`.
        classes: their names.

    Raises:
        ValueError: the name is unknown, or the suffix another.
    """
    named = {} if classes is None else {f"{OPTION}classes": np.asarray(classes)}
    write_arrays(path, convert.to_state_dict(model) | _options(name, model) | named)


def saved_options(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a file of `save` says of its network; nothing of another file.

    Returns:
        `name`, `mean`, `std`, `image_size`, and `classes` where they have names.
    """
    if not zipfile.is_zipfile(path):  # or missing: whoever reads the weights says so
        return {}
    arrays = read_arrays(path, lambda name: name.startswith(OPTION))
    return {key.removeprefix(OPTION): _plain(array) for key, array in arrays.items()}


def _options(name: str, network: Any) -> dict[str, np.ndarray]:
    check_name(name)
    options = {"name": name} | {key: getattr(network, key) for key in ("mean", "std", "image_size")}
    return {OPTION + key: np.asarray(value) for key, value in options.items()}


def save_masker(masker: Masker, name: str, path: str | os.PathLike[str]) -> None:
    """Write a masker and the options of its encoder, atomically.

    Args:
        masker: the masker.
        name: of its encoder, a key of `MODELS`.
        path: `.npz`.

    Raises:
        ValueError: the name is unknown, or the suffix another.
    """
    write_arrays(path, convert.to_state_dict(masker) | _options(name, masker.encoder))


def load_masker(path: str | os.PathLike[str]) -> Masker:
    """Load a masker that `save_masker` wrote.

    Raises:
        ValueError: the file cannot be read or holds no masker (lists the keys that do not match,
            with the expected and the found shape).
    """
    weights, options = _without_options(read_weights(path)), saved_options(path)
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
        # shapes only: no weights are drawn that those of the file replace
        abstract = nnx.eval_shape(
            lambda: Masker(
                check_encoder(build(name, **_sizes(name, encoder), **options)), rngs=nnx.Rngs(0)
            )
        )
        return convert.from_state_dict(abstract, weights)
    except Exception as error:  # wrong options of a damaged file fail anywhere in the network
        raise ValueError(f"{path} holds no masker: {first_line(error)}") from None


def _without_options(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: array for key, array in arrays.items() if not key.startswith(OPTION)}


def _plain(array: np.ndarray) -> Any:
    """Return an option as it was before it was written: a number, a string, or a tuple of them."""
    value = array.tolist()
    # a list cannot be hashed, as the static part of a network is for `jit`
    return tuple(value) if isinstance(value, list) else value


def check_encoder(network: object) -> Encoder:
    """Return the network if a masker can be built on it.

    Raises:
        ValueError: it is no ResNet of this package.
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
    """Return the side in pixels of the images that networks of a name are made for.

    Raises:
        ValueError: the name is unknown; lists the valid ones.
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
        hint = "; only `adv2 attack` takes path/to/file.py:name" if user.is_reference(name) else ""
        raise ValueError(f"model {name!r} is not one of {', '.join(MODELS)}{hint}")


def _read(
    name: str | None, path: str | os.PathLike[str], key: str | None, options: dict[str, Any]
) -> tuple[Network, convert.Canonical]:
    """Return a network with the weights of a file, and the changes of their names."""
    if name is not None:
        check_name(name)
    said = saved_options(path)
    said.pop("classes", None)
    made = said.pop("name", name)
    name = made if name is None else name
    if name is None:
        raise ValueError(f"{path} does not say which network its weights are of: name it")
    if made != name:
        raise ValueError(f"weights {path} are of {made}, not of {name}")
    options = said | options
    arrays = _without_options(read_weights(path, key))
    network: Any = MODELS[name].func
    try:
        sizes = _sizes(name, convert.canonical(arrays, network.SIZES.values()).arrays)
        # shapes only: no weights are drawn that those of the file replace
        abstract = nnx.eval_shape(lambda: build(name, **{**sizes, **options}))
        expected = convert.shapes(abstract)
        source = convert.canonical(arrays, expected)
        fits = not convert.mismatches(
            expected, {key: array.shape for key, array in source.arrays.items()}
        )
        # what does not fit is handed over whole, so that the error can name what was left out
        return convert.from_state_dict(abstract, source.arrays if fits else arrays), source
    except ValueError as error:
        raise ValueError(f"weights {path} do not fit {name}: {error}") from None


def _sizes(name: str, arrays: dict[str, np.ndarray]) -> dict[str, int]:
    """Return the options that the shapes of a canonical state dict tell."""
    network: Any = MODELS[name].func
    return {
        option: arrays[key].shape[0]
        for option, key in network.SIZES.items()
        # a damaged file's number has no shape[0]; its wrong rank is reported with all mismatches
        if key in arrays and arrays[key].ndim > 1
    }
