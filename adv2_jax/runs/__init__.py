"""What the command line runs: attacks on a set of images, and training. Experiments call `attack`, never the reverse."""
