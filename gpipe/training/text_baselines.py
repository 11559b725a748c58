"""What a language model's bits per byte are to be compared with: a unigram model's, and gzip's."""

from __future__ import annotations

import gzip

import torch
from torch import Tensor


def unigram_bits(train: Tensor, held: Tensor) -> float:
    """Bits per byte of a model that knows how often each byte is, and nothing of what came before.

    Args:
        train: (n,) uint8 bytes to count; each of the 256 values counts once more, so that none is impossible.
        held: (m,) uint8 bytes to judge on, at least one.
    """
    counts = torch.bincount(train, minlength=256).double() + 1
    bits = -(counts / counts.sum()).log2()
    return float(bits[held.long()].mean().item())


def gzip_bits(held: Tensor) -> float:
    """Bits per byte of gzip at its best (level 9), with its few bytes of header.

    Gzip starts from nothing, but sees all of the text before a byte, up to 32 KiB back.

    Args:
        held: (m,) uint8 bytes to compress, at least one.
    """
    content = held.numpy().tobytes()
    return 8 * len(gzip.compress(content, compresslevel=9, mtime=0)) / len(content)
