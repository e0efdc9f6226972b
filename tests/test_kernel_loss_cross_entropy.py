"""Cross-entropy of logits: the reference's loss and gradients, from one read of each logit."""

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
    is_written,
    laid_out,
    lengths,
    poisoned_memory,
    special,
)
from minids_kernels import cards, configs, loss_cross_entropy
from minids_kernels.cards import Card
from minids_kernels.loss_cross_entropy import CANDIDATES, DTYPES, Chunk, cross_entropy, n_runs

from minids.fused.loss import IGNORED
from minids.fused.loss import cross_entropy as reference

pytestmark = pytest.mark.usefixtures("interpreter")

KERNEL = "loss_cross_entropy.Chunk"
# Relative to 1 + |x - m|: a difference in FP32, its product with log2(e), the exponential itself,
# the sum; on a GPU exponential and logarithm are a few units off (ex2.approx, lg2.approx).
EXACT, ON_A_CARD = 4e-7, 2e-6
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SUBNORMAL = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}


def draw(n: int, v: int, dtype=torch.float32, device="cpu", seed: int = 0):
    """Return logits whose rows have a few likely words, and targets, one in four ignored."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(n, v, generator=generator)
    x += 10 * torch.randn(n, 1, generator=generator)
    x[:, v // 2] += 6
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[2::4] = IGNORED
    return x.to(dtype).to(device), targets.to(device)


def close(loss, d_logits, x, targets, d_loss: float = 1.0) -> None:
    """Compare a loss and its gradient with the reference in FP64."""
    wide = x.detach().double().requires_grad_()
    expected = reference(wide, targets)
    (expected * d_loss).backward()
    unit = EXACT if cards.interpreted() else ON_A_CARD
    right = targets[:, None] == torch.arange(x.shape[1], device=x.device)
    far = 1 + (wide.detach() - wide.detach().amax(1, keepdim=True)).abs()
    size = float(far[right].sum()) + 12 * int(right.sum())  # ln of all words is below 12
    assert loss.dtype == torch.float32
    assert abs(float((loss - expected).detach())) <= unit * size
    allowed = (unit * far + ROUNDED[x.dtype]) * wide.grad.abs() + abs(d_loss) * SUBNORMAL[x.dtype]
    allowed += right * (unit * far * abs(d_loss))  # 1 is subtracted there, and digits with it
    assert d_logits.dtype == x.dtype
    gap = (d_logits.double() - wide.grad).abs()
    assert (gap <= allowed).all(), float((gap / allowed).max())
    assert not d_logits[targets == IGNORED].any()


def run(x, targets, module=loss_cross_entropy, d_loss: float = 1.0, in_place: bool = False):
    """Return loss and gradient, from memory that was full of NaN."""
    x = x.detach().requires_grad_()
    with poisoned_memory():
        loss = module.cross_entropy(x, targets, in_place)
        (d_logits,) = torch.autograd.grad(loss, x, torch.full_like(loss, d_loss))
    assert is_written(d_logits)
    return loss, d_logits


def test_example_by_hand(device):
    """Equal logits of four words: ln 4 a row, gradients 1/4 and 1/4 - 1."""
    x = torch.full((3, 4), 7.0, device=device)
    targets = torch.tensor([1, IGNORED, 3], device=device)
    loss, d_logits = run(x, targets)
    assert loss.item() == pytest.approx(2 * torch.tensor(4.0).log().item(), rel=1e-6)
    expected = torch.full((3, 4), 0.25)
    expected[0, 1] = expected[2, 3] = -0.75
    expected[1] = 0
    torch.testing.assert_close(d_logits.cpu(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 2, 127, 128, 129, 4097, 9000])
def test_equals_reference(v, dtype, device):
    for n in (1, 5):
        x, targets = draw(n, v, dtype, device)
        close(*run(x, targets), x, targets)


def test_all_of_v3s_words(device):
    for v in (129280, 129281):
        x, targets = draw(2, v, torch.bfloat16, device)
        targets[:] = torch.tensor([v - 1, 0])
        close(*run(x, targets, d_loss=3.0), x, targets, 3.0)


@pytest.mark.parametrize("config", CANDIDATES, ids=str)
def test_every_chunk(config, device):
    x, targets = draw(3, 20_000, torch.bfloat16, device)
    with configs.trying(KERNEL, config._asdict()) as trial:
        close(*run(x, targets), x, targets)
    assert trial.asked


@pytest.mark.parametrize("n", [1, 10, 30])
def test_rows_are_cut_into_runs_where_they_are_few(n, device):
    """Of unequal length, and one run; sums come together in one order."""
    x, targets = draw(n, 700, device=device)
    with configs.trying(KERNEL, dict(BLOCK=128, warps=16)):
        close(*run(x, targets), x, targets)


def test_number_of_runs_by_hand():
    """4,096 rows fill the card; 64 rows are cut into as many runs as there are chunks."""
    model = CARDS[HOPPER]
    card, chunk = Card(model.name, HOPPER, model.n_sm, model.shared_bytes), Chunk(4096, 4)
    assert n_runs(4096, 129280, chunk, card) == 1
    assert n_runs(64, 129280, chunk, card) == 32
    assert n_runs(512, 129280, chunk, card) == 8
    assert n_runs(1, 100, chunk, card) == 1


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, in_place, device):
    x, targets = draw(6, 200, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        plain = x.to(dtype)
        odd = laid_out(plain, layout)
        loss, d_logits = run(odd, targets, in_place=in_place)
        other_loss, other = run(plain, targets)
        assert torch.equal(loss, other_loss)
        assert torch.equal(d_logits, other)


def test_targets_in_steps(device):
    x, targets = draw(6, 200, device=device)
    spread = torch.stack((targets, torch.full_like(targets, 10**9)), 1)[:, 0]
    assert torch.equal(run(x, spread)[1], run(x, targets)[1])


def test_in_place_writes_over_the_logits_and_nowhere_else(device):
    x, targets = draw(5, 300, torch.bfloat16, device)
    expected = run(x, targets)[1]
    logits = laid_out(x, "rows 3 apart")
    around = logits.as_strided((5, 303), (303, 1), logits.storage_offset()).clone()
    _, d_logits = run(logits, targets, in_place=True)
    assert d_logits.data_ptr() == logits.data_ptr()
    assert torch.equal(logits, expected)
    after = logits.as_strided((5, 303), (303, 1), logits.storage_offset())
    assert torch.equal(bits(after[:, 300:].contiguous()), bits(around[:, 300:].contiguous()))


def test_in_place_refuses_a_second_backward(device):
    x, targets = draw(5, 300, device=device)
    loss = cross_entropy(x.requires_grad_() * 1.0, targets, in_place=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradient_is_rounded_once(device):
    """FP16, with a loss scale: what is too small for it before the product is there after it."""
    x, targets = draw(4, 3000, torch.float16, device)
    loss, d_logits = run(x, targets, d_loss=4096.0)
    close(loss, d_logits, x, targets, 4096.0)
    wide = run(x.float(), targets, d_loss=4096.0)[1]
    assert torch.equal(d_logits, wide.half())


def test_no_gradient_no_work(device):
    x, targets = draw(4, 300, device=device)
    with torch.inference_mode():
        loss = cross_entropy(x, targets)
    assert not loss.requires_grad
    assert not cross_entropy(x, targets).requires_grad
    assert torch.equal(loss, run(x, targets)[0])


@pytest.mark.parametrize("n", [0, 3])
def test_no_target_counts(n, device):
    x, targets = draw(n, 300, device=device)
    loss, d_logits = run(x, torch.full_like(targets, IGNORED))
    assert loss.item() == 0
    assert loss.dtype == torch.float32
    assert not d_logits.any()


SPECIAL = ["zeros", "largest", "subnormals", "infinities", "NaN", "any bits"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_numbers_are_treated_as_the_reference_does(name, dtype, device):
    if (name, dtype) == ("largest", torch.float16):
        pytest.skip("NOT RUN: infinities in FP16, the next name")
    x = special(name, 6, 340, dtype, device)
    targets = torch.tensor([0, 100, IGNORED, 339, 7, 165], device=device)
    same_as_reference(x, targets)


def same_as_reference(x, targets) -> None:
    """Each row alone: NaN where the reference has NaN, infinite where it is, else close."""
    for row, target in zip(x[:, None], targets[:, None], strict=True):
        wide = row.detach().double().requires_grad_()
        expected = reference(wide, target)
        expected.backward()
        loss, d_logits = run(row, target)
        expected = expected.float()
        if expected.isfinite() and wide.detach().isfinite().all():
            close(loss, d_logits, row, target)
            continue
        assert torch.equal(loss.isnan(), expected.isnan())
        assert torch.equal(loss.isinf(), expected.isinf())
        if target == IGNORED:  # the reference: 0 times what the row holds
            assert not d_logits.any()
            continue
        assert torch.equal(d_logits.isnan(), wide.grad.isnan())
        torch.testing.assert_close(
            d_logits.double(), wide.grad, rtol=1e-2, atol=1e-6, equal_nan=True
        )


def test_impossible_words(device):
    """-inf has no share; as a target its loss is infinite; a row of nothing else is NaN."""
    inf = torch.inf
    x = torch.tensor([[-inf, 1.0, 2.0], [-inf, 1.0, 2.0], [-inf] * 3, [-inf] * 3, [inf, 0.0, 1.0]])
    targets = torch.tensor([1, 0, 2, IGNORED, 1])
    same_as_reference(x.to(device), targets.to(device))
    long = torch.full((2, 9000), -inf, device=device)  # whole chunks of nothing, first and last
    long[0, 5000] = long[1, 8999] = 1.0
    same_as_reference(long, torch.tensor([5000, 8999], device=device))


@pytest.mark.parametrize("target", [-1, -101, 300, 2**40, -(2**40)])
def test_target_outside_of_the_vocabulary_is_nan(target, device):
    """In its loss and its row; other rows keep their gradients."""
    x, targets = draw(4, 300, device=device)
    expected = run(x, targets)[1]
    targets[1] = target
    loss, d_logits = run(x, targets)
    assert loss.isnan()
    assert d_logits[1].isnan().all()
    rest = [0, 2, 3]
    assert torch.equal(d_logits[rest], expected[rest])


@settings(max_examples=15)
@given(st.integers(1, 9), lengths(1200), st.sampled_from(DTYPES), st.sampled_from(sorted(LAYOUTS)))
def test_random_shapes(device, n, v, dtype, layout):
    x, targets = draw(n, v, dtype, device, seed=v)
    x = laid_out(x, layout)
    with configs.trying(KERNEL, dict(BLOCK=256, warps=1)):
        close(*run(x, targets, d_loss=-0.5), x, targets, -0.5)


def test_gradients_are_those_of_finite_differences(device):
    x, targets = draw(3, 50, device=device)
    d_logits = run(x, targets)[1]
    direction = torch.randn(3, 50, generator=torch.Generator().manual_seed(5)).to(device)
    step = 1e-4 * direction.double()
    more, less = (reference(x.double() + s, targets) for s in (step, -step))
    slope = float((d_logits.double() * direction).sum())
    assert slope == pytest.approx(float(more - less) / 2e-4, rel=1e-5)


def test_two_runs_are_bitwise_equal(device):
    x, targets = draw(7, 9000, torch.bfloat16, device)
    bitwise_equal(lambda: tuple(y.detach() for y in run(x, targets)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, t: cross_entropy(x[0], t), "targets must be .300,"),
        (lambda x, t: cross_entropy(x[None], t[:1]), "logits must have rows, columns"),
        (lambda x, t: cross_entropy(x[:, :0], t), "logits must have rows, columns .* got .2, 0."),
        (lambda x, t: cross_entropy(x.double(), t), "logits .* in torch.float64: .* cast"),
        (lambda x, t: cross_entropy(x, t[:1]), "targets must be .2,. .* got .1,."),
        (lambda x, t: cross_entropy(x, t.int()), "targets must be .* got .* torch.int32"),
        (
            lambda x, t: cross_entropy(x[:1].expand(2, 300), t, in_place=True),
            "in_place needs a place for each logit, got strides",
        ),
    ],
)
def test_bad_input_is_named(call, words, device):
    x, targets = draw(2, 300, device=device)
    with pytest.raises(ValueError, match=f"cross_entropy: {words}"):
        call(x, targets)


# Bugs that the tests above would see


def check(module) -> None:
    x, targets = draw(5, 1000)
    targets[0], targets[1] = 999, 0
    with configs.trying(KERNEL, dict(BLOCK=128, warps=1)):
        for in_place in (False, True):
            copy = x.clone()
            close(*run(copy, targets, module, 2.0, in_place), x, targets, 2.0)
        targets[3] = 1000
        loss, d_logits = run(x, targets, module)
        assert loss.isnan()
        assert d_logits[3].isnan().all()
        x = torch.full((1, 300), -torch.inf)
        x[0, 299] = 0.0
        loss, d_logits = run(x, torch.tensor([299]), module)
        assert loss == 0
        assert not d_logits.any()


BUGS = {
    "a sum is not moved to the larger base": ("total *= tl.exp2", "total += 0 * tl.exp2"),
    "the other sum is not": ("others_total * tl.exp2(", "others_total + 0 * tl.exp2("),
    "-inf is a base": ("base = tl.where(here == -float(\"inf\"), 0.0, here)", "base = here"),
    "the last column is missing": ("mask=column < V, other", "mask=column < V - 1, other"),
    "columns behind the last": ("other=-float(\"inf\"))", "other=0.0)"),
    "a run is dropped": ("(run + 1) * chunks //", "(run + 1) * (chunks - 1) //"),
    "runs overwrite each other": ("(at + run).to", "(at + run // 2).to"),
    "ignored rows count": ("tl.where(target == _IGNORED, 0.0, nats)", "nats"),
    "ignored rows have a gradient": ("y = tl.where(target == _IGNORED, 0.0, y)", "y = y"),
    "a word too many": ("(target >= 0) & (target < V)", "(target >= 0) & (target <= V)"),
    "the next target": ("column + first == target", "column + first == target + 1"),
    "the incoming gradient is dropped": ("y) * tl.load(d_loss)", "y) + 0 * tl.load(d_loss)"),
    "a row's first chunk alone": ("tl.program_id(0) % chunks", "0"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    if not cards.interpreted():
        pytest.skip("NOT RUN: bugs are planted where the interpreter runs, on CPU")
    assert_caught(loss_cross_entropy, check, *BUGS[bug])


# What the compiler makes of it


def launch(n: int, v: int, dtype: str, config: dict | None = None, transposed: bool = False):
    """Go forward and backward as on a GPU, on memory that is not there."""
    shape = (v, n) if transposed else (n, v)
    x = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    x = (x.mT if transposed else x).requires_grad_()
    targets = torch.empty(n, dtype=torch.int64, device="meta")
    if config is None:
        cross_entropy(x, targets).backward()
        return
    with configs.trying(KERNEL, config):
        cross_entropy(x, targets).backward()


V3 = 129280
BY_RULE = [dict(n=4096, v=V3, dtype="bfloat16"), dict(n=4096, v=V3, dtype="float32")]
OTHERS = [dict(n=64, v=V3, dtype="float16"), dict(n=4096, v=V3 + 1, dtype="bfloat16"),
          dict(n=4096, v=V3, dtype="bfloat16", transposed=True)]  # fmt: skip
TUNED = [dict(n=4096, v=V3, dtype=dtype, config=config._asdict())
         for config in CANDIDATES for dtype in ("bfloat16", "float32")]  # fmt: skip


def assert_wide(call, kernels) -> None:
    """No spills; logits move by 16 bytes; a multiprocessor has loads of 32 KB under way."""
    assert [kernel.kernel for kernel in kernels] == ["read", "finish", "grad"], call
    size = getattr(torch, call["dtype"]).itemsize
    for kernel in (kernels[0], kernels[2]):
        assert kernel.spilled_bytes == 0, call
        assert kernel.instructions["LDG.128"] >= 1, call
        block = (call.get("config") or {"BLOCK": 4096})["BLOCK"]
        assert kernel.instructions["LDG.128"] == block * size // 16 // (32 * kernel.warps), call
        assert kernel.programs_on_an_sm * block * size >= 32 * 1024, call
    assert kernels[2].instructions["STG.128"] == kernels[2].instructions["LDG.128"], call
    assert kernels[1].spilled_bytes == 0, call


def test_hopper_moves_16_bytes_at_a_time_and_spills_nothing():
    compiled = compile_calls("test_kernel_loss_cross_entropy", "launch", BY_RULE)
    for call, kernels in zip(BY_RULE, compiled, strict=True):
        assert_wide(call, kernels)
        for kernel in kernels:  # exponential and logarithm alone: tolerances count them
            assert all(name.startswith(("ex2", "lg2")) for name in kernel.inexact), kernel.inexact


@pytest.mark.slow
def test_every_candidate_on_hopper():
    compiled = compile_calls("test_kernel_loss_cross_entropy", "launch", [*TUNED, *OTHERS])
    for call, kernels in zip([*TUNED, *OTHERS], compiled, strict=True):
        if call in TUNED:
            assert_wide(call, kernels)
        assert all(kernel.spilled_bytes == 0 for kernel in kernels), call


@pytest.mark.slow
@pytest.mark.parametrize("capability", [key for key in CARDS if key != HOPPER], ids=str)
def test_compiles_for_other_cards(capability):
    calls = compile_calls("test_kernel_loss_cross_entropy", "launch", BY_RULE[:1], capability)
    assert all(kernel.spilled_bytes == 0 for kernels in calls for kernel in kernels)


# What only a GPU can show


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_v3_on_a_card(dtype):
    for n, v in ((257, V3), (8, V3 + 1), (2000, 32_000)):
        x, targets = draw(n, v, dtype, "cuda")
        close(*run(x, targets), x, targets)
        expected = run(x, targets)[1]
        assert torch.equal(run(x, targets, in_place=True)[1], expected)


@pytest.mark.gpu
def test_twenty_runs_on_a_card_are_bitwise_equal():
    for n in (3, 1000):
        x, targets = draw(n, V3, torch.bfloat16, "cuda")
        bitwise_equal(lambda x=x, t=targets: tuple(y.detach() for y in run(x, t)), times=20)


@pytest.mark.gpu
def test_is_captured_in_a_graph_and_replayed_with_new_numbers():
    x, targets = draw(64, V3, torch.bfloat16, "cuda")

    def both():
        leaf = x.detach().requires_grad_()
        loss = cross_entropy(leaf, targets)
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    both()  # compiles, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    new, others = draw(64, V3, torch.bfloat16, "cuda", seed=1)
    x.copy_(new)
    targets.copy_(others)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, both(), strict=True))


@pytest.mark.gpu
def test_offsets_pass_two_billion():
    n = 2**31 // V3 + 3
    needed = 3 * n * V3 * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"NOT RUN: needs {needed / 2**30:.0f} GiB of free memory on the GPU")
    x = torch.zeros(n, V3, dtype=torch.bfloat16, device="cuda")
    x[-4:], _ = draw(4, V3, torch.bfloat16, "cuda")
    targets = torch.full((n,), IGNORED, device="cuda")
    targets[-4:] = torch.tensor([5, V3 - 1, 0, 100])
    tail, leaf = x[-4:].clone(), x.requires_grad_()
    loss = cross_entropy(leaf, targets, in_place=True)
    loss.backward()
    close(loss, leaf.detach()[-4:], tail, targets[-4:])
