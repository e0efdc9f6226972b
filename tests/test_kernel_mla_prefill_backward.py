"""Gradients of expanded attention: equal to autograd's of the equation, in FP64."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from compiled import CARDS, HOPPER, compile_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_attention import (
    GRADIENT,
    HEADS,
    LENGTHS,
    WIDTHS,
    Expanded,
    draw_expanded,
    error,
    exact_expanded,
    tile_loads,
)
from kernel_inputs import LAYOUTS, bitwise_equal, is_written, laid_out, mutated, poisoned_memory
from minids_kernels import cards, configs, mla_prefill_backward
from minids_kernels.cards import Card
from minids_kernels.latent import Causal
from minids_kernels.mla_prefill import attend_expanded
from minids_kernels.mla_prefill_backward import (
    CANDIDATES,
    Cut,
    Keys,
    Queries,
    gradients,
    rule_of_thumb,
    schedule,
    traffic,
)
from minids_kernels.softmax import described
from torch import Tensor

pytestmark = pytest.mark.usefixtures("interpreter")

SCALE = 0.3
PUBLISHED = (128, 64, 128)
OF_KEYS, OF_QUERIES = ([c for c in CANDIDATES if type(c) is kind] for kind in (Keys, Queries))
CUTS = list(zip(OF_KEYS, OF_QUERIES, strict=True))
LARGE = CUTS[0]


@contextmanager
def using(cuts: Sequence[Cut] | None) -> Iterator[None]:
    """Give these cuts to both walks, whatever the rule of thumb says."""
    given = {f"mla_prefill_backward.{type(cut).__name__}": cut._asdict() for cut in cuts or ()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "find", lambda kernel, shape, card: given.get(kernel))
        yield


def causal(*start: int, device: str = "cpu") -> Causal:
    return Causal(torch.tensor(start, device=device))


def packed(tokens: int, batch: int, device: str) -> Causal:
    """Return documents of 20 tokens in the first row, others that take turns in the rest."""
    at = torch.arange(tokens)
    numbers = torch.stack([at // 20, *(at * 7 % 3 for _ in range(1, batch))])
    return Causal(torch.zeros(batch, dtype=torch.int64, device=device), numbers.to(device))


def exact(x: Expanded, do: Tensor, mask: Causal | None, scale: float = SCALE) -> tuple[Tensor, ...]:
    """Return autograd's gradients of the equation, in FP64; leftovers of a cache become 0 first."""
    (_, T, _, _), S = x.q_nope.shape, x.k_nope.shape[1]
    leaves = [part.detach().double().nan_to_num().requires_grad_() for part in x]
    q_nope, q_rope, k_nope, k_rope, v = leaves
    score = torch.einsum("bthn,bshn->bhts", q_nope, k_nope)
    score = (score + torch.einsum("bthr,bsr->bhts", q_rope, k_rope)) * scale
    sees = torch.ones(1, 1, S, dtype=torch.bool, device=score.device)
    if mask is not None:
        at = mask.start[:, None] + torch.arange(T, device=score.device)
        sees = torch.arange(S, device=score.device) <= at[..., None]
        if mask.documents is not None:
            sees = sees & (mask.documents[:, :, None] == mask.documents[:, None])
    score = score.masked_fill(~sees[:, None], -math.inf)
    score = score.masked_fill(~sees.any(-1)[:, None, :, None], 0)
    o = torch.einsum("bhts,bshv->bthv", score.softmax(-1) * sees[:, None], v)
    return torch.autograd.grad(o, leaves, do.double())


def saved(x: Expanded, mask: Causal | None, scale: float = SCALE) -> tuple[Tensor, Tensor]:
    """Return what the forward pass keeps: output and log-sum-exp, rounded; nothing seen gives 0."""
    o, lse = exact_expanded(x, mask, scale)
    return o.nan_to_num().to(x.v), lse.float().to(x.v.device)


def found(
    x: Expanded, do: Tensor, mask: Causal | None, scale: float = SCALE,
    module: ModuleType = mla_prefill_backward,
) -> tuple[Tensor, ...]:  # fmt: skip
    return module.gradients(do, *x, *saved(x, mask, scale), mask, scale)


def drawn(
    T: int, S: int, heads: int = 2, widths=(24, 8, 40), batch: int = 2, device: str = "cpu",
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[Expanded, Tensor]:  # fmt: skip
    x = draw_expanded(batch, T, S, heads, widths, dtype, device, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    do = torch.randn(batch, T, heads, widths[2], generator=generator)
    return x, do.to(x.v)


def check(
    x: Expanded, do: Tensor, mask: Causal | None, module=mla_prefill_backward, scale=SCALE
) -> None:
    told = saved(x, mask, scale)
    with poisoned_memory():
        y = module.gradients(do, *x, *told, mask, scale)
    for name, part, one, other in zip(x._fields, x, y, exact(x, do, mask, scale), strict=True):
        assert one.dtype == part.dtype
        assert is_written(one), name
        assert error(one, other) < GRADIENT[part.dtype], name


def test_example_by_hand(device):
    """Two equal keys, values 0 and 1: weights 1/2, output 1/2, ds = -1/4 and 1/4."""
    one = torch.ones(1, 1, 1, 1, device=device)
    keys = torch.ones(1, 2, 1, 1, device=device)
    v = torch.tensor([0.0, 1.0], device=device).reshape(1, 2, 1, 1)
    lse = torch.full((1, 1, 1), 2 + math.log(2), device=device)  # scores 1 + 1
    y = gradients(one, one, one, keys, keys[..., 0], v, one / 2, lse, None, 1.0)
    wanted = [0.0], [0.0], [-0.25, 0.25], [-0.25, 0.25], [0.5, 0.5]
    for part, numbers in zip(y, wanted, strict=True):
        torch.testing.assert_close(part.flatten().cpu(), torch.tensor(numbers), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize("mask", ["all", "causal", "documents"])
def test_equal_autograd_in_fp64(mask, dtype, device):
    x, do = drawn(70, 70, device=device, dtype=dtype)
    masks = {"all": None, "causal": causal(0, 0, device=device), "documents": packed(70, 2, device)}
    check(x, do, masks[mask])


# Shapes


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_widths_of_presets_and_ragged_ones(widths, device):
    x, do = drawn(33, 33, 1, widths, 1, device)
    check(x, do, causal(0, device=device))


@pytest.mark.parametrize(
    "heads", [pytest.param(n, marks=pytest.mark.slow if n > 16 else ()) for n in HEADS]
)
def test_heads(heads, device):
    """The rotary key's gradient is the sum over all of them."""
    x, do = drawn(3, 3, heads, (8, 4, 8), 1, device)
    check(x, do, causal(0, device=device))


@pytest.mark.parametrize("length", [n for n in LENGTHS if n < 4096])
def test_lengths(length, device):
    x, do = drawn(length, max(length, 1), 1, (16, 16, 16), 1, device)
    check(x, do, causal(0, device=device))


def test_no_queries_give_zeros(device):
    x, do = drawn(0, 7, device=device)
    with poisoned_memory():
        y = gradients(do, *x, do, torch.empty(2, 2, 0, device=device), None, SCALE)
    assert all((part == 0).all() and part.shape == of.shape for part, of in zip(y, x, strict=True))


@pytest.mark.parametrize("mask", ["all", "causal"])
def test_long_rows(mask, device):
    """64 queries at the end of 4096 keys, in the tiles of published widths."""
    x, do = drawn(64, 4096, 1, (16, 16, 16), 1, device)
    with using(LARGE):
        check(x, do, causal(4032, device=device) if mask == "causal" else None)


@settings(max_examples=12)
@given(st.data())
def test_random_shapes_and_cuts(device, data):
    T, S, heads = (data.draw(st.integers(1, most)) for most in (70, 140, 3))
    widths = tuple(data.draw(st.integers(1, 40)) for _ in range(3))
    kind = data.draw(st.sampled_from(["all", "causal", "documents"]))
    mask = causal(*data.draw(st.lists(st.integers(-3, S), min_size=2, max_size=2)), device=device)
    if kind == "documents":
        S = T
        numbers = torch.randint(3, (2, T), generator=torch.Generator().manual_seed(T))
        mask = Causal(torch.zeros(2, dtype=torch.int32, device=device), numbers.to(device))
    x, do = drawn(T, S, heads, widths, device=device, seed=T)
    cuts = [data.draw(st.sampled_from(of)) for of in (OF_KEYS, OF_QUERIES)]
    with using(cuts):
        check(x, do, None if kind == "all" else mask)


@pytest.mark.parametrize("mask", ["all", "causal", "documents"])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_every_candidate(cuts, mask, device):
    x, do = drawn(150, 150, 1, (16, 16, 16), 1, device)
    masks = {"all": None, "causal": causal(0, device=device), "documents": packed(150, 1, device)}
    with using(cuts):
        check(x, do, masks[mask])


# What a row sees


def test_leftovers_of_a_cache_stay_out(device):
    """Rows stand at different places; what lies behind each one's end is NaN."""
    x, do = drawn(10, 100, batch=4, device=device)
    start = (0, 37, 54, 90)
    for row, at in enumerate(start):
        for part in (x.k_nope, x.k_rope, x.v):
            part[row, at + 10 :] = math.nan
    for cuts in (None, LARGE):
        with using(cuts):
            check(x, do, causal(*start, device=device))
    y = found(x, do, causal(*start, device=device))
    assert not y[2][0, 10:].any()
    assert not y[3][1, 47:].any()
    assert not y[4][2, 64:].any()


def test_queries_that_see_nothing_give_and_get_nothing(device):
    x, do = drawn(40, 40, device=device)
    mask = causal(-3, -100, device=device)
    y = found(x, do, mask)
    check(x, do, mask)
    assert not y[0][0, :3].any()
    assert y[0][0, 4:].flatten(1).any(1).all()  # of one key the weight is 1, whatever the query
    assert not any(part[1].any() for part in y)


def check_far_below(module: ModuleType, device: str = "cpu") -> None:
    """Scores near -115: e^115, the weight of a zero behind the last key, would be infinite."""
    x, do = drawn(50, 70, device=device)
    x = x._replace(q_nope=torch.full_like(x.q_nope, 4), k_nope=x.k_nope - 4)
    y = found(x, do, None, module=module)
    for one, other in zip(y, exact(x, do, None), strict=True):
        assert error(one, other) < 1e-4  # an ulp of such a score is 8e-6


def test_padding_behind_keys_has_no_weight(device):
    check_far_below(mla_prefill_backward, device)


def test_starts_far_outside_do_not_overflow(device):
    x, do = drawn(20, 30, device=device)
    far = causal(2**40, 2**31 - 1, device=device)
    assert_same(found(x, do, far), found(x, do, causal(30, 30, device=device)))


def test_documents_are_as_rows_of_their_own(device):
    """A document that is packed has the gradients that it has alone, to the last bits but few."""
    x, do = drawn(60, 60, 1, batch=1, device=device)
    numbers = torch.tensor([[7] * 25 + [-(2**40)] * 35], device=device)
    y = found(x, do, Causal(torch.zeros(1, device=device, dtype=torch.int64), numbers))
    for part in (slice(0, 25), slice(25, 60)):
        alone = Expanded(*(of[:, part] for of in x))
        for one, other in zip(y, found(alone, do[:, part], causal(0, device=device)), strict=True):
            assert error(one[:, part], other) < GRADIENT[torch.float32]


def test_starts_may_be_one_number_expanded(device):
    x, do = drawn(20, 30, device=device)
    one = Causal(torch.tensor(5, device=device).expand(2))
    assert_same(found(x, do, one), found(x, do, causal(5, 5, device=device)))


# Memory and order


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, device):
    x, do = drawn(33, 33, device=device)
    odd = Expanded(*(laid_out(part, layout) for part in x))
    mask = causal(0, 0, device=device)
    o, lse = saved(x, mask)
    y = gradients(laid_out(do, layout), *odd, laid_out(o, layout), lse, mask, SCALE)
    assert_same(y, gradients(do, *x, o, lse, mask, SCALE))


def test_do_may_be_expanded(device):
    """As `o.sum().backward()` gives it: one number for all."""
    x, _ = drawn(33, 33, device=device)
    one = torch.ones((), device=device).expand(2, 33, 2, 40)
    assert_same(found(x, one, None), found(x, one.clone(), None))


def assert_same(a, b) -> None:
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mask", ["causal", "documents"])
def test_two_runs_are_bitwise_equal_and_rows_do_not_know_each_other(mask, device):
    x, do = drawn(70, 70, batch=3, device=device, dtype=torch.bfloat16)
    told = packed(70, 3, device) if mask == "documents" else causal(0, 0, 0, device=device)
    y = bitwise_equal(lambda: found(x, do, told))
    one = Expanded(*(part[1:2] for part in x))
    numbers = None if told.documents is None else told.documents[1:2]
    assert_same(found(one, do[1:2], Causal(told.start[1:2], numbers)), [part[1:2] for part in y])


def test_heads_do_not_know_each_other(device):
    x, do = drawn(70, 70, 3, device=device)
    y = found(x, do, causal(0, 0, device=device))
    one = Expanded(*(part if part is x.k_rope else part[:, :, 1:2] for part in x))
    alone = found(one, do[:, :, 1:2], causal(0, 0, device=device))
    for n in (0, 1, 2, 4):
        assert torch.equal(y[n][:, :, 1:2], alone[n])


def test_finite_differences(device):
    """Of a random sum of the output, along a random direction, both by the equation in FP64."""
    x, do = drawn(9, 9, device=device)
    mask, step = causal(0, 0, device=device), 1e-5
    along = [torch.randn(part.shape, dtype=torch.float64) for part in x]

    def value(sign: int) -> float:
        moved = (p.cpu().double() + sign * step * d for p, d in zip(x, along, strict=True))
        return float((exact_expanded(Expanded(*moved), mask, SCALE)[0] * do.cpu()).sum())

    slope = (value(1) - value(-1)) / (2 * step)
    y = found(x, do, mask)
    dot = sum(float((g.cpu().double() * d).sum()) for g, d in zip(y, along, strict=True))
    size = math.sqrt(sum(float((g.double() ** 2).sum()) for g in y))
    assert abs(slope - dot) < 1e-5 * size


# Through autograd


@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize("mask", ["all", "causal", "documents"])
def test_forward_and_backward_together(mask, dtype, device):
    x, do = drawn(40, 40, device=device, dtype=dtype)
    masks = {"all": None, "causal": causal(0, 0, device=device), "documents": packed(40, 2, device)}
    leaves = [part.detach().clone().requires_grad_() for part in x]
    o = attend_expanded(*leaves, masks[mask], SCALE)
    y = torch.autograd.grad(o, leaves, do)
    for one, other in zip(y, exact(x, do, masks[mask]), strict=True):
        assert error(one, other) < GRADIENT[dtype]


def test_gradients_come_in_the_dtype_of_each_input(device):
    x, do = drawn(20, 20, device=device)
    leaves = [part.detach().clone() for part in x]
    leaves[0], leaves[3] = leaves[0].bfloat16(), leaves[3].half()
    leaves = [part.requires_grad_() for part in leaves]
    y = torch.autograd.grad(attend_expanded(*leaves, None, SCALE), leaves, do)
    assert [part.dtype for part in y] == [part.dtype for part in leaves]
    wanted = exact(Expanded(*(part.detach().float() for part in leaves)), do, None)
    for part, one, other in zip(leaves, y, wanted, strict=True):
        assert error(one, other) < GRADIENT[part.dtype]


# What figures are told


@pytest.mark.parametrize("mask", ["all", "causal", "documents"])
def test_schedule_and_traffic_are_what_the_walks_do(mask):
    if not cards.interpreted():
        pytest.skip("NOT RUN: only the interpreter can be watched")
    T, S, heads, widths = 70, 70 if mask == "documents" else 100, 2, (24, 8, 40)
    x, do = drawn(T, S, heads, widths)
    starts = {"all": (None, None), "causal": (5, 30), "documents": (0, 0)}[mask]
    numbers = packed(T, 2, "cpu").documents if mask == "documents" else None
    told = None if mask == "all" else Causal(torch.tensor(starts), numbers)
    of_row, lse = saved(x, told)
    shape = (starts, T, S, heads, widths, 4, cards.INTERPRETER)
    listed = numbers.tolist() if numbers is not None else None
    x = Expanded(*map(described, x))  # what lies elsewhere is copied: addresses would not tell
    with using((Keys(16, 32, 8, 2), Queries(32, 16, 8, 2))), tile_loads() as loads:
        gradients(do, *x, of_row, lse, told, SCALE)
        met = {Keys: x.q_nope.data_ptr(), Queries: x.k_nope.data_ptr()}
        for kind, address in met.items():
            seen = [(load.program, load.at[0], load.at[1], load.at[2]) for load in loads
                    if load.address == address and load.block[2] == 16]  # fmt: skip
            steps = schedule(kind, *shape, documents=listed)
            of = [step.queries if kind is Keys else step.keys for step in steps]
            assert sorted(seen) == sorted(
                (s.program, s.row, s.heads[0], first)
                for s, (first, _) in zip(steps, of, strict=True)
            )
            for n in {s.program for s in steps}:  # each program in this order
                assert [s[3] for s in seen if s[0] == n] == [
                    first for s, (first, _) in zip(steps, of, strict=True) if s.program == n
                ]
        moved = traffic(*shape, documents=listed)
        read = sum(bytes_of(load, x, do) for load in loads)
        rows = sum(load.address == x.q_nope.data_ptr() and min(load.block[2], T - load.at[2])
                   for load in loads)  # fmt: skip
        extra = 2 * do.nbytes + 4 * 8 * 2 * S * heads  # of delta, and to add up the heads
        assert moved.loaded_bytes == read + 8 * rows + extra
    results = sum(part.nbytes for part in x)
    assert moved.stored_bytes == results + lse.nbytes + 4 * 8 * 2 * S * heads
    assert moved.least_bytes == 2 * results + 2 * do.nbytes + lse.nbytes
    for kind in (Keys, Queries):
        for step in schedule(kind, *shape, documents=listed):
            assert step.masked == is_masked(step, told)


def bytes_of(load, x: Expanded, do: Tensor) -> int:
    """Return the bytes of a tile that lie inside of what is described."""
    of = {part.data_ptr(): part for part in (*x, do)}[load.address]
    return min(load.block[2], of.shape[1] - load.at[2]) * of.shape[-1] * of.itemsize


def is_masked(step, mask: Causal | None) -> bool:
    if mask is None:
        return False
    t, s = torch.arange(*step.queries), torch.arange(*step.keys)
    sees = s <= mask.start[step.row] + t[:, None]
    if mask.documents is not None:
        number = mask.documents[step.row]
        sees &= number[t][:, None] == number[s]
    return not bool(sees.all())


# Which cut


def model(capability) -> Card:
    of = CARDS[capability]
    return Card(of.name, capability, of.n_sm, of.shared_bytes)


@pytest.mark.parametrize("capability", CARDS)
def test_rule_of_thumb_knows_every_width(capability):
    for widths in [*WIDTHS, (256, 64, 256), (1, 1, 1)]:
        for itemsize in (2, 4):
            for kind in (Keys, Queries):
                assert rule_of_thumb(kind, widths, itemsize, model(capability)) in CANDIDATES


def test_rule_of_thumb_by_hand():
    """Published widths: 40 KiB of keys and twice as much of queries fit 227 KiB, not 99."""
    assert rule_of_thumb(Keys, PUBLISHED, 2, model(HOPPER)) == Keys(64, 64, 8, 2)
    assert rule_of_thumb(Queries, PUBLISHED, 2, model(HOPPER)) == Queries(128, 64, 8, 2)
    assert rule_of_thumb(Keys, PUBLISHED, 2, model((8, 9))) == Keys(16, 32, 8, 2)
    assert rule_of_thumb(Keys, PUBLISHED, 4, model(HOPPER)) == Keys(16, 16, 8, 1)


# Errors


def test_errors_name_the_kernel_the_value_and_what_to_do(device):
    x, do = drawn(5, 7, device=device)
    o, lse = torch.zeros_like(do), torch.zeros(2, 2, 5, device=device)
    for bad in (
        {"do": do[:, :4]}, {"do": do.half()}, {"o": o[..., :3]}, {"o": o.half()},
        {"lse": lse.double()}, {"lse": lse.transpose(1, 2)},
    ):  # fmt: skip
        told = {"do": do, "o": o, "lse": lse} | bad
        (name,) = bad
        with pytest.raises(ValueError, match=f"attend_expanded's backward: {name} must be .*, got"):
            gradients(told["do"], *x, told["o"], told["lse"], None, SCALE)
    with pytest.raises(ValueError, match=r"backward: widths .* choose impl='torch'"):
        rule_of_thumb(Keys, (4096, 64, 4096), 2, model(HOPPER))


# Planted bugs


def check_all(module: ModuleType) -> None:
    with using((Keys(16, 32, 8, 2), Queries(32, 16, 8, 2))):
        for mask in (causal(0, 0), packed(49, 2, "cpu")):
            x, do = drawn(49, 49)  # three tiles and one row
            check(x, do, mask, module)
        x, do = drawn(50, 70)
        check(x, do, None, module)
        check_far_below(module)
        x, do = drawn(10, 70)
        for part in (x.k_nope, x.k_rope, x.v):
            part[0, 10:] = math.nan
            part[1, 60:] = math.nan
        check(x, do, causal(0, 50), module)
        x, do = drawn(40, 40)
        check(x, do, causal(-3, -30), module)


BUGS = {
    "a query sees the key behind it": ("s_at <= at + t_at", "s_at <= at + t_at + 1"),
    "documents are not told apart": ("sees &= mine == theirs", "sees &= True"),
    "weights of what is not seen stay": ("p = tl.where(sees, p, 0.0)", "p = p"),
    "NaN of a leftover value stays": ("ds = tl.where(sees, ds, 0.0)", "ds = p * ds"),
    "NaN of a leftover key stays": ("held = (s_at < at + T)", "held = (s_at < S)"),
    "keys behind the last have weight": ("sees = s_at < S", "sees = s_at < S + 64"),
    "delta is forgotten": ("met[2].T, None) - delta)", "met[2].T, None))"),
    "the rotary part is forgotten": ("product(own[1], met[1].T, product(own[0], met[0].T, None))",
                                     "product(own[0], met[0].T, None)"),
    "natural weights, to base 2": ("lse * _LOG2_E", "lse"),
    "scale is not applied to the keys": ("put(dk_nope, sums[0] * scale", "put(dk_nope, sums[0]"),
    "scale is applied to values": ("put(dv, sums[2]", "put(dv, sums[2] * scale"),
    "keys begin a tile late": ("begin = tl.maximum(s - at, 0) // BLOCK_T",
                               "begin = tl.maximum(s - at, 0) // BLOCK_T + 1"),
    "the diagonal is short": ("tl.maximum(s + BLOCK_S - 1 - at, 0), BLOCK_T)",
                              "tl.maximum(s + BLOCK_S // 2 - at, 0), BLOCK_T)"),
    "a document ends a tile early": ("end = tl.max(lasts) // BLOCK_T + 1",
                                     "end = tl.max(lasts) // BLOCK_T"),
    "a document begins a tile late": ("begin = tl.min(mine) // BLOCK_S",
                                      "begin = tl.min(mine) // BLOCK_S + 1"),
    "queries see a tile too few": ("tl.minimum(t + BLOCK_T, T), 0), S), BLOCK_S)",
                                   "tl.minimum(t + BLOCK_T, T), 0), S) - 1, BLOCK_S)"),
    "a tile is whole too early": ("whole = tl.minimum(tl.maximum(at + t + 1, 0), S) // BLOCK_S",
                                  "whole = tl.minimum(tl.maximum(at + t + 8, 0), S) // BLOCK_S"),
    "rotary keys of another head": ("rows_at(keys, b, h, 0, tile", "rows_at(keys, b, h, 1, tile"),
    "queries behind the last see leftovers": ("t_at = tl.minimum(t_at, T - 1)", "t_at = t_at + 0"),
    "starts of the first row": ("tl.load(start + b)", "tl.load(start + 0 * b)"),
}  # fmt: skip


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_planted_bug_is_seen(bug, device):
    if device != "cpu":
        pytest.skip("NOT RUN: planted in the interpreter")
    if bug is None:
        check_all(mla_prefill_backward)
        return
    with mutated(mla_prefill_backward, *BUGS[bug]) as copy:
        with pytest.raises(AssertionError):
            check_all(copy)


# Ring 2: what the compiler makes of it


def launch(cuts: list | None, kind: str, dtype: str) -> None:
    """Launch on tensors without memory, of 4096 tokens and published widths."""

    def empty(*shape: int, dtype: str = dtype) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    T, H, (n, r, v) = 4096, 128, PUBLISHED
    kv, latent, o = empty(1, T, H, n + v), empty(1, T, 512 + r), empty(1, T, H, v)
    x = empty(1, T, H, n), empty(1, T, H, r), kv[..., :n], latent[..., 512:], kv[..., n:]
    numbers = empty(1, T, dtype="int64") if kind == "documents" else None
    mask = None if kind == "all" else Causal(empty(1, dtype="int64"), numbers)
    lse = empty(1, H, T, dtype="float32")
    with using(cuts and (Keys(*cuts[0]), Queries(*cuts[1]))):
        gradients(o, *x, o, lse, mask, SCALE)


def _call(cuts=None, kind: str = "causal", dtype: str = "bfloat16") -> dict:
    return {"cuts": cuts, "kind": kind, "dtype": dtype}


@pytest.mark.slow
def test_hopper_runs_every_candidate_from_registers():
    """No spills where wgmma makes all products; bulk copies in and out.

    The others are for other cards, and FP32: what a thread that multiplies alone holds of the keys
    does not fit its registers here. It is right, and slow.
    """
    calls = [_call(), _call(kind="documents"), *map(_call, CUTS[1:3]), _call(dtype="float32")]
    compiled = compile_calls("test_kernel_mla_prefill_backward", "launch", calls)
    for call, launches in zip(calls, compiled, strict=True):
        names = [kernel.kernel for kernel in launches]
        assert names == ["multiply_rows", "keys_walk", "queries_walk", "add"]
        for kernel in launches[1:3]:
            found = kernel.instructions
            assert found.get("UTMALDG"), (call, kernel)
            assert found.get("UTMASTG"), (call, kernel)
            wide = call["dtype"] == "bfloat16" and call["cuts"] != CUTS[2]
            assert kernel.spilled_bytes == 0 or not wide, (call, kernel)
            assert bool(found.get("HGMMA")) == wide, (call, kernel)
            assert not (wide and "HMMA" in found), (call, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [key for key in CARDS if key != HOPPER], ids=str)
def test_other_cards_compile(capability):
    """It fits, and next to nothing is spilled."""
    (launches,) = compile_calls("test_kernel_mla_prefill_backward", "launch", [_call()], capability)
    for kernel in launches[1:3]:
        assert kernel.spilled_bytes <= 8, kernel
        wanted = "UTCHMMA" if capability[0] == 10 else "HMMA"
        assert kernel.instructions.get(wanted), kernel


# Ring 3: on a card


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize("mask", ["all", "causal", "documents"])
def test_published_widths_on_a_card(mask, dtype):
    x, do = drawn(1000, 1000, 3, PUBLISHED, device="cuda", dtype=dtype)
    masks = {
        "all": None,
        "causal": causal(0, 0, device="cuda"),
        "documents": packed(1000, 2, "cuda"),
    }
    check(x, do, masks[mask], scale=192**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_every_candidate_on_a_card(cuts):
    for dtype in (torch.bfloat16, torch.float16):
        x, do = drawn(300, 300, 2, PUBLISHED, device="cuda", dtype=dtype)
        with using(cuts):
            check(x, do, causal(0, 0, device="cuda"), scale=192**-0.5)
            check(x, do, packed(300, 2, "cuda"), scale=192**-0.5)


@pytest.mark.gpu
def test_v3_training_shape_on_a_card():
    """All 128 heads of 4096 tokens, three times the same bits; some heads against FP64."""
    x, do = drawn(4096, 4096, 128, PUBLISHED, 1, "cuda", torch.bfloat16)
    leaves = [part.detach().clone().requires_grad_() for part in x]
    o = attend_expanded(*leaves, causal(0, device="cuda"), 192**-0.5)
    y = bitwise_equal(lambda: torch.autograd.grad(o, leaves, do, retain_graph=True), times=3)
    for h in (0, 77, 127):
        one = Expanded(*(part if part is x.k_rope else part[:, :, h : h + 1] for part in x))
        wanted = exact(one, do[:, :, h : h + 1], causal(0, device="cuda"), 192**-0.5)
        for n in (0, 1, 2, 4):
            assert error(y[n][:, :, h : h + 1], wanted[n]) < GRADIENT[torch.bfloat16]


@pytest.mark.gpu
def test_graph_is_captured_and_replayed_with_other_numbers():
    x, do = drawn(500, 500, 4, PUBLISHED, device="cuda", dtype=torch.bfloat16)
    for mask in (causal(0, 0, device="cuda"), packed(500, 2, "cuda")):
        o, lse = saved(x, mask)
        gradients(do, *x, o, lse, mask, SCALE)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = gradients(do, *x, o, lse, mask, SCALE)
        do.copy_(torch.randn(do.shape))
        graph.replay()
        torch.cuda.synchronize()
        assert_same(y, gradients(do, *x, o, lse, mask, SCALE))
