"""Small images decoded once and kept in memory, for trainings that would decode them anew every epoch."""

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

_LIMIT = 8 * 2**30  # bytes; more are images for which a cache is the wrong means


class KeptImages:
    """Images of a source as pixels in memory: the same pictures, names and labels, without decoding again.

    The pixels are one block of bytes, which forked workers share; spawned ones get a copy each, as
    does every rank. What cannot be read is not kept, and read from the source each time, which says
    what is wrong with it.

    Args:
        source: any of ``visattn.data.sources.Source``.
        indices: which of its images are kept; others are read from it.
        long_side: the one for which they are decoded; for another one the source decodes again.
        limit: bytes at most.

    Raises:
        ValueError: the pixels are more than ``limit``.
    """

    def __init__(self, source, indices, long_side: int, limit: int = _LIMIT):
        self.source, self.long_side = source, long_side
        self.labels, self.classes, self.ignored = source.labels, source.classes, source.ignored
        self._shapes = np.zeros((len(source), 3), np.int32)  # height, width, bands; all 0: not kept
        self._starts = np.zeros(len(source), np.int64)
        self._block = bytearray()
        watched = Console(stderr=True)
        steps = track(
            indices, "decoding", console=watched, transient=True, disable=not watched.is_terminal
        )
        for count, index in enumerate(steps, 1):
            self._keep(int(index))
            if len(self._block) > limit:
                raise ValueError(
                    f"cache: {count} of {len(indices)} images take more than {limit / 2**30:.1f} GiB: turn it off, or "
                    "store the images smaller"
                )

    def _keep(self, index: int) -> None:
        try:
            image = self.source.image(index, self.long_side)
        except ValueError:
            return
        self._shapes[index] = image.height, image.width, len(image.getbands())
        self._starts[index] = len(self._block)
        self._block += image.tobytes()

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """The source's own name."""
        return self.source.name(index)

    def image(self, index: int, long_side: int | None = None) -> Image.Image:
        """The decoded image, RGB or L."""
        height, width, bands = self._shapes[index].tolist()
        if not bands or long_side != self.long_side:
            return self.source.image(index, long_side)
        start = self._starts[index]
        pixels = self._block[start : start + height * width * bands]
        return Image.frombytes("RGB" if bands == 3 else "L", (width, height), pixels)
