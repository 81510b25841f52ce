"""The recurrent glimpse model: a state attends a feature map several times, one map per glimpse."""

import math
from collections.abc import Callable
from typing import Protocol

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

IGNORED = -100  # target of the glimpses behind the end mark


class FeatureNetwork(Protocol):
    """A module that turns images (B, C, H, W) into feature maps (B, num_features, h, w)."""

    num_features: int

    def forward_features(self, x: Tensor) -> Tensor: ...


class Glimpses(nn.Module):
    r"""Attend a feature map T times; the query is the recurrent state so far.

    .. math::
        c_t = \sum_j \alpha_{tj} h_j, \qquad
        \alpha_t = f_{norm}\bigl(f_{sim}(s_{t-1}, h_j)\bigr), \qquad
        s_t = \mathrm{GRU}(c_t, s_{t-1}), \qquad s_0 = \tanh(W \bar h)

    Args:
        features: A module with ``forward_features``, (B, C, H, W) -> (B, ``num_features``, h, w).
        dim: D, the width of the tokens :math:`h_j` and of the state.
        glimpses: T.
        similarity: f_sim of one head; None is Additive.
        normalize: f_norm; None is Softmax.

    Shape:
        - Input: (B, C, H, W).
        - Output: (B, T, 2 D), for each glimpse the state after it and its context c_t.

    Map:
        T of (B, 1, 1, h w), one per glimpse; each sums to one where the normalizer says so.

    Raises:
        ValueError: ``glimpses`` is below 1.

    Reference:
        Bahdanau, Cho, Bengio 2014, "Neural Machine Translation by Jointly Learning to Align and
        Translate", section 3 and appendix A.1.2, https://arxiv.org/abs/1409.0473; on a feature map
        as in Xu et al. 2015, "Show, Attend and Tell", https://arxiv.org/abs/1502.03044.
        Differs from: the annotations are those of a convolutional network, plus a projection of
        sines and cosines of their row and column; the label read before is no input of the state.

    Example:
        >>> Glimpses(ResNet(CNNS["resnet8"], 0), 16, glimpses=3)(torch.rand(2, 3, 20, 28)).shape
        torch.Size([2, 3, 32])
    """

    WAVES = 4

    def __init__(
        self,
        features: FeatureNetwork,
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
        x = self.proj(self.features.forward_features(x))  # (B, D, h, w)
        rows, columns = x.shape[-2:]
        waves = self._encode_positions(rows, columns, x.device).to(x.dtype)
        # (B, D, h, w) -> (B, h w, D)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.place(waves)
        keys = tokens[:, None]  # (B, 1, h w, D): one head
        state = self.start(tokens.mean(1)).tanh()
        outputs = []
        for _ in range(self.glimpses):
            query = state[:, None, None]  # (B, D) -> (B, 1, 1, D)
            context = self.attend(query, keys, keys)[:, 0, 0]
            state = self.cell(context, state)
            outputs.append(torch.cat([state, context], dim=1))
        return torch.stack(outputs, dim=1)

    def _encode_positions(
        self,
        rows: int,
        columns: int,
        device: torch.device,
    ) -> Tensor:
        """Return sines and cosines of row and column, (rows * columns, 4 WAVES).

        The longest wave is twice as long as the image, each further one half as long.
        """
        frequencies = math.pi * 2.0 ** torch.arange(self.WAVES, device=device)
        # Centers of the cells, as fractions of the image.
        y = (torch.arange(rows, device=device) + 0.5) / rows
        x = (torch.arange(columns, device=device) + 0.5) / columns
        centers = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)
        # (rows, columns, 2) -> (rows columns, 2, WAVES)
        angles = centers.flatten(0, 1)[..., None] * frequencies
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return waves.flatten(1)  # (N, 2, 2 WAVES) -> (N, 4 WAVES)


class GlimpseClassifier(nn.Module):
    r"""Classify an image by the state and the context of the last glimpse.

    .. math::
        y = W [s_T;\, c_T] + b

    Args:
        glimpses: The recurrent model.
        dim: Its D.
        num_classes: Width of the output; 0 gives the state and the context themselves.
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

    def __init__(
        self,
        glimpses: Glimpses,
        dim: int,
        num_classes: int,
        *,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.glimpses = glimpses
        self.num_features = 2 * dim
        self.head_drop = nn.Dropout(dropout)
        self.head: nn.Module = nn.Identity()
        if num_classes:
            self.head = nn.Linear(2 * dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        last = self.glimpses(x)[:, -1]  # (B, T, 2 D) -> (B, 2 D)
        return self.head(self.head_drop(last))


class GlimpseReader(nn.Module):
    r"""Read the labels in an image in sequence, one glimpse each, then an end mark.

    .. math::
        y_t = W [s_t;\, c_t] + b, \qquad t = 1 \dots T

    Args:
        glimpses: The recurrent model; its T glimpses read at most T labels, or T - 1 labels and
            the end mark.
        dim: Its D.
        num_classes: K, the labels; the end mark is class K.

    Shape:
        - Input: (B, C, H, W).
        - Output: (B, T, K + 1).

    Map:
        As Glimpses: T, one per label.

    Reference:
        Bahdanau, Cho, Bengio 2014, https://arxiv.org/abs/1409.0473. Differs from: as Glimpses.

    Example:
        >>> glimpses = Glimpses(ResNet(CNNS["resnet8"], 0), 16, glimpses=3)
        >>> GlimpseReader(glimpses, 16, 5)(torch.rand(2, 3, 20, 28)).shape
        torch.Size([2, 3, 6])
    """

    def __init__(self, glimpses: Glimpses, dim: int, num_classes: int):
        super().__init__()
        self.glimpses = glimpses
        self.num_classes = num_classes
        self.head = nn.Linear(2 * dim, num_classes + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.glimpses(x))

    def loss(
        self,
        scores: Tensor,
        labels: Tensor,
        lengths: Tensor,
    ) -> Tensor:
        """Return the cross-entropy with labels (B, L) and the end mark behind them.

        The first ``lengths`` (B,) labels of each image count.
        """
        num_steps = scores.shape[1]
        longest = min(labels.shape[1], num_steps)
        if lengths.min() < 0 or lengths.max() > longest:
            raise ValueError(f"lengths must lie in 0 to {longest}; got {lengths.tolist()}")
        steps = torch.arange(num_steps, device=scores.device)
        # (B, L) -> (B, T): one target per glimpse
        padding = max(0, num_steps - labels.shape[1])
        targets = F.pad(labels, (0, padding))[:, :num_steps]
        targets = targets.where(steps < lengths[:, None], IGNORED)
        targets = targets.where(steps != lengths[:, None], self.num_classes)
        # (B, T, K + 1) -> (B T, K + 1): one case per glimpse
        cases = scores.flatten(0, 1)
        return F.cross_entropy(cases, targets.flatten(), ignore_index=IGNORED)

    def read(self, scores: Tensor) -> list[list[int]]:
        """Return the most likely labels of each image, up to the end mark."""
        best = scores.argmax(-1).tolist()  # (B, T, K + 1) -> B lists of T labels
        return [self._before_mark(labels) for labels in best]

    def _before_mark(self, labels: list[int]) -> list[int]:
        if self.num_classes not in labels:
            return labels
        return labels[: labels.index(self.num_classes)]


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
    """Build a glimpse classifier over the feature map of a ResNet of CNNS.

    It takes images of any size, so ``image_size`` has no effect.
    """
    config = lookup(CNNS, features, "features")
    recurrent = Glimpses(
        ResNet(config, 0, in_channels=in_channels),
        dim,
        glimpses=glimpses,
        similarity=make(SIMILARITIES, similarity, "similarity", dim, 1),
        normalize=make(NORMALIZERS, normalize, "normalize", 1),
    )
    return GlimpseClassifier(recurrent, dim, num_classes, dropout=dropout)
