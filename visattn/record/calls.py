"""See every attention call of a model that was written for anyone: fused, eager or nn.MultiheadAttention."""

from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from visattn.record.space import pair

POOLS = (F.max_pool2d, torch.max_pool2d, F.avg_pool2d)
SOFTMAX = (F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax)


class Calls(TorchFunctionMode):
    """Pass every torch function on, and tell a listener of attention calls, convolutions, poolings and paddings.

    Args:
        listener: An object with ``listening()``, ``fused(q, k, v, output, options)``,
            ``eager(alpha, heads)``, ``convolved(output)`` and ``strided(input, output, kernel,
            stride, padding)``.

    Example:
        >>> class Listener:
        ...     listening = staticmethod(lambda: True)
        ...     fused = staticmethod(lambda q, k, v, output, options: print("attends",
        ...     tuple(q.shape)))
        >>> x = torch.rand(1, 2, 3, 5)
        >>> with Calls(Listener()):
        ...     y = F.scaled_dot_product_attention(x, x, x)
        attends (1, 2, 3, 5)
    """

    def __init__(self, listener):
        super().__init__()
        self._listener = listener
        self._seen_by = {
            F.scaled_dot_product_attention: self._sdpa,
            F.multi_head_attention_forward: self._mha,
        }
        self._seen_by |= dict.fromkeys((F.conv2d, torch.conv2d), self._conv) | {F.pad: self._pad}
        self._seen_by |= {function: self._pool(function) for function in POOLS}
        self._seen_by |= {function: self._softmax(function) for function in SOFTMAX}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        handler = self._seen_by.get(func)
        if handler is None or not self._listener.listening():
            return func(*args, **(kwargs or {}))
        return handler(*args, **(kwargs or {}))

    def _sdpa(self, query, key, value, *args, **kwargs):
        output = F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
        names = ("attn_mask", "dropout_p", "is_causal")
        self._listener.fused(
            query, key, value, output, dict(zip(names, args, strict=False)) | kwargs
        )
        return output

    def _softmax(self, function, heads: int | None = None):
        def softmax(input, dim=None, *args, **kwargs):
            output = function(input, dim, *args, **kwargs)
            if dim in (-1, input.ndim - 1):
                self._listener.eager(output, heads)
            return output

        return softmax

    def _mha(self, query, key, value, embed_dim_to_check, num_heads, *args, **kwargs):
        # Inside this call modes are off, so the attention in it would go unseen. A copy of the
        # function runs whose global names `softmax` and `scaled_dot_product_attention` lead here.
        own = F.multi_head_attention_forward
        names = {
            "scaled_dot_product_attention": self._sdpa,
            "softmax": self._softmax(F.softmax, num_heads),
        }
        copy = FunctionType(
            own.__code__,
            {**own.__globals__, **names},
            own.__name__,
            own.__defaults__,
            own.__closure__,
        )
        copy.__kwdefaults__ = own.__kwdefaults__
        with torch._C.DisableTorchFunction():
            return copy(query, key, value, embed_dim_to_check, num_heads, *args, **kwargs)

    def _conv(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        output = torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
        self._listener.convolved(output)
        spread = [
            (size - 1) * by + 1 for size, by in zip(weight.shape[2:], pair(dilation), strict=True)
        ]
        named = {"valid": (0, 0), "same": [(size - 1) // 2 for size in spread]}
        padding = named[padding] if isinstance(padding, str) else pair(padding)
        self._listener.strided(input, output, spread, pair(stride), padding)
        return output

    def _pad(self, input, pad, *args, **kwargs):
        output = F.pad(input, pad, *args, **kwargs)
        if input.ndim == 4 and len(pad) in (2, 4):
            # New places around the old ones: what a convolution of 1 x 1 makes of them, with this
            # padding.
            self._listener.strided(
                input, output, (1, 1), (1, 1), (pad[2] if len(pad) == 4 else 0, pad[0])
            )
        return output

    def _pool(self, function):
        def pool(input, kernel_size, stride=None, padding=0, *args, **kwargs):
            output = function(input, kernel_size, stride, padding, *args, **kwargs)
            self._listener.strided(
                input, output, pair(kernel_size), pair(stride or kernel_size), pair(padding)
            )
            return output

        return pool
