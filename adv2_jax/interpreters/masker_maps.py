"""RTS: a trained network, the masker, draws the map (ADV² §3.4; Dabkowski & Gal 2017).

Notation: m the map, φ(x; m) the image blended into an alternative (`blending.blend`), f the
classifier, c the class.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adv2_jax.blending import blend
from adv2_jax.capabilities import logits_of, num_classes
from adv2_jax.interpreters.base import Context, Interpreter, Seen, interpreter_factory
from adv2_jax.losses import cross_entropy
from adv2_jax.maps import total_variation
from adv2_jax.options import bind
from adv2_jax.precision import at_least_float32
from adv2_jax.types import Classifier, Image, Label, Map, Masker


class SaliencyWeights(NamedTuple):
    """Weights of eq. 8, by which maskers are trained.

    Attributes:
        variation: λ1, of the total variation r_tv.
        area: λ2, of the mean r_av.
        removal: λ3, of the probability that is left where the map hides the object.
        power: λ4, exponent of that probability.
        area_power: r_av is the mean of m to this power. Below 1 intermediate values cost more than
            their share, which gives maps with edges; Dabkowski & Gal use .3, the paper says 1.
    """

    # λ1 and λ2 are Dabkowski & Gal's. The others were found by training on the embedded set; the
    # shipped masker has them, and the README its quality
    variation: float = 0.5
    area: float = 8.0
    removal: float = 3.0
    power: float = 1.0
    area_power: float = 1.0


def rts(masker: Masker, image: Image, label: Label) -> Map:
    """Return the map that a masker draws; the classifier is not called.

    Args:
        masker: trained by `adv2 train rts`.
        image: [H, W, 3] in [0, 1].
        label: [] the class c the map explains.

    Returns:
        [h, w] in [0, 1], not scaled: an image that does not show c has a map near zero.
    """
    # not min-max scaled: how much of a map there is says whether c is shown at all
    return at_least_float32(masker(image, label))


def saliency_loss(
    model: Classifier,
    image: Image,
    label: Label,
    m: Map,
    alternative: Image,
    weights: SaliencyWeights,
) -> Array:
    """Return the training loss of a masker for one image (eq. 8).

        λ1 r_tv(m) + λ2 r_av(m) - log f_c(φ(x; m)) + λ3 f_c(φ(x; 1 - m))^λ4

    Args:
        model: the classifier f.
        image: x, [H, W, 3] in [0, 1].
        label: [] the class c.
        m: [h, w] in [0, 1], the map.
        alternative: the image that φ shows where m = 0, [H, W, 3].
        weights: λ1 to λ4.

    Returns:
        [] >= 0.
    """
    preserved, removed = (
        log_probability(model, blend(image, visible, alternative), label) for visible in (m, 1 - m)
    )
    # f_c^λ4 by its logarithm: for λ4 < 1 a power has an infinite slope where f_c rounds to 0
    return size_loss(m, weights) - preserved + weights.removal * jnp.exp(weights.power * removed)


def size_loss(m: Map, weights: SaliencyWeights) -> Array:
    """Return λ1 r_tv(m) + λ2 r_av(m), the terms of eq. 8 without the classifier, [] >= 0.

    For a class that the image does not show it is the whole loss: the map should be empty.
    """
    return weights.variation * total_variation(m) + weights.area * (m**weights.area_power).mean()


def log_probability(model: Classifier, image: Image, label: Label) -> Array:
    """Return log f_c(x), [] <= 0."""
    # by log_softmax: finite also where f_c itself rounds to 0
    return jax.nn.log_softmax(logits_of(model, image))[label]


def head_loss(masker: Masker, image: Image, label: Label) -> Array:
    """Return ℓ_enc of the released code: cross-entropy of the encoder's own head for t, [] >= 0."""
    return cross_entropy(logits_of(masker.encoder, image), label)


def mean_loss(masker: Masker, image: Image, label: Label) -> Array:
    """Return ℓ_enc of the paper's text: distance of the encoder's output from class t, [] >= 0.

    It is the mean square, over channels, of the difference between the last features averaged over
    positions and the mean of these over the training images of class t.
    """
    pooled = at_least_float32(masker.encoder.features(image)).mean(axis=(0, 1))
    mean = masker.means[...][label]
    # in units of the class mean, so that one `encoder_weight` serves encoders of any scale
    return jnp.mean((pooled - mean) ** 2) / jnp.mean(mean**2)


def check_masker(model: Any, shape: tuple[int, ...], *, needs_means: bool = False) -> None:
    """Refuse a masker that was made for other classes or images of another shape.

    Args:
        model: a `models.ClassifierWithMasker`, a classifier and its masker.
        shape: of the images, [H, W, 3].
        needs_means: True if `mean_loss` will be called, which needs the mean features of a class.

    Raises:
        ValueError: says what is missing, or what the masker was made for.
    """
    model.masker.check(num_classes(model, shape), shape)
    # means of zeros are those of a masker before training; `mean_loss` would divide by zero
    if needs_means and not np.any(jax.device_get(model.masker.means[...]), axis=-1).all():
        raise ValueError(
            "the masker has no mean features of some classes, which encoder_loss 'mean' needs: "
            "train it, or use 'head'"
        )


@interpreter_factory
def rts_interpreter(*, encoder_loss: str = "head", encoder_weight: float = 0.1) -> Interpreter:
    """RTS, attacked through its map and the encoder loss ℓ_enc (ADV² §3.4).

    Without ℓ_enc the attack "is often ineffective" (same section). The model must be a
    `models.ClassifierWithMasker`: a classifier and its masker.

    Args:
        encoder_loss: "head", cross-entropy of the encoder's own head for the target (released
            code), or "mean", distance of its pooled features from the mean of the target's class
            (the paper's text).
        encoder_weight: factor of ℓ_enc, 0 or more; the released code uses .1, 0 omits the term.

    Returns:
        An interpreter; equal options give the same object.

    Raises:
        ValueError: names the option that is out of its range.
    """
    if encoder_loss not in ENCODER_LOSSES:
        raise ValueError(f"encoder_loss {encoder_loss!r} is not one of {', '.join(ENCODER_LOSSES)}")
    if not 0 <= encoder_weight < float("inf"):
        raise ValueError(f"encoder_weight = {encoder_weight} must be finite and not negative")
    needs_means = encoder_loss == "mean" and encoder_weight > 0
    return Interpreter(
        "rts",
        _rts,
        bind(_rts_with_penalty, encoder_loss=encoder_loss, encoder_weight=encoder_weight),
        check=bind(check_masker, needs_means=needs_means),
        needs=("masker",),
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
    # with weight 0 the encoder's head is not even traced: no work, and none is charged
    penalty = (
        encoder_weight * ENCODER_LOSSES[encoder_loss](model.masker, image, label)
        if encoder_weight
        else 0.0
    )
    return Seen(logits_of(model, image), rts(model.masker, image, label), penalty)


ENCODER_LOSSES = {"head": head_loss, "mean": mean_loss}
