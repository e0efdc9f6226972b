"""Slots times their expert's matrix: equal to a loop over slots, whatever stands in empty ones."""

import pytest
import torch
from compiled import CARDS, HOPPER, compile_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_experts import among_experts, blocks, draw_ids, is_empty, spoil
from kernel_inputs import (
    POISON,
    assert_caught,
    bits,
    bitwise_equal,
    laid_out,
    lengths,
    poisoned,
    poisoned_memory,
)
from kernel_products import (
    COSINE,
    ON_A_CARD,
    ROUNDED,
    Wanted,
    error,
    spread,
    tolerance,
    unlike,
    using,
)
from minids_kernels import cards, moe_down
from minids_kernels.cards import Card
from minids_kernels.moe_down import CANDIDATES, Down, fits, rule_of_thumb
from minids_kernels.slots import Slots, n_slots
from torch import Tensor

from minids.experts.slots import align
from minids.formats.groups import BLOCK, TILE, Scaled, quantise

pytestmark = pytest.mark.usefixtures("interpreter")

KERNEL = "moe_down.Down"
SIZES = (16, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ["fp8", *DTYPES]


class Product:
    """Operands, NaN in empty slots, and what a loop over the others gives, in FP64."""

    def __init__(self, shape, size: int, kind, load="any", device="cpu", turned=False):
        tokens, experts, k, N, K = shape
        generator = torch.Generator().manual_seed(4)
        self.ids = draw_ids(load, tokens, experts, k, device)
        self.slots = align(self.ids, experts, size)
        a = torch.randn(len(self.slots.visit), K, generator=generator).to(device)
        w = torch.randn(experts, N, K, generator=generator).to(device)
        self.filled = ~is_empty(self.slots)
        if kind == "fp8":
            self.a, self.w = quantise(a, TILE), blocks(w)
            wide = self.a.values.double() * spread(self.a)
            pairs = zip(self.w.values, self.w.scale, strict=True)
            wide_w = torch.stack([v.double() * spread(Scaled(v, s, BLOCK)) for v, s in pairs])
            spoil(self.a.values, ~self.filled)
            spoil(self.a.scale, ~self.filled)
        else:
            self.a, self.w = a.to(kind), w.to(kind)
            wide, wide_w = self.a.double(), self.w.double()
            spoil(self.a, ~self.filled)
        if turned:
            self.w = self.w.mT.contiguous().mT
        owners = self.slots.expert.repeat_interleave(size)[self.filled].tolist()
        rows = zip(owners, wide[self.filled], strict=True)
        self.y = torch.stack([wide_w[e] @ row for e, row in rows])

    def run(self, dtype=torch.float32, module=moe_down) -> Tensor:
        """Return the product, from memory that was full of NaN."""
        dtype = dtype if isinstance(self.a, tuple) else self.a.dtype
        with poisoned_memory():
            return module.rows_by_expert(self.a, self.w, self.slots, dtype)

    def check(self, module=moe_down) -> None:
        y = self.run(module=module)
        assert y[self.filled].isfinite().all()
        assert error(y[self.filled], self.y) < tolerance(y.dtype)
        behind = y[~among_experts(self.slots)]  # nothing was written there
        assert (bits(behind) == POISON[y.dtype][1]).all()


SHAPE = (9, 4, 2, 130, 150)  # tokens, experts, K, N, K of the sum: ragged in both widths
CASES = [(16, kind) for kind in KINDS] + [(size, kind) for size in (64, 128) for kind in KINDS[::2]]


def test_example_by_hand(device):
    """Ones times twos and ones times threes, sixteen of each."""
    slots = align(torch.tensor([[1], [0]], device=device), 2, 16)
    w = torch.stack([torch.full((4, 16), 2.0), torch.full((4, 16), 3.0)]).to(device)
    y = moe_down.rows_by_expert(torch.ones(32, 16, device=device), w, slots, torch.float32)
    assert (y[:16] == 32).all()
    assert (y[16:] == 48).all()


@pytest.mark.parametrize("load", ["any", "all to one", "few of many"])
@pytest.mark.parametrize(("size", "kind"), CASES, ids=str)
def test_equals_loop_over_slots(size, kind, load, device):
    Product(SHAPE, size, kind, load, device).check()


@pytest.mark.parametrize("kind", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 64])
def test_weights_along_either_axis(size, kind, device):
    product = Product((*SHAPE[:3], 136, 152), size, kind, device=device, turned=True)
    assert product.w.stride(1) == 1
    product.check()


@pytest.mark.parametrize(
    "shape", [(1, 5, 1, 64, 64), (1, 3, 3, 40, 300), (40, 2, 2, 16, 16)], ids=str
)
@pytest.mark.parametrize("kind", ["fp8", torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [16, 64])
def test_one_token_and_all_experts(size, kind, shape, device):
    Product(shape, size, kind, device=device).check()


@pytest.mark.slow
@pytest.mark.parametrize("config", CANDIDATES, ids=str)
def test_every_candidate(config, device):
    for size, kind in [(16, "fp8"), (128, "fp8"), (16, torch.bfloat16), (128, torch.bfloat16)]:
        if fits(config, size, 1 if kind == "fp8" else 2):
            with using(Wanted(KERNEL, config._asdict())):
                Product(SHAPE, size, kind, device=device).check()


@settings(max_examples=8)
@given(st.integers(1, 20), lengths(140), lengths(280), st.sampled_from(SIZES), st.booleans())
def test_random_shapes(device, tokens, N, K, size, fp8):
    Product((tokens, 3, 2, N, K), size, "fp8" if fp8 else torch.bfloat16, device=device).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [16, 64])
def test_output_of_fp8_is_rounded_once(size, dtype, device):
    product = Product(SHAPE, size, "fp8", device=device)
    wide = product.run()[product.filled]
    assert torch.equal(product.run(dtype)[product.filled], wide.to(dtype))


@pytest.mark.parametrize("kind", ["fp8", torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "rows 3 apart"])
def test_adds_to_out_in_place(layout, size, kind, device):
    product = Product(SHAPE, size, kind, device=device)
    dtype = torch.float32 if kind == "fp8" else kind
    before = torch.randn(len(product.filled), SHAPE[3], device=device).to(dtype)
    out = laid_out(before, layout)
    found = moe_down.rows_by_expert(product.a, product.w, product.slots, dtype, out)
    assert found is out
    wanted = product.y + before[product.filled].double()
    assert error(out[product.filled], wanted) < tolerance(dtype)
    behind = ~among_experts(product.slots)
    assert torch.equal(out[behind], before[behind])


def test_writes_nothing_beside_out(device):
    product = Product(SHAPE, 16, "fp8", device=device)
    memory = poisoned((len(product.filled), 130), torch.float32, device, strides=(140, 1))
    memory.x.zero_()
    moe_down.rows_by_expert(product.a, product.w, product.slots, torch.float32, memory.x)
    memory.check_outside()


@pytest.mark.parametrize("size", [16, 128])
@pytest.mark.parametrize("kind", ["fp8", torch.bfloat16], ids=str)
def test_a_slots_bits_are_the_same_beside_others(size, kind, device):
    product = Product((20, 2, 1, 40, 140), size, kind, "all to one", device)
    slots = align(product.ids[13:14], 2, size)
    here, there = int(slots.place[0, 0]), int(product.slots.place[13, 0])
    if isinstance(product.a, Tensor):
        alone = product.a.new_full((len(slots.visit), 140), torch.nan)
        alone[here] = product.a[there]
    else:
        values = torch.full((len(slots.visit), 140), 0x7F, dtype=torch.uint8, device=device)
        values[here] = product.a.values.view(torch.uint8)[there]
        scale = product.a.scale[there].expand(len(values), -1)
        alone = Scaled(values.view(torch.float8_e4m3fn), scale, TILE)
    dtype = torch.float32 if kind == "fp8" else kind
    y = moe_down.rows_by_expert(alone, product.w, slots, dtype)
    assert torch.equal(y[here], product.run()[there])


@pytest.mark.parametrize("layout", ["transposed", "rows 3 apart", "not aligned"])
@pytest.mark.parametrize("kind", ["fp8", torch.bfloat16], ids=str)
def test_any_layout(kind, layout, device):
    product = Product(SHAPE, 16, kind, device=device)
    if isinstance(product.a, Tensor):
        product.a, product.w = laid_out(product.a, layout), laid_out(product.w, layout)
    else:
        parts = ((product.a, TILE), (product.w, BLOCK))
        product.a, product.w = (
            Scaled(laid_out(x.values, layout), laid_out(x.scale, layout), group)
            for x, group in parts
        )
    product.check()


def test_offsets_of_weights_past_2_to_the_31(device):
    """Three experts 2^30 codes apart: pages that nobody touches cost no memory."""
    if device != "cpu":
        pytest.skip("NOT RUN: 3 GiB for one number are the interpreter's to find")
    product = Product((5, 3, 1, 16, 128), 16, "fp8")
    apart = torch.empty(2**31 + 2**12, dtype=torch.uint8).view(torch.float8_e4m3fn)
    w = apart.as_strided(product.w.values.shape, (2**30, 128, 1))
    w.view(torch.uint8).copy_(product.w.values.view(torch.uint8))
    product.w = Scaled(w, product.w.scale, BLOCK)
    product.check()


def test_offsets_of_rows_past_2_to_the_31(device):
    """Rows of the output 2^27 numbers apart."""
    if device != "cpu":
        pytest.skip("NOT RUN: 16 GiB for a few numbers are the interpreter's to find")
    product = Product((17, 1, 1, 8, 16), 16, torch.bfloat16)
    rows = len(product.slots.visit)
    apart = torch.empty(2**27 * (rows - 1) + 8, dtype=torch.bfloat16)
    out = apart.as_strided((rows, 8), (2**27, 1)).zero_()
    moe_down.rows_by_expert(product.a, product.w, product.slots, torch.bfloat16, out)
    assert error(out[product.filled], product.y) < tolerance(torch.bfloat16)


def test_without_anything_to_sum(device):
    slots = align(torch.zeros(3, 1, dtype=torch.int64, device=device), 1, 16)
    a, w = torch.ones(len(slots.visit), 0, device=device), torch.ones(1, 4, 0, device=device)
    with poisoned_memory():
        y = moe_down.rows_by_expert(a, w, slots, torch.float32)
    assert (y == 0).all()
    assert (moe_down.rows_by_expert(a, w, slots, torch.float32, y + 1) == 1).all()


@pytest.mark.parametrize("size", [16, 64])
def test_cards_without_fp8_decode_bytes(size, monkeypatch, device):
    product = Product((5, 2, 1, 40, 140), size, "fp8", device=device)
    real = cards.card("a test", product.ids)
    monkeypatch.setattr(cards, "card", lambda *_: real._replace(capability=(8, 0)))
    product.check()


@pytest.mark.parametrize("kind", ["fp8", torch.bfloat16], ids=str)
def test_two_runs_are_bitwise_equal(kind, device):
    product = Product(SHAPE, 16, kind, device=device)
    bitwise_equal(lambda: product.run()[product.filled])


def _refused(**changes):
    product = Product((3, 2, 1, 16, 16), 16, torch.float32)
    given = {"a": product.a, "w": product.w, "slots": product.slots, "dtype": torch.float32}
    return moe_down.rows_by_expert(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"a": torch.ones(48, 17)}, r"a must be \[P, K\] .* got \[48, 17\]"),
        ({"a": torch.ones(16, 16)}, "a row a slot, got 16 and 48"),
        ({"a": torch.ones(48, 16).double()}, "a must be one of .* got torch.float64"),
        ({"w": torch.ones(2, 16, 16).half()}, "must be torch.float32, got .* torch.float16"),
        ({"w": torch.ones(3, 16, 16)}, "as many experts, got 2 and 3"),
        ({"dtype": torch.int32}, "dtype must be one of"),
        ({"a": quantise(torch.ones(48, 16), TILE)}, "both be FP8, or neither"),
        ({"a": quantise(torch.ones(48, 16), BLOCK), "w": quantise(torch.ones(2, 16, 16), BLOCK)},
         "scales .* by"),
        ({"out": torch.ones(48, 17)}, r"out must be \(48, 16\) .* got \(48, 17\)"),
        ({"out": torch.ones(48, 16).half()}, "out must be .* torch.float16"),
    ],
)  # fmt: skip
def test_errors_name_the_value(changes, words):
    with pytest.raises(ValueError, match="rows_by_expert: .*" + words):
        _refused(**changes)


def test_a_config_that_does_not_fit_is_refused():
    with (
        using(Wanted(KERNEL, CANDIDATES[0]._asdict())),
        pytest.raises(ValueError, match="16 slots"),
    ):
        _refused()


# Planted bugs


def check(module) -> None:
    for size, kind, turned in [(16, "fp8", False), (64, "fp8", False), (16, torch.bfloat16, False),
                               (64, torch.bfloat16, True)]:  # fmt: skip
        product = Product((5, 3, 2, 144, 152), size, kind, "few of many", turned=turned)
        product.check(module)
        dtype = torch.float32 if kind == "fp8" else kind
        out = torch.ones(len(product.filled), 144, dtype=dtype)
        module.rows_by_expert(product.a, product.w, product.slots, dtype, out)
        assert error(out[product.filled], product.y + 1) < tolerance(dtype)
    Product((5, 3, 2, 24, 24), 64, torch.float32).check(module)  # two tiles of 32 for 64 slots


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("row * BLOCK_M // SIZE", "row"),
        ("w_scale += e.to(tl.int64) * w_e", "w_scale += 0 * w_e"),
        ("a_scale += a_k", "a_scale += 0 * a_k"),
        ("w_scale += w_k", "w_scale += 0 * w_k"),
        ("w_desc.load([e, n,", "w_desc.load([0, n,"),
        ("w_desc.load([e, k * BLOCK_K, n])", "w_desc.load([e, k * BLOCK_K, 0])"),
        ("tl.dot(w, a.T) * scale", "tl.dot(w, a.T)"),
        ("    if e < 0:\n        return\n", "    e = tl.maximum(e, 0)\n"),
        ("range(tl.cdiv(K, BLOCK_K))", "range(K // BLOCK_K)"),
        ("add = out is not None", "add = False"),
    ],
)
def test_planted_bug_is_seen(old, new, device):
    if device != "cpu":
        pytest.skip("NOT RUN: planted in the interpreter")
    assert_caught(moe_down, check, old, new)


# Ring 2: what the compiler makes of it


def launch(
    size: int, kind: str, add: bool = False, turned: bool = False, config: dict | None = None
) -> None:
    """Launch V3's second layer on tensors without memory."""
    E, N, K, tokens, k = 256, 7168, 2048, 4096, 8

    def on_meta(*shape: int, dtype=torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    P, whole = n_slots(tokens * k, E, size), torch.int32
    slots = Slots(on_meta(P, dtype=whole), on_meta(tokens, k, dtype=whole),
                  on_meta(E + 1, dtype=whole), on_meta(P // size, dtype=whole), size)  # fmt: skip
    dtype = torch.bfloat16 if kind == "fp8" else getattr(torch, kind)
    out = on_meta(P, N, dtype=dtype) if add else None
    if kind == "fp8":
        codes = torch.float8_e4m3fn
        a = Scaled(on_meta(P, K, dtype=codes), on_meta(K // 128, P).mT, TILE)
        w = Scaled(on_meta(E, N, K, dtype=codes), on_meta(E, N // 128, K // 128), BLOCK)
    else:
        a = on_meta(P, K, dtype=dtype)
        w = on_meta(E, K, N, dtype=dtype).mT if turned else on_meta(E, N, K, dtype=dtype)
    with using(Wanted(KERNEL, config) if config else None):
        moe_down.rows_by_expert(a, w, slots, dtype, out)


def model(capability) -> Card:
    found = CARDS[capability]
    return Card(found.name, capability, found.n_sm, found.shared_bytes)


def picks(capability) -> list[tuple[Down, dict]]:
    """Return the rule's configs with the launches that they are for."""
    sizes = {"fp8": 1, "bfloat16": 2, "float32": 4}
    return [
        (rule_of_thumb(size, sizes[kind], model(capability)),
         {"size": size, "kind": kind, "add": size == 128, "turned": kind != "fp8" and size == 64})
        for kind in sizes for size in SIZES
    ]  # fmt: skip


def test_rule_of_thumb_gives_candidates_that_fit():
    for capability in CARDS:
        for config, call in picks(capability):
            itemsize = {"fp8": 1, "bfloat16": 2, "float32": 4}[call["kind"]]
            assert config in CANDIDATES
            assert fits(config, call["size"], itemsize)


@pytest.mark.parametrize("kind", ["fp8", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_hopper_runs_from_registers(kind):
    """No spills, wgmma, bulk copies of both operands; small tiles: three programs at a time."""
    calls = [call for _, call in picks(HOPPER) if call["kind"] == kind]
    compiled = compile_calls("test_kernel_moe_down", "launch", calls)
    for call, (kernel,) in zip(calls, compiled, strict=True):
        found = kernel.instructions
        assert kernel.spilled_bytes == 0, (call, kernel)
        assert found.get("QGMMA" if kind == "fp8" else "HGMMA"), (call, kernel)
        assert not found.keys() & {"HMMA", "QMMA", "LDGSTS"}, (call, kernel)
        assert found.get("UTMALDG"), (call, kernel)
        assert found.get("STG.128"), (call, kernel)
        if call["size"] < 128:
            assert kernel.programs_on_an_sm >= 3, (call, kernel)


@pytest.mark.slow
def test_hopper_spills_nothing_in_any_candidate():
    calls = [
        {"size": size, "kind": kind, "config": config._asdict()}
        for config in CANDIDATES
        for size, kind, itemsize in [(16, "fp8", 1), (128, "fp8", 1), (16, "bfloat16", 2),
                                     (128, "bfloat16", 2), (64, "float32", 4)]
        if fits(config, size, itemsize)
    ]  # fmt: skip
    for (kernel,) in compile_calls("test_kernel_moe_down", "launch", calls):
        assert kernel.spilled_bytes == 0, kernel


@pytest.mark.slow
@pytest.mark.parametrize("capability", [key for key in CARDS if key != HOPPER], ids=str)
def test_other_cards_compile(capability):
    """They fit, and no loop reads what was spilled, in the sizes of slots that the card is given.

    Not so on Ampere and Ada, whose descriptors are pointers, one a number: addresses are spilled.
    """
    calls = [call for _, call in picks(capability) if call["size"] != 128]
    wanted = {8: "HMMA" if capability == (8, 0) else "QMMA", 10: "UTCQMMA", 12: "QMMA"}
    for call, (kernel,) in zip(
        calls, compile_calls("test_kernel_moe_down", "launch", calls, capability), strict=True
    ):
        if capability == (10, 0) or (capability == (12, 0) and call["size"] == 64):
            assert not kernel.instructions.get("LDL"), (call, kernel)
            assert kernel.spilled_bytes <= 8, (call, kernel)  # sm_120 keeps 8, and never looks
        if call["kind"] == "fp8":
            assert kernel.instructions.get(wanted[capability[0]]), (call, kernel)


# Ring 3: on a card


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_v3_widths_on_a_card(size, kind):
    product = Product((70, 8, 4, 7168, 2048), size, kind, "few of many", "cuda")
    y = product.run(torch.bfloat16)[product.filled]
    assert unlike(y, product.y) < COSINE
    assert error(y, product.y) < ON_A_CARD + ROUNDED[y.dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_graph_is_captured_and_replayed_with_other_numbers(size):
    product = Product((70, 8, 4, 512, 256), size, "fp8", device="cuda")
    product.run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = moe_down.rows_by_expert(product.a, product.w, product.slots, torch.float32)
    product.a.scale.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y[product.filled], product.run()[product.filled])
