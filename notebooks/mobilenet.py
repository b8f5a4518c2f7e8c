"""Your own network as plain functions and a dict of weights: MobileNet-EdgeTPU.

The package does not ship it.

    adv2 attack --model notebooks/mobilenet.py:mobilenet --weights mobilenet_edgetpu_224.npz --images photos.npz --out run

The network comes as two files: arrays by name (`.npz`) and, beside it, a list of operations (`.graph.json`).
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MobileNet:
    """The network: its weights are arguments of `jit`, its list of operations is static text.

    Equal texts share one compilation.
    """

    weights: dict[str, jax.Array]
    graph: str = dataclasses.field(metadata={"static": True})

    def features(self, image, act=jax.nn.relu):  # [224, 224, 3] in [0, 1] -> [7, 7, 1280]
        x = 2 * image[None] - 1  # the network was trained on [-1, 1]
        # in the type of the weights, which --precision bfloat16 narrows
        values = {"images_int8": x.astype(jnp.result_type(*self.weights.values()))}
        for operation in json.loads(self.graph)["ops"]:
            if operation["op"] in ("conv", "dwconv"):
                x = self.conv(operation, values[operation["input"]])
                x = act(x) if operation["act"] == "relu" else x
            elif operation["op"] == "add":
                x = sum(values[name] for name in operation["inputs"])
            elif operation["op"] == "gap":
                return values[operation["input"]][0]
            else:
                continue
            values[operation["output"]] = x
        raise ValueError("the graph has no global average pooling")

    def head(self, features):  # -> [1000]: the first of the 1001 logits is the background
        kernel, bias = self.layer("MobilenetEdgeTPU/Logits/Conv2d_1c_1x1")
        return (features.mean(axis=(0, 1)) @ kernel[0, 0] + bias)[1:]

    def layer(self, name):
        return self.weights[f"{name}/kernel"], self.weights[f"{name}/bias"]

    def conv(self, operation, x):
        kernel, bias = self.layer(operation["name"])
        stride, padding = operation["stride"], operation["padding"]
        if operation["op"] == "dwconv":
            return bias + depthwise(x, kernel[:, :, 0], stride)
        return bias + lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


def depthwise(x, kernel, stride):
    """Return the depthwise convolution of [1, H, W, C] with [k, k, C]."""
    # as k² shifted products: XLA:CPU takes three times as long for its own depthwise convolution
    k = len(kernel)
    padding = [(0, 0), *lax.padtype_to_pads(x.shape[1:3], (k, k), (stride, stride), "SAME"), (0, 0)]
    padded = jnp.pad(x, padding)
    h, w = (size - k + 1 for size in padded.shape[1:3])
    return sum(
        padded[:, i : i + h : stride, j : j + w : stride] * kernel[i, j]
        for i in range(k)
        for j in range(k)
    )


def mobilenet(path):
    """Read the network from a weights file and the graph beside it."""
    weights, graph = Path(path), Path(path).with_suffix(".graph.json")
    with np.load(weights, allow_pickle=False) as arrays:
        return MobileNet(
            {name: jnp.asarray(arrays[name]) for name in arrays.files},
            graph.read_text(encoding="utf-8"),
        )
