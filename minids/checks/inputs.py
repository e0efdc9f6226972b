"""What a model and `generate` refuse: ids that are no words, lengths and options out of range.

Paper   none: rules of what can be computed.
Dims    B batch, T positions.
Book    book/10_generate.ipynb          Kernel  none
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def check_ids(ids: Int[Tensor, "B T"], vocab_size: int) -> None:
    """Raise ValueError unless ids are int64 [B, T], not empty and (on CPU) known words."""
    if ids.ndim != 2 or ids.dtype != torch.int64 or not ids.numel():
        got = f"{ids.dtype} {list(ids.shape)}"
        raise ValueError(f"ids must be int64 [B, T] and not empty, got {got}")
    if ids.device.type == "cpu":
        least, most = ids.min().item(), ids.max().item()
        if least < 0 or most >= vocab_size:
            raise ValueError(f"ids must lie in 0..{vocab_size - 1}, got {least}..{most}")


def check_lengths(ids, lengths) -> list[int] | None:
    """Return the lengths of rows as plain numbers; ValueError unless each lies in its row."""
    if lengths is None:
        return None
    lengths = [int(length) for length in lengths]
    batch, padded = ids.shape
    if len(lengths) != batch or not all(1 <= length <= padded for length in lengths):
        raise ValueError(f"lengths must be {batch} numbers in 1..{padded}, got {lengths}")
    return lengths


def check_rows(batch: int, held: list[int]) -> None:
    """Raise ValueError unless the cache, which holds so many tokens a row, has the ids' rows."""
    if batch != len(held):
        raise ValueError(f"the cache has {len(held)} rows, ids have {batch}")


def check_positions(end: int, limit: int, freq: Float[Tensor, " R_half"]) -> None:
    """Raise ValueError for positions past the context, and for frequencies that were rounded."""
    if freq.dtype.itemsize < 4:
        raise ValueError(f"positions were rounded to {freq.dtype}: cast with model.cast()")
    if end > limit:
        raise ValueError(f"{end} positions are more than max_seq_len = {limit}")


def check_targets(tokens: Int[Tensor, "B T1"], mtp_depth: int) -> None:
    """Raise ValueError for rows too short to have a target at every depth."""
    if tokens.shape[1] < 2 + mtp_depth:
        got = f"{2 + mtp_depth} tokens a row, got {tokens.shape[1]}"
        raise ValueError(f"losses need at least {got}")


def check_options(model, prompt, new, temperature, top_p, stop_tokens, draft) -> None:
    """Raise ValueError for what generate refuses; `prompt` is the longest one's length."""
    limit, vocab = model.cfg.max_seq_len, model.cfg.vocab_size
    at_most = f"be at most {limit} (max_seq_len) - {prompt} (prompt) = {limit - prompt}"
    warm = temperature == 0 or 1e-6 <= temperature < math.inf  # colder logits overflow FP32
    known = all(0 <= token < vocab for token in stop_tokens)
    rules = [
        ("max_new_tokens", new, isinstance(new, int) and new >= 1, "be an integer >= 1"),
        ("max_new_tokens", new, prompt + new <= limit, at_most),
        ("temperature", temperature, warm, "be 0 (greedy) or in 1e-6..inf"),
        ("top_p", top_p, 0 < top_p <= 1, "be above 0 and at most 1"),
        ("stop_tokens", stop_tokens, known, f"lie in 0..{vocab - 1}"),
        ("draft", draft, draft in (None, "mtp"), "be None or 'mtp'"),
        ("draft", draft, not draft or len(model.mtp), "be None: the model has no MTP modules"),
    ]
    for name, value, holds, rule in rules:
        if not holds:
            raise ValueError(f"{name} must {rule}, got {value!r}")
