"""transformers as an independent DeepSeek: the one file that imports it.

What was found by trying 5.23.0, and is handled here:
- V3's class ignores softmax scoring: the softmax oracle is DeepseekV2, which ignores
  `norm_topk_prob` and sets dropped groups to 0 (the same choice as -inf: a softmax is positive).
- `q_lora_rank` 0 must be null (minids.files.hf writes that). One expert a group crashes it.
- Odd widths need the eager experts; every model here takes them, and eager attention.
- Norms on the latents use eps 1e-6 whatever the config says.
- MTP has no training path: `MtpModel.forward_layer` is called layer by layer, teacher-forced. It
  reads the state after the final norm, at positions i + k, and needs an MtpCache: the mask uses
  its offset.
- FP8 folders are dequantised where there is no GPU, into the dtype asked for; what is stored in
  BF16 stays BF16 whatever is asked, and the mixture cannot run: `from_folder` makes it one dtype.
  The size of a block is taken as rows // scale rows: 128 must divide every width. MtpModel, read
  in BF16, rounds scales and the router's bias to BF16 before it uses them; in FP32 it is exact.
- No shared expert makes it build layers of width 0, and torch warns about filling those.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicCache, MtpCache
from transformers.modeling_layers import MtpModel

from minids import Config, Transformer
from minids.files.hf import to_hf

PINNED = "5.23.0"
LATENT_NORM_EPS = 1e-6

if transformers.__version__ != PINNED:
    raise ImportError(
        f"the oracle is transformers {PINNED}, found {transformers.__version__}: its numbers move "
        f"between versions, install the pinned one (pip install transformers=={PINNED})"
    )


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Return norm of the difference over norm, in FP64; two zero tensors differ by 0."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert ours.shape == theirs.shape, f"shapes differ: {ours.shape} and {theirs.shape}"
    difference = (ours - theirs).norm().item()
    return difference / theirs.norm().item() if difference else 0.0


def hf_config(cfg: Config) -> transformers.PreTrainedConfig:
    """Return transformers' own config of a Config, with the eager implementations."""
    if cfg.norm_eps != LATENT_NORM_EPS:
        raise ValueError(f"transformers fixes the latent norms' eps at 1e-6, got {cfg.norm_eps}")
    if cfg.experts_per_group == 1:
        raise ValueError("transformers crashes with one expert a group")
    published = to_hf(cfg)
    classes = {
        "deepseek_v3": transformers.DeepseekV3Config,
        "deepseek_v2": transformers.DeepseekV2Config,
    }
    theirs = classes[published["model_type"]].from_dict(published)
    theirs.num_mtp_layers = cfg.mtp_depth  # V2's class knows no published name for it
    theirs._attn_implementation = "eager"
    theirs._experts_implementation = "eager"
    return theirs


def weight_names(cfg: Config) -> dict[str, str]:
    """Return our name -> their name of every weight and bias, MTP modules under `mtp.`.

    Written out, and not taken from minids.checkpoint, which it checks.
    """
    names = {
        "embed": "model.embed_tokens.weight",
        "norm.gain": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    for index in range(cfg.n_layers):
        dense = index < cfg.n_dense_layers
        names |= _block_names(cfg, f"layers.{index}", f"model.layers.{index}", dense)
    for k in range(cfg.mtp_depth):
        ours, theirs = f"mtp.{k}", f"mtp.layers.{k}"
        names |= {
            f"{ours}.embedding_norm.gain": f"{theirs}.enorm.weight",
            f"{ours}.hidden_norm.gain": f"{theirs}.hnorm.weight",
            f"{ours}.w_merge.weight": f"{theirs}.eh_proj.weight",
            f"{ours}.norm.gain": f"{theirs}.post_norm.weight",
        }
        names |= _block_names(cfg, f"{ours}.block", f"{theirs}.mtp_block", dense=False)
    return names


def _block_names(cfg: Config, ours: str, theirs: str, dense: bool) -> dict[str, str]:
    names = {
        "attn_norm.gain": "input_layernorm.weight",
        "attn.w_dkv.weight": "self_attn.kv_a_proj_with_mqa.weight",
        "attn.kv_norm.gain": "self_attn.kv_a_layernorm.weight",
        "attn.w_ukv.weight": "self_attn.kv_b_proj.weight",
        "attn.w_o.weight": "self_attn.o_proj.weight",
        "ffn_norm.gain": "post_attention_layernorm.weight",
    }
    if cfg.q_lora_rank:
        names["attn.w_dq.weight"] = "self_attn.q_a_proj.weight"
        names["attn.q_norm.gain"] = "self_attn.q_a_layernorm.weight"
        names["attn.w_uq.weight"] = "self_attn.q_b_proj.weight"
    else:
        names["attn.w_q.weight"] = "self_attn.q_proj.weight"
    if dense:
        for part in ("gate", "up", "down"):
            names[f"ffn.w_{part}.weight"] = f"mlp.{part}_proj.weight"
    else:
        names["ffn.router.centroids"] = "mlp.gate.weight"
        if cfg.score_func == "sigmoid":
            names["ffn.router.bias"] = "mlp.gate.e_score_correction_bias"
        names["ffn.experts.w_gate_up"] = "mlp.experts.gate_up_proj"  # [E, 2, F, D] as [E, 2F, D]
        names["ffn.experts.w_down"] = "mlp.experts.down_proj"
        if cfg.n_shared_experts:
            for part in ("gate", "up", "down"):
                names[f"ffn.shared.w_{part}.weight"] = f"mlp.shared_experts.{part}_proj.weight"
    return {f"{ours}.{mine}": f"{theirs}.{its}" for mine, its in names.items()}


class Oracle:
    """A transformers model that holds a copy of our model's weights."""

    def __init__(self, model: Transformer):
        self.cfg = model.cfg
        config = hf_config(model.cfg)
        kind = {
            "deepseek_v3": transformers.DeepseekV3ForCausalLM,
            "deepseek_v2": transformers.DeepseekV2ForCausalLM,
        }[config.model_type]
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            self.main = kind(config).eval()
            self.mtp = MtpModel(self.main, model.cfg.mtp_depth).eval() if model.mtp else None
        self._copy_weights(model)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return every weight and router bias by name, those of MTP modules under `mtp.layers`."""
        both = [("", self.main)] + ([("mtp.", self.mtp)] if self.mtp is not None else [])
        found = {}
        for prefix, module in both:
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                tied = prefix and not name.startswith("layers.")
                if not tied and "rotary" not in name:
                    found[prefix + name] = tensor
        return found

    @torch.no_grad()
    def _copy_weights(self, model: Transformer) -> None:
        ours, theirs = model.state_dict(), self.tensors
        names = weight_names(self.cfg)
        empty = {name for name, tensor in theirs.items() if not tensor.numel()}  # no shared expert
        assert names.keys() == ours.keys(), f"ours unmapped: {names.keys() ^ ours.keys()}"
        unmapped = set(names.values()) ^ (theirs.keys() - empty)
        assert not unmapped, f"theirs unmapped: {sorted(unmapped)}"
        for mine, its in names.items():
            theirs[its].copy_(ours[mine].reshape(theirs[its].shape))

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Return logits [B, T, vocab] of a whole text, without cache."""
        return self.main(input_ids=ids, use_cache=False).logits

    @torch.no_grad()
    def decode(self, ids: Tensor, chunks: Sequence[int]) -> Tensor:
        """Return the same logits with their cache, fed in chunks of so many tokens."""
        cache = DynamicCache(config=self.main.config)
        parts = ids.split(list(chunks), dim=1)
        calls = [self.main(input_ids=part, past_key_values=cache, use_cache=True) for part in parts]
        return torch.cat([call.logits for call in calls], dim=1)

    def hidden_states(self, tokens: Tensor) -> list[Tensor]:
        """Return the state after the final norm, then after each MTP module, teacher-forced.

        Of T + 1 tokens the main model reads T; module k has T - k positions, at i + k.
        """
        hidden = self.main.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        states = [hidden]
        cache = MtpCache(config=self.main.config.get_mtp_config())
        for k in range(1, self.cfg.mtp_depth + 1):
            ids = tokens[:, k:-1]
            at = torch.arange(k, k + ids.shape[1])[None]
            assert self.mtp is not None, "mtp_depth > 0 builds it"
            hidden = self.mtp.forward_layer(k - 1, hidden[:, :-1], at, cache, input_ids=ids)
            states.append(hidden)
        return states

    def losses(self, tokens: Tensor) -> list[Tensor]:
        """Return main and MTP losses in nats, each over the main model's number of targets."""
        n_targets = tokens[:, 1:].numel()
        losses = []
        for k, hidden in enumerate(self.hidden_states(tokens)):
            logits = self.main.lm_head(hidden)
            targets = tokens[:, k + 1 :]
            each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            losses.append(each / n_targets)
        return losses

    def gradients(self, tokens: Tensor, mtp_weight: float) -> dict[str, Tensor]:
        """Return d(main + weight * mean of MTP losses) by our names and in our shapes' order."""
        self.main.zero_grad()
        if self.mtp is not None:
            self.mtp.zero_grad()
        main, *mtp = self.losses(tokens)
        total = main + mtp_weight * torch.stack(mtp).mean() if mtp else main
        total.backward()
        theirs = self.tensors
        names = {mine: its for mine, its in weight_names(self.cfg).items() if ".bias" not in mine}
        grads = {mine: theirs[its].grad for mine, its in names.items()}
        return {
            name: torch.zeros_like(theirs[names[name]]) if grad is None else grad
            for name, grad in grads.items()
        }

    @torch.no_grad()
    def drafts(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the main model's next token and each MTP module's draft [B, 1 + depth], and the
        drafts' logits [B, depth, vocab]; greedy, every module reads the draft of the one before."""
        out = self.main.model(input_ids=ids, use_cache=False)
        first = self.main.lm_head(out.last_hidden_state[:, -1:]).argmax(-1)
        assert self.mtp is not None, "drafts need mtp_depth > 0"
        drafted, logits, _ = self.mtp(
            input_ids=torch.cat([ids[:, 1:], first], dim=1),
            last_hidden_states=out.last_hidden_state,
            attention_mask=None,
            position_ids=torch.arange(1, ids.shape[1] + 1)[None],
            mtp_cache=MtpCache(config=self.main.config.get_mtp_config()),
        )
        return torch.cat([first, drafted], dim=1), logits


def tokenizers(folder) -> list[transformers.PreTrainedTokenizerBase]:
    """Return a folder's tokenizer as each of transformers' two loaders reads it."""
    loaders = (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast)
    return [loader.from_pretrained(folder) for loader in loaders]


# Folders that minids.checkpoint wrote, read by transformers itself, and back.


@contextmanager
def mtp_layers_known(cfg: Config) -> Iterator[None]:
    """Let V3's class find MTP weights behind `n_layers`; of itself it knows layer 61 alone."""
    kind = transformers.DeepseekV3ForCausalLM
    before = kind._keys_to_ignore_on_load_unexpected
    layers = range(cfg.n_layers, cfg.n_layers + cfg.mtp_depth)
    kind._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{k}\." for k in layers]
    try:
        yield
    finally:
        kind._keys_to_ignore_on_load_unexpected = before


def from_folder(folder: Path, cfg: Config, dtype: torch.dtype | None = None) -> Oracle:
    """Return what `from_pretrained` reads; every weight must be found, and none be left over."""
    kind = {
        "sigmoid": transformers.DeepseekV3ForCausalLM,
        "softmax": transformers.DeepseekV2ForCausalLM,
    }[cfg.score_func]
    oracle = Oracle.__new__(Oracle)  # no weights are copied
    oracle.cfg = cfg
    oracle.main, found = kind.from_pretrained(
        folder,
        dtype=dtype,
        output_loading_info=True,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    assert not any(found.values()), found
    if dtype is not None:
        oracle.main.to(dtype)
    oracle.mtp = MtpModel.from_pretrained(oracle.main).eval() if cfg.mtp_depth else None
    return oracle


def generate(oracle: Oracle, ids: Tensor, new_tokens: int, use_mtp: bool = False) -> Tensor:
    """Return ids [1, T] with `new_tokens` greedy ones behind; no token stops it."""
    return oracle.main.generate(
        ids, max_new_tokens=new_tokens, do_sample=False, use_mtp=use_mtp, eos_token_id=None
    )


def rewritten_config(published: dict, folder: Path) -> dict:
    """Return the config.json that transformers writes after reading a published one."""
    kind = {
        "deepseek_v3": transformers.DeepseekV3Config,
        "deepseek_v2": transformers.DeepseekV2Config,
    }[published["model_type"]]
    kind.from_dict(published).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def quantization_config(folder: Path) -> dict:
    """Return the quantization_config that transformers writes for FP8 weights."""
    config = transformers.DeepseekV3Config(
        quantization_config=transformers.FineGrainedFP8Config(weight_block_size=(128, 128))
    )
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())["quantization_config"]
