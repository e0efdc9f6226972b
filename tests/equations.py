"""The whole model once more, one equation a line: loops over tokens, heads and experts in FP64.

Paper   DeepSeek-V3 (arXiv:2412.19437), Eqs. 1-25, 4.3; V2 routing: arXiv:2405.04434, Eqs. 20-22.
Dims    every tensor here is one vector (of one token, head or expert) or a stored weight.
Differs from minids in all but the names of weights: nothing is imported from it, no tensor holds
        two tokens, nothing is masked, sorted or gathered. Autograd runs through it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """What one MoE layer did with one sequence: a list entry a token."""

    scores: list[list[Tensor]]  # s_{i,t}
    chosen: list[list[int]]


class Sequence(NamedTuple):
    """What the model makes of one sequence; `states[k]` is h^k (k = 0: the main model)."""

    states: list[list[Tensor]]
    logits: list[list[Tensor]]
    routings: list[Routing]  # a MoE layer each, MTP modules last


class Losses(NamedTuple):
    """The training losses in nats; `loads` has a row a MoE layer."""

    main: Tensor
    mtp: list[Tensor]
    balance: Tensor
    loads: list[list[int]]


def weights_of(model) -> dict[str, Tensor]:
    """Copy a Transformer's weights and routing biases to FP64, by name."""
    weights = {name: w.detach().double().requires_grad_() for name, w in model.named_parameters()}
    biases = {name: b.double() for name, b in model.named_buffers() if name.endswith("router.bias")}
    return weights | biases


def part(w: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights below a name, with that name cut off."""
    cut = len(prefix) + 1
    return {name[cut:]: value for name, value in w.items() if name.startswith(prefix + ".")}


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    mean_square = (x @ x) / len(x)
    return gain * x / (mean_square + eps).sqrt()


def swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    a = w_gate @ x
    return w_down @ (a / (1 + (-a).exp()) * (w_up @ x))


def frequency(k: int, cfg) -> float:
    """Return radians a position of rotary pair k, section 4.3."""
    width, base = cfg.qk_rope_head_dim, cfg.rope_theta
    f = base ** (-2 * k / width)
    if cfg.rope_factor == 1:
        return f

    def correction(turns: float) -> float:  # d(r) of the fact sheet, 2.3
        return width * math.log(cfg.original_seq_len / (2 * math.pi * turns)) / (2 * math.log(base))

    low = max(math.floor(correction(cfg.beta_fast)), 0)
    high = min(math.ceil(correction(cfg.beta_slow)), width - 1)
    if k <= low:
        return f
    if k >= high:
        return f / cfg.rope_factor
    ramp = (k - low) / (high - low)
    return f * (1 - ramp) + f / cfg.rope_factor * ramp


def rope(x: Tensor, position: int, cfg) -> Tensor:
    """Turn the pairs (x0, x1), (x2, x3), ... by their angles at this position."""
    turned = []
    for k in range(len(x) // 2):
        angle = position * frequency(k, cfg)
        a, b = x[2 * k], x[2 * k + 1]
        turned.append(a * math.cos(angle) - b * math.sin(angle))
        turned.append(a * math.sin(angle) + b * math.cos(angle))
    return torch.stack(turned)


def score_scale(cfg) -> float:
    """Return 1/sqrt(d_h + d_h^R) of Eq. 10, times the square of YaRN's sqrt(t) = 0.1 ln s + 1."""
    root_t = 1 + 0.1 * cfg.mscale * math.log(cfg.rope_factor)
    return root_t**2 / math.sqrt(cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)


def attention(h: list[Tensor], w: dict[str, Tensor], cfg, first: int, documents) -> list[Tensor]:
    """Return u_t of every token; token 0 has position `first`."""
    nope, rot, value = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    keys, values, queries = [], [], []  # [token][head]
    for t, h_t in enumerate(h):
        c_kv = w["w_dkv.weight"][: cfg.kv_lora_rank] @ h_t  # Eq. 1
        c_kv = rms_norm(c_kv, w["kv_norm.gain"], cfg.norm_eps)  # section 4.2
        k_r = rope(w["w_dkv.weight"][cfg.kv_lora_rank :] @ h_t, first + t, cfg)  # Eq. 3
        kv = w["w_ukv.weight"] @ c_kv  # rows: head 0 [key, value], head 1 ...
        keys.append([torch.cat([head[:nope], k_r]) for head in kv.split(nope + value)])  # Eq. 2, 4
        values.append([head[nope:] for head in kv.split(nope + value)])  # Eq. 5
        if cfg.q_lora_rank:
            c_q = rms_norm(w["w_dq.weight"] @ h_t, w["q_norm.gain"], cfg.norm_eps)  # Eq. 6
            q = w["w_uq.weight"] @ c_q
        else:
            q = w["w_q.weight"] @ h_t  # V2-Lite: queries are not compressed
        queries.append([])
        for head in q.split(nope + rot):
            q_r = rope(head[nope:], first + t, cfg)  # Eq. 8
            queries[t].append(torch.cat([head[:nope], q_r]))  # Eq. 7, 9
    out = []
    for t in range(len(h)):
        heads = []
        seen = [j for j in range(t + 1) if documents is None or documents[j] == documents[t]]
        for i in range(cfg.n_heads):
            power = [(queries[t][i] @ keys[j][i] * score_scale(cfg)).exp() for j in seen]
            o = sum(p / sum(power) * values[j][i] for p, j in zip(power, seen, strict=True))
            heads.append(o)  # Eq. 10
        out.append(w["w_o.weight"] @ torch.cat(heads))  # Eq. 11
    return out


def best(values: list[float], count: int) -> list[int]:
    """Return the indices of the `count` largest values."""
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def gate(u: Tensor, w: dict[str, Tensor], cfg) -> tuple[dict[int, Tensor], list[Tensor]]:
    """Return one token's weight g_i of each chosen expert, and its scores s_i."""
    n_r, size = cfg.n_routed_experts, cfg.n_routed_experts // cfg.n_expert_groups
    logits = [u @ w["centroids"][i] for i in range(n_r)]
    if cfg.score_func == "sigmoid":
        s = [1 / (1 + (-logit).exp()) for logit in logits]  # Eq. 15
        choice = [s[i].item() + w["bias"][i].item() for i in range(n_r)]  # Eq. 16
    else:
        total = sum(logit.exp() for logit in logits)
        s = [logit.exp() / total for logit in logits]  # V2 Eq. 22
        choice = [s_i.item() for s_i in s]
    worth = []
    for g in range(cfg.n_expert_groups):
        members = sorted(choice[g * size : (g + 1) * size], reverse=True)
        worth.append(sum(members[: 2 if cfg.group_score == "top2" else 1]))  # node-limited routing
    kept = best(worth, cfg.n_limited_groups)
    allowed = [i for i in range(n_r) if i // size in kept]
    chosen = [allowed[n] for n in best([choice[i] for i in allowed], cfg.n_activated_experts)]
    g_prime = {i: s[i] for i in chosen}  # Eq. 14, 16
    total = sum(g_prime.values()) if cfg.norm_topk else 1.0
    return {i: cfg.route_scale * g / total for i, g in g_prime.items()}, s  # Eq. 13


def moe(u: Tensor, w: dict[str, Tensor], cfg) -> tuple[Tensor, list[Tensor], list[int]]:
    """Return one token's feed-forward output, its scores and its experts."""
    weights, s = gate(u, part(w, "router"), cfg)
    y = torch.zeros_like(u)
    for i, g in weights.items():
        w_gate, w_up = w["experts.w_gate_up"][i]
        y = y + g * swiglu(u, w_gate, w_up, w["experts.w_down"][i])  # Eq. 12, routed
    for n in range(cfg.n_shared_experts):
        f = slice(
            n * cfg.moe_inter_dim, (n + 1) * cfg.moe_inter_dim
        )  # the stored ones lie side by side
        w_gate, w_up = w["shared.w_gate.weight"][f], w["shared.w_up.weight"][f]
        y = y + swiglu(u, w_gate, w_up, w["shared.w_down.weight"][:, f])  # Eq. 12, shared
    return y, s, list(weights)


def block(x: list[Tensor], w, cfg, first: int, documents) -> tuple[list[Tensor], Routing | None]:
    """One Transformer block over a sequence."""
    h = [rms_norm(x_t, w["attn_norm.gain"], cfg.norm_eps) for x_t in x]
    u = attention(h, part(w, "attn"), cfg, first, documents)
    x = [x_t + u_t for x_t, u_t in zip(x, u, strict=True)]
    h = [rms_norm(x_t, w["ffn_norm.gain"], cfg.norm_eps) for x_t in x]
    ffn = part(w, "ffn")
    if "router.centroids" not in ffn:
        names = ("w_gate.weight", "w_up.weight", "w_down.weight")
        return [
            x_t + swiglu(h_t, *map(ffn.get, names)) for x_t, h_t in zip(x, h, strict=True)
        ], None
    y, scores, chosen = zip(*[moe(h_t, ffn, cfg) for h_t in h], strict=True)
    return [x_t + y_t for x_t, y_t in zip(x, y, strict=True)], Routing(
        [*scores], [*chosen]
    )  # Eq. 12


def forward(w: dict[str, Tensor], cfg, tokens: list[int], documents=None, depth=0) -> Sequence:
    """Run the main model on `tokens` and `depth` MTP modules on those they can be fed with."""
    x, routings = [w["embed"][token] for token in tokens], []
    for layer in range(cfg.n_layers):
        x, routing = block(x, part(w, f"layers.{layer}"), cfg, 0, documents)
        routings.append(routing)
    h = [rms_norm(x_t, w["norm.gain"], cfg.norm_eps) for x_t in x]
    states = [h]
    for k in range(1, depth + 1):
        m = part(w, f"mtp.{k - 1}")
        merged = []
        for i in range(len(tokens) - k):
            emb = rms_norm(w["embed"][tokens[i + k]], m["embedding_norm.gain"], cfg.norm_eps)
            hid = rms_norm(h[i], m["hidden_norm.gain"], cfg.norm_eps)
            merged.append(m["w_merge.weight"] @ torch.cat([emb, hid]))  # Eq. 21, released order
        x, routing = block(merged, part(m, "block"), cfg, k, documents)  # Eq. 22
        routings.append(routing)
        h = [rms_norm(x_i, m["norm.gain"], cfg.norm_eps) for x_i in x]
        states.append(h)
    logits = [[w["head.weight"] @ h_t for h_t in state] for state in states]  # Eq. 23
    return Sequence(states, logits, [routing for routing in routings if routing])


def balance_product(scores: list[list[Tensor]], chosen: list[list[int]], top_k: int) -> Tensor:
    """Return sum_i f_i P_i over the given tokens."""
    n_r, n_tokens, total = len(scores[0]), len(scores), 0.0
    for i in range(n_r):
        f_i = n_r / (top_k * n_tokens) * sum(i in ids for ids in chosen)  # Eq. 18
        p_i = sum(s[i] / sum(s) for s in scores) / n_tokens  # Eq. 19, 20
        total = total + f_i * p_i
    return total


def losses(w: dict[str, Tensor], cfg, batch: list[list[int]], documents=None) -> Losses:
    """Return the losses of a batch of T + 1 tokens a row, and the tokens each expert received."""
    documents = documents or [[0] * len(row) for row in batch]
    runs, top_k = [], cfg.n_activated_experts
    sums, targets = [0.0] * (1 + cfg.mtp_depth), 0
    for row, docs in zip(batch, documents, strict=True):
        targets += sum(docs[i] == docs[i + 1] for i in range(len(row) - 1))
        runs.append(forward(w, cfg, row[:-1], docs[:-1], cfg.mtp_depth))
        for k, logits in enumerate(runs[-1].logits):
            for i, logit in enumerate(logits):
                if docs[i] == docs[i + k + 1]:
                    p = logit.exp() / logit.exp().sum()
                    sums[k] = sums[k] - p[row[i + k + 1]].log()  # Eq. 24
    balance, loads = torch.zeros((), dtype=torch.float64), []
    for layer in zip(*[run.routings for run in runs], strict=True):
        for routing in layer:
            unbiased = [best([s_i.item() for s_i in s], top_k) for s in routing.scores]
            sequence = balance_product(routing.scores, unbiased, top_k)
            balance = balance + cfg.seq_loss_alpha * sequence / len(batch)  # Eq. 17
        scores = [s for routing in layer for s in routing.scores]
        chosen = [ids for routing in layer for ids in routing.chosen]
        balance = balance + cfg.aux_loss_alpha * balance_product(scores, chosen, top_k)
        loads.append([sum(i in ids for ids in chosen) for i in range(cfg.n_routed_experts)])
    return Losses(sums[0] / targets, [s / targets for s in sums[1:]], balance, loads)
