"""Conversion of torch-style state dicts to Flax NNX modules and back.

A module whose attributes have the PyTorch names needs no table: `layer1.0.conv1.kernel` is
`layer1.0.conv1.weight` with its axes permuted. Only the names of the parameters themselves and the
layouts differ, and one attribute that cannot have the name of a method.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx

from adv2_jax.errors import listed
from adv2_jax.state_dicts import CHOICE

Module = TypeVar("Module", bound=nnx.Module)

TORCH_NAME = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# of DenseNets and of ViTs: `features` and `head` are the names of methods here
TORCH_ATTRIBUTE = {"trunk": "features", "classes": "head"}
# axes by rank: convolution HWIO -> OIHW, linear IO -> OI; tokens of ViTs are [1, T, D]
TO_TORCH = {4: (3, 2, 0, 1), 3: (0, 1, 2), 2: (1, 0), 1: (0,), 0: ()}
COUNTERS = ("num_batches_tracked", "n_averaged")  # of BatchNorm and of averaged models: not weights
RENAMED = {
    # torchvision's files of DenseNets say norm.1, its module norm1
    r"(denselayer\d+\.(?:norm|conv))\.([12])\.": r"\1\2.",
    # its ViTs, under the names of timm
    r"\bclass_token$": "cls_token",
    r"\bencoder\.pos_embedding$": "pos_embed",
    r"\bconv_proj\.": "patch_embed.proj.",
    r"\bencoder\.layers\.encoder_layer_(\d+)\.": r"blocks.\1.",
    r"\bencoder\.ln\.": "norm.",
    r"\bheads\.head\.": "head.",
    r"\bln_([12])\.": r"norm\1.",
    r"\bself_attention\.in_proj_": "attn.qkv.",
    r"\bself_attention\.out_proj\.": "attn.proj.",
    r"\bmlp\.(?:0|linear_1)\.": "mlp.fc1.",
    r"\bmlp\.(?:3|linear_2)\.": "mlp.fc2.",
}


class Canonical(NamedTuple):
    """A state dict under the names of torchvision, and the changes that led to it.

    Attributes:
        arrays: by name, unchanged.
        prefix: removed from every key, with its last dot; empty for none.
        passed_over: old names of counters.
        renamed: old -> new name, both without the prefix.
        left_out: old names of arrays that the network does not have.
        others: further prefixes under which the file holds as many keys of the network.
    """

    arrays: dict[str, np.ndarray]
    prefix: str
    passed_over: list[str]
    renamed: dict[str, str]
    left_out: list[str]
    others: list[str]

    def changes(self) -> list[str]:
        """Describe the changes, a line each."""
        renamed = [f"{old} -> {new}" for old, new in self.renamed.items()]
        prefix = [f"taken off every key: {self.prefix}"] if self.prefix else []
        return [
            *prefix,
            *_counted("passed over", self.passed_over),
            *_counted("renamed", renamed),
            *self.losses(),
        ]

    def losses(self) -> list[str]:
        """Describe the keys left out in one line, if there are any."""
        names = [prefix.removesuffix(".") for prefix in self.others]
        others = f"; as many keys fit under {listed(names, ', ')} ({CHOICE})" if names else ""
        return [line + others for line in _counted("left out", self.left_out)]


def _counted(what: str, keys: Sequence[str]) -> list[str]:
    return [f"{what}, {len(keys)} in all: {listed(keys, ', ', 2)}"] if keys else []


def canonical(arrays: Mapping[str, np.ndarray], expected: Collection[str] = ()) -> Canonical:
    """Bring a state dict under the names of torchvision, which are those of timm; of ViTs, timm's.

    Counters are passed over. A prefix of the network's keys (`module.`, `model.`, `backbone.`, …)
    is removed. Arrays without it, or of no module of the network (a normaliser in front, a second
    copy of the weights), are left out. Names of `RENAMED` are changed.

    Args:
        arrays: by name.
        expected: keys of the network, which tell the prefix; unless given, it is the one that all
            keys have.

    Raises:
        ValueError: two keys become one.
    """
    passed_over = [key for key in arrays if key.rpartition(".")[2] in COUNTERS]
    new = {key: _renamed(key) for key in arrays if key.rpartition(".")[2] not in COUNTERS}
    fits = _fits(new.values(), expected)
    modules = {key.partition(".")[0] for key in expected}
    prefix = fits[0] if fits else _common(list(new.values()), modules or TORCH_ATTRIBUTE.values())
    # where no prefix fits well nothing is left out, so that an error can show what the file holds
    bare = {
        key: name.removeprefix(prefix)
        for key, name in new.items()
        if not fits
        or (name.startswith(prefix) and name.removeprefix(prefix).partition(".")[0] in modules)
    }
    twice = [name for name, times in Counter(bare.values()).items() if times > 1]
    if twice:
        raise ValueError(f"found under two names: {listed(twice)}")
    return Canonical(
        arrays={name: np.asarray(arrays[key]) for key, name in bare.items()},
        prefix=prefix,
        passed_over=passed_over,
        renamed={key.removeprefix(prefix): name for key, name in bare.items() if key != new[key]},
        left_out=[key for key in new if key not in bare],
        others=fits[1:],
    )


def _renamed(key: str) -> str:
    for pattern, name in RENAMED.items():
        key = re.sub(pattern, name, key)
    return key


def _fits(names: Iterable[str], expected: Collection[str]) -> list[str]:
    """Return the prefixes with the most expected keys, if more than half; the shallowest first."""
    # 0: the empty prefix, of a file whose keys fit as they are
    ends = ((name, [0, *(dot.end() for dot in re.finditer(r"\.", name))]) for name in names)
    counts = Counter(
        name[:end] for name, name_ends in ends for end in name_ends if name[end:] in expected
    )
    most = max(counts.values(), default=0)
    fits = [
        prefix for prefix, count in counts.items() if count == most and 2 * count > len(expected)
    ]
    return sorted(fits, key=lambda prefix: prefix.count("."))


def _common(keys: Sequence[str], modules: Collection[str]) -> str:
    """Return the longest prefix of whole names that all keys share, without names of `modules`."""
    first = {key.partition(".")[0] for key in keys}
    if len(first) != 1 or first & set(modules) or not all("." in key for key in keys):
        return ""
    name = f"{first.pop()}."
    return name + _common([key.removeprefix(name) for key in keys], modules)


def _torch_key(path: tuple[Any, ...]) -> str:
    names = (TORCH_ATTRIBUTE.get(name, name) for name in path[:-1])
    return ".".join(map(str, (*names, TORCH_NAME.get(path[-1], path[-1]))))


def shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes in the torch-style state dict of a module, by key.

    The leaves of the module may be abstract (`nnx.eval_shape`).
    """
    return {
        _torch_key(path): tuple(variable.shape[axis] for axis in TO_TORCH[len(variable.shape)])
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


def mismatches(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Describe every key that is missing, of another shape, or unexpected, a phrase each."""
    missing = [f"{k} expected {s} found nothing" for k, s in expected.items() if k not in found]
    shapes = [
        f"{k} expected {s} found {found[k]}"
        for k, s in expected.items()
        if k in found and found[k] != s
    ]
    extra = [f"{k} expected nothing found {s}" for k, s in found.items() if k not in expected]
    # in turn, so that the first few, which are all that a message shows, are of every kind
    return [
        phrase
        for phrases in zip_longest(missing, shapes, extra)
        for phrase in phrases
        if phrase is not None
    ]


def from_state_dict(model: Module, arrays: Mapping[str, np.ndarray]) -> Module:
    """Return a module with the weights of a torch-style state dict.

    Args:
        model: any NNX module whose attribute names are those of the state dict; its leaves may be
            abstract (`nnx.eval_shape`).
        arrays: convolutions OIHW, linear layers [out, in], BatchNorm weight, bias, running_mean,
            running_var, under names that `canonical` understands, and no others.

    Returns:
        A new module of the same structure with float32 leaves.

    Raises:
        ValueError: lists the keys that do not match, with the expected and the found shape, or that
            hold numbers that are not finite.
    """
    graph, state = nnx.split(model)
    expected = shapes(model)
    source = canonical(arrays, expected)
    every = source.arrays | {key: np.asarray(arrays[key]) for key in source.left_out}
    wrong = mismatches(expected, {key: array.shape for key, array in every.items()})
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(expected.keys() | every.keys())} keys do not match: {listed(wrong)}"
        )
    not_finite = [
        k
        for k, v in source.arrays.items()
        # JAX's test: NumPy's own does not take bfloat16 for a floating-point type
        if not (jax.dtypes.issubdtype(v.dtype, np.floating) and np.isfinite(v).all())
    ]
    if not_finite:
        raise ValueError(f"not finite floating-point numbers: {listed(not_finite, ', ')}")
    weights = {
        # argsort of a permutation is its inverse; half precision and float64 become float32
        key: jax.device_put(array.astype(np.float32).transpose(np.argsort(TO_TORCH[array.ndim])))
        for key, array in source.arrays.items()
    }
    flat = [
        (path, variable.replace(weights[_torch_key(path)]))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def to_state_dict(model: nnx.Module) -> dict[str, np.ndarray]:
    """Return the torch-style state dict of a module: the inverse of `from_state_dict`."""
    flat = [(path, np.asarray(leaf[...])) for path, leaf in nnx.to_flat_state(nnx.state(model))]
    return {
        # order="C": a transposed array is a view with other strides, and writers such as
        # `safetensors.numpy.save_file` write memory as it lies
        _torch_key(path): np.asarray(array.transpose(TO_TORCH[array.ndim]), order="C")
        for path, array in flat
    }
