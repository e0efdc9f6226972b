"""Gradients of the experts' weights: equal to sums over each expert's visits, in FP64."""

from functools import partial
from types import ModuleType

import pytest
import torch
from compiled import CARDS, HOPPER, compile_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_experts import LOADS, among_experts, draw_ids, is_empty, slots_by_loop, spoil
from kernel_inputs import LAYOUTS, assert_caught, bitwise_equal, laid_out, poisoned, poisoned_memory
from kernel_products import error, spread, tolerance
from minids_kernels import cards, configs, moe_wgrad
from minids_kernels.cards import Card
from minids_kernels.moe_wgrad import (
    CANDIDATES,
    DTYPES,
    Groups,
    Rows,
    columns,
    grad_by_expert,
    rule_of_thumb,
    write_gradient,
)
from minids_kernels.slots import Slots, n_slots
from torch import Tensor

from minids.formats.groups import COLUMN, TILE, Scaled, quantise, requantise

pytestmark = pytest.mark.usefixtures("interpreter")

# FP32: the same products in another order, "ieee" on a card; of 16 bits products are exact in FP32.
SUMS = 2e-6
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
OF_ROWS, OF_GROUPS = ([c for c in CANDIDATES if type(c) is kind] for kind in (Rows, Groups))


def aligned(load="any", tokens=40, experts=4, k=2, size=16, device="cpu") -> Slots:
    return slots_by_loop(draw_ids(load, tokens, experts, k, device), experts, size)


def numbers(*shape: int, dtype=torch.float32, device="cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def by_slot(slots: Slots, width: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    """Return rows in slots: zero where empty, NaN in tiles that no expert owns."""
    x = numbers(len(slots.visit), width, dtype=dtype, device=slots.visit.device, seed=seed)
    x[is_empty(slots)] = 0
    return spoil(x, ~among_experts(slots))


def turned(slots: Slots, width: int, seed: int = 0) -> Scaled:
    """Return rows in slots as FP8 products along them read them: [width, P]."""
    x = by_slot(slots, width, seed=seed).nan_to_num()
    x *= 10.0 ** (2 * torch.rand(len(x), 1, generator=torch.Generator().manual_seed(seed))).to(x)
    y = quantise(x, COLUMN).mT
    outside = ~among_experts(slots)
    spoil(y.values.mT, outside)
    y.scale[:, outside.view(-1, 128).any(1)] = torch.nan
    return y


def exact(dy: Tensor, x: Tensor, slots: Slots) -> Tensor:
    """Sum over each expert's slots that hold a visit, in FP64."""
    held = ~is_empty(slots)
    found = []
    for e in range(len(slots.start) - 1):
        mine = slice(int(slots.start[e]), int(slots.start[e + 1]))
        rows = held[mine]
        found.append(dy[mine][rows].double().mT @ x[mine][rows].double())
    return torch.stack(found)


def wide(x: Scaled) -> Tensor:
    """Return [P, width] in FP64."""
    return (x.values.double() * spread(x)).mT


def tokens_of(slots: Slots) -> Tensor:
    return slots.visit // slots.place.shape[1]


def gathered(x: Tensor, slots: Slots) -> Tensor:
    return torch.cat((x, torch.zeros_like(x[:1])))[tokens_of(slots).long()]


def check_rows(slots, N, K, dtype, module: ModuleType = moe_wgrad, gather: str = "") -> None:
    """Compare a product of rows in slots, or of what is gathered by token, with the loop's."""
    tokens, rows = len(slots.place), tokens_of(slots)
    dy, x = by_slot(slots, N, dtype), by_slot(slots, K, dtype, seed=1)
    found_rows = {"dy_rows": None, "x_rows": None}
    wanted = exact(dy, x, slots)
    if gather == "dy":
        dy = numbers(tokens, N, dtype=dtype, device=dy.device)
        wanted, found_rows["dy_rows"] = exact(gathered(dy, slots), x, slots), rows
    if gather == "x":
        x = numbers(tokens, K, dtype=dtype, device=dy.device)
        wanted, found_rows["x_rows"] = exact(dy, gathered(x, slots), slots), rows
    for out in {torch.float32, dtype}:
        with poisoned_memory():
            y = module.grad_by_expert(dy, x, slots, out, **found_rows)
        assert (y.shape, y.dtype) == (wanted.shape, out)
        assert error(y, wanted) < SUMS + ROUNDED[out]
        empty = slots.start[1:] == slots.start[:-1]
        assert (y[empty] == 0).all(), "of an expert without visits"


def check_groups(slots, N, K, module: ModuleType = moe_wgrad) -> None:
    dy, x = turned(slots, N), turned(slots, K, seed=1)
    wanted = exact(wide(dy), wide(x), slots)
    for dtype in DTYPES[:2]:
        with poisoned_memory():
            y = module.grad_by_expert(dy, x, slots, dtype)
        assert error(y, wanted) < tolerance(dtype)
        assert (y[slots.start[1:] == slots.start[:-1]] == 0).all()


def test_example_by_hand(device):
    """Expert 1 has visits 0 and 2 of (1, 2) and (3, 4), expert 0 none, 2 the other visit."""
    ids = torch.tensor([[1], [2], [1]], device=device)
    slots = slots_by_loop(ids, 3, 16)
    x = torch.tensor([[1.0, 2.0], [5.0, 6.0], [3.0, 4.0]], device=device)
    dy = torch.tensor([[10.0], [100.0], [1000.0]], device=device)
    rows = tokens_of(slots)
    assert rows[:3].tolist() == [0, 2, 3]
    dy_by_slot = gathered(dy, slots)
    wanted = [[[0.0, 0.0]], [[3010.0, 4020.0]], [[500.0, 600.0]]]
    assert grad_by_expert(dy_by_slot, x, slots, torch.float32, x_rows=rows).tolist() == wanted
    found = grad_by_expert(dy, gathered(x, slots), slots, torch.float32, dy_rows=rows)
    assert found.tolist() == wanted


@pytest.mark.parametrize("gather", ["", "dy", "x"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_equal_the_loop(dtype, gather, device):
    for load in LOADS:
        check_rows(aligned(load, tokens=20, device=device), 40, 72, dtype, gather=gather)


@pytest.mark.parametrize("load", LOADS)
def test_groups_equal_the_loop(load, device):
    check_groups(aligned(load, 70, 3, 2, 128, device), 40, 72)


@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 4, 2), (5, 3, 3), (1, 1, 1)])
def test_one_token_and_all_experts(tokens, experts, k, device):
    check_rows(aligned("any", tokens, experts, k, device=device), 33, 65, torch.float32, gather="x")
    check_groups(aligned("any", tokens, experts, k, 128, device), 33, 65)


@pytest.mark.parametrize("config", CANDIDATES, ids=str)
def test_every_candidate(config, device):
    """More tiles than one along both axes, the last ones ragged."""
    N, K = config.BLOCK_N + 24, config.BLOCK_K + 8
    kernel = f"moe_wgrad.{type(config).__name__}"
    with configs.trying(kernel, config._asdict()) as trial:
        if isinstance(config, Rows):
            slots = aligned("all to one", 70, 2, 1, max(16, config.BLOCK_P), device)
            check_rows(slots, N, K, torch.bfloat16)
            check_rows(slots, N, K, torch.bfloat16, gather="dy")
        else:
            check_groups(aligned("all to one", 130, 2, 1, 128, device), N, K)
    assert kernel in {name for name, _ in trial.asked}


@settings(max_examples=6)
@given(
    st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(1, 140),
    st.integers(1, 140), st.sampled_from([16, 64, 128]), st.sampled_from(DTYPES),
    st.sampled_from(["", "dy", "x"]),
)  # fmt: skip
def test_random_shapes(device, tokens, experts, k, N, K, size, dtype, gather):
    slots = aligned("any", tokens, max(experts, k), k, size, device)
    check_rows(slots, N, K, dtype, gather=gather)
    if size == 128:
        check_groups(slots, N, K)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("contiguous", torch.bfloat16), ("transposed", torch.float32), ("rows 3 apart", torch.half)],
    ids=str,
)
def test_adds_to_out_in_place(layout, dtype, device):
    slots = aligned("few of many", size=128, device=device)
    before = numbers(4, 24, 40, dtype=dtype, device=device, seed=2)
    pairs = (
        (by_slot(slots, 24), by_slot(slots, 40, seed=1)),
        (turned(slots, 24), turned(slots, 40, seed=1)),
    )
    for dy, x in pairs:
        out = laid_out(before, layout)
        assert grad_by_expert(dy, x, slots, dtype, out) is out
        wanted = grad_by_expert(dy, x, slots, torch.float32) + before.float()
        torch.testing.assert_close(out.float(), wanted, rtol=1e-6 + ROUNDED[dtype], atol=1e-5)


def test_writes_one_half_of_a_stack_and_nothing_else(device):
    slots = aligned(size=128, device=device)
    dy, x = by_slot(slots, 24), by_slot(slots, 40, seed=1)
    memory = poisoned((4, 24, 40), torch.float32, device, strides=(2 * 24 * 40, 40, 1))
    write_gradient(dy, x, slots, memory.x)
    memory.check()
    assert torch.equal(memory.x, grad_by_expert(dy, x, slots, torch.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, device):
    slots, rows = aligned(device=device), None
    dy, x = by_slot(slots, 24), numbers(40, 33, device=device)
    rows = tokens_of(slots)
    wanted = grad_by_expert(dy, x, slots, torch.float32, x_rows=rows)
    odd = laid_out(dy, layout), laid_out(x, layout)
    assert torch.equal(grad_by_expert(*odd, slots, torch.float32, x_rows=rows), wanted)


def test_cards_without_fp8_decode_bytes(monkeypatch, device):
    slots = aligned("any", 70, 3, 2, 128, device)
    tiles = quantise(numbers(70, 40, device=device), TILE)
    real = cards.card("a test", slots.visit)
    wanted = columns(tiles, tokens_of(slots), slots)
    monkeypatch.setattr(cards, "card", lambda *_: real._replace(capability=(8, 0)))
    check_groups(slots, 24, 40)
    check_rows(slots, 24, 40, torch.bfloat16)
    found = columns(tiles, tokens_of(slots), slots)
    same_columns(found, wanted, slots)


def same_columns(found: Scaled, wanted: Scaled, slots: Slots) -> None:
    owned = among_experts(slots)
    assert found.group == wanted.group == TILE
    parts = (x.values.view(torch.uint8)[:, owned] for x in (found, wanted))
    assert torch.equal(*parts)
    groups = owned.view(-1, 128)[:, 0]
    assert torch.equal(found.scale[:, groups], wanted.scale[:, groups])


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("width", [1, 129, 200])
def test_columns_equal_those_of_sorted_rows(width, scale_fmt, device):
    """Bit by bit: gathered tiles grouped again, empty slots as zeros."""
    slots = aligned("any", 150, 3, 2, 128, device)
    tiles = quantise(numbers(150, width, device=device) * 100, TILE, scale_fmt)
    with poisoned_memory():
        found = columns(tiles, tokens_of(slots), slots, scale_fmt)
    values = gathered(tiles.values.view(torch.uint8), slots).view(tiles.values.dtype)
    same_columns(
        found,
        requantise(Scaled(values, gathered(tiles.scale, slots), TILE), COLUMN, scale_fmt).mT,
        slots,
    )
    behind = found.values.view(torch.uint8)[:, ~among_experts(slots)]
    assert (behind == 0x7F).all(), "written behind the end"


def test_two_runs_are_bitwise_equal(device):
    slots = aligned(size=128, device=device)
    dy, x = by_slot(slots, 70, torch.bfloat16), by_slot(slots, 40, torch.bfloat16, seed=1)
    bitwise_equal(partial(grad_by_expert, dy, x, slots, torch.float32))
    bitwise_equal(partial(grad_by_expert, turned(slots, 70), turned(slots, 40), slots, DTYPES[1]))


def test_no_tokens_and_no_columns(device):
    slots = aligned(device=device)
    none = Slots(slots.visit[:0], slots.place[:0], slots.start * 0, slots.expert[:0], 16)
    y = grad_by_expert(*(torch.empty(0, n, device=device) for n in (3, 5)), none, torch.float32)
    assert torch.equal(y, torch.zeros(4, 3, 5, device=device))
    dy, x = by_slot(slots, 0), by_slot(slots, 5)
    assert grad_by_expert(dy, x, slots, torch.float32).shape == (4, 0, 5)


@pytest.mark.parametrize("capability", CARDS)
def test_rule_of_thumb_knows_every_size(capability):
    model = CARDS[capability]
    card = Card(model.name, capability, model.n_sm, model.shared_bytes)
    for size in (16, 64, 128):
        for itemsize in (2, 4):
            config = rule_of_thumb(size, itemsize, card)
            assert isinstance(config, Rows)
            assert size % config.BLOCK_P == 0
    assert isinstance(rule_of_thumb(128, 1, card), Groups)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s, a, b: grad_by_expert(a[1:], b, s, a.dtype), "dy must be .*columns"),
        (lambda s, a, b: grad_by_expert(a, b.double(), s, a.dtype), "x must be .*float64"),
        (lambda s, a, b: grad_by_expert(a.half(), b, s, a.dtype), "must have one dtype"),
        (lambda s, a, b: grad_by_expert(a, b, s, torch.int32), "dtype must be one of"),
        (lambda s, a, b: grad_by_expert(a, b, s, a.dtype, a), "out must be .4, 24, 40."),
        (lambda s, a, b: grad_by_expert(a, b, s, a.dtype, x_rows=s.visit[1:]), "x_rows must be"),
        (lambda s, a, b: grad_by_expert(a, quantise(b), s, a.dtype), "must both be Scaled"),
        (lambda s, a, b: grad_by_expert(quantise(a), quantise(b), s, a.dtype), "dy must be turned"),
        (lambda s, a, b: grad_by_expert(a, b, s._replace(size=8), a.dtype), "multiple of 16"),
        (
            lambda s, a, b: grad_by_expert(
                turned(s, 24), turned(s, 40), s._replace(size=64), a.dtype
            ),
            "multiple of 128, got 64",
        ),
        (lambda s, a, b: columns(quantise(b, COLUMN), s.visit, s), "columns: x must be in tiles"),
    ],
)
def test_bad_input_is_named(call, words, device):
    slots = aligned(size=128, device=device)
    with pytest.raises(ValueError, match=words):
        call(slots, by_slot(slots, 24), by_slot(slots, 40))


def test_offsets_pass_two_billion(device):
    """Experts of the result, and tokens, two billion numbers apart, in memory nobody touches."""
    slots = aligned("any", 3, 3, 1, device=device)
    dy, x = by_slot(slots, 8, torch.bfloat16), numbers(3, 16, dtype=torch.bfloat16, device=device)
    rows, step = tokens_of(slots), 2**30 + 64
    wanted = grad_by_expert(dy, x, slots, torch.bfloat16, x_rows=rows)
    far = torch.empty(2 * step + 16, dtype=x.dtype, device=device).as_strided((3, 16), (step, 1))
    far.copy_(x)
    out = torch.empty(2 * step + 128, dtype=x.dtype, device=device)
    out = out.as_strided((3, 8, 16), (step, 16, 1))
    write_gradient(dy, far, slots, out, x_rows=rows)  # by a descriptor
    assert torch.equal(out, wanted)
    grad_by_expert(dy, far, slots, torch.bfloat16, out, x_rows=rows)  # by pointers
    assert torch.equal(out, 2 * wanted)


# Planted bugs


def check(module: ModuleType) -> None:
    slots = aligned("few of many", 20, 3, 1, 16)
    check_rows(slots, 20, 70, torch.float32, module, "x")
    check_rows(slots, 20, 70, torch.float32, module)
    slots = slots_by_loop(torch.tensor([1] * 20 + [2] * 140)[:, None], 3, 128)
    check_groups(slots, 20, 40, module)
    dy, x = by_slot(slots, 20), by_slot(slots, 40, seed=1)
    out = torch.full((3, 20, 40), 1000.0)
    module.grad_by_expert(dy, x, slots, torch.float32, out)
    assert error(out - 1000, exact(dy, x, slots)) < 1e-4  # FP32 beside 1000
    tiles = quantise(numbers(160, 130), TILE)
    with poisoned_memory():
        found = module.columns(tiles, tokens_of(slots), slots)
    same_columns(found, columns(tiles, tokens_of(slots), slots), slots)
    behind = found.values.view(torch.uint8)[:, ~among_experts(slots)]
    assert (behind == 0x7F).all(), "written behind the end"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.load(start + e + 1), BLOCK_P)", "tl.load(start + e + 1) - BLOCK_P, BLOCK_P)"),
        ("range(tl.load(start + e),", "range(0,"),
        ("(at < n_rows)[:, None]", "(at <= n_rows)[:, None]"),
        ("& (cols < width)[None, :]", "& (cols < width - 1)[None, :]"),
        ("tl.dot(a.T, b, sums,", "tl.dot(a.T, b,"),
        ("range(first, end)", "range(first, end - 1)"),
        ("tl.dot(a, b.T) * scale", "tl.dot(a, b.T)"),
        ("dy_scale += dy_g\n", "dy_scale += 0\n"),
        ("x_scale += first.to(tl.int64) * x_g", "x_scale += 0 * x_g"),
        ("out + e.to(tl.int64) * out_e", "out"),
        ("out_desc.store([e, n, k]", "out_desc.store([0, n, k]"),
        ("if tl.load(expert + g) < 0:\n        return", "if g < 0:\n        return"),
        ("tl.load(rows + 2)", "tl.load(rows + 1)"),
        ("<< (8 * q)", "<< (24 - 8 * q)"),
        ("* BLOCK_K // 128 * x_scale_j", "* 0 * x_scale_j"),
        ("g.to(tl.int64) * K + k)", "k)"),
    ],
    ids=["last slots", "first slots", "empty", "column", "sum", "group", "scale", "next scale",
         "first scale", "expert", "expert described", "behind", "row", "order", "tile", "place"],
)  # fmt: skip
def test_planted_bug_is_caught(old, new):
    if not cards.interpreted():
        pytest.skip("NOT RUN: bugs are planted where the interpreter runs, on CPU")
    assert_caught(moe_wgrad, check, old, new)


# Ring 2: what the compiler makes of it


def on_meta(call: str, dtype: str = "bfloat16", add: bool = False, size=128, config=None) -> None:
    """Launch at V3's widths on memory that is not there: of w_gate_up, or of w_down."""
    tokens, k, experts, D, F = 4096, 8, 256, 7168, 2048
    P = n_slots(tokens * k, experts, size)
    whole = partial(torch.empty, dtype=torch.int32, device="meta")
    slots = Slots(whole(P), whole(tokens, k), whole(experts + 1), whole(P // size), size)
    kind, rows = getattr(torch, dtype), slots.visit
    number = partial(torch.empty, device="meta")

    def by_groups(width: int) -> Scaled:
        values = number(width, P, dtype=torch.float8_e4m3fn)
        return Scaled(values, number(P // 128, width).mT, TILE)

    out = number(experts, D, F) if add else None
    with configs.trying(*(config or ("", None))):
        if call == "groups":
            grad_by_expert(by_groups(D), by_groups(F), slots, torch.float32, out)
        elif call == "columns":
            values = number(tokens, D, dtype=torch.float8_e4m3fn)
            columns(Scaled(values, number(D // 128, tokens).mT, TILE), rows, slots)
        elif call == "down":
            dy, x = number(tokens, D, dtype=kind), number(P, F, dtype=kind)
            grad_by_expert(dy, x, slots, torch.float32, out, dy_rows=rows)
        else:
            dy, x = number(P, 2 * F, dtype=kind), number(tokens, D, dtype=kind)
            grad_by_expert(dy, x, slots, kind, x_rows=rows)


def calls() -> list[dict]:
    found: list[dict] = [{"call": "columns"}, {"call": "up", "dtype": "float32"}]
    for config in CANDIDATES:
        given = (f"moe_wgrad.{type(config).__name__}", config._asdict())
        rows = isinstance(config, Rows)
        found.append({"call": "up" if rows else "groups", "config": given})
    found += [{"call": "down", "add": True}, {"call": "groups", "add": True}]
    return [*found, {"call": "up"}, {"call": "groups"}]


@pytest.mark.slow
def test_hopper_runs_every_candidate_from_registers():
    """No spills; wgmma of BF16 or FP8; two programs on a multiprocessor for the rule's picks."""
    compiled = compile_calls("test_kernel_moe_wgrad", "on_meta", calls())
    for call, (kernel,) in zip(calls(), compiled, strict=True):
        found = kernel.instructions
        assert kernel.spilled_bytes == 0, (call, kernel)
        if call["call"] == "columns":
            assert found.get("LDG.128"), (call, kernel)
            assert found.get("STG.128"), (call, kernel)
        elif call.get("dtype") != "float32":
            wanted = "QGMMA" if call["call"] == "groups" else "HGMMA"
            assert found.get(wanted), (call, kernel)
            assert not found.keys() & {"HMMA", "QMMA"}, (call, kernel)
            assert found.get("UTMASTG") or call.get("add"), (call, kernel)
            if "config" not in call and not call.get("add"):
                assert kernel.programs_on_an_sm >= 2, (call, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [card for card in CARDS if card != HOPPER], ids=str)
def test_other_cards_compile(capability):
    wanted: list[dict] = [{"call": "up"}, {"call": "groups"}]
    if capability == (8, 9):
        wanted += [{"call": "up", "dtype": "float32"}, {"call": "columns"}]
    for call, (kernel,) in zip(
        wanted, compile_calls("test_kernel_moe_wgrad", "on_meta", wanted, capability), strict=True
    ):
        assert kernel.spilled_bytes <= 8, (call, kernel)  # sm_120 keeps 8 bytes and never looks
        assert not kernel.instructions.get("LDL"), (call, kernel)


# Ring 3: on a card


@pytest.mark.gpu
@pytest.mark.parametrize("config", CANDIDATES, ids=str)
def test_every_candidate_on_a_card(config):
    N, K = config.BLOCK_N * 3 + 24, config.BLOCK_K * 2 + 8
    with configs.trying(f"moe_wgrad.{type(config).__name__}", config._asdict()):
        slots = aligned("any", 500, 8, 3, 128, "cuda")
        if isinstance(config, Rows):
            for gather in ("", "dy", "x"):
                check_rows(slots, N, K, torch.bfloat16, gather=gather)
        else:
            check_groups(slots, N, K)


@pytest.mark.gpu
def test_v3_widths_on_a_card():
    slots = aligned("any", 300, 16, 8, 128, "cuda")
    check_rows(slots, 4096, 7168, torch.bfloat16, gather="x")
    check_rows(slots, 7168, 2048, torch.bfloat16, gather="dy")
    check_groups(slots, 7168, 2048)
    tiles = quantise(numbers(300, 7168, device="cuda"), TILE)
    values = gathered(tiles.values.view(torch.uint8), slots).view(tiles.values.dtype)
    wanted = requantise(Scaled(values, gathered(tiles.scale, slots), TILE), COLUMN).mT
    same_columns(columns(tiles, tokens_of(slots), slots), wanted, slots)


@pytest.mark.gpu
def test_twenty_runs_on_a_card_are_bitwise_equal():
    slots = aligned("any", 500, 8, 3, 128, "cuda")
    dy, x = by_slot(slots, 1000, torch.bfloat16), by_slot(slots, 2000, torch.bfloat16, seed=1)
    bitwise_equal(partial(grad_by_expert, dy, x, slots, torch.float32), times=20)
    dy, x = turned(slots, 1000), turned(slots, 2000, seed=1)
    bitwise_equal(partial(grad_by_expert, dy, x, slots, torch.float32), times=20)
