"""Who else computes latent attention, as sides of a case: what is laid out once is not timed.

A backend of torch that refuses a shape raises RuntimeError with torch's reasons.
"""

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from torch._functorch import config as autograd_config
from torch.autograd import set_multithreading_enabled
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from minids import mla
from minids.attention import Causal
from minids.serve.pages import Pages
from minids_kernels.bench.attention import Forward, Gradients, Prompt, Queries, causal, expanded
from minids_kernels.bench.case import Call
from minids_kernels.bench.shapes import Attention

SDPA = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
MATH = "SDPA math"  # stores all scores: for the smaller prompts alone
FLEX, EAGER, COMPILED = "FlexAttention", "torch absorbed", "torch absorbed, compiled"
FLASHINFER = "flashinfer"
_WORKSPACE_BYTES = 128 * 2**20  # as flashinfer's documentation recommends

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # of queries, keys, values [B, H, T, width]
Make = Callable[[float, Prompt], Attend]  # of a scale and what is seen


# Ways to attend


def sdpa(backend: SDPBackend, scale: float, of: Prompt) -> Attend:
    """One backend of torch's own attention; documents become a matrix."""
    mask = None
    if of.documents is not None:
        mask = Causal(*causal(of)).mask(of.q.shape[1], of.q.shape[1])[:, None]
    return partial(_by_backend, backend, mask=mask, is_causal=mask is None, scale=scale)


def flex(scale: float, of: Prompt) -> Attend:
    """FlexAttention, which skips blocks that nobody sees."""
    documents, tokens = of.documents, of.q.shape[1]

    def in_document(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert documents is not None, "texts on their own need no numbers"
        return (key <= query) & (documents[0, key] == documents[0, query])

    seen = _before if documents is None else in_document
    blocks = create_block_mask(seen, None, None, tokens, tokens, device=str(of.q.device))
    return partial(_compiled_flex(), block_mask=blocks, scale=scale)


def _before(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def _compiled_flex() -> Callable[..., Tensor]:
    """Compile whole or fail: what is not compiled would store all scores."""
    run: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return run


def _by_backend(
    backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float,
    is_causal: bool = False,
) -> Tensor:  # fmt: skip
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale)


# A prompt


def prefill(make: Make, sizes: Attention, of: Prompt) -> Call:
    """The output by one of these ways."""
    attend, parts = make(sizes.scale, of), _laid_out(sizes, of)
    return _or_reasons(lambda: rearrange(attend(*parts), "b h t v -> b t h v"))


def backward(make: Make, sizes: Attention, of: Prompt, given: Forward) -> Call:
    """The gradients alone; those of rotary keys stay apart, a head each."""
    leaves = [x.requires_grad_() for x in _laid_out(sizes, of)]
    do = rearrange(given.do, "b t h v -> b h t v")
    with _run_again():
        o = _or_reasons(partial(make(sizes.scale, of), *leaves))()

    def run() -> Gradients:
        with _run_again():
            dq, dk, dv = torch.autograd.grad(o, leaves, do, retain_graph=True)
        dq, dk, dv = (rearrange(x, "b h t d -> b t h d") for x in (dq, dk, dv))
        at = sizes.nope
        return Gradients(dq[..., :at], dq[..., at:], dk[..., :at], dk[..., at:], dv)

    return run


@contextmanager
def _run_again() -> Iterator[None]:
    """Let a compiled backward run more than once: it may not write over what it is given.

    torch looks for this setting in the thread that runs it; so that is this one.
    """
    with autograd_config.patch(donated_buffer=False), set_multithreading_enabled(False):
        yield


def flashinfer_prefill(sizes: Attention, of: Prompt) -> Call:
    """flashinfer's attention over texts behind each other."""
    package = importlib.import_module("flashinfer.prefill")
    wrapper = package.BatchPrefillWithRaggedKVCacheWrapper(_workspace(of.q.device), "NHD")
    ends = torch.tensor([0, of.q.shape[1]])
    if of.documents is not None:
        ends = F.pad(of.documents[0].bincount().cumsum(0), (1, 0))
    ends = ends.int().to(of.q.device)
    q, k, v = (rearrange(x, "1 h t d -> t h d").contiguous() for x in _laid_out(sizes, of))
    wrapper.plan(ends, ends, sizes.heads, sizes.heads, sizes.nope + sizes.rope,
                 head_dim_vo=sizes.value, causal=True, sm_scale=sizes.scale,
                 q_data_type=q.dtype)  # fmt: skip
    return lambda: wrapper.run(q, k, v)[None]


def _laid_out(sizes: Attention, of: Prompt) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys with the rotary key once a head, and values, as they lie in memory."""
    parts = expanded(sizes, of)
    k_rope = repeat(parts.k_rope, "b t r -> b t h r", h=sizes.heads)
    k = torch.cat([parts.k_nope, k_rope], dim=-1)
    q, k, v = (rearrange(x, "b t h d -> b h t d") for x in (of.q, k, parts.v))
    return q.detach(), k, v.detach()


# A batch of latents


def decode(backend: SDPBackend, sizes: Attention, of: Queries, pages: Pages) -> Call:
    """One backend of torch's own attention; the queries of all heads are rows of one product."""
    mask = _seen(of, pages)
    if mask is not None:
        mask = repeat(mask, "b t s -> b 1 (t h) s", h=sizes.heads)
    attend = partial(_by_backend, backend, mask=mask, scale=sizes.scale)
    return _as_one_head(attend, sizes, of, pages)


def flex_decode(sizes: Attention, of: Queries, pages: Pages) -> Call:
    """FlexAttention, likewise, where every query sees every latent."""
    if _seen(of, pages) is not None:
        raise ValueError("FlexAttention is timed where rows are equally long, with one query each")
    return _as_one_head(partial(_compiled_flex(), scale=sizes.scale), sizes, of, pages)


def absorbed(sizes: Attention, of: Queries, pages: Pages) -> Call:
    """The torch path of minids, over latents side by side."""
    return partial(mla.attend_latent, *of, _held(pages), _seen(of, pages), sizes.scale)


def absorbed_compiled(sizes: Attention, of: Queries, pages: Pages) -> Call:
    """The same, compiled."""
    run = torch.compile(mla.attend_latent, dynamic=False)
    return partial(run, *of, _held(pages), _seen(of, pages), sizes.scale)


def flashinfer_decode(sizes: Attention, of: Queries, pages: Pages) -> Call:
    """flashinfer's attention to latents in pages."""
    package = importlib.import_module("flashinfer.mla")
    wrapper = package.BatchMLAPagedAttentionWrapper(_workspace(of.latent.device))
    batch, queries, size = *of.latent.shape[:2], pages.store.shape[1]
    used = -(-pages.lengths // size)
    held = torch.arange(pages.table.shape[1], device=used.device) < used[:, None]
    of_queries = queries * torch.arange(batch + 1, device=used.device).int()
    of_pages = F.pad(used.cumsum(0), (1, 0)).int()
    dtype = of.latent.dtype
    wrapper.plan(of_queries, of_pages, pages.table[held].int(), pages.lengths.int(), sizes.heads,
                 sizes.latent, sizes.rope, size, queries > 1, sizes.scale,
                 dtype, dtype)  # fmt: skip
    parts = [x.flatten(0, 1) for x in of]
    parts += pages.store.split([sizes.latent, sizes.rope], dim=-1)
    return lambda: wrapper.run(*parts).unflatten(0, (batch, queries))


def _as_one_head(attend: Attend, sizes: Attention, of: Queries, pages: Pages) -> Call:
    q = rearrange(torch.cat(of, dim=-1), "b t h c -> b 1 (t h) c")
    k = rearrange(_held(pages), "b s c -> b 1 s c")
    v = k[..., : sizes.latent]

    def run() -> Tensor:
        return rearrange(attend(q, k, v), "b 1 (t h) c -> b t h c", h=sizes.heads)

    return _or_reasons(run)


def _held(pages: Pages) -> Tensor:
    """Return [B, S, latent + rope], the rows side by side up to the longest one's end."""
    return pages.latent()[:, : int(pages.lengths.max())]


def _seen(of: Queries, pages: Pages) -> Tensor | None:
    """Return [B, T, S], which slots are seen; None where every query sees every slot."""
    seen = pages.mask(of.latent.shape[1])[..., : int(pages.lengths.max())]
    return None if bool(seen.all()) else seen


# What torch says, what flashinfer wants


def _or_reasons(call: Call) -> Call:
    """Try a call and return it; where torch has no kernel for it, the error says why."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            texts = [str(each.message).partition(" (Triggered")[0] for each in said]
            if reasons := [x for x in texts if not x.endswith(("because:", "disabled."))]:
                raise RuntimeError(f"refused: {'; '.join(reasons)}") from error
            raise
    return call


@cache
def _workspace(device: torch.device) -> Tensor:
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
