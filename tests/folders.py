"""Folders of checkpoints that several tests make, spoil and compare; no test is in here."""

import json
from pathlib import Path

import oracle
import torch
from safetensors.torch import load_file, save_file

from minids import Transformer, preset
from minids.generate import generate

FP32 = 1e-5  # relative norm; transformers sums in another order
INDEX = "model.safetensors.index.json"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def make(seed: int = 1, **changes) -> Transformer:
    """A toy whose words vary, whose gains are not 1 and whose router biases are not 0."""
    model = Transformer(preset("toy", **dict(init_std=0.4) | changes), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, gain in model.named_parameters():
            if name.endswith("gain"):
                gain.uniform_(0.5, 1.5, generator=generator)
    for router in model.routers:
        if router.bias is not None:
            router.bias.normal_(generator=generator)
    return model


def assert_same(one: Transformer, other: Transformer) -> None:
    assert one.cfg == other.cfg
    ours, theirs = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (one, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
        assert value.dtype == theirs[name].dtype, name


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in shards(folder) for name, value in load_file(path).items()}


def edit_shard(folder: Path, change, name: str = "model.norm.weight", index: bool = False) -> Path:
    """Apply `change` to the dict of tensors of the shard that holds `name`; `index` follows it."""
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    path = folder / places[name]
    held = load_file(path)
    before = dict(held)
    change(held)
    save_file(held, path)
    if index:
        places = {name: place for name, place in places.items() if name not in before}
        edit_json(folder / INDEX, weight_map=places | dict.fromkeys(held, path.name))
    return path


def retype(name: str, dtype: torch.dtype):
    return lambda folder: edit_shard(folder, lambda t: t.update({name: t[name].to(dtype)}), name)


def fill(name: str, value: float):
    return lambda folder: edit_shard(folder, lambda t: t[name].view(-1)[:1].fill_(value), name)


def check_against_transformers(
    model: Transformer, folder: Path, dtype: torch.dtype | None = None
) -> None:
    with oracle.mtp_layers_known(model.cfg):
        compare(model, oracle.from_folder(folder, model.cfg, dtype), new_tokens=12)


def compare(model: Transformer, theirs: oracle.Oracle, new_tokens: int) -> None:
    """Equal logits and MTP states, the same greedy text, with and without drafts on both sides."""
    assert oracle.relative_error(model(IDS), theirs.logits(IDS)) <= FP32
    text = generate(model, IDS, max_new_tokens=new_tokens)
    assert len(set(text[0, 8:].tolist())) > 1, "one word again and again would prove little"
    assert torch.equal(text, oracle.generate(theirs, IDS, new_tokens))
    if model.cfg.mtp_depth:
        states = theirs.hidden_states(IDS)  # greedy text alone does not depend on MTP's weights
        for k, state in enumerate(states[1:], start=1):
            assert oracle.relative_error(mtp_state(model, k), state) <= FP32
        drafted = generate(model, IDS, max_new_tokens=new_tokens, draft="mtp")
        assert torch.equal(drafted, text)
        assert torch.equal(oracle.generate(theirs, IDS, new_tokens, use_mtp=True), text)


def mtp_state(model: Transformer, depth: int) -> torch.Tensor:
    """Return the state after MTP module `depth`, as the losses run it."""
    states = []
    hook = model.mtp[depth - 1].register_forward_hook(lambda _m, _i, out: states.append(out[0]))
    model.losses(IDS)
    hook.remove()
    return states[0]
