"""Training of networks and of their maskers for RTS."""
