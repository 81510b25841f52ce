"""LeGrad: the gradient of every layer's own score at its attention weights."""

import torch
from torch import Tensor, nn

from visattn.map import Map
from visattn.methods.chain import Row, finished
from visattn.methods.gradient import fill_gradients, gradient_tile, release
from visattn.methods.target import Target, check_images, evaluating, logits_of, run, scores_of
from visattn.record.entry import Record
from visattn.record.session import Maps, record_into
from visattn.record.watch import Watch


def legrad(model: nn.Module, images: Tensor, target: Target = None, layers=None) -> Map:
    r"""Sum over layers the positive gradient of the layer's own score at its attention weights.

    .. math::
        s_l = \text{head}(Z_l)_t, \qquad
        \text{map} = \sum_l \operatorname{mean}_{h, i} \Bigl[\frac{\partial s_l}{\partial A_{lhij}}\Bigr]_+

    The tokens of all blocks go through the model's own norm, pooling and head together, as one batch, so that it works
    for any model whose blocks return tokens of one shape.

    Reference:
        Bousselham et al. 2024, "LeGrad", https://arxiv.org/abs/2404.03214. Differs from the paper in: no min-max
        stretch; any model whose blocks keep their shape, not CLIP alone.
    """
    check_images(images)
    last = last_block(model, images)
    maps, blocks = Maps(model, "graph"), {}

    def remember(frame, output):
        if frame.name and maps.records and frame.name == maps.records[-1].block:
            blocks[frame.name] = output[0] if isinstance(output, tuple) else output

    def all_at_once(module, args, output):
        if len({tuple(tokens.shape) for tokens in blocks.values()}) > 1:
            raise ValueError("legrad needs blocks that return tokens of one shape, since one head reads them all")
        tokens = torch.cat(list(blocks.values()))
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        with record_into(maps, model, on_exit=remember):
            handle = model.get_submodule(last).register_forward_hook(all_at_once)
            try:
                output = run(model, images)
            finally:
                handle.remove()
        scores, target = _scores(output, target, len(blocks))
        records = [record for record in maps.select(layers) if record.block in blocks]
        for score, block in zip(scores, blocks, strict=True):
            inside = [record for record in records if record.block == block]
            if inside:
                fill_gradients(score.sum(), inside, keep_graph=True)
    for record in maps.records:
        release(record)
    return finished(_summed(records), records, "legrad", target)


def last_block(model: nn.Module, images: Tensor) -> str:
    """Return the path of the last residual block that holds attention between tokens."""
    found: list[Record] = []
    with evaluating(model), torch.no_grad(), Watch(model, found.append, found.clear):
        run(model, images)
    blocks = [record.block for record in found if record.kind == "token" and record.block]
    if not blocks:
        raise ValueError("legrad needs attention between tokens inside blocks that are listed in a module list")
    return blocks[-1]


def _scores(output, target: Target, count: int) -> tuple[Tensor, Tensor | None]:
    """Return (blocks, B) scores, and the classes; the last block's are the model's own."""
    if callable(target):
        scores, _ = scores_of(output, target)
        return scores.unflatten(0, (count, -1)), None
    logits = logits_of(output).unflatten(0, (count, -1))
    _, target = scores_of(logits[-1], target)
    return logits.gather(2, target.expand(count, -1)[..., None])[..., 0], target


def _summed(records: list[Record]) -> Row:
    total = None
    for record in records:
        count = record.queries.tokens
        u = torch.full((record.batch, count), 1 / count, device=record.gradient.device)
        gradient = record.apply(u, lambda tile, rows, record=record: gradient_tile(record, rows).clamp(min=0).mean(1))
        row = Row.of(gradient, record.keys)
        total = row if total is None else total.plus(row)
    return total
