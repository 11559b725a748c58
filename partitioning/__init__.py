"""Costs of cells and the division of cells into stages; knows nothing of the runtime."""
