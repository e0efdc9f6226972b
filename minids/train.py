"""Training: gradients of a batch, one optimiser step, one move of the router biases, one log line.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 4.2; bias rule 2.1.2; loss Eq. 25; moments 3.3.3.
Dims    B sequences of a batch, T targets of each (T1 = T + 1 tokens), E routed experts.
Book    book/14_train.ipynb             Kernel  none
Differs the report does not say which weights decay: here every matrix (embedding, head and router
        centroids too), no norm gain. The router bias is moved by its own rule alone.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from minids import checkpoint
from minids.balance import max_vio, update_bias
from minids.config import Config
from minids.data import Packed
from minids.evaluate import check_tokenizer
from minids.files.hf import to_hf
from minids.files.resume import Position, append_line, load_state, save_state
from minids.impl import kernels
from minids.loss import count_targets
from minids.model import Transformer
from minids.schedule import Rates, Schedule

_CLIP = 1.0  # of the gradient's norm


class Run(NamedTuple):
    """A finished run: its model, one dict a step, and the folder it was written to."""

    model: Transformer
    log: list[dict[str, Any]]
    folder: Path | None


def make_optimizer(model: Transformer) -> AdamW:
    """Return AdamW as in section 4.2: betas 0.9 and 0.95, weight decay 0.1 of matrices.

    Where the model trains in FP8 its moments wait in BF16, and weights stay FP32 (section 3.3.3).
    """
    decay = [weight for weight in model.parameters() if weight.ndim > 1]
    keep = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [dict(params=decay, weight_decay=0.1), dict(params=keep, weight_decay=0.0)]
    if model.impl == "triton":
        moments = torch.bfloat16 if model.cfg.precision == "fp8" else torch.float32
        return kernels().AdamW(groups, lr=0.0, betas=(0.9, 0.95), moments=moments)
    optimizer = AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    if model.cfg.precision == "fp8":
        optimizer.register_step_pre_hook(lambda self, *_: _cast_moments(self, torch.float32))
        optimizer.register_step_post_hook(lambda self, *_: _cast_moments(self, torch.bfloat16))
    return optimizer


def _cast_moments(optimizer: Optimizer, dtype: torch.dtype) -> None:
    for state in optimizer.state.values():
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = state[moment].to(dtype)


def take_step(
    model: Transformer,
    optimizer: Optimizer,
    tokens: Int[Tensor, "B T1"],
    documents: Int[Tensor, "B T1"],
    rates: Rates,
    *,
    micro_batches: int = 1,
    recompute: bool = False,
) -> dict[str, Any]:
    """Do one optimiser step, then move the router biases once; return what the log says of it.

    Losses are in nats a target of the whole batch, whatever `micro_batches` it is cut into.
    Raises FloatingPointError, weights and biases untouched, for a loss or gradient not finite.
    """
    n_targets, half = count_targets(tokens, documents), model.cfg.precision != "fp32"
    sums, load = torch.zeros(2 + model.cfg.mtp_depth), torch.zeros((), dtype=torch.int64)
    cuts = (tokens.chunk(micro_batches), documents.chunk(micro_batches))
    for rows, marks in zip(*cuts, strict=True):
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=half and tokens.is_cuda):
            losses = model.losses(rows, mask=marks, n_targets=n_targets, recompute=recompute)
        losses = losses._replace(balance=losses.balance / micro_batches)  # a mean over sequences
        losses.total(rates.mtp_weight).backward()
        parts = torch.stack([losses.main, losses.balance, *losses.mtp])
        sums, load = sums + parts.detach().cpu(), load + losses.load.cpu()
    grad_norm = clip_grad_norm_(model.parameters(), _CLIP).item()
    main, balance, *mtp = sums.tolist()
    if not all(map(math.isfinite, [main, balance, *mtp, grad_norm])):
        optimizer.zero_grad()
        raise FloatingPointError(
            f"not finite: loss {main}, MTP {mtp}, balance {balance}, gradient norm {grad_norm}"
        )
    for group in optimizer.param_groups:
        group["lr"] = rates.lr
    optimizer.step()
    optimizer.zero_grad()
    for router, counts in zip(model.routers, load, strict=True):
        if router.bias is not None:
            update_bias(router.bias, counts.to(router.bias.device), rates.bias_speed)
    seen = dict(loss=main, mtp=mtp, balance=balance, grad_norm=grad_norm)
    return seen | dict(max_vio=max_vio(load).tolist()) | rates._asdict()


def train(
    model: Transformer,
    data: Packed,
    schedule: Schedule,
    *,
    micro_batches: int = 1,
    folder: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    device: str = "cpu",
    save_every: int = 100,
    recompute: bool = False,
    progress: bool = True,
) -> Run:
    """Train on the stream of rows until `schedule.tokens` tokens are done.

    With `folder`: a line a step in log.jsonl, the training state every `save_every` steps in
    state/, and at the end the model with its tokenizer in model/. The same call with a folder that
    holds a run, finished or killed, goes on from its newest state to the same numbers.
    Raises ValueError for arguments that do not fit, before any work; FloatingPointError for a loss
    that is not finite, with its step and seed.
    """
    folder = None if folder is None else Path(folder)
    check_run(model.cfg, schedule, data.seq_len, micro_batches, folder, device, save_every)
    if tokenizer is not None:
        check_tokenizer(tokenizer, model.cfg)
    about = dict(config=asdict(model.cfg), schedule=asdict(schedule), micro_batches=micro_batches,
                 seq_len=data.seq_len, data_seed=data.seed, data_tokens=data.n_tokens,
                 first_row=data.rows(0, 1)[0].tolist())  # fmt: skip
    model = model.to(device).train()
    optimizer, start, log = make_optimizer(model), Position(), []
    if folder:
        start, log = load_state(folder, model, optimizer, about)
        if not log:
            save_state(folder, model, optimizer, start, about)
    bar = tqdm(initial=start.tokens, total=schedule.tokens, unit=" tokens", unit_scale=True,
               disable=not progress)  # fmt: skip
    for at, line in _steps(model, optimizer, data, schedule, start, micro_batches, recompute):
        log.append(line)
        bar.set_postfix(loss=f"{line['loss']:.3f}", MaxVio=f"{max(line['max_vio'], default=0):.2f}")
        bar.update(at.tokens - bar.n)
        if folder:
            append_line(folder, line)
            if at.step % save_every == 0 or at.tokens >= schedule.tokens:
                save_state(folder, model, optimizer, at, about)
    bar.close()
    if folder:
        checkpoint.save(model, folder / "model", tokenizer=tokenizer)
    return Run(model, log, folder)


def check_run(
    cfg: Config, schedule: Schedule, seq_len, micro_batches, folder, device, save_every
) -> None:
    """Raise ValueError for what would else show hours later, or in words from deep inside."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} needs a GPU that torch can use; this machine has none")
    if not 1 + cfg.mtp_depth <= seq_len <= cfg.max_seq_len:
        limits = f"{1 + cfg.mtp_depth}..{cfg.max_seq_len}"
        raise ValueError(f"seq_len must lie in {limits} for this config, got {seq_len}")
    if micro_batches < 1 or schedule.first_batch % micro_batches:
        raise ValueError(
            f"micro_batches must divide the batch of {schedule.first_batch}, got {micro_batches}"
        )
    if save_every < 1:
        raise ValueError(f"save_every must be at least 1, got {save_every}")
    if folder:
        to_hf(cfg)  # the model is saved at the end: refuse now what no published config can say
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: name a folder")


def _steps(
    model: Transformer, optimizer, data: Packed, schedule: Schedule, at, micro_batches, recompute
) -> Iterator[tuple[Position, dict[str, Any]]]:
    """Take one optimiser step after another; yield where the run then is and what to log."""
    while at.tokens < schedule.tokens:
        start, batch = time.perf_counter(), schedule.batch_at(at.tokens)
        tokens, documents = (part.to(model.embed.device) for part in data.shuffled(at.rows, batch))
        rates = schedule.rates(model.cfg, at.step, at.tokens)
        try:
            line = take_step(model, optimizer, tokens, documents, rates,
                             micro_batches=micro_batches, recompute=recompute)  # fmt: skip
        except FloatingPointError as error:
            raise FloatingPointError(
                f"step {at.step + 1}, seed {data.seed}, rows {at.rows} to {at.rows + batch - 1}: "
                f"{error}. Weights and saved states are as before. Try a lower peak_lr, a longer "
                "warm-up or precision 'fp32', and look at these rows."
            ) from None
        at = Position(at.step + 1, at.rows + batch, at.tokens + batch * data.seq_len)
        speed = batch * data.seq_len / (time.perf_counter() - start)
        yield at, at._asdict() | line | dict(tokens_per_s=round(speed, 1))
