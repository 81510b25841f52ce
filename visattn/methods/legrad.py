"""LeGrad: the gradient of every layer's own score at its attention weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from visattn.map import Map
from visattn.methods.chain import TokenRow, finished, sum_of_rows
from visattn.methods.gradient import fill_gradients, gradient_of, gradient_tile, release
from visattn.methods.target import (
    Target,
    check_images,
    frozen_evaluation,
    logits_of,
    run,
    scores_of,
)
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
        \text{map} = \sum_l \operatorname{mean}_{h, i}
        \Bigl[\frac{\partial s_l}{\partial A_{lhij}}\Bigr]_+

    The tokens of all blocks go through the model's own norm, pooling and head together, as one
    batch, so that it works for any model whose blocks stand in a list and return tokens of one
    shape. Other models need ``head``.

    Args:
        model: Any network with attention between tokens.
        images: (B, C, H, W), as the model takes them.
        target: As in `visattn.explain`.
        layers: None is all token layers; or a slice, or a list of numbers and names.
        head: From what a block returns, (B, N, C) or (B, h, w, C), to scores (B, classes): it
            replaces the model's own norm, pooling and head, and is called for each block alone.

    Raises:
        ValueError: No block is found around the attention, or blocks of several shapes have no
            ``head``.

    Reference:
        Bousselham et al. 2024, "LeGrad", https://arxiv.org/abs/2404.03214. Differs from the paper
        in: no min-max stretch; any model whose blocks keep their shape, not CLIP alone.
    """
    check_images(images)
    maps = Maps(model, "graph")
    blocks: dict[str, Tensor] = {}  # the tokens that each block returned
    block_of = _block_around if head else _listed_block

    def remember(frame, output) -> None:
        if not frame.name or not maps.records:
            return
        if frame.name == block_of(maps.records[-1]):
            blocks[frame.name] = output[0] if isinstance(output, tuple) else output

    with frozen_evaluation(model), torch.inference_mode(False), torch.enable_grad():
        # a head of the caller is called per block; the model's own stands after the last block
        last = None if head else last_block(model, images)
        images = images.detach().clone().requires_grad_()
        with record_into(maps, model, on_exit=remember):
            if last is None:
                output = run(model, images)
            else:
                output = _run_head_on_all_blocks(model, images, last, blocks)
        records = _records_inside(blocks, maps.select(layers), block_of)
        if head:
            outputs = [head(tokens) for tokens in blocks.values()]
        else:
            outputs = _outputs_of_blocks(output, target, len(blocks))
        scores, classes = _scores(outputs, target)
        for score, block in zip(scores, blocks, strict=True):
            inside = [record for record in records if block_of(record) == block]
            if inside:
                fill_gradients(score.sum(), inside, keep_graph=True)
    for record in maps.records:
        release(record)
    return finished(_sum_of_gradients(records), records, "legrad", classes)


def _listed_block(record: Record) -> str:
    return record.block


def _block_around(record: Record) -> str:
    """Return the path of the block around an attention call.

    That is its block in a list of blocks, or else the parent of the module that attends.
    """
    if record.block:
        return record.block
    attention, _, _ = record.name.partition("[")
    parent, _, _ = attention.rpartition(".")
    return parent


def _records_inside(
    blocks: dict[str, Tensor],
    records: list[Record],
    block_of: Callable[[Record], str],
) -> list[Record]:
    if not blocks:
        raise ValueError(
            "legrad found no block around the attention of this model whose tokens a head can read"
        )
    inside = [record for record in records if block_of(record) in blocks]
    if not inside:
        names = ", ".join(record.name for record in records)
        raise ValueError(
            f"layers selects {names}, outside the blocks whose tokens legrad reads: "
            f"{', '.join(blocks)}"
        )
    return inside


def _run_head_on_all_blocks(
    model: nn.Module,
    images: Tensor,
    last: str,
    blocks: dict[str, Tensor],
):
    """Run the model, and what stands after its last block on the tokens of all blocks."""

    def join(module, args, output):
        shapes = {tokens.shape for tokens in blocks.values()}
        if len(shapes) > 1:
            raise ValueError(
                "legrad needs blocks that return tokens of one shape, since one head reads them "
                "all; for others pass head="
            )
        tokens = torch.cat(list(blocks.values()))  # (blocks * B, N, C)
        if isinstance(output, tuple):
            return (tokens, *output[1:])
        return tokens

    handle = model.get_submodule(last).register_forward_hook(join)
    try:
        return run(model, images)
    finally:
        handle.remove()


def last_block(model: nn.Module, images: Tensor) -> str:
    """Return the path of the last residual block that holds attention between tokens."""
    records: list[Record] = []
    with torch.no_grad(), Watch(model, records.append, records.clear):
        run(model, images)
    token_records = [record for record in records if record.kind == "token"]
    blocks = [record.block for record in token_records if record.block]
    if not blocks:
        raise ValueError(
            "legrad needs attention between tokens inside blocks that are listed in a module list; "
            "pass head=, a function from the tokens of a block to scores"
        )
    return blocks[-1]


def _outputs_of_blocks(
    output: object,
    target: Target,
    count: int,
) -> list[Tensor]:
    """Split what the head made of all blocks at once: logits, or the scores of a callable."""
    if callable(target):
        joined, _ = scores_of(output, target)
    else:
        joined = logits_of(output)
    return list(joined.unflatten(0, (count, -1)))  # (blocks * B, ...) -> blocks x (B, ...)


def _scores(
    outputs: list[Tensor],
    target: Target,
) -> tuple[list[Tensor], Tensor | None]:
    """Return one score per block and image, and the classes, which the last block decides."""
    if outputs[0].ndim == 1:
        return outputs, None
    last_score, classes = scores_of(outputs[-1], target)
    shared_target = target if classes is None else classes
    scores = []
    for output in outputs[:-1]:
        score, _ = scores_of(output, shared_target)
        scores.append(score)
    scores.append(last_score)
    return scores, classes


def _sum_of_gradients(records: list[Record]) -> TokenRow:
    """Add up the positive gradients of all layers, averaged over heads and queries."""

    def mean_gradient(record: Record) -> Tensor:
        def positive_tile(rows: slice) -> Tensor:
            return gradient_tile(record, rows).clamp(min=0)

        count = record.queries.tokens
        device = gradient_of(record).device
        u = torch.full((record.batch, count), 1 / count, device=device)
        return record.apply(u, positive_tile)

    return sum_of_rows(records, mean_gradient)
