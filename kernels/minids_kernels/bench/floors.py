"""Floors: the least time in which a card can move the bytes of a job and make its products.

Bytes count every input once and every output once; a product of M x N x K is 2 M N K operations.
The floor is the larger of bytes / bandwidth and operations / rate, by the datasheet or, as the
measured ceiling, by what a copy and a plain product reached in the same run.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from minids_kernels.bench.shapes import Attention, Experts

GROUP = 128  # values that share a scale, along one axis or two
_SCALE_BYTES = 4


class Rates(NamedTuple):
    """What a card does in a second; None where it is not known."""

    tb_s: float | None = None  # bytes read plus bytes written
    fp8_tflops: float | None = None
    bf16_tflops: float | None = None


# dense rates of the SXM modules; other cards of these names are slower and have no floor here
DATASHEETS = {
    "NVIDIA H100 80GB HBM3": Rates(3.35, 1979, 989),
    "NVIDIA H200": Rates(4.8, 1979, 989),
}


class Work(NamedTuple):
    """What one call must do at least."""

    moved_bytes: int
    operations: int = 0
    unit: str = "fp8_tflops"  # the field of Rates that its operations run at

    def us_at(self, rates: Rates) -> float | None:
        """Return the least microseconds at these rates; None where one that it needs is unknown."""
        memory, compute = self.memory_us(rates), self.compute_us(rates)
        return None if memory is None or compute is None else max(memory, compute)

    def memory_us(self, rates: Rates) -> float | None:
        """Return the microseconds that its bytes take."""
        return None if rates.tb_s is None else self.moved_bytes / rates.tb_s / 1e6

    def compute_us(self, rates: Rates) -> float | None:
        """Return the microseconds that its operations take."""
        if not self.operations:
            return 0.0
        rate = getattr(rates, self.unit)
        return None if rate is None else self.operations / rate / 1e6


class Steps(NamedTuple):
    """What calls must do at least that wait for each other: each has a floor of its own."""

    works: tuple[Work, ...]

    @property
    def moved_bytes(self) -> int:
        return sum(work.moved_bytes for work in self.works)

    @property
    def operations(self) -> int:
        return sum(work.operations for work in self.works)

    def us_at(self, rates: Rates) -> float | None:
        """Return the sum of all floors at these rates; None where one is unknown."""
        return _sum(work.us_at(rates) for work in self.works)

    def memory_us(self, rates: Rates) -> float | None:
        """Return the microseconds that all bytes take."""
        return _sum(work.memory_us(rates) for work in self.works)

    def compute_us(self, rates: Rates) -> float | None:
        """Return the microseconds that all operations take, each at its unit's rate."""
        return _sum(work.compute_us(rates) for work in self.works)


def _sum(parts: Iterable[float | None]) -> float | None:
    known = list(parts)
    return None if None in known else sum(part for part in known if part is not None)


def product(m: int, n: int, k: int) -> Work:
    """FP8 product with tile scales on the left, block scales on the right, BF16 out."""
    scales = m * _groups(k) + _groups(n) * _groups(k)
    return Work(m * k + n * k + _SCALE_BYTES * scales + 2 * m * n, 2 * m * n * k)


def weight_gradient(m: int, n: int, k: int) -> Work:
    """FP8 product over k tokens, tile scales on both sides, added to an FP32 matrix in place."""
    scales = (m + n) * _groups(k)
    return Work((m + n) * k + _SCALE_BYTES * scales + 2 * 4 * m * n, 2 * m * n * k)


def quantisation(
    rows: int, cols: int, *groups: tuple[int, int], read_bytes: int = 2, write_bytes: int = 1
) -> Work:
    """Read a matrix and write a copy of it with the scales of each of `groups`."""
    scales = sum(math.ceil(rows / r) * math.ceil(cols / c) for r, c in groups)
    copies = len(groups) * write_bytes
    return Work((read_bytes + copies) * rows * cols + _SCALE_BYTES * scales)


def causal_pairs(lengths: Iterable[int]) -> int:
    """Return how many keys all queries of these texts see: their own and those before."""
    return sum(n * (n + 1) // 2 for n in lengths)


def prefill(tokens: int, pairs: int, sizes: Attention) -> Work:
    """BF16 attention over expanded keys: scores, then values; the rotary key is read once."""
    heads, nope, rope, value, _ = sizes
    numbers = tokens * (heads * (2 * nope + rope + 2 * value) + rope)
    return Work(2 * numbers, 2 * pairs * heads * (nope + rope + value), "bf16_tflops")


def prefill_backward(tokens: int, pairs: int, sizes: Attention) -> Work:
    """Its gradients: scores once more, then those of weights, values, keys and queries.

    Every input and its gradient, the output and its gradient, the FP32 log-sum-exp.
    """
    heads, nope, rope, value, _ = sizes
    numbers = tokens * (heads * (4 * nope + 2 * rope + 4 * value) + 2 * rope)
    products = 3 * (nope + rope) + 2 * value
    return Work(2 * numbers + 4 * tokens * heads, 2 * pairs * heads * products, "bf16_tflops")


def latent_decode(lengths: Sequence[int], queries: int, sizes: Attention) -> Work:
    """BF16 attention of each row's last tokens to its latents, which are read once."""
    heads, key, value = sizes.heads, sizes.latent + sizes.rope, sizes.latent
    pairs = sum(max(0, n - t) for n in lengths for t in range(queries))
    of_queries = len(lengths) * queries * heads * (key + value)  # read, and results
    operations = 2 * pairs * heads * (key + value)
    return Work(2 * (sum(lengths) * key + of_queries), operations, "bf16_tflops")


def active_experts(tokens: int, experts: int, k: int) -> int:
    """Return how many experts some token chooses, if each chooses k of them evenly by chance."""
    return round(experts * (1 - (1 - k / experts) ** tokens))


def routed_experts(visits: int, active: int, sizes: Experts) -> Work:
    """FP8: the weights of active experts, each visit's row in, hidden rows out and in, result."""
    width, hidden = sizes.dim, sizes.hidden
    weight = 3 * width * hidden
    scales = _SCALE_BYTES * 3 * _groups(width) * _groups(hidden)
    row = (1 + _SCALE_BYTES / GROUP) * (width + 2 * hidden) + 2 * width
    return Work(active * (weight + scales) + round(visits * row), 2 * visits * weight)


def _groups(length: int) -> int:
    return math.ceil(length / GROUP)
