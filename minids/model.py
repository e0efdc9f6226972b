"""The whole decoder: embedding, blocks, head, and the MTP modules behind them.

Paper   DeepSeek-V3 (arXiv:2412.19437), sections 2 and 4.2 (initialisation, norms), Figure 2.
Dims    B batch, T positions, D width, `vocab` words, E routed experts.
Book    book/02_model.ipynb             Kernel  none
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minids.attention import Causal, causal_mask
from minids.block import Block
from minids.cache import Cache
from minids.checks import inputs
from minids.config import Config
from minids.fused.loss import IGNORED
from minids.impl import use
from minids.linear import Linear
from minids.loss import count_targets, target_sum
from minids.moe import MoE, Routed
from minids.mtp import MTP, shift
from minids.norm import RMSNorm, at_least_fp32
from minids.rope import frequencies, phases
from minids.serve.pages import SIZE


class Losses(NamedTuple):
    """The parts of the training loss, in nats a target token; `load` has a row a MoE layer."""

    main: Float[Tensor, ""]
    mtp: Float[Tensor, " depth"]  # Eq. 24
    balance: Float[Tensor, ""]  # weighted by the config's alphas, summed over layers
    load: Int[Tensor, "layers E"]

    def total(self, mtp_weight: float) -> Float[Tensor, ""]:
        """Return what is minimised; `mtp_weight` is lambda of Eq. 25."""
        mtp = mtp_weight * self.mtp.mean() if len(self.mtp) else 0.0
        return self.main + mtp + self.balance


class Transformer(nn.Module):
    """DeepSeek-V3 of any size; `seed` fixes every weight, on the meta device none is drawn."""

    def __init__(self, cfg: Config, impl: str = "torch", seed: int = 0):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Parameter(torch.empty(cfg.vocab_size, cfg.dim))
        self.layers = nn.ModuleList(Block(cfg, index) for index in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.head = Linear(cfg.dim, cfg.vocab_size)
        depths = range(cfg.n_layers, cfg.n_layers + cfg.mtp_depth)
        self.mtp = nn.ModuleList(MTP(cfg, Block(cfg, index)) for index in depths)
        self.freq = nn.Buffer(frequencies(cfg), persistent=False)
        self.impl = "torch"
        use(self, impl)
        self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw every weight from N(0, init_std), section 4.2; norm gains stay 1, biases 0."""
        if self.embed.is_meta:
            return
        generator = torch.Generator(self.embed.device).manual_seed(seed)
        for name, weight in self.named_parameters():
            if not name.endswith("gain"):
                weight.normal_(0.0, self.cfg.init_std, generator=generator)

    def cast(self, dtype: torch.dtype) -> "Transformer":
        """Cast the weights in place; rotary frequencies and routing biases stay as exact as before.

        `.bfloat16()` and `.to(bfloat16)` would round both, so a model cast by them refuses to run.
        """
        for weight in self.parameters():
            weight.data = weight.data.to(dtype)
        return self

    @property
    def in_numbers(self) -> bool:
        """Whether kernels attend: to pages of a cache, and told in numbers what queries see."""
        return self.impl == "triton" and self.cfg.attn == "mla"

    @property
    def routers(self) -> list:
        """The routers in the order of `Losses.load`: MoE layers, then MTP modules."""
        blocks = [*self.layers, *(module.block for module in self.mtp)]
        return [block.ffn.router for block in blocks if isinstance(block.ffn, MoE)]

    def new_cache(self, batch: int, capacity: int, mtp: bool = False) -> Cache:
        """Return an empty cache for `capacity` tokens a row: of the main layers, or of MTP."""
        layers = self.cfg.mtp_depth if mtp else self.cfg.n_layers
        page = SIZE if self.in_numbers else None  # kernels read pages
        return Cache(layers, batch, capacity, self.cfg.cache_dim, self.embed, page)

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        *,
        mask: Int[Tensor, "B T"] | None = None,
        lengths: Sequence[int] | Int[Tensor, " B"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B T vocab"]:
        """Return the logits of each position's next token, in FP32.

        `mask` numbers the document of each token: no token looks into another document.
        `lengths` are the true lengths of rows padded on the right; logits past them mean nothing.
        With `cache` the ids continue each row; the cache then holds them too.
        Raises ValueError for ids outside the vocabulary (checked on CPU alone: elsewhere it would
        wait for the device), for a full cache, and for positions past `max_seq_len`.
        """
        return at_least_fp32(self.head(self.hidden(ids, mask=mask, lengths=lengths, cache=cache)))

    def hidden(
        self,
        ids: Int[Tensor, "B T"],
        *,
        mask: Int[Tensor, "B T"] | None = None,
        lengths: Sequence[int] | Int[Tensor, " B"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return the state after the final norm, for head and MTP; arguments as in forward."""
        inputs.check_ids(ids, self.cfg.vocab_size)
        lengths = inputs.check_lengths(ids, lengths)
        if cache is not None and mask is not None:
            raise ValueError("a document mask and a cache do not go together: give one of them")
        phase, visible = self.positions(*ids.shape, cache=cache, documents=mask)
        x = F.embedding(ids, self.embed)
        for index, block in enumerate(self.layers):
            x, _ = block(x, phase, visible, cache.layer(index) if cache else None)
        if cache is not None:
            cache.advance(ids.shape[1] if lengths is None else lengths)
        return self.norm(x)

    def positions(
        self,
        batch: int,
        new_tokens: int,
        *,
        cache: Cache | None = None,
        documents: Int[Tensor, "B T"] | None = None,
        offset: int = 0,
    ) -> tuple[Complex[Tensor, "#B T R_half"], Bool[Tensor, "#B T S"] | Causal | None]:
        """Return the rotations of the next tokens and which keys they see (None: all of them)."""
        device = self.embed.device
        if cache is None:
            at = torch.arange(new_tokens, device=device)
            start, end = rearrange(at, "t -> 1 t"), new_tokens
        else:
            inputs.check_rows(batch, cache.lengths)
            cache.reserve(new_tokens)
            start, end = cache.positions(new_tokens), max(cache.lengths) + new_tokens
        inputs.check_positions(end, self.cfg.max_seq_len, self.freq)
        phase = phases(start + offset, self.freq)
        if self.in_numbers:
            return phase, Causal(start[:, 0].expand(batch), documents)
        if new_tokens == 1 and (cache is None or len(set(cache.lengths)) == 1):
            return phase, None
        return phase, causal_mask(start, torch.arange(end, device=device), documents)

    def losses(
        self,
        tokens: Int[Tensor, "B T1"],
        *,
        mask: Int[Tensor, "B T1"] | None = None,
        n_targets: int | None = None,
        recompute: bool = False,
    ) -> Losses:
        """Return the losses of predicting tokens 1..T from 0..T-1, and T-k targets at MTP depth k.

        `mask` numbers documents: a target in another document than its position does not count.
        Every sum over targets is divided by `n_targets`, by default the main model's (Eq. 24's T).
        `recompute` saves memory by running blocks again in backward; nothing is counted twice.
        """
        inputs.check_ids(tokens, self.cfg.vocab_size)
        inputs.check_targets(tokens, self.cfg.mtp_depth)
        routed: list[Routed] = []

        def run(module, *given):
            call = partial(checkpoint, module, use_reentrant=False) if recompute else module
            y, stats = call(*given, None, True)
            routed.extend([stats] if stats else [])
            return y

        documents = None if mask is None else mask[:, :-1]
        phase, visible = self.positions(*tokens[:, 1:].shape, documents=documents)
        x = F.embedding(tokens[:, :-1], self.embed)
        for block in self.layers:
            x = run(block, x, phase, visible)
        hidden = self.norm(x)
        sums = [self._target_sum(hidden, tokens[:, 1:], mask, depth=0)]
        for depth, module in enumerate(self.mtp, start=1):
            ids, targets = shift(tokens, depth)
            documents = None if mask is None else mask[:, : ids.shape[1]]
            phase, visible = self.positions(*ids.shape, documents=documents, offset=depth)
            hidden = run(module, hidden[:, :-1], F.embedding(ids, self.embed), phase, visible)
            sums.append(self._target_sum(hidden, targets, mask, depth))
        count = count_targets(tokens, mask) if n_targets is None else n_targets
        main, *mtp = torch.stack(sums).div(count).unbind()
        load = [stats.load for stats in routed]
        balance = [stats.balance_loss for stats in routed]
        return Losses(
            main=main,
            mtp=torch.stack(mtp) if mtp else main.new_zeros(0),
            balance=torch.stack(balance).sum() if balance else main.new_zeros(()),
            load=torch.stack(load) if load else tokens.new_zeros(0, self.cfg.n_routed_experts),
        )

    def _target_sum(self, hidden, targets, mask, depth: int) -> Float[Tensor, ""]:
        """Sum -log p(target) in nats, over targets that lie in their position's document."""
        if mask is not None:
            same = mask[:, : targets.shape[1]] == mask[:, depth + 1 :]
            targets = targets.masked_fill(~same, IGNORED)
        return target_sum(hidden.flatten(0, 1), self.head.weight, targets.flatten(), self.impl)
