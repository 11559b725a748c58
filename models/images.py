"""What a convolutional network can read: the check its first cell makes."""

from torch import Tensor


def require_images(model: str, images: Tensor, *, channels: int, smallest: int, remedy: str) -> None:
    """Refuse images that a network cannot read.

    Args:
        model: the network's name, which starts the message.
        images: what it was given; it takes (B, C, H, W) of a floating dtype.
        channels: C.
        smallest: the least H and W, in pixels.
        remedy: what to do about smaller ones, besides resizing them.

    Raises:
        ValueError: saying what was expected, what was given and what to do.
    """
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != channels:
        raise ValueError(
            f"{model} images: expected shape (B, {channels}, H, W), given {shape}; bring the images into that shape, "
            "or build the model for their number of channels"
        )
    if min(shape[2:]) < smallest:
        raise ValueError(
            f"{model} images: expected at least {smallest} pixels a side, given {shape[2]} x {shape[3]}; "
            f"enlarge the images, or {remedy}"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"{model} images: expected a floating dtype, given {images.dtype}; scale and normalise the images first"
        )
