"""What a run is trained on, in a line, so that data that changed since are noticed."""

from __future__ import annotations

import hashlib

from torch import Tensor

from gpipe.training.data import Data
from gpipe.training.data_captions import CaptionedImages
from gpipe.training.data_images import FileImages, Images, Subset
from gpipe.training.data_labelled import LabelledImages
from gpipe.training.data_text import TextWindows


def digest(data: Data) -> str:
    """The rows of the training part and a checksum of what they are.

    Of images that is their labels or captions and the names of their files, not the pixels; of text every byte. The
    test part has no share in it but through the division: a row more may change which rows are held out.

    Args:
        data: What `gpipe.training.data.build_data` gave.

    Raises:
        TypeError: If the data set is of another kind.
    """
    words, values = _training_part(data)
    checksum = hashlib.sha256("\0".join(words).encode(errors="surrogatepass"))
    checksum.update(values.contiguous().numpy().data)
    return f"{data.rows} training rows, checksum {checksum.hexdigest()[:16]}"


def _training_part(data: Data) -> tuple[list[str], Tensor]:
    if isinstance(data, LabelledImages):
        return [*data.classes, *_file_names(data.parts.train.images)], data.parts.train.labels
    if isinstance(data, CaptionedImages):
        return [*data.train.texts, *_file_names(data.train.images)], data.train.matches
    if isinstance(data, TextWindows):
        return [], data.train
    raise TypeError(f"expected data from gpipe.training.data.build_data, got {type(data).__name__}")


def _file_names(images: Images) -> list[str]:
    """Names without folders, so that data may move; none for images in memory."""
    if isinstance(images, Subset):
        names = _file_names(images.images)
        return [names[row] for row in images.rows.tolist()] if names else []
    return [path.name for path in images.paths] if isinstance(images, FileImages) else []
