"""The formula between all positions of a map, as non-local and position attention need it."""

import torch
from torch import Tensor

from visattn.core.formula import Attend, attend

# Bytes of the scores of a batch that are formed whole: about what the cache of a processor holds.
_KEPT = 32 * 2**20


class MapAttend(Attend):
    r"""The formula between positions: on a CPU a small matrix is formed and kept, a large one never.

    .. math::
        m = f_{norm}(f_{sim}(q, k))\, v

    Args:
        As ``visattn.core.formula.Attend``.

    Shape:
        As ``visattn.core.formula.Attend``.

    Map:
        As ``visattn.core.formula.Attend``.

    Raises:
        As ``visattn.core.formula.Attend``.

    Reference:
        Wang et al. 2018, https://arxiv.org/abs/1711.07971. Differs from Attend in: which evaluation
        ``"auto"`` is.

    Example:
        >>> x = torch.rand(2, 1, 6, 5)
        >>> MapAttend()(x, x, x).shape
        torch.Size([2, 1, 6, 5])
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias=None, mask=None, layout=None) -> Tensor:
        dropout, impl = self.dropout if self.training else 0.0, self.impl
        if impl == "auto" and not torch.compiler.is_compiling() and q.is_cpu:
            scores = q.size(0) * q.size(1) * q.size(2) * k.size(2) * q.element_size()
            impl = "dense" if scores <= _KEPT else "auto"
        return attend(
            q,
            k,
            v,
            self.similarity,
            self.normalize,
            bias=bias,
            mask=mask,
            dropout=dropout,
            impl=impl,
        )
