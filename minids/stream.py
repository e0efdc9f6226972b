"""A checkpoint far larger than memory: its files are run one layer, one matrix at a time.

Paper   none; the layout of the release, the model of DeepSeek-V3 (arXiv:2412.19437), Eqs. 1-16.
Dims    B batch, T tokens, D width, `vocab` words.
Book    book/11_fp8.ipynb               Kernel  none
Differs from the model in memory: no MTP modules. Else the same bits: the same blocks do the same
        products, on weights that are read and dequantised where they are used.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minids.block import Block
from minids.cache import Cache
from minids.checks.inputs import check_ids
from minids.files.mapped import Mapped
from minids.files.on_disk import ExpertsOnDisk, OnDisk
from minids.files.opened import check_device, dtype_of, open_checkpoint
from minids.files.shards import FP8, layer_tensor
from minids.generate import Sampler
from minids.linear import Linear
from minids.moe import Experts
from minids.norm import RMSNorm, at_least_fp32
from minids.rope import frequencies

_EMBED, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_HEAD_ROWS = 8192  # of the head are multiplied at a time: 117 MB at V3's width


@dataclass
class Run:
    """How far a text is: all that going on from here needs."""

    tokens: list[int]  # prompt, then new words
    cache: Cache  # of one row; it holds all tokens but those in work
    generator: torch.Generator
    layer: int = 0  # the next one that the tokens in work go through
    x: Tensor | None = None  # their state before it


class Streamed:
    """A model whose weights stay in their files; called like a Transformer it gives its logits.

    `dtype` None is the stored one, of FP8 BF16, as in `load`; config and headers are checked as
    there, values where they are used.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
    ):
        wanted = None if dtype is None else dtype_of(dtype, "fp32", "bf16")
        check_device(device)
        with ExitStack() as stack:
            self.model, found, stored = open_checkpoint(folder, stack)
            wanted = wanted or (torch.bfloat16 if stored == FP8 else stored)
            self.files = Mapped({path for path, _ in found.values()}, device, wanted)
        self.cfg, self.device = self.model.cfg, self.files.device
        # the model says where positions and cache are and of which dtype, and holds no weight
        like = torch.empty(0, self.cfg.dim, device=device, dtype=wanted)
        self.model.embed = nn.Parameter(like, requires_grad=False)
        self.model.freq = nn.Buffer(frequencies(self.cfg).to(device), persistent=False)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return self.model.new_cache(batch, capacity)

    @torch.no_grad()
    def __call__(
        self, ids: Int[Tensor, "B T"], cache: Cache | None = None
    ) -> Float[Tensor, "B T vocab"]:
        """Return each position's logits, in FP32; the cache, if given, then holds the ids."""
        check_ids(ids, self.cfg.vocab_size)
        cache = cache or self.new_cache(*ids.shape)
        logits = self.head(self.hidden(ids, Run([], cache, torch.Generator())))
        cache.advance(ids.shape[1])
        return logits

    @torch.no_grad()
    def next_word(
        self, run: Run, sampler: Sampler, tell: Callable[[int], None] = lambda layer: None
    ) -> int:
        """Run the tokens that the cache lacks through all layers, and append the word behind them.

        `tell` hears of each layer that is done. Whatever stops it, the run can go on from there.
        """
        ids = torch.tensor([run.tokens[run.cache.lengths[0] :]])
        hidden = self.hidden(ids, run, tell)
        word = int(sampler.draw(sampler.distribution(self.head(hidden[:, -1]).float())))
        run.cache.advance(ids.shape[1])
        run.layer, run.x = 0, None
        run.tokens.append(word)
        return word

    def hidden(
        self,
        ids: Int[Tensor, "B T"],
        run: Run,
        tell: Callable[[int], None] = lambda layer: None,
    ) -> Float[Tensor, "B T D"]:
        """Return the state after the final norm, from the layer on where the run stands."""
        phase, visible = self.model.positions(*ids.shape, cache=run.cache)
        if run.x is None:
            table = {i: self.files.rows(_EMBED, i, i + 1) for i in {*ids.flatten().tolist()}}
            run.x = torch.stack([torch.cat([table[i] for i in row]) for row in ids.tolist()])
        for layer in range(run.layer, self.cfg.n_layers):
            if layer + 1 < self.cfg.n_layers:  # the disk reads while this layer is computed
                self.files.prefetch(self.surely_read(layer + 1))
            x, _ = self.block(layer)(run.x, phase, visible, run.cache.layer(layer))
            if not x.isfinite().all():
                raise ValueError(f"layer {layer} gives no finite output: a weight of it is damaged")
            run.layer, run.x = layer + 1, x
            tell(layer)
        norm = RMSNorm(self.cfg.dim, self.cfg.norm_eps)
        norm.gain = nn.Parameter(self.files.weight(_NORM), requires_grad=False)
        return norm(run.x)

    def head(self, x: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape vocab"]:
        """Return logits; the head is read in slices."""
        starts = range(0, self.cfg.vocab_size, _HEAD_ROWS)
        read = partial(self.files.rows, _HEAD)
        parts = [F.linear(x, read(start, start + _HEAD_ROWS)) for start in starts]
        return at_least_fp32(torch.cat(parts, dim=-1))

    def surely_read(self, layer: int) -> list[str]:
        """Return the published names of all that a layer reads whichever experts it chooses."""
        with torch.device("meta"):
            names = Block(self.cfg, layer).state_dict()
        return [layer_tensor(layer, name) for name in names if ".experts." not in name]

    def block(self, layer: int) -> Block:
        """Return a layer that holds its norms and its router; the rest it reads from its files."""
        with torch.device("meta"):
            block = Block(self.cfg, layer)
        for name, part in [*block.named_modules()]:
            if isinstance(part, Linear):
                weight = layer_tensor(layer, f"{name}.weight")
                block.set_submodule(name, OnDisk(partial(self.files.weight, weight)))
            elif isinstance(part, Experts):
                experts = ExpertsOnDisk(self.files, layer, self.cfg.n_routed_experts)
                block.set_submodule(name, experts)
        values = {name: self.files.weight(layer_tensor(layer, name)) for name in block.state_dict()}
        block.load_state_dict(values, assign=True)
        return block.eval()
