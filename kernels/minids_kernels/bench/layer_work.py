"""The least that a layer must do: a list of steps, each of which waits for the one before.

Norms and the residual path: every state in and out once. Activations that only travel between a
product and the next step (SwiGLU, quantised copies) count nothing: fused they need not exist.
"""

from collections.abc import Callable

from minids.config import Config
from minids_kernels.bench.floors import (
    Steps,
    Work,
    active_experts,
    causal_pairs,
    latent_decode,
    prefill,
    prefill_backward,
    product,
    routed_experts,
    weight_gradient,
)
from minids_kernels.bench.shapes import Attention, Experts

Product = Callable[[int, int, int], Work]  # of rows, outputs, inputs


def layer_work(cfg: Config, tokens: int, held: int, whole: bool) -> Steps:
    """Return the steps of a prompt (held = 0), or of one token of each row behind `held` others.

    Of one MoE layer in FP8, or, with `whole`, of the model in BF16.
    """
    one = product_in_bf16 if whole else product
    attends = attention(cfg, tokens, held, one)
    moe = [*attends, *feed_forward(cfg, tokens, one)]
    if not whole:
        return Steps(tuple(moe))
    norm = Work(4 * 2 * tokens * cfg.dim)
    dense = [*attends, norm, *(one(tokens, n, k) for n, k in dense_weights(cfg))]
    steps = dense * cfg.n_dense_layers + moe * (cfg.n_layers - cfg.n_dense_layers)
    read = tokens if held else 1  # rows of the head's product: a prompt's last word
    return Steps((*steps, one(read, cfg.vocab_size, cfg.dim)))


def product_in_bf16(m: int, n: int, k: int) -> Work:
    return Work(2 * (m * k + n * k + m * n), 2 * m * n * k, "bf16_tflops")


def experts_in_bf16(visits: int, active: int, sizes: Experts) -> Work:
    weight = 3 * sizes.dim * sizes.hidden
    row = 2 * (sizes.dim + 2 * sizes.hidden + sizes.dim)
    return Work(2 * active * weight + visits * row, 2 * visits * weight, "bf16_tflops")


def backward_work(cfg: Config, tokens: int) -> Steps:
    """Return forward and backward of an MoE layer: three products of each weight in FP8."""
    sizes, pairs = attention_sizes(cfg), causal_pairs([tokens])
    steps = [prefill(tokens, pairs, sizes), prefill_backward(tokens, pairs, sizes)]
    for n, k in [*attention_weights(cfg, absorbed=False), *shared_weights(cfg)]:
        steps += [product(tokens, n, k), product(tokens, k, n), weight_gradient(n, k, tokens)]
    experts = experts_of(cfg)
    visits = tokens * experts.k
    once = routed_experts(visits, active_experts(tokens, experts.experts, experts.k), experts)
    numbers = experts.experts * 3 * experts.dim * experts.hidden
    # each weight is read in BF16, written twice in FP8, read in each; its gradient is written
    gradient = Work(once.moved_bytes + 2 * numbers, once.operations)
    quantised = Work((2 + 2) * numbers)
    norms = Work(2 * (4 + 6) * tokens * cfg.dim)
    return Steps((*steps, quantised, once, once, gradient, norms))


def attention(cfg: Config, tokens: int, held: int, one: Product) -> list[Work]:
    """Return the steps of MLA: norm, products, attention; absorbed behind `held` tokens."""
    sizes = attention_sizes(cfg)
    weights = attention_weights(cfg, absorbed=bool(held))
    steps = [Work(4 * tokens * cfg.dim), *(one(tokens, n, k) for n, k in weights)]
    if not held:
        return [*steps, prefill(tokens, causal_pairs([tokens]), sizes)]
    heads, nope, _, value, latent = sizes
    absorbed = 2 * heads * latent * (nope + value)  # bytes of both matrices in BF16
    operations = 2 * tokens * heads * latent * (nope + value)
    moved = absorbed + 2 * tokens * heads * (nope + value + 2 * latent)
    return [*steps, Work(moved, operations, "bf16_tflops"),
            latent_decode([held + 1] * tokens, 1, sizes)]  # fmt: skip


def feed_forward(cfg: Config, tokens: int, one: Product) -> list[Work]:
    """Return the steps of an MoE layer: residual path and norm, router, shared, routed experts."""
    experts = experts_of(cfg)
    active = active_experts(tokens, experts.experts, experts.k)
    centroids = 2 * experts.experts * cfg.dim
    router = Work(
        centroids + 2 * tokens * cfg.dim + 4 * tokens * experts.experts,
        2 * tokens * experts.experts * cfg.dim,
        "bf16_tflops",
    )
    norm = Work(4 * 2 * tokens * cfg.dim)  # both summands in, sum and norm out
    shared = [one(tokens, n, k) for n, k in shared_weights(cfg)]
    routed = routed_experts if one is product else experts_in_bf16
    return [norm, router, *shared, routed(tokens * experts.k, active, experts)]


def attention_weights(cfg: Config, absorbed: bool) -> list[tuple[int, int]]:
    """Return outputs and inputs of MLA's matrices; w_ukv is no product where it is absorbed."""
    q, heads = cfg.q_lora_rank, cfg.n_heads
    width = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    queries = heads * cfg.qk_head_dim
    found = [(q, cfg.dim), (queries, q)] if q else [(queries, cfg.dim)]
    found += [(width, cfg.dim), (cfg.dim, heads * cfg.v_head_dim)]
    expanded = (heads * (cfg.qk_nope_head_dim + cfg.v_head_dim), cfg.kv_lora_rank)
    return found if absorbed else [*found, expanded]


def shared_weights(cfg: Config) -> list[tuple[int, int]]:
    hidden = cfg.n_shared_experts * cfg.moe_inter_dim
    return [(2 * hidden, cfg.dim), (cfg.dim, hidden)] if hidden else []


def dense_weights(cfg: Config) -> list[tuple[int, int]]:
    return [(2 * cfg.inter_dim, cfg.dim), (cfg.dim, cfg.inter_dim)]


def attention_sizes(cfg: Config) -> Attention:
    nope, rope = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim
    return Attention(cfg.n_heads, nope, rope, cfg.v_head_dim, cfg.kv_lora_rank)


def experts_of(cfg: Config) -> Experts:
    return Experts(cfg.dim, cfg.moe_inter_dim, cfg.n_routed_experts, cfg.n_activated_experts)
