"""`python -m adv2_jax` is `adv2`."""

from adv2_jax.cli import script

if __name__ == "__main__":
    script()
