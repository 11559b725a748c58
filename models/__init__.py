"""CLIP and other models, each a sequence of cells."""
