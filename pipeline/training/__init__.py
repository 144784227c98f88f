"""Training: the loop, the engine beneath it, and what they optimise."""
