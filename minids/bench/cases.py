"""What is raced: the same weights and tokens on both sides, minids first.

Paper   none; sizes from DeepSeek-V3 (arXiv:2412.19437, section 4.2) and V2-Lite (arXiv:2405.04434).
Dims    B rows, T tokens a row.
Book    none                            Kernel  none
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from minids.config import Config, preset
from minids.files.hf import to_hf
from minids.generate import generate
from minids.model import Transformer

Call = Callable[[], Tensor]  # runs once and returns what both sides must agree on

OURS = "minids"
DEFAULT_EXPERTS = "grouped_mm"  # what transformers 5.23 takes on CPU if nobody chooses
# batched_mm copies an expert's weights for each visit: only a single token can afford that
EXPERTS_MANY, EXPERTS_ONE = ("grouped_mm", "eager"), ("grouped_mm", "eager", "batched_mm")


@dataclass(frozen=True)
class Case:
    """One race; `sides` names who can run, the first is minids, `start` prepares one of them."""

    name: str
    goal: float  # how many times as fast minids should be, 0 for none
    tokens: int  # that one call processes
    tolerance: float  # relative, between the sides' results; rounding of FP32 sums
    rounds: int
    sides: tuple[str, ...]
    start: Callable[[str], Call]


@dataclass(frozen=True)
class Size:
    """How large the races are."""

    train: Config
    train_rows: int
    train_tokens: int
    nano: Config
    lite: Config
    layer: Config
    cached: int  # tokens before decoding starts
    layer_cached: int
    new_tokens: int
    rounds: int


# One layer of V3 is raced without its experts and embedding, which attention never meets.
_NO_FFN = dict(vocab_size=8, inter_dim=8, n_dense_layers=1, mtp_depth=0)
_SMALL_VOCAB = 1024  # a head of 102,400 rows would cost both sides the same time again
FULL = Size(
    train=preset("micro", mtp_depth=0),
    train_rows=8,
    train_tokens=256,
    nano=preset("nano", mtp_depth=0, max_seq_len=2048),
    lite=preset("v2_lite", n_layers=2, vocab_size=_SMALL_VOCAB),
    layer=preset("v3_layer", **_NO_FFN),
    cached=1024,
    layer_cached=2048,
    new_tokens=16,
    rounds=20,
)
TOY = Size(
    train=preset("toy", mtp_depth=0),
    train_rows=2,
    train_tokens=8,
    nano=preset("toy", mtp_depth=0),
    lite=preset("v2_lite", n_layers=2, vocab_size=32, dim=16, inter_dim=16, moe_inter_dim=8),
    layer=replace(preset("v3_layer", **_NO_FFN), dim=32, q_lora_rank=16),
    cached=8,
    layer_cached=16,
    new_tokens=3,
    rounds=2,
)
SIZES = {"full": FULL, "toy": TOY}


def make_cases(size: Size) -> dict[str, Case]:
    """Return the races by key; nothing is built before a side starts."""
    lite = f"{size.lite.n_layers} layers of V2-Lite, vocabulary {size.lite.vocab_size:,}"
    trained = size.train_rows * size.train_tokens
    many, one = (
        (OURS, *(f"transformers, {name}" for name in names))
        for names in (EXPERTS_MANY, EXPERTS_ONE)
    )
    forms = (OURS, "minids, naive form")
    new, few = size.new_tokens, max(size.rounds // 3, 2)
    nano, big = size.nano, size.lite
    return {
        "train": Case(f"training step, micro, {size.train_rows} x {size.train_tokens} tokens", 1.3,
                      trained, 1e-4, size.rounds, many, partial(_train, size)),
        "nano": Case(f"decoding after {size.cached:,} tokens, nano", 3.0,
                     new, 1e-4, size.rounds, one, partial(_decode, nano, size.cached, new)),
        "generate": Case(f"generate(), {size.cached:,} + {new} tokens, nano", 0.0,
                         new, 0.0, size.rounds, many, partial(_generate, nano, size.cached, new)),
        "lite": Case(f"decoding after {size.cached:,} tokens, {lite}", 3.0,
                     2, 1e-4, few, one, partial(_decode, big, size.cached, 2)),
        "absorb": Case(f"V3's attention, 1 query, {size.layer_cached:,} cached", 30.0,
                       1, 1e-4, few, forms, partial(_layer, size, False)),
        "layer": Case("the same with all projections of the layer", 0.0,
                      1, 1e-4, few, forms, partial(_layer, size, True)),
    }  # fmt: skip


def twin(model: Transformer, experts: str) -> Any:
    """Return transformers' model on the very weights of `model`, with SDPA attention.

    ImportError without transformers, which only benchmarks and tests need.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ImportError("this needs transformers: pip install 'minids[test]'") from None
    cfg = AutoConfig.for_model(**to_hf(model.cfg))
    with torch.device("meta"):  # draws no weights of its own
        peer = AutoModelForCausalLM.from_config(
            cfg, attn_implementation="sdpa", experts_implementation=experts
        )
    weights = {_published_name(name): weight for name, weight in model.state_dict().items()}
    for name, weight in weights.items():
        if name.endswith("gate_up_proj"):  # [E, 2, F, D] is [E, 2F, D] there
            weights[name] = weight.flatten(1, 2)
    peer.load_state_dict(weights, assign=True)
    peer.model.rotary_emb = type(peer.model.rotary_emb)(cfg)  # not in a checkpoint
    return peer.requires_grad_()


_RENAMED = {
    "layers.": "model.layers.", "attn_norm.gain": "input_layernorm.weight",
    "ffn_norm.gain": "post_attention_layernorm.weight", "attn.": "self_attn.",
    "q_norm.gain": "q_a_layernorm.weight", "kv_norm.gain": "kv_a_layernorm.weight",
    "w_dq.": "q_a_proj.", "w_uq.": "q_b_proj.", "w_q.": "q_proj.", "w_dkv.": "kv_a_proj_with_mqa.",
    "w_ukv.": "kv_b_proj.", "w_o.": "o_proj.", "ffn.": "mlp.", "router.centroids": "gate.weight",
    "router.bias": "gate.e_score_correction_bias", "experts.w_gate_up": "experts.gate_up_proj",
    "experts.w_down": "experts.down_proj", "shared.": "shared_experts.", "w_gate.": "gate_proj.",
    "w_up.": "up_proj.", "w_down.": "down_proj.",
}  # fmt: skip
_RENAMED_WHOLE = {"embed": "model.embed_tokens.weight", "norm.gain": "model.norm.weight",
                  "head.weight": "lm_head.weight"}  # fmt: skip


def _published_name(name: str) -> str:
    if name in _RENAMED_WHOLE:
        return _RENAMED_WHOLE[name]
    for ours, theirs in _RENAMED.items():
        name = name.replace(ours, theirs)
    return name


def _tokens(cfg: Config, rows: int, tokens: int) -> Int[Tensor, "B T"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(cfg.vocab_size, (rows, tokens), generator=generator)


def _train(size: Size, side: str) -> Call:
    """Forward, loss, backward, clip, AdamW step; the result is the loss."""
    tokens = _tokens(size.train, size.train_rows, size.train_tokens + 1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    model = Transformer(size.train)
    peer = None if side == OURS else twin(model, side.split(", ")[1]).train()
    trained = list((peer or model).parameters())
    adamw = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> Tensor:
        if peer is None:
            loss = model.losses(tokens).main
        else:
            loss = peer(inputs, labels=inputs, shift_labels=targets, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        adamw.zero_grad()
        return loss.detach()

    return step


def _decode(cfg: Config, cached: int, new: int, side: str) -> Call:
    """Read `cached` tokens once; a call writes `new` more, greedily, and forgets them again."""
    ids, model = _tokens(cfg, 1, cached), Transformer(cfg).eval()
    peer = None if side == OURS else twin(model, DEFAULT_EXPERTS).eval()  # for the first reading
    if peer is None:
        cache = model.new_cache(batch=1, capacity=cached + new)
        run, forget = partial(model, cache=cache), partial(cache.rollback, new)
    else:
        from transformers import DynamicCache

        held = DynamicCache(config=peer.config)
        forget = partial(held.crop, -new)

        def run(ids: Tensor) -> Tensor:
            return peer(ids, past_key_values=held, use_cache=True).logits

    with torch.inference_mode():
        first = run(ids)[:, -1:].argmax(-1)
    if peer is not None:
        peer.set_experts_implementation(side.split(", ")[1])

    @torch.inference_mode()
    def write() -> Tensor:
        word, logits = first, []
        for _ in range(new):
            logits.append(run(word)[:, -1:])
            word = logits[-1].argmax(-1)
        forget()
        return torch.cat(logits, dim=1)

    return write


def _generate(cfg: Config, prompt: int, new: int, side: str) -> Call:
    """Greedy generation through both libraries' front doors, prompt included."""
    ids, model = _tokens(cfg, 1, prompt), Transformer(cfg).eval()
    if side == OURS:
        return lambda: torch.as_tensor(generate(model, ids, max_new_tokens=new))
    peer = twin(model, side.split(", ")[1]).eval()
    settings = copy.deepcopy(peer.generation_config)
    settings.update(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    every = torch.ones_like(ids)
    return lambda: peer.generate(ids, attention_mask=every, generation_config=settings)


def _layer(size: Size, whole: bool, side: str) -> Call:
    """One query behind a full cache: from queries to the heads' outputs, or the `whole` layer."""
    model, cached = Transformer(size.layer).eval(), size.layer_cached
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, size.layer.dim, generator=generator)
    cache = model.new_cache(batch=1, capacity=cached)
    cache.store.normal_(generator=generator)
    cache.advance(cached - 1)  # the query's own key is the last
    phase, visible = model.positions(1, 1, cache=cache)
    block: Any = model.layers[0]
    run = partial(block.attn, x, phase, visible, cache.layer(0), absorb=side == OURS)
    if not whole:
        attend = block.attn.attend_absorbed if side == OURS else block.attn.attend_naive
        with torch.no_grad():
            run = partial(attend, *block.attn.queries(x, phase), cache.store[0], None)
    return torch.inference_mode()(run)
