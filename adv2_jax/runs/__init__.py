"""Attacks on a set of images, as the command line runs them; `attack` never calls these modules."""
