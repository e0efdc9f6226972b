"""Sums beside attention's gradients: in FP32, in one order, whatever lies beside a row."""

import pytest
import torch
from compiled import CARDS, compile_calls
from kernel_inputs import LAYOUTS, assert_caught, bitwise_equal, is_written, laid_out, poisoned
from minids_kernels import mla_sums
from minids_kernels.mla_sums import add_heads, row_products

pytestmark = pytest.mark.usefixtures("interpreter")

EXACT = 2e-7  # relative to what is added up: one rounding of FP32 for each of a few steps


def draw(*shape: int, device: str = "cpu", dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def test_example_by_hand(device):
    """Rows (1, 2) and (3, 4) give 11; three heads of 1, 2 and 4 give 7."""
    x = torch.tensor([1.0, 2.0], device=device).expand(1, 1, 1, 2)
    y = torch.tensor([3.0, 4.0], device=device).expand(1, 1, 1, 2)
    assert row_products(x, y).tolist() == [[[11.0]]]
    out = torch.empty(1, 1, 1, device=device)
    add_heads(torch.tensor([1.0, 2.0, 4.0], device=device).reshape(1, 1, 3, 1), out)
    assert out.item() == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 24, 128, 129])
def test_row_products(width, dtype, device):
    x = draw(2, 37, 3, width, device=device, dtype=dtype)
    y = draw(2, 37, 3, width, device=device, dtype=dtype, seed=1)
    check_rows(row_products(x, y), x, y)


def check_rows(found, x, y) -> None:
    terms = x.double() * y.double()
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    gap = (found - terms.sum(-1).transpose(1, 2)).abs()
    assert (gap <= EXACT * 8 * terms.abs().sum(-1).transpose(1, 2)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, device):
    x, y = draw(2, 20, 3, 24, device=device), draw(2, 20, 3, 24, device=device, seed=1)
    assert torch.equal(row_products(laid_out(x, layout), y), row_products(x, laid_out(y, layout)))
    check_rows(row_products(laid_out(x, layout), y), x, y)
    out = laid_out(torch.zeros(2, 20, 24, device=device), layout)
    add_heads(laid_out(x, layout), out)
    assert torch.equal(out, in_order(x))


def in_order(parts: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(parts[:, :, 0])
    for head in parts.unbind(2):
        total += head
    return total


@pytest.mark.parametrize("heads", [1, 3, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_heads_are_added_one_after_another_and_rounded_once(dtype, heads, device):
    parts = draw(2, 70, heads, 24, device=device)
    memory = poisoned((2, 70, 24), dtype, device)
    bitwise_equal(lambda: add_heads(parts, memory.x))
    memory.check()
    assert torch.equal(memory.x, in_order(parts).to(dtype))


def test_a_row_has_the_same_bits_in_every_batch(device):
    x = draw(3, 70, 5, 24, device=device)
    out, alone = torch.empty(3, 70, 24, device=device), torch.empty(1, 70, 24, device=device)
    add_heads(x, out)
    add_heads(x[1:2], alone)
    assert torch.equal(out[1:2], alone)
    assert torch.equal(row_products(x, x)[1:2], row_products(x[1:2], x[1:2]))


BUGS = {
    "the last column": ("(columns < V)", "(columns < V - 1)"),
    "rows of the head before": ("x += b * x_b + h * x_h", "x += b * x_b + (h // 2) * x_h"),
    "one head too few": ("for _ in range(H)", "for _ in range(1, H)"),
    "the same head again": ("parts += parts_h", "parts += 0"),
    "the last place": ("mask=s < S, other", "mask=s < S - 1, other"),
}


def check_all(module) -> None:
    x, y = draw(2, 37, 3, 24), draw(2, 37, 3, 24, seed=1)
    check_rows(module.row_products(x, y), x, y)
    out = torch.empty(2, 37, 24)
    module.add_heads(x, out)
    assert is_written(out)
    assert torch.equal(out, in_order(x))


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_seen(bug, device):
    if device != "cpu":
        pytest.skip("NOT RUN: planted in the interpreter")
    assert_caught(mla_sums, check_all, *BUGS[bug])


# Ring 2: what the compiler makes of it


def launch(dtype: str) -> None:
    def memory(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x = memory(1, 4096, 128, 128, dtype=getattr(torch, dtype))
    row_products(x, x)
    out = memory(1, 4096, 64, dtype=getattr(torch, dtype))
    add_heads(memory(1, 4096, 128, 64), out)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CARDS, ids=str)
def test_compiles_to_wide_loads_without_spills(capability):
    (found,) = compile_calls("test_kernel_mla_sums", "launch", [{"dtype": "bfloat16"}], capability)
    rows, heads = found
    assert (rows.kernel, heads.kernel) == ("multiply_rows", "add")
    for kernel in found:
        assert kernel.spilled_bytes == 0, kernel
        assert kernel.instructions.get("LDG.128"), kernel


# Ring 3: on a card


@pytest.mark.gpu
def test_v3_shape_on_a_card():
    x = torch.randn(1, 4096, 128, 128, device="cuda", dtype=torch.bfloat16)
    check_rows(row_products(x, x), x, x)
    parts = torch.randn(1, 4096, 128, 64, device="cuda")
    out = torch.empty(1, 4096, 64, device="cuda")
    bitwise_equal(lambda: add_heads(parts, out), times=3)
    assert torch.equal(out, in_order(parts))
