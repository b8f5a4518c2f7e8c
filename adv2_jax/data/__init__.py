"""Images to attack: where they come from, and which classes they are driven to."""

from adv2_jax.data import shapes, sources, targets
from adv2_jax.data.sources import ImageSet, load

__all__ = ["ImageSet", "load", "shapes", "sources", "targets"]
