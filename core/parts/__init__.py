"""Parts: what an algorithm is composed of."""
