"""Global context: one attended average of the map, transformed, is added to every position."""

from torch import Tensor, nn

from visattn.blocks.parts.check import hidden_width, require_choice, require_map
from visattn.blocks.parts.pool import global_mean
from visattn.blocks.parts.products import contracted, scaled
from visattn.core.tap import Tap

POOLINGS = ("attention", "average")
FUSIONS = ("add", "scale", "both")


class GlobalContext(nn.Module):
    r"""Average the map by attention, transform it by a bottleneck, and add it to every position.

    .. math::
        y = x + W_2\,\mathrm{ReLU}\bigl(\mathrm{LN}(W_1 c)\bigr), \qquad
        c = \sum_j \alpha_j x_j, \quad \alpha = \mathrm{softmax}_j(w^\top x_j)

    Args:
        channels: C.
        reduction: r, so the hidden width is ``max(2, C // r)``.
        pooling: ``"attention"``, or ``"average"``: c is the mean and there is no alpha.
        fusion: ``"add"``; ``"scale"``: y = x times the sigmoid of the bottleneck; ``"both"``:
            scaled, then added, by two bottlenecks.

    Shape:
        - Input and output: (B, C, H, W).

    Map:
        ``tap_spatial``, kind spatial: alpha, (B, 1, H, W), sums to one. ``tap_scale`` and
        ``tap_add``, kind channel: (B, C, 1, 1), the gate in (0, 1) and the term added, which may
        have any value.

    Raises:
        ValueError: A size is below 1, or a word is unknown.

    Reference:
        Cao et al. 2019, "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond",
        https://arxiv.org/abs/1904.11492. Differs from timm's in: timm scales by default, the paper
        adds.

    Example:
        >>> x = torch.rand(2, 12, 7, 11)
        >>> torch.equal(GlobalContext(12)(x), x)
        True
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        pooling: str = "attention",
        fusion: str = "add",
    ):
        super().__init__()
        require_choice("pooling", pooling, POOLINGS)
        require_choice("fusion", fusion, FUSIONS)
        self.channels = channels
        # The layer norm of a single value is zero.
        hidden = hidden_width(channels, reduction, at_least=2)
        self.score = nn.Conv2d(channels, 1, 1) if pooling == "attention" else None
        self.scale = _bottleneck(channels, hidden) if fusion != "add" else None
        self.add = _bottleneck(channels, hidden) if fusion != "scale" else None
        if self.score is not None:
            nn.init.kaiming_normal_(self.score.weight, nonlinearity="relu")
        if self.score is not None:
            self.tap_spatial = Tap("spatial")
        if self.scale is not None:
            self.tap_scale = Tap("channel")
        if self.add is not None:
            self.tap_add = Tap("channel")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        context = self._pool(x)
        y = x
        if self.scale is not None:
            gate = self.scale(context).sigmoid()[:, :, None, None]  # (B, C) -> (B, C, 1, 1)
            y = scaled(y, self.tap_scale(gate))
        if self.add is not None:
            term = self.add(context)[:, :, None, None]
            y = y + self.tap_add(term)
        return y.to(x.dtype)

    def _pool(self, x: Tensor) -> Tensor:
        """Return the average of the map, (B, C)."""
        if self.score is None:
            return global_mean(x)
        flat = x.flatten(2)  # (B, C, N)
        weight = self.score.weight.view(1, -1)
        weight = weight.expand(x.size(0), -1)  # (B, C)
        scores = contracted(flat, weight, 1)  # (B, N)
        if self.score.bias is not None:
            scores = scores + self.score.bias
        height, width = x.shape[2:]
        alpha = scores.softmax(1).unflatten(1, (1, height, width))
        alpha = self.tap_spatial(alpha)  # (B, 1, H, W)
        return contracted(flat, alpha.flatten(1).to(x.dtype), 2)


def _bottleneck(channels: int, hidden: int) -> nn.Sequential:
    """Build W2 ReLU(LN(W1 c)); W2 starts at zero."""
    last = nn.Linear(hidden, channels)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(
        nn.Linear(channels, hidden),
        nn.LayerNorm(hidden),
        nn.ReLU(),
        last,
    )
