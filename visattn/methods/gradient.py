"""Methods that weigh attention by the gradient of a class score. The fused kernel runs forward and backward.

With O = A V, the gradient at the weights is G = dO V^T, so that any tile of G follows from the
values and the gradient at the output of the attention call, and nothing N x N is stored.
"""

from functools import partial

import torch
from torch import Tensor, nn

from visattn.map import Map
from visattn.methods.chain import Row, chain, finished, opening, start_row
from visattn.methods.target import Target, check_images, evaluating, run, scores_of
from visattn.record.entry import Record
from visattn.record.session import Maps, record_into


def differentiate(
    model: nn.Module, images: Tensor, target: Target, layers=None
) -> tuple[Maps, list, Tensor | None]:
    """Run forward and backward once; return the captured maps, the layers asked for with their gradient, the target."""
    check_images(images)
    maps = Maps(model, "graph")
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        with record_into(maps, model):
            output = run(model, images)
        records = maps.select(layers)
        scores, target = scores_of(output, target)
        fill_gradients(scores.sum(), records)
    for record in maps.records:
        release(record)
    return maps, records, target


def fill_gradients(score: Tensor, records: list[Record], keep_graph: bool = False):
    """Set ``record.gradient`` to the gradient of a score at each attention call's output."""
    if not score.requires_grad:
        raise ValueError(
            "the score does not depend on the images in a way that can be differentiated"
        )
    attached = [record for record in records if record.output.requires_grad]
    if not attached:
        raise ValueError(
            "no attention layer has a gradient: the model runs them under torch.no_grad()"
        )
    outputs = [record.output for record in attached]
    found = torch.autograd.grad(score, outputs, allow_unused=True, retain_graph=keep_graph)
    for record, output, gradient in zip(attached, outputs, found, strict=True):
        record.gradient = torch.zeros_like(output) if gradient is None else gradient
    for record in records:
        if record.gradient is None:
            record.gradient = torch.zeros_like(record.output)


def release(record: Record):
    """Let go of the graph."""
    for name in ("q", "k", "v", "alpha", "bias", "mask"):
        held = getattr(record, name)
        setattr(record, name, None if held is None else held.detach())
    record.output = None


def gradient_tile(record: Record, rows: slice) -> Tensor:
    """Return G = dO V^T for some queries: (B * G, H, r, Nk)."""
    if record.v is None:
        return record.gradient.reshape(record.alpha.shape)[:, :, rows].float()
    v = record.v
    if v.shape[1] != record.gradient.shape[1]:
        v = v.repeat_interleave(record.gradient.shape[1] // v.shape[1], 1)
    wide = torch.promote_types(v.dtype, torch.float32)
    return record.gradient.reshape(*v.shape[:2], -1, v.shape[3])[:, :, rows].to(wide) @ v.to(
        wide
    ).transpose(-2, -1)


def positive_share(record: Record, rows: slice) -> Tensor:
    """Return [A o G]+ for some queries: (B * G, H, r, Nk)."""
    return (record.rows(rows) * gradient_tile(record, rows)).clamp_(min=0)


def _attend(record: Record, u: Tensor) -> Tensor:
    moved = record.apply_positive(u)
    return record.apply(u, partial(positive_share, record)) if moved is None else moved


def gae(model: nn.Module, images: Tensor, target: Target = None, layers=None) -> Map:
    r"""Propagate relevance through all layers by the positive part of attention times gradient.

    .. math::
        \bar A_l = \operatorname{mean}_h [G_{lh} \odot A_{lh}]_+, \qquad
        \text{map} = e\,(I + \bar A_L) \cdots (I + \bar A_1) - e

    Reference:
        Chefer, Gur, Wolf 2021, "Generic Attention-model Explainability", eq. 5-6,
        https://arxiv.org/abs/2103.15679. Differs from the authors' code in: a row chain with the
        fused kernel in place of N x N products; any target; e itself is taken off the map, where it
        would be a constant under heads that average patches.
    """
    maps, records, target = differentiate(model, images, target, layers)

    row, rest = opening(maps, records, _attend)
    # e and what was added to it travel apart: added, e would swallow small relevance in float32.
    e = None if any(record.pool for record in records) else row
    row = row if e is None else Row(*(torch.zeros_like(part) for part in row))

    def step(record: Record, u: Tensor) -> tuple[Tensor, Tensor]:
        return u, _attend(record, u if e is None else u + e.on(record.queries))

    return finished(chain(rest, row, step), records, "gae", target)


def grad_rollout(model: nn.Module, images: Tensor, target: Target = None, layers=None) -> Map:
    r"""Roll out attention weighed by the positive part of its gradient.

    .. math::
        \bar A_l = \frac{I + \operatorname{mean}_h [A_{lh} \odot G_{lh}]_+}{\text{row sum}}, \qquad
        \text{map} = e\, \bar A_L \cdots \bar A_1

    Reference:
        Gildenblat 2020, https://github.com/jacobgil/vit-explain. Differs from the authors' code in:
        no entries are discarded, and rows are divided by their own sums.
    """
    maps, records, target = differentiate(model, images, target, layers)

    def step(record: Record, u: Tensor) -> tuple[Tensor, Tensor]:
        kind = torch.promote_types(u.dtype, record.gradient.dtype)
        moved = torch.zeros_like(record.queries.fold(u), dtype=kind)

        def scaled(rows: slice) -> Tensor:
            tile = positive_share(record, rows).mean(1)
            tile = tile / (1 + tile.sum(-1, keepdim=True))
            moved[:, rows] = tile.sum(-1)
            return tile

        moves = record.apply(u, scaled)
        return u * (1 - record.queries.unfold(moved[:, None])[:, 0]), moves

    row, rest = opening(maps, records, _attend)
    return finished(chain(rest, row, step), records, "grad_rollout", target)


def grad_attention(model: nn.Module, images: Tensor, target: Target = None, layers=None) -> Map:
    r"""Weigh the attention of what the head reads by its gradient, in the last layer (or summed over those asked for).

    .. math::
        \text{map} = \sum_l \operatorname{mean}_h\, e\,[A_{lh} \odot G_{lh}]_+

    Reference:
        The one-layer baseline of Chefer, Gur, Wolf 2021, https://arxiv.org/abs/2103.15679. Differs
        from the paper in: layers can be chosen.
    """
    maps, records, target = differentiate(model, images, target, -1 if layers is None else layers)
    total = None
    for record in records:
        u = start_row(maps, record)
        row = Row.of(_attend(record, u), record.keys)
        total = row if total is None else total.plus(row)
    return finished(total, records, "grad_attention", target)
