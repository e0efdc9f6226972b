"""minids/files/shards.py: the published name of every tensor, counted to the last one."""

import math
from collections import Counter

import oracle
import pytest
import torch

from minids import Transformer, preset
from minids.files.shards import FP8, slots, tensor_names


@pytest.fixture(scope="module")
def released() -> dict:
    """Names, shapes and dtypes of V3's own FP8 files; a few seconds, so once."""
    return tensor_names(preset("v3"), FP8)


def test_names_by_hand():
    cfg = preset("toy", n_layers=1, n_dense_layers=0, n_routed_experts=4, n_shared_experts=0)
    names = tensor_names(cfg, torch.float32)
    attention = {
        "q_a_proj.weight": (6, 8),
        "q_a_layernorm.weight": (6,),
        "q_b_proj.weight": (2 * (4 + 2), 6),
        "kv_a_proj_with_mqa.weight": (4 + 2, 8),
        "kv_a_layernorm.weight": (4,),
        "kv_b_proj.weight": (2 * (4 + 4), 4),
        "o_proj.weight": (8, 2 * 4),
    }
    want = {f"model.layers.{k}.self_attn.{n}": s for k in (0, 1) for n, s in attention.items()}
    for at in ("model.layers.0.", "model.layers.1."):
        want |= {f"{at}input_layernorm.weight": (8,), f"{at}post_attention_layernorm.weight": (8,)}
        want |= {f"{at}mlp.gate.weight": (4, 8), f"{at}mlp.gate.e_score_correction_bias": (4,)}
        for e in range(4):
            expert = f"{at}mlp.experts.{e}."
            want |= {f"{expert}gate_proj.weight": (8, 8), f"{expert}up_proj.weight": (8, 8)}
            want |= {f"{expert}down_proj.weight": (8, 8)}
    want |= {"model.embed_tokens.weight": (32, 8), "lm_head.weight": (32, 8)}
    want |= {"model.norm.weight": (8,)}
    mtp = "model.layers.1."
    want |= {f"{mtp}{name}.weight": (8,) for name in ("enorm", "hnorm", "shared_head.norm")}
    want |= {f"{mtp}{name}.weight": (32, 8) for name in ("embed_tokens", "shared_head.head")}
    want |= {f"{mtp}eh_proj.weight": (8, 16)}
    assert {name: shape for name, (shape, _) in names.items()} == want
    assert {dtype for _, dtype in names.values()} == {torch.float32}


def test_the_released_files_are_counted_to_the_last_element(released):
    """Fact sheet 1.4 and 3.5, which repeat the metadata of the release."""
    names = released
    assert len(names) == 91_991
    elements = Counter()
    for shape, dtype in names.values():
        elements[dtype] += math.prod(shape)
    assert elements == {
        FP8: 680_571_043_840,
        torch.bfloat16: 3_918_786_560,
        torch.float32: 41_555_600,
    }
    assert elements.total() == 684_531_386_000
    assert sum(dtype.itemsize * count for dtype, count in elements.items()) == 688_574_839_360
    layers = Counter(name.split(".")[2] for name in names if name.startswith("model.layers."))
    assert [layers[k] for k in ("0", "2", "3", "60", "61")] == [20, 20, 1558, 1558, 1564]


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "scales"),
    [
        ("self_attn.q_b_proj.weight", (24576, 1536), FP8, (192, 12)),
        ("self_attn.kv_a_proj_with_mqa.weight", (576, 7168), FP8, (5, 56)),
        ("self_attn.o_proj.weight", (7168, 16384), FP8, (56, 128)),
        ("mlp.experts.255.down_proj.weight", (7168, 2048), FP8, (56, 16)),
        ("mlp.shared_experts.up_proj.weight", (2048, 7168), FP8, (16, 56)),
        ("mlp.gate.weight", (256, 7168), torch.bfloat16, None),
        ("mlp.gate.e_score_correction_bias", (256,), torch.float32, None),
        ("self_attn.kv_a_layernorm.weight", (512,), torch.bfloat16, None),
        ("eh_proj.weight", (7168, 14336), torch.bfloat16, None),
        ("shared_head.head.weight", (129280, 7168), torch.bfloat16, None),
    ],
)
def test_shapes_and_dtypes_of_the_release(released, name, shape, dtype, scales):
    """Rows of fact sheet 3.5, looked up in the MTP layer, which has all of them."""
    assert released[f"model.layers.61.{name}"] == (shape, dtype)
    found = released.get(f"model.layers.61.{name}_scale_inv")
    assert found == (None if scales is None else (scales, torch.float32))


@pytest.mark.parametrize("name", ["v2", "v2_lite"])
def test_v2_has_no_router_bias_and_no_mtp(name):
    names = tensor_names(preset(name))
    assert not any("e_score_correction_bias" in name or "enorm" in name for name in names)
    assert ("model.layers.0.self_attn.q_proj.weight" in names) == (name == "v2_lite")
    total = {"v2": 235_741_434_880, "v2_lite": 15_706_484_224}[name]  # fact sheet 1.5
    assert sum(math.prod(shape) for shape, _ in names.values()) == total


def test_slots_are_the_models_own_memory_each_once():
    model = Transformer(preset("toy", mtp_depth=2))
    own = [slot for slot in slots(model) if slot.copy_of is None]
    assert sum(slot.value.numel() for slot in own) == sum(
        value.numel() for value in model.state_dict().values()
    )
    for slot in own:
        slot.value.fill_(7.0)
    assert all((value == 7.0).all() for value in model.state_dict().values())


def test_names_agree_with_transformers():
    """Oracle: the table of tests/oracle.py, written without looking at ours."""
    cfg = preset("toy", mtp_depth=1)
    theirs = {
        name.replace("mtp.layers.0.", "model.layers.2.")
        .replace("mtp_block.", "")
        .replace("post_norm", "shared_head.norm")
        for name in oracle.weight_names(cfg).values()
        if ".experts." not in name
    }
    ours = {
        slot.name
        for slot in slots(Transformer(cfg))
        if ".experts." not in slot.name and slot.copy_of is None
    }
    assert ours == theirs
