"""Bounds far beyond any deployment, and far below what fills the memory."""

MOST_RANKS = 1 << 16
MOST_SLOTS = 1 << 20
MOST_DENSE_LAYERS = 1000
