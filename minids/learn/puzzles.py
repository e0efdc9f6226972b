"""What the puzzles of chapter 12 are checked with: inputs, right results, and a test of a call.

Inputs lie among NaN, results begin as NaN, and kernels are watched (`minids.learn.kernels`): what
is read beside an array, or is never written, is told and not a matter of luck.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minids.formats import groups
from minids.fp8 import scaled_matmul
from minids.learn.check import differs
from minids.learn.kernels import OutOfBoundsError, record

Test = Callable[[Any], str | None]
FP16, FP32 = torch.float16, torch.float32
_MARGIN = 4096  # elements before and behind an input: larger than any tile here
LATENT, ROTARY, PAGE = 32, 16, 16  # widths of the last puzzle, and the slots of a page
UNKNOWN = "never written, or made of what a mask left out, of an unused slot, of inf - inf"


# Inputs


def randn(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """Return random numbers among NaN, the same ones in each call."""
    random = torch.Generator().manual_seed(sum(shape))
    return among_nan(torch.randn(shape, generator=random).to(dtype))


def among_nan(x: Tensor) -> Tensor:
    """Return the same numbers in memory that holds NaN before and behind them."""
    kind = x.dtype if x.dtype.itemsize > 1 else torch.uint8
    around = torch.full((x.numel() + 2 * _MARGIN,), torch.nan if x.dtype.itemsize > 1 else 0x7F)
    around = around.to(kind)
    inside = around[_MARGIN : _MARGIN + x.numel()].unflatten(0, x.shape)
    inside.copy_(x.view(around.dtype))
    return inside.view(x.dtype)


def scaled(rows: int, cols: int, group: tuple[int, int]) -> groups.Scaled:
    """Return random numbers of unlike sizes, quantised in these groups."""
    sizes = torch.linspace(0.5, 2, rows)[:, None] * torch.linspace(1, 4, cols)
    values, scale, _ = groups.quantise(randn(rows, cols) * sizes, group)
    return groups.Scaled(among_nan(values), among_nan(scale), group)


def pages(length: int, size: float = 1.0) -> tuple[Any, ...]:
    """Return what `attend` is given: latents in pages out of order, NaN in all unused slots."""
    table = torch.tensor([0, 4, 2, 5])[: -(-length // PAGE)].int()
    store = torch.full((6, PAGE, LATENT + ROTARY), torch.nan)
    held = randn(length, LATENT + ROTARY)
    for j, page in enumerate(table.tolist()):
        part = held[j * PAGE : (j + 1) * PAGE]
        store[page, : len(part)] = part
    return among_nan(size * randn(16, LATENT + ROTARY)), among_nan(store), table, length, 0.125


# Right results, in FP64 or by the package


def product(a: Tensor, b: Tensor, *_: Any) -> Tensor:
    """Return a b^T."""
    return (a.double() @ b.double().T).float()


def normalised(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Return RMSNorm of each row."""
    x = x.double()
    return (x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain).float()


def gated(x: Tensor, w: Tensor) -> Tensor:
    """Return SwiGLU of both halves of x w^T."""
    gate, up = (x.double() @ w.double().T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).float()


def best(score: Tensor, k: int) -> Tensor:
    """Return the ids of each row's k largest scores, of equal ones the first."""
    return score.sort(dim=1, descending=True, stable=True).indices[:, :k]


def scaled_product(a: groups.Scaled, b: groups.Scaled) -> Tensor:
    """Return a b^T of quantised matrices."""
    return scaled_matmul(a, b)


def attended(q: Tensor, store: Tensor, table: Tensor, length: int, scale: float) -> Tensor:
    """Return each head's mean of the latents, weighed by softmax."""
    held = store[table.long()].flatten(0, 1)[:length].double()
    weight = (scale * (q.double() @ held.T)).softmax(-1)
    return (weight @ held[:, :LATENT]).float()


# Tests of answers


def agrees(right: Callable[..., Tensor], call: str, *given: Any, tolerance: float = 1e-5) -> Test:
    """Return a test of one call: nothing outside of its arrays, and the right result."""
    shown = call.format(*map(_shape, given))

    def test(answer: Any) -> str | None:
        got, trouble = _run(answer, *given)
        if trouble:
            return f"{shown}: {trouble}."
        told = differs(shown, got, right(*given), tolerance)
        return told.replace("gave nan,", f"gave nan ({UNKNOWN}),") if told else None

    return test


def _run(answer: Any, *given: Any) -> tuple[Any, str]:
    """Return what an answer returns, or what it touched and must not."""
    results: list[Any] = []
    try:
        record(lambda: results.append(answer(*given)))
    except OutOfBoundsError as error:
        return None, str(error)
    return results[0], ""


def _shape(value: Any) -> str:
    x = value.values if isinstance(value, groups.Scaled) else value
    return str(list(x.shape)) if isinstance(x, Tensor) else f"{x:g}"
