"""Images of a data set that another library holds."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from visattn.data.decode import read_image, to_eight_bit


class LibraryImages:
    """One split of another library's data set.

    Args:
        read: index -> the bytes of a file, or a PIL image.
        labels: class number of every image.
        classes: names of the classes.
    """

    def __init__(
        self,
        read: Callable[[int], bytes | Image.Image],
        labels: Sequence[int] | np.ndarray,
        classes: list[str],
    ):
        self.read = read
        self.classes = classes
        self.ignored: list[str] = []
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Class and number, since these images have no file of their own."""
        return f"{self.classes[self.labels[index]]}/{index}"

    def image(self, index: int, long_side: int | None = None) -> Image.Image:
        """The decoded image, RGB or L."""
        name = self.name(index)
        try:
            content = self.read(index)
            if not isinstance(content, bytes):
                return to_eight_bit(content, long_side)
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"cannot read image {name!r}: {error}") from error
        return read_image(content, name, long_side)
