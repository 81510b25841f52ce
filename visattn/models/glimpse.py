"""The recurrent glimpse model: a state looks at a feature map again and again, and remembers what it saw."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.core.formula import Attend
from visattn.core.normalize import NORMALIZERS
from visattn.core.normalize.definition import Normalizer
from visattn.core.similarity import SIMILARITIES
from visattn.core.similarity.definition import Similarity
from visattn.core.similarity.learned import Additive
from visattn.models.build import make
from visattn.models.cnn import CNNS, ResNet
from visattn.names import lookup


class Glimpses(nn.Module):
    r"""Look T times at a feature map; each time the state so far is the query of one attention.

    .. math::
        c_t = \sum_j \alpha_{tj} h_j, \quad \alpha_t = f_{norm}\bigl(f_{sim}(s_{t-1}, h_j)\bigr), \quad
        s_t = \mathrm{GRU}(c_t, s_{t-1}), \qquad s_0 = \tanh(W \bar h)

    Args:
        features: A network with ``forward_features``, (B, C, H, W) -> (B, ``num_features``, h, w).
        dim: D, the width of the tokens :math:`h_j` and of the state.
        glimpses: T.
        similarity: f_sim of one head; None is Additive.
        normalize: f_norm; None is Softmax.

    Shape:
        - Input: (B, C, H, W).
        - Output: (B, T, 2 D), the state after each glimpse, then what the glimpse saw.

    Map:
        T of (B, 1, 1, h w), one per glimpse; each sums to one where the normalizer says so.

    Raises:
        ValueError: ``glimpses`` is below 1.

    Reference:
        Bahdanau, Cho, Bengio 2014, "Neural Machine Translation by Jointly Learning to Align and
        Translate", section 3 and appendix A.1.2, https://arxiv.org/abs/1409.0473; on a feature map
        as in Xu et al. 2015, "Show, Attend and Tell", https://arxiv.org/abs/1502.03044. Differs
        from: the annotations are those of a convolutional network, to which waves of their row and
            column are added; the state does not hear which label was read before.

    Example:
        >>> Glimpses(ResNet(CNNS["resnet8"], 0), 16, glimpses=3)(torch.rand(2, 3, 20, 28)).shape
        torch.Size([2, 3, 32])
    """

    WAVES = 4

    def __init__(
        self,
        features: nn.Module,
        dim: int,
        *,
        glimpses: int = 4,
        similarity: Similarity | None = None,
        normalize: Normalizer | None = None,
    ):
        super().__init__()
        if glimpses < 1:
            raise ValueError(f"glimpses must be at least 1; got {glimpses}")
        self.glimpses = glimpses
        self.features = features
        self.proj = nn.Conv2d(features.num_features, dim, 1)
        self.place = nn.Linear(4 * self.WAVES, dim, bias=False)
        self.start = nn.Linear(dim, dim)
        self.attend = Attend(Additive(dim) if similarity is None else similarity, normalize)
        self.cell = nn.GRUCell(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(self.features.forward_features(x))
        places = self._waves(*x.shape[-2:], x.device).to(x.dtype)
        tokens = x.flatten(2).transpose(1, 2) + self.place(places)
        state, seen = self.start(tokens.mean(1)).tanh(), []
        for _ in range(self.glimpses):
            context = self.attend(state[:, None, None], tokens[:, None], tokens[:, None])[:, 0, 0]
            state = self.cell(context, state)
            seen.append(torch.cat([state, context], dim=1))
        return torch.stack(seen, dim=1)

    def _waves(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return sines and cosines of row and column, (rows * columns, 4 WAVES); the longest is twice the image."""
        turns = math.pi * 2.0 ** torch.arange(self.WAVES, device=device)
        axes = [(torch.arange(n, device=device) + 0.5) / n for n in (rows, columns)]
        angles = (
            torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)[..., None]
            * turns
        )
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


class GlimpseClassifier(nn.Module):
    r"""Classify an image by what the last glimpse left in the state.

    .. math::
        y = W [s_T;\, c_T] + b

    Args:
        glimpses: The model that looks.
        dim: Its D.
        num_classes: Width of the output; 0 gives the state and the last glimpse themselves.
        dropout: Of the head's input.

    Shape:
        - Input: (B, C, H, W).
        - Output: (B, num_classes).

    Map:
        As Glimpses: T, one per glimpse.

    Reference:
        Bahdanau, Cho, Bengio 2014, https://arxiv.org/abs/1409.0473. Differs from: one label instead
        of a sentence.

    Example:
        >>> from visattn.models.presets import create_model
        >>> create_model("glimpse", num_classes=5)(torch.rand(2, 3, 24, 32)).shape
        torch.Size([2, 5])
    """

    def __init__(self, glimpses: Glimpses, dim: int, num_classes: int, *, dropout: float = 0.0):
        super().__init__()
        self.glimpses = glimpses
        self.num_features = 2 * dim
        self.head_drop = nn.Dropout(dropout)
        self.head = nn.Linear(2 * dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.head_drop(self.glimpses(x)[:, -1]))


class GlimpseReader(nn.Module):
    r"""Read the labels in an image one after another, one glimpse each, then a mark for the end.

    .. math::
        y_t = W [s_t;\, c_t] + b, \qquad t = 1 \dots T

    Args:
        glimpses: The model that looks; it reads at most T labels, and T - 1 with the mark behind
            them.
        dim: Its D.
        num_classes: K, the labels; the mark is class K.

    Shape:
        - Input: (B, C, H, W).
        - Output: (B, T, K + 1).

    Map:
        As Glimpses: T, one per label.

    Reference:
        Bahdanau, Cho, Bengio 2014, https://arxiv.org/abs/1409.0473. Differs from: as Glimpses.

    Example:
        >>> looks = Glimpses(ResNet(CNNS["resnet8"], 0), 16, glimpses=3)
        >>> GlimpseReader(looks, 16, 5)(torch.rand(2, 3, 20, 28)).shape
        torch.Size([2, 3, 6])
    """

    def __init__(self, glimpses: Glimpses, dim: int, num_classes: int):
        super().__init__()
        self.glimpses = glimpses
        self.num_classes = num_classes
        self.head = nn.Linear(2 * dim, num_classes + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.glimpses(x))

    def loss(self, scores: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        """Return the cross-entropy with labels (B, L), of which the first ``lengths`` (B,) count, and the mark."""
        steps = torch.arange(scores.shape[1], device=scores.device)
        if lengths.min() < 0 or lengths.max() > min(labels.shape[1], len(steps)):
            raise ValueError(
                f"lengths must lie in 0 to {min(labels.shape[1], len(steps))}; got {lengths.tolist()}"
            )
        targets = F.pad(labels, (0, max(0, len(steps) - labels.shape[1])))[:, : len(steps)]
        targets = targets.where(steps < lengths[:, None], -100)
        targets = targets.where(steps != lengths[:, None], self.num_classes)
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=-100)

    def read(self, scores: Tensor) -> list[list[int]]:
        """Return the most likely labels of each image, up to the mark."""
        read = scores.argmax(-1).tolist()
        return [
            line[: line.index(self.num_classes)] if self.num_classes in line else line
            for line in read
        ]


def build_glimpse(
    *,
    num_classes: int = 10,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int = 3,
    features: str = "resnet8",
    dim: int = 128,
    glimpses: int = 4,
    similarity: str | Callable | None = None,
    normalize: str | Callable | None = None,
    dropout: float = 0.0,
) -> GlimpseClassifier:
    """Build a glimpse classifier over the feature map of a ResNet of CNNS; any `image_size` will do."""
    looks = Glimpses(
        ResNet(lookup(CNNS, features, "features"), 0, in_channels=in_channels),
        dim,
        glimpses=glimpses,
        similarity=make(SIMILARITIES, similarity, "similarity", dim, 1),
        normalize=make(NORMALIZERS, normalize, "normalize", 1),
    )
    return GlimpseClassifier(looks, dim, num_classes, dropout=dropout)
