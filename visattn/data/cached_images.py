"""Small images decoded once and cached in memory, instead of decoded in every epoch."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from visattn.data.source import ImageSource

_MAX_BYTES = 8 * 2**30  # beyond it a cache is the wrong means


class CachedImages:
    """Images of a source as pixels in memory: same images, names and labels, decoded once.

    The pixels are one block of bytes, which forked workers share; spawned ones get a copy each, as
    does every rank. An unreadable image is not cached: each read asks the source, whose error says
    what is wrong with it.

    Args:
        source: any source of images.
        indices: which of its images are cached; others are read from it.
        long_side: the one for which they are decoded; for another one the source decodes again.
        max_bytes: the largest size of the cache.

    Raises:
        ValueError: the pixels need more than ``max_bytes``.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: Sequence[int] | np.ndarray,
        long_side: int,
        max_bytes: int = _MAX_BYTES,
    ):
        self.source = source
        self.long_side = long_side
        self.labels = source.labels
        self.classes = source.classes
        self.ignored = source.ignored
        # (N, 3): height, width and channels; all 0 where an image is not cached
        self._shapes = np.zeros((len(source), 3), np.int32)
        self._starts = np.zeros(len(source), np.int64)
        self._block = bytearray()
        console = Console(stderr=True)
        steps = track(
            indices,
            "decoding",
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        for count, index in enumerate(steps, 1):
            self._add(int(index))
            if len(self._block) > max_bytes:
                raise ValueError(
                    f"cache: {count} of {len(indices)} images take more than "
                    f"{max_bytes / 2**30:.1f} GiB: turn it off, or store the images smaller"
                )

    def _add(self, index: int) -> None:
        try:
            image = self.source.image(index, self.long_side)
        except ValueError:
            return
        channels = len(image.getbands())
        self._shapes[index] = (image.height, image.width, channels)
        self._starts[index] = len(self._block)
        self._block += image.tobytes()

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """The source's own name."""
        return self.source.name(index)

    def image(self, index: int, long_side: int | None = None) -> Image.Image:
        """The decoded image, RGB or L."""
        height, width, channels = self._shapes[index].tolist()
        if not channels or long_side != self.long_side:
            return self.source.image(index, long_side)
        start = self._starts[index]
        pixels = self._block[start : start + height * width * channels]
        mode = "RGB" if channels == 3 else "L"
        return Image.frombytes(mode, (width, height), pixels)
