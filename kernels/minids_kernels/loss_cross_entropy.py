"""Cross-entropy of logits: each is read once, a row's largest and sum grow from chunk to chunk.

    loss = sum over rows i   ln s_i + m_i - x[i, t_i],   s_i = sum over v of e^(x[i, v] - m_i)
    dx[i, v] = d_loss (e^(x[i, v] - m_i) / s_i - [v = t_i])

m is the row's largest number so far; where a chunk brings a larger one, s is multiplied by
e^(old m - new m). Backward takes both: added up they would lose the digits of s beside a large m.
Where rows are few, a row is cut into runs of chunks; a second kernel puts their sums together in
order. No atomics: the same bits in every run.

Letters  n rows, V columns (words of the vocabulary).
Memory   logits [n, V] in any strides; a run's largest number and sum [runs, n] in FP32; d_logits in
         the logits' dtype, rounded once, row-major, or over the logits themselves (in place).
Grid     read: (rows, runs); finish: stretches of rows; grad: chunks of all rows, a row's together.
Numbers  rows as the reference treats them: NaN and +inf make the loss NaN, -inf has no share. A
         target of -100 does not count, and its row's gradient is 0 whatever the row holds. A target
         outside of 0..V-1 makes the loss and its row's gradient NaN: to raise, as torch does on
         CPU, would need to wait for the GPU.
Paper    online softmax, arXiv:1805.02867.                      Book  book/02_model.ipynb
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minids_kernels import cards, configs
from minids_kernels.cards import Card
from minids_kernels.tiles import ceil_div

_NAME = "cross_entropy"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_IGNORED = tl.constexpr(-100)  # a target that does not count
_LOG2_E, _LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
_STRETCH = 128  # rows that one program of `finish` puts together


class Chunk(NamedTuple):
    """How many columns are read at a time."""

    BLOCK: int
    warps: int


CANDIDATES = (Chunk(4096, 4), Chunk(4096, 8), Chunk(8192, 8), Chunk(16384, 16), Chunk(2048, 4))


def chosen(n: int, V: int, itemsize: int, card: Card) -> Chunk:
    """Return the tuned chunk, or by rule one of 32 numbers a thread; a short row in one chunk."""
    found = configs.find("loss_cross_entropy.Chunk", (n, V, itemsize), card)
    if found:
        return Chunk(**found)
    width = min(4096, max(128, 1 << (V - 1).bit_length()))
    return Chunk(width, max(1, width // 1024))


def n_runs(n: int, V: int, chunk: Chunk, card: Card) -> int:
    """Return into how many runs a row is cut: enough for the card's warps, twice over."""
    programs = 2 * card.n_sm * max(1, 64 // chunk.warps)
    return max(1, min(ceil_div(V, chunk.BLOCK), programs // max(n, 1)))


@triton.jit
def grow(largest, total, other, others_total):
    """Return the largest number and the sum of e^(x - largest), of two sets of numbers together."""
    larger = tl.maximum(largest, other)
    base = tl.where(larger == -float("inf"), 0.0, larger)  # of nothing, or -inf alone: sums of 0
    total *= tl.exp2((largest - base) * _LOG2_E)
    return larger, total + others_total * tl.exp2((other - base) * _LOG2_E)


@triton.jit(do_not_specialize=["n", "first", "at"])
def read(
    logits, targets, largest, total, right, n, V, first, at, row_step, col_step,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write largest number and sum of one run of a row's chunks; and its target's logit, if there.

    Columns stand for the words from `first` on, runs for the rows from `at` on of `largest`.
    """
    row, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunks = tl.cdiv(V, BLOCK)
    logits += row * row_step
    most, added = tl.full((), -float("inf"), tl.float32), tl.zeros((), tl.float32)
    for chunk in range(
        run * chunks // tl.num_programs(1), (run + 1) * chunks // tl.num_programs(1)
    ):
        column = chunk * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + column.to(tl.int64) * col_step, mask=column < V, other=-float("inf"))
        x = x.to(tl.float32)
        here = tl.max(x)
        base = tl.where(here == -float("inf"), 0.0, here)
        most, added = grow(most, added, here, tl.sum(tl.exp2((x - base) * _LOG2_E)))
    place = (at + run).to(tl.int64) * n + row
    tl.store(largest + place, most)
    tl.store(total + place, added)
    word = tl.load(targets + row) - first
    if (run == 0) & (word >= 0) & (word < V):
        tl.store(right + row, tl.load(logits + word * col_step).to(tl.float32))


@triton.jit(do_not_specialize=["n", "V", "runs"])
def finish(
    largest, total, right, targets, base, share, loss, n, V, runs, BLOCK: tl.constexpr
):  # fmt: skip
    """Put runs together in order: each row's largest number, one over its sum, and its loss."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n
    most, added = tl.full((BLOCK,), -float("inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for _ in range(runs):
        here = tl.load(largest + rows, mask=inside, other=0.0)
        most, added = grow(most, added, here, tl.load(total + rows, mask=inside, other=1.0))
        largest += n
        total += n
    target = tl.load(targets + rows, mask=inside, other=_IGNORED)
    is_word = (target >= 0) & (target < V)
    added = tl.where(is_word, added, float("nan"))
    tl.store(base + rows, most, mask=inside)
    tl.store(share + rows, tl.div_rn(1.0, added), mask=inside)
    nats = most - tl.load(right + rows, mask=inside & is_word, other=0.0)
    nats += tl.log2(added) * _LN_2
    tl.store(loss + rows, tl.where(target == _IGNORED, 0.0, nats), mask=inside)


@triton.jit(do_not_specialize=["first"])
def grad(
    logits, out, targets, base, share, d_loss, V, first, row_step, col_step, out_row, out_col,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one chunk of a row."""
    chunks = tl.cdiv(V, BLOCK)
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    inside, column = column < V, column.to(tl.int64)
    target = tl.load(targets + row)
    x = tl.load(logits + row * row_step + column * col_step, mask=inside, other=0.0)
    y = tl.exp2((x.to(tl.float32) - tl.load(base + row)) * _LOG2_E) * tl.load(share + row)
    y = tl.where(column + first == target, y - 1.0, y) * tl.load(d_loss)
    y = tl.where(target == _IGNORED, 0.0, y).to(out.dtype.element_ty)
    tl.store(out + row * out_row + column * out_col, y, mask=inside)


class Rows:
    """The losses of n rows whose columns come in parts, the first words first."""

    def __init__(self, targets: Tensor, widths: list[int], itemsize: int, card: Card):
        n, device = len(targets), targets.device
        self.targets, self.widths = targets, widths
        self.chunks = [chosen(n, width, itemsize, card) for width in widths]
        parts = zip(widths, self.chunks, strict=True)
        self.runs = [n_runs(n, width, chunk, card) for width, chunk in parts]
        size = (sum(self.runs), n)
        self.largest = torch.empty(size, dtype=torch.float32, device=device)
        self.total = torch.empty_like(self.largest)
        self.right = torch.empty(n, dtype=torch.float32, device=device)  # logits of the targets

    def read(self, part: int, logits: Tensor) -> None:
        """Take in the logits of one part."""
        chunk, runs = self.chunks[part], self.runs[part]
        n, V = logits.shape
        read[(n, runs)](
            logits, self.targets, self.largest, self.total, self.right, n, V,
            sum(self.widths[:part]), sum(self.runs[:part]), *logits.stride(),
            chunk.BLOCK, num_warps=chunk.warps,
        )  # fmt: skip

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sum of all losses, and of each row the largest logit and 1 / s.

        The last is NaN where the target is no word.
        """
        n = len(self.targets)
        base, share, loss = (torch.empty_like(self.right) for _ in range(3))
        finish[(ceil_div(n, _STRETCH),)](
            self.largest, self.total, self.right, self.targets, base, share, loss,
            n, sum(self.widths), sum(self.runs), _STRETCH, num_warps=4,
        )  # fmt: skip
        return loss.sum(), base, share


def write_gradient(
    logits: Tensor, targets: Tensor, base: Tensor, share: Tensor, d_loss: Tensor, out: Tensor,
    first: int, card: Card,
) -> None:  # fmt: skip
    """Write the gradient of logits, whose columns stand for the words from `first` on, to `out`."""
    n, V = logits.shape
    chunk = chosen(n, V, logits.itemsize, card)
    grad[(n * ceil_div(V, chunk.BLOCK),)](
        logits, out, targets, base, share, d_loss, V, first, *logits.stride(), *out.stride(),
        chunk.BLOCK, num_warps=chunk.warps,
    )  # fmt: skip


class _CrossEntropy(torch.autograd.Function):
    """Keep the logits, and of each row its largest one and 1 / s."""

    @staticmethod
    def forward(ctx, logits, targets, in_place, card):
        with torch.cuda.device_of(logits):  # Triton launches on the current GPU
            rows = Rows(targets, [logits.shape[1]], logits.itemsize, card)
            rows.read(0, logits)
            loss, base, share = rows.finish()
        ctx.save_for_backward(logits, targets, base, share)
        ctx.in_place, ctx.card = in_place, card
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, targets, base, share = ctx.saved_tensors
        out = logits.detach() if ctx.in_place else torch.empty(
            logits.shape, dtype=logits.dtype, device=logits.device
        )  # fmt: skip
        with torch.cuda.device_of(logits):
            write_gradient(logits, targets, base, share, d_loss, out, 0, ctx.card)
        if ctx.in_place:
            torch.autograd.graph.increment_version(logits)
        return out, None, None, None


def cross_entropy(logits: Tensor, targets: Tensor, in_place: bool = False) -> Tensor:
    """Return sum -log p(target) in nats, in FP32, differentiable; targets of -100 do not count.

    With `in_place`, backward writes the gradient over the logits, which saves memory of their size:
    nobody may read them afterwards, and autograd refuses to go backward from them a second time.
    What minids.fused.loss.cross_entropy does, save that a target outside of the vocabulary gives
    NaN. Raises ValueError for shapes and dtypes that do not fit.
    """
    card = cards.card(_NAME, logits, targets)
    check_targets(_NAME, targets, len(logits) if logits.dim() else -1)
    if logits.dim() != 2 or not logits.shape[1] or logits.dtype not in DTYPES:
        raise ValueError(
            f"{_NAME}: logits must have rows, columns and a dtype of {DTYPES}, got "
            f"{tuple(logits.shape)} in {logits.dtype}: reshape or cast them"
        )
    if in_place and _is_expanded(logits):
        raise ValueError(
            f"{_NAME}: in_place needs a place for each logit, got strides {logits.stride()}: copy "
            "what was expanded, or leave in_place out"
        )
    if not len(logits):
        return logits.float().sum()
    return _CrossEntropy.apply(logits, targets.contiguous(), in_place, card)


def _is_expanded(x: Tensor) -> bool:
    return any(size > 1 and not step for size, step in zip(x.shape, x.stride(), strict=True))


def check_targets(kernel: str, targets: Tensor, n: int) -> None:
    """Raise ValueError unless there is an int64 for each of n rows."""
    if tuple(targets.shape) != (n,) or targets.dtype != torch.int64:
        raise ValueError(
            f"{kernel}: targets must be ({n},) in torch.int64, one word a row, got "
            f"{tuple(targets.shape)} in {targets.dtype}: reshape or cast them"
        )
