"""RMSNorm in Triton: the reference's roundings, one read of a row, gradients in one order."""

import re
from collections import Counter

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
    lengths,
    poisoned_memory,
)
from kernel_products import ROUNDED
from minids_kernels import cards, configs, norm_rms
from minids_kernels.norm_rms import (
    CANDIDATES,
    add_rms_norm,
    add_rms_norm_quantise,
    rms_norm,
    rms_norm_quantise,
)

from minids import norm
from minids.formats import groups
from minids.fused import norm as fused

pytestmark = pytest.mark.usefixtures("interpreter")

EPS = 1e-6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = [(a, b) for a in DTYPES for b in DTYPES]
FORMATS = (None, "ue8m0")
# of sums in FP32, in another order than torch's, the root halves what is missing; then two products
CLOSE = 4e-7
# gradients, relative to the largest: a sum over a row or over all rows in FP32
SUMMED = 2e-6


def draw(*shape: int, dtype=torch.float32, device="cpu", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def whole(*shape: int, dtype=torch.float32, device="cpu", seed: int = 0) -> torch.Tensor:
    """Return small whole numbers: sums of their squares are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype).to(device)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Say whether two tensors hold the same bits; a NaN has no digits."""
    a, b = a.cpu().contiguous(), b.cpu().contiguous()
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    nan = a.float().isnan() & b.float().isnan()
    return bool(((bits(a) == bits(b)) | nan).all())


def same_codes(a, b) -> bool:
    return equal(a.values, b.values) and equal(a.scale, b.scale) and tuple(a.group) == b.group


# Against the reference


def test_example_by_hand(device):
    """The root mean square of (3, 4, 12, 0) is 6.5; gains of 13 and 26 give whole numbers."""
    x = torch.tensor([[3.0, 4.0, 12.0, 0.0]], device=device)
    gain = torch.tensor([13.0, 26.0, 13.0, 13.0], device=device)
    torch.testing.assert_close(
        rms_norm(x, gain, 0.0).cpu(), torch.tensor([[6.0, 16.0, 24.0, 0.0]]), rtol=CLOSE, atol=0
    )
    total, y = add_rms_norm(x - 1, torch.ones_like(x), gain, 0.0)
    assert equal(total, x)
    assert equal(y, rms_norm(x, gain, 0.0))


@pytest.mark.parametrize(("of_x", "of_gain"), PAIRS, ids=str)
def test_where_sums_are_exact_all_bits_are_the_reference_s(of_x, of_gain, device):
    """The mean, its root, the product, rounded to the dtype of x, and the gain: each one rounds."""
    for D in (5, 200, 576):
        x, y = whole(2, 9, D, dtype=of_x), whole(2, 9, D, dtype=of_x, seed=1)
        gain = draw(D, dtype=of_gain)
        there = x.to(device), y.to(device), gain.to(device)
        right = norm.rms_norm(x, gain, EPS)
        assert equal(rms_norm(there[0], there[2], EPS), right)
        for found, wanted in zip(
            add_rms_norm(*there, EPS), fused.add_rms_norm(x, y, gain, EPS), strict=True
        ):
            assert equal(found, wanted)


@pytest.mark.parametrize("scale_fmt", FORMATS)
@pytest.mark.parametrize(("of_x", "of_gain"), PAIRS, ids=str)
def test_where_sums_are_exact_codes_and_scales_are_the_reference_s(
    of_x, of_gain, scale_fmt, device
):
    for D in (5, 200):
        x, y = whole(3, 7, D, dtype=of_x), whole(3, 7, D, dtype=of_x, seed=1)
        gain = draw(D, dtype=of_gain) * (torch.arange(D) < 150).to(of_gain)
        there = x.to(device), y.to(device), gain.to(device)
        right = fused.rms_norm_quantise(x, gain, EPS, scale_fmt, 1e-4)
        found = rms_norm_quantise(there[0], there[2], EPS, scale_fmt, 1e-4)
        assert same_codes(found, right)
        total, codes = add_rms_norm_quantise(*there, EPS, scale_fmt, 1e-4)
        right = fused.add_rms_norm_quantise(x, y, gain, EPS, scale_fmt, 1e-4)
        assert equal(total, right[0])
        assert same_codes(codes, right[1])


@pytest.mark.parametrize("of_y", DTYPES, ids=str)
def test_sum_of_two_dtypes_has_their_common_one(of_y, device):
    x, y, gain = draw(4, 40, dtype=torch.bfloat16), draw(4, 40, dtype=of_y), draw(40)
    total, z = add_rms_norm(x.to(device), y.to(device), gain.to(device), EPS)
    assert equal(total, x + y)
    torch.testing.assert_close(z.cpu(), norm.rms_norm(x + y, gain, EPS), rtol=CLOSE, atol=1e-9)


@settings(max_examples=12)
@given(rows=lengths(9) | st.integers(1, 40), D=lengths(700))
def test_any_shape(rows, D, device):
    """One rounding to BF16 more or less, where a digit of the root decides it."""
    x, gain = draw(rows, D, dtype=torch.bfloat16), draw(D)
    y = rms_norm(x.to(device), gain.to(device), EPS).cpu()
    right = norm.rms_norm(x, gain, EPS)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt() * gain.double()
    assert ((y - exact).abs() <= (ROUNDED[torch.bfloat16] + CLOSE) * exact.abs()).all()
    assert (y != right).float().mean() <= 0.01
    wide = rms_norm(x.float().to(device), gain.to(device), EPS).cpu()
    torch.testing.assert_close(wide.double(), exact, rtol=CLOSE, atol=0)


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (2, 1, 3, 40)], ids=str)
def test_any_number_of_axes(shape, device):
    x, gain = whole(*shape, dtype=torch.bfloat16), draw(40)
    y = rms_norm(x.to(device), gain.to(device), EPS)
    assert y.is_contiguous()
    assert equal(y, norm.rms_norm(x, gain, EPS))
    if x.ndim > 1:
        codes = rms_norm_quantise(x.to(device), gain.to(device), EPS)
        assert same_codes(codes, fused.rms_norm_quantise(x, gain, EPS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, device):
    """Between the numbers lies NaN: a sum that read it would be NaN."""
    x, y, gain = whole(2, 5, 133), whole(2, 5, 133, seed=1), draw(133)
    laid = [laid_out(t.to(device), layout) for t in (x, y)]
    apart = laid_out(gain.to(device)[None], "every second column")[0]
    found = add_rms_norm(*laid, apart, EPS)
    assert all(map(equal, found, fused.add_rms_norm(x, y, gain, EPS)))
    codes = rms_norm_quantise(laid[0].transpose(0, 1), apart, EPS)
    assert same_codes(codes, fused.rms_norm_quantise(x.transpose(0, 1), gain, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_rows_keep_to_themselves(dtype, device):
    """Zeros become 0 by 1 / sqrt(eps); of an infinity and NaN nothing reaches another row."""
    x, gain = whole(7, 40, dtype=dtype), draw(40)
    x[1], x[2, 3], x[3, 5], x[5] = 0.0, torch.inf, torch.nan, -0.0
    x[6] = torch.finfo(dtype).smallest_normal
    for eps in (EPS, 0.0):
        right = norm.rms_norm(x, gain, eps)
        found = rms_norm(x.to(device), gain.to(device), eps)
        assert equal(found, right)
        codes = rms_norm_quantise(x.to(device), gain.to(device), eps)
        assert same_codes(codes, groups.quantise(right))
    assert found[[0, 4]].isfinite().all()


def test_squares_that_pass_fp32_are_lost_as_in_torch(device):
    x = torch.tensor([[1e20, 1.0], [1e-30, 1e-30]])
    gain = torch.ones(2)
    assert equal(rms_norm(x.to(device), gain.to(device), EPS), norm.rms_norm(x, gain, EPS))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_no_rows_give_none(shape, device):
    x, gain = torch.empty(shape, device=device), torch.ones(8, device=device, requires_grad=True)
    y = rms_norm(x, gain, EPS)
    assert y.shape == shape
    y.sum().backward()
    assert gain.grad is not None
    assert not gain.grad.any()
    assert rms_norm_quantise(x, gain, EPS).scale.shape == (*shape[:-1], 1)


def test_every_number_is_written_and_lies_as_products_read_it(device):
    x, gain = draw(2, 9, 133, dtype=torch.bfloat16, device=device), draw(133, device=device)
    with poisoned_memory():
        codes = rms_norm_quantise(x, gain, EPS)
        found = [*add_rms_norm(x, x, gain, EPS), codes.values, codes.scale]
    assert all(map(is_written, found))
    assert codes.values.stride() == (9 * 144, 144, 1)
    assert codes.scale.stride() == (18, 1, 9)


def test_a_row_has_the_same_bits_beside_any_others(device):
    x, gain = draw(30, 300, dtype=torch.bfloat16, device=device), draw(300, device=device)
    y = bitwise_equal(lambda: rms_norm(x, gain, EPS))
    assert equal(y[7:8], rms_norm(x[7:8], gain, EPS))
    assert equal(
        y.unflatten(0, (3, 10))[:, 4:], rms_norm(x.unflatten(0, (3, 10))[:, 4:], gain, EPS)
    )


def test_cards_without_fp8_write_the_same_bytes(device, monkeypatch):
    x, gain = draw(3, 200, device=device), draw(200, device=device)
    right = rms_norm_quantise(x, gain, EPS)
    ampere = cards.INTERPRETER._replace(name="Ampere", capability=(8, 0))
    monkeypatch.setattr(cards, "card", lambda *_: ampere)
    assert same_codes(rms_norm_quantise(x, gain, EPS), right)


@pytest.mark.parametrize("config", CANDIDATES, ids=str)
def test_every_candidate(config, device):
    x, gain = whole(19, 133), draw(133)
    kind = type(config).__name__
    with configs.trying(f"norm_rms.{kind}", config._asdict()) as trial:
        if kind == "Rows":
            assert equal(rms_norm(x.to(device), gain.to(device), EPS), norm.rms_norm(x, gain, EPS))
        else:
            compare_gradients(norm_rms, x, gain, device)
    assert (f"norm_rms.{kind}", (133, 4)) in trial.asked


# Gradients


def by_hand(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Return gain times x at a root mean square of 1: in the dtype of x, by a norm of torch's."""
    size = x.shape[-1] ** 0.5
    one_more = torch.cat((x, x.new_full(x[..., :1].shape, EPS**0.5 * size)), -1)
    length = torch.linalg.vector_norm(one_more, dim=-1, keepdim=True)
    return gain * x * size / length


def compare_gradients(module, x, gain, device="cpu", y=None) -> None:
    """Compare with FP64 autograd of another formula."""
    there = [t.to(device) for t in (x, y, gain) if t is not None]
    if y is None:
        found = gradients(lambda x, gain: module.rms_norm(x, gain, EPS), *there)
        right = gradients(by_hand, x.double(), gain.double())
    else:
        found = gradients(lambda x, y, gain: module.add_rms_norm(x, y, gain, EPS), *there)
        rounded = (x + y).double()  # once, which gradients do not see

        def formula(x, y, gain):
            s = rounded + (x - x.detach()) + (y - y.detach())
            return s, by_hand(s, gain)

        right = gradients(formula, x.double(), y.double(), gain.double())
    total = x.double() if y is None else (x + y).double()
    steepest = gain.abs().max() / (total.square().mean(-1, keepdim=True) + EPS).sqrt()
    for got, wanted, t in zip(found, right, there, strict=True):
        assert got.dtype == t.dtype
        assert got.shape == t.shape
        gap = (got.cpu().double() - wanted).abs()
        # dn and its part along x may cancel; what a gain gets is a sum over rows
        most = wanted.abs().amax(-1, keepdim=True) + (steepest if got.ndim > 1 else 0)
        assert (gap <= SUMMED * most + ROUNDED[got.dtype] * wanted.abs()).all(), float(gap.max())


@pytest.mark.parametrize(("of_x", "of_gain"), PAIRS, ids=str)
def test_gradients(of_x, of_gain, device):
    for shape in ((2, 9, 40), (1, 200)):
        x, y = draw(*shape, dtype=of_x), draw(*shape, dtype=of_x, seed=1)
        gain = draw(shape[-1], dtype=of_gain, seed=2)
        compare_gradients(norm_rms, x, gain, device)
        compare_gradients(norm_rms, x, gain, device, y)


def test_gradients_of_two_dtypes(device):
    x, y = draw(4, 40, dtype=torch.bfloat16), draw(4, 40, seed=1)
    compare_gradients(norm_rms, x, draw(40, seed=2), device, y)


@settings(max_examples=8)
@given(rows=st.integers(1, 70), D=lengths(300))
def test_gradients_of_any_shape(rows, D, device):
    compare_gradients(norm_rms, draw(rows, D), draw(D, seed=2), device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_any_layout(layout, device):
    """Of x and of what comes in, a spread number too."""
    x, gain = draw(2, 9, 40, device=device), draw(40, device=device)
    d_norm, d_total = (draw(2, 9, 40, device=device, seed=n) for n in (3, 4))
    right = norm_rms.gradients(d_norm, d_total, x, gain, EPS)
    laid = [laid_out(t, layout) for t in (d_norm, d_total, x)]
    assert all(map(equal, norm_rms.gradients(*laid, gain, EPS), right))
    one = torch.ones((), device=device).expand(2, 9, 40)
    spread = norm_rms.gradients(one, None, x, gain, EPS)
    assert all(map(equal, spread, norm_rms.gradients(one.clone(), None, x, gain, EPS)))


def test_what_is_not_needed_is_not_computed(device):
    """A frozen gain; a sum whose norm, or a norm whose sum, has no gradient."""
    x, y, gain = draw(5, 40, device=device), draw(5, 40, device=device), draw(40, device=device)
    leaf = x.clone().requires_grad_()
    rms_norm(leaf, gain, EPS).sum().backward()
    ones = torch.ones_like(x)
    assert equal(leaf.grad, norm_rms.gradients(ones, None, x, gain, EPS)[0])
    assert norm_rms.gradients(ones, None, x, gain, EPS, needs_gain=False)[1] is None
    leaves = [t.clone().requires_grad_() for t in (x, y, gain)]
    add_rms_norm(*leaves, EPS)[0].sum().backward()
    assert equal(leaves[0].grad, ones)
    assert equal(leaves[1].grad, ones)
    assert leaves[2].grad is None
    leaves = [t.clone().requires_grad_() for t in (x, y, gain)]
    add_rms_norm(*leaves, EPS)[1].sum().backward()
    right = norm_rms.gradients(ones, None, x + y, gain, EPS)
    assert all(map(equal, (leaves[0].grad, leaves[1].grad, leaves[2].grad), (right[0], *right)))


def test_gradients_of_zeros_and_beside_nan(device):
    """A tile's rows that are not there, of zeros, add no 0 times infinity where eps is 0."""
    x, gain = draw(3, 40, device=device), draw(40, device=device)
    for t in norm_rms.gradients(torch.ones_like(x), None, x, gain, 0.0):
        assert t is not None
        assert t.isfinite().all()
    x[1] = 0.0
    dx, _ = norm_rms.gradients(torch.ones_like(x), None, x, gain, EPS)
    torch.testing.assert_close(dx[1], gain * EPS**-0.5, rtol=CLOSE, atol=0)
    alone = norm_rms.gradients(torch.ones_like(x), None, x, gain, EPS)[0]
    x[1] = torch.nan
    dx, d_gain = norm_rms.gradients(torch.ones_like(x), None, x, gain, EPS)
    assert equal(dx[[0, 2]], alone[[0, 2]])
    assert dx[1].isnan().all()
    assert d_gain is not None
    assert d_gain.isnan().all()


def test_gradients_have_the_same_bits_in_every_run(device):
    x, gain = draw(70, 133, device=device), draw(133, device=device)
    with poisoned_memory():
        found = bitwise_equal(lambda: norm_rms.gradients(x, x, x, gain, EPS))
    assert all(map(is_written, found))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, g: rms_norm(x.double(), g, EPS), "rms_norm: x must be .*, got torch.float64"),
        (lambda x, g: rms_norm(x, g.double(), EPS), "rms_norm: gain must be .* torch.float64"),
        (lambda x, g: rms_norm(x, g[:7], EPS), "rms_norm: gain must be [8], .* got [7]"),
        (lambda x, g: rms_norm(x[..., :0], g, EPS), "rms_norm: x must have .* got [2, 0]"),
        (
            lambda x, g: rms_norm(x[:, :1].expand(2, 32769), g, EPS),
            "rms_norm: x must have 1 axes or more, the last of 1 to 32768 .* got [2, 32769]",
        ),
        (lambda x, g: rms_norm_quantise(x[0], g, EPS), "rms_norm_quantise: x must have 2 axes"),
        (lambda x, g: rms_norm_quantise(x, g, EPS, "e8m0"), "scale_fmt must be .* got 'e8m0'"),
        (lambda x, g: add_rms_norm(x, x[:1], g, EPS), "add_rms_norm: y must be [2, 8] .* [1, 8]"),
        (lambda x, g: add_rms_norm_quantise(x, x.double(), g, EPS), "quantise: y must be one of"),
    ],
)
def test_bad_input_is_named(call, words, device):
    pattern = ".*".join(re.escape(part) for part in words.split(".*"))
    with pytest.raises(ValueError, match=pattern):
        call(torch.ones(2, 8, device=device), torch.ones(8, device=device))


# Bugs that the tests above would see


def check(module) -> None:
    """Compare what a copy of the kernel's file does with the reference."""
    x, y, gain = whole(3, 17, 133), whole(3, 17, 133, seed=1), draw(133)
    x, y = x.bfloat16(), y.bfloat16()
    assert equal(module.rms_norm(x, gain, 0.5), norm.rms_norm(x, gain, 0.5))
    for found, right in zip(
        module.add_rms_norm(x, y, gain.bfloat16(), EPS),
        fused.add_rms_norm(x, y, gain.bfloat16(), EPS),
        strict=True,
    ):
        assert equal(found, right)
    for small in (1e-5 * gain, (1e-3 * gain).bfloat16()):
        codes = module.rms_norm_quantise(x, small, EPS, None, 1e-4)
        assert same_codes(codes, fused.rms_norm_quantise(x, small, EPS, None, 1e-4))
    x, y = draw(150, 40), draw(150, 40, seed=1)
    compare_gradients(module, x, gain[:40], y=y)
    with configs.trying("norm_rms.Walk", dict(BLOCK_M=4, warps=4, stages=3, programs=11)):
        compare_gradients(module, x, gain[:40])  # 33 parts
    gain.requires_grad_()
    module.rms_norm(x[:33, :40], gain[:40], 0.0).sum().backward()
    assert gain.grad is not None
    assert gain.grad.isfinite().all()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mean + eps", "mean"),
        ("(wide * r[:, None]).to(rows.dtype)", "(wide * r[:, None])"),
        (".to(total.dtype.element_ty)\n", "\n"),
        ("    if g.dtype == rows.dtype:\n        norm = norm.to(rows.dtype)\n", ""),
        ("scale += batch", "scale += 0 * batch"),
        ("max(quantised[1], SMALLEST)", "SMALLEST"),
        ("axis=1) * (1 / D) * r", "axis=1) * r"),
        ("        r = tl.where(m < M, r, 0.0)", "        r = r"),
        ("found += more.to(tl.float32)", "found = found"),
        ("part += dy * n", "part = dy * n"),
        ("p < n_parts", "p < n_parts - 1"),
        ("range(0, n_parts, PARTS)", "range(0, n_parts - 1, PARTS)"),
    ],
    ids=["eps", "rounding of x r", "rounding of the sum", "rounding of the norm", "batch", "floor",
         "mean", "no row", "residual", "one tile", "last part", "last parts"],
)  # fmt: skip
def test_planted_bug_is_caught(old, new, monkeypatch):
    if not cards.interpreted():
        pytest.skip("NOT RUN: bugs are planted where the interpreter runs, on CPU")
    assert_caught(norm_rms, check, old, new)


# What the compiler makes of it for Hopper, and that it compiles for other cards


def launch(call, shape, of_x, of_gain, config=None):
    """Call a wrapper as on a GPU, on memory that is not there."""
    x = torch.empty(shape, dtype=getattr(torch, of_x), device="meta")
    gain = torch.empty(shape[-1], dtype=getattr(torch, of_gain), device="meta")
    dy = torch.empty(shape, dtype=torch.promote_types(x.dtype, gain.dtype), device="meta")
    calls = {
        "norm": lambda: rms_norm(x, gain, EPS),
        "add": lambda: add_rms_norm(x, x, gain, EPS),
        "quantise": lambda: rms_norm_quantise(x, gain, EPS, floor=1e-4),
        "add, quantise": lambda: add_rms_norm_quantise(x, x, gain, EPS, "ue8m0", 1e-4),
        "backward": lambda: norm_rms.gradients(dy, None, x, gain, EPS),
        "add, backward": lambda: norm_rms.gradients(dy, x, x, gain, EPS),
    }
    if config is None:
        calls[call]()
        return
    with configs.trying(*config):
        calls[call]()


CALLS = ("norm", "add", "quantise", "add, quantise", "backward", "add, backward")
KINDS = (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32"))
WIDTHS = (7168, 1536, 512)  # of V3: the model, the query latent, the KV latent
COMPILED = [
    {"call": call, "shape": (4096, D), "of_x": kinds[0], "of_gain": kinds[1]}
    for call in CALLS for kinds in KINDS for D in WIDTHS
    if (D == 7168 and kinds != KINDS[2]) or (kinds == KINDS[1 + (D == 7168)] and "," not in call)
]  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
    return list(
        zip(COMPILED, compile_calls("test_kernel_norm_rms", "launch", COMPILED), strict=True)
    )


def test_nothing_spills_and_enough_programs_fit(compiled):
    for call, kernels in compiled:
        for kernel in kernels:
            assert kernel.spilled_bytes == 0, call
            assert kernel.programs_on_an_sm * kernel.warps >= 12, call


def test_no_instruction_is_approximate(compiled):
    assert all(not kernel.inexact for _, kernels in compiled for kernel in kernels)


def test_memory_is_moved_16_bytes_at_a_time(compiled):
    """But for scales, and the gain and its parts where a tile has several rows."""
    for call, kernels in compiled:
        moves = Counter(kernels[0].instructions)
        wide = moves["LDG.128"] + moves["STG.128"] + moves["LDGSTS"]
        assert wide >= 0.6 * sum(moves.values()), call
        assert moves["STG.128"], call
        if call["shape"][1] == 7168:
            assert {n for n in moves if n.startswith("LDG") and n != "LDGSTS"} == {"LDG.128"}, call


def test_what_lies_behind_a_row_is_not_read(compiled):
    """8192 numbers stand for 7168: the compiler drops the last eighth of the loads."""
    loads = [kernels[0].instructions["LDG.128"] for call, kernels in compiled
             if call["call"] == "norm" and call["shape"][1] == 7168]  # fmt: skip
    a_row = 7168 // 128 // 8  # of BF16, 16 bytes for each of 128 threads
    assert loads == [2 * a_row, 3 * a_row, 4 * a_row]  # and the gain's, two for one in FP32


def test_backward_reads_ahead_through_shared_memory(compiled):
    for call, kernels in compiled:
        if "backward" in call["call"]:
            assert kernels[0].instructions["LDGSTS"] >= 6, call


WIDE = [
    {"call": call, "shape": (64, D), "of_x": x, "of_gain": gain}
    for D in (16384, 32768) for call in CALLS for x, gain in KINDS
]  # fmt: skip


@pytest.mark.slow
def test_wide_rows_compile():
    """Registers hold 8192 numbers of backward's four, and 32768 of a row in BF16: more spill."""
    for call, kernels in zip(
        WIDE, compile_calls("test_kernel_norm_rms", "launch", WIDE), strict=True
    ):
        D, few = call["shape"][1], call["of_gain"] == "bfloat16"
        if "backward" not in call["call"] and (few or D == 16384):
            assert kernels[0].spilled_bytes == 0, call
        elif D == 16384:
            assert kernels[0].spilled_bytes <= 256, call


@pytest.mark.slow
@pytest.mark.parametrize("config", CANDIDATES, ids=str)
def test_every_candidate_compiles(config):
    """At the width whose tile is as large as the rule's."""
    kind = type(config).__name__
    D = (2048 if kind == "Rows" else 512 * config.warps // 2) // config.BLOCK_M
    asked = (f"norm_rms.{kind}", config._asdict())
    calls = [
        {"call": call, "shape": (4096, max(D, 128)), "of_x": "bfloat16", "of_gain": "float32",
         "config": asked}
        for call in CALLS if ("backward" in call) == (kind == "Walk") and "add, " in call
    ]  # fmt: skip
    for call, kernels in zip(
        calls, compile_calls("test_kernel_norm_rms", "launch", calls), strict=True
    ):
        assert kernels[0].spilled_bytes == 0, call


@pytest.mark.slow
@pytest.mark.parametrize("capability", [card for card in CARDS if card != HOPPER], ids=str)
def test_compiles_for_other_cards(capability):
    calls = [call for call in COMPILED if call["shape"][1] == 7168 and call["of_gain"] == "float32"]
    found = compile_calls("test_kernel_norm_rms", "launch", calls, capability)
    for call, kernels in zip(calls, found, strict=True):
        assert all(kernel.spilled_bytes == 0 for kernel in kernels), call


# What only a GPU can show


@pytest.mark.gpu
@pytest.mark.parametrize(("of_x", "of_gain"), PAIRS, ids=str)
def test_v3_widths_on_a_card(of_x, of_gain):
    for D in (*WIDTHS, 16384, 32768, 1000, 7):
        x, y, gain = whole(130, D, dtype=of_x), whole(130, D, dtype=of_x, seed=1), draw(D)
        gain = gain.to(of_gain)
        there = x.cuda(), y.cuda(), gain.cuda()
        assert equal(rms_norm(there[0], there[2], EPS), norm.rms_norm(x, gain, EPS)), D
        found = add_rms_norm_quantise(*there, EPS, None, 1e-4)
        right = fused.add_rms_norm_quantise(x, y, gain, EPS, None, 1e-4)
        assert equal(found[0], right[0]), D
        assert same_codes(found[1], right[1]), D
        compare_gradients(norm_rms, draw(130, D, dtype=of_x), gain, "cuda")
        compare_gradients(norm_rms, *(draw(130, D, dtype=of_x), gain, "cuda"), y=y)


@pytest.mark.gpu
def test_codes_of_any_numbers_on_a_card():
    """The sum of a row may be added in another order than the norm's: a few codes in a million."""
    x, gain = draw(1027, 7168, dtype=torch.bfloat16, device="cuda"), draw(7168, device="cuda")
    found, right = rms_norm_quantise(x, gain, EPS), groups.quantise(rms_norm(x, gain, EPS).cpu())
    other = found.values.cpu().float() != right.values.float()
    assert other.float().mean() < 1e-4
    torch.testing.assert_close(found.scale.cpu(), right.scale, rtol=2.0**-7, atol=0)


@pytest.mark.gpu
def test_twenty_runs_are_bitwise_equal():
    x, gain = draw(4099, 7168, dtype=torch.bfloat16, device="cuda"), draw(7168, device="cuda")
    run = lambda: (*add_rms_norm(x, x, gain, EPS), *norm_rms.gradients(x, x, x, gain, EPS))  # noqa: E731
    bitwise_equal(lambda: (run(), rms_norm_quantise(x, gain, EPS)), times=20)


@pytest.mark.gpu
def test_is_captured_in_a_graph_and_replayed_with_new_numbers():
    x, gain = draw(300, 1000, dtype=torch.bfloat16, device="cuda"), draw(1000, device="cuda")

    def run():
        codes = add_rms_norm_quantise(x, x, gain, EPS)
        return codes, rms_norm(x, gain, EPS), norm_rms.gradients(x, x, x, gain, EPS)

    run()  # compiles, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (total, codes), y, captured = run()
    x.copy_(draw(300, 1000, seed=9))
    graph.replay()
    torch.cuda.synchronize()
    (right_total, right_codes), right_y, right = run()
    assert equal(total, right_total)
    assert same_codes(codes, right_codes)
    assert equal(y, right_y)
    assert all(map(equal, captured, right))


@pytest.mark.gpu
def test_offsets_pass_two_billion():
    """Few rows, far apart; and the last rows of a matrix of more than 2^31 numbers."""
    far = 2**30 + 64
    if torch.cuda.mem_get_info()[0] < 20 * far:
        pytest.skip("NOT RUN: needs 21 GiB of free memory on the GPU")
    memory = torch.zeros(2 * far + 512, dtype=torch.bfloat16, device="cuda")
    x, gain = whole(3, 512, dtype=torch.bfloat16), draw(512)
    laid = memory.as_strided(x.shape, (far, 1))
    laid.copy_(x)
    assert equal(rms_norm(laid, gain.cuda(), EPS), norm.rms_norm(x, gain, EPS))
    near, distant = (
        norm_rms.gradients(t, t, t, gain.cuda(), EPS) for t in (laid.contiguous(), laid)
    )
    assert all(map(equal, near, distant))
    del memory, laid
    rows = 2**31 // 512 + 3
    x = torch.ones(rows, 512, dtype=torch.bfloat16, device="cuda")
    x[-3:] = whole(3, 512, dtype=torch.bfloat16, device="cuda")
    ones = torch.ones(512, dtype=torch.bfloat16, device="cuda")
    y = rms_norm(x, ones, EPS)
    assert equal(y[-3:], norm.rms_norm(x[-3:].cpu(), ones.cpu(), EPS))
    dx, _ = norm_rms.gradients(y, None, x, ones, EPS)
    assert equal(dx[-3:], norm_rms.gradients(y[-3:], None, x[-3:], ones, EPS)[0])
