"""Routing in one launch: scores, bias, group limit, the k best experts, weights, and their load.

    score = sigmoid(logit), or softmax where there is no bias;    choice = score + bias
    gate = scale * score / (sum of the k scores + 1e-20)

A warp holds a token's E choices as whole numbers that order as they do, NaN above all; of 32 bits,
since a warp finds the largest of those in one instruction. K times it takes the largest, then the
first place that holds it: equal choices go to the lower index, as in a stable sort. Groups are
ranked at once: each counts those ahead of it, of equal ones the first. What is dropped becomes
-inf, not 0: a biased choice may be negative.

The load is counted by atomic additions of integers: exact, in any order. They need zeros to add to,
which is a second, smaller launch; all else would be one too.

Letters  M tokens, E experts in G groups of S, K experts a token.
Memory   logit, and gradients that come back, in any strides; gate and ids [M, K], score [M, E] and
         what else is returned: row-major.
Grid     one program for BLOCK_M tokens. A group is padded to a power of two in registers alone.
Paper    DeepSeek-V3 (arXiv:2412.19437), section 2.1.2, Eqs. 13-16; V2 (arXiv:2405.04434), 20-22.
Book     book/07_moe.ipynb
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

_NAME = "route"
_MOST_EXPERTS, _MOST_GROUPS = 512, 64  # a token's choices lie in registers, groups in pairs too
_SIGN = tl.constexpr(0x7FFFFFFF)  # all bits but the sign, and the order of NaN
_BEHIND = tl.constexpr(-(2**31))  # the order of what is no expert, or was taken
_DROPPED = tl.constexpr(-2139095041)  # that of -inf


class Routes(NamedTuple):
    """Where each token goes, with which weights; minids.router.Routes has the same fields."""

    gate: Tensor  # [tokens, K] FP32
    ids: Tensor  # [tokens, K] int64
    score: Tensor  # [tokens, E] FP32
    load: Tensor  # [E] int64: tokens that an expert received


class Tokens(NamedTuple):
    """How many tokens a program routes, on how many warps."""

    BLOCK_M: int
    warps: int


CANDIDATES = (Tokens(1, 1), Tokens(2, 1), Tokens(4, 1), Tokens(4, 2), Tokens(4, 4))
_RESIDENT = 32  # programs on a multiprocessor


def rule_of_thumb(M: int, card: Card) -> Tokens:
    """Return a warp for each token while all run at once; then two tokens, whose steps overlap."""
    return Tokens(1, 1) if M <= _RESIDENT * card.n_sm else Tokens(2, 1)


def route(
    logit: Tensor,
    bias: Tensor | None,
    groups: int,
    keep: int,
    best: int,
    k: int,
    normalise: bool,
    scale: float,
) -> Routes:
    """Choose k experts a token within its `keep` best groups; without a bias by softmax.

    A group is worth the sum of its `best` largest choices. Gate and score are differentiable in
    logit, in FP32. NaN counts as the largest number, as for torch's sort. ValueError for what does
    not fit.
    """
    _check(logit, bias, groups, keep, best, k)
    how = (1, 1, 1) if keep == groups else (groups, keep, best)
    return Routes(*_Route.apply(logit, bias, how, k, normalise, scale))


class _Route(torch.autograd.Function):
    """Keep scores and ids: gradients need no more."""

    @staticmethod
    def forward(ctx, logit, bias, how, k, normalise, scale):
        (M, E), device = logit.shape, logit.device
        card = cards.card(_NAME, logit, *([] if bias is None else [bias]))
        gate = torch.empty((M, k), dtype=torch.float32, device=device)
        ids = torch.empty((M, k), dtype=torch.int64, device=device)
        score = torch.empty((M, E), dtype=torch.float32, device=device)
        load = torch.zeros(E, dtype=torch.int64, device=device)
        config = chosen(M, E, k, card)
        if M:
            groups, keep, best = how
            with torch.cuda.device_of(logit):  # Triton launches on the current GPU
                _choose[(ceil_div(M, config.BLOCK_M),)](
                    logit, bias, gate, ids, score, load, scale, M, *logit.stride(),
                    0 if bias is None else bias.stride(0), E, groups, E // groups, keep, best, k,
                    normalise, config.BLOCK_M, _padded(groups), _padded(E // groups), _padded(k),
                    num_warps=config.warps,
                )  # fmt: skip
        ctx.save_for_backward(score, ids)
        ctx.how = k, normalise, scale, bias is not None, config
        ctx.mark_non_differentiable(ids, load)
        ctx.set_materialize_grads(False)
        return gate, ids, score, load

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        d_gate, _, d_score, _ = grads
        score, ids = ctx.saved_tensors
        given = [x for x in (d_gate, d_score) if x is not None]
        d_logit = torch.empty_like(score)
        if not given or not len(score):
            return d_logit.zero_(), None, None, None, None, None
        (M, E), (k, normalise, scale, biased, config) = score.shape, ctx.how
        cards.card(_NAME, score, *given)
        steps = [(0, 0) if x is None else x.stride() for x in (d_gate, d_score)]
        with torch.cuda.device_of(score):
            _differentiate[(ceil_div(M, config.BLOCK_M),)](
                score, ids, d_gate, d_score, d_logit, scale, M, *steps[0], *steps[1],
                E, k, normalise, biased, config.BLOCK_M, _padded(E), _padded(k),
                num_warps=config.warps,
            )  # fmt: skip
        return d_logit, None, None, None, None, None


def chosen(M: int, E: int, k: int, card: Card) -> Tokens:
    """Return the config of a launch: the tuned one, else the rule of thumb's."""
    tuned = configs.find("router_topk.Tokens", (M, E, k), card)
    return Tokens(**tuned) if tuned else rule_of_thumb(M, card)


def _padded(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _check(logit: Tensor, bias: Tensor | None, groups: int, keep: int, best: int, k: int) -> None:
    if logit.ndim != 2 or logit.dtype != torch.float32:
        got = f"{list(logit.shape)} of {logit.dtype}: reshape or cast it"
        raise ValueError(f"{_NAME}: logit must be a matrix of float32, got {got}")
    E = logit.shape[1]
    if not 1 <= E <= _MOST_EXPERTS:
        raise ValueError(
            f"{_NAME}: there must be 1 to {_MOST_EXPERTS} experts, got {E}: choose impl='torch'"
        )
    if bias is not None and (tuple(bias.shape) != (E,) or bias.dtype != torch.float32):
        got = f"{list(bias.shape)} of {bias.dtype}"
        raise ValueError(f"{_NAME}: bias must be [{E}] of float32, got {got}")
    if not 1 <= groups <= _MOST_GROUPS or E % groups:
        rule = f"a divisor of the {E} experts, at most {_MOST_GROUPS}"
        raise ValueError(f"{_NAME}: groups must be {rule}, got {groups}")
    for name, n, most in (("keep", keep, groups), ("best", best, E // groups), ("k", k, E)):
        if not 1 <= n <= most:
            raise ValueError(f"{_NAME}: {name} must be 1 to {most}, got {n}")


@triton.jit
def _order(x):
    """Return whole numbers that order as x does, NaN above all; x holds no -0: scores have none."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & _SIGN), _SIGN)


@triton.jit
def _number(order):
    """Return the number that has this order."""
    return (order ^ ((order >> 31) & _SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def _first(order, largest, place, AXIS: tl.constexpr):
    """Return the first place along an axis at which the largest order stands."""
    return tl.min(tl.where(order == tl.expand_dims(largest, AXIS), place, _SIGN), AXIS)


@triton.jit
def _choose(
    logit, bias, gate, ids, score, load, scale, M, logit_m, logit_e, bias_e,
    E: tl.constexpr, G: tl.constexpr, S: tl.constexpr, KEEP: tl.constexpr, BEST: tl.constexpr,
    K: tl.constexpr, NORMALISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = tl.arange(0, BLOCK_G * BLOCK_S)
    e = place // BLOCK_S * S + place % BLOCK_S
    is_expert = (place // BLOCK_S < G) & (place % BLOCK_S < S)
    inside = (m < M)[:, None] & is_expert[None, :]
    logit += (m * logit_m)[:, None]
    x = tl.load(logit + (e.to(tl.int64) * logit_e)[None, :], mask=inside, other=-float("inf"))
    most, total = tl.max(x, 1), tl.full((BLOCK_M,), 1.0, tl.float32)
    if bias is not None:
        scores = tl.sigmoid(x)
        choice = scores + tl.load(bias + e * bias_e, mask=is_expert, other=0.0)[None, :]
    else:
        total = tl.sum(tl.exp(x - most[:, None]), 1)
        scores = tl.exp(x - most[:, None]) / total[:, None]
        choice = scores
    tl.store(score + (m * E)[:, None] + e[None, :], scores, mask=inside)

    order = tl.where(is_expert[None, :], _order(choice), _BEHIND)
    if KEEP < G:
        kept = _keep(tl.reshape(order, (BLOCK_M, BLOCK_G, BLOCK_S)), KEEP, BEST)
        kept = tl.broadcast_to(kept[:, :, None], (BLOCK_M, BLOCK_G, BLOCK_S))
        kept = tl.reshape(kept, (BLOCK_M, BLOCK_G * BLOCK_S))
        order = tl.where(kept, order, tl.minimum(order, _DROPPED))  # padding stays behind
    n = tl.arange(0, BLOCK_K)
    taken = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    for i in range(K):
        first = _first(order, tl.max(order, 1), e[None, :], 1)
        taken = tl.where(n[None, :] == i, first[:, None], taken)
        order = tl.where(e[None, :] == first[:, None], _BEHIND, order)

    wanted = (m < M)[:, None] & (n < K)[None, :]
    x = tl.load(logit + taken.to(tl.int64) * logit_e, mask=wanted, other=-float("inf"))
    if bias is not None:
        weight = tl.sigmoid(x)
    else:
        weight = tl.exp(x - most[:, None]) / total[:, None]
    if NORMALISE:
        weight /= tl.sum(tl.where(wanted, weight, 0.0), 1)[:, None] + 1e-20
    at = (m * K)[:, None] + n[None, :]
    tl.store(gate + at, weight * scale, mask=wanted)
    tl.store(ids + at, taken.to(tl.int64), mask=wanted)
    tl.atomic_add(load + taken, tl.full((BLOCK_M, BLOCK_K), 1, tl.int64), wanted, sem="relaxed")


@triton.jit
def _keep(order, KEEP: tl.constexpr, BEST: tl.constexpr):
    """Say which of each token's groups [BLOCK_M, BLOCK_G, BLOCK_S] are among its KEEP best."""
    place = tl.arange(0, order.shape[2])[None, None, :]
    largest = tl.max(order, 2)
    worth = _number(largest)
    for _ in tl.static_range(BEST - 1):
        first = _first(order, largest, place, 2)
        order = tl.where(place == first[:, :, None], _BEHIND, order)
        largest = tl.max(order, 2)
        worth += _number(largest)
    # a group that is padding holds _BEHIND alone, whose number is NaN: it must come last
    worth = tl.where(largest == _BEHIND, _BEHIND, _order(worth))
    g = tl.arange(0, order.shape[1])
    theirs, own = worth[:, None, :], worth[:, :, None]
    ahead = (theirs > own) | ((theirs == own) & (g[None, :] < g[:, None])[None, :, :])
    return tl.sum(ahead.to(tl.int32), 2) < KEEP


@triton.jit
def _differentiate(
    score, ids, d_gate, d_score, d_logit, scale, M,
    d_gate_m, d_gate_k, d_score_m, d_score_e,
    E: tl.constexpr, K: tl.constexpr, NORMALISE: tl.constexpr, SIGMOID: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    e, n = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    row = (m < M)[:, None]
    inside, wanted = row & (e < E)[None, :], row & (n < K)[None, :]
    score += (m * E)[:, None]
    s = tl.load(score + e[None, :], mask=inside, other=0.0)
    d = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    if d_score is not None:
        at = (m * d_score_m)[:, None] + (e.to(tl.int64) * d_score_e)[None, :]
        d += tl.load(d_score + at, mask=inside, other=0.0)
    if d_gate is not None:
        ids += (m * K)[:, None]
        d_gate += (m * d_gate_m)[:, None]
        factor, shift = tl.full((BLOCK_M,), scale, tl.float32), tl.zeros((BLOCK_M,), tl.float32)
        if NORMALISE:
            taken = tl.load(ids + n[None, :], mask=wanted, other=0)
            chosen = tl.load(score + taken, mask=wanted, other=0.0)
            given = tl.load(d_gate + (n.to(tl.int64) * d_gate_k)[None, :], mask=wanted, other=0.0)
            total = tl.sum(chosen, 1) + 1e-20
            factor, shift = scale / total, tl.sum(given * chosen, 1) / total
        for _ in range(K):
            one = tl.load(ids, mask=row, other=-1)
            slope = (tl.load(d_gate, mask=row, other=0.0) - shift[:, None]) * factor[:, None]
            d += tl.where(e[None, :] == one, slope, 0.0)
            ids += 1
            d_gate += d_gate_k
    if SIGMOID:
        result = d * s * (1 - s)
    else:
        result = s * (d - tl.sum(d * s, 1)[:, None])
    tl.store(d_logit + (m * E)[:, None] + e[None, :], result, mask=inside)
