"""FP8 training against FP32: the same model, seed and rows, products in eight bits or in 32.

    python -m minids.learn.experiments.fp8     (about an hour of one CPU thread)

Paper   DeepSeek-V3 (arXiv:2412.19437), section 3.3, Figure 10 (loss below 0.25 % apart on 16B and
        230B parameters), App. B.2 (gradients of activations grouped by blocks diverge).
Dims    a curve has the mean loss of EVERY steps, in nats a token.
Book    book/11_fp8.ipynb               Kernel  none
Differs FP32 is the yardstick, where the report has BF16: this runs on processors without BF16
        units. FP8 products are emulated, exact but for the order of sums. Models of 0.6 and 1.5
        million parameters and 0.3 million tokens stand where the report has a trillion.
"""

import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minids.config import preset
from minids.data import Packed, encode
from minids.fp8 import BLOCK
from minids.learn import log
from minids.learn.experiments.balance import SEQ_LEN, Text, read_text, schedule
from minids.learn.interval import interval
from minids.linear import Linear
from minids.model import Transformer
from minids.moe import Experts
from minids.train import train

STEPS = {"nano": 300, "micro": 150}
ARMS = ("fp32", "fp8", "fp8, gradients by blocks")
CONTROL = "fp32, weights a millionth larger"
SEEDS = (0, 1, 2)
EVERY, LAST = 10, 50  # steps of one point of a curve; of the loss that is compared
HELDOUT_ROWS = 64


def build(name: str, arm: str, seed: int) -> Transformer:
    """Return a preset's model that trains as `arm` says; weights depend on the seed alone.

    The control's are a millionth larger: what parts it from FP32 is no precision, it is chance.
    """
    model = Transformer(preset(name, precision=arm[:4].rstrip(",")), seed=seed)
    if arm == ARMS[2]:
        group_gradients_by_blocks(model)
    if arm == CONTROL:
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + 1e-6)
    return model


def group_gradients_by_blocks(model: Transformer) -> None:
    """Quantise what the input gradients read in blocks: 128 tokens share a scale (App. B.2)."""
    for module in model.modules():
        if isinstance(module, Linear) and module.recipe:
            module.recipe = module.recipe._replace(grad_group=BLOCK)
        if isinstance(module, Experts):
            recipes = (how._replace(grad_group=BLOCK) for how in module.recipes if how)
            module.recipes = next(recipes), next(recipes)


def heldout_rows(text: Text) -> Tensor:
    """Return rows of held-out tokens, the same for every run."""
    encoded = [encode(texts, text.tokenizer) for texts in text.heldout.values()]
    documents = [document.tokens for domain in encoded for document in domain]
    return Packed(documents, SEQ_LEN, seed=0).rows(0, HELDOUT_ROWS)[0]


def run(name: str, arm: str, seed: int, text: Text, steps: int) -> dict[str, Any]:
    """Train one model; return its curve, its last loss and its loss on held-out rows."""
    model = build(name, arm, seed)
    lines = train(model, Packed(text.documents, SEQ_LEN, seed), schedule(steps), progress=False).log
    loss = [line["loss"] for line in lines]
    with torch.no_grad():  # still in training mode: products are those of the arm
        heldout = model.losses(heldout_rows(text)).main.item()
    curve = [sum(loss[at : at + EVERY]) / EVERY for at in range(0, steps, EVERY)]
    return dict(model=name, arm=arm, seed=seed, steps=steps, curve=[round(x, 4) for x in curve],
                last=round(sum(loss[-LAST:]) / LAST, 5), heldout=round(heldout, 5))  # fmt: skip


def gap(results: dict[str, Any], name: str, arm: str, what: str = "last") -> tuple[float, float]:
    """Return how far an arm's loss lies above FP32's, relative, paired by seed: mean and 95 %."""
    runs = [*results["runs"], *results["control"]]
    loss = {(run["arm"], run["seed"]): run[what] for run in runs if run["model"] == name}
    return interval([loss[arm, seed] / loss["fp32", seed] - 1 for seed in SEEDS])


def main() -> None:
    """Run every model, arm and seed, write the log, print the gaps beside the report's."""
    torch.set_num_threads(1)
    print(f"{len(STEPS)} models x {len(ARMS) + 1} arms x {len(SEEDS)} seeds: an hour of a core")
    start, text, runs = time.perf_counter(), read_text(), []
    todo = [(name, arm, seed) for name in STEPS for seed in SEEDS for arm in (*ARMS, CONTROL)]
    for name, arm, seed in tqdm(todo, unit=" runs"):
        runs.append(run(name, arm, seed, text, STEPS[name]))
    results = {
        "runs": [run for run in runs if run["arm"] != CONTROL],
        "control": [run for run in runs if run["arm"] == CONTROL],
    }
    print(log.write("fp8", results, seconds=time.perf_counter() - start,
                    command="python -m minids.learn.experiments.fp8"))  # fmt: skip
    for name in STEPS:
        for arm in (*ARMS[1:], CONTROL):
            trained, heldout = gap(results, name, arm), gap(results, name, arm, "heldout")
            print(
                f"{name}, {arm}: loss {trained[0]:+.3%} +- {trained[1]:.3%}, held out "
                f"{heldout[0]:+.3%} +- {heldout[1]:.3%} of FP32's (report: below 0.25 %)"
            )


if __name__ == "__main__":
    main()
