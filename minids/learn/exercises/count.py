"""Exercises of chapter 01: a claim, one layer, three conventions, a cache, FLOPs, money, a design.

Expected numbers come from minids.count, but for the rounding of published figures.
"""

from collections.abc import Callable, Collection
from functools import cache
from numbers import Number
from typing import Any

from minids.config import Config, preset
from minids.count import attention_parameters, count, short
from minids.learn.check import Exercise, Property, differs

TOY, V3, LITE = preset("toy"), preset("v3"), preset("v2_lite")
CLAIM = 67 * 10**9


def moe_layer() -> int:
    """Return the parameters of one MoE layer of V3: what one layer more adds to the model."""
    return count(preset("v3", n_layers=62)).total - count(V3).total


def hold(layers: float) -> str:
    return f"{layers:g} MoE layers hold {short(layers * moe_layer())} parameters"


def holds_it(answer: object) -> str | None:
    if isinstance(answer, bool) or not isinstance(answer, int | float) or answer % 1:
        return f"enough must be a whole number, got {answer!r}."
    return None if answer * moe_layer() > CLAIM else f"{hold(answer)}, not more than 67 B."


def fewest(answer: float) -> str | None:
    return f"{hold(answer - 1)}: more already." if (answer - 1) * moe_layer() > CLAIM else None


def same_layer(cfg: Config, call: str) -> Callable[..., str | None]:
    return lambda f: differs(f"mla_parameters({call})", f(cfg), attention_parameters(cfg))


def not_a_number(call: str, got: object) -> str | None:
    """Say so before anything is computed with what is no number, such as a missing return."""
    if isinstance(got, Number) or getattr(got, "ndim", None) == 0:
        return None
    return f"{call} gave {got!r:.60}, expected a number" + (
        ": is a `return` missing?" if got is None else "."
    )


def more_heads(f: Callable[[Config], int]) -> str | None:
    more = preset("toy", n_heads=4)
    want = attention_parameters(more) - attention_parameters(TOY)
    few = f(TOY)
    trouble = not_a_number("mla_parameters(preset('toy'))", few)
    return trouble or differs("from 2 to 4 heads of preset('toy') it", f(more) - few, want)


def rounds(name: str, figure: str, *want: str) -> Callable[..., str | None]:
    call = f"conventions(preset('{name}'), '{figure}')"

    def test(f: Callable[..., Any]) -> str | None:
        got = f(preset(name), figure)
        several = isinstance(got, Collection) and not isinstance(got, str)
        return differs(call, set(got) if several else got, set(want))

    return test


def cached(cfg: Config, call: str, batch: int, context: int) -> Callable[..., str | None]:
    want = count(cfg).cache_bytes * batch * context
    call = f"cache_bytes({call}, {batch}, {context})"
    return lambda f: differs(call, f(cfg, batch, context), want)


def heads_free(f: Callable[..., int]) -> str | None:
    few, many = (f(preset("toy", n_heads=heads), 1, 1) for heads in (2, 16))
    call = "cache_bytes(preset('toy', n_heads=16), 1, 1)"
    if trouble := not_a_number(call, many):
        return trouble
    return None if few == many else f"{call} gave {many}, with 2 heads it gave {few}."


def attends(cfg: Config, call: str, seq_len: int) -> Callable[..., str | None]:
    counts = count(cfg, seq_len)
    want = 1 - 2 * counts.active["with head"] / counts.flops_forward
    call = f"attention_share({call}, {seq_len})"
    # a mean over (seq_len + 1) / 2 keys is as right as one over seq_len / 2
    return lambda f: differs(call, f(cfg, seq_len), want, tolerance=1e-3)


def no_pair(got: Any) -> str | None:
    pair = isinstance(got, tuple | list) and len(got) == 2
    if pair and all(isinstance(value, Number) for value in got):
        return None
    return f"cost must return a pair of numbers, (hours, dollars), got {got!r:.60}."


def costs(cfg: Config, call: str, tokens: float) -> Callable[..., str | None]:
    def test(f: Callable[..., tuple[float, float]]) -> str | None:
        want = count(cfg).gpu_hours(tokens, 385)
        got = f(cfg, tokens, 385, 2)
        if trouble := no_pair(got):
            return trouble
        hours, dollars = got
        call_hours = f"cost({call}, {tokens:g}, 385, 2)[0], the hours,"
        return differs(call_hours, float(hours), want, tolerance=1e-3) or differs(
            "the dollars beside the hours", float(dollars), 2.0 * hours
        )

    return test


def twice(f: Callable[..., tuple[float, float]]) -> str | None:
    once, more = f(TOY, 1e9, 385, 2), f(TOY, 2e9, 770, 2)
    if trouble := no_pair(once) or no_pair(more):
        return trouble
    return differs("cost(preset('toy'), 2e9, 770, 2)[0] against (1e9, 385)", more[0], once[0])


def share_of(cfg: Config) -> float:
    counts = count(cfg)
    return counts.active["with head"] / counts.total


@cache
def best_experts(top_k: int, share: float) -> int:
    cfgs = [preset("v3", n_routed_experts=e, n_activated_experts=top_k) for e in range(32, 513, 8)]
    return min(cfgs, key=lambda cfg: abs(share_of(cfg) - share)).n_routed_experts


def designs(top_k: int) -> Callable[..., str | None]:
    share = share_of(V3)
    cfg, call = preset("v3", n_activated_experts=top_k), f"n_activated_experts={top_k}"
    call = f"experts_for_share(preset('v3', {call}), {share:.4f})"
    return lambda f: differs(call, f(cfg, share), best_experts(top_k, share))


def whole_groups(f: Callable[..., int]) -> str | None:
    got = f(preset("v3", n_activated_experts=6), 0.06)
    wrong = got % V3.n_expert_groups if isinstance(got, int) else 1
    return (
        f"experts_for_share(..., 0.06) with 6 chosen gave {got!r} for 8 groups." if wrong else None
    )


EXERCISES = (
    Exercise(
        name="enough",
        title="A claim, refuted",
        statement="A page says that V3 has 67 B parameters, 8 B of them active. How many of its MoE"
        " layers are enough to hold more than 67 billion? Set `enough` to the smallest whole"
        " number. Then compare attention alone with 8 B.",
        start="enough = ...\n",
        properties=(
            Property("that many layers hold more than 67 billion parameters", holds_it),
            Property("one layer less does not", fewest),
        ),
        hints=(
            "One MoE layer was counted in section 4.",
            "Divide 67e9 by the parameters of one MoE layer, and round up.",
            "67e9 / 11_507_286_272 is 5.8, and 5 layers are not enough.",
        ),
        solution="""\
from math import ceil

enough = ceil(67e9 / 11_507_286_272)  # so 58 of them cannot be a tenth of a 67 B model
""",
        wrong={"two matrices an expert": "enough = 9\n", "rounded down": "enough = 5\n"},
    ),
    Exercise(
        name="mla_parameters",
        title="One layer of latent attention",
        statement="Write `mla_parameters(cfg)`: the number of parameters of one attention layer of"
        " a `Config` with `attn='mla'`, its two latent norms included, from the fields alone. With"
        " `q_lora_rank = 0` queries come from one matrix, without a norm.",
        start="def mla_parameters(cfg):\n    raise NotImplementedError\n",
        properties=(
            Property(
                "queries, keys, values and output grow with the heads, the rotary key does not",
                more_heads,
            ),
            Property(
                "the layer of toy is counted with both norms", same_layer(TOY, "preset('toy')")
            ),
            Property("q_lora_rank = 0 is one matrix", same_layer(LITE, "preset('v2_lite')")),
            Property("the layer of V3 is counted", same_layer(V3, "preset('v3')")),
        ),
        hints=(
            "Section 3 lists seven tensors. Which of them grow with the number of heads?",
            "w_dkv makes C + R numbers, whatever the number of heads; norms have Q and C gains.",
            "D*Q + Q + Q*H*(N+R) + D*(C+R) + C + C*H*(N+V) + H*V*D, or D*H*(N+R) where Q is 0.",
        ),
        solution="""\
def mla_parameters(cfg):
    heads, D, C, R = cfg.n_heads, cfg.dim, cfg.kv_lora_rank, cfg.qk_rope_head_dim
    N, V, Q = cfg.qk_nope_head_dim, cfg.v_head_dim, cfg.q_lora_rank
    queries = heads * (N + R)
    n = D * Q + Q + Q * queries if Q else D * queries  # down, norm, up
    n += D * (C + R) + C  # latent and ONE rotary key, norm of the latent alone
    n += C * heads * (N + V)  # up to keys and values
    return n + heads * V * D  # out
""",
        wrong={
            "a rotary key for every head": """\
def mla_parameters(cfg):
    heads, D, C, R = cfg.n_heads, cfg.dim, cfg.kv_lora_rank, cfg.qk_rope_head_dim
    Q, N, V = cfg.q_lora_rank, cfg.qk_nope_head_dim, cfg.v_head_dim
    q = heads * (N + R)
    n = D * Q + Q + Q * q if Q else D * q
    return n + D * (C + heads * R) + C + C * heads * (N + V) + heads * V * D
""",
            "no latent norms": """\
def mla_parameters(cfg):
    heads, D, C, R = cfg.n_heads, cfg.dim, cfg.kv_lora_rank, cfg.qk_rope_head_dim
    Q, N, V = cfg.q_lora_rank, cfg.qk_nope_head_dim, cfg.v_head_dim
    q = heads * (N + R)
    n = D * Q + Q * q if Q else D * q
    return n + D * (C + R) + C * heads * (N + V) + heads * V * D
""",
            "queries always compressed": """\
def mla_parameters(cfg):
    heads, D, C, R = cfg.n_heads, cfg.dim, cfg.kv_lora_rank, cfg.qk_rope_head_dim
    Q, N, V = cfg.q_lora_rank, cfg.qk_nope_head_dim, cfg.v_head_dim
    n = D * Q + Q + Q * heads * (N + R)
    return n + D * (C + R) + C + C * heads * (N + V) + heads * V * D
""",
        },
    ),
    Exercise(
        name="conventions",
        title="Which convention was published?",
        statement="Write `conventions(cfg, figure)`: the set of names in `count(cfg).active` whose"
        " number, in billions, rounds to `figure`, a text such as `'37'` or `'36.7'`: as many"
        " digits as were published. Then ask it about 36.7.",
        start="def conventions(cfg, figure):\n    raise NotImplementedError\n",
        properties=(
            Property("37 B of the report counts the head", rounds("v3", "37", "with head")),
            Property("36.6 B counts the head", rounds("v3", "36.6", "with head")),
            Property("36.7 B is no convention's number", rounds("v3", "36.7")),
            Property(
                "21 B of V2 fits two of them", rounds("v2", "21", "with head", "with both tables")
            ),
        ),
        hints=(
            "How many digits stand behind the point of `figure`?",
            "Format n / 1e9 with that many digits and compare the texts.",
            "digits = len(figure.partition('.')[2]); f'{n / 1e9:.{digits}f}' == figure",
        ),
        solution="""\
from minids import count


def conventions(cfg, figure):
    digits = len(figure.partition(".")[2])  # as many as were published
    active = count(cfg).active
    return {name for name, n in active.items() if f"{n / 1e9:.{digits}f}" == figure}
""",
        wrong={
            "digits cut off": """\
from minids import count


def conventions(cfg, figure):
    active = count(cfg).active
    return {name for name, n in active.items() if str(n / 1e9).startswith(figure)}
""",
            "half a billion, whatever the digits": """\
from minids import count


def conventions(cfg, figure):
    active = count(cfg).active
    return {name for name, n in active.items() if abs(n / 1e9 - float(figure)) < 0.5}
""",
        },
    ),
    Exercise(
        name="cache_bytes",
        title="The cache of a batch",
        statement="Write `cache_bytes(cfg, batch, context)`: the bytes in BF16 that MLA keeps for"
        " `batch` texts of `context` tokens, all layers. Try 32 texts of 131,072 tokens on V3.",
        start="def cache_bytes(cfg, batch, context):\n    raise NotImplementedError\n",
        properties=(
            Property("it does not depend on the number of heads", heads_free),
            Property("one token of toy", cached(TOY, "preset('toy')", 1, 1)),
            Property("32 texts of 131,072 tokens on V3", cached(V3, "preset('v3')", 32, 131_072)),
        ),
        hints=(
            "What does one token leave in one layer, and who shares it?",
            "A latent of kv_lora_rank numbers and one rotary key, 2 bytes a number.",
            "2 * batch * context * n_layers * (kv_lora_rank + qk_rope_head_dim)",
        ),
        solution="""\
def cache_bytes(cfg, batch, context):
    numbers = cfg.kv_lora_rank + cfg.qk_rope_head_dim  # a token, a layer
    return 2 * batch * context * cfg.n_layers * numbers  # BF16: 2 bytes
""",
        wrong={
            "the rotary key forgotten": "def cache_bytes(cfg, batch, context):\n"
            "    return 2 * batch * context * cfg.n_layers * cfg.kv_lora_rank\n",
            "a rotary key for every head": """\
def cache_bytes(cfg, batch, context):
    numbers = cfg.kv_lora_rank + cfg.n_heads * cfg.qk_rope_head_dim
    return 2 * batch * context * cfg.n_layers * numbers
""",
            "the latent twice, for K and V": "def cache_bytes(cfg, batch, context):\n"
            "    return 2 * 2 * batch * context * cfg.n_layers * cfg.kv_lora_rank\n",
        },
    ),
    Exercise(
        name="attention_share",
        title="Attention's share of the work",
        statement="Write `attention_share(cfg, seq_len)`: the part, from 0 to 1, of a forward"
        " pass's FLOPs that goes into scores and weighted values, as a mean over the positions of a"
        " causal text of `seq_len` tokens. Matrices cost 2 FLOPs a parameter, the head counted.",
        start="def attention_share(cfg, seq_len):\n    raise NotImplementedError\n",
        properties=(
            Property("V3 at 4,096 tokens", attends(V3, "preset('v3')", 4096)),
            Property("V3 at 131,072 tokens", attends(V3, "preset('v3')", 131_072)),
            Property("V2-Lite at 4,096 tokens", attends(LITE, "preset('v2_lite')", 4096)),
        ),
        hints=(
            "A query meets itself and all before it: how many keys is that on average?",
            "A pair of query and key costs 2 * (qk_head_dim + v_head_dim) FLOPs in each head.",
            "attention = n_layers * 2 * n_heads * (qk_head_dim + v_head_dim) * seq_len / 2",
        ),
        solution="""\
from minids import count


def attention_share(cfg, seq_len):
    keys = seq_len / 2  # the mean over the positions of a causal model
    widths = cfg.n_heads * (cfg.qk_head_dim + cfg.v_head_dim)  # scores, then values
    attention = cfg.n_layers * 2 * widths * keys
    return attention / (attention + 2 * count(cfg).active["with head"])
""",
        wrong={
            "every query sees every key": """\
from minids import count


def attention_share(cfg, seq_len):
    keys = seq_len
    widths = cfg.n_heads * (cfg.qk_head_dim + cfg.v_head_dim)
    attention = cfg.n_layers * 2 * widths * keys
    return attention / (attention + 2 * count(cfg).active["with head"])
""",
            "scores without values": """\
from minids import count


def attention_share(cfg, seq_len):
    keys = seq_len / 2
    widths = cfg.n_heads * cfg.qk_head_dim
    attention = cfg.n_layers * 2 * widths * keys
    return attention / (attention + 2 * count(cfg).active["with head"])
""",
            "D for the width of all heads": """\
from minids import count


def attention_share(cfg, seq_len):
    keys = seq_len / 2
    widths = 2 * cfg.dim
    attention = cfg.n_layers * 2 * widths * keys
    return attention / (attention + 2 * count(cfg).active["with head"])
""",
        },
    ),
    Exercise(
        name="cost",
        title="What 14.8 trillion tokens cost",
        statement="Write `cost(cfg, tokens, tflops, usd)`: GPU-hours and dollars, as a pair, to"
        " train at a sustained `tflops` (10^12 FLOP/s a GPU) and `usd` an hour, with attention over"
        " `cfg.original_seq_len` tokens. Use `count(cfg).active`, not `gpu_hours`."
        " Then ask for V3's 14.8e12 tokens.",
        start="def cost(cfg, tokens, tflops, usd):\n    raise NotImplementedError\n",
        properties=(
            Property("twice the tokens on GPUs twice as fast take the same time", twice),
            Property("V3 on a billion tokens", costs(V3, "preset('v3')", 1e9)),
            Property("V2-Lite on a billion tokens", costs(LITE, "preset('v2_lite')", 1e9)),
        ),
        hints=(
            "How many forward passes is one step of training worth?",
            "FLOPs a token = 3 * (2 * active parameters + attention); an hour has 3600 seconds.",
            "hours = tokens * 3 * forward / (tflops * 1e12 * 3600); dollars = hours * usd",
        ),
        solution="""\
from minids import count


def cost(cfg, tokens, tflops, usd):
    widths = cfg.n_heads * (cfg.qk_head_dim + cfg.v_head_dim)
    attention = cfg.n_layers * 2 * widths * cfg.original_seq_len / 2
    forward = 2 * count(cfg).active["with head"] + attention
    hours = tokens * 3 * forward / (tflops * 1e12) / 3600  # backward is twice forward
    return hours, hours * usd
""",
        wrong={
            "forward only, 2ND": """\
from minids import count


def cost(cfg, tokens, tflops, usd):
    widths = cfg.n_heads * (cfg.qk_head_dim + cfg.v_head_dim)
    attention = cfg.n_layers * 2 * widths * cfg.original_seq_len / 2
    forward = 2 * count(cfg).active["with head"] + attention
    hours = tokens * forward / (tflops * 1e12) / 3600
    return hours, hours * usd
""",
            "6ND, no attention": """\
from minids import count


def cost(cfg, tokens, tflops, usd):
    hours = tokens * 6 * count(cfg).active["with head"] / (tflops * 1e12) / 3600
    return hours, hours * usd
""",
            "all stored parameters": """\
from minids import count


def cost(cfg, tokens, tflops, usd):
    hours = tokens * 6 * count(cfg).total / (tflops * 1e12) / 3600
    return hours, hours * usd
""",
        },
    ),
    Exercise(
        name="experts_for_share",
        title="A design: how many experts keep the share?",
        statement="You choose fewer experts a token than V3 and want the same active share. Write"
        " `experts_for_share(cfg, share)`: the number of routed experts, a multiple of"
        " `cfg.n_expert_groups`, with which a model that is `cfg` otherwise has its"
        " `active['with head'] / total` nearest to `share`. 32 to 512 are enough to try.",
        start="def experts_for_share(cfg, share):\n    raise NotImplementedError\n",
        properties=(
            Property("V3's share gives V3 back", designs(8)),
            Property("groups hold equally many experts", whole_groups),
            Property("with 4 chosen the share is V3's too", designs(4)),
        ),
        hints=(
            "Attention, shared experts and head stay as they are, however few experts you choose.",
            "Try every multiple of n_expert_groups with `dataclasses.replace` and `count`.",
            "min(range(32, 513, cfg.n_expert_groups), key=lambda e: abs(share_with(e) - share))",
        ),
        solution="""\
from dataclasses import replace

from minids import count


def experts_for_share(cfg, share):
    def miss(experts):
        counts = count(replace(cfg, n_routed_experts=experts))
        return abs(counts.active["with head"] / counts.total - share)

    groups = cfg.n_expert_groups  # each group holds as many
    return min(range(4 * groups, 64 * groups + 1, groups), key=miss)
""",
        wrong={
            "experts in proportion to those chosen": "def experts_for_share(cfg, share):\n"
            "    return 32 * cfg.n_activated_experts\n",
            "groups forgotten": """\
from minids import count


def experts_for_share(cfg, share):
    counts = count(cfg)
    one = (counts.parts["routed experts"] + counts.parts["gate matrices"]) / cfg.n_routed_experts
    rest = counts.total - cfg.n_routed_experts * one
    return round((counts.active["with head"] / share - rest) / one)
""",
        },
    ),
)
