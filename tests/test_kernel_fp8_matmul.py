"""Scaled products of many rows: equal to minids.fp8.scaled_matmul, and fit for the card."""

import itertools
from functools import partial
from math import prod

import pytest
import torch
import triton
import triton.language as tl
from compiled import CARDS, HOPPER, compile_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import (
    LAYOUTS,
    SPECIAL,
    assert_caught,
    bitwise_equal,
    laid_out,
    lengths,
    mutated,
    poisoned,
    special,
)
from kernel_products import (
    COSINE,
    GRADIENTS,
    GROUPS,
    ON_A_CARD,
    QUANTISED,
    ROUNDED,
    WEIGHTS,
    Wanted,
    among_nan,
    draw,
    error,
    every,
    exact,
    on_meta,
    product,
    tolerance,
    unlike,
    using,
)  # fmt: skip
from minids_kernels import cards, fp8_decode, fp8_matmul, tiles
from minids_kernels.cards import Card
from minids_kernels.fp8_matmul import CANDIDATES, DTYPES, rule_of_thumb, scaled_matmul

from minids import fp8
from minids.formats.groups import Scaled, quantise

pytestmark = pytest.mark.usefixtures("interpreter")

KERNEL = "fp8_matmul.Prefill"
CONFIGS = every(KERNEL)
NAMES = ["x".join(map(str, config.config.values())) for config in CONFIGS]
LEAST = fp8_decode.most_tokens(cards.INTERPRETER) + 1  # rows for which this kernel is chosen
# rows of a, rows of b, summed axis: ragged, whole, one of each
SHAPES = [(129, 1, 1), (129, 100, 129), (255, 129, 100), (257, 127, 576), (256, 256, 256)]


def test_example_by_hand():
    """Two groups of ones: 128 * 2 * 5 from the first, one 3 * 7 from the ragged second."""
    ones = torch.ones(LEAST, 129).to(torch.float8_e4m3fn)
    a = Scaled(ones, torch.tensor([2.0, 3.0]).repeat(LEAST, 1), (1, 128))
    b = Scaled(ones[:3], torch.tensor([[5.0, 7.0]]), (128, 128))
    assert (scaled_matmul(a, b) == 1301).all()


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, groups, device):
    m, n, k = shape
    a, b = draw(m, k, groups[0], device), draw(n, k, groups[1], device, seed=1)
    y = product()(a, b)
    assert y.shape == (m, n)
    assert error(y, fp8.scaled_matmul(a, b)) < tolerance()
    assert error(y, exact(a, b)) < tolerance()


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
@pytest.mark.parametrize("groups", [(1, 128), (1, 1)], ids=str)
def test_every_candidate_equals_reference(config, groups, device):
    a, b = draw(257, 300, groups[0], device), draw(200, 300, groups[1], device, seed=1)
    with using(config):
        assert error(product()(a, b), exact(a, b)) < tolerance()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [136, 129])  # stored by descriptor, and by pointers
def test_output_is_rounded_once(n, dtype, device):
    a, b = draw(130, 200, 1, device), draw(n, 200, 128, device, seed=1)
    y = product()(a, b, dtype)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert error(y, exact(a, b)) < tolerance(dtype)
    assert torch.equal(y, scaled_matmul(a, b).to(dtype))


@settings(max_examples=8)
@given(st.integers(129, 260), lengths(260), lengths(400), st.sampled_from(GROUPS))
def test_random_shapes(device, m, n, k, groups):
    a, b = draw(m, k, groups[0], device), draw(n, k, groups[1], device, seed=1)
    assert error(product()(a, b), exact(a, b)) < tolerance()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, device):
    """Values that descriptors cannot describe are copied, scales are read where they are."""
    a, b = draw(130, 200, 1, device), draw(100, 200, 128, device, seed=1)
    odd = (Scaled(laid_out(x.values, layout), laid_out(x.scale, layout), x.group) for x in (a, b))
    assert torch.equal(product()(*odd), scaled_matmul(a, b))


def test_aligned_values_are_not_copied(device):
    a, card = draw(130, 200, 1, device), cards.card("a test", torch.empty(1, device=device))
    assert tiles.operand(a, card).values.data_ptr() == a.values.data_ptr()
    shifted = Scaled(laid_out(a.values, "not aligned"), a.scale, a.group)
    copy = tiles.operand(shifted, card).values
    assert copy.data_ptr() != shifted.values.data_ptr()
    assert tiles.is_aligned(copy)
    expanded = Scaled(a.values[:1].expand(130, -1), a.scale, a.group)
    assert tiles.operand(expanded, card).values.stride(0) >= 200


@pytest.mark.parametrize("groups", [(1, 128), (1, 1)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "rows 3 apart"])
def test_adds_to_out_in_place(layout, groups, device):
    a, b = draw(130, 300, groups[0], device), draw(129, 300, groups[1], device, seed=1)
    before = torch.randn(130, 129, device=device)
    out = laid_out(before, layout)
    assert scaled_matmul(a, b, out=out) is out
    assert torch.equal(out, scaled_matmul(a, b) + before)


def test_writes_nothing_beside_out(device):
    a, b = draw(130, 129, 1, device), draw(129, 129, 1, device, seed=1)
    memory = poisoned((130, 129), torch.float32, device, strides=(140, 1))
    memory.x.zero_()
    scaled_matmul(a, b, out=memory.x)
    memory.check()


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("groups", [(1, 128), (1, 1)], ids=str)
def test_special_values_spoil_what_they_should(name, groups, device):
    """NaN and infinities reach the rows of their groups and no others; zeros stay zeros."""
    x = special(name, 130, 300, torch.float32, device)
    a, b = quantise(x, (groups[0], 128)), draw(70, 300, groups[1], device, seed=1)
    y, reference = scaled_matmul(a, b), fp8.scaled_matmul(a, b)
    assert torch.equal(y.isfinite(), reference.isfinite())
    finite = reference.isfinite()
    assert error(y[finite], reference[finite]) < tolerance() or not reference[finite].any()
    assert name != "zeros" or not y.any()
    turned = scaled_matmul(b, a) if groups[0] == groups[1] else None
    assert turned is None or torch.equal(turned.isfinite(), reference.mT.isfinite())


def test_infinite_scale_of_a_row_spoils_that_row_alone(device):
    a, b = draw(130, 300, 1, device), draw(70, 300, 128, device, seed=1)
    a.scale[5, 1] = torch.inf
    spoiled = ~scaled_matmul(a, b).isfinite()
    assert spoiled[5].all()
    assert spoiled.sum() == 70


@pytest.mark.parametrize("sizes", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_empty(sizes, device):
    m, n, k = sizes
    a, b = (quantise(torch.zeros(rows, k, device=device), (1, 128)) for rows in (m, n))
    out = torch.ones(m, n, device=device)
    assert torch.equal(scaled_matmul(a, b), torch.zeros(m, n, device=device))
    assert torch.equal(scaled_matmul(a, b, out=out), torch.ones(m, n, device=device))


@pytest.mark.parametrize("add", [False, True])
def test_two_runs_are_bitwise_equal(add, device):
    a, b = draw(257, 300, 1, device), draw(129, 300, 1, device, seed=1)
    bitwise_equal(
        lambda: scaled_matmul(a, b, out=torch.ones(257, 129, device=device) if add else None)
    )


def test_a_row_does_not_depend_on_its_neighbours(device):
    """With one config; the rule of thumb may choose another for another number of rows."""
    a, b = draw(257, 300, 1, device), draw(129, 300, 128, device, seed=1)
    with using(CONFIGS[0]):
        y = scaled_matmul(a, b)
        a.values.view(torch.uint8)[:128] = 0x7F
        assert torch.equal(scaled_matmul(a, b)[128:], y[128:])
        part = Scaled(a.values[128:], a.scale[128:], a.group)
        assert torch.equal(scaled_matmul(part, b), y[128:])


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_cards_without_fp8_decode_bytes(groups, monkeypatch, device):
    a, b = draw(130, 300, groups[0], device), draw(70, 300, groups[1], device, seed=1)
    y = scaled_matmul(a, b)
    real = cards.card("a test", a.values)
    monkeypatch.setattr(cards, "card", lambda *_: real._replace(capability=(8, 0)))
    assert error(product()(a, b), y) < tolerance()


# What is refused


def _bad(device: str):
    a, b = draw(2, 200, 1, device), draw(3, 200, 128, device, seed=1)
    values, scale, group = a
    out = torch.zeros(2, 3, device=device)
    yield "groups", (Scaled(values, scale, (1, 64)), b), {}, r"a must be .* got .*\(1, 64\)"
    yield "column groups", (a, b.mT), {}, r"b must be .*\(128, 1\).*|b must be|share"
    yield "batch", (Scaled(values[None], scale[None], group), b), {}, r"a must be a matrix"
    yield "values", (Scaled(values.bfloat16(), scale, group), b), {}, r"bfloat16"
    yield "scales", (Scaled(values, scale.half(), group), b), {}, r"float16"
    yield "scales' shape", (Scaled(values, scale[:, :1], group), b), {}, r"has scales \(2, 2\)"
    yield "last axis", (draw(2, 100, 1, device), b), {}, r"share their last axis"
    yield "dtype", (a, b, torch.float64), {}, r"float64"
    yield "out's shape", (a, b), {"out": out.mT}, r"out must be \(2, 3\)"
    yield "out's dtype", (a, b), {"out": out.half()}, r"float16"
    yield "out and dtype", (a, b, torch.bfloat16), {"out": out}, r"bfloat16"


@pytest.mark.parametrize("n", range(11))
def test_refuses_with_its_name_and_the_value(n, device):
    _, args, named, text = list(_bad(device))[n]
    with pytest.raises(ValueError, match=f"scaled_matmul: .*({text})"):
        scaled_matmul(*args, **named)


def test_all_refusals_are_tried(device):
    assert len(list(_bad(device))) == 11


# Where tiles lie


@triton.jit
def _places(out, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    tile = tl.program_id(0)
    row, column = tiles.place(tile, tiles_m, tiles_n, GROUP_M)
    tl.store(out + 2 * tile, row)
    tl.store(out + 2 * tile + 1, column)


@pytest.mark.parametrize("tiles_m", [1, 7, 8, 9, 33])
@pytest.mark.parametrize("tiles_n", [1, 5])
@pytest.mark.parametrize("height", [1, 8])
def test_every_tile_has_one_place(tiles_m, tiles_n, height, device):
    out = torch.full((tiles_m * tiles_n, 2), -1, dtype=torch.int32, device=device)
    _places[(len(out),)](out, tiles_m, tiles_n, height)
    found = [tuple(place) for place in out.tolist()]
    assert sorted(found) == list(itertools.product(range(tiles_m), range(tiles_n)))
    assert found[: min(height, tiles_m)] == [(m, 0) for m in range(min(height, tiles_m))]


# Which config


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("b_group", [1, 128])
def test_rule_of_thumb_knows_every_shape(b_group, capability):
    model = CARDS[capability]
    card = Card(model.name, capability, model.n_sm, model.shared_bytes)
    for (n, k), m in itertools.product(WEIGHTS, (129, 1000, 4096)):
        config = rule_of_thumb(m, n, k, b_group, card)
        assert config in CANDIDATES
        assert config.PARTS == 1 or b_group == 128
        assert tiles.by_four_warps(card) or (config.BLOCK_M, config.BLOCK_N) == (64, 32)


def test_rule_of_thumb_counts_rounds():
    """4096 x 2112 on 132 multiprocessors: 544 squares take 5 rounds, 352 tiles of 192 columns 3.

    4096 x 7168: 1792 squares nearly fill 14 rounds, 1216 wide tiles leave much of the tenth idle.
    """
    model = CARDS[HOPPER]
    card = Card(model.name, HOPPER, model.n_sm, model.shared_bytes)
    wide, square = rule_of_thumb(4096, 2112, 7168, 128, card), CANDIDATES[0]
    assert (wide.BLOCK_M, wide.PARTS * wide.BLOCK_N) == (128, 192)
    assert rule_of_thumb(4096, 7168, 16384, 128, card) == square


# Planted bugs


def check(module) -> None:
    """What planted bugs must fail: ragged edges, several tiles a program, parts, and `out`."""
    for m, n, k, groups, config in [
        (129, 100, 300, (1, 128), CONFIGS[1]),
        (257, 129, 129, (1, 1), CONFIGS[2]),
    ]:
        a, b = draw(m, k, groups[0]), draw(n, k, groups[1], seed=1)
        with using(config):
            assert error(product(module)(a, b), exact(a, b)) < tolerance()
    out = torch.full((m, n), 1000.0)
    module.scaled_matmul(a, b, out=out)
    assert error(out - 1000, exact(a, b)) < 1e-4  # FP32 beside 1000


def test_check_of_planted_bugs_holds(device):
    if device == "cpu":
        check(fp8_matmul)


BUGS = {
    "the scale is dropped": ("tl.dot(a, b.T) * scale,", "tl.dot(a, b.T),"),
    "the scale of the next group": ("scale_of_tile(\n                    a_scales,",
                                    "scale_of_tile(\n                    a_scales + a_k,"),
    "the last group is missing": ("range(tl.cdiv(K, 128))", "range(K // 128)"),
    "a row too many is stored": ("(rows < M)", "(rows <= M)"),
    "a row too few is stored": ("(rows < M)", "(rows < M - 1)"),
    "the last column is not stored": ("(cols < N)", "(cols < N - 1)"),
    "only the first tile of a program": ("tiles_m * tiles_n, tl.num_programs(0)",
                                         "tl.num_programs(0), tl.num_programs(0)"),
    "the parts read one part of b": ("b_desc.load([first, ", "b_desc.load([n, "),
    "out is overwritten": ("if ADD:", "if False:"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_seen(bug, device):
    if device != "cpu":
        pytest.skip("NOT RUN: planted in the interpreter")
    with mutated(fp8_matmul, *BUGS[bug]) as copy, pytest.raises(AssertionError):
        check(copy)


SHARED_BUGS = {
    "a's scale for all": ("mask=rows < n_rows", "mask=rows < 1"),
    "the scale of b's first block": ("+ n // B_GROUP", "+ 0 * n"),
    "rows of the next tile": ("return first + inside % height,", "return first,"),
}


@pytest.mark.parametrize("bug", SHARED_BUGS)
def test_planted_bug_in_what_is_shared_is_seen(bug, device, monkeypatch):
    if device != "cpu":
        pytest.skip("NOT RUN: planted in the interpreter")
    with mutated(tiles, *SHARED_BUGS[bug]) as copy:
        for name in ("scale_of_tile", "place", "operand"):
            monkeypatch.setattr(fp8_matmul, name, getattr(copy, name))
        with pytest.raises(AssertionError):  # noqa: PT012  # whichever of the two sees it
            check(fp8_matmul)
            test_every_weight_block_has_its_scale(device)


def test_every_weight_block_has_its_scale(device):
    a, b = draw(130, 100, 1, device), draw(400, 100, 128, device, seed=1)
    assert error(scaled_matmul(a, b), exact(a, b)) < tolerance()


# Ring 2: what the compiler makes of it


def launch(config: dict | None = None, **call) -> None:
    with using(Wanted(KERNEL, config) if config else None):
        on_meta(**call)


def _call(m, n, k, groups, dtype, add=False, config=None) -> dict:
    a_group, b_group = groups
    return {"m": m, "n": n, "k": k, "a_group": a_group, "b_group": b_group, "dtype": dtype,
            "add": add, "config": config._asdict() if config else None}  # fmt: skip


def _calls():
    """Yield every candidate with every kind of memory that V3's products have.

    What the compiler sees of a size is whether 16 divides it: K / 128, a stride of the weight's
    scales, is 56 or 128; all other sizes of V3 look alike.
    """
    for config in CANDIDATES:
        for (n, k), dtype in zip(
            ((2112, 7168), (7168, 16384)), ("bfloat16", "float32"), strict=True
        ):
            yield config, _call(4096, n, k, (1, 128), dtype, config=config)
        if fp8_matmul.in_registers(config, 1):
            for n, add in ((7168, True), (16384, False)):
                yield config, _call(7168, n, 4096, (1, 1), "float32", add, config)


@pytest.mark.slow
def test_hopper_runs_every_candidate_from_registers():
    """No spills, wgmma of FP8, bulk loads, and as many programs on a multiprocessor as it says."""
    cases = list(_calls())
    compiled = compile_calls("test_kernel_fp8_matmul", "launch", [call for _, call in cases])
    for (config, call), launches in zip(cases, compiled, strict=True):
        (kernel,) = launches
        found = kernel.instructions
        assert kernel.kernel == "prefill", call
        assert kernel.spilled_bytes == 0, (call, kernel)
        assert found.get("QGMMA"), (call, kernel)
        assert found.get("UTMALDG"), (call, kernel)
        assert not found.keys() & {"HMMA", "HGMMA", "QMMA", "STL", "LDL"}, (call, kernel)
        assert bool(found.get("UTMASTG")) != call["add"], (call, kernel)
        assert kernel.programs_on_an_sm >= config.programs, (call, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [key for key in CARDS if key != HOPPER], ids=str)
def test_other_cards_compile(capability):
    """It fits, and nothing that was spilled is read in the loop."""
    calls = [
        _call(4096, 7168, 2048, (1, 128), "bfloat16"),
        _call(4096, 7168, 2048, (1, 1), "float32", add=True),
    ]
    for (kernel,) in compile_calls("test_kernel_fp8_matmul", "launch", calls, capability):
        found = kernel.instructions
        assert not found.get("LDL"), kernel  # sm_120 keeps 8 bytes on the stack and never looks
        assert kernel.spilled_bytes <= 8, kernel
        wanted = {8: "HMMA" if capability == (8, 0) else "QMMA", 10: "UTCQMMA", 12: "QMMA"}
        assert found.get(wanted[capability[0]]), kernel


# Ring 3: on a card


def close_on_a_card(y, a, b) -> None:
    reference = exact(a, b)
    assert unlike(y, reference) < COSINE
    assert error(y, reference) < ON_A_CARD + ROUNDED[y.dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("m", [129, 4096])
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_v3_shapes_on_a_card(weight, m):
    n, k = weight
    x, w = torch.randn(m, k, device="cuda"), torch.randn(n, k, device="cuda")
    a, b = among_nan(quantise(x, (1, 128))), among_nan(quantise(w, (128, 128)))
    y = product()(a, b, torch.bfloat16)
    close_on_a_card(y, a, b)
    assert unlike(y, x @ w.mT) < QUANTISED


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GRADIENTS, ids=str)
@pytest.mark.parametrize("tokens", [4096, 4001])
def test_v3_weight_gradients_on_a_card(shape, tokens):
    (m, n), k = shape, tokens
    a, b = (among_nan(quantise(torch.randn(rows, k, device="cuda"), (1, 128))) for rows in (m, n))
    before = torch.randn(m, n, device="cuda")
    out = before.clone()
    scaled_matmul(a, b, out=out)
    close_on_a_card(out - before, a, b)
    assert error(out, scaled_matmul(a, b).double() + before) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_every_candidate_on_a_card(config, groups):
    """A ragged shape of many rounds; what overflows registers is slow, not wrong."""
    a, b = draw(3001, 1100, groups[0], "cuda"), draw(2111, 1100, groups[1], "cuda", seed=1)
    with using(config):
        for dtype in DTYPES if groups == (1, 128) else [torch.bfloat16]:
            close_on_a_card(product()(a, b, dtype), a, b)
            whole = Scaled(b.values[:2048], b.scale[: 2048 // b.group[0]], b.group)
            close_on_a_card(product()(a, whole, dtype), a, whole)  # stored through a descriptor
        if groups == (1, 1):
            out = torch.ones(3001, 2111, device="cuda")
            close_on_a_card(scaled_matmul(a, b, out=out) - 1, a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [(1, 128), (1, 1)], ids=str)
def test_twenty_runs_on_a_card_are_bitwise_equal(groups):
    a, b = draw(4096, 7168, groups[0], "cuda"), draw(2112, 7168, groups[1], "cuda", seed=1)
    bitwise_equal(partial(scaled_matmul, a, b), times=20)


@pytest.mark.gpu
def test_a_row_is_the_same_in_every_batch_of_a_config_on_a_card():
    a, b = draw(1000, 7168, 1, "cuda"), draw(2112, 7168, 128, "cuda", seed=1)
    part = Scaled(a.values[77:300], a.scale[77:300], a.group)
    for config in CONFIGS:
        with using(config):
            assert torch.equal(scaled_matmul(part, b), scaled_matmul(a, b)[77:300])


@pytest.mark.gpu
def test_graph_is_captured_and_replayed_with_other_numbers():
    a, b = draw(300, 1000, 1, "cuda"), draw(264, 1000, 128, "cuda", seed=1)
    scaled_matmul(a, b, torch.bfloat16)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = scaled_matmul(a, b, torch.bfloat16)
    other = draw(300, 1000, 1, "cuda", seed=2)
    a.values.view(torch.uint8).copy_(other.values.view(torch.uint8))
    a.scale.copy_(other.scale)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, scaled_matmul(other, b, torch.bfloat16))


@pytest.mark.gpu
def test_chain_without_promotion_is_seen_on_a_card():
    """One accumulator for all of K, scales of one: the tensor core's 14 bits lose the sum's end."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("NOT RUN: about the tensor cores of Hopper; newer ones may add in FP32")

    def check_chain(module) -> None:
        values = torch.rand(256, 16384, device="cuda").add(1).to(torch.float8_e4m3fn)
        ones = torch.ones(256, 128, device="cuda")
        a = Scaled(values, ones, (1, 128))
        assert error(module.scaled_matmul(a, a), exact(a, a)) < ON_A_CARD

    chained = ("longer += (sums[part] + tl.dot(a, b.T) * scale,)",
               "longer += (tl.dot(a, b.T, sums[part]),)")  # fmt: skip
    assert_caught(fp8_matmul, check_chain, *chained)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [32768, 32767])  # stored by descriptor, and by pointers
def test_output_beyond_two_to_the_31_on_a_card(n):
    """The last of 65664 rows lie 2^31 numbers and more from the first."""
    m = 65664
    if torch.cuda.mem_get_info()[0] < 2 * prod((m, n)) + 2**30:
        pytest.skip("NOT RUN: too little memory for 2^31 numbers in BF16")
    a, b = draw(m, 128, 1, "cuda"), draw(n, 128, 128, "cuda", seed=1)
    y = scaled_matmul(a, b, torch.bfloat16)
    tail = Scaled(a.values[-256:], a.scale[-256:], a.group)
    close_on_a_card(y[-256:], tail, b)
