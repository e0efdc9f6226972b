"""Whole models by kernels: they read prompts, decode from pages and train as by torch."""

from collections import Counter
from functools import lru_cache

import minids_kernels
import pytest
import torch
from minids_kernels import cards, configs
from small_models import BASE, CONFIGS, drawn
from torch import Tensor

from minids import Config, Transformer, generate, load, preset, save
from minids.cache import Cache

pytestmark = pytest.mark.usefixtures("interpreter")

# of the oracle's tests: FP32 sums in another order, through a few layers
TOLERANCE = 1e-5
# the model itself has BF16 weights: every product is rounded, p and o once more
ROUNDED = 2e-2

every_config = pytest.mark.parametrize("name", CONFIGS)
# what differs in attention and its cache; a step through each layer takes the interpreter seconds
WITH_A_CACHE = ("v3", "no_query_latent", "odd_widths", "v2_lite", "dense")


@pytest.fixture(autouse=True)
def many_tokens_a_program(device):
    """The interpreter takes a program at a time: let one route many tokens."""
    if device == "cuda":
        yield
        return
    with configs.trying("router_topk.Tokens", dict(BLOCK_M=32, warps=1)):
        yield


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference over the norm; a zero that stays zero differs by 0."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    difference = (ours - theirs).norm().item()
    return difference / theirs.norm().item() if difference else 0.0


@lru_cache
def pair(name: str, device: str) -> tuple[Transformer, Transformer, Tensor]:
    """Return the same model by torch and by kernels, and text past YaRN's original length."""
    (torchs, draw), (ours, _) = drawn(name), drawn(name, "triton")
    tokens = torch.randint(torchs.cfg.vocab_size, (2, 21), generator=draw)
    return torchs.to(device), ours.to(device), tokens.to(device)


ATTENTION = ("attend_expanded", "attend_latent")
KERNELS = (*ATTENTION, "rms_norm", "rotate", "route", "run_experts", "swiglu", "target_sum")


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """Count the kernels' calls: a model that fell back to torch would pass every comparison."""
    calls = Counter()
    for name in KERNELS:
        call = getattr(minids_kernels, name)

        def spy(*given, name=name, call=call):
            calls[name] += 1
            return call(*given)

        monkeypatch.setattr(minids_kernels, name, spy)
    return calls


@pytest.mark.parametrize("name", WITH_A_CACHE)
@torch.no_grad()
def test_prompt_and_decoding(name, device, calls):
    """A prompt of ragged rows, one token at a time, then several behind rows of unequal length."""
    by_torch, by_kernels, tokens = pair(name, device)
    caches = [model.new_cache(batch=2, capacity=24) for model in (by_torch, by_kernels)]
    assert caches[0].pages is None
    assert caches[1].pages is not None
    done = 0
    for width, counts in [(9, [9, 5]), (1, [1, 1]), (4, [1, 4])]:
        part = tokens[:, done : done + width]
        want, got = (
            model(part, lengths=counts, cache=cache)
            for model, cache in zip((by_torch, by_kernels), caches, strict=True)
        )
        for row, count in enumerate(counts):
            assert gap(got[row, :count], want[row, :count]) <= TOLERANCE
        done += width
    cfg = by_kernels.cfg
    assert calls == calls_of(cfg, passes=3) | {
        "attend_expanded": cfg.n_layers, "attend_latent": 2 * cfg.n_layers
    }  # fmt: skip


def calls_of(cfg: Config, passes: int, heads: int = 0) -> Counter:
    """Return how often each kernel but attention computes, in passes through all layers of cfg."""
    blocks, sparse = cfg.n_layers, cfg.n_layers - cfg.n_dense_layers
    norms = 2 + (1 if cfg.q_lora_rank else 0) + 1
    extra = 0
    if heads:  # MTP modules take part, each with an MoE layer and three norms of its own
        blocks, sparse, extra = blocks + cfg.mtp_depth, sparse + cfg.mtp_depth, 3 * cfg.mtp_depth
    gated = blocks if cfg.n_shared_experts else blocks - sparse
    counts = dict(
        rms_norm=norms * blocks + extra + 1, rotate=2 * blocks, route=sparse, run_experts=sparse,
        swiglu=gated, target_sum=heads,
    )  # fmt: skip
    return Counter({name: passes * n for name, n in counts.items() if n})


@every_config
def test_losses_and_gradients(name, device, calls):
    by_torch, by_kernels, tokens = pair(name, device)
    losses = []
    for model in (by_torch, by_kernels):
        model.zero_grad()
        losses.append(model.losses(tokens[:1, :14]))
        losses[-1].total(mtp_weight=0.3).backward()
    cfg, (theirs, ours) = by_kernels.cfg, losses
    depths = cfg.n_layers + cfg.mtp_depth
    assert calls == calls_of(cfg, 1, heads=1 + cfg.mtp_depth) | {"attend_expanded": depths}
    assert gap(ours.main, theirs.main) <= TOLERANCE
    assert gap(ours.mtp, theirs.mtp) <= TOLERANCE
    for (key, mine), other in zip(
        by_kernels.named_parameters(), by_torch.parameters(), strict=True
    ):
        assert gap(mine.grad, other.grad) <= TOLERANCE, key


def test_documents_do_not_see_each_other(device):
    """Packed rows, documents of unequal length, a number that comes again."""
    by_torch, by_kernels, tokens = pair("two_shared_mtp_2", device)
    tokens = tokens[:, :16]
    mask = torch.tensor([[4] * 4 + [1] * 5 + [2] * 7, [0] * 5 + [9] * 6 + [0] * 5]).to(device)
    grads = []
    for model in (by_torch, by_kernels):
        model.zero_grad()
        model.losses(tokens, mask=mask).total(mtp_weight=0.3).backward()
        grads.append([weight.grad for weight in model.parameters()])
    for theirs, ours in zip(*grads, strict=True):
        assert gap(ours, theirs) <= TOLERANCE


def test_recomputing_in_backward_changes_nothing(device):
    model = Transformer(preset("toy", n_layers=1, mtp_depth=0), impl="triton").to(device)
    tokens = torch.randint(32, (1, 7), generator=torch.Generator().manual_seed(0)).to(device)
    grads = []
    for recompute in (False, True):
        model.zero_grad()
        model.losses(tokens, recompute=recompute).total(0.3).backward()
        grads.append([weight.grad for weight in model.parameters()])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "draft"),
    [("dense", None), ("v3", "mtp"), ("yarn_mtp_2", "mtp")],
)
def test_generation(name, draft, device, calls):
    """The same words, drafts kept and refused alike; rows of unequal prompts."""
    by_torch, by_kernels, tokens = pair(name, device)
    options = dict(max_new_tokens=4, draft=draft, lengths=[7, 4], return_stats=True)
    (theirs, one), (ours, other) = (
        generate(model, tokens[:, :7], **options) for model in (by_torch, by_kernels)
    )
    assert torch.equal(ours, theirs)
    assert (one.row_calls, one.drafted, one.accepted) == (
        other.row_calls, other.drafted, other.accepted)  # fmt: skip
    assert calls["attend_latent"]
    assert calls["attend_expanded"]


def test_more_tokens_than_a_page(device):
    """70 tokens, then one by one past nothing: two pages a row, given back when forgotten."""
    cfg = preset("nano", n_layers=1, n_dense_layers=1, mtp_depth=0, vocab_size=64)
    models = [Transformer(cfg, impl).to(device) for impl in ("torch", "triton")]
    ids = torch.randint(64, (2, 130), generator=torch.Generator().manual_seed(3)).to(device)
    caches = [model.new_cache(2, 130) for model in models]
    with torch.no_grad():
        for start, end in [(0, 63), (63, 64), (64, 65), (65, 128), (128, 130)]:
            want, got = (
                model(ids[:, start:end], cache=cache)
                for model, cache in zip(models, caches, strict=True)
            )
            assert gap(got, want) <= TOLERANCE
    assert [len(row) for row in caches[1].pages.rows] == [3, 3]
    caches[1].rollback([66, 130])
    assert [len(row) for row in caches[1].pages.rows] == [1, 0]


def test_bf16_weights(device):
    """Rounded at other places, so near; a wrong scale or mask would be far."""
    models = [drawn("v3", impl)[0].cast(torch.bfloat16).to(device) for impl in ("torch", "triton")]
    _, _, tokens = pair("v3", device)
    caches = [model.new_cache(2, 12) for model in models]
    with torch.no_grad():
        for part in (tokens[:, :9], tokens[:, 9:10]):
            want, got = (
                model(part, cache=cache) for model, cache in zip(models, caches, strict=True)
            )
            assert 0 < gap(got, want) <= ROUNDED


def test_a_cache_without_pages_is_expanded(device, calls):
    """A caller's own cache serves prompts and decoding, by the kernel for prompts."""
    by_torch, by_kernels, tokens = pair("v3", device)
    caches = [
        Cache(model.cfg.n_layers, 2, 12, model.cfg.cache_dim, model.embed)
        for model in (by_torch, by_kernels)
    ]
    with torch.no_grad():
        for part in (tokens[:, :9], tokens[:, 9:10]):
            want, got = (
                model(part, cache=cache)
                for model, cache in zip((by_torch, by_kernels), caches, strict=True)
            )
            assert gap(got, want) <= TOLERANCE
    layers = by_kernels.cfg.n_layers
    assert (calls["attend_expanded"], calls["attend_latent"]) == (2 * layers, 0)


def test_many_tokens_behind_pages_are_expanded(device, calls, monkeypatch):
    """As a long prompt's second part is: latents are gathered, rows of unequal length."""
    monkeypatch.setattr("minids.mla.absorbing_is_cheaper", lambda *sizes: False)
    by_torch, by_kernels, tokens = pair("dense", device)
    caches = [model.new_cache(2, 16) for model in (by_torch, by_kernels)]
    with torch.no_grad():
        for part, counts in [(tokens[:, :9], [9, 4]), (tokens[:, 9:14], [5, 3])]:
            want, got = (
                model(part, lengths=counts, cache=cache)
                for model, cache in zip((by_torch, by_kernels), caches, strict=True)
            )
            for row, count in enumerate(counts):
                assert gap(got[row, :count], want[row, :count]) <= TOLERANCE
    layers = by_kernels.cfg.n_layers
    assert (calls["attend_expanded"], calls["attend_latent"]) == (2 * layers, 0)


def test_absorbing_without_pages_is_refused(device):
    model = pair("v3", device)[1]
    phase, visible = model.positions(2, 4)
    x = torch.randn(2, 4, model.cfg.dim, device=device)
    with pytest.raises(ValueError, match="attend_latent"):
        model.layers[0].attn(x, phase, visible, absorb=True)


def test_a_saved_model_is_loaded_for_kernels(tmp_path, device, calls):
    by_torch, _, tokens = pair("v3", device)
    save(by_torch, tmp_path / "model")
    loaded = load(tmp_path / "model", device, impl="triton")
    with torch.no_grad():
        assert gap(loaded(tokens[:1, :5]), by_torch(tokens[:1, :5])) <= TOLERANCE
    assert calls["attend_expanded"] == by_torch.cfg.n_layers
    with pytest.raises(ValueError, match="impl must be one of 'torch', 'triton', got 'cuda'"):
        load(tmp_path / "model", device, impl="cuda")


def test_other_attention_than_mla_keeps_torch_and_its_masks(device, calls):
    """attn='mha': kernels for all but attention; rows of unequal length."""
    cfg = Config(**BASE | dict(attn="mha", mtp_depth=0))
    by_torch, by_kernels = (Transformer(cfg, impl).to(device) for impl in ("torch", "triton"))
    ids = torch.randint(61, (2, 7)).to(device)
    caches = [model.new_cache(2, 9) for model in (by_torch, by_kernels)]
    assert caches[1].pages is None
    with torch.no_grad():
        want, got = (
            model(ids, cache=cache)
            for model, cache in zip((by_torch, by_kernels), caches, strict=True)
        )
    assert gap(got, want) <= TOLERANCE
    assert not {*calls} & {*ATTENTION}
    assert calls["rotate"] == 2 * cfg.n_layers


@pytest.mark.gpu
def test_generation_in_bf16_on_a_gpu():
    """A model of whole tiles: 64 greedy words after a prompt of 300, drafts too, as by torch.

    Logits are rounded, so texts may part where two words tie: most words must agree.
    """
    assert not cards.interpreted()
    cfg = preset("small", n_layers=2)
    ids = torch.randint(cfg.vocab_size, (3, 300), generator=torch.Generator().manual_seed(0)).cuda()
    made = [
        generate(Transformer(cfg, impl).cast(torch.bfloat16).cuda(), ids, 64, draft=draft)
        for impl, draft in (("torch", None), ("triton", None), ("triton", "mtp"))
    ]
    for other in made[1:]:
        assert (made[0] == other).float().mean() > 0.9
