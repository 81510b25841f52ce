"""LeGrad: the gradient of every layer's own score at its attention weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from visattn.map import Map
from visattn.methods.chain import TokenRow, finished, sum_of_rows
from visattn.methods.gradient import fill_gradients, gradient_of, gradient_tile, release
from visattn.methods.target import Target, check_images, evaluating, logits_of, run, scores_of
from visattn.record.entry import Record
from visattn.record.session import Maps, record_into
from visattn.record.watch import Watch


def legrad(
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    layers=None,
    *,
    head: Callable[[Tensor], Tensor] | None = None,
) -> Map:
    r"""Sum over layers the positive gradient of the layer's own score at its attention weights.

    .. math::
        s_l = \text{head}(Z_l)_t, \qquad
        \text{map} = \sum_l \operatorname{mean}_{h, i} \Bigl[\frac{\partial s_l}{\partial A_{lhij}}\Bigr]_+

    The tokens of all blocks go through the model's own norm, pooling and head together, as one
    batch, so that it works for any model whose blocks stand in a list and return tokens of one
    shape. Other models need ``head``.

    Args:
        model: Any network with attention between tokens.
        images: (B, C, H, W), as the model takes them.
        target: As in `visattn.explain`.
        layers: None is all token layers; or a slice, or a list of numbers and names.
        head: From what a block returns, (B, N, C) or (B, h, w, C), to scores (B, classes): it takes
            the place of the model's own norm, pooling and head, and is called for each block alone.

    Raises:
        ValueError: No block is found around the attention, or blocks of several shapes have no
            ``head``.

    Reference:
        Bousselham et al. 2024, "LeGrad", https://arxiv.org/abs/2404.03214. Differs from the paper
        in: no min-max stretch; any model whose blocks keep their shape, not CLIP alone.
    """
    check_images(images)
    maps, blocks, block_of = Maps(model, "graph"), {}, _around if head else _listed

    def remember(frame, output):
        if frame.name and maps.records and frame.name == block_of(maps.records[-1]):
            blocks[frame.name] = output[0] if isinstance(output, tuple) else output

    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        last = None if head else last_block(model, images)
        images = images.detach().clone().requires_grad_()
        with record_into(maps, model, on_exit=remember):
            output = run(model, images) if head else _all_at_once(model, images, last, blocks)
        records = _inside(blocks, maps.select(layers), block_of)
        outputs = (
            [head(tokens) for tokens in blocks.values()]
            if head
            else _parts(output, target, len(blocks))
        )
        scores, target = _scores(outputs, target)
        for score, block in zip(scores, blocks, strict=True):
            inside = [record for record in records if block_of(record) == block]
            if inside:
                fill_gradients(score.sum(), inside, keep_graph=True)
    for record in maps.records:
        release(record)
    return finished(_summed(records), records, "legrad", target)


def _listed(record: Record) -> str:
    return record.block


def _around(record: Record) -> str:
    """Return the path of the block around an attention call: in a list of blocks, or else its owner's parent."""
    return record.block or record.name.partition("[")[0].rpartition(".")[0]


def _inside(
    blocks: dict[str, Tensor], chosen: list[Record], block_of: Callable[[Record], str]
) -> list[Record]:
    if not blocks:
        raise ValueError(
            "legrad found no block around the attention of this model, whose tokens a head could read"
        )
    records = [record for record in chosen if block_of(record) in blocks]
    if not records:
        names = ", ".join(record.name for record in chosen)
        raise ValueError(
            f"layers selects {names}, outside the blocks whose tokens legrad reads: {', '.join(blocks)}"
        )
    return records


def _all_at_once(model: nn.Module, images: Tensor, last: str, blocks: dict[str, Tensor]):
    """Run the model, its part after the last block on the tokens of all blocks."""

    def joined(module, args, output):
        if len({tuple(tokens.shape) for tokens in blocks.values()}) > 1:
            raise ValueError(
                "legrad needs blocks that return tokens of one shape, since one head reads them all; "
                "for others pass head="
            )
        tokens = torch.cat(list(blocks.values()))
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

    handle = model.get_submodule(last).register_forward_hook(joined)
    try:
        return run(model, images)
    finally:
        handle.remove()


def last_block(model: nn.Module, images: Tensor) -> str:
    """Return the path of the last residual block that holds attention between tokens."""
    found: list[Record] = []
    with torch.no_grad(), Watch(model, found.append, found.clear):
        run(model, images)
    blocks = [record.block for record in found if record.kind == "token" and record.block]
    if not blocks:
        raise ValueError(
            "legrad needs attention between tokens inside blocks that are listed in a module list; "
            "pass head=, a function from the tokens of a block to scores"
        )
    return blocks[-1]


def _parts(output, target: Target, count: int) -> list[Tensor]:
    """Cut what the head made of all blocks at once into the outputs of each: logits, or scores of a callable."""
    whole = scores_of(output, target)[0] if callable(target) else logits_of(output)
    return list(whole.unflatten(0, (count, -1)))


def _scores(outputs: list[Tensor], target: Target) -> tuple[list[Tensor], Tensor | None]:
    """Return one score per block and image, and the classes; the last block's are the model's own."""
    if outputs[0].ndim == 1:
        return outputs, None
    last, classes = scores_of(outputs[-1], target)
    return [
        *(scores_of(output, target if classes is None else classes)[0] for output in outputs[:-1]),
        last,
    ], classes


def _summed(records: list[Record]) -> TokenRow:
    """Add up the positive gradients of all layers, averaged over heads and queries."""

    def mean_gradient(record: Record) -> Tensor:
        def positive_tile(rows: slice) -> Tensor:
            return gradient_tile(record, rows).clamp(min=0)

        count = record.queries.tokens
        u = torch.full((record.batch, count), 1 / count, device=gradient_of(record).device)
        return record.apply(u, positive_tile)

    return sum_of_rows(records, mean_gradient)
