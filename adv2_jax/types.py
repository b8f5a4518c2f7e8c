"""Types: names for the arrays that pass between modules, and the protocols of a classifier.

Everything below `adv2_jax.crafting` works on one image. Shapes are written

    image     [H, W, 3]  float32 in [0, 1]
    features  [h, w, C]  last convolutional features
    logits    [K]        float32, one for each class, before the softmax
    label     []         int32, a class in 0..K-1
    map       [h, w]     float32 in [0, 1], large = important
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jax import Array

Image = Array
Features = Array
Logits = Array
Label = Array
Map = Array

Activation = Callable[[Array], Array]
Score = Callable[[Logits, Label], Array]  # class score: logits [K], label [] -> []


@runtime_checkable
class HasLogits(Protocol):
    """Protocol of plain PGD, GRAD and MASK: a pytree of weights with this pure method."""

    def logits(self, image: Image, act: Activation = ...) -> Logits:
        """Return the logits [K] of an image in [0, 1] (normalise it inside).

        `act` replaces every ReLU.
        """
        ...


@runtime_checkable
class HasFeatures(Protocol):
    """Protocol of CAM and Grad-CAM: a pytree of weights with these two pure methods.

    head(features(image)) are the logits, so such a model needs no method `logits`.
    """

    def features(self, image: Image, act: Activation = ...) -> Features:
        """Return the last convolutional features [h, w, C] of an image in [0, 1].

        `act` replaces every ReLU.
        """
        ...

    def head(self, features: Features) -> Logits:
        """Return the logits [K]; for CAM by global average pooling and a linear layer."""
        ...


@runtime_checkable
class HasAttention(Protocol):
    """Protocol of attention rollout: a transformer (`adv2_jax.models.VisionTransformer`)."""

    def logits(self, image: Image, *, attend: Callable[[Array], Array] = ...) -> Logits:
        """Return the logits [K] of an image in [0, 1].

        `attend` is called with the attention [heads, T, T] of each block, in their order; what it
        returns takes its place.
        """
        ...


Classifier = HasLogits | HasFeatures


@runtime_checkable
class Masker(Protocol):
    """Protocol of RTS: the network that draws the map (`adv2_jax.models.Masker`).

    Attributes:
        encoder: the classifier inside.
        means: [K, C], mean features of the encoder for each class.
    """

    encoder: HasFeatures
    means: Any

    def __call__(self, image: Image, label: Label) -> Map:
        """Return the map [h, w] in [0, 1] of a class."""
        ...
