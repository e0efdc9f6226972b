"""Dequantisation in Triton: value times scale, equal to minids.formats.groups bit by bit."""

import re

import pytest
import torch
from compiled import CARDS, HOPPER, compile_calls
from kernel_inputs import (
    LAYOUTS,
    assert_caught,
    bits,
    bitwise_equal,
    is_written,
    laid_out,
    poisoned,
    poisoned_memory,
)
from minids_kernels import cards, configs, fp8_dequantise
from minids_kernels.fp8_dequantise import CANDIDATES, dequantise
from minids_kernels.scaled import Scaled

from minids.formats import groups
from minids.formats.groups import BLOCK, COLUMN, TILE

pytestmark = pytest.mark.usefixtures("interpreter")

GROUPS = (TILE, BLOCK, COLUMN)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPE = (131, 133)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Say whether two tensors hold the same bits; a NaN has no sign and no digits."""
    a, b = a.cpu().contiguous(), b.cpu().contiguous()
    nan = a.isnan()
    return (
        (a.shape, a.dtype) == (b.shape, b.dtype)
        and torch.equal(nan, b.isnan())
        and bool(((bits(a) == bits(b)) | nan).all())
    )


def draw(shape, group, device="cpu", values=torch.float8_e4m3fn) -> Scaled:
    """Return every code, both NaN too, and scales from subnormal ones to infinity and NaN."""
    n = torch.Size(shape).numel()
    codes = torch.arange(n).to(torch.uint8).view(torch.float8_e4m3fn).view(shape)
    scale = torch.randn(groups.scale_shape(shape, group)).abs()
    scale.view(-1)[::5] = torch.tensor([1e-40, 1e38, torch.inf, torch.nan, 2.0**-20]).repeat(
        len(scale.view(-1)[::5]) // 5 + 1
    )[: len(scale.view(-1)[::5])]
    return Scaled(codes.to(values).to(device), scale.to(device), group)


def reference(x: Scaled, dtype=torch.float32) -> torch.Tensor:
    return groups.dequantise(groups.Scaled(x.values.cpu(), x.scale.cpu(), x.group), dtype)


def test_example_by_hand():
    """A tile's codes times 2, the ragged one's times 3."""
    values = torch.tensor([[0.5, -448.0] * 65]).to(torch.float8_e4m3fn)
    y = dequantise(Scaled(values, torch.tensor([[2.0, 3.0]]), TILE))
    assert y[0, :128].tolist() == [1.0, -896.0] * 64
    assert y[0, 128:].tolist() == [1.5, -1344.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_equals_reference(group, dtype, device):
    x = draw(SHAPE, group, device)
    assert same_bits(dequantise(x, dtype), reference(x, dtype))


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_bf16_values_of_a_cache(group, device):
    x = draw(SHAPE, group, device, torch.bfloat16)
    assert same_bits(dequantise(x), reference(x))


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_scales_lie_anyhow(layout, group, device):
    """Beyond the edges lies NaN, among the scales too."""
    x = draw(SHAPE, group, device)
    apart = Scaled(laid_out(x.values, layout), laid_out(x.scale, layout), group)
    assert same_bits(dequantise(apart), reference(x))
    turned = dequantise(apart.mT)
    assert same_bits(turned, reference(x).mT)


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_batches_are_matrices_of_their_own(group, device):
    x = draw((2, 3, 5, 140), group, device)
    assert same_bits(dequantise(x), reference(x))
    moved = Scaled(x.values.transpose(0, 1), x.scale.transpose(0, 1), group)
    out = torch.empty(2, 3, 5, 140, device=device).transpose(0, 1)
    assert dequantise(moved, out=out) is out
    assert same_bits(out, reference(x).transpose(0, 1))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "rows 3 apart"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_is_filled_and_nothing_else(dtype, layout, device):
    x = draw(SHAPE, BLOCK, device)
    memory = poisoned(SHAPE, dtype, device, LAYOUTS[layout](SHAPE)[0])
    assert dequantise(x, dtype, memory.x) is memory.x
    memory.check()
    assert same_bits(memory.x, reference(x, dtype))
    with poisoned_memory():
        y = dequantise(x, dtype)
    assert is_written(y)


def test_result_lies_as_the_values_do(device):
    x = draw(SHAPE, TILE, device)
    assert dequantise(x).stride() == (133, 1)
    assert dequantise(x.mT).stride() == (1, 133)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 7)], ids=str)
def test_nothing_is_dequantised_to_nothing(shape, device):
    values = torch.empty(shape, device=device).to(torch.float8_e4m3fn)
    y = dequantise(
        Scaled(values, torch.empty(groups.scale_shape(shape, TILE), device=device), TILE)
    )
    assert y.shape == shape


def test_cards_without_fp8_read_the_same_bytes(device, monkeypatch):
    ampere = cards.INTERPRETER._replace(name="Ampere", capability=(8, 0))
    monkeypatch.setattr(cards, "card", lambda kernel, *tensors: ampere)
    for group in GROUPS:
        x = draw(SHAPE, group, device)
        assert same_bits(dequantise(x), reference(x)), group


@pytest.mark.parametrize("config", CANDIDATES, ids=str)
def test_every_candidate_equals_reference(config, device):
    with configs.trying("fp8_dequantise.Stream", config._asdict()) as trial:
        for group in GROUPS:
            x = draw((37, 133), group, device)
            assert same_bits(dequantise(x), reference(x)), group
    assert len(trial.asked) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group": (64, 64)}, "dequantise: the group of x must be one of .*, got (64, 64)"),
        ({"values": torch.ones(131, 133)}, "dequantise: values must be .*, got torch.float32"),
        ({"scale": torch.ones(131, 1)}, "dequantise: scales .* must be [131, 2], got [131, 1]"),
        ({"dtype": torch.float64}, "dequantise: dtype must be .*, got torch.float64"),
        ({"out": torch.ones(131, 132)}, "dequantise: out must be [131, 133] of .*, got [131, 132]"),
        ({"out": torch.ones(SHAPE).half()}, "dequantise: out must be .*float32, got .*float16"),
    ],
    ids=["group", "values", "scale", "dtype", "shape of out", "dtype of out"],
)
def test_bad_input_is_named(change, words):
    x = draw(SHAPE, TILE)
    x = x._replace(**{key: value for key, value in change.items() if key in x._fields})
    rest = {key: value for key, value in change.items() if key not in x._fields}
    pattern = ".*".join(re.escape(part) for part in words.split(".*"))
    with pytest.raises(ValueError, match=pattern):
        dequantise(x, **rest)


def check(module) -> None:
    """Compare what a copy of the kernel's file does with the reference."""
    for group in GROUPS:
        x = draw((2, *SHAPE), group)
        apart = Scaled(x.values, laid_out(x.scale, "rows 3 apart"), group)
        memory = poisoned((2, *SHAPE), torch.float32, "cpu")
        module.dequantise(apart, out=memory.x)
        memory.check()
        assert same_bits(memory.x, reference(x)), group


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(j * scale_j)", "((j + 1) * scale_j)"),
        ("i * BLOCK_M // GROUP_M", "i * BLOCK_M // (2 * GROUP_M)"),
        ("inside = (m < M)", "inside = (m < M - 1)"),
        ("(k < K)[None, :]\n    at = values", "(k < K - 1)[None, :]\n    at = values"),
        ("scale += batch * scale_n", "scale += 0 * scale_n"),
        ("m // GROUP_M * scale_g", "m // 128 * scale_g"),
    ],
    ids=["neighbour", "row of groups", "last row", "last column", "matrix", "wrong axis"],
)
def test_planted_bug_is_caught(old, new):
    if not cards.interpreted():
        pytest.skip("NOT RUN: bugs are planted where the interpreter runs, on CPU")
    assert_caught(fp8_dequantise, check, old, new)


# What the compiler makes of it for Hopper, and that it compiles for other cards


def launch(shape, group, dtype, values="float8_e4m3fn", config=None):
    """Call the wrapper as on a GPU, on memory that is not there."""
    group = tuple(group)
    codes = torch.empty(shape, dtype=getattr(torch, values), device="meta")
    scale = torch.empty(groups.scale_shape(shape, group), device="meta")
    if group == TILE:
        scale = scale.mT.contiguous().mT
    x, dtype = Scaled(codes, scale, group), getattr(torch, dtype)
    if config is None:
        dequantise(x, dtype)
        return
    with configs.trying("fp8_dequantise.Stream", config):
        dequantise(x, dtype)


COMPILED = [
    {"shape": (4096, 7168), "group": group, "dtype": dtype, "config": config._asdict()}
    for config in CANDIDATES
    for group in GROUPS
    for dtype in ("bfloat16", "float32")
]
BY_RULE = [
    {"shape": shape, "group": group, "dtype": "bfloat16"}
    for shape in ((4096, 18432), (7168, 18432), (4096, 576))
    for group in GROUPS
]
CACHE = [{"shape": (4096, 7168), "group": TILE, "dtype": "float32", "values": "bfloat16"}]


@pytest.fixture(scope="module")
def compiled():
    calls = [*COMPILED, *BY_RULE, *CACHE]
    return list(
        zip(calls, compile_calls("test_kernel_fp8_dequantise", "launch", calls), strict=True)
    )


def test_nothing_spills_and_nothing_is_approximate(compiled):
    for call, kernels in compiled:
        for kernel in kernels:
            assert kernel.spilled_bytes == 0, call
            assert kernel.registers <= 128, call
            assert not kernel.inexact, call


def test_memory_is_moved_16_bytes_at_a_time(compiled):
    for call, kernels in compiled:
        for kernel in kernels:
            assert kernel.instructions.get("LDG.128"), call
            assert kernel.instructions.get("STG.128"), call
            assert not {"STG", "STG.64"} & set(kernel.instructions), call


@pytest.mark.slow
@pytest.mark.parametrize("capability", [card for card in CARDS if card != HOPPER], ids=str)
def test_compiles_for_other_cards(capability):
    calls = [call for call in BY_RULE if call["shape"] == (4096, 18432)]
    for kernels in compile_calls("test_kernel_fp8_dequantise", "launch", calls, capability):
        assert all(kernel.spilled_bytes == 0 for kernel in kernels)


# What only a GPU can show


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_large_matrices_equal_reference(group):
    for dtype in DTYPES:
        x = draw((1030, 7168), group, "cuda")
        assert same_bits(dequantise(x, dtype), reference(x, dtype))
        bitwise_equal(lambda x=x, dtype=dtype: dequantise(x, dtype), times=20)


@pytest.mark.gpu
def test_is_captured_in_a_graph_and_replayed_with_new_numbers():
    x, other = draw((300, 1000), BLOCK, "cuda"), draw((300, 1000), BLOCK, "cuda")
    dequantise(x)  # compiles, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dequantise(x)
    x.scale.copy_(other.scale.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(y, reference(x))


@pytest.mark.gpu
def test_offsets_pass_two_billion():
    rows, cols = 2**31 // 7168 + 300, 7168
    needed = 4 * rows * cols
    free, _ = torch.cuda.mem_get_info()
    if free < 2 * needed:
        pytest.skip(f"NOT RUN: needs {2 * needed / 2**30:.0f} GiB of free memory on the GPU")
    values = torch.zeros(rows, cols, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    scale = torch.ones(groups.scale_shape((rows, cols), TILE), device="cuda")
    last = draw((200, cols), TILE, "cuda")
    values[-200:].view(torch.uint8).copy_(last.values.view(torch.uint8))
    scale[-200:] = last.scale
    y = dequantise(Scaled(values, scale, TILE), torch.bfloat16)
    assert same_bits(y[-200:], reference(last, torch.bfloat16))
