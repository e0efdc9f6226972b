"""One argument chooses who computes; kernels give what torch gives, backward and training too."""

import inspect
import os
import subprocess
import sys

import pytest

from minids import Transformer, fp8, preset
from minids.formats import groups
from minids.linear import Linear
from minids.moe import Experts

triton = pytest.importorskip("triton", reason="NOT RUN: kernels need Triton, made for Linux")
import minids_kernels  # noqa: E402  # after the question whether Triton is there

# sums of 128 products in another order, in FP32; what is rounded to FP8 may then move by a digit
ORDER = 1e-5
FP8 = dict(precision="fp8")


def kernel_and_reference(name: str):
    return getattr(minids_kernels, name), getattr(fp8 if hasattr(fp8, name) else groups, name)


@pytest.mark.parametrize(
    "name", ["quantise", "quantise_twice", "requantise", "dequantise", "scaled_matmul"]
)
def test_a_kernel_is_called_like_its_reference(name):
    kernel, reference = map(inspect.signature, kernel_and_reference(name))
    ours = {n: p.default for n, p in reference.parameters.items() if n != "impl"}
    theirs = {n: p.default for n, p in kernel.parameters.items() if n in ours}
    assert list(kernel.parameters)[: len(ours)] == list(ours)
    assert theirs == ours


@pytest.mark.parametrize("changes", [{}, dict(q_lora_rank=0), dict(attn="gqa", mtp_depth=0)])
def test_every_fp8_layer_is_switched_and_no_other(changes):
    model = Transformer(preset("toy", **FP8, **changes), impl="triton")
    plain = Transformer(preset("toy", **FP8, **changes))
    for module, same in zip(model.modules(), plain.modules(), strict=True):
        if isinstance(module, Linear):
            assert (module.recipe is None) == (same.recipe is None)
            assert module.recipe is None or module.recipe == same.recipe._replace(impl="triton")
        if isinstance(module, Experts):
            for how, other in zip(module.recipes, same.recipes, strict=True):
                assert how == other._replace(impl="triton")


def test_a_name_that_is_no_implementation():
    with pytest.raises(ValueError, match="impl must be one of 'torch', 'triton', got 'cuda'"):
        Transformer(preset("toy"), impl="cuda")


def test_a_model_without_a_layer_that_has_a_kernel():
    """Or a reader would time torch and call it Triton."""
    with pytest.raises(ValueError, match="kernels for precision='fp8' alone"):
        Transformer(preset("toy"), impl="triton")


def run(source: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python where Triton does not interpret."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-c", source]
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=300)


BUILD = "from minids import *; Transformer(preset('toy', precision='fp8'), impl='triton')"


def test_no_gpu_is_told_when_the_model_is_built():
    done = run(BUILD, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "impl='triton' needs an NVIDIA GPU, torch sees none: use impl='torch'" in done.stderr


def test_no_triton_is_told_with_what_to_install():
    done = run(f"import sys; sys.modules['triton'] = None; {BUILD}")
    assert done.returncode == 1
    assert "needs Triton, which exists for Linux: pip install 'minids[kernels]'" in done.stderr


def test_torch_alone_never_imports_triton():
    source = "from minids import *; import sys; Transformer(preset('toy', precision='fp8'));"
    assert run(f"{source} assert 'minids_kernels' not in sys.modules").returncode == 0
