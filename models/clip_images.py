"""What CLIP's image towers have in common: what they can read, and what their cells pass on."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from gpipe.models.clip_text import TextLimits
from gpipe.models.freezing import Freezable

# What the image cells pass on: features of patches or pixels, at last image features (B, E); tokens (B, T); end (B,).
ImageBoundary = tuple[Tensor, Tensor | None, Tensor | None]


class ImageTower(Freezable, ABC):
    """The parameters of an image tower under their published names; it runs as the cells it gives.

    Attributes:
        embed_dim: E, features of an image.
    """

    embed_dim: int

    @abstractmethod
    def cells(self, limits: TextLimits) -> list[nn.Module]:
        """The tower as cells, from (images, tokens, end) to (image features (B, E), tokens, end).

        Args:
            limits: what the text tower can read, so that the first cell refuses bad texts too.
        """


@dataclass(frozen=True)
class ImageLimits:
    """What an image tower can read.

    Attributes:
        channels: C.
        size: S, height and width in pixels.
        texts: what the text tower beside it can read.
    """

    channels: int
    size: int
    texts: TextLimits

    def check(self, images: Tensor, tokens: Tensor | None, end: Tensor | None) -> None:
        """Refuse images, and texts that came with them, which the towers cannot read.

        Args:
            images: (B, C, S, S) of a floating dtype.
            tokens: (B, T) int64, or None.
            end: (B,) int64, or None.

        Raises:
            ValueError: saying what was expected, what was given and what to do.
        """
        self._check_images(images)
        if tokens is None or end is None:
            return
        self.texts.check(tokens, end)
        if images.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"CLIP inputs: expected as many texts as images, given {images.shape[0]} images and "
                f"{tokens.shape[0]} texts; pass one text per image, or call encode_image and encode_text"
            )

    def _check_images(self, images: Tensor) -> None:
        expected = (self.channels, self.size, self.size)
        if tuple(images.shape[1:]) != expected:
            shape = ", ".join(str(size) for size in expected)
            raise ValueError(
                f"CLIP images: expected shape (B, {shape}), given {tuple(images.shape)}; resize the images, "
                "or build the model with their image_size and in_channels"
            )
        if not images.is_floating_point():
            raise ValueError(
                f"CLIP images: expected a floating dtype, given {images.dtype}; scale and normalise the images first"
            )
