"""Seven ways to keep experts busy, four seeds each: what balance costs, and who reads what.

Paper   DeepSeek-V3 (arXiv:2412.19437), Table 5, section 4.5.3, Figure 9; arXiv:2408.15664, Table 2.
Dims    a frame is one step: loads and biases [layers, E].
Book    book/08_balance.ipynb           Kernel  none
Differs 0.8M parameters and 300 steps of 1,024 tokens, where the papers train 1B and more on 100B
        tokens and more; the corpus is Python's own texts.
"""

import time
from typing import Any, NamedTuple

import torch
from einops import einsum
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from minids.balance import expert_load, max_vio, update_bias
from minids.config import Config, preset
from minids.data import Packed, encode_train
from minids.evaluate import Score, evaluate
from minids.files.corpus import load_corpus
from minids.learn import log
from minids.model import Transformer
from minids.moe import MoE
from minids.schedule import Schedule
from minids.tokenizer import train_tokenizer
from minids.train import train

ARMS: dict[str, dict[str, float]] = {
    "none": {},
    "auxiliary 0.001": {"aux_loss_alpha": 0.001},
    "auxiliary 0.01": {"aux_loss_alpha": 0.01},
    "auxiliary 0.1": {"aux_loss_alpha": 0.1},
    "sequence 0.01": {"seq_loss_alpha": 0.01},
    "bias 0.001": {"bias_speed": 0.001},
    "bias 0.01": {"bias_speed": 0.01},
}
SEEDS = (0, 1, 2, 3)
STEPS, CONSTANT = 300, 240  # the learning rate falls after CONSTANT steps
BATCH, SEQ_LEN, CHARS = 8, 128, 1_000_000
EVERY = 10  # steps between two frames, and of one point of a curve
LAST = 50  # steps over which a run's own MaxVio is averaged


class Text(NamedTuple):
    """What every run reads: one tokenizer, training documents as ids, held-out texts by domain."""

    tokenizer: Tokenizer
    documents: list[list[int]]
    heldout: dict[str, list[str]]


def read_text() -> Text:
    """Read Python's own texts, prose and code, and train a tokenizer of `nano`'s size on them."""
    corpus = load_corpus("stdlib", max_chars=CHARS)
    texts = [text for domain in corpus.train.values() for text in domain]
    tokenizer = train_tokenizer(texts, preset("nano").vocab_size)
    return Text(tokenizer, encode_train(corpus, tokenizer, fim_rate=0.0), corpus.heldout)


def config(arm: str) -> Config:
    """Return `nano` with two MoE layers, without MTP, balanced by this arm alone."""
    off = dict(bias_speed=0.0, seq_loss_alpha=0.0, aux_loss_alpha=0.0)
    return preset("nano", n_dense_layers=0, mtp_depth=0, **(off | ARMS[arm]))


def schedule(steps: int) -> Schedule:
    """Return warm-up, a constant rate, a short descent: fewer steps are the start of more."""
    step, constant = BATCH * SEQ_LEN, min(steps, CONSTANT)
    return Schedule(peak_lr=3e-3, warmup_steps=15, constant=constant * step, tail=0, last_tail=0,
                    cosine=(steps - constant) * step, batch=BATCH, first_batch=BATCH)  # fmt: skip


def run(arm: str, seed: int, text: Text, steps: int = STEPS) -> dict[str, Any]:
    """Train one model, score it on held-out text; return curves, frames and scores as plain JSON.

    The seed fixes weights and the order of rows, so arms of one seed can be compared in pairs.
    """
    model, frames = Transformer(config(arm), seed=seed), []
    hooks = [router.register_forward_hook(_record(frames)) for router in model.routers]
    data = Packed(text.documents, SEQ_LEN, seed)
    lines = train(model, data, schedule(steps), progress=False).log
    for hook in hooks:
        hook.remove()
    vio = [sum(line["max_vio"]) / len(line["max_vio"]) for line in lines]
    scores = evaluate(model, text.tokenizer, text.heldout, window=SEQ_LEN)
    return dict(
        arm=arm, seed=seed, steps=steps,
        loss=_means([line["loss"] for line in lines]), max_vio=_means(vio),
        last_max_vio=round(sum(vio[-LAST:]) / len(vio[-LAST:]), 4),
        frames=_frames(frames, len(model.routers)), **_scored(scores),
    )  # fmt: skip


def _record(frames: list[tuple[list[int], list[float]]]):
    """Return a hook that appends each step's load and the bias that led to it."""

    def hook(router, _inputs, routed) -> None:
        load = expert_load(routed[1], router.cfg.n_routed_experts)
        frames.append((load.tolist(), [round(b, 4) for b in router.bias.tolist()]))

    return hook


def _frames(frames: list[tuple[list[int], list[float]]], layers: int) -> list[dict[str, Any]]:
    """Return every EVERY-th step, with the load and the bias of each layer."""
    steps = [frames[at : at + layers] for at in range(0, len(frames), layers)]
    kept = [n for n in range(len(steps)) if n == 0 or (n + 1) % EVERY == 0]
    return [
        dict(step=n + 1, load=[load for load, _ in steps[n]], bias=[bias for _, bias in steps[n]])
        for n in kept
    ]


def _means(values: list[float]) -> list[float]:
    """Return the means of EVERY neighbours."""
    blocks = [values[at : at + EVERY] for at in range(0, len(values), EVERY)]
    return [round(sum(block) / len(block), 4) for block in blocks]


def _scored(scores: dict[str, Score]) -> dict[str, Any]:
    """Return held-out nats a token, MaxVio a layer, and each domain's visits of each expert."""
    return dict(
        heldout_loss={domain: round(s.nats / s.tokens, 4) for domain, s in scores.items()},
        heldout_max_vio=[round(v, 4) for v in max_vio(scores["all"].load).tolist()],
        domain_load={d: s.load.tolist() for d, s in scores.items() if d != "all"},
    )


def by_arm(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of a log arm by arm, in the order of their seeds."""
    return {arm: [run for run in results["runs"] if run["arm"] == arm] for arm in ARMS}


class Seen(NamedTuple):
    """What one step of SmallMoE did."""

    error: float
    load: list[int]
    max_vio: float


class SmallMoE:
    """Eight experts, two a token, that learn eight linear maps: small enough to watch collapse.

    Each token is one of eight topics plus a direction that all tokens share, `skew` times as long
    as a topic; its topic decides which map it must be sent through.
    """

    def __init__(self, seed: int = 0):
        self.random = torch.Generator().manual_seed(seed)
        one_group = dict(n_expert_groups=1, n_limited_groups=1)
        # aux_loss_alpha is 1 here: `step` weighs the loss
        self.moe = MoE(preset("toy", seq_loss_alpha=0.0, aux_loss_alpha=1.0, **one_group))
        for weight in self.moe.parameters():
            torch.nn.init.normal_(weight, std=0.3, generator=self.random)
        torch.nn.init.normal_(self.moe.router.centroids, std=0.05, generator=self.random)
        topics = torch.randn(8, 8, generator=self.random)
        self.topics = topics - topics.mean(0)
        shared = torch.randn(8, generator=self.random)
        self.shared = shared / shared.norm() * 8**0.5
        self.maps = torch.randn(8, 8, 8, generator=self.random) / 3
        self.optimizer = torch.optim.Adam(self.moe.parameters(), lr=0.02)

    def batch(
        self, skew: float, size: int = 256
    ) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n D"]]:
        """Return tokens and what they must become."""
        topic = torch.randint(8, (size,), generator=self.random)
        noise = 0.3 * torch.randn(size, 8, generator=self.random)
        x = skew * self.shared + self.topics[topic] + noise
        return x, einsum(self.maps[topic], x, "n out d, n d -> n out")

    def step(self, *, skew: float = 1.0, speed: float = 0.0, alpha: float = 0.0) -> Seen:
        """Learn from one batch, then move the bias by `speed`; `alpha` weighs that loss."""
        x, wanted = self.batch(skew)
        y, routed = self.moe(x[None], stats=True)
        error = (y[0] - wanted).square().mean()
        (error + alpha * routed.balance_loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        bias = self.moe.router.bias
        assert bias is not None, "sigmoid routers have a bias"
        update_bias(bias, routed.load, speed)
        return Seen(error.item(), routed.load.tolist(), max_vio(routed.load).item())


def main() -> None:
    """Run every arm with every seed and write the log; only the first seed keeps its frames."""
    torch.set_num_threads(1)
    print(f"{len(ARMS)} arms x {len(SEEDS)} seeds x {STEPS} steps: about 25 minutes on one core")
    start, text, runs = time.perf_counter(), read_text(), []
    for arm, seed in tqdm([(arm, seed) for arm in ARMS for seed in SEEDS], unit=" runs"):
        runs.append(run(arm, seed, text))
        if seed != SEEDS[0]:
            del runs[-1]["frames"]
    path = log.write("balance", {"runs": runs}, seconds=time.perf_counter() - start,
                     command="python -m minids.learn.experiments.balance")  # fmt: skip
    print(path)


if __name__ == "__main__":
    main()
