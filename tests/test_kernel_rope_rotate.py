"""RoPE in Triton: the bits of torch's complex product, in any memory, and back by the conjugate."""

import re

import pytest
import torch
from compiled import CARDS, HOPPER, compile_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import (
    LAYOUTS,
    assert_caught,
    bits,
    bitwise_equal,
    gradients,
    is_written,
    laid_out,
    poisoned,
    poisoned_memory,
)
from kernel_products import ROUNDED
from minids_kernels import cards, configs, rope_rotate
from minids_kernels.rope_rotate import CANDIDATES, rotate, rotate_both

from minids import rope

pytestmark = pytest.mark.usefixtures("interpreter")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# two products and their sum round by half a digit each, of FP32 and of the larger product
SUMMED = 3 * 2.0**-24


def draw(*shape: int, dtype=torch.float32, device="cpu", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def angles(B: int, T: int, pairs: int, device="cpu") -> torch.Tensor:
    """Return unit phases of random angles."""
    return torch.polar(torch.ones(B, T, pairs), 100 * draw(B, T, pairs, seed=1)).to(device)


def turned(x: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    """Return the product pair by pair: every step rounded to FP32, then to the dtype of x."""
    c, s = (part if x.ndim == 3 else part[:, :, None] for part in (phase.real, phase.imag))
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    y = torch.empty_like(x, dtype=torch.float32)
    y[..., 0::2] = even * c - odd * s
    y[..., 1::2] = even * s + odd * c
    return y.to(x.dtype)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Say whether two tensors hold the same bits; a NaN has no digits."""
    a, b = a.cpu().contiguous(), b.cpu().contiguous()
    same = bits(a) == bits(b)
    return a.shape == b.shape and bool((same | (a.isnan() & b.isnan())).all())


# Against the reference


def test_example_by_hand(device):
    """A quarter turn sends (1, 2) to (-2, 1); half a turn sends (3, 4) to (-3, -4)."""
    phase = torch.tensor([[[1j, -1.0]]], dtype=torch.complex64, device=device)
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], device=device)
    assert rotate(x, phase).tolist() == [[[-2.0, 1.0, -3.0, -4.0]]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 64), (2, 5, 3, 64), (1, 1, 128, 16)], ids=str)
def test_equals_reference_bit_by_bit(shape, dtype, device):
    """Of eight pairs torch makes vectors on a CPU: what they give is what the kernel gives."""
    B, T, R = shape[0], shape[1], shape[-1]
    x = draw(*shape, dtype=dtype)
    for phase in (angles(B, T, R // 2), angles(1, T, R // 2)):
        y = rotate(x.to(device), phase.to(device))
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert equal(y, rope.rotate(x, phase))
        assert equal(y, turned(x, phase))


@settings(max_examples=10)
@given(B=st.integers(1, 3), T=st.integers(1, 70), H=st.integers(1, 5), pairs=st.integers(1, 40))
def test_any_shape(B, T, H, pairs, device):
    x, phase = draw(B, T, H, 2 * pairs, dtype=torch.bfloat16), angles(B, T, pairs)
    y = rotate(x.to(device), phase.to(device)).cpu()
    assert equal(y, turned(x, phase))
    right = rope.rotate(x.double(), phase)  # torch alone decides whether it fuses: not its bits
    size = x.double().unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)
    limit = SUMMED * size + ROUNDED[x.dtype] * right.abs()
    assert ((y.double() - right).abs() <= limit).all()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, in_place, device):
    for shape in ((2, 5, 24), (2, 5, 3, 24)):
        x, phase = draw(*shape, dtype=torch.bfloat16), angles(1, 5, 12)
        laid = laid_out(x.to(device), layout)
        y = rotate(laid, phase.to(device), in_place)
        assert (y.data_ptr() == laid.data_ptr()) == in_place
        assert equal(y, turned(x, phase))
        assert equal(laid, turned(x, phase) if in_place else x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_phases_in_any_layout(layout, device):
    x, phase = draw(2, 5, 24), angles(2, 5, 12)
    pairs = laid_out(torch.view_as_real(phase).to(device).flatten(-2), layout)
    if pairs.stride(-1) == 1 and pairs.storage_offset() % 2 == 0 and pairs.stride(1) % 2 == 0:
        held = torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))
        assert equal(rotate(x.to(device), held), turned(x, phase))
    apart = phase.to(device).transpose(1, 2).contiguous().transpose(1, 2)
    assert equal(rotate(x.to(device), apart), turned(x, phase))
    lazily = phase.to(device).conj()
    assert lazily.is_conj()
    assert equal(rotate(x.to(device), lazily), turned(x, phase.conj().resolve_conj()))


def test_in_place_only_the_slice_is_written(device):
    """The last channels of each head turn; the others, and what lies around, stay."""
    memory = poisoned((2, 5, 3, 8), torch.float32, device, (600, 120, 40, 1))
    x, phase = draw(2, 5, 3, 8), angles(2, 5, 4)
    memory.x.copy_(x)
    rotate(memory.x, phase.to(device), in_place=True)
    memory.check()
    assert equal(memory.x, turned(x, phase))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_and_their_key_in_one_launch(dtype, device):
    q, latent = draw(2, 37, 5, 48, dtype=dtype), draw(2, 37, 40, dtype=dtype, seed=2)
    phase = angles(2, 37, 12)
    there = q.to(device), latent.to(device)
    rotate_both(there[0][..., 24:], there[1][..., 16:], phase.to(device))
    q[..., 24:], latent[..., 16:] = turned(q[..., 24:], phase), turned(latent[..., 16:], phase)
    assert equal(there[0], q)
    assert equal(there[1], latent)


def test_infinities_and_nan_stay_in_their_pair(device):
    x, phase = draw(1, 3, 16), angles(1, 3, 8)
    x[0, 1, 4], x[0, 1, 9], x[0, 2, 0], x[0, 2, 2:4] = torch.inf, torch.nan, 3e38, 1e-44
    y = rotate(x.to(device), phase.to(device)).cpu()
    assert equal(y, turned(x, phase))
    lost = (~y.isfinite()).nonzero().tolist()
    assert all(place in ([0, 1, 4], [0, 1, 5], [0, 1, 8], [0, 1, 9]) for place in lost)
    zeros = torch.tensor([[[0.0, -0.0]]], device=device)
    one = torch.ones(1, 1, 1, dtype=torch.complex64, device=device)
    assert equal(rotate(zeros, one), turned(zeros.cpu(), one.cpu()))


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 4, 8), (2, 3, 0, 8)], ids=str)
def test_nothing_turns_to_nothing(shape, device):
    phase = angles(max(shape[0], 1), shape[1], 4, device)[: shape[0] or None]
    x = torch.empty(shape, device=device)
    assert rotate(x, phase).shape == shape
    assert rotate(x, phase, in_place=True) is not None


def test_every_number_is_written(device):
    x, phase = draw(2, 70, 3, 24, dtype=torch.bfloat16, device=device), angles(1, 70, 12, device)
    with poisoned_memory():
        assert is_written(rotate(x, phase))


def test_a_row_has_the_same_bits_in_every_batch(device):
    x, phase = draw(3, 40, 2, 24, device=device), angles(3, 40, 12, device)
    bitwise_equal(lambda: rotate(x, phase))
    assert equal(rotate(x, phase)[1:2, 7:], rotate(x[1:2, 7:], phase[1:2, 7:]))


@pytest.mark.parametrize("config", CANDIDATES, ids=str)
def test_every_candidate_turns_alike(config, device):
    x, phase = draw(1, 150, 3, 24), angles(1, 150, 12)
    with configs.trying("rope_rotate.Rows", config._asdict()) as trial:
        assert equal(rotate(x.to(device), phase.to(device)), turned(x, phase))
    assert trial.asked == [("rope_rotate.Rows", (450, 24, 4))]


def test_launches_by_the_rule_do_not_ask_the_table_in_vain(device):
    """Both tensors of one launch are one entry, by the first's rows."""
    q, k = draw(1, 9, 2, 8, device=device), draw(1, 9, 8, device=device)
    with configs.trying("", None) as trial:
        rotate_both(q, k, angles(1, 9, 4, device))
    assert trial.asked == [("rope_rotate.Rows", (18, 8, 4))]


# Gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_that_of_a_product_with_a_rotation(dtype, device):
    x, phase = draw(2, 9, 3, 24, dtype=dtype), angles(2, 9, 12)
    (found,) = gradients(lambda x: rotate(x, phase.to(device)), x.to(device))
    (right,) = gradients(lambda x: by_matrix(x, phase), x.double())
    assert found.dtype == dtype
    size = right.unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)
    gap = (found.cpu().double() - right).abs()
    assert (gap <= SUMMED * size + ROUNDED[dtype] * right.abs()).all()


def by_matrix(x: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    """Turn by a 2 x 2 matrix for each pair: FP64, and no complex number."""
    c, s = phase.real.double(), phase.imag.double()
    matrix = torch.stack((torch.stack((c, -s), -1), torch.stack((s, c), -1)), -2)
    pairs = x.unflatten(-1, (-1, 2))[..., None]
    return (matrix[:, :, None] @ pairs)[..., 0].flatten(-2)


def test_gradient_reaches_what_was_turned_in_place(device):
    """A part of a tensor that autograd made: what is beside it keeps its own gradient."""
    x, phase = draw(1, 5, 2, 24, device=device), angles(1, 5, 4, device)

    def turn(x):
        y = 1.0 * x
        part = y[..., 16:]
        assert rotate(part, phase, in_place=True).data_ptr() == part.data_ptr()
        return y

    def beside(x):
        return torch.cat((x[..., :16], by_matrix(x[..., 16:], phase.cpu())), -1)

    (found,), (right,) = gradients(turn, x), gradients(beside, x.cpu().double())
    torch.testing.assert_close(found.cpu().double(), right, rtol=0, atol=4 * SUMMED)


def test_a_leaf_is_not_turned_in_place(device):
    x = draw(1, 2, 8, device=device).requires_grad_()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        rotate(x, angles(1, 2, 4, device), in_place=True)
    with torch.no_grad():
        assert rotate(x, angles(1, 2, 4, device), in_place=True) is not None


def test_gradients_have_any_layout(device):
    """The gradient that comes in is a spread number, or lies across."""
    x = draw(2, 5, 3, 24, device=device).requires_grad_()
    phase = angles(2, 5, 12, device)
    rotate(x, phase).sum().backward()
    right = turned(torch.ones(2, 5, 3, 24), phase.conj().resolve_conj().cpu())
    assert equal(x.grad, right)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, p: rotate(x.double(), p), "rotate: x must be one of .*, got torch.float64"),
        (lambda x, p: rotate(x[0], p), "rotate: x must be [B, T, R] or .*, got [3, 8]"),
        (lambda x, p: rotate(x[..., :7], p), "rotate: x must be .*, R even .*, got [2, 3, 7]"),
        (lambda x, p: rotate(x, p.real), "rotate: phase must be complex64, got torch.float32"),
        (lambda x, p: rotate(x, p[:, :2]), "rotate: phase must be [2, 3, 4], .* got [2, 2, 4]"),
        (lambda x, p: rotate(x, p[..., :1]), "rotate: phase must be [2, 3, 4], .* got [2, 3, 1]"),
        (lambda x, p: rotate(x[:1].expand(2, -1, -1), p, True), "rotate: x repeats numbers"),
        (
            lambda x, p: rotate(x[:1, :1, None].expand(1, 1, 2**30 + 1, 8), p[:1, :1]),
            "rotate: a batch has at most 1073741824 rows",
        ),
        (lambda x, p: rotate_both(x[:, :, None], x.half(), p), "rotate_both: both must .*float16"),
        (
            lambda x, p: rotate_both(x[:, :, None].requires_grad_(), x, p),
            "rotate_both: it has no gradients: call rotate",
        ),
    ],
)
def test_bad_input_is_named(call, words, device):
    pattern = ".*".join(re.escape(part) for part in words.split(".*"))
    with pytest.raises(ValueError, match=pattern):
        call(torch.ones(2, 3, 8, device=device), angles(2, 3, 4, device))


# Bugs that the tests above would see


def check(module) -> None:
    """Compare what a copy of the kernel's file does with the formula."""
    x, phase = draw(2, 45, 3, 24), angles(2, 45, 12)
    laid = laid_out(x, "rows 3 apart")
    assert equal(module.rotate(laid, phase), turned(x, phase))
    assert equal(laid, x)
    (found,) = gradients(lambda x: module.rotate(x, phase), x)
    (right,) = gradients(lambda x: by_matrix(x, phase), x.double())
    assert (found.double() - right).abs().max() < 1e-5  # digits are of no concern here
    q, k = x.clone(), x[:, :, 0].clone()
    module.rotate_both(q, k, phase)
    assert equal(q, turned(x, phase))
    assert equal(k, turned(x[:, :, 0], phase))
    one = angles(1, 45, 12)
    assert equal(module.rotate(x, one), turned(x, one))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a * c - b * s, a * s + b * c", "a * c - b * s, b * c - a * s"),
        ("(x.shape[0], x.shape[1] // 2, 2)))", "(x.shape[0], 2, x.shape[1] // 2)).trans(0, 2, 1))"),
        ("        s = -s", "        s = s"),
        ("t, h = row // H, row % H", "t, h = row // H, row * 0"),
        ("(r < R)\n", "(r < R - 1)\n"),
        ("inside = (t < T)", "inside = (t < T - 1)"),
        ("at_y = y2 + b * y2_b", "at_y = y + b * y2_b"),
        ("(i - tiles) * BLOCK_M", "i * BLOCK_M"),
        ("phase + b * p_b, t, T, x_r", "phase, t, T, x_r"),
        (".expand(B, T, R // 2, 2)", ""),
    ],
    ids=["sign", "halves", "back", "head", "last pair", "last row", "key", "key's rows", "batch",
         "one phase"],
)  # fmt: skip
def test_planted_bug_is_caught(old, new):
    if not cards.interpreted():
        pytest.skip("NOT RUN: bugs are planted where the interpreter runs, on CPU")
    assert_caught(rope_rotate, check, old, new)


# What the compiler makes of it for Hopper, and that it compiles for other cards


def launch(shape, dtype, both=False, config=None):
    """Turn parts of a query and of a latent as on a GPU, on memory that is not there."""
    (B, T, H, R), kind = shape, getattr(torch, dtype)
    q = torch.empty(B, T, H, 128 + R, dtype=kind, device="meta")[..., 128:]
    k = torch.empty(B, T, 512 + R, dtype=kind, device="meta")[..., 512:]
    phase = torch.empty(1, T, R // 2, dtype=torch.complex64, device="meta")

    def turn() -> None:
        if both:
            rotate_both(q, k, phase)
        else:
            rotate(q, phase), rotate(q, phase, in_place=True), rotate(k, phase)

    if config is None:
        turn()
        return
    with configs.trying("rope_rotate.Rows", config):
        turn()


V3 = (1, 4096, 128, 64)
BY_RULE = [{"shape": V3, "dtype": dtype, "both": both} for both in (False, True)
           for dtype in ("bfloat16", "float32")]  # fmt: skip
COMPILED = [*BY_RULE, *({**BY_RULE[0], "config": config._asdict()} for config in CANDIDATES[1:])]


@pytest.fixture(scope="module")
def compiled():
    found = compile_calls("test_kernel_rope_rotate", "launch", COMPILED)
    return list(zip(COMPILED, found, strict=True))


def test_nothing_spills_or_is_exchanged_and_memory_is_moved_16_bytes_at_a_time(compiled):
    """No shared memory: a pair is turned by the thread that read it."""
    for call, kernels in compiled:
        for kernel in kernels:
            assert kernel.spilled_bytes == kernel.shared_bytes == 0, call
            assert set(kernel.instructions) == {"LDG.128", "STG.128"}, call
            assert kernel.registers <= 128, call
            assert kernel.programs_on_an_sm * kernel.warps >= 16, call
            assert not kernel.inexact, call


@pytest.mark.slow
@pytest.mark.parametrize("capability", [card for card in CARDS if card != HOPPER], ids=str)
def test_compiles_for_other_cards(capability):
    for kernels in compile_calls("test_kernel_rope_rotate", "launch", BY_RULE, capability):
        assert all(kernel.spilled_bytes == 0 for kernel in kernels)


# What only a GPU can show


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_v3_shapes_equal_the_reference_of_a_cpu(dtype):
    x, phase = draw(1, 1027, 128, 64, dtype=dtype), angles(1, 1027, 32)
    right = rope.rotate(x, phase)
    q = torch.zeros(1, 1027, 128, 192, dtype=dtype, device="cuda")
    q[..., 128:] = x
    assert equal(rotate(q[..., 128:], phase.cuda()), right)
    assert rotate(q[..., 128:], phase.cuda(), in_place=True) is not None
    assert equal(q[..., 128:], right)
    assert not q[..., :128].any()


@pytest.mark.gpu
def test_twenty_runs_are_bitwise_equal():
    x, phase = draw(2, 2048, 128, 64, dtype=torch.bfloat16, device="cuda"), angles(2, 2048, 32)
    bitwise_equal(lambda: rotate(x, phase.cuda()), times=20)


@pytest.mark.gpu
def test_is_captured_in_a_graph_and_replayed_with_new_numbers():
    q, k = draw(8, 3, 16, 64, device="cuda"), draw(8, 3, 64, device="cuda")
    phase = angles(8, 3, 32, "cuda")
    rotate(q, phase)  # compiles, which a capture must not
    rotate_both(q.clone(), k.clone(), phase)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = rotate(q, phase)
        rotate_both(q, k, phase)
    new = draw(8, 3, 16, 64, seed=5), draw(8, 3, 64, seed=6)
    q.copy_(new[0]), k.copy_(new[1])
    graph.replay()
    torch.cuda.synchronize()
    for got, x in ((y, new[0]), (q, new[0]), (k, new[1])):
        assert equal(got, turned(x, phase.cpu()))


@pytest.mark.gpu
def test_offsets_pass_two_billion():
    """Few rows, far apart: the last ones begin behind 2^31 numbers."""
    far = 2**30 + 64
    if torch.cuda.mem_get_info()[0] < 8 * far:
        pytest.skip("NOT RUN: needs 9 GiB of free memory on the GPU")
    memory = torch.zeros(3 * far + 4096, dtype=torch.bfloat16, device="cuda")
    x, phase = draw(2, 3, 2, 64, dtype=torch.bfloat16), angles(2, 3, 32)
    for strides in ((far, 128, 64, 1), (128, far, 64, 1), (192, 64, 2 * far, 1)):
        laid = memory.as_strided(x.shape, strides)
        laid.copy_(x)
        assert equal(rotate(laid, phase.cuda()), turned(x, phase)), strides
        rotate(laid, phase.cuda(), in_place=True)
        assert equal(laid, turned(x, phase)), strides
