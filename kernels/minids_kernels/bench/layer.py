"""Verb `layer`: one layer of V3 at full size, or all of V2-Lite, on one card.

V3       an MoE layer in FP8 as it is published (11.5 GB): a prompt of 4,096 tokens, one more token
         for each of 128 rows that hold 4,096; then forward and backward in FP8, with all weights
         and their gradients in BF16, where memory allows. What 61 such layers would take is beside
         it; three of V3's are smaller.
V2-Lite  the whole model in BF16, from words to logits: the same prompt, the same batch.

Each part is compared with torch on the input that it had (pieces.py, gradients.py). The floor is
the sum of what products, attention and norms need at least, one after the other (layer_work.py).
Weights and states are random; so routing is nearly even, and nearly all experts are active.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minids import preset
from minids.attention import Causal
from minids.cache import Cache
from minids.config import Config
from minids.rope import frequencies, phases
from minids.serve.pages import SIZE
from minids_kernels.bench import gradients
from minids_kernels.bench.case import OURS, Call, Case, Prepare, Verdict
from minids_kernels.bench.layer_parts import Stack, stored_layer, trained_layer, whole_model
from minids_kernels.bench.layer_work import backward_work, layer_work
from minids_kernels.bench.pieces import blocks_are_right, by_torch

JOB = "layer"
MODELS = ("v3", "v2_lite")
PROMPT, BATCH, HELD = 4096, 128, 4096
TORCH, LAUNCHED = "torch", "without a graph"

Build = Callable[[str], Stack]  # on a device


class Shelf:
    """Holds one model at a time: the next one takes its memory."""

    def __init__(self):
        self._name, self._stack = "", None

    def get(self, name: str, build: Build, device: str) -> Stack:
        """Return the model of this name; it is built now if another one was here."""
        if self._stack is None or self._name != name:
            self._stack = None
            torch.cuda.empty_cache()
            self._name, self._stack = name, build(device)
        return self._stack


class Prompt:
    """A prompt through all layers, into an empty cache."""

    def __init__(self, stack: Build, x: Tensor):
        self.stack, self.x = stack(str(x.device)), x
        cfg, (rows, tokens) = self.stack.cfg, x.shape[:2]
        at = torch.arange(tokens, device=x.device)[None]
        self.phase = phases(at, frequencies(cfg).to(x.device))
        self.sees = Causal(torch.zeros(rows, dtype=torch.int64, device=x.device))
        like = torch.empty(0, dtype=torch.bfloat16, device=x.device)
        self.cache = Cache(len(self.stack.blocks), rows, tokens, cfg.cache_dim, like, SIZE)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Return the states behind the layers, or the last word's logits."""
        x = self.stack.enter(self.x)
        for index, block in enumerate(self.stack.blocks):
            x, _ = block(x, self.phase, self.sees, self.cache.layer(index))
        return self.stack.leave(x)


class Step(Prompt):
    """One more token of each row, behind random latents.

    Nothing comes from the host, and each call writes where the one before did.
    """

    def __init__(self, held: int, stack: Build, x: Tensor):
        self.stack, self.x = stack(str(x.device)), x
        cfg = self.stack.cfg
        like = torch.empty(0, dtype=torch.bfloat16, device=x.device)
        self.cache = Cache(len(self.stack.blocks), len(x), held + 1, cfg.cache_dim, like, SIZE)
        self.cache.reserve(held)
        generator = torch.Generator(x.device).manual_seed(0)  # the same for all who compute
        self.cache.store.normal_(generator=generator)
        self.cache.advance(held)
        self.cache.reserve(1)
        start = self.cache.positions(1)
        self.phase, self.sees = phases(start, frequencies(cfg).to(x.device)), Causal(start[:, 0])


class Training:
    """Forward and backward of one layer; its weights have their gradients after a call."""

    def __init__(self, stack: Build, x: Tensor, dy: Tensor):
        self.stack, self.dy = stack(str(x.device)), dy
        self.x = x.detach().requires_grad_()
        at = torch.arange(x.shape[1], device=x.device)[None]
        self.phase = phases(at, frequencies(self.stack.cfg).to(x.device))
        self.sees = Causal(torch.zeros(len(x), dtype=torch.int64, device=x.device))

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Return the layer's output and the gradient of its input."""
        (block,) = self.stack.blocks
        self.x.grad = None
        block.zero_grad()  # the memory of gradients is taken anew
        y, _ = block(self.x, self.phase, self.sees)
        y.backward(self.dy)
        assert self.x.grad is not None, "it was asked for"
        return y.detach(), self.x.grad


def graphed(prepare: Prepare, *inputs: Any) -> Call:
    """Return a call that replays what one call launches, as a server does."""
    call = prepare(*inputs)
    if not torch.cuda.is_available():
        return call
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles, takes pages
        call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()

    def replay() -> Any:
        graph.replay()
        return y

    return replay


def cases(
    models: tuple[str, ...] = MODELS,
    configs: dict[str, Config] | None = None,
    prompt: int = PROMPT,
    rows: int = BATCH,
    held: int = HELD,
) -> Iterator[Case]:
    """Yield what is asked of each model."""
    shelf = Shelf()
    for name in models:
        cfg = (configs or {}).get(name) or preset(name)
        if name == "v3":
            build = partial(stored_layer, cfg)
            yield from serving(shelf, "V3 layer", cfg, build, prompt, rows, held, cfg.n_layers)
            yield training(shelf, replace(cfg, precision="fp8"), prompt)
        else:
            build = partial(whole_model, cfg)
            yield from serving(shelf, "V2-Lite", cfg, build, prompt, rows, held)


def serving(
    shelf: Shelf, name: str, cfg: Config, build: Build, prompt: int, rows: int, held: int,
    layers: int = 0,
) -> Iterator[Case]:  # fmt: skip
    """Yield a prompt and a batch's next tokens, of one layer of `layers`, or of a whole model."""
    stack = partial(shelf.get, name, build)
    ours = partial(Prompt, stack)
    whole = not layers
    inputs = partial(drawn_inputs, None if whole else cfg.dim, 1, prompt)
    yield Case(
        JOB, f"{name}, prompt of {prompt}", layer_work(cfg, prompt, 0, whole), inputs,
        {OURS: ours, TORCH: partial(by_torch, ours)}, partial(is_right, ours),
        tokens=prompt, layers=layers,
    )  # fmt: skip
    ours = partial(Step, held, stack)
    inputs = partial(drawn_inputs, None if whole else cfg.dim, rows, 1)
    yield Case(
        JOB, f"{name}, {rows} rows at {held}", layer_work(cfg, rows, held, whole), inputs,
        {OURS: partial(graphed, ours), LAUNCHED: ours, TORCH: partial(by_torch, ours)},
        partial(is_right, ours), tokens=rows, layers=layers,
    )  # fmt: skip


def training(shelf: Shelf, cfg: Config, prompt: int) -> Case:
    """Return a layer's part of a training step in FP8."""
    stack = partial(shelf.get, "trained", partial(trained_layer, cfg))
    ours = partial(Training, stack)
    return Case(
        JOB, f"V3 layer, forward and backward of {prompt}", backward_work(cfg, prompt),
        partial(states_and_gradients, cfg.dim, prompt), {OURS: ours},
        partial(gradients.are_right, ours), tokens=prompt, layers=cfg.n_layers,
    )  # fmt: skip


def drawn_inputs(width: int | None, rows: int, tokens: int, device: str) -> tuple[Tensor]:
    """Draw states of this width, or words."""
    if width is None:
        return (torch.randint(32, (rows, tokens), device=device),)
    return (torch.randn(rows, tokens, width, device=device).bfloat16(),)


def states_and_gradients(width: int, tokens: int, device: str) -> tuple[Tensor, Tensor]:
    """Draw states before a layer, and the gradient behind it."""
    x, dy = torch.randn(2, 1, tokens, width, device=device).bfloat16().unbind()
    return x, dy


def is_right(prepare: Callable[..., Prompt], result: Tensor, x: Tensor) -> Verdict:
    """Compare every part of every layer."""
    run = prepare(x)
    return blocks_are_right(run, run.stack.blocks, result)
