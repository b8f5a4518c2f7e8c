"""The command line `adv2`: parse, assemble, call the library, print."""

from adv2_jax.cli.entry import main, script

__all__ = ["main", "script"]
