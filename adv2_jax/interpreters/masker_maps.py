"""RTS: a trained network, the masker, draws the map (ADV² §3.4; Dabkowski & Gal 2017)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adv2_jax.blending import blend
from adv2_jax.capabilities import logits_of, num_classes
from adv2_jax.interpreters.base import Context, Interpreter, Seen, recorded
from adv2_jax.losses import cross_entropy
from adv2_jax.maps import total_variation
from adv2_jax.options import bind
from adv2_jax.precision import at_least_float32
from adv2_jax.types import Classifier, Image, Label, Map, Masker


class SaliencyWeights(NamedTuple):
    """λ1 to λ4 of eq. 8, and what r_av is the mean of: m to the power of `area_power`.

    Below 1 it makes half a map cost more than half: what a masker draws has edges. Dabkowski & Gal
    use .3, the paper's words say 1.
    """

    variation: float = 0.5
    area: float = 8.0
    removal: float = 3.0
    power: float = 1.0
    area_power: float = 1.0


def rts(masker: Masker, image: Image, label: Label) -> Map:
    """The map that a masker draws; no pass over the classifier.

    Args:
        masker: trained by `adv2 train rts`.
        image: [H, W, 3] in [0, 1].
        label: [] the class c the map explains.

    Returns:
        [h, w] in [0, 1], not scaled: an image that does not show c has a map near zero.
    """
    return at_least_float32(masker(image, label))


def saliency_loss(
    model: Classifier,
    image: Image,
    label: Label,
    mask: Map,
    alternative: Image,
    weights: SaliencyWeights,
) -> Array:
    """λ1 r_tv(m) + λ2 r_av(m) - log f_c(φ(x; m)) + λ3 f_c(φ(x; 1 - m))^λ4, what a masker is trained
    to minimise (eq. 8).

    Args:
        model: the classifier f.
        image: x, [H, W, 3] in [0, 1].
        label: [] the class c.
        mask: m, [h, w] in [0, 1].
        alternative: what φ shows where the mask hides the image, [H, W, 3].
        weights: λ1 to λ4.

    Returns:
        [] >= 0.
    """
    kept, removed = (
        log_probability(model, blend(image, m, alternative), label) for m in (mask, 1 - mask)
    )
    # a power of f_c by its logarithm: no infinite slope where f_c rounds to 0
    return size_loss(mask, weights) - kept + weights.removal * jnp.exp(weights.power * removed)


def size_loss(mask: Map, weights: SaliencyWeights) -> Array:
    """λ1 r_tv(m) + λ2 r_av(m), the terms of eq. 8 that do not ask the classifier: all there is for a class that is not shown."""
    return (
        weights.variation * total_variation(mask) + weights.area * (mask**weights.area_power).mean()
    )


def log_probability(model: Classifier, image: Image, label: Label) -> Array:
    """log f_c(x), finite also where f_c rounds to 0."""
    return jax.nn.log_softmax(logits_of(model, image))[label]


def head_loss(masker: Masker, image: Image, label: Label) -> Array:
    """ℓ_enc as the released code has it: the cross-entropy of the encoder's own head towards class t, [] >= 0."""
    return cross_entropy(logits_of(masker.encoder, image), label)


def mean_loss(masker: Masker, image: Image, label: Label) -> Array:
    """ℓ_enc as the paper's text has it: distance of the encoder's output from that for class t, []
    >= 0.

    The mean square over channels of the difference between the last features, averaged over
    positions, and their mean over the training images of class t, in units of the mean square of
    the latter.
    """
    pooled = at_least_float32(masker.encoder.features(image)).mean(axis=(0, 1))
    mean = masker.means[...][label]
    return jnp.mean((pooled - mean) ** 2) / jnp.mean(mean**2)


def check_masker(model: Any, shape: tuple[int, ...], *, needs_means: bool = False) -> None:
    """Refuse a model whose masker is not made for its classes and for images of a shape [H, W, 3].

    Args:
        model: a `models.ClassifierWithMasker`, a classifier and its masker.
        shape: of the images.
        needs_means: whether `mean_loss` will be asked for, which divides by them.

    Raises:
        ValueError: says what is missing, or what the masker was made for.
    """
    model.masker.check(num_classes(model, shape), shape)
    if needs_means and not np.any(jax.device_get(model.masker.means[...]), axis=-1).all():
        raise ValueError(
            "the masker has no mean features of some classes, which encoder_loss 'mean' needs: train it, or use 'head'"
        )


@recorded
def rts_interpreter(*, encoder_loss: str = "head", encoder_weight: float = 0.1) -> Interpreter:
    """RTS, and with it ℓ_enc for the adversary, without which its attack "is often ineffective"
    (ADV² §3.4).

    The model is to be a `models.ClassifierWithMasker`: a classifier and its masker.

    Args:
        encoder_loss: "head", cross-entropy of the encoder's own head towards the target (released
            code), or "mean", distance of its pooled features from the mean of the target's class
            (the paper's text).
        encoder_weight: what ℓ_enc is multiplied with, 0 or more; the released code uses .1, 0
            leaves it out.

    Returns:
        An interpreter; equal options give the same object.

    Raises:
        ValueError: names the option that is out of its range.
    """
    if encoder_loss not in ENCODER_LOSSES:
        raise ValueError(f"encoder_loss {encoder_loss!r} is not one of {', '.join(ENCODER_LOSSES)}")
    if not 0 <= encoder_weight < float("inf"):
        raise ValueError(f"encoder_weight = {encoder_weight} must be finite and not negative")
    surrogate = bind(_rts_with_penalty, encoder_loss=encoder_loss, encoder_weight=encoder_weight)
    needs_means = encoder_loss == "mean" and encoder_weight > 0
    return Interpreter(
        "rts", _rts, surrogate, check=bind(check_masker, needs_means=needs_means), needs=("masker",)
    )


def _rts(model: Any, image: Image, label: Label) -> Map:
    return rts(model.masker, image, label)


def _rts_with_penalty(
    model: Any,
    image: Image,
    label: Label,
    context: Context,
    *,
    encoder_loss: str,
    encoder_weight: float,
) -> Seen:
    penalty = (
        encoder_weight * ENCODER_LOSSES[encoder_loss](model.masker, image, label)
        if encoder_weight
        else 0.0
    )
    return Seen(logits_of(model, image), rts(model.masker, image, label), penalty)


ENCODER_LOSSES = {"head": head_loss, "mean": mean_loss}
