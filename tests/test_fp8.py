"""minids/fp8.py: products in eight bits equal a loop over groups, forward and backward."""

import re
from collections import Counter

import fp8_loop
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fp8_loop import Roles
from torch._subclasses.fake_tensor import FakeTensorMode

from minids import Transformer, fp8, preset
from minids.ffn import SwiGLU
from minids.files.shards import FP8, slots
from minids.formats import cores
from minids.formats.groups import ACTIVATION_FLOOR, scale_shape
from minids.fp8 import BLOCK, COLUMN, TILE, Scaled, quantise, scaled_matmul
from minids.linear import Linear
from minids.schedule import Rates
from minids.train import make_optimizer, take_step

# FP32 sums of at most 128 products and of at most 5 groups in another order, relative norm. A value
# that is rounded to another code differs by 1/16, and the oracle's values are the same.
ROUNDING = 3e-7
# the largest rounding of one value to three digits behind the point, and of a product of two
ONE_VALUE = 2**-4
# Report 3.3.3 in the oracle's words; "most" is every other layer
RECIPES = {
    "most": (fp8.MOST, Roles()),
    "after attention": (fp8.AFTER_ATTENTION, Roles(inputs=True, e5m6=True)),
    "into experts": (fp8.INTO_EXPERTS, Roles(inputs=True)),
    "out of experts": (fp8.OUT_OF_EXPERTS, Roles(gradient=True)),
    "V3.1": (
        fp8.recipe(preset("nano", precision="fp8", scale_fmt="ue8m0")),
        Roles(weight=True, inputs=True, gradient=True),
    ),
}
# tokens, I, O: one number; all ragged; V3's 576 columns; exactly one group
SHAPES = [(1, 1, 1), (5, 127, 3), (130, 129, 257), (129, 576, 128), (128, 128, 128)]


def near(ours: torch.Tensor, loop) -> None:
    loop = np.asarray(loop)
    assert ours.shape == loop.shape
    gap = np.linalg.norm(ours.detach().double().numpy() - loop)
    assert gap <= ROUNDING * np.linalg.norm(loop)


def draw(*shape: int, spread: bool = False) -> torch.Tensor:
    """Draw normal numbers; with `spread` each row and column has a size of its own."""
    x = torch.randn(*shape)
    if spread:
        x = x * torch.randn(shape[0], 1).mul(2).exp() * torch.randn(1, shape[1]).mul(2).exp()
    return x.requires_grad_()


def grouped(x: Scaled) -> fp8_loop.Grouped:
    """Give the oracle what minids quantised: values, and scales spread by repetition."""
    rows, cols = x.values.shape
    scale = x.scale.detach().repeat_interleave(x.group[0], 0).repeat_interleave(x.group[1], 1)
    return fp8_loop.Grouped(x.values.detach().float().numpy(), scale[:rows, :cols].numpy())


def products(call, *inputs: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    y = call(*inputs)
    return [y, *torch.autograd.grad(y, inputs, dy)]


def to_numpy(*tensors: torch.Tensor):
    return [tensor.detach().numpy() for tensor in tensors]


# scaled_matmul


def test_by_hand():
    """max 3 -> scale 3/448; 3 is code 448, 1 is 149.33 -> 144; max 2: 2 is 448, 1 is 224."""
    a = quantise(torch.tensor([[3.0, 1.0]]))
    b = quantise(torch.tensor([[1.0, 2.0]]), BLOCK)
    assert a.values.float().tolist() == [[448.0, 144.0]]
    assert b.values.float().tolist() == [[224.0, 448.0]]
    expected = (448 * 224 + 144 * 448) * (3 / 448) * (2 / 448)
    assert scaled_matmul(a, b).item() == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize("groups", [(TILE, BLOCK), (TILE, TILE), (BLOCK, TILE), (BLOCK, BLOCK)])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_product_equals_the_loop(m, k, n, groups):
    a, b = (quantise(draw(rows, k, spread=True), g) for rows, g in zip((m, n), groups, strict=True))
    near(scaled_matmul(a, b), fp8_loop.product(grouped(a), grouped(b)))


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_product_of_transposed_operands_equals_the_loop(m, k, n):
    """As backward has them: tiles of tokens (columns) and the blocks of the forward weight."""
    columns, blocks = quantise(draw(k, m, spread=True), COLUMN), quantise(draw(k, n), BLOCK)
    both = grouped(columns).T, grouped(blocks).T
    near(scaled_matmul(columns.mT, blocks.mT), fp8_loop.product(*both))


def test_groups_are_added_in_fp32_and_the_result_is_rounded_once():
    """2^24 + 1 + 1 is 2^24 in FP32 one by one, and 2^24 + 2 in FP64."""
    values, scale = torch.zeros(1, 384), torch.tensor([[2.0**24, 1.0, 1.0]])
    values[0, [0, 128, 256]] = 1.0
    a = Scaled(values.to(FP8), scale, TILE)
    b = Scaled(values.to(FP8), torch.ones(1, 3), TILE)
    assert scaled_matmul(a, b).item() == 2.0**24
    third = Scaled(values.to(FP8), torch.tensor([[257.0, 0.0, 0.0]]), TILE)
    assert scaled_matmul(third, b, torch.bfloat16).item() == 256.0
    assert scaled_matmul(third, b, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("group", [TILE, BLOCK])
def test_zero_operands_give_zero(group):
    zero, x = quantise(torch.zeros(3, 130), group), quantise(draw(5, 130), TILE)
    assert (zero.scale > 0).all()
    assert not zero.values.float().any()  # nor NaN, which 0 / 0 would give
    assert torch.equal(scaled_matmul(zero, x), torch.zeros(3, 5))
    assert torch.equal(scaled_matmul(x, zero), torch.zeros(5, 3))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("other", [torch.randn, torch.zeros])
def test_what_is_not_finite_reaches_its_results_and_no_others(bad, other):
    x = torch.randn(3, 300)
    x[1, 200] = bad
    y = scaled_matmul(quantise(x), quantise(other(5, 300), BLOCK))
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()
    y = scaled_matmul(quantise(other(5, 300)), quantise(x, BLOCK))  # its block has all three rows
    assert not y.isfinite().any()


@pytest.mark.parametrize(
    ("a", "b", "got"),
    [
        (((3, 256), COLUMN), ((5, 256), TILE), r"\[3, 256\] by \(128, 1\)"),
        (((3, 256), TILE), ((5, 256), COLUMN), r"\[5, 256\] by \(128, 1\)"),
        (((3, 256), TILE), ((5, 255), TILE), r"\[3, 256\] by \(1, 128\) and \[5, 255\]"),
        (((3, 256), (1, 64)), ((5, 256), TILE), r"by \(1, 64\)"),
    ],
)
def test_operands_that_share_no_groups_are_refused(a, b, got):
    operands = [quantise(torch.ones(shape), group) for shape, group in (a, b)]
    with pytest.raises(ValueError, match=rf"must share a last axis in groups of 128, got .*{got}"):
        scaled_matmul(*operands)


# a layer's three products


@pytest.mark.parametrize(("tokens", "i", "o"), SHAPES)
@pytest.mark.parametrize("name", RECIPES)
def test_linear_equals_the_loop(name, tokens, i, o):
    how, roles = RECIPES[name]
    x, w, dy = draw(tokens, i, spread=True), draw(o, i, spread=True), draw(tokens, o, spread=True)
    ours = products(lambda x, w: fp8.linear(x, w, how), x, w, dy=dy)
    for one, loop in zip(ours, fp8_loop.linear(*to_numpy(x, w, dy), roles), strict=True):
        near(one, loop)


@pytest.mark.parametrize("name", RECIPES)
def test_only_what_a_layer_reads_has_a_floor(name):
    """Inputs below 1e-4 share the scale of 1e-4, as in the release; gradients of 1e-9 have none."""
    how, roles = RECIPES[name]
    x, w, dy = draw(5, 130).detach() * 1e-9, draw(8, 130), torch.randn(5, 8) * 1e-9
    y, dx, _ = products(lambda x, w: fp8.linear(x, w, how), x.requires_grad_(), w, dy=dy)
    loop = fp8_loop.linear(*to_numpy(x, w, dy), roles)
    near(y, loop.y)
    near(dx, loop.dx)
    assert 0.05 < ((y - x @ w.T).norm() / y.norm()).item() < 0.5  # digits are lost to the floor
    assert ((dx - dy @ w).norm() / dx.norm()).item() < 0.05  # and none here


@pytest.mark.parametrize(("tokens", "i", "o"), SHAPES)
@pytest.mark.parametrize("name", ["most", "out of experts", "V3.1"])
def test_gated_linear_equals_the_loop(name, tokens, i, o):
    how, roles = RECIPES[name]
    gate, up, w = draw(tokens, i), draw(tokens, i, spread=True), draw(o, i)
    dy = draw(tokens, o, spread=True)
    y, *halves, dw = products(lambda *given: fp8.gated_linear(*given, how), gate, up, w, dy=dy)
    loop = fp8_loop.gated_linear(*to_numpy(gate, up, w, dy), roles)
    near(y, loop.y)
    near(dw, loop.dw)
    for one, other in zip(halves, loop.dx, strict=True):
        near(one, other)


def gradient_by_loop(x: torch.Tensor, dy: torch.Tensor, **changes):
    """Return the oracle's dW with some roles changed, and minids' behind attention."""
    w, roles = torch.ones(8, x.shape[1]), RECIPES["after attention"][1]
    return fp8_loop.linear(*to_numpy(x, w, dy), roles._replace(**changes)).dw


def test_oracle_tells_the_roles_apart():
    """Each role of 3.3.3, left out, moves dW or y by more than rounding: the loop can fail."""
    x, dy = draw(200, 130, spread=True), draw(200, 8, spread=True)
    right = gradient_by_loop(x, dy)
    for wrong in (dict(e5m6=False), dict(inputs=False), dict(gradient=True)):
        gap = np.linalg.norm(gradient_by_loop(x, dy, **wrong) - right) / np.linalg.norm(right)
        assert 1e-3 < gap < ONE_VALUE


def test_weight_gradient_reads_the_cached_copy_and_not_the_input():
    """Digits that FP8 dropped are gone in backward too: x and its FP8 copy give the same bits."""
    x, w, dy = draw(200, 130), draw(8, 130), torch.randn(200, 8)
    copy = fp8.dequantise(quantise(x.detach(), TILE, "ue8m0", ACTIVATION_FLOOR)).requires_grad_()
    assert not x.equal(copy)
    for how, same in ((fp8.INTO_EXPERTS, True), (fp8.AFTER_ATTENTION, False)):
        first, second = (
            products(lambda x, w, how=how: fp8.linear(x, w, how), given, w, dy=dy)
            for given in (x, copy)
        )
        assert first[0].equal(second[0])  # the forward product sees E4M3 in either case
        assert first[2].equal(second[2]) == same  # E5M6 keeps three digits more


def test_leading_axes_are_carried():
    x, w, dy = draw(2 * 3, 20), draw(7, 20), torch.randn(6, 7)
    flat = products(lambda x, w: fp8.linear(x, w, fp8.MOST), x, w, dy=dy)

    def call(x, w):
        return fp8.linear(x.unflatten(0, (2, 3)), w, fp8.MOST)

    cubes = products(call, x, w, dy=dy.unflatten(0, (2, 3)))
    assert cubes[0].shape == (2, 3, 7)
    for one, other in zip(cubes, flat, strict=True):
        assert one.flatten().equal(other.flatten())
    assert fp8.linear(x[0], w, fp8.MOST).equal(flat[0][0])  # one token without any other axis


def test_dtypes_go_in_and_out():
    """BF16 weights and inputs get BF16 gradients; under autocast FP32 ones get a BF16 output."""
    x, w = draw(5, 130), draw(8, 130)
    half = [t.detach().bfloat16().requires_grad_() for t in (x, w)]
    for linear in (
        lambda x, w: fp8.linear(x, w, fp8.MOST),
        lambda x, w: fp8.gated_linear(x, x, w, fp8.MOST),
    ):
        dtypes = {t.dtype for t in products(linear, *half, dy=torch.randn(5, 8).bfloat16())}
        assert dtypes == {torch.bfloat16}
        with torch.autocast("cpu", torch.bfloat16):
            y = linear(x, w)
        assert y.dtype == torch.bfloat16
        assert y.equal(linear(x, w).bfloat16())
        assert {g.dtype for g in torch.autograd.grad(y.float().sum(), [x, w])} == {torch.float32}


# what waits for backward


def kept_by(call) -> list[torch.Tensor]:
    """Return what autograd keeps for backward, each tensor once."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr(), tensor.dtype] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return list(kept.values())


def n_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_swiglu_keeps_fp8_copies_alone():
    """Of weights, of its input (once for gate, once for up), of gate and of up; scales beside."""
    tokens, dim, hidden = 64, 256, 384
    x, in_fp32 = torch.randn(tokens, dim), SwiGLU(dim, hidden)
    ffn = SwiGLU(dim, hidden, fp8.MOST)
    for weight in (*ffn.parameters(), *in_fp32.parameters()):
        weight.data.normal_()
    kept = kept_by(lambda: ffn(x.requires_grad_()))
    assert {t.dtype for t in kept} == {FP8, torch.float32}
    weights = 3 * dim * hidden
    activations = 2 * tokens * dim + 2 * tokens * hidden
    assert n_bytes([t for t in kept if t.dtype == FP8]) == weights + activations
    scales = 4 * (weights // 128**2 + activations // 128)
    assert n_bytes([t for t in kept if t.dtype != FP8]) == scales
    own = {weight.data_ptr() for weight in in_fp32.parameters()}
    plain = [t for t in kept_by(lambda: in_fp32(x)) if t.data_ptr() not in own]
    # x once, gate, up, silu(gate) and hidden, four bytes each
    assert n_bytes(plain) == 4 * tokens * (dim + 4 * hidden)
    assert activations + 4 * activations // 128 < n_bytes(plain) / 5


def test_input_behind_attention_is_kept_in_twelve_bits():
    x, layer = torch.randn(64, 256), Linear(256, 128, fp8.AFTER_ATTENTION)
    layer.weight.data.normal_()
    kept = kept_by(lambda: layer(x.requires_grad_()))
    assert {t.dtype: t.shape for t in kept if t.dtype != torch.float32} == {
        FP8: (256, 128), torch.bfloat16: (64, 256)}  # fmt: skip
    cached = next(t for t in kept if t.dtype == torch.bfloat16).float().numpy()
    assert np.isin(np.abs(cached), fp8_loop.E5M6).all()
    assert not np.isin(np.abs(cached), fp8_loop.E4M3).all()


# which weights: those that the release stores in FP8, by the recipe of their place


@pytest.fixture
def seen(monkeypatch):
    """Collect the memory of each weight that goes through an FP8 product, with its recipe."""
    found = []
    for function, at in ((fp8._Linear, 1), (fp8._GatedLinear, 2)):

        def apply(*given, apply=function.apply, at=at):
            found.append((given[at].data_ptr(), given[at + 1]))
            return apply(*given)

        monkeypatch.setattr(function, "apply", staticmethod(apply))
    return found


def stored_in_fp8(model: Transformer) -> dict[int, str]:
    """Map memory to published name, of the matrices that files of the release hold in FP8."""
    return {s.value.data_ptr(): s.name for s in slots(model) if s.dtype(FP8) == FP8}


# embedding, head, router, norms, and the matrix that merges state and embedding before MTP
STAYS = r"(embed_tokens|lm_head|head|mlp\.gate|norm|layernorm|eh_proj)\.weight$|correction_bias$"


def tokens_for(model: Transformer, rows: int = 8, length: int = 24) -> torch.Tensor:
    return torch.randint(model.cfg.vocab_size, (rows, length))


@pytest.mark.parametrize("changes", [{}, dict(q_lora_rank=0), dict(n_shared_experts=0)])
def test_exactly_the_matrices_of_the_release_go_through_fp8_once_a_pass(changes, seen, monkeypatch):
    model = Transformer(preset("nano", precision="fp8", **changes))
    backward, dtypes = [], set()

    def quantise_twice(x, group, turned, *given, call=fp8.quantise_twice, **options):
        backward.extend([x] if turned == fp8.COLUMN else [])  # a gradient, not a weight
        return call(x, group, turned, *given, **options)

    monkeypatch.setattr(fp8, "quantise_twice", quantise_twice)

    def attention(*given, call=F.scaled_dot_product_attention, **options):
        dtypes.update(t.dtype for t in given[:3])
        return call(*given, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    losses, names = model.losses(tokens_for(model)), stored_in_fp8(model)
    assert losses.load.all()  # each expert has a token, or it would make no product
    assert Counter(names[memory] for memory, _ in seen) == Counter(names.values())
    others = {slot.name for slot in slots(model)} - set(names.values())
    assert all(re.search(STAYS, name) for name in others), others
    losses.total(0.3).backward()
    assert len(backward) == len(names)
    assert dtypes == {torch.float32}
    assert all(w.grad is not None and w.grad.any() for w in model.parameters())


@pytest.mark.parametrize("attn", ["mha", "gqa", "mqa"])
def test_the_baselines_of_mla_are_trained_by_the_same_rules(attn, seen):
    """Or a comparison with them in FP8 would compare precisions."""
    cfg = preset("toy", precision="fp8", attn=attn, n_layers=1, n_dense_layers=1, mtp_depth=0)
    model = Transformer(cfg)
    model.losses(tokens_for(model, rows=1)).main.backward()
    layer, recipes = model.layers[0], dict(seen)
    for part in (layer.attn.w_q, layer.attn.w_k, layer.attn.w_v):
        assert recipes.pop(part.weight.data_ptr()) == fp8.MOST
    assert recipes.pop(layer.attn.w_o.weight.data_ptr()) == fp8.AFTER_ATTENTION
    assert recipes.keys() == {weight.data_ptr() for weight in layer.ffn.parameters()}


POWERS = "ue8m0"
PLACES = {  # fields of a Recipe that are not its defaults, by section 3.3.3
    "self_attn.o_proj": dict(input_scale=POWERS, cached=fp8.E5M6),
    "mlp.experts.gate_proj": dict(input_scale=POWERS),
    "mlp.experts.up_proj": dict(input_scale=POWERS),
    "mlp.experts.down_proj": dict(grad_scale=POWERS),
}


@pytest.mark.parametrize("scale_fmt", [None, POWERS])
def test_powers_of_two_and_e5m6_are_where_the_report_has_them(scale_fmt, seen):
    model = Transformer(preset("nano", precision="fp8", scale_fmt=scale_fmt))
    model.losses(tokens_for(model))
    names = stored_in_fp8(model)
    assert len({memory for memory, _ in seen}) == len(names)
    for memory, how in seen:
        parts = [part for part in names[memory].split(".")[3:-1] if not part.isdigit()]
        special = PLACES.get(".".join(parts), {})
        if scale_fmt:
            special = special | dict(scale_fmt=POWERS, input_scale=POWERS, grad_scale=POWERS)
        assert how._asdict() == dict(
            scale_fmt=None, input_scale=None, grad_scale=None, cached=fp8.E4M3, grad_group=TILE,
            impl="torch",
        ) | special, names[memory]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_no_fp8_in_evaluation_and_in_other_precisions(precision, seen):
    model = Transformer(preset("toy", precision=precision))
    ids = tokens_for(model, rows=2)
    twin = Transformer(preset("toy"))
    if precision == "fp8":
        model.eval()
        twin.eval()
    assert model(ids).equal(twin(ids))
    assert model.losses(ids).main.equal(twin.losses(ids).main)
    assert not seen


def test_training_and_evaluation_differ_in_fp8():
    model = Transformer(preset("nano", precision="fp8"))
    ids = tokens_for(model)
    with torch.no_grad():
        trained, evaluated = model(ids), model.eval()(ids)
    assert 1e-3 < ((trained - evaluated).norm() / evaluated.norm()).item() < 0.5


# properties

FEW = dict(n_routed_experts=2, n_expert_groups=1, n_limited_groups=1, n_activated_experts=1)


def test_results_lie_a_few_percent_from_exact_ones():
    """Rounding to three digits costs 2.6 % of a normal number, in the mean: sqrt(2) of it."""
    x, w, dy = draw(256, 512), draw(384, 512), torch.randn(256, 384)
    exact = products(lambda x, w: F.linear(x, w), x, w, dy=dy)
    for how, _ in RECIPES.values():
        for one, other in zip(
            products(lambda x, w, how=how: fp8.linear(x, w, how), x, w, dy=dy), exact, strict=True
        ):
            assert 0.02 < ((one - other).norm() / other.norm()).item() < 0.05


@pytest.mark.parametrize("name", RECIPES)
def test_powers_of_two_go_through_exactly(name):
    """Weights, inputs or gradients times 2^n: the same codes, other scales, results times 2^n."""
    x, w, dy = draw(130, 140), draw(30, 140), torch.randn(130, 30)

    def run(a: float = 1.0, b: float = 1.0, c: float = 1.0) -> list[torch.Tensor]:
        given = [(t * n).detach().requires_grad_() for t, n in ((x, a), (w, b))]
        return products(lambda x, w: fp8.linear(x, w, RECIPES[name][0]), *given, dy=c * dy)

    y, dx, dw = run()
    for one, other in zip(run(b=2.0), (2 * y, 2 * dx, dw), strict=True):
        assert one.equal(other)
    for one, other in zip(run(a=0.5, c=8.0), (y / 2, 8 * dx, 4 * dw), strict=True):
        assert one.equal(other)


def test_scales_are_of_now_and_of_here():
    """An outlier takes digits from its own 128 channels of its own token, at this call alone."""
    x, w = draw(4, 256).detach(), torch.eye(256)
    before = fp8.linear(x, w, fp8.MOST)
    loud = x.clone()
    loud[2, 200] = 1e7
    after = fp8.linear(loud, w, fp8.MOST)
    assert after[[0, 1, 3]].equal(before[[0, 1, 3]])
    assert after[2, :128].equal(before[2, :128])
    rest = torch.arange(128, 256) != 200
    assert not after[2, 128:][rest].any()  # underflow: 1e7 / 448 / 2^10 = 22
    assert fp8.linear(x, w, fp8.MOST).equal(before)


def test_pieces_of_whole_groups_give_the_same_gradient_others_a_near_one():
    """dX is a matter of one token; dW shares scales among 128 tokens, as micro-batches cut them."""
    x, w, dy = draw(512, 140), draw(30, 140), torch.randn(512, 30)

    def run(size: int) -> list[torch.Tensor]:
        parts = zip(x.split(size), dy.split(size), strict=True)
        found = [products(lambda x, w: fp8.linear(x, w, fp8.MOST), a, w, dy=b) for a, b in parts]
        _, dx, dw = zip(*found, strict=True)
        return [torch.cat(dx), torch.stack(dw).sum(0)]

    whole, at_groups, anywhere = run(512), run(128), run(100)
    for pieces in (at_groups, anywhere):
        assert (pieces[0] - whole[0]).norm() <= ROUNDING * whole[0].norm()
    assert (at_groups[1] - whole[1]).norm() <= ROUNDING * whole[1].norm()
    gap = ((anywhere[1] - whole[1]).norm() / whole[1].norm()).item()
    assert 1e-3 < gap < ONE_VALUE


def test_recomputation_gives_the_same_bits():
    def run(recompute: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = Transformer(preset("toy", precision="fp8", init_std=0.5, **FEW))
        losses = model.losses(tokens_for(model), recompute=recompute)
        losses.total(0.3).backward()
        return [losses.main.detach(), *losses.mtp.detach(), *(w.grad for w in model.parameters())]

    for one, other in zip(run(False), run(True), strict=True):
        assert one.equal(other)


# every size


RAGGED = dict(  # V3's shape in small: 128 divides next to no width; 576 = 512 + 64 is kept
    vocab_size=40, dim=200, n_layers=2, n_dense_layers=1, inter_dim=300, moe_inter_dim=136,
    n_heads=3, q_lora_rank=130, kv_lora_rank=512, qk_nope_head_dim=24, qk_rope_head_dim=64,
    v_head_dim=20, n_routed_experts=16, max_seq_len=4096, rope_factor=1.0, init_std=0.02,
    mtp_depth=1,
)  # fmt: skip


def learn(model: Transformer, steps: int, rows: int = 4, length: int = 32) -> list[float]:
    """Learn one batch by heart; return the losses."""
    tokens, optimizer = tokens_for(model, rows, length), make_optimizer(model)
    given = (model, optimizer, tokens, torch.zeros_like(tokens), Rates(5e-3, 0.3, 1e-3))
    return [take_step(*given)["loss"] for _ in range(steps)]


@pytest.mark.parametrize("scale_fmt", [None, POWERS])
def test_a_few_steps_lower_the_loss(scale_fmt):
    cfg = preset("toy", precision="fp8", scale_fmt=scale_fmt, init_std=0.1, **FEW)
    losses = learn(Transformer(cfg), 5)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scale_fmt"),
    [("toy", None), ("nano", None), ("nano", POWERS), ("micro", None), ("ragged v3", POWERS)],
)
def test_every_size_learns(name, scale_fmt):
    changes = dict(precision="fp8", scale_fmt=scale_fmt)
    cfg = preset("v3", **RAGGED | changes) if "v3" in name else preset(name, **changes)
    losses = learn(Transformer(cfg), 30 if name == "toy" else 8)
    assert losses[-1] < losses[0] - 0.2
    assert all(np.isfinite(losses))


@pytest.mark.slow
def test_small_trains_in_fp8():
    model = Transformer(preset("small", precision="fp8"))
    losses = model.losses(tokens_for(model, 2, 16))
    losses.total(0.3).backward()
    assert losses.main.item() == pytest.approx(np.log(model.cfg.vocab_size), abs=0.5)
    for name, weight in model.named_parameters():
        assert weight.grad.isfinite().all(), name


@pytest.mark.parametrize("name", ["v2_lite", "v2", "v3", "v3_layer"])
def test_the_published_sizes_are_built_with_recipes(name):
    with torch.device("meta"):
        model = Transformer(preset(name, precision="fp8"))
    kept = {"head", *(f"mtp.{k}.w_merge" for k in range(model.cfg.mtp_depth))}
    without = {n for n, m in model.named_modules() if isinstance(m, Linear) and m.recipe is None}
    assert without == kept


# on tensor cores


def on_meta(rows: int, cols: int, group: tuple[int, int]) -> Scaled:
    scale = torch.empty(scale_shape((rows, cols), group), device="meta")
    return Scaled(torch.empty(rows, cols, dtype=FP8, device="meta"), scale, group)


@pytest.mark.parametrize("rows", [1, 3, 128, 130, 4096])
@pytest.mark.parametrize(("cols", "out"), [(128, 128), (7168, 2048), (512, 32768), (16384, 7168)])
@pytest.mark.parametrize("kind", ["forward", "backward", "weights"])
def test_shapes_and_strides_are_those_that_torch_asks_for(rows, cols, out, kind):
    """torch's own checks of its product by groups run without a GPU, on tensors without memory."""
    if kind == "weights":  # [O, tokens] and [I, tokens], both by tiles of 128 tokens
        rows = 128 * rows
        a, b = (on_meta(rows, width, COLUMN).mT for width in (out, cols))
        expected = (out, cols)
    else:
        weight = on_meta(out, cols, BLOCK) if kind == "forward" else on_meta(cols, out, BLOCK).mT
        a, b, expected = on_meta(rows, cols, TILE), weight, (rows, out)
    for dtype in (torch.float32, torch.bfloat16):
        y = cores.matmul(a, b, dtype)
        assert (tuple(y.shape), y.dtype) == (expected, dtype)


def test_a_cpu_has_no_fp8_cores():
    assert not cores.can_take(quantise(torch.ones(128, 128)), quantise(torch.ones(128, 128)))
    assert not cores.can_take(on_meta(128, 128, TILE), on_meta(128, 128, BLOCK))


@pytest.mark.parametrize(
    ("cuda", "capability", "shapes", "groups", "takes"),
    [
        ("12.9", (9, 0), ((1, 256), (384, 256)), (TILE, BLOCK), True),
        ("13.0", (9, 0), ((256, 256), (384, 256)), (BLOCK, TILE), True),
        ("13.0", (9, 0), ((1, 256), (384, 256)), (BLOCK, TILE), False),  # a ragged block
        ("13.0", (9, 0), ((1, 256), (300, 256)), (TILE, TILE), False),
        ("13.0", (9, 0), ((1, 576), (384, 576)), (TILE, BLOCK), False),
        ("13.0", (9, 0), ((256, 256), (384, 256)), (BLOCK, BLOCK), False),
        ("12.8", (9, 0), ((1, 256), (384, 256)), (TILE, BLOCK), False),  # an older cuBLAS
        (None, (9, 0), ((1, 256), (384, 256)), (TILE, BLOCK), False),  # another maker
        ("13.0", (10, 0), ((1, 256), (384, 256)), (TILE, BLOCK), False),  # Blackwell
        ("13.0", (8, 9), ((1, 256), (384, 256)), (TILE, BLOCK), False),
    ],
)
def test_cores_take_what_torch_multiplies_there(
    cuda, capability, shapes, groups, takes, monkeypatch
):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():  # tensors of a GPU that is not there
        operands = [
            Scaled(torch.empty(shape, dtype=FP8, device="cuda"),
                   torch.empty(scale_shape(shape, group), device="cuda"), group)
            for shape, group in zip(shapes, groups, strict=True)
        ]  # fmt: skip
        assert cores.can_take(*operands) == takes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_cores_round_to_bf16_only_where_it_is_asked_for(dtype, monkeypatch):
    asked, call = [], F.scaled_mm

    def scaled_mm(*given, output_dtype):
        asked.append(output_dtype)
        return call(*given, output_dtype=output_dtype)

    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    assert cores.matmul(on_meta(5, 128, TILE), on_meta(128, 128, BLOCK), dtype).dtype == dtype
    assert asked == [torch.bfloat16 if dtype == torch.bfloat16 else torch.float32]


# the tensor cores add products of one group with fewer digits than FP32 (report 3.3.2)
CORES = 1e-3


def on_gpu(x: Scaled) -> Scaled:
    return Scaled(x.values.cuda(), x.scale.cuda(), x.group)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 127, 128, 4096])
@pytest.mark.parametrize(
    ("cols", "out"), [(7168, 2048), (2048, 7168), (1536, 24576), (16384, 7168)]
)
@pytest.mark.parametrize("groups", [(TILE, BLOCK), (TILE, TILE), (BLOCK, TILE)])
def test_tensor_cores_equal_the_emulation(rows, cols, out, groups):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("NOT RUN: blocks of 128 are multiplied on Hopper GPUs alone")
    a, b = (quantise(torch.randn(n, cols), g) for n, g in zip((rows, out), groups, strict=True))
    expected = scaled_matmul(a, b)
    assert cores.can_take(on_gpu(a), on_gpu(b)) == (groups[0] == TILE or rows % 128 == 0)
    y = scaled_matmul(on_gpu(a), on_gpu(b)).cpu()
    assert (y - expected).norm() <= CORES * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, dict(dim=256, inter_dim=384, moe_inter_dim=128)])
def test_a_step_under_autocast_on_a_gpu(changes):
    """Half of the widths are multiples of 128: cores and emulation in one step."""
    model = Transformer(preset("nano", precision="fp8", **changes)).cuda()
    tokens = tokens_for(model).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        losses = model.losses(tokens)
    losses.total(0.3).backward()
    assert losses.main.item() == pytest.approx(np.log(model.cfg.vocab_size), abs=0.5)
    assert all(w.grad.isfinite().all() and w.grad.dtype == w.dtype for w in model.parameters())
