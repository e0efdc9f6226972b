"""Two sums beside the gradients of attention, each in FP32 and in one order.

    row_products   out[b, h, t] = sum over v of x[b, t, h, v] y[b, t, h, v]
    add_heads      out[b, s, r] = sum over h of parts[b, s, h, r], the first head first

The second is no `torch.sum`, which chooses its order by the shape: here a row of the batch has the
same bits whatever lies beside it.

Letters  B batch, T queries, S keys, H heads, V and R widths.
Memory   x, y, parts: any strides; what row_products returns is contiguous.
Grid     (stretches of a row's tokens, heads if each has its own result, B).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minids_kernels.softmax import padded
from minids_kernels.tiles import ceil_div

_NUMBERS = 2048  # of x that one program reads
_STRETCH = 1024  # numbers of the result that one program adds up


@triton.jit(do_not_specialize=["T"])
def multiply_rows(
    x, y, out, T, V, x_b, x_t, x_h, x_v, y_b, y_t, y_h, y_v,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_V).to(tl.int64)[None, :]
    inside = (t < T)[:, None] & (columns < V)
    x += b * x_b + h * x_h + t[:, None] * x_t + columns * x_v
    y += b * y_b + h * y_h + t[:, None] * y_t + columns * y_v
    products = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    products *= tl.load(y, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + (b * tl.num_programs(1) + h) * T + t, tl.sum(products, 1), mask=t < T)


@triton.jit(do_not_specialize=["S"])
def add(
    parts, out, S, H, R, parts_b, parts_s, parts_h, parts_r, out_b, out_s, out_r,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s, r = at // R, at % R
    parts += b * parts_b + s * parts_s + r * parts_r
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(H):
        total += tl.load(parts, mask=s < S, other=0.0)
        parts += parts_h
    tl.store(out + b * out_b + s * out_s + r * out_r, total.to(out.dtype.element_ty), mask=s < S)


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """Return [B, H, T] in FP32: each row of x [B, T, H, V] times the same one of y, summed."""
    B, T, H, V = x.shape
    out = torch.empty((B, H, T), dtype=torch.float32, device=x.device)
    width = padded(V)
    rows = max(1, _NUMBERS // width)
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        multiply_rows[(ceil_div(T, rows), H, B)](
            x, y, out, T, V, *x.stride(), *y.stride(), rows, width, num_warps=4
        )
    return out


def add_heads(parts: Tensor, out: Tensor) -> None:
    """Write the sum over the heads of parts [B, S, H, R] in FP32 to out [B, S, R]."""
    B, S, H, R = parts.shape
    with torch.cuda.device_of(out):
        add[(ceil_div(S * R, _STRETCH), B)](
            parts, out, S, H, R, *parts.stride(), *out.stride(), _STRETCH, num_warps=4
        )
