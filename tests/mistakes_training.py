"""Wrong on purpose: predictors, losses and bias updates, each with a mistake that someone made.

Paper   DeepSeek-V3 (arXiv:2412.19437); test_mistakes.py has the property that exposes each of them.
Dims    as in the module that each mistake replaces.
"""

import torch

from minids.balance import auxiliary_loss, expert_load, update_bias
from minids.mtp import MTP

# multi-token prediction


def shift_to_target(tokens, depth):
    """Feeds the word that is to be predicted."""
    return tokens[:, depth + 1 :], tokens[:, depth + 1 :]


class WithoutEmbeddings(MTP):
    def forward(self, hidden, embedding, phase, mask, cache=None, stats=False):
        return super().forward(hidden, hidden, phase, mask, cache, stats)


class WithoutBlock(MTP):
    def forward(self, hidden, embedding, phase, mask, cache=None, stats=False):
        merged = torch.cat([self.embedding_norm(embedding), self.hidden_norm(hidden)], dim=-1)
        return self.norm(self.w_merge(merged)), None


class WithoutCausality(MTP):
    def forward(self, hidden, embedding, phase, mask, cache=None, stats=False):
        return super().forward(hidden, embedding, phase, None, cache, stats)


class HiddenFirst(MTP):
    """Concatenates as the report prints it."""

    def forward(self, hidden, embedding, phase, mask, cache=None, stats=False):
        merged = torch.cat([self.hidden_norm(hidden), self.embedding_norm(embedding)], dim=-1)
        out, routed = self.block(self.w_merge(merged), phase, mask, cache, stats)
        return self.norm(out), routed


# balance; a step is step(model, tokens, micro_batches, recompute), a counter counter(model, tokens)


def step_by_micro_batch(model, tokens, micro_batches, recompute):
    for rows in tokens.chunk(micro_batches):
        losses = model.losses(rows, recompute=recompute)
        losses.total(0.3).backward()
        for router, load in zip(model.routers, losses.load, strict=True):
            update_bias(router.bias, load, 0.01)


def step_in_forward(model, tokens, micro_batches, recompute, in_evaluation=True):
    """Updates wherever a router runs: once a micro-batch, again in recomputation and evaluation."""

    def update(router, _inputs, output):
        if router.training or in_evaluation:
            update_bias(router.bias, expert_load(output[1], len(router.bias)), 0.01)

    for router in model.routers:
        router.register_forward_hook(update)
    for rows in tokens.chunk(micro_batches):
        model.losses(rows, recompute=recompute).total(0.3).backward()


def step_in_training_forward(model, tokens, micro_batches, recompute):
    step_in_forward(model, tokens, micro_batches, recompute, in_evaluation=False)


def step_with_recomputation(model, tokens, micro_batches, recompute):
    """Sums the batch before it updates, but once more for a pass that is run again."""
    losses = [model.losses(rows) for rows in tokens.chunk(micro_batches)]
    for _ in range(1 + recompute):
        load = torch.stack([part.load for part in losses]).sum(0)
        for router, counts in zip(model.routers, load, strict=True):
            update_bias(router.bias, counts, 0.01)


def load_counted_in_forward(model, tokens):
    """Counts by hook, so that a layer that runs again in backward counts again."""
    seen = [torch.zeros(model.cfg.n_routed_experts, dtype=torch.int64) for _ in model.routers]
    for count, router in zip(seen, model.routers, strict=True):

        def add(router, _inputs, output, count=count):
            count += expert_load(output[1], len(router.bias))

        router.register_forward_hook(add)
    model.losses(tokens, recompute=True).total(0.3).backward()
    return torch.stack(seen)


def product_of_batch_means(score, n_activated):
    return auxiliary_loss(score, score.topk(n_activated).indices)


def sequence_loss_of_raw_affinities(score, n_activated):
    """Takes the mean of s for P, not of s / sum(s)."""
    chosen = torch.zeros_like(score).scatter(-1, score.topk(n_activated).indices, 1.0)
    f = chosen.mean(1) * score.shape[-1] / n_activated
    return (f * score.mean(1)).sum(-1).mean()


def auxiliary_loss_without_top_k(score, ids):
    return auxiliary_loss(score, ids) * ids.shape[-1]


def total_without_balance(losses, mtp_weight):
    return losses.main + mtp_weight * losses.mtp.mean()
