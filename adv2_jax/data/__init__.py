"""Images to attack: where they come from, and which classes they are driven to."""

from adv2_jax.data import shapes, sources, targets
from adv2_jax.data.images import ImageSet
from adv2_jax.data.sources import load, sizes_vary

__all__ = ["ImageSet", "load", "shapes", "sizes_vary", "sources", "targets"]
