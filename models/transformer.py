"""Transformers over tokens: the room's door.

A language model is trained with :class:`NextTokenLoss`, and so is a translation model.
"""

from gpipe.models.language_model import gpipe_table1, language_model
from gpipe.models.next_token import NextTokenLoss
from gpipe.models.translation import translation

__all__ = ["NextTokenLoss", "gpipe_table1", "language_model", "translation"]
