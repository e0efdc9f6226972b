"""The last layer's loss without its logits: the reference's numbers, in little memory."""

import weakref

import pytest
import torch
from compiled import CARDS, HOPPER, compile_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import (
    assert_caught,
    bitwise_equal,
    is_written,
    laid_out,
    lengths,
    poisoned_memory,
    tensors_of,
)
from minids_kernels import cards, loss_cross_entropy, loss_linear
from minids_kernels.cards import Card
from minids_kernels.loss_linear import part_words, target_sum
from torch.utils._python_dispatch import TorchDispatchMode

from minids.fused.loss import IGNORED
from minids.loss import target_sum as reference

pytestmark = pytest.mark.usefixtures("interpreter")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# relative to the norm of what is compared: FP32 sums; logits, their gradients and the result are
# rounded to 16 bits; the first moves the second by as much as a logit is large
FP32 = 2e-6
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
MOST = 0.1  # of the bytes of all logits in FP32
WORDS, WIDTH = 129280, 7168  # V3's


def draw(n: int, v: int, d: int, dtype=torch.float32, device="cpu", seed: int = 0):
    """Return hidden states, a weight that gives logits of a few units, and targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator)
    weight = 2 * torch.randn(v, d, generator=generator) / d**0.5
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[2::4] = IGNORED
    return hidden.to(dtype).to(device), weight.to(dtype).to(device), targets.to(device)


def run(hidden, weight, targets, module=loss_linear, d_loss: float = 1.0):
    """Return loss and gradients, from memory that was full of NaN."""
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    with poisoned_memory():
        loss = module.target_sum(hidden, weight, targets)
        found = torch.autograd.grad(loss, (hidden, weight), torch.full_like(loss, d_loss))
    assert all(map(is_written, found))
    return loss, *found


def close(loss, d_hidden, d_weight, hidden, weight, targets, d_loss=1.0, dtype=None) -> None:
    """Compare with the reference in FP64."""
    allowed = FP32 + ROUNDED[dtype or hidden.dtype]
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = reference(*wide, targets)
    (expected * d_loss).backward()
    assert loss.dtype == torch.float32
    assert abs(float((loss - expected).detach())) <= allowed * max(1.0, float(expected.detach()))
    for x, y, like in zip((d_hidden, d_weight), wide, (hidden, weight), strict=True):
        assert x.dtype == like.dtype
        assert (x.double() - y.grad).norm() <= allowed * y.grad.norm()
    assert not d_hidden[targets == IGNORED].any()


@pytest.fixture
def small_parts(monkeypatch):
    """Let a part have 16 words and more: many parts, of few numbers."""
    monkeypatch.setattr(loss_linear, "_TILE", 16)


def test_example_by_hand(device):
    """Both logits 0: ln 2; gradients half a word towards the wrong one, away from the right one."""
    hidden = torch.tensor([[0.0, 2.0]], device=device)
    weight = torch.tensor([[1.0, 0.0], [3.0, 0.0]], device=device)
    loss, d_hidden, d_weight = run(hidden, weight, torch.tensor([0], device=device))
    assert loss.item() == pytest.approx(0.6931472, rel=1e-6)
    assert d_hidden.tolist() == [[1.0, 0.0]]
    assert d_weight.tolist() == [[0.0, -1.0], [0.0, 1.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 7])
def test_equals_reference(n, dtype, device, small_parts):
    inputs = draw(n, 200, 24, dtype, device)
    close(*run(*inputs), *inputs)


@pytest.mark.parametrize("v", [1, 2, 127, 128, 129])
def test_any_number_of_words(v, device, small_parts):
    inputs = draw(3, v, 16, device=device)
    close(*run(*inputs, d_loss=-2.0), *inputs, -2.0)


def test_parts_are_many_and_the_last_is_shorter(device, small_parts):
    hidden, weight, _ = draw(40, 500, 24, device=device)
    words = part_words(hidden, weight, torch.float32, cards.card("a test", hidden))
    assert len(weight.split(words)) > 4
    assert 500 % words


def autocast(monkeypatch, dtype=torch.bfloat16) -> None:
    """Let torch say that autocast is on: on a machine without a GPU it cannot be."""
    on = {"cuda": dtype}
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind in on)
    monkeypatch.setattr(torch, "get_autocast_dtype", on.__getitem__)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_chooses_the_dtype_of_products(dtype, device, monkeypatch, small_parts):
    """Gradients have the arguments' dtypes; the weight's, in FP32, are not rounded to BF16."""
    hidden, weight, targets = draw(5, 100, 16, device=device)
    hidden = hidden.to(dtype)
    autocast(monkeypatch)
    loss, d_hidden, d_weight = run(hidden, weight, targets)
    near = hidden.bfloat16().float(), weight.bfloat16().float()
    close(loss, d_hidden.float(), d_weight, *near, targets, dtype=torch.bfloat16)
    assert d_hidden.dtype == dtype
    assert not torch.equal(d_weight, d_weight.bfloat16().float())
    twin = draw(5, 100, 16, torch.bfloat16, device)[1]
    assert torch.equal(run(hidden, twin, targets)[0], loss)
    half = run(hidden, twin.half(), targets)[2]  # neither BF16 nor FP32: rounded twice
    assert half.dtype == torch.float16


def test_operands_of_two_dtypes_meet_in_the_wider(device, small_parts):
    hidden, weight, targets = draw(6, 70, 16, torch.bfloat16, device)
    loss, d_hidden, d_weight = run(hidden, weight.float(), targets)
    assert (d_hidden.dtype, d_weight.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(loss, run(hidden.float(), weight.float(), targets)[0])
    with pytest.raises(AssertionError):  # BF16 alone rounds more
        torch.testing.assert_close(run(hidden, weight, targets)[0], loss, rtol=1e-7, atol=0)


def test_incoming_gradient_is_there_before_rounding(device, small_parts):
    """FP16, with a loss scale: words so unlikely that FP16 has no number for their gradient."""
    hidden, weight, targets = draw(5, 100, 16, torch.float16, device)
    hidden = hidden * 3
    scale = 2.0**12
    close(*run(hidden, weight, targets, d_loss=scale), hidden, weight, targets, scale)


@pytest.mark.parametrize("asks", ["hidden", "weight", "neither"])
def test_makes_the_gradients_that_are_asked_for(asks, device, monkeypatch, small_parts):
    hidden, weight, targets = draw(6, 70, 16, device=device)
    loss, d_hidden, d_weight = run(hidden, weight, targets)
    products = []
    multiply = loss_linear.multiply
    monkeypatch.setattr(
        loss_linear, "multiply", lambda *args, **more: (products.append(1), multiply(*args, **more))
    )
    if asks == "neither":
        with torch.no_grad():
            assert torch.equal(target_sum(hidden, weight, targets), loss)
        return
    leaf = (hidden if asks == "hidden" else weight).detach().requires_grad_()
    args = (leaf, weight) if asks == "hidden" else (hidden, leaf)
    found = target_sum(*args, targets)
    forward = len(products)
    (grad,) = torch.autograd.grad(found, leaf)
    assert torch.equal(grad, d_hidden if asks == "hidden" else d_weight)
    assert len(products) == 3 * forward  # the logits again, and one product each


def test_no_target_and_no_token(device, small_parts):
    hidden, weight, targets = draw(6, 70, 16, device=device)
    loss, d_hidden, d_weight = run(hidden, weight, torch.full_like(targets, IGNORED))
    assert (loss.item(), d_hidden.any().item(), d_weight.any().item()) == (0, False, False)
    hidden, weight = hidden[:0].requires_grad_(), weight.requires_grad_()
    loss = target_sum(hidden, weight, targets[:0])
    loss.backward()
    assert (loss.item(), loss.dtype) == (0, torch.float32)
    assert hidden.grad.shape == (0, 16)
    assert not weight.grad.any()


@pytest.mark.parametrize("target", [-1, 70, 2**40])
def test_target_outside_of_the_vocabulary_is_nan(target, device, small_parts):
    hidden, weight, targets = draw(6, 70, 16, device=device)
    expected = run(hidden, weight, targets)[1]
    targets[1] = target
    loss, d_hidden, _ = run(hidden, weight, targets)
    assert loss.isnan()
    assert d_hidden[1].isnan().all()
    assert torch.equal(d_hidden[3:], expected[3:])


@pytest.mark.parametrize("layout", ["transposed", "rows 3 apart", "every second column"])
def test_any_strides(layout, device, small_parts):
    hidden, weight, targets = draw(6, 70, 16, device=device)
    inputs = laid_out(hidden, layout), laid_out(weight, layout), targets
    close(*run(*inputs), hidden, weight, targets)


@settings(max_examples=8)
@given(st.integers(1, 7), lengths(140), st.integers(1, 40), st.sampled_from(DTYPES))
def test_random_shapes(device, n, v, d, dtype):
    inputs = draw(n, v, d, dtype, device, seed=v)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_linear, "_TILE", 16)
        close(*run(*inputs), *inputs)


def test_two_runs_are_bitwise_equal(device, small_parts):
    inputs = draw(7, 100, 16, torch.bfloat16, device)
    bitwise_equal(lambda: tuple(x.detach() for x in run(*inputs)))


# Memory


class Peak(TorchDispatchMode):
    """Count the bytes of memory that operations allocate and that is not yet free again."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # as kernel_inputs' mode
        return False

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.seen = {x.untyped_storage()._cdata for x in known}
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        for x in tensors_of(y):
            storage = x.untyped_storage()
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return y

    def freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def peak_bytes(hidden, weight, targets) -> tuple[int, int]:
    """Return the most bytes beside arguments and gradients, and those of all logits in FP32."""
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    with Peak(hidden, weight, targets) as peak:
        loss = target_sum(hidden, weight, targets)
        forward = peak.most
        loss.backward()
    n, v = len(hidden), len(weight)
    gradients = hidden.numel() * hidden.itemsize + weight.numel() * weight.itemsize
    return max(forward, peak.most - gradients), 4 * n * v


def test_counter_of_memory_sees_what_the_reference_holds():
    hidden, weight, targets = draw(64, 2048, 8)
    with Peak(hidden, weight, targets) as peak:
        reference(hidden, weight, targets)
    assert peak.most >= 2 * 4 * 64 * 2048  # logits, and their logarithms
    assert peak.now <= 64, "memory that is free again must not count"


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_a_tenth_of_the_logits(states, weights, monkeypatch):
    """At V3's size, on memory that is not there: what is allocated is counted, nothing runs."""

    class Silent:
        def __getitem__(self, grid):
            return lambda *_, **__: None

    for kernel in ("read", "finish", "grad"):
        monkeypatch.setattr(loss_cross_entropy, kernel, Silent())
    monkeypatch.setattr(cards, "card", lambda *_: hopper())
    autocast(monkeypatch)
    hidden = torch.empty(4096, WIDTH, dtype=states, device="meta")
    weight = torch.empty(WORDS, WIDTH, dtype=weights, device="meta")
    most, full = peak_bytes(hidden, weight, torch.empty(4096, dtype=torch.int64, device="meta"))
    assert most <= MOST * full
    assert most > 0.05 * full, "this counter has missed something"


def hopper() -> Card:
    model = CARDS[HOPPER]
    return Card(model.name, HOPPER, model.n_sm, model.shared_bytes)


def test_memory_at_v3s_size():
    """As the parts are cut for 2,048 tokens and more, in each mix of dtypes."""
    card = hopper()
    for n in (2048, 4096, 16384, 100_000):
        for states in (torch.float32, torch.bfloat16):
            for weights in (torch.float32, torch.bfloat16):
                hidden = torch.empty(n, WIDTH, dtype=states, device="meta")
                weight = torch.empty(WORDS, WIDTH, dtype=weights, device="meta")
                words = part_words(hidden, weight, torch.bfloat16, card)
                of_part = 2 * words * (n + WIDTH * (weights == torch.float32))
                of_states = n * WIDTH * (2 if states == torch.float32 else 4)
                assert of_part + of_states <= MOST * 4 * n * WORDS, (n, states, weights)
                assert -(-n // 128) * (words // 128) >= card.n_sm


def test_parts_of_v3_by_hand():
    """Of 3/32 of 2.118 GB, 117 MB are the sum of d_hidden: 81 MB are logits of 9,900 words.

    So there are 14 parts, the least number, of 9,235 words and up to the next tile.
    """
    hidden, weight = (torch.empty(size, WIDTH, dtype=torch.bfloat16, device="meta")
                      for size in (4096, WORDS))  # fmt: skip
    assert part_words(hidden, weight, torch.bfloat16, hopper()) == 9344


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda h, w, t: target_sum(h[0], w, t), "hidden must have rows, columns"),
        (lambda h, w, t: target_sum(h, w.double(), t), "weight .* in torch.float64: .* cast"),
        (lambda h, w, t: target_sum(h[:, 1:], w, t), "hidden .* and weight .* share their width"),
        (lambda h, w, t: target_sum(h, w[:0], t), "hidden .* V > 0, got"),
        (lambda h, w, t: target_sum(h[:, :0], w[:, :0], t), "hidden must have rows, columns"),
        (lambda h, w, t: target_sum(h, w, t[1:]), "targets must be .6,. .* got .5,."),
        (lambda h, w, t: target_sum(h, w, t.int()), "targets must be .* got .* torch.int32"),
    ],
)
def test_bad_input_is_named(call, words, device):
    with pytest.raises(ValueError, match=f"target_sum: {words}"):
        call(*draw(6, 70, 16, device=device))


# Bugs that the tests above would see


def check(module) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TILE", 16)
        for dtype in (torch.float32, torch.bfloat16):
            inputs = draw(5, 90, 24, dtype)
            close(*run(*inputs, module, 2.0), *inputs, 2.0)
        hidden, weight, _ = draw(256, 2048, 2048 * WIDTH // WORDS)
        for states in (torch.float32, torch.bfloat16):
            words = module.part_words(hidden.to(states), weight, torch.bfloat16, cards.INTERPRETER)
            most = 2 * words * (256 + weight.shape[1]) + hidden.numel() * (
                2 if states == torch.float32 else 4
            )
            assert most <= MOST * 4 * 256 * 2048


BUGS = {
    "d_hidden of the last part alone": ("d_hidden, add=part > 0", "d_hidden, add=False"),
    "d_hidden is added to nothing": ("d_hidden, add=part > 0", "d_hidden, add=True"),
    "parts are all the first": ("first += width", "first += 0"),
    "logits are rounded to BF16": ("multiply(self.hidden, weight.mT, logits)",
                                   "multiply(self.hidden, weight.mT, logits)\n"
                                   "        logits.copy_(logits.bfloat16())"),
    "gradients of the first part's words": ("d_loss, logits, first,", "d_loss, logits, 0,"),
    "autocast's weight is not counted": ("(D if weight.dtype != dtype else 0)", "0"),
    "nor hidden states": ("fixed += n * D * size", "fixed += 0"),
    "nor their gradients' sum": ("fixed += 4 * n * D", "fixed += 0"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    if not cards.interpreted():
        pytest.skip("NOT RUN: bugs are planted where the interpreter runs, on CPU")
    assert_caught(loss_linear, check, *BUGS[bug])


# What the compiler makes of it: the kernels between the products


def launch(n: int, states: str, weights: str) -> None:
    """Go forward and backward as on a GPU, on memory that is not there; torch's products too."""
    hidden = torch.empty(n, WIDTH, dtype=getattr(torch, states), device="meta")
    weight = torch.empty(WORDS, WIDTH, dtype=getattr(torch, weights), device="meta")
    targets = torch.empty(n, dtype=torch.int64, device="meta")
    target_sum(hidden.requires_grad_(), weight.requires_grad_(), targets).backward()


def test_kernels_between_the_products_are_wide():
    calls = [dict(n=4096, states="bfloat16", weights="bfloat16")]
    for kernels in compile_calls("test_kernel_loss_linear", "launch", calls):
        assert {kernel.kernel for kernel in kernels} == {"read", "finish", "grad"}
        n_parts = sum(kernel.kernel == "read" for kernel in kernels)
        assert n_parts == sum(kernel.kernel == "grad" for kernel in kernels) == 14
        for kernel in kernels:
            assert kernel.spilled_bytes == 0
            assert kernel.kernel == "finish" or kernel.instructions["LDG.128"] == 4


# What only a GPU can show


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_weights_on_a_card(dtype):
    inputs = draw(300, 32_000, 1024, dtype, "cuda")
    close(*run(*inputs), *inputs)


@pytest.mark.gpu
def test_autocast_on_a_card():
    hidden, weight, targets = draw(300, 32_000, 1024, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss, d_hidden, d_weight = run(hidden, weight, targets)
    near = hidden.bfloat16().float(), weight.bfloat16().float()
    close(loss, d_hidden, d_weight, *near, targets, dtype=torch.bfloat16)


@pytest.mark.gpu
def test_memory_on_a_card():
    hidden, weight, targets = draw(2048, 32_000, 1024, torch.bfloat16, "cuda")
    run(hidden, weight, targets)  # cuBLAS takes its workspace, once
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    target_sum(*leaves, targets).backward()
    gradients = sum(x.numel() * x.itemsize for x in leaves)
    most = torch.cuda.max_memory_allocated() - before - gradients
    assert most <= MOST * 4 * 2048 * 32_000


@pytest.mark.gpu
def test_ten_runs_on_a_card_are_bitwise_equal():
    inputs = draw(300, 32_000, 1024, torch.bfloat16, "cuda")
    bitwise_equal(lambda: tuple(x.detach() for x in run(*inputs)), times=10)


@pytest.mark.gpu
def test_is_captured_in_a_graph_and_replayed_with_new_numbers():
    hidden, weight, targets = draw(300, 32_000, 256, torch.bfloat16, "cuda")

    def both():
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        loss = target_sum(*leaves, targets)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both()  # compiles, and cuBLAS takes its workspace, which a capture must not
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for old, new in zip(
        (hidden, weight, targets),
        draw(300, 32_000, 256, torch.bfloat16, "cuda", seed=1),
        strict=True,
    ):
        old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    close(*captured, hidden, weight, targets)
