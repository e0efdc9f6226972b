"""AdamW: all weights of a group in one pass, their moments in FP32 or, between steps, in BF16.

    w = w (1 - lr decay)
    m = m + (1 - beta1) (g - m)                 v = beta2 v + (1 - beta2) g^2
    w = w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

A table on the GPU says where tensors lie, a list which of them a program works on: thousands of
tensors are one launch. A small kernel before it counts each tensor's steps t and makes the three
numbers of its own, in FP64; so nothing waits, and a CUDA graph replays steps that count on. The
table is made anew, without waiting, where an address has changed (gradients may move).

Letters  T tensors of one launch; P programs, of BLOCK numbers each.
Memory   table [8, T] int64: addresses of weight, gradient, m, v, BF16 copy (0: none) and step, the
         number of elements, the first program; numbers [T, 3] FP32; owner [P] int32: which tensor.
         What belongs to one weight is dense and lies in the same order, so shapes do not matter.
Grid     count: tensors; update: P programs.
Numbers  weights in FP32, gradients in FP32 or BF16, each operation in FP32, rounded to nearest; one
         fma each for m and v, as in torch's fused AdamW on CPU, whose bits these are with AVX2. On
         a GPU torch multiplies in FP64: m and v are within two units in the last place of the
         larger of their summands there, a step within four of its own. Moments in BF16 are rounded
         to nearest when they are stored; the step itself takes them as they were in FP32.
Paper    AdamW, arXiv:1711.05101; BF16 moments: DeepSeek-V3 (arXiv:2412.19437), section 3.3.3.
Book     book/14_train.ipynb
"""

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.optim.optimizer import ParamsT

from minids_kernels import cards
from minids_kernels.tiles import ceil_div

_NAME = "AdamW"
_BLOCK, _WARPS = 2048, 8
_ALIGNED = 16  # bytes that a thread moves at once
_MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names in the state
_OF_TORCH = ("amsgrad", "maximize")  # options that a loaded state may bring along
# rows of the table
_WEIGHT, _GRAD, _M, _V, _COPY, _STEP, _SIZE, _FIRST = map(tl.constexpr, range(8))
_STEP_BITS = tl.constexpr(24)  # FP32 counts to 2^24


@triton.jit
def whole(x, rest):
    """Return an FP64 number that came as two in FP32: so Triton takes a float."""
    return tl.cast(x, tl.float64) + tl.cast(rest, tl.float64)


@triton.jit
def power(base, exponent):
    """Return base^exponent in FP64, for whole exponents."""
    y = tl.full((), 1.0, tl.float64)
    for bit in tl.static_range(_STEP_BITS):
        y = tl.where((exponent >> bit) & 1 == 1, y * base, y)
        base *= base
    return y


@triton.jit(do_not_specialize=["T"])
def count(
    table, numbers, lr_at, T, lr, lr_rest, decay, decay_rest,
    beta1, beta1_rest, beta2, beta2_rest,
):  # fmt: skip
    """Count one tensor's step; write 1 - lr decay, lr / (1 - beta1^t) and sqrt(1 - beta2^t).

    lr_at: where lr is, if it is on the GPU.
    """
    tensor = tl.program_id(0)
    step = tl.load(table + _STEP * T + tensor).to(tl.pointer_type(tl.float32))
    t = tl.load(step) + 1.0
    tl.store(step, t)
    rate = whole(lr, lr_rest)
    if lr_at is not None:
        rate = tl.load(lr_at).to(tl.float64)
    kept = 1.0 - rate * whole(decay, decay_rest)
    exponent = t.to(tl.int32)
    first = 1.0 - power(whole(beta1, beta1_rest), exponent)
    second = 1.0 - power(whole(beta2, beta2_rest), exponent)
    numbers += tensor * 3
    tl.store(numbers, kept.to(tl.float32))
    tl.store(numbers + 1, (rate / first).to(tl.float32))
    tl.store(numbers + 2, tl.sqrt(second).to(tl.float32))


@triton.jit(do_not_specialize=["T"])
def update(
    table, owner, numbers, T, one_less_beta1, beta2, one_less_beta2, eps,
    GRAD: tl.constexpr, MOMENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update BLOCK numbers of one tensor: without a mask where all are there, so by 16 bytes."""
    program = tl.program_id(0)
    tensor = tl.load(owner + program)
    table += tensor
    start = (program - tl.load(table + _FIRST * T)) * BLOCK
    left = tl.load(table + _SIZE * T) - start
    weight = address(table + _WEIGHT * T, start, tl.float32, ALIGNED)
    grad = address(table + _GRAD * T, start, GRAD, ALIGNED)
    m = address(table + _M * T, start, MOMENT, ALIGNED)
    v = address(table + _V * T, start, MOMENT, ALIGNED)
    has_copy = tl.load(table + _COPY * T) != 0
    copy = address(table + _COPY * T, start, tl.bfloat16, ALIGNED)
    numbers += tensor * 3
    kept, rate, root = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    if left >= BLOCK:
        step(
            weight, grad, m, v, copy, has_copy, left, kept, rate, root,
            one_less_beta1, beta2, one_less_beta2, eps, False, BLOCK,
        )  # fmt: skip
    else:
        step(
            weight, grad, m, v, copy, has_copy, left, kept, rate, root,
            one_less_beta1, beta2, one_less_beta2, eps, True, BLOCK,
        )  # fmt: skip


@triton.jit
def address(place, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer to a tensor's element `start`, whose tensor's address is at `place`."""
    pointer = tl.load(place).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def step(
    weight, grad, m, v, copy, has_copy, left, kept, rate, root,
    one_less_beta1, beta2, one_less_beta2, eps, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    inside = at < left if MASKED else None
    g = tl.load(grad + at, mask=inside).to(tl.float32)
    first = tl.load(m + at, mask=inside).to(tl.float32)
    second = tl.load(v + at, mask=inside).to(tl.float32)
    w = tl.load(weight + at, mask=inside) * kept
    first = tl.fma(g - first, one_less_beta1, first)
    second = tl.fma(g * one_less_beta2, g, second * beta2)
    w -= tl.div_rn(rate * first, tl.div_rn(tl.sqrt_rn(second), root) + eps)
    tl.store(weight + at, w, mask=inside)
    tl.store(m + at, first.to(m.dtype.element_ty), mask=inside)
    tl.store(v + at, second.to(v.dtype.element_ty), mask=inside)
    if has_copy:
        tl.store(copy + at, w.to(tl.bfloat16), mask=inside)


class _Launch:
    """Where the tensors of one launch lie, as the GPU sees it."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.addresses: list[list[int]] = []
        self.owner = self.table = self.spare = torch.empty(0)
        self.captured: list[Tensor] = []  # what graphs read whenever they are replayed

    def tables(
        self, addresses: list[list[int]], sizes: list[int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return table and owner, sent to the GPU where something has changed; nothing waits."""
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing and sizes != self.sizes:
            raise RuntimeError(
                f"{_NAME}: a step with these gradients must be taken before one is captured in a "
                "graph: it makes the moments and compiles"
            )
        blocks = [ceil_div(size, _BLOCK) for size in sizes]
        if sizes != self.sizes:
            tensors = torch.arange(len(sizes), dtype=torch.int32)
            self.owner = _sent(tensors.repeat_interleave(torch.tensor(blocks)), device)
        if sizes == self.sizes and addresses == self.addresses:
            self.captured += [self.table, self.owner] * capturing
            return self.table, self.owner
        first = torch.tensor([0, *blocks]).cumsum(0)[:-1]
        rows = torch.stack([*torch.tensor(addresses).T, torch.tensor(sizes), first])
        if not capturing:
            self.sizes, self.addresses = sizes, addresses
            self.table = _sent(rows, device)
            self.spare = _pinned(rows.shape, device)
            return self.table, self.owner
        return self._in_graph(rows, device), self.owner

    def _in_graph(self, rows: Tensor, device: torch.device) -> Tensor:
        """Send what moved into a graph's memory in each replay: pinned memory is not made then."""
        if self.spare.shape != rows.shape:
            raise RuntimeError(
                f"{_NAME}: gradients moved in a second capture: take a step between captures"
            )
        table = self.spare.copy_(rows).to(device, non_blocking=True)
        self.captured += [self.spare, table, self.owner]
        self.spare = torch.empty(0)
        return table


def _pinned(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, pin_memory=device.type == "cuda")


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the GPU without waiting for it."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True) in two launches a group; states can go from one to the other.

    `moments`: the dtype in which exp_avg and exp_avg_sq wait between steps, float32 or bfloat16.
    `copies`: weights and tensors in bfloat16, laid out alike, that get the new weights in the same
    pass. Steps are counted on the GPU; `lr` may be a tensor there, for graphs. Weights must be in
    float32, gradients in float32 or bfloat16; those without a gradient are left as they are.
    Raises ValueError for what does not fit.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        moments: torch.dtype = torch.float32,
        copies: Mapping[Tensor, Tensor] | None = None,
    ):
        if moments not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"{_NAME}: moments must be torch.float32 or torch.bfloat16, got {moments}"
            )
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        self.moments, self.copies = moments, dict(copies or {})
        self._launches: dict[tuple, _Launch] = {}
        # GradScaler then divides gradients itself, before the step
        self._step_supports_amp_scaling = False
        weights = {id(weight) for group in self.param_groups for weight in group["params"]}
        for weight, copy in self.copies.items():
            if (
                id(weight) not in weights
                or copy.dtype != torch.bfloat16
                or not _alike(weight, copy)
            ):
                raise ValueError(
                    f"{_NAME}: a copy must be in torch.bfloat16 and laid out as a weight of a "
                    f"group, got {tuple(copy.shape)} in {copy.dtype}, strides {copy.stride()}"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the optimiser has: tables are made anew for its tensors."""
        mine = dict(moments=self.moments, copies=self.copies, _launches={})
        return super().__getstate__() | mine | {"_step_supports_amp_scaling": False}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one optimiser step; nothing waits for the GPU."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            for option in _OF_TORCH:
                if group[option]:
                    raise ValueError(f"{_NAME}: {option} is not there: use torch.optim.AdamW")
            for (dtype, aligned), found in self._sorted(group).items():
                launch = self._launches.setdefault((number, dtype, aligned), _Launch())
                self._run(launch, group, dtype, aligned, found)
        return loss

    def _sorted(self, group: dict[str, Any]) -> dict[tuple, list[tuple[Tensor, ...]]]:
        """Return each weight's tensors in the table's order, by gradient's dtype and alignment."""
        found: dict[tuple, list[tuple[Tensor, ...]]] = {}
        for weight in group["params"]:
            if weight.grad is not None:
                tensors = self._tensors(weight)
                aligned = all(x.data_ptr() % _ALIGNED == 0 for x in tensors[:5])
                found.setdefault((tensors[1].dtype, aligned), []).append(tensors)
        return found

    def _tensors(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return weight, gradient, both moments, copy (empty: none) and step of one weight."""
        grad, state = weight.grad, self.state[weight]
        assert grad is not None, "weights without a gradient are left out before"
        if weight.dtype != torch.float32 or not _dense(weight):
            raise ValueError(
                f"{_NAME}: weights must be dense and in torch.float32, got {weight.dtype}, strides "
                f"{weight.stride()}: keep BF16 weights as copies"
            )
        if grad.is_sparse or grad.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"{_NAME}: gradients must be dense and in torch.float32 or torch.bfloat16, got "
                f"{grad.layout} in {grad.dtype}: convert them"
            )
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            for name in _MOMENTS:
                state[name] = torch.zeros_like(weight, dtype=self.moments)
        if state["step"].device != weight.device:  # as torch's has it where it is not fused
            state["step"] = state["step"].to(weight.device)
        for name in _MOMENTS:  # a loaded state has them in the weight's dtype
            if state[name].dtype != self.moments or not _alike(weight, state[name]):
                state[name] = torch.empty_like(weight, dtype=self.moments).copy_(state[name])
        if not _alike(weight, grad):
            grad = torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
        copy = self.copies.get(weight, weight.new_empty(0))
        return weight, grad, *(state[name] for name in _MOMENTS), copy, state["step"]

    def _run(
        self,
        launch: _Launch,
        group: dict[str, Any],
        dtype: torch.dtype,
        aligned: bool,
        found: list[tuple[Tensor, ...]],
    ) -> None:
        weights = [tensors[0] for tensors in found]
        device = weights[0].device
        cards.card(_NAME, *(x for tensors in found for x in tensors))
        addresses = [[x.data_ptr() for x in tensors] for tensors in found]
        T, P = len(weights), sum(ceil_div(weight.numel(), _BLOCK) for weight in weights)
        with torch.cuda.device_of(weights[0]):  # Triton launches on the current GPU
            sizes = [weight.numel() for weight in weights]
            table, owner = launch.tables(addresses, sizes, device)
            numbers = torch.empty((T, 3), dtype=torch.float32, device=device)
            (beta1, beta2), lr = map(float, group["betas"]), group["lr"]
            on_gpu = isinstance(lr, Tensor) and lr.device == device
            floats = (0.0 if on_gpu else float(lr), float(group["weight_decay"]), beta1, beta2)
            count[(T,)](
                table, numbers, lr if on_gpu else None, T,
                *(part for x in floats for part in _halves(x)), num_warps=1,
            )  # fmt: skip
            if P:
                update[(P,)](
                    table, owner, numbers, T, 1 - beta1, beta2, 1 - beta2, float(group["eps"]),
                    _OF[dtype], _OF[self.moments], aligned, _BLOCK,
                    num_warps=_WARPS, enable_fp_fusion=False,
                )  # fmt: skip
        copies = (tensors[4] for tensors in found if len(tensors[4]))
        torch.autograd.graph.increment_version([*weights, *copies])  # as an operation in place


_OF = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


def _halves(x: float) -> Iterator[float]:
    """Return two FP32 numbers whose sum has 48 bits of x."""
    (whole,) = struct.unpack("f", struct.pack("f", x))
    yield from (whole, x - whole)


def _dense(x: Tensor) -> bool:
    """Say whether each number of x has a place of its own, with no gap between them."""
    expected = 1
    for step, size in sorted(_steps(x)):
        if step != expected:
            return False
        expected *= size
    return True


def _alike(x: Tensor, y: Tensor) -> bool:
    """Say whether numbers of x and y lie in the same order."""
    return x.shape == y.shape and _steps(x) == _steps(y)


def _steps(x: Tensor) -> list[tuple[int, int]]:
    pairs = zip(x.stride(), x.shape, strict=True)
    return [(step, size) for step, size in pairs if size != 1]
