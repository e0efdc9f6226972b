"""Exercises of chapter 08: measuring balance, choosing with a bias, moving it, and the two losses.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 2.1.2, Eqs. 13-20; arXiv:2408.15664, Algorithm 1.
Dims    E experts, K experts a token, n tokens, B sequences of T tokens.
Book    book/08_balance.ipynb           Kernel  none
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minids.balance import auxiliary_loss, expert_load, max_vio, sequence_loss, update_bias
from minids.config import preset
from minids.learn.check import Exercise, Property, differs, within
from minids.router import Router, limit_groups
from minids.schedule import V3

# what a property calls its input, and the input: small, and printed where the property fails


def _each(*tests: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    """Return the first trouble of several tests."""
    return lambda answer: next(filter(None, (test(answer) for test in tests)), None)


def _vio(load: list[int]) -> Callable[[Any], str | None]:
    want = max_vio(torch.tensor(load)).item()
    return lambda answer: differs(f"max_violation({load})", answer(load), want)


def _v3_busiest(answer: Any) -> str | None:
    cfg = preset("v3")
    visits = V3.batch * cfg.original_seq_len * cfg.n_activated_experts
    want = (1 + 0.72) * visits / cfg.n_routed_experts
    return within("The number of tokens", answer, 0.99 * want, 1.01 * want)


def _gate(score: list[float], bias: list[float], k: int, scale: float):
    """Compare with Router, which computes these scores from a token of width 1."""
    cfg = preset("toy", dim=1, n_routed_experts=len(score), n_activated_experts=k,
                 n_expert_groups=1, n_limited_groups=1, route_scale=scale)  # fmt: skip
    router = Router(cfg)
    assert router.bias is not None, "sigmoid routers have a bias"
    with torch.no_grad():
        router.centroids[:, 0] = torch.tensor(score).logit()
        router.bias.copy_(torch.tensor(bias))
        gate, ids, _, _ = router(torch.ones(1, 1))
    want = torch.zeros(len(score)).scatter(0, ids[0], gate[0])
    call = f"gate_weights(score={score}, bias={bias}, k={k}, scale={scale})"
    return lambda answer: differs(
        call, answer(torch.tensor(score), torch.tensor(bias), k, scale), want
    )


def _picks(choice: list[float], groups: int, keep: int) -> Callable[[Any], str | None]:
    """Compare the two experts that a token would then visit."""
    limited = limit_groups(torch.tensor([choice]), groups, keep, 2)[0]
    want = sorted(limited.topk(2).indices.tolist())
    call = f"keep_groups({choice}, groups={groups}, keep={keep})"

    def test(answer: Any) -> str | None:
        got = answer(torch.tensor(choice), groups, keep)
        if not isinstance(got, Tensor) or got.shape != limited.shape:
            return differs(call, got, limited)
        return differs(f"The two best of {call}", sorted(got.topk(2).indices.tolist()), want)

    return test


def _limit(choice: list[float], groups: int, keep: int) -> Callable[[Any], str | None]:
    want = limit_groups(torch.tensor([choice]), groups, keep, 2)[0]
    call = f"keep_groups({choice}, groups={groups}, keep={keep})"
    return lambda answer: differs(call, answer(torch.tensor(choice), groups, keep), want)


def _sign(load: list[int], speed: float) -> Callable[[Any], str | None]:
    def test(answer: Any) -> str | None:
        bias = torch.linspace(-0.1, 0.2, len(load))
        want = bias.clone()
        update_bias(want, torch.tensor(load), speed)
        call = f"new_bias({[round(b, 3) for b in bias.tolist()]}, load={load}, speed={speed})"
        return differs(call, answer(bias, torch.tensor(load), speed), want)

    return test


def _leaves_bias(answer: Any) -> str | None:
    bias = torch.zeros(4)
    answer(bias, torch.tensor([9, 1, 1, 1]), 0.5)
    changed = [round(b, 3) for b in bias.tolist()]
    return f"After the call the bias that went in was {changed}, before it [0, 0, 0, 0]." * any(
        changed
    )


_SCORES = torch.tensor([[0.50, 0.45, 0.10], [0.60, 0.20, 0.10], [0.20, 0.60, 0.30],
                        [0.55, 0.50, 0.10]])  # fmt: skip


def _route(tokens: Tensor, bias: Tensor) -> Tensor:
    return (_SCORES[tokens] + bias).topk(1).indices


def _step(cuts: list[list[int]]) -> Callable[[Any], str | None]:
    def test(answer: Any) -> str | None:
        parts, want = [torch.tensor(cut) for cut in cuts], torch.zeros(3)
        update_bias(want, expert_load(_route(torch.arange(4), want), 3), 0.1)
        got = answer(torch.zeros(3), parts, 0.1, _route)
        where = "where route sends tokens 0, 1, 2, 3 to experts 0, 0, 1, 0 at that bias,"
        return differs(f"bias_after_step(zeros(3), {cuts}, 0.1, route), {where}", got, want)

    return test


# three tokens, each preferring another expert in the same way: perfect balance for any K
_BALANCED = torch.tensor([[0.9, 0.5, 0.1], [0.1, 0.9, 0.5], [0.5, 0.1, 0.9]])
_LIVELY = torch.tensor([[0.6, 0.2, 0.4], [0.5, 0.3, 0.9], [0.1, 0.8, 0.7]])
# all tokens of one sequence prefer expert 0, all of the other expert 1
_MIRRORS = torch.tensor([[[0.9, 0.1], [0.8, 0.2]], [[0.1, 0.9], [0.2, 0.8]]])


def _shown(score: Tensor) -> str:
    rows = [[round(s, 2) for s in row] for row in score.flatten(0, -2).tolist()]
    return str(rows if score.ndim == 2 else [rows[: score.shape[1]], rows[score.shape[1] :]])


def _loss(score: Tensor, k: int) -> Callable[[Any], str | None]:
    call = f"sequence_wise({_shown(score)}, k={k})"
    return lambda answer: differs(call, answer(score.clone(), k), sequence_loss(score, k).item())


def _classic(score: Tensor, k: int) -> Callable[[Any], str | None]:
    ids = score.topk(k).indices
    call = f"auxiliary({_shown(score)}, {ids.tolist()})"
    want = auxiliary_loss(score[None], ids[None]).item()
    return lambda answer: differs(call, answer(score.clone(), ids.clone()), want)


EXERCISES = (
    Exercise(
        name="max_violation",
        title="MaxVio",
        statement="Write `max_violation(load)`: from a list of counts, one an expert, return by "
        "which share of the mean load the busiest expert exceeds it. Perfect balance gives 0.",
        start="""def max_violation(load):
    raise NotImplementedError
""",
        properties=(
            Property("equal loads give 0", _vio([5, 5, 5, 5])),
            Property("it is the excess over the mean, in units of the mean", _vio([4, 0, 2, 2])),
            Property("it does not depend on the number of tokens", _vio([400, 0, 200, 200])),
            Property("all tokens to one of E experts give E - 1", _vio([0, 8, 0, 0])),
        ),
        hints=(
            "What would every expert get if all got the same?",
            "Take the largest count, subtract that mean, and measure the rest in means.",
            "(max(load) - mean) / mean, with mean = sum(load) / len(load).",
        ),
        solution="""def max_violation(load):
    mean = sum(load) / len(load)  # what each would get in perfect balance
    return (max(load) - mean) / mean
""",
        wrong={
            "the ratio itself, 1 at balance": """def max_violation(load):
    return max(load) / (sum(load) / len(load))
""",
            "the spread from least to most": """def max_violation(load):
    mean = sum(load) / len(load)
    return (max(load) - min(load)) / mean
""",
            "in units of the largest load": """def max_violation(load):
    mean = sum(load) / len(load)
    return (max(load) - mean) / max(load)
""",
        },
    ),
    Exercise(
        name="busiest",
        title="The busiest expert of a V3 step",
        statement="A full step of V3 reads 15,360 sequences of 4,096 tokens; each token visits "
        "8 of a layer's 256 experts. How many tokens does the busiest expert of that layer receive "
        "if MaxVio is 0.72? Replace `...` by a number or an expression.",
        start="busiest = ...\n",
        properties=(Property("it is 1.72 times the fair share, within 1 %", _v3_busiest),),
        hints=(
            "First the fair share: how many visits are there in all, and how many experts?",
            "Visits are tokens times 8. MaxVio says how far above the fair share the busiest is.",
            "(1 + 0.72) times 15,360 x 4,096 x 8 / 256.",
        ),
        solution="""fair = 15_360 * 4_096 * 8 / 256  # visits of each expert in perfect balance
busiest = (1 + 0.72) * fair
""",
        wrong={
            "one visit a token": "busiest = 1.72 * 15_360 * 4_096 / 256\n",
            "the excess alone": "busiest = 0.72 * 15_360 * 4_096 * 8 / 256\n",
        },
    ),
    Exercise(
        name="gate_weights",
        title="The bias picks, the score weighs",
        statement="Write `gate_weights(score, bias, k, scale)` for one token: `score` and `bias` "
        "are tensors `[E]`, the result is a tensor `[E]` with the weight of each chosen expert and "
        "0 elsewhere. The bias chooses `k` experts; their unbiased scores, divided by their sum "
        "and multiplied by `scale`, are the weights.",
        start="""def gate_weights(score, bias, k, scale):
    raise NotImplementedError
""",
        properties=(
            Property(
                "without bias the k best scores are weighed",
                _gate([0.5, 0.75, 0.25, 0.2], [0.0, 0.0, 0.0, 0.0], 2, 2.5),
            ),
            Property(
                "the bias chooses and does not weigh",
                _gate([0.5, 0.75, 0.25, 0.2], [0.0, 0.0, 1.0, 0.0], 2, 2.5),
            ),
            Property(
                "a constant on every bias changes nothing",
                _gate([0.5, 0.75, 0.25, 0.2], [-3.0, -3.0, -3.0, -3.0], 2, 2.5),
            ),
        ),
        hints=(
            "Two different numbers are needed an expert: one to rank, one to weigh.",
            "Rank with score + bias, then go back to score for the chosen ones (gather, or index).",
            "ids = (score + bias).topk(k).indices; their weights are scale * score[ids] / sum.",
        ),
        solution="""import torch


def gate_weights(score, bias, k, scale):
    ids = (score + bias).topk(k).indices  # Eq. 16: the bias picks
    chosen = score[ids]  # and is gone
    weights = torch.zeros_like(score)
    weights[ids] = scale * chosen / chosen.sum()  # Eq. 13
    return weights
""",
        wrong={
            "weighs with the biased score": """import torch


def gate_weights(score, bias, k, scale):
    best = (score + bias).topk(k)
    weights = torch.zeros_like(score)
    weights[best.indices] = scale * best.values / best.values.sum()
    return weights
""",
            "normalises over all experts": """import torch


def gate_weights(score, bias, k, scale):
    ids = (score + bias).topk(k).indices
    weights = torch.zeros_like(score)
    weights[ids] = scale * score[ids] / score.sum()
    return weights
""",
            "softmax over the chosen": """import torch


def gate_weights(score, bias, k, scale):
    ids = (score + bias).topk(k).indices
    weights = torch.zeros_like(score)
    weights[ids] = scale * score[ids].softmax(-1)
    return weights
""",
        },
    ),
    Exercise(
        name="keep_groups",
        title="A group limit that holds",
        statement="Write `keep_groups(choice, groups, keep)` for one token: `choice` is a tensor "
        "`[E]` of biased scores, cut into `groups` groups of neighbours. A group is worth the sum "
        "of its two best scores. Return `choice` with every expert outside the `keep` best groups "
        "made impossible to choose.",
        start="""def keep_groups(choice, groups, keep):
    raise NotImplementedError
""",
        properties=(
            Property(
                "the two best of a group decide, not the best one",
                _picks([0.9, 0.1, 0.0, 0.6, 0.5, 0.2], 2, 1),
            ),
            Property(
                "the rest of a group does not count",
                _picks([0.5, 0.5, 0.5, 0.9, 0.3, 0.0], 2, 1),
            ),
            Property(
                "dropped experts lose against negative scores too",
                _picks([-0.2, -0.3, -0.9, -0.8, -0.7, -0.9], 3, 1),
            ),
            Property(
                "kept scores stay as they are, with several groups kept",
                _limit([0.1, 0.9, -0.2, 0.3, 0.8, 0.7], 3, 2),
            ),
        ),
        hints=(
            "Which number is smaller than every score, whatever the bias?",
            "choice.unflatten(0, (groups, -1)) gives a row a group; topk works along each row.",
            "Take the topk(2) sum of each row, keep the rows with the `keep` best sums, fill the "
            "others with -inf, and flatten.",
        ),
        solution="""import torch


def keep_groups(choice, groups, keep):
    rows = choice.unflatten(0, (groups, -1))
    worth = rows.topk(2, dim=-1).values.sum(-1)
    limited = torch.full_like(rows, -torch.inf)  # below any biased score
    kept = worth.topk(keep).indices
    limited[kept] = rows[kept]
    return limited.flatten()
""",
        wrong={
            "dropped groups get 0.0": """import torch


def keep_groups(choice, groups, keep):
    rows = choice.unflatten(0, (groups, -1))
    kept = rows.topk(2, dim=-1).values.sum(-1).topk(keep).indices
    limited = torch.zeros_like(rows)
    limited[kept] = rows[kept]
    return limited.flatten()
""",
            "a group is worth its best expert (V2)": """import torch


def keep_groups(choice, groups, keep):
    rows = choice.unflatten(0, (groups, -1))
    kept = rows.amax(-1).topk(keep).indices
    limited = torch.full_like(rows, -torch.inf)
    limited[kept] = rows[kept]
    return limited.flatten()
""",
            "a group is worth all its experts": """import torch


def keep_groups(choice, groups, keep):
    rows = choice.unflatten(0, (groups, -1))
    kept = rows.sum(-1).topk(keep).indices
    limited = torch.full_like(rows, -torch.inf)
    limited[kept] = rows[kept]
    return limited.flatten()
""",
        },
    ),
    Exercise(
        name="new_bias",
        title="The sign rule",
        statement="Write `new_bias(bias, load, speed)`: `bias` is a tensor `[E]`, `load` the "
        "counts `[E]` of a whole batch. Return the next bias and leave the one that came in alone: "
        "experts above the mean go down by `speed`, those below it up, those at the mean stay.",
        start="""def new_bias(bias, load, speed):
    raise NotImplementedError
""",
        properties=(
            Property("overloaded goes down, underloaded goes up", _sign([7, 1, 2, 2], 0.001)),
            Property("how much too busy does not matter", _sign([900, 1, 2, 97], 0.01)),
            Property("an expert at the mean stays", _sign([3, 3, 3, 3], 0.01)),
            Property("speed 0 freezes it", _sign([7, 1, 2, 2], 0.0)),
            Property("the bias that came in is not changed", _leaves_bias),
        ),
        hints=(
            "Only the side of the mean counts, not the distance to it.",
            "torch.sign gives -1, 0 or 1. Of which difference, so that busy experts go down?",
            "bias + speed * torch.sign(load.float().mean() - load).",
        ),
        solution="""import torch


def new_bias(bias, load, speed):
    short = load.float().mean() - load  # > 0: this expert could take more
    return bias + speed * torch.sign(short)
""",
        wrong={
            "the wrong way round": """import torch


def new_bias(bias, load, speed):
    return bias + speed * torch.sign(load - load.float().mean())
""",
            "proportional to the error": """import torch


def new_bias(bias, load, speed):
    mean = load.float().mean()
    return bias + speed * (mean - load) / mean
""",
            "changes its argument": """import torch


def new_bias(bias, load, speed):
    bias += speed * torch.sign(load.float().mean() - load)
    return bias
""",
        },
    ),
    Exercise(
        name="bias_after_step",
        title="One move a step, however the batch is cut",
        statement="A batch comes as a list of micro-batches. Write `bias_after_step(bias, "
        "micro_batches, speed, route)`, which returns the bias after one optimiser step. "
        "`route(tokens, bias)` returns the chosen expert ids `[n, K]`. The result must not depend "
        "on how the batch was cut.",
        start="""def bias_after_step(bias, micro_batches, speed, route):
    raise NotImplementedError
""",
        properties=(
            Property("one batch of four tokens moves the bias once", _step([[0, 1, 2, 3]])),
            Property("two micro-batches give the same bias", _step([[0, 1], [2, 3]])),
            Property("uneven cuts give the same bias", _step([[0, 1, 3], [2]])),
            Property("four micro-batches give the same bias", _step([[0], [1], [2], [3]])),
        ),
        hints=(
            "What has to be added up over the micro-batches, and what must not move meanwhile?",
            "Count loads with the old bias through the whole list; then apply the sign rule once.",
            "load = sum of route(part, bias).flatten().bincount(minlength=len(bias)) over the "
            "parts; then bias + speed * sign(mean - load).",
        ),
        solution="""import torch


def bias_after_step(bias, micro_batches, speed, route):
    load = torch.zeros_like(bias)
    for tokens in micro_batches:
        ids = route(tokens, bias)  # always the bias of the step's beginning
        load += ids.flatten().bincount(minlength=len(bias))
    return bias + speed * torch.sign(load.mean() - load)
""",
        wrong={
            "moves after each micro-batch": """import torch


def bias_after_step(bias, micro_batches, speed, route):
    for tokens in micro_batches:
        load = route(tokens, bias).flatten().bincount(minlength=len(bias)).float()
        bias = bias + speed * torch.sign(load.mean() - load)
    return bias
""",
            "averages the moves": """import torch


def bias_after_step(bias, micro_batches, speed, route):
    move = torch.zeros_like(bias)
    for tokens in micro_batches:
        load = route(tokens, bias).flatten().bincount(minlength=len(bias)).float()
        move += torch.sign(load.mean() - load) / len(micro_batches)
    return bias + speed * move
""",
            "counts the last micro-batch alone": """import torch


def bias_after_step(bias, micro_batches, speed, route):
    for tokens in micro_batches:
        load = route(tokens, bias).flatten().bincount(minlength=len(bias)).float()
    return bias + speed * torch.sign(load.mean() - load)
""",
        },
    ),
    Exercise(
        name="auxiliary",
        title="A loss that is 1 at balance, for any top-k",
        statement="Write the classical loss `auxiliary(score, ids)` without its factor α: `score` "
        "is a tensor `[n, E]` of affinities, `ids` `[n, K]` holds the chosen experts. It is the "
        "sum over experts of f, the expert's load in units of the mean load, times P, its mean "
        "share of a token's affinity.",
        start="""def auxiliary(score, ids):
    raise NotImplementedError
""",
        properties=(
            Property("perfect balance costs 1 with K = 1", _classic(_BALANCED, 1)),
            Property("perfect balance costs 1 with K = 2", _classic(_BALANCED, 2)),
            Property(
                "affinities are shares: each token's sum to 1",
                _classic(torch.tensor([[0.9, 0.1], [0.2, 0.1]]), 1),
            ),
            Property("lopsided scores cost more, as much as in minids", _classic(_LIVELY, 2)),
        ),
        hints=(
            "How many visits does an expert get in balance, if each of n tokens makes K?",
            "f = load / (n K / E); P = mean over tokens of score / (sum of the token's scores).",
            "load = ids.flatten().bincount(minlength=E); return (load * E / (n * K) * P).sum().",
        ),
        solution="""import torch


def auxiliary(score, ids):
    n_experts = score.shape[-1]
    load = ids.flatten().bincount(minlength=n_experts)
    f = load * n_experts / ids.numel()  # n K visits, E experts: 1 at balance
    p = (score / score.sum(-1, keepdim=True)).mean(0)  # sums to 1
    return (f * p).sum()
""",
        wrong={
            "forgets that a token makes K visits": """import torch


def auxiliary(score, ids):
    n_experts = score.shape[-1]
    load = ids.flatten().bincount(minlength=n_experts)
    f = load * n_experts / len(ids)
    p = (score / score.sum(-1, keepdim=True)).mean(0)
    return (f * p).sum()
""",
            "takes raw sigmoids": """import torch


def auxiliary(score, ids):
    n_experts = score.shape[-1]
    load = ids.flatten().bincount(minlength=n_experts)
    return (load * n_experts / ids.numel() * score.mean(0)).sum()
""",
        },
    ),
    Exercise(
        name="sequence_wise",
        title="Each sequence by itself",
        statement="Write the sequence-wise loss of Eqs. 17-20 without α: `sequence_wise(score, k)` "
        "with `score` `[B, T, E]` affinities. f counts the `k` best scores of each token. Every "
        "sequence has its own f and P; the losses of the sequences are averaged.",
        start="""def sequence_wise(score, k):
    raise NotImplementedError
""",
        properties=(
            Property(
                "perfect balance costs 1",
                _each(
                    _loss(_BALANCED[None].repeat(2, 1, 1), 1),
                    _loss(_MIRRORS.flatten(0, 1)[None], 1),
                ),
            ),
            Property("a lopsided sequence cannot hide behind its mirror image", _loss(_MIRRORS, 1)),
            Property(
                "two different sequences cost their mean",
                _loss(torch.stack([_LIVELY, _BALANCED]), 2),
            ),
        ),
        hints=(
            "What may be summed over the batch before f and P are multiplied? Nothing.",
            "Make f and P of shape [B, E], one row a sequence; multiply; sum over E; mean over B.",
            "chosen = zeros_like(score).scatter(-1, score.topk(k).indices, 1.0); "
            "f = chosen.sum(1) * E / (k * T); P = shares.mean(1).",
        ),
        solution="""import torch


def sequence_wise(score, k):
    _, n_tokens, n_experts = score.shape
    chosen = torch.zeros_like(score).scatter(-1, score.topk(k).indices, 1.0)
    f = chosen.sum(1) * n_experts / (k * n_tokens)  # Eq. 18, [B, E]
    p = (score / score.sum(-1, keepdim=True)).mean(1)  # Eqs. 19, 20, [B, E]
    return (f * p).sum(-1).mean()  # Eq. 17 of each sequence, then their mean
""",
        wrong={
            "multiplies means over the batch": """import torch


def sequence_wise(score, k):
    _, n_tokens, n_experts = score.shape
    chosen = torch.zeros_like(score).scatter(-1, score.topk(k).indices, 1.0)
    f = chosen.sum(1).mean(0) * n_experts / (k * n_tokens)
    p = (score / score.sum(-1, keepdim=True)).mean((0, 1))
    return (f * p).sum()
""",
            "affinities are not shares": """import torch


def sequence_wise(score, k):
    _, n_tokens, n_experts = score.shape
    chosen = torch.zeros_like(score).scatter(-1, score.topk(k).indices, 1.0)
    f = chosen.sum(1) * n_experts / (k * n_tokens)
    return (f * score.mean(1)).sum(-1).mean()
""",
        },
    ),
)
