"""AdamW in one pass: torch's numbers, moments in BF16, states that go from one to the other."""

import copy
import pickle

import pytest
import torch
from compiled import CARDS, HOPPER, compile_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import assert_caught, bits, bitwise_equal, laid_out, lengths, poisoned
from minids_kernels import cards, train_adamw
from minids_kernels.train_adamw import AdamW

from minids.config import preset
from minids.files.resume import Position, load_state, save_state
from minids.model import Transformer
from minids.train import make_optimizer

pytestmark = pytest.mark.usefixtures("interpreter")

FP32, BF16 = torch.float32, torch.bfloat16
BLOCK = train_adamw._BLOCK
UNIT = 2.0**-23  # of FP32's last place, relative; at most twice what rounding to nearest loses
OPTIONS = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
# By how much torch may differ: on CPU its last few numbers, and all without AVX2, are rounded at
# other places; on a GPU it multiplies in FP64. A moment: each summand and the sum are rounded, here
# and there. A step: m, v, its root, both quotients and the product; a weight: twice besides.
MOMENT_UNITS, STEP_UNITS, WEIGHT_UNITS = 2, 8, 2
MOMENT_OF_BF16 = 2.0**-7  # relative: one unit, where FP32 numbers lie on both sides of a tie
LR = 2e-3  # the largest in the tests of whole models
FEW = 1e-3  # such numbers: two roundings of FP32 in the 2^16 that BF16 drops


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


def weights_of(shapes, device: str = "cpu") -> list[torch.Tensor]:
    drawn = (draw(*shape, seed=n) for n, shape in enumerate(shapes))
    return [x.to(device).requires_grad_() for x in drawn]


def set_gradients(weights, seed: int, dtype=FP32) -> None:
    """Give each weight random gradients whose sizes differ, some of them 0."""
    for n, weight in enumerate(weights):
        if dtype != weight.dtype:
            weight.grad_dtype = None
        grad = draw(*weight.shape, seed=100 * seed + n)
        grad *= 10.0 ** (3 * draw(*weight.shape, seed=100 * seed + n + 50)).round()
        weight.grad = grad.where(grad.abs() > 1e-6, 0.0).to(dtype).to(weight.device)


def assert_near(x: torch.Tensor, y: torch.Tensor, units: float, of: torch.Tensor) -> None:
    gap = (x.double() - y.double()).abs()
    assert (gap <= units * UNIT * of.double().abs()).all(), float((gap / of.double().abs()).max())


def oracle(weight, grad, m, v, t, lr, betas, eps, weight_decay):
    """Return weight and moments after step t: FP32 operations, each rounded to nearest.

    By way of FP64 where torch's own are not: a fma, and on some CPUs a root.
    """

    def fma(x, y, z):
        return (x.double() * y.double() + z.double()).float()

    def divide(x, y):
        return (x.double() / y.double()).float()

    def single(x: float):
        return torch.tensor(x, dtype=FP32, device=weight.device)

    beta1, beta2 = betas
    grad, m, v = grad.float(), m.float(), v.float()
    m = fma(grad - m, single(1 - beta1), m)
    v = fma(grad * single(1 - beta2), grad, v * single(beta2))
    root = divide(v.double().sqrt().float(), single((1 - beta2**t) ** 0.5)) + single(eps)
    step = divide(single(lr / (1 - beta1**t)) * m, root)
    return weight * single(1 - lr * weight_decay) - step, m, v


def test_example_by_hand(device):
    """Moments 1/2 of 2 and of 4, corrected to 2 and 4: a step of lr; and lr decay = 1/32 less."""
    weight = torch.ones(1, device=device, requires_grad=True)
    weight.grad = torch.full((1,), 2.0, device=device)
    optimizer = AdamW([weight], lr=0.125, betas=(0.5, 0.5), eps=0.0, weight_decay=0.25)
    optimizer.step()
    state = optimizer.state[weight]
    found = [weight, state["exp_avg"], state["exp_avg_sq"], state["step"]]
    assert [x.item() for x in found] == [1 - 1 / 32 - 0.125, 1.0, 2.0, 1.0]


SHAPES = [(1,), (7,), (BLOCK,), (BLOCK + 1,), (3, BLOCK - 1), (0,), (40, 60)]


@pytest.mark.parametrize("grad", [FP32, BF16], ids=str)
@pytest.mark.parametrize("moments", [FP32, BF16], ids=str)
def test_equals_oracle_bit_by_bit(moments, grad, device):
    weights = weights_of(SHAPES, device)
    expected = [(x.detach().clone(), *torch.zeros(2, *x.shape, device=device)) for x in weights]
    optimizer = AdamW(weights, **OPTIONS, moments=moments)
    for t in (1, 2, 3):
        set_gradients(weights, t, grad)
        optimizer.step()
        for n, weight in enumerate(weights):
            w, m, v = oracle(expected[n][0], weight.grad, *expected[n][1:], t, **OPTIONS)
            expected[n] = w, m.to(moments), v.to(moments)
            state = optimizer.state[weight]
            found = weight.detach(), state["exp_avg"], state["exp_avg_sq"]
            for x, y in zip(found, expected[n], strict=True):
                assert x.dtype == y.dtype
                assert torch.equal(x, y), (weight.shape, t)


def test_equals_torch(device):
    """From the same state, step by step: then no difference can grow."""
    mine, theirs = weights_of(SHAPES, device), weights_of(SHAPES, device)
    groups = lambda x: [dict(params=x[:3]), dict(params=x[3:], weight_decay=0.0, lr=1e-4)]  # noqa: E731
    ours = AdamW(groups(mine), **OPTIONS)
    torchs = torch.optim.AdamW(groups(theirs), **OPTIONS, fused=True)
    for t in (1, 2, 3, 4):
        set_gradients(mine, t)
        set_gradients(theirs, t)
        before = [x.detach().clone() for x in theirs]
        moments = [copy.deepcopy(ours.state[x]) for x in mine]
        ours.step()
        torchs.step()
        for weight, other, was, had in zip(mine, theirs, before, moments, strict=True):
            m, v = (had.get(key, torch.zeros_like(was)) for key in ("exp_avg", "exp_avg_sq"))
            state, of_torch = ours.state[weight], torchs.state[other]
            assert torch.equal(state["step"], of_torch["step"])
            grad = other.grad
            assert_near(state["exp_avg"], of_torch["exp_avg"], MOMENT_UNITS, m.abs() + grad.abs())
            assert_near(state["exp_avg_sq"], of_torch["exp_avg_sq"], MOMENT_UNITS, v + grad**2)
            # what cancels in m is a part of a step
            share = (m.abs() + grad.abs()) / of_torch["exp_avg_sq"].sqrt().clamp_min(1e-30)
            gap = (weight - other).detach().abs()
            allowed = WEIGHT_UNITS * UNIT * was.abs() + STEP_UNITS * UNIT * OPTIONS["lr"] * share
            assert (gap <= allowed).all(), float((gap / allowed).max())
        torchs.load_state_dict(copy.deepcopy(ours.state_dict()))
        with torch.no_grad():
            for weight, other in zip(mine, theirs, strict=True):
                other.copy_(weight)


def models() -> tuple[Transformer, Transformer]:
    cfg = preset("nano", vocab_size=64, dim=32, inter_dim=48, moe_inter_dim=16, precision="fp8")
    torch.manual_seed(0)
    model = Transformer(cfg)
    return model, copy.deepcopy(model)


def groups_of(model: Transformer) -> list[dict]:
    """Return the groups of make_optimizer."""
    keys = ("params", "weight_decay")
    return [{key: group[key] for key in keys} for group in make_optimizer(model).param_groups]


def like_train(model: Transformer) -> AdamW:
    return AdamW(groups_of(model), lr=0.0, betas=(0.9, 0.95), moments=BF16)


def agree(ours, mine, torchs, theirs) -> None:
    """Fail unless moments are alike, but for a few that were nearly ties, and so are weights."""

    def flat(optimizer, model, name: str) -> torch.Tensor:
        return torch.cat([optimizer.state[x][name].flatten() for x in model.parameters()])

    for name in ("exp_avg", "exp_avg_sq"):
        x, y = flat(ours, mine, name), flat(torchs, theirs, name)
        assert x.dtype == y.dtype == BF16
        assert (x != y).float().mean() <= FEW
        assert torch.allclose(x.float(), y.float(), rtol=MOMENT_OF_BF16, atol=0)
    pairs = zip(mine.parameters(), theirs.parameters(), strict=True)
    gap, size = torch.cat([torch.stack(((x - y).abs().flatten(), x.abs().flatten())).detach()
                           for x, y in pairs], 1)  # fmt: skip
    assert (gap > WEIGHT_UNITS * UNIT * (size + LR)).float().mean() <= FEW
    assert (gap <= WEIGHT_UNITS * UNIT * size + LR * MOMENT_OF_BF16).all()


def test_trains_a_model_as_minids_does_in_fp8(device):
    """Moments are cast before and after each step there, and never leave the kernel here."""
    mine, theirs = (model.to(device) for model in models())
    ours, torchs = like_train(mine), make_optimizer(theirs)
    for t, lr in enumerate((LR / 2, LR, LR / 1.3)):
        for optimizer, model in ((ours, mine), (torchs, theirs)):
            set_gradients(list(model.parameters()), t)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
    agree(ours, mine, torchs, theirs)


@pytest.mark.parametrize("first", ["ours", "torch"])
def test_a_run_goes_on_with_the_other(first, tmp_path, device):
    """Saved by one and loaded by the other, a run ends where one that was never stopped does."""
    mine, theirs = (model.to(device) for model in models())
    make = {"ours": like_train, "torch": make_optimizer}
    other = "torch" if first == "ours" else "ours"
    for t, kind in enumerate((first, other)):
        optimizer = make[kind](mine)
        if t:
            for weight in mine.parameters():
                weight.data.zero_()
            at, _ = load_state(tmp_path, mine, optimizer, {})
            assert at.step == 1
        step_once(optimizer, mine, t)
        (tmp_path / "log.jsonl").write_text("{}\n")
        save_state(tmp_path, mine, optimizer, Position(t + 1), {})
    never_stopped = make_optimizer(theirs)
    for t in (0, 1):
        step_once(never_stopped, theirs, t)
    agree(optimizer, mine, never_stopped, theirs)


def step_once(optimizer, model, seed: int) -> None:
    set_gradients(list(model.parameters()), seed)
    for group in optimizer.param_groups:
        group["lr"] = LR
    optimizer.step()


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_the_optimiser_goes_on_alike(way, device):
    (weight,) = weights_of([(300,)], device)
    halves = {weight: torch.empty(300, dtype=BF16, device=device)}
    optimizer = AdamW([weight], **OPTIONS, moments=BF16, copies=halves)
    set_gradients([weight], 1)
    optimizer.step()
    twin = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    (other,) = twin.param_groups[0]["params"]
    for w, o in ((weight, optimizer), (other, twin)):
        set_gradients([w], 2)
        o.step()
    assert other is not weight
    assert torch.equal(weight, other)
    assert torch.equal(optimizer.copies[weight], twin.copies[other])
    assert twin.state[other]["exp_avg"].dtype == BF16


def test_copies_are_the_new_weights_in_bf16(device):
    weights = weights_of([(5000,), (33, 7), (9,)], device)
    copies = {x: torch.empty_like(x, dtype=BF16) for x in weights[:2]}
    optimizer = AdamW(weights, **OPTIONS, copies=copies)
    versions = [x._version for x in (*weights, *copies.values())]
    for t in (1, 2):
        set_gradients(weights, t)
        optimizer.step()
    for weight, half in copies.items():
        assert torch.equal(half, weight.detach().bfloat16())
    after = [x._version for x in (*weights, *copies.values())]
    assert all(x > y for x, y in zip(after, versions, strict=True)), "autograd must see the change"


def test_weights_without_gradient_keep_everything(device):
    weights = weights_of([(100,), (200,), (300,)], device)
    optimizer, before = AdamW(weights, **OPTIONS), weights[1].detach().clone()
    set_gradients(weights, 1)
    weights[1].grad = None
    optimizer.step()
    assert torch.equal(weights[1], before)
    assert not optimizer.state[weights[1]]
    set_gradients(weights, 2)
    optimizer.step()
    assert [optimizer.state[x]["step"].item() for x in weights] == [2, 1, 2]
    w, m, _ = oracle(before, weights[1].grad, *torch.zeros(2, 200, device=device), 1, **OPTIONS)
    assert torch.equal(weights[1], w)
    assert torch.equal(optimizer.state[weights[1]]["exp_avg"], m)
    AdamW(weights, lr=1.0).zero_grad()
    optimizer.step()  # no gradient at all: nothing to launch


def test_gradients_of_two_dtypes_in_one_group(device):
    weights = weights_of([(100,), (200,), (300,)], device)
    twins = [x.detach().clone().requires_grad_() for x in weights]
    set_gradients(weights, 1)
    set_gradients(weights[1:2], 2, BF16)
    for twin, weight in zip(twins, weights, strict=True):
        twin.grad = weight.grad.float()
    AdamW(weights, **OPTIONS).step()
    AdamW(twins, **OPTIONS).step()
    assert all(torch.equal(x, y) for x, y in zip(weights, twins, strict=True))


@pytest.mark.parametrize("layout", ["transposed", "not aligned"])
def test_any_dense_layout(layout, device):
    """And gradients that lie in another order than their weight."""
    start = draw(70, 90).to(device)
    plain, odd = start.clone().requires_grad_(), laid_out(start, layout).requires_grad_()
    optimizers = [AdamW([x], **OPTIONS) for x in (plain, odd)]
    for t in (1, 2):
        set_gradients([plain], t)
        odd.grad = plain.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain, odd)


def test_moved_gradients_are_found(device):
    """Their old memory is spoiled: nobody may read it."""
    weights, twins = weights_of([(3000,), (50,)], device), weights_of([(3000,), (50,)], device)
    ours, again = AdamW(weights, **OPTIONS), AdamW(twins, **OPTIONS)
    kept = []
    for t in (1, 2, 3):
        for optimizer, group in ((ours, weights), (again, twins)):
            old = [x.grad for x in group if optimizer is ours and x.grad is not None]
            set_gradients(group, t)
            for grad in old:
                kept.append(grad.fill_(torch.nan))
            optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(weights, twins, strict=True))
    assert all(x.isfinite().all() for x in weights)


def test_writes_nothing_beside_the_tensors(device):
    memories = [poisoned((size,), FP32, device) for size in (1, 5, BLOCK + 3)]
    halves = [poisoned((size,), BF16, device) for size in (1, 5, BLOCK + 3)]
    weights = [memory.x.fill_(1.0).requires_grad_() for memory in memories]
    copies = dict(zip(weights, (half.x for half in halves), strict=True))
    optimizer = AdamW(weights, **OPTIONS, moments=BF16, copies=copies)
    states = []
    for weight in weights:
        state = [poisoned(weight.shape, BF16, device) for _ in range(2)]
        moments = [memory.x.zero_() for memory in state]
        step = torch.zeros((), device=device)
        optimizer.state[weight] = dict(step=step, exp_avg=moments[0], exp_avg_sq=moments[1])
        states += state
    set_gradients(weights, 1)
    optimizer.step()
    for memory in (*memories, *halves, *states):
        memory.check()


@settings(max_examples=8)
@given(st.lists(lengths(3 * BLOCK), min_size=1, max_size=4), st.booleans())
def test_random_sizes(device, sizes, half):
    weights = weights_of([(size,) for size in sizes], device)
    before = [x.detach().clone() for x in weights]
    set_gradients(weights, 3)
    AdamW(weights, **OPTIONS, moments=BF16 if half else FP32).step()
    for weight, was in zip(weights, before, strict=True):
        zeros = torch.zeros(2, *was.shape, device=device)
        assert torch.equal(weight, oracle(was, weight.grad, *zeros, 1, **OPTIONS)[0])


def test_special_numbers_stay_what_they_are(device):
    """NaN and infinities spoil their own weight alone, as torch's do."""
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, 3e38, 1e-30])
    mine = draw(8).to(device).requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    for weight, kind in ((mine, AdamW), (theirs, torch.optim.AdamW)):
        weight.grad = special.to(device)
        kind([weight], **OPTIONS).step()
    assert torch.equal(mine.isfinite(), theirs.isfinite())
    assert torch.equal(mine.isnan(), theirs.isnan())
    finite = mine.isfinite()
    torch.testing.assert_close(mine[finite], theirs[finite])


@pytest.mark.parametrize("t", [1, 7, 1000, 100_000, 2**24 - 2])
def test_step_counts_are_exact(t, device):
    """Powers of beta in FP64: 1 - beta^t has no digits to lose while beta^t is near 1."""
    (weight,) = weights_of([(50,)], device)
    optimizer, was = AdamW([weight], **(OPTIONS | dict(betas=(0.9, 0.99999)))), weight.detach()
    was, zeros = was.clone(), torch.zeros(2, 50, device=device)
    m, v = zeros.clone()
    step = torch.tensor(float(t - 1), device=device)
    optimizer.state[weight] = dict(step=step, exp_avg=m, exp_avg_sq=v)
    set_gradients([weight], 1)
    optimizer.step()
    options = OPTIONS | dict(betas=(0.9, 0.99999))
    assert optimizer.state[weight]["step"].item() == t
    assert torch.equal(weight, oracle(was, weight.grad, *zeros, t, **options)[0])


def test_schedulers_hooks_closures_and_scalers_work(device):
    (weight,) = weights_of([(10,)], device)
    set_gradients([weight], 1)
    optimizer, seen = AdamW([weight], lr=1.0, weight_decay=0.0), []
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    assert optimizer.step(lambda: 7.0) == 7.0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert seen == [1]
    twin = weight.detach().clone().requires_grad_()
    scaled = AdamW([twin], lr=0.25)
    scaler = torch.amp.GradScaler(device, init_scale=8.0)
    plain = AdamW([weight], lr=0.25)
    weight.grad = None
    (weight * weight).sum().backward()
    scaler.scale((twin * twin).sum()).backward()
    plain.step()
    scaler.step(scaled)
    assert torch.equal(weight, twin), "the scaler must divide gradients before the step"


def test_lr_may_be_a_tensor(device):
    weights = weights_of([(100,)], device) + weights_of([(100,)], device)
    set_gradients(weights[:1], 1)
    weights[1].grad = weights[0].grad
    AdamW(weights[:1], **OPTIONS).step()
    rate = torch.tensor(OPTIONS["lr"], dtype=torch.float64, device=device)
    AdamW(weights[1:], **(OPTIONS | dict(lr=rate))).step()
    assert torch.equal(*weights)


def test_elements_past_two_billion_are_found(device):
    """By address: tensors that would start 2^33 bytes before what is there."""
    start, size = (2**31 + 5 * BLOCK) // BLOCK * BLOCK, BLOCK + 100
    parts = [draw(size, seed=n).to(device) for n in range(2)]
    zeros = torch.zeros(2, size, device=device)
    weight, grad, m, v = *parts, *zeros.clone()
    was = weight.clone()
    starts = [x.data_ptr() - x.itemsize * start for x in (weight, grad, m, v)]
    rows = [*starts, 0, 0, start + size, -(start // BLOCK)]
    table = torch.tensor(rows, dtype=torch.int64, device=device)[:, None]
    beta1, beta2 = OPTIONS["betas"]
    lr, decay, eps = (OPTIONS[key] for key in ("lr", "weight_decay", "eps"))
    numbers = torch.tensor([[1 - lr * decay, lr / (1 - beta1), (1 - beta2) ** 0.5]], device=device)
    owner = torch.zeros(2, dtype=torch.int32, device=device)
    train_adamw.update[(2,)](
        table, owner, numbers, 1, 1 - beta1, beta2, 1 - beta2, eps, train_adamw._OF[FP32],
        train_adamw._OF[FP32], False, BLOCK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    assert torch.equal(weight, oracle(was, grad, *zeros, 1, **OPTIONS)[0])


def test_two_runs_are_bitwise_equal(device):
    def run():
        weights = weights_of([(BLOCK + 100,), (40, 30)], device)
        optimizer = AdamW(weights, **OPTIONS, moments=BF16)
        for t in (1, 2):
            set_gradients(weights, t)
            optimizer.step()
        return [x.detach() for x in weights]

    bitwise_equal(run)


def with_gradient(weight, grad=None):
    weight.grad_dtype = None
    weight.grad = torch.zeros_like(weight) if grad is None else grad
    return weight


def loaded(option: str):
    weight = with_gradient(torch.zeros(3, requires_grad=True))
    optimizer = AdamW([weight])
    theirs = torch.optim.AdamW([weight], **{option: True}, fused=True)
    optimizer.load_state_dict(theirs.state_dict())
    return optimizer


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: AdamW([x], moments=torch.float16), "moments must be .* got torch.float16"),
        (lambda x: AdamW([x], copies={x: torch.zeros(3)}), "a copy must be in torch.bfloat16"),
        (lambda x: AdamW([x], copies={x: torch.zeros(4, dtype=BF16)}), "a copy must .*4"),
        (
            lambda x: AdamW([x], copies={x.detach(): torch.zeros(3, dtype=BF16)}),
            "a copy must be .* a weight of a group",
        ),
        (
            lambda x: AdamW([with_gradient(x.detach().bfloat16().requires_grad_())]).step(),
            "weights must be dense and in torch.float32, got torch.bfloat16",
        ),
        (
            lambda x: AdamW([with_gradient(torch.zeros(6)[::2].requires_grad_())]).step(),
            "weights must be dense .* strides .2",
        ),
        (
            lambda x: AdamW([with_gradient(x, torch.zeros(3, dtype=torch.float16))]).step(),
            "gradients must be .* got .* in torch.float16",
        ),
        (
            lambda x: AdamW([with_gradient(x, torch.zeros(3).to_sparse())]).step(),
            "gradients must be dense .* got torch.sparse_coo",
        ),
        (lambda x: loaded("amsgrad").step(), "amsgrad is not there: use torch.optim.AdamW"),
        (lambda x: loaded("maximize").step(), "maximize is not there"),
    ],
)
def test_bad_input_is_named(call, words, interpreter):
    if not cards.interpreted():
        pytest.skip("NOT RUN: refusals are the same everywhere, these tensors are on CPU")
    with pytest.raises(ValueError, match=f"AdamW: {words}"):
        call(torch.zeros(3, requires_grad=True))


# Bugs that the tests above would see


def check(module) -> None:
    sizes = (BLOCK + 5, 700, 3)
    weights = weights_of([(size,) for size in sizes])
    expected = [(x.detach().clone(), *torch.zeros(2, *x.shape)) for x in weights]
    copies = {weights[1]: torch.zeros(700, dtype=BF16)}
    optimizer = module.AdamW(weights, **OPTIONS, moments=BF16, copies=copies)
    for turn, late in ((1, 1), (2, 0), (3, 0)):
        set_gradients(weights, turn)
        weights[0].grad = None if late else weights[0].grad
        optimizer.step()
        for n, weight in enumerate(weights):
            if late and n == 0:
                continue
            t = turn - (n == 0)
            w, m, v = oracle(expected[n][0], weight.grad, *expected[n][1:], t, **OPTIONS)
            expected[n] = w, m.bfloat16(), v.bfloat16()
            state = optimizer.state[weight]
            found = weight.detach(), state["exp_avg"], state["exp_avg_sq"]
            assert all(torch.equal(x, y) for x, y in zip(found, expected[n], strict=True))
            assert state["step"] == t
    assert torch.equal(copies[weights[1]], weights[1].detach().bfloat16())


BUGS = {
    "decay after the step": ("mask=inside) * kept", "mask=inside)"),
    "decay of the wrong sign": ("kept = 1.0 - rate", "kept = 1.0 + rate"),
    "no bias correction": ("(rate / first)", "rate"),
    "the first step is step 0": ("exponent = t.to(tl.int32)", "exponent = t.to(tl.int32) + 1"),
    "eps inside of the root": ("root) + eps", "root) + eps * 1e4"),
    "moments are swapped": ("m = address(table + _M * T", "m = address(table + _V * T"),
    "the last number is missing": ("inside = at < left if", "inside = at < left - 1 if"),
    "another tensor's numbers": ("numbers += tensor * 3\n    kept", "kept"),
    "each tensor starts at its program": ("(program - tl.load(table + _FIRST * T))", "program"),
    "the step is not counted": ("tl.store(step, t)", "tl.store(step, t - 1.0)"),
    "the copy is the old weight": ("tl.store(copy + at, w.to", "tl.store(copy + at, g.to"),
    "the old addresses": ("addresses == self.addresses", "self.addresses"),
    "v of g": ("tl.fma(g * one_less_beta2, g,", "tl.fma(g, one_less_beta2,"),
    "FP32 alone": ("(whole, x - whole)", "(whole, 0.0)"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    if not cards.interpreted():
        pytest.skip("NOT RUN: bugs are planted where the interpreter runs, on CPU")
    assert_caught(train_adamw, check, *BUGS[bug])


# What the compiler makes of it


def launch(grad: str, moments: str, aligned: bool = True) -> None:
    """Take two steps as on a GPU, on memory that is not there, with another lr: one compilation."""
    weight = torch.empty(7168, 18432, device="meta", requires_grad=True)
    with_gradient(weight, torch.empty_like(weight, dtype=getattr(torch, grad)))
    copies = {weight: torch.empty_like(weight, dtype=BF16)}
    optimizer = AdamW([weight], moments=getattr(torch, moments), copies=copies)
    kernels = (train_adamw.count, train_adamw.update)
    before = None
    for lr in (1e-3, 0.0, 1.0, 3):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        counts = [len(kernel.device_caches[0][0]) for kernel in kernels]
        assert counts == (before or counts), "lr must not compile anew"
        before = counts


CALLS = [
    dict(grad="float32", moments="bfloat16"),  # as V3 was trained
    dict(grad="bfloat16", moments="float32"),
]


def test_hopper_moves_16_bytes_at_a_time_and_spills_nothing():
    found = compile_calls("test_kernel_train_adamw", "launch", CALLS)
    for call, kernels in zip(CALLS, found, strict=True):
        assert [kernel.kernel for kernel in kernels[:2]] == ["count", "update"]
        for kernel in kernels:
            assert kernel.spilled_bytes == 0, call
            assert not kernel.inexact, call
        update = kernels[1]
        bytes_in = 4 + getattr(torch, call["grad"]).itemsize
        bytes_in += 2 * getattr(torch, call["moments"]).itemsize
        of_a_thread = BLOCK // (32 * update.warps)
        assert update.instructions["LDG.128"] == of_a_thread * bytes_in // 16, call
        assert update.instructions["STG.128"] >= 3, call
        assert update.programs_on_an_sm * update.warps >= 16, call


@pytest.mark.slow
@pytest.mark.parametrize("capability", [key for key in CARDS if key != HOPPER], ids=str)
def test_compiles_for_other_cards(capability):
    for kernels in compile_calls("test_kernel_train_adamw", "launch", CALLS[:1], capability):
        assert all(kernel.spilled_bytes == 0 for kernel in kernels)


# What only a GPU can show


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    weights = weights_of([(5000,), (300, 700)], "cuda")
    optimizer = AdamW(weights, **OPTIONS, moments=BF16)
    set_gradients(weights, 1)
    optimizer.step()
    moved = [draw(*x.shape, seed=7).cuda() for x in weights]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for weight, grad in zip(weights, moved, strict=True):
            weight.grad = grad
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_graph_takes_steps_that_count_on():
    """Gradients lie elsewhere in the graph; lr is a tensor; other steps come in between."""
    shapes = [(5000,), (300, 700)]
    weights, twins = weights_of(shapes, "cuda"), weights_of(shapes, "cuda")
    rate = torch.tensor(1e-3, device="cuda")
    ours = AdamW(weights, **(OPTIONS | dict(lr=rate)), moments=BF16)
    again = AdamW(twins, **(OPTIONS | dict(lr=rate)), moments=BF16)
    source = [draw(*shape, seed=9).cuda() for shape in shapes]

    def eager(optimizer, group) -> None:
        for weight, x in zip(group, source, strict=True):
            weight.grad = x * 2
        optimizer.step()

    eager(ours, weights)
    eager(again, twins)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        eager(ours, weights)
    for t in range(4):
        rate.fill_(1e-3 * (t + 1))
        for n, x in enumerate(source):
            x.copy_(draw(*x.shape, seed=20 + 2 * t + n))
        if t == 2:
            eager(ours, weights)
        else:
            graph.replay()
        eager(again, twins)
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(weights, twins, strict=True))
    assert ours.state[weights[0]]["step"].item() == 5


@pytest.mark.gpu
def test_large_tensors_on_a_card():
    weights = weights_of([(4096, 7168), (1,), (2048, 2049)], "cuda")
    before = [x.detach().clone() for x in weights]
    set_gradients(weights, 1, BF16)
    optimizer = AdamW(weights, **OPTIONS, moments=BF16)
    optimizer.step()
    for weight, was in zip(weights, before, strict=True):
        zeros = torch.zeros(2, *was.shape, device="cuda")
        w, m, v = oracle(was, weight.grad, *zeros, 1, **OPTIONS)
        state = optimizer.state[weight]
        assert torch.equal(weight, w)
        assert bool((bits(state["exp_avg"]) == bits(m.bfloat16())).all())
        assert bool((bits(state["exp_avg_sq"]) == bits(v.bfloat16())).all())
