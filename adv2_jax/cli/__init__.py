"""The command line `adv2`: no logic of its own."""

from adv2_jax.cli.main import main, script

__all__ = ["main", "script"]
