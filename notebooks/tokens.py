"""Your own network without feature maps: a small transformer of tokens, which has `logits` alone.

adv2 attack --model notebooks/tokens.py:network --weights weights.npz --images images.npz --out run

explains and attacks it by GRAD and MASK; CAM, which weighs feature maps, is left out.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

PATCH, WIDTH, CLASSES = 4, 32, 10
SHAPES = {
    "embed": (PATCH * PATCH * 3, WIDTH),
    "query_key_value": (WIDTH, 3 * WIDTH),
    "inner": (WIDTH, 2 * WIDTH),
    "outer": (2 * WIDTH, WIDTH),
    "head": (WIDTH, CLASSES),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """The weights, by name: what the attack takes."""

    weights: dict[str, jax.Array]

    def logits(self, image, act=jax.nn.relu):
        w, (height, width, _) = self.weights, image.shape
        patches = image.reshape(height // PATCH, PATCH, width // PATCH, PATCH, 3).swapaxes(1, 2)
        tokens = (patches.reshape(-1, PATCH * PATCH * 3) - 0.5) @ w["embed"]
        query, key, value = jnp.split(tokens @ w["query_key_value"], 3, axis=-1)
        tokens = tokens + jax.nn.softmax(query @ key.T / WIDTH**0.5) @ value
        tokens = tokens + act(tokens @ w["inner"]) @ w["outer"]
        return tokens.mean(axis=0) @ w["head"]


def network(path=None):
    """Return the network with the weights of an .npz, or with random ones."""
    if path is None:
        rng = np.random.default_rng(0)
        return Tokens(
            {
                name: jnp.float32(rng.standard_normal(shape) / shape[0] ** 0.5)
                for name, shape in SHAPES.items()
            }
        )
    with np.load(path) as weights:
        return Tokens({name: jnp.asarray(weights[name]) for name in SHAPES})
