"""Methods that weight attention by the gradient of a class score.

The fused kernel runs forward and backward.

With O = A V, the gradient at the weights is G = dO V^T, so that any tile of G follows from the
values and the gradient at the output of the attention call, and nothing N x N is stored.
"""

from functools import partial

import torch
from torch import Tensor, nn

from visattn.map import Map
from visattn.methods.chain import TokenRow, chain, finished, opening, start_row, sum_of_rows
from visattn.methods.target import Target, check_images, frozen_evaluation, run, scores_of
from visattn.record.entry import Record
from visattn.record.session import Maps, record_into


def differentiate(
    model: nn.Module,
    images: Tensor,
    target: Target,
    layers=None,
) -> tuple[Maps, list[Record], Tensor | None]:
    """Run forward and backward once.

    Return the maps, the selected layers with their gradient, and the classes that were explained.
    """
    check_images(images)
    maps = Maps(model, "graph")
    with frozen_evaluation(model), torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        with record_into(maps, model):
            output = run(model, images)
        records = maps.select(layers)
        scores, target = scores_of(output, target)
        fill_gradients(scores.sum(), records)
    for record in maps.records:
        release(record)
    return maps, records, target


def fill_gradients(
    score: Tensor,
    records: list[Record],
    keep_graph: bool = False,
) -> None:
    """Set ``record.gradient`` to the gradient of a score at each attention call's output."""
    if not score.requires_grad:
        raise ValueError(
            "the score does not depend on the images in a way that can be differentiated"
        )
    attached: list[Record] = []
    outputs: list[Tensor] = []
    for record in records:
        output = _output_of(record)
        if output.requires_grad:
            attached.append(record)
            outputs.append(output)
    if not attached:
        raise ValueError(
            "no attention layer has a gradient: the model runs them under torch.no_grad()"
        )
    gradients = torch.autograd.grad(score, outputs, allow_unused=True, retain_graph=keep_graph)
    for record, gradient in zip(attached, gradients, strict=True):
        record.gradient = gradient
    # what the score does not depend on has the gradient zero
    for record in records:
        if record.gradient is None:
            record.gradient = torch.zeros_like(_output_of(record))


def _output_of(record: Record) -> Tensor:
    if record.output is None:
        raise ValueError(f"{record.name!r} was recorded without its graph: keep='graph' holds it")
    return record.output


def release(record: Record) -> None:
    """Drop the references to the autograd graph."""
    for name in ("q", "k", "v", "alpha", "bias", "mask"):
        tensor = getattr(record, name)
        if tensor is not None:
            setattr(record, name, tensor.detach())
    record.output = None


def gradient_tile(record: Record, rows: slice) -> Tensor:
    """Return G = dO V^T for some queries: (B * G, H, r, Nk)."""
    gradient = gradient_of(record)
    v = record.v
    if v is None:
        # only weights were recorded: the gradient is that of the weights themselves
        assert record.alpha is not None
        d_weights = gradient.reshape(record.alpha.shape)
        return d_weights[:, :, rows].float()
    if v.shape[1] != gradient.shape[1]:
        # grouped heads share values
        group_size = gradient.shape[1] // v.shape[1]
        v = v.repeat_interleave(group_size, 1)
    batch, heads, _, width = v.shape
    d_output = gradient.reshape(batch, heads, -1, width)
    dtype = torch.promote_types(v.dtype, torch.float32)
    # (B * G, H, r, Dv) x (B * G, H, Dv, Nk) -> (B * G, H, r, Nk)
    d_rows = d_output[:, :, rows].to(dtype)
    return d_rows @ v.to(dtype).transpose(-2, -1)


def gradient_of(record: Record) -> Tensor:
    """Return the gradient that `fill_gradients` set."""
    if record.gradient is None:
        raise ValueError(f"{record.name!r} has no gradient: run fill_gradients first")
    return record.gradient


def positive_share(record: Record, rows: slice) -> Tensor:
    """Return [A o G]+ for some queries: (B * G, H, r, Nk)."""
    product = record.rows(rows) * gradient_tile(record, rows)
    return product.clamp_(min=0)


def _attend(record: Record, u: Tensor) -> Tensor:
    """Return u times the mean over heads of [A o G]+: (B, keys.tokens)."""
    moved = record.apply_positive(u)
    if moved is not None:
        return moved
    return record.apply(u, partial(positive_share, record))


def gae(
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    layers=None,
) -> Map:
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

    top, below = opening(maps, records, _attend)
    if any(record.pool for record in records):
        # a pool has no residual path: its row is relevance already
        return finished(chain(below, top, _relevance_step), records, "gae", target)
    # e and what was added to it travel apart: added, e would swallow small relevance in float32
    no_relevance = TokenRow(*map(torch.zeros_like, top))

    def step(record: Record, u: Tensor) -> tuple[Tensor, Tensor]:
        return u, _attend(record, u + top.on(record.queries))

    return finished(chain(below, no_relevance, step), records, "gae", target)


def _relevance_step(record: Record, u: Tensor) -> tuple[Tensor, Tensor]:
    return u, _attend(record, u)


def grad_rollout(
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    layers=None,
) -> Map:
    r"""Roll out attention weighted by the positive part of its gradient.

    .. math::
        \bar A_l = \frac{I + \operatorname{mean}_h [A_{lh} \odot G_{lh}]_+}{\text{row sum}}, \qquad
        \text{map} = e\, \bar A_L \cdots \bar A_1

    Reference:
        Gildenblat 2020, https://github.com/jacobgil/vit-explain. Differs from the authors' code in:
        no entries are discarded, and rows are divided by their own sums.
    """
    maps, records, target = differentiate(model, images, target, layers)

    def step(record: Record, u: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(u.dtype, gradient_of(record).dtype)
        # the share of each query that leaves it, in groups: (B * G, T)
        moved = torch.zeros_like(record.queries.fold(u), dtype=dtype)

        def scaled(rows: slice) -> Tensor:
            tile = positive_share(record, rows).mean(1)
            tile = tile / (1 + tile.sum(-1, keepdim=True))
            moved[:, rows] = tile.sum(-1)
            return tile

        moves = record.apply(u, scaled)
        # (B * G, 1, T) -> (B, 1, tokens) -> (B, tokens)
        shares = record.queries.unfold(moved[:, None])[:, 0]
        return u * (1 - shares), moves

    top, below = opening(maps, records, _attend)
    return finished(chain(below, top, step), records, "grad_rollout", target)


def grad_attention(
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    layers=None,
) -> Map:
    r"""Weight the attention of what the head reads by its gradient.

    The last layer is used, or the sum over the selected layers.

    .. math::
        \text{map} = \sum_l \operatorname{mean}_h\, e\,[A_{lh} \odot G_{lh}]_+

    Reference:
        The one-layer baseline of Chefer, Gur, Wolf 2021, https://arxiv.org/abs/2103.15679. Differs
        from the paper in: layers can be chosen.
    """
    if layers is None:
        layers = -1
    maps, records, target = differentiate(model, images, target, layers)

    def attended(record: Record) -> Tensor:
        return _attend(record, start_row(maps, record))

    total = sum_of_rows(records, attended)
    return finished(total, records, "grad_attention", target)
