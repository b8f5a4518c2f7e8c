"""Names for the arrays that pass between modules, and what is asked of a classifier.

Everything below `adv2_jax.attacks` sees one image. Shapes are written

    image     [H, W, 3]  float32 in [0, 1]
    features  [h, w, C]  last convolutional features
    logits    [K]        one score a class
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
Score = Callable[[Logits, Label], Array]  # of a class, []


@runtime_checkable
class HasLogits(Protocol):
    """Any pytree with this pure method; its weights are its leaves. All that plain PGD, GRAD and MASK ask for."""

    def logits(self, image: Image, act: Activation = ...) -> Logits:
        """Logits [K]; normalises the [0, 1] image inside; `act` replaces every ReLU."""
        ...


@runtime_checkable
class HasFeatures(Protocol):
    """Any pytree with these two pure methods, which together are `logits`. CAM and its family ask for them."""

    def features(self, image: Image, act: Activation = ...) -> Features:
        """Last convolutional features [h, w, C]; normalises the [0, 1] image inside; `act` replaces every ReLU."""
        ...

    def head(self, features: Features) -> Logits:
        """The rest: logits [K]. For CAM global average pooling and a linear layer."""
        ...


Classifier = HasLogits | HasFeatures


@runtime_checkable
class Masker(Protocol):
    """The network of RTS (`adv2_jax.models.Masker`)."""

    encoder: HasFeatures
    means: Any

    def __call__(self, image: Image, label: Label) -> Map:
        """The map [h, w] in [0, 1] of a class.

        `encoder` is the classifier inside, `means` [K, C] are its mean features, a class each.
        """
        ...
