import inspect
import math

import pytest
import torch
from torch import Tensor

from minids import Config, Transformer, preset
from minids.cache import Cache
from minids.checks.inputs import check_ids
from minids.loss import count_targets

# FP32 sums of a few dozen products in another order, through three layers
TOLERANCE = dict(rtol=1e-4, atol=1e-5)
# a loss is a mean of FP32 logarithms of sums
LOSS = dict(rtol=1e-6, atol=1e-6)

BASE = dict(
    vocab_size=40, dim=32, n_layers=3, n_dense_layers=1, inter_dim=48, moe_inter_dim=16, n_heads=2,
    q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    original_seq_len=32, max_seq_len=32, n_routed_experts=8, n_activated_experts=2,
    n_expert_groups=4, n_limited_groups=2, seq_loss_alpha=0.01, mtp_depth=2, init_std=0.2,
)  # fmt: skip
every_attention = pytest.mark.parametrize("attn", ["mla", "mha", "gqa", "mqa"])


def small(**changes) -> Transformer:
    return Transformer(Config(**BASE | changes), seed=3)


def text(batch: int = 2, tokens: int = 14) -> Tensor:
    return torch.randint(40, (batch, tokens), generator=torch.Generator().manual_seed(4))


def test_by_hand():
    """With silent layers: the embedding (3, 4) over sqrt(12.5), times the head."""
    model = small(dim=2, mtp_depth=0)
    for block in model.layers:
        for weight in block.parameters():
            weight.data.zero_()
    model.embed.data[7] = torch.tensor([3.0, 4.0])
    model.head.weight.data[:3] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
    logits = model(torch.tensor([[7]]))
    expected = torch.tensor([0.8485281, 1.1313708, -0.2828427])
    torch.testing.assert_close(logits[0, 0, :3], expected, **TOLERANCE)


@every_attention
def test_shapes(attn: str):
    model = small(attn=attn, n_kv_heads=2)
    assert model(text()).shape == (2, 14, 40)
    assert model.hidden(text()).shape == (2, 14, 32)
    losses = model.losses(text())
    assert losses.main.shape == losses.balance.shape == ()
    assert losses.mtp.shape == (2,)
    assert losses.load.shape == (4, 8)  # two MoE layers, two MTP modules
    assert len(model.routers) == 4


@pytest.mark.parametrize(
    ("name", "mtp_depth", "expected"),
    [
        ("v3", 0, 671_026_419_200),
        ("v3", 1, 671_026_419_200 + 11_610_068_224),
        ("v2", 0, 235_741_434_880),
        ("v2_lite", 0, 15_706_484_224),
    ],
)
def test_published_sizes(name: str, mtp_depth: int, expected: int):
    """Fact sheet 11, every element of a published model; V3's counts its routing biases."""
    with torch.device("meta"):
        model = Transformer(preset(name, mtp_depth=mtp_depth))
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == expected
    biases = sum(router.bias.numel() for router in model.routers if router.bias is not None)
    assert biases == {("v3", 0): 14_848, ("v3", 1): 15_104}.get((name, mtp_depth), 0)


def test_router_bias_exists_at_every_size():
    """The release creates it for dim 7168 alone; a shrunk copy would be another model."""
    assert [router.bias.shape for router in small().routers] == [(8,)] * 4


def test_initialisation():
    """Section 4.2: standard deviation 0.006, mean 0; gains are 1, biases 0."""
    assert preset("v3").init_std == 0.006
    model = Transformer(preset("micro", init_std=preset("v3").init_std))
    for name, weight in model.named_parameters():
        if name.endswith("gain"):
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:
            # five standard errors of a standard deviation and of a mean
            spread = 5 * 0.006 / math.sqrt(weight.numel())
            assert abs(weight.std().item() - 0.006) < spread / math.sqrt(2), name
            assert abs(weight.mean().item()) < spread, name
    assert not any(router.bias.any() for router in model.routers)


def test_seed_fixes_every_weight():
    first, again, other = (
        Transformer(Config(**BASE), seed=seed).state_dict() for seed in (5, 5, 6)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if not name.endswith(("gain", "bias"))]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    values = torch.cat([first[name].flatten() for name in drawn])
    assert len(values.unique()) > 0.99 * len(values), "no two weights share their draws"


def test_building_and_running_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    model = small()
    model.losses(text(), recompute=True).total(0.3).backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_dropping_mtp_leaves_the_logits_alone():
    """Bit-identical, and the same seed draws the same main model."""
    with_mtp, without = small(), small(mtp_depth=0)
    assert torch.equal(with_mtp(text()), without(text()))
    assert torch.equal(with_mtp.losses(text()).main, without.losses(text()).main)


@every_attention
def test_causal(attn: str):
    model = small(attn=attn)
    ids = text()
    moved = ids.clone()
    moved[:, 9] = (moved[:, 9] + 1) % 40
    before, after = model(ids), model(moved)
    # to rounding: a token that changes experts changes the sizes of other tokens' products
    torch.testing.assert_close(before[:, :9], after[:, :9], **TOLERANCE)
    assert (before[:, 9:] - after[:, 9:]).abs().amax(-1).min() > 1e-3


@every_attention
@pytest.mark.parametrize("chunks", [[14], [1] * 14, [5, 1, 1, 7]], ids=str)
@torch.no_grad()
def test_cache_equals_no_cache(attn: str, chunks: list[int]):
    model = small(attn=attn)
    cache = model.new_cache(batch=2, capacity=14)
    parts = [model(part, cache=cache) for part in text().split(chunks, dim=1)]
    assert cache.lengths == [14, 14]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(text()), **TOLERANCE)


@pytest.mark.parametrize("attn", ["mla", "gqa"])
@torch.no_grad()
def test_ragged_rows_equal_rows_alone(attn: str):
    """A padded prefill, then two steps of two tokens, with rows of 3, 7 and 5 tokens."""
    model, ids = small(attn=attn), text(3, 12)
    lengths = [3, 7, 5]
    cache = model.new_cache(batch=3, capacity=12)
    outputs = [model(ids[:, :7], lengths=lengths, cache=cache)]
    for step in (0, 2):
        new = torch.stack(
            [row[n + step : n + step + 2] for row, n in zip(ids, lengths, strict=True)]
        )
        outputs.append(model(new, cache=cache))
    assert cache.lengths == [7, 11, 9]
    padded = model(ids[:, :7], lengths=lengths)
    for row, n in enumerate(lengths):
        alone = model(ids[row : row + 1, : n + 4])[0]
        ours = torch.cat([outputs[0][row, :n], outputs[1][row], outputs[2][row]])
        torch.testing.assert_close(ours, alone, **TOLERANCE)
        torch.testing.assert_close(padded[row, :n], alone[:n], **TOLERANCE)


@torch.no_grad()
def test_rollback_forgets():
    """Wrong tokens, forgotten: some of all rows, then a different number of each."""
    model, ids = small(), text(2, 12)
    cache = model.new_cache(batch=2, capacity=12)
    model(ids[:, :6], cache=cache)
    model((ids[:, 6:10] + 1) % 40, cache=cache)
    cache.rollback(4)
    assert cache.lengths == [6, 6]
    torch.testing.assert_close(model(ids[:, 6:9], cache=cache), model(ids)[:, 6:9], **TOLERANCE)
    cache.rollback([1, 3])
    assert cache.lengths == [8, 6]
    new = torch.stack([ids[0, 8:11], ids[1, 6:9]])
    expected = torch.stack([model(ids)[0, 8:11], model(ids)[1, 6:9]])
    torch.testing.assert_close(model(new, cache=cache), expected, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_size_is_exact(dtype: torch.dtype):
    """C + R numbers a token a layer, however many heads there are; 576 for V3."""
    for heads in (2, 8):
        model = small(n_heads=heads)
        like = torch.zeros(1, dtype=dtype)
        cache = Cache(3, 2, 14, model.cfg.cache_dim, like)
        assert cache.nbytes == 3 * 2 * 14 * (10 + 4) * dtype.itemsize
    with torch.device("meta"):
        v3 = Transformer(preset("v3", precision="bf16", mtp_depth=0)).bfloat16()
        assert v3.new_cache(batch=1, capacity=1).nbytes == 70_272  # fact sheet 11


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_mtp_cache_equals_no_cache(depth: int):
    """Slots count the module's own positions, from 0."""
    model, tokens = small(mtp_depth=depth), text()
    cache = model.new_cache(batch=2, capacity=14, mtp=True)
    hidden = model.hidden(tokens[:, :-1])
    for k, module in enumerate(model.mtp, start=1):
        hidden, ids = hidden[:, : 13 - k], tokens[:, k:13]
        phase, visible = model.positions(*ids.shape, offset=k)
        whole, _ = module(hidden, model.embed[ids], phase, visible)
        parts = []
        cache.lengths = [0, 0]
        for part, embedded in zip(
            hidden.split(4, dim=1), model.embed[ids].split(4, 1), strict=True
        ):
            phase, visible = model.positions(2, part.shape[1], cache=cache, offset=k)
            state, _ = module(part, embedded, phase, visible, cache.layer(k - 1))
            cache.advance(part.shape[1])
            parts.append(state)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, **TOLERANCE)
        hidden = whole


def test_offset_moves_positions():
    """MTP module k turns by i + k: all by the same angle, so that no output could show it."""
    moved, _ = small().positions(1, 5, offset=2)
    phase, _ = small().positions(1, 7)
    assert torch.equal(moved, phase[:, 2:])
    assert not torch.equal(moved, phase[:, :5])


DOCUMENTS = torch.tensor([[0] * 6 + [1] * 8, [4] * 1 + [9] * 9 + [2] * 4])
PIECES = [[(0, 6), (6, 14)], [(0, 1), (1, 10), (10, 14)]]  # the same, as ranges


@every_attention
@torch.no_grad()
def test_documents_equal_documents_alone(attn: str):
    model = small(attn=attn)
    packed = model(text(), mask=DOCUMENTS)
    for row, pieces in enumerate(PIECES):
        for start, end in pieces:
            alone = model(text()[row : row + 1, start:end])[0]
            torch.testing.assert_close(packed[row, start:end], alone, **TOLERANCE)
    assert not torch.allclose(packed, model(text()), rtol=0.1)


@torch.no_grad()
def test_losses_of_documents_equal_documents_alone():
    """The sums over all targets inside a document; a document too short for a depth has none."""
    model, tokens = small(), text()
    packed = model.losses(tokens, mask=DOCUMENTS, n_targets=1)
    main, mtp = 0.0, torch.zeros(2)
    for row, pieces in enumerate(PIECES):
        for start, end in pieces:
            piece = tokens[row : row + 1, start:end]
            if end - start > 1:
                alone = model.losses(piece, n_targets=1)
                main, mtp = main + alone.main, mtp + alone.mtp
    torch.testing.assert_close(packed.main, main, **TOLERANCE)
    torch.testing.assert_close(packed.mtp, mtp, **TOLERANCE)
    targets = 5 + 7 + 0 + 8 + 3
    assert count_targets(tokens, DOCUMENTS) == targets
    torch.testing.assert_close(
        model.losses(tokens, mask=DOCUMENTS).main, packed.main / targets, **LOSS
    )


def losses_by_loop(model: Transformer, tokens: Tensor) -> list[float]:
    """Eqs. 23 and 24, target by target: -1/T sum log p(t_(i+k+1)) at each depth k."""
    batch, count = tokens.shape[0], tokens.shape[1] - 1
    hidden = model.hidden(tokens[:, :-1])
    sums = []
    for k in range(model.cfg.mtp_depth + 1):
        if k:
            ids = tokens[:, k:-1]
            phase, visible = model.positions(*ids.shape, offset=k)
            hidden, _ = model.mtp[k - 1](hidden[:, :-1], model.embed[ids], phase, visible)
        total = 0.0
        for b in range(batch):
            for i in range(count - k):
                logits = (model.head.weight @ hidden[b, i]).double()
                total -= logits.log_softmax(-1)[tokens[b, i + k + 1]].item()
        sums.append(total / (batch * count))
    return sums


@torch.no_grad()
def test_losses_equal_a_loop():
    model = small()
    losses = model.losses(text())
    expected = torch.tensor(losses_by_loop(model, text()))
    torch.testing.assert_close(torch.stack([losses.main, *losses.mtp]), expected, **LOSS)


@torch.no_grad()
def test_total_by_hand():
    """Eq. 25: lambda over depth times the sum of MTP losses; the alphas are in `balance`."""
    losses = small().losses(text())
    losses = losses._replace(
        main=torch.tensor(2.0), mtp=torch.tensor([3.0, 5.0]), balance=torch.tensor(0.5)
    )
    assert losses.total(0.25).item() == 2.0 + 0.25 * (3.0 + 5.0) / 2 + 0.5
    assert losses._replace(mtp=torch.zeros(0)).total(0.25).item() == 2.5


@torch.no_grad()
def test_n_targets_makes_micro_batches_add_up():
    """Four rows at once, or one by one over the same number of targets."""
    model, tokens = small(), text(4)
    together = model.losses(tokens)
    parts = [model.losses(row, n_targets=4 * 13) for row in tokens.split(1)]
    torch.testing.assert_close(together.main, sum(part.main for part in parts), **LOSS)
    torch.testing.assert_close(together.mtp, sum(part.mtp for part in parts), **LOSS)
    assert torch.equal(together.load, sum(part.load for part in parts))


def test_load_counts_every_visit():
    """K visits a token; the module of depth k runs over T - k tokens."""
    load = small().losses(text()).load
    assert load.sum(-1).tolist() == [2 * 13 * 2, 2 * 13 * 2, 2 * 12 * 2, 2 * 11 * 2]


@torch.no_grad()
def test_balance_loss_adds_up_and_can_be_off():
    model = small(seq_loss_alpha=0.0)
    assert model.losses(text()).balance == 0
    losses = small(seq_loss_alpha=0.01, aux_loss_alpha=0.02).losses(text())
    # each of four layers adds about 1 times each alpha
    assert 0.03 * 4 * 0.9 < losses.balance.item() < 0.03 * 4 * 1.5


@pytest.mark.parametrize("attn", ["mla", "gqa"])
def test_recompute_changes_no_bit(attn: str):
    """Losses, gradients and loads: nothing is computed differently or counted twice."""
    runs = []
    for recompute in (False, True):
        model = small(attn=attn, n_kv_heads=1)
        losses = model.losses(text(), recompute=recompute)
        losses.total(0.3).backward()
        grads = [weight.grad for weight in model.parameters()]
        runs.append([losses.main, losses.mtp, losses.balance, losses.load, *grads])
    for plain, recomputed in zip(*runs, strict=True):
        assert torch.equal(plain, recomputed)


def test_recompute_runs_blocks_again():
    calls = {True: 0, False: 0}
    for recompute in calls:
        model = small()

        def count(*_, recompute=recompute):
            calls[recompute] += 1

        for block in [*model.layers, *model.mtp]:
            block.register_forward_pre_hook(count)
        model.losses(text(), recompute=recompute).total(0.3).backward()
    assert calls == {False: 5, True: 10}


def test_main_loss_alone_leaves_mtp_without_gradient():
    model = small()
    model.losses(text()).main.backward()
    assert all(weight.grad is None or not weight.grad.any() for weight in model.mtp.parameters())
    assert model.layers[0].attn.w_o.weight.grad.any()


def test_a_step_of_one_token():
    """One token, one row, with and without cache."""
    model = small()
    ids = text(1, 1)
    cache = model.new_cache(batch=1, capacity=1)
    torch.testing.assert_close(model(ids), model(ids, cache=cache), **TOLERANCE)
    assert cache.lengths == [1]


WRONG_IDS = [
    (torch.zeros(3, dtype=torch.int64), "int64"),
    (torch.zeros(1, 3), "float32"),
    (torch.zeros(1, 3, dtype=torch.int32), "int32"),
    (torch.zeros(1, 0, dtype=torch.int64), "not empty"),
    (torch.tensor([[0, 40]]), r"0\.\.39, got 0\.\.40"),
    (torch.tensor([[-1, 3]]), r"0\.\.39, got -1\.\.3"),
]


@pytest.mark.parametrize(("ids", "message"), WRONG_IDS)
def test_wrong_ids(ids: Tensor, message: str):
    """In use there is no hook that checks shapes first, so here it is taken off."""
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(check_ids)(ids, small().cfg.vocab_size)
    if ids.dtype == torch.int64 and ids.ndim == 2:
        with pytest.raises(ValueError, match=message):
            small()(ids)
        with pytest.raises(ValueError, match=message):
            small().losses(ids)


def test_error_messages():
    model, ids = small(), text()
    cache = model.new_cache(batch=2, capacity=8)
    with pytest.raises(ValueError, match="impl must be one of 'torch', 'triton', got 'tpu'"):
        Transformer(Config(**BASE), impl="tpu")
    with pytest.raises(ValueError, match="document mask and a cache do not go together"):
        model(ids, mask=DOCUMENTS, cache=cache)
    with pytest.raises(ValueError, match="cache has 2 rows, ids have 1"):
        model(ids[:1], cache=cache)
    with pytest.raises(ValueError, match="33 positions are more than max_seq_len = 32"):
        model(torch.zeros(1, 33, dtype=torch.int64))
    with pytest.raises(ValueError, match="33 positions are more than max_seq_len = 32"):
        model.losses(torch.zeros(1, 34, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least 4 tokens a row, got 3"):
        model.losses(ids[:, :3])
    with pytest.raises(ValueError, match=r"2 numbers in 1\.\.14, got \[14\]"):
        model(ids, lengths=[14])
    for wrong in (0, 15):
        with pytest.raises(ValueError, match=rf"2 numbers in 1\.\.14, got \[3, {wrong}\]"):
            model(ids, lengths=[3, wrong])
    with pytest.raises(ValueError, match="batch and capacity must be at least 1, got 0 and 5"):
        model.new_cache(batch=0, capacity=5)
    with pytest.raises(ValueError, match="batch and capacity must be at least 1, got 1 and 0"):
        model.new_cache(batch=1, capacity=0)


@torch.no_grad()
def test_cache_errors_leave_the_cache_as_it_was():
    model, ids = small(), text()
    cache = model.new_cache(batch=2, capacity=8)
    model(ids[:, :6], cache=cache)
    store = cache.store.clone()
    with pytest.raises(ValueError, match="cache is full: it holds 6 tokens of 8, 3 more"):
        model(ids[:, 6:9], cache=cache)
    with pytest.raises(ValueError, match="cannot roll back 7 tokens of a row that holds 6"):
        cache.rollback(7)
    with pytest.raises(ValueError, match="cannot roll back -1 tokens"):
        cache.rollback([2, -1])
    with pytest.raises(ValueError, match="one count a row: got 3 for 2 rows"):
        cache.rollback([1, 1, 1])
    with pytest.raises(ValueError, match=r"0\.\.39"):
        model(torch.full((2, 1), 40), cache=cache)
    assert cache.lengths == [6, 6]
    assert torch.equal(cache.store, store)
    torch.testing.assert_close(model(ids[:, 6:8], cache=cache), model(ids)[:, 6:8], **TOLERANCE)


def test_casting_rounds_weights_alone():
    model = Transformer(preset("toy", max_seq_len=2048), seed=0)
    exact, ids = model.freq.clone(), torch.arange(8)[None]
    model.routers[0].bias.fill_(0.0123456789)
    wanted = model(ids)
    model.cast(torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.freq, exact)
    assert model.routers[0].bias.dtype == torch.float32
    # BF16 keeps 8 bits: weights are off by 2^-9 at most, here over a dozen products
    assert (model(ids) - wanted).norm() < 0.1 * wanted.norm()


def test_a_blunt_cast_is_refused():
    model = Transformer(preset("toy"), seed=0).bfloat16()
    with pytest.raises(ValueError, match=r"rounded to torch.bfloat16: cast with model.cast\(\)"):
        model(torch.arange(8)[None])
