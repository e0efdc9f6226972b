"""The loss of a model's last layer, whose logits are never there all at once.

    loss = cross_entropy(hidden weight^T, targets)

The words are cut into parts. Forward multiplies hidden with one part of the weight after the other
and keeps of each row its largest logit and its sum (loss_cross_entropy.py). Backward makes each
part's logits again, writes their gradient over them, and multiplies it twice:

    d_hidden += d_logits weight_part      d_weight_part = d_logits^T hidden

Products are torch's (cuBLAS), all that is between them is ours.

Why words and not tokens, 8 n D V operations and not 6: parts of tokens need no logits twice, but
each needs the whole weight in the products' dtype (2 V D bytes where autocast narrows it) and adds
to the whole of d_weight in FP32 (4 V D bytes where the weight is in BF16): for 4,096 tokens of V3,
0.9 and 1.7 times the logits in FP32. To read and write a sum of 4 V D bytes takes an H100 as long
as the products of 1,200 tokens with it. Parts of words add to nothing but d_hidden; and the
incoming gradient is known before d_logits is rounded, so that FP16 loses no small ones.

Letters  n rows (tokens), D width, V words; a part has W words.
Memory   beside arguments and gradients: one part's logits [n, W]; where these are in 16 bits, the
         sum d_hidden [n, D] in FP32, and what autocast narrows: hidden, and one part of the weight.
         W is such that all of it is below a tenth of the logits [n, V] in FP32, unless products
         would then be too few for all multiprocessors.
Grid     none: no kernel of its own.
Book     book/02_model.ipynb
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minids_kernels import cards
from minids_kernels.cards import Card
from minids_kernels.loss_cross_entropy import DTYPES, Rows, check_targets, write_gradient
from minids_kernels.tiles import ceil_div

_NAME = "target_sum"
_SHARE = 3 / 32  # of the bytes that all logits would take in FP32
_TILE = 128  # rows and columns of the logits that one multiprocessor multiplies at a time, about


def part_words(hidden: Tensor, weight: Tensor, dtype: torch.dtype, card: Card) -> int:
    """Return W: what memory allows, yet enough products for all multiprocessors."""
    (n, D), V = hidden.shape, len(weight)
    size = dtype.itemsize
    fixed = 0  # bytes that do not depend on W
    if hidden.dtype != dtype:
        fixed += n * D * size
    if hidden.dtype != torch.float32:
        fixed += 4 * n * D
    of_a_word = size * (n + (D if weight.dtype != dtype else 0))
    allowed = int(4 * n * V * _SHARE - fixed) // of_a_word // _TILE * _TILE
    wave = ceil_div(card.n_sm, ceil_div(n, _TILE)) * _TILE
    n_parts = ceil_div(V, min(V, max(allowed, wave)))
    return ceil_div(ceil_div(V, n_parts), _TILE) * _TILE  # all parts alike


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """Write the product to `out`, or add it to what is there; sums are in FP32."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif out.dtype != torch.float32:
        out.copy_(a @ b)
    elif out.is_cpu:  # the interpreter's: torch has the product below for GPUs alone
        torch.addmm(out, a.float(), b.float(), beta=int(add), out=out)
    else:
        torch.addmm(out, a, b, torch.float32, beta=int(add), out=out)


class _Head:
    """The words in parts; memory for the logits of one, and for its weight where that is cast."""

    def __init__(self, hidden: Tensor, weight: Tensor, dtype: torch.dtype, card: Card):
        self.hidden = hidden.to(dtype)
        self.weights = weight.split(part_words(hidden, weight, dtype, card))
        self.widths = [len(part) for part in self.weights]
        size, D = self.widths[0], hidden.shape[1]
        self.memory = torch.empty(len(hidden) * size, dtype=dtype, device=hidden.device)
        cast = weight.dtype != dtype
        self.narrow = torch.empty((size, D), dtype=dtype, device=hidden.device) if cast else None

    def logits(self, part: int) -> tuple[Tensor, Tensor]:
        """Return a part's logits and its weight, in the memory of the last one's."""
        weight, n = self.weights[part], len(self.hidden)
        if self.narrow is not None:
            weight = self.narrow[: len(weight)].copy_(weight)
        logits = self.memory[: n * len(weight)].view(n, len(weight))
        multiply(self.hidden, weight.mT, logits)
        return logits, weight


class _TargetSum(torch.autograd.Function):
    """Keep hidden states, weight, and of each row its largest logit and 1 / s."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype, card):
        with torch.cuda.device_of(hidden):  # Triton launches on the current GPU
            head = _Head(hidden, weight, dtype, card)
            rows = Rows(targets, head.widths, dtype.itemsize, card)
            for part in range(len(head.widths)):
                rows.read(part, head.logits(part)[0])
            loss, base, share = rows.finish()
        ctx.save_for_backward(hidden, weight, targets, base, share)
        ctx.dtype, ctx.card = dtype, card
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, targets, base, share = ctx.saved_tensors
        asks_hidden, asks_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden, dtype=torch.float32) if asks_hidden else None
        d_weight = torch.empty_like(weight) if asks_weight else None
        with torch.cuda.device_of(hidden):
            head, first = _Head(hidden, weight, ctx.dtype, ctx.card), 0
            for part, width in enumerate(head.widths):
                logits, of_part = head.logits(part)
                write_gradient(logits, targets, base, share, d_loss, logits, first, ctx.card)
                if d_hidden is not None:
                    multiply(logits, of_part, d_hidden, add=part > 0)
                if d_weight is not None:
                    multiply(logits.mT, head.hidden, d_weight[first : first + width])
                first += width
        if d_hidden is not None:
            d_hidden = d_hidden.to(hidden.dtype)
        return d_hidden, d_weight, None, None, None


def target_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return cross_entropy(hidden weight^T, targets) in FP32, differentiable in the first two.

    Products are made in autocast's dtype, else in the one that both have in common; logits are
    rounded to it. Targets of -100 do not count; one outside of the vocabulary gives NaN. What
    minids.loss.target_sum does. Raises ValueError for shapes and dtypes that do not fit.
    """
    card = cards.card(_NAME, hidden, weight, targets)
    for name, x in (("hidden", hidden), ("weight", weight)):
        if x.dim() != 2 or not x.shape[1] or x.dtype not in DTYPES:
            raise ValueError(
                f"{_NAME}: {name} must have rows, columns and a dtype of {DTYPES}, got "
                f"{tuple(x.shape)} in {x.dtype}: reshape or cast it"
            )
    if hidden.shape[1] != weight.shape[1] or not len(weight):
        raise ValueError(
            f"{_NAME}: hidden [n, D] and weight [V, D] must share their width, V > 0, got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}: transpose one"
        )
    check_targets(_NAME, targets, len(hidden))
    if not len(hidden):
        return hidden.float().sum() + 0 * weight[0].float().sum()
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return _TargetSum.apply(hidden, weight, targets.contiguous(), dtype, card)
