"""A function's forward pass, or forward and backward, as sides of a case; results against FP64.

A pass of some ten microseconds is timed in a CUDA graph, where backward must run on the stream of
its forward: so both are one call, for everybody.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minids.formats.groups import Scaled
from minids_kernels import scaled as kernels
from minids_kernels.bench import checks
from minids_kernels.bench.attention import Gap
from minids_kernels.bench.case import Call, Prepare, Verdict

# relative norms of what is rounded to BF16 once, or two or three times; and of what is
# quantised, against the same in torch: where numbers lie at a tie, codes are neighbours
ROUNDED, ROUNDED_AGAIN, QUANTISED = checks.BF16_ERROR, 3.5e-3, 5e-3
CODES = 2.6e-2  # what rounding normal numbers to E4M3 costs: who rounds otherwise before is nearer

Function = Callable[..., Any]


def forward(function: Function, *settings: Any, compiled: bool = False) -> Prepare:
    """Return a side that calls a function of the inputs and these settings."""

    def prepare(*inputs: Any) -> Call:
        return partial(_made(function, compiled), *inputs, *settings)

    return prepare


def trained(function: Function, *settings: Any, compiled: bool = False) -> Prepare:
    """Return a side that also goes backward; the last input is the gradient of the result.

    A call gives the result, then the gradient of each input of floating point.
    """

    def prepare(*inputs: Any) -> Call:
        *given, dy = inputs
        run = _made(function, compiled)
        given = [leaf(x) for x in given]
        leaves = [x for x in given if x.requires_grad]

        def both() -> tuple[Tensor, ...]:
            y = run(*given, *settings)
            return y.detach(), *torch.autograd.grad(y, leaves, dy)

        return both

    return prepare


def leaf(x: Tensor) -> Tensor:
    """Return the same numbers as what is differentiated; integers and phases stay as they are."""
    return x.detach().requires_grad_() if x.is_floating_point() else x


def _made(function: Function, compiled: bool) -> Function:
    # torch compiles once for all inputs of a shape
    return torch.compile(function, dynamic=False) if compiled else function


def is_near(function: Function, limit: float, result: Any, *inputs: Any) -> Verdict:
    """Compare with the function in FP64, and with its gradients where the result has them."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    results = result if isinstance(result, tuple) else (result,)
    expected = function(*wide)
    gap = Gap()
    of = expected if isinstance(expected, tuple) else (expected,)
    for n, (found, exact) in enumerate(zip(results, of, strict=True)):
        gap.add(f"result {n}", found, exact)
    return gap.judge(limit)


def gradients_are_near(function: Function, limit: float, result: Any, *inputs: Any) -> Verdict:
    """The same for forward and backward: the last input is the gradient of the function."""
    *given, dy = (x.double() if x.is_floating_point() else x for x in inputs)
    expected = trained(function)(*given, dy)()
    gap = Gap()
    for n, (found, exact) in enumerate(zip(result, expected, strict=True)):
        gap.add(f"gradient {n}" if n else "result", found, exact)
    return gap.judge(limit)


def codes_are_near(function: Function, result: Any, *inputs: Any) -> Verdict:
    """Compare FP8 results, and numbers beside them, with a function in torch on rows of both ends.

    Inputs with rows are cut; others (a gain) are given whole.
    """
    results = _flat(result)
    gap, n_rows = Gap(), len(_numbers(inputs[0]))
    for rows in checks.slices(n_rows):
        cut = (checks.sample(x, rows, "cpu") if len(_numbers(x)) == n_rows else x.cpu()
               for x in inputs)  # fmt: skip
        pairs = zip(results, _flat(function(*cut)), strict=True)
        for n, (found, expected) in enumerate(pairs):
            gap.add(f"result {n}", checks.exact(checks.sample(found, rows, "cpu")),
                    checks.exact(expected))  # fmt: skip
    verdict = gap.judge(QUANTISED)
    if verdict.error is not None and QUANTISED < verdict.error <= CODES:
        return verdict._replace(error=None)  # a peer that rounds otherwise counts, with this note
    return verdict


def _numbers(x: Tensor | Scaled) -> Tensor:
    return x if isinstance(x, Tensor) else x.values


def _flat(result: Any) -> list[Any]:
    return [result] if isinstance(result, Tensor | Scaled | kernels.Scaled) else list(result)
