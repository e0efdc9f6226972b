"""Is a result right: quantised ones by bits, products by FP64 on the same quantised inputs.

Rows are sampled from both ends of a result. References run on the CPU: on a GPU torch divides by
a plain number through its reciprocal, and a scale may come out one unit beside the reference.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from minids.formats.groups import Scaled
from minids_kernels.bench.case import Verdict
from minids_kernels.bench.floors import GROUP

ROWS = 256  # sampled at either end, where there are so many: two whole groups
PRODUCT_ROWS = 32  # sampled at either end of a product
# relative norm: the tensor cores add products of one group with fewer digits than FP32 (report
# 3.3.2), as tests/test_fp8.py has it; rounding normal numbers to BF16 alone gives 1.7e-3
FP32_ERROR, BF16_ERROR = 1e-3, 2.5e-3


def product(
    result: Tensor, a: Tensor | Scaled, b: Tensor | Scaled, total: Tensor | None = None
) -> Verdict:
    """Compare a product, or what was added to `total`, with FP64."""
    limit = BF16_ERROR if result.dtype == torch.bfloat16 else FP32_ERROR
    left, right = exact(a), exact(b)
    rows = _ends(len(left), PRODUCT_ROWS, result.device)
    expected = left[rows] @ right.mT
    found = result[: len(left), : len(right)][rows].double()
    if total is not None:
        found = found - total[rows].double()
    error = ((found - expected).norm() / expected.norm()).item()
    near = error <= limit  # False for NaN
    return Verdict("" if near else f"error {error:.1e}, more than {limit:.1e}", near, error)


def exact(x: Tensor | Scaled) -> Tensor:
    """Return a matrix in FP64, where every value times its scale is exact."""
    if isinstance(x, Tensor):
        return x.double()
    rows, cols = x.values.shape
    scale = x.scale.double()
    spread = scale.repeat_interleave(x.group[0], 0)[:rows].repeat_interleave(x.group[1], 1)
    return x.values.double() * spread[:, :cols]


def bits(reference: Any, result: Any, x: Tensor | Scaled) -> Verdict:
    """Compare what was made of x with the reference, bit by bit: codes and scales, or numbers."""
    differing: Counter[str] = Counter()
    for rows in slices(len(x if isinstance(x, Tensor) else x.values)):
        expected = reference(sample(x, rows, "cpu"))
        for one, other in zip(_upright(result), _upright(expected), strict=True):
            parts = zip(_parts(sample(one, rows)), _parts(other), strict=True)
            for (name, found), (_, wanted) in parts:
                differing[name] += int((_as_bytes(found) != _as_bytes(wanted)).any(-1).sum())
    wrong = [f"{n} {name}" for name, n in differing.items() if n]
    return Verdict(f"{', '.join(wrong)} differ" if wrong else "bit-equal", not wrong)


def sample(x: Any, rows: slice, device: str | None = None) -> Any:
    """Return some rows of a matrix; of a quantised one from whole groups."""
    if isinstance(x, Tensor):
        return x[rows].to(device)
    size = x.group[0]
    scale = x.scale[rows.start // size : -(-rows.stop // size)]
    return Scaled(x.values[rows].to(device), scale.to(device), x.group)


def slices(rows: int) -> list[slice]:
    """Return the two ends of so many rows, from whole groups; all of them if they are few."""
    if rows <= 2 * ROWS:
        return [slice(0, rows)]
    return [slice(0, ROWS), slice((rows - ROWS) // GROUP * GROUP, rows)]


def _upright(x: Any) -> list[Any]:
    """Return results as they lie over x: the second of two is turned back."""
    if isinstance(x, Tensor) or isinstance(x[0], Tensor):
        return [x]
    return [x[0], x[1].mT]


def _parts(x: Any) -> list[tuple[str, Tensor]]:
    return [("numbers", x)] if isinstance(x, Tensor) else [("codes", x[0]), ("scales", x[1])]


def _as_bytes(x: Tensor) -> Tensor:
    return x.cpu().contiguous()[..., None].view(torch.uint8)


def _ends(n: int, few: int, device: torch.device) -> Tensor:
    every = torch.arange(n, device=device)
    return every if n <= 2 * few else torch.cat([every[:few], every[-few:]])
