"""The shape of the repository, as rules; each is also shown to fail where it is broken."""

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {
    ".binder", ".ci", ".gitignore", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile",
    "README.md", "book", "constraints.txt", "figures", "kernels", "minids", "pyproject.toml",
    "tests",
}  # fmt: skip
# from config to model, in the order in which they are read
CORE = ["config", "norm", "linear", "rope", "attention", "cache", "mla", "ffn", "router", "balance",
        "moe", "block", "mtp", "loss", "model"]  # fmt: skip
CORE_LINES, ALL_LINES, FILE_LINES, EXPORTS = 1300, 3000, 250, 12
# a module without a test file of its own, with the reason
NO_TEST = {
    "__init__": "names only",
    "__main__": "one line, run by test_cli",
    "block": "two lines of equations, tested as the layers of test_model",
}
# a test without a module of its own, with the reason
NO_MODULE = {
    "layout": "rules of the repository",
    "book": "rules of the chapters and lecture pages",
    "book_tools": "book/_tools",
    "colab": "the install cell of every chapter",
    "exercises": "minids/learn/exercises, all alike",
    "lab": "chapters as JupyterLab shows them",
    "site": "the pages that make book builds",
    "teach": "the instructor's side",
    "style": "figures/style.py",
    "readme": "the lines that README.md shows",
    "equations": "a property family: an independent loop from the equations",
    "oracle": "a property family: equal to transformers",
    "mistakes": "a property family: mistakes others make",
    "hypothesis": "a property family: random legal configs",
}
HEAVY = {"figures", "matplotlib", "transformers", "typer"}
# sources that are read an exercise at a time: statement, hints, solution and wrong answers
LONG = {"exercises": 700}  # lines, of a file in a folder of this name
EDGES = {"cli", "learn", "bench"}  # may import HEAVY inside functions, cli and bench typer anywhere
# a file of kernels/minids_kernels without a test file of its own, with the reason
NO_KERNEL = {
    "__init__": "names only",
    "cards": "what a card can do, no kernel; tested with the harness",
    "configs": "the tuned table, no kernel; tested with the benchmark that writes it",
    "e4m3": "device functions; tested through the kernels of fp8_quantise and fp8_dequantise",
    "latent": "tuples, and the ends of documents; tested through the kernels of mla_prefill",
    "scaled": "a tuple",
    "slots": "a tuple, and how long it is; tested through the kernels of moe_align",
    "softmax": "device functions; tested through the kernels of mla",
    "tiles": "device functions; tested through the kernels of fp8_matmul",
}
# a test of kernels without a kernel of its own, with the reason
NO_KERNEL_FILE = {
    "harness": "the tools of the kernels' tests",
    "bench": "the benchmark",
    "models": "whole models that compute by kernels",
    "layer": "a whole layer, kernels/minids_kernels/bench/layer.py",
    "levels": "one product in eight levels, kernels/minids_kernels/levels",
}
KERNEL_LINES = 400
KERNELS_IMPORT = {"torch", "triton", "minids_kernels"}  # a kernel can be taken along alone
BENCH_IMPORTS = KERNELS_IMPORT | {"einops", "minids", "numpy", "tqdm", "typer"}
LABELS = ["Paper", "Dims", "Book", "Kernel"]
MOVES = {"view", "reshape", "permute", "transpose", "unsqueeze", "squeeze"}


def modules(root: Path) -> list[Path]:
    return sorted((root / "minids").rglob("*.py"))


def core(root: Path) -> list[Path]:
    """Return the modules of minids without its subpackages."""
    return sorted((root / "minids").glob("*.py"))


def n_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(node: ast.AST) -> list[str]:
    """Return the modules that one statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Walk what runs when a module is imported: everything but the bodies of functions."""
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from at_import(child)


# Each rule takes a root and yields what breaks it.


def top_level_is_as_designed(root: Path) -> Iterator[str]:
    listed = {
        entry.name
        for entry in root.iterdir()
        if entry.name not in untracked(root) and not entry.name.endswith(".egg-info")
    }
    yield from (f"{name} is not in the design" for name in sorted(listed - TOP_LEVEL))
    yield from (f"{name} is missing" for name in sorted(TOP_LEVEL - listed))


def untracked(root: Path) -> set[str]:
    """Return the names that .gitignore names, and git's own."""
    ignore = root / ".gitignore"
    lines = ignore.read_text(encoding="utf-8").split() if ignore.exists() else []
    return {".git", *(line.strip("/") for line in lines)}


def kernels_is_no_package(root: Path) -> Iterator[str]:
    if (root / "kernels/__init__.py").exists():
        yield "kernels/__init__.py hides Hugging Face's kernels and breaks import transformers"


def one_stem_across_folders(root: Path) -> Iterator[str]:
    stems = {path.stem for path in core(root)}
    tests = {path.stem.removeprefix("test_") for path in (root / "tests").glob("test_*.py")}
    tests = {stem for stem in tests if not stem.startswith("kernel_")}
    # by figures and their tests
    shared = {"__init__", "style", "treemap", "microscope", "roofline", "walker"}
    figures = {path.stem for path in (root / "figures").glob("*.py")} - shared
    # a test of one thing that goes with a chapter: its widget, its experiment
    tests = {re.sub(r"^(learn|widget)_", "", stem) for stem in tests}
    parts = list((root / "minids").glob("*/**/*.py"))  # of subpackages: by module or by package
    learn = {path.stem for path in parts} | {path.parent.name for path in parts}
    yield from (f"minids/{s}.py has no test_{s}.py" for s in sorted(stems - tests - set(NO_TEST)))
    allowed = stems | learn | set(NO_MODULE)
    yield from (f"test_{s}.py tests no module of that name" for s in sorted(tests - allowed))
    yield from (f"figures/{s}.py shows no module" for s in sorted(figures - stems - learn))


def files_are_short(root: Path) -> Iterator[str]:
    for path in [*modules(root), *sorted((root / "figures").glob("*.py"))]:
        limit = LONG.get(path.parent.name, FILE_LINES)
        if n_lines(path) > limit:
            yield f"{path.name} has {n_lines(path)} lines, more than {limit}"


def library_is_short(root: Path) -> Iterator[str]:
    model = sum(n_lines(path) for path in core(root) if path.stem in CORE)
    if model > CORE_LINES:
        yield f"config to model has {model} lines, more than {CORE_LINES}"
    if (total := sum(map(n_lines, core(root)))) > ALL_LINES:
        yield f"minids has {total} lines, more than {ALL_LINES}"


def imports_go_one_way(root: Path) -> Iterator[str]:
    for path in modules(root):
        place = {path.stem, *path.relative_to(root / "minids").parts}
        edge = bool(place & EDGES)
        banned = HEAVY - {"typer"} if "learn" not in place and edge else HEAVY
        for node in at_import(tree(path)) if edge else ast.walk(tree(path)):
            for name in imported(node):
                if name.split(".")[0] in banned | {"book", "tests"}:
                    yield f"{path.name} imports {name}"


def public_names_are_few_and_sorted(root: Path) -> Iterator[str]:
    for node in tree(root / "minids/__init__.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            if names != sorted(
                names, key=lambda name: (not name.isupper(), name[0].islower(), name)
            ):
                yield f"__all__ is not sorted (constants, classes, functions): {names}"
            if len(names) > EXPORTS:
                yield f"__all__ has {len(names)} names, more than {EXPORTS}"
            return
    yield "minids/__init__.py has no __all__"


def shapes_are_not_postponed(root: Path) -> Iterator[str]:
    for path in modules(root):
        names = [name for node in ast.walk(tree(path)) for name in imported(node)]
        if {"jaxtyping", "__future__"} <= {name.split(".")[0] for name in names}:
            yield f"{path.name}: jaxtyping cannot read annotations that __future__ postpones"


def axes_move_with_einops(root: Path) -> Iterator[str]:
    for path in modules(root):
        nodes = list(ast.walk(tree(path)))
        bits = {id(node.func) for node in nodes if isinstance(node, ast.Call) and reads_bits(node)}
        for node in nodes:
            if isinstance(node, ast.Attribute) and node.attr in MOVES and id(node) not in bits:
                yield f"{path.name}:{node.lineno} calls .{node.attr}: say it with einops"


def reads_bits(call: ast.Call) -> bool:
    """Tell whether a call is `x.view(dtype)`: the same bits in another dtype, no axis moves."""
    words = [ast.unparse(argument).split(".") for argument in call.args]
    return len(words) == 1 and (words[0][-1] == "dtype" or words[0][0] == "torch")


def docstrings_carry_labels(root: Path) -> Iterator[str]:
    for path in modules(root):
        if path.stem == "__init__" or "learn" in path.relative_to(root / "minids").parts:
            continue  # what goes with the book has no equation of its own
        doc = ast.get_docstring(tree(path)) or ""
        found = re.findall(rf"^({'|'.join(LABELS[:3])})\b|  +({LABELS[3]})\b", doc, re.MULTILINE)
        if ["".join(pair) for pair in found] != LABELS:
            yield f"{path.name}: its docstring must have {', '.join(LABELS)} in this order"


def kernels(root: Path) -> list[Path]:
    """Return the files of minids_kernels that are no benchmark."""
    return sorted((root / "kernels/minids_kernels").glob("*.py"))


def kernels_have_a_stem_and_a_test(root: Path) -> Iterator[str]:
    stems = {path.stem for path in core(root)}
    files = {path.stem for path in kernels(root)}
    tests = {path.stem.removeprefix("test_kernel_") for path in root.glob("tests/test_kernel_*.py")}
    for name in sorted(files - set(NO_KERNEL)):
        if "_" not in name or name.split("_")[0] not in stems:
            yield f"{name}.py is no <stem>_<op>.py with a stem of minids"
        if name not in tests:
            yield f"{name}.py has no test_kernel_{name}.py"
    yield from (
        f"test_kernel_{name}.py tests no kernel of that name"
        for name in sorted(tests - files - set(NO_KERNEL_FILE))
    )


def kernel_files_are_short(root: Path) -> Iterator[str]:
    for path in sorted((root / "kernels").rglob("*.py")):
        if n_lines(path) > KERNEL_LINES:
            yield f"{path.name} has {n_lines(path)} lines, more than {KERNEL_LINES}"


def kernels_import_torch_and_triton_alone(root: Path) -> Iterator[str]:
    for path in sorted((root / "kernels/minids_kernels").rglob("*.py")):
        allowed = BENCH_IMPORTS if "bench" in path.parts else KERNELS_IMPORT
        for node in ast.walk(tree(path)):
            for name in imported(node):
                package = name.split(".")[0]
                if package not in allowed | sys.stdlib_module_names:
                    yield f"{path.name} imports {name}"
                if "bench" in name.split(".") and "bench" not in path.parts:
                    yield f"{path.name} imports the benchmark"


def kernels_are_imported_in_one_place(root: Path) -> Iterator[str]:
    """Triton is loaded where it is asked for: in a function of minids/impl.py, or of the book's."""
    for path in modules(root):
        late = path == root / "minids/impl.py" or "learn" in path.relative_to(root).parts
        for node in at_import(tree(path)) if late else ast.walk(tree(path)):
            for name in imported(node):
                if name.split(".")[0] in {"minids_kernels", "triton"}:
                    yield f"{path.name} imports {name}"


# what breaks each rule: files written into an empty repository
PLANTED = {
    top_level_is_as_designed: {"setup.py": ""},
    kernels_is_no_package: {"kernels/__init__.py": ""},
    one_stem_across_folders: {"minids/router.py": ""},
    files_are_short: {"minids/router.py": "\n" * 251},
    library_is_short: {f"minids/{stem}.py": "\n" * 100 for stem in CORE},
    imports_go_one_way: {"minids/router.py": "def f():\n    import matplotlib.pyplot"},
    public_names_are_few_and_sorted: {"minids/__init__.py": "__all__ = ['preset', 'Config']"},
    shapes_are_not_postponed: {
        "minids/router.py": "from __future__ import annotations\nfrom jaxtyping import Float"
    },
    axes_move_with_einops: {"minids/learn/a.py": "y = x.view(2)"},
    kernels_have_a_stem_and_a_test: {"kernels/minids_kernels/router_topk.py": ""},
    kernel_files_are_short: {"kernels/minids_kernels/bench/run.py": "\n" * 401},
    kernels_import_torch_and_triton_alone: {
        "kernels/minids_kernels/a_b.py": "def f():\n    from minids.fp8 import TILE"
    },
    kernels_are_imported_in_one_place: {"minids/fp8.py": "def f():\n    import minids_kernels"},
    docstrings_carry_labels: {
        "minids/router.py": '"""A.\n\nPaper a\nBook b   Kernel c\nDims d\n"""'
    },
}


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("rule", PLANTED, ids=lambda rule: rule.__name__)
def test_rule_holds(rule):
    assert list(rule(ROOT)) == []


@pytest.mark.parametrize("rule", PLANTED, ids=lambda rule: rule.__name__)
def test_rule_sees_what_breaks_it(rule, tmp_path):
    plant(tmp_path, PLANTED[rule])
    assert list(rule(tmp_path))


def test_top_level_names_what_is_too_much_and_what_is_missing(tmp_path):
    plant(tmp_path, {"setup.py": "", "runs/a": "", "LICENSE": "", ".gitignore": "/runs/"})
    found = set(top_level_is_as_designed(tmp_path))
    assert "setup.py is not in the design" in found
    assert {"Makefile is missing"} <= found
    assert not {text for text in found if text.startswith(("runs", "LICENSE"))}


@pytest.mark.parametrize(
    ("rule", "files"),
    [
        (one_stem_across_folders, {"tests/test_nothing.py": ""}),
        (one_stem_across_folders, {"figures/nothing.py": ""}),
        (library_is_short, {f"minids/a{n}.py": "\n" * 250 for n in range(13)}),
        (one_stem_across_folders, {"tests/test_widget_nothing.py": ""}),
        (files_are_short, {"minids/learn/exercises/a.py": "\n" * 701}),
        (imports_go_one_way, {"minids/learn/a.py": "import figures.style"}),
        (imports_go_one_way, {"minids/learn/exercises/a.py": "import figures.style"}),
        (imports_go_one_way, {"minids/cli.py": "from matplotlib import pyplot"}),
        (imports_go_one_way, {"minids/train.py": "from tests.oracle import build"}),
        (public_names_are_few_and_sorted, {"minids/__init__.py": ""}),
        (
            public_names_are_few_and_sorted,
            {"minids/__init__.py": f"__all__ = {[f'a{n:02}' for n in range(13)]}"},
        ),
        (docstrings_carry_labels, {"minids/router.py": "x = 1"}),
        (axes_move_with_einops, {"minids/a.py": "y = x.view(torch.uint8).view(len(x))"}),
        (
            kernels_have_a_stem_and_a_test,
            {"kernels/minids_kernels/fast_topk.py": "", "tests/test_kernel_fast_topk.py": ""},
        ),
        (kernels_have_a_stem_and_a_test, {"tests/test_kernel_router_topk.py": ""}),
        (kernels_import_torch_and_triton_alone, {"kernels/minids_kernels/a.py": "import numpy"}),
        (
            kernels_import_torch_and_triton_alone,
            {"kernels/minids_kernels/a.py": "from minids_kernels.bench import run"},
        ),
        (
            kernels_import_torch_and_triton_alone,
            {"kernels/minids_kernels/bench/a.py": "import matplotlib"},
        ),
        (kernels_are_imported_in_one_place, {"minids/impl.py": "import minids_kernels"}),
        (kernels_are_imported_in_one_place, {"minids/learn/a.py": "import triton.language"}),
    ],
)
def test_rule_sees_its_other_side(rule, files, tmp_path):
    plant(tmp_path, files)
    assert list(rule(tmp_path))


@pytest.mark.parametrize(
    "files",
    [
        {"minids/learn/a.py": "def f():\n    import figures.style"},
        {"minids/learn/experiments/a.py": "def f():\n    import figures.style"},
        {"minids/cli.py": "import typer"},
        {"minids/bench/cpu.py": "def f():\n    import transformers"},
    ],
)
def test_edges_may_reach_out(files, tmp_path):
    plant(tmp_path, files)
    assert list(imports_go_one_way(tmp_path)) == []


@pytest.mark.parametrize("dtype", ["torch.uint8", "x.dtype"])
def test_bits_may_be_read_in_another_dtype(dtype, tmp_path):
    plant(tmp_path, {"minids/a.py": f"y = x.view({dtype})"})
    assert list(axes_move_with_einops(tmp_path)) == []


def test_exceptions_are_still_needed():
    """A name in a list of exceptions that nothing needs any more would hide the next mistake."""
    assert set(NO_TEST) <= {path.stem for path in core(ROOT)}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert set(NO_MODULE) <= tests
    untested = {path.stem for path in kernels(ROOT) if f"kernel_{path.stem}" not in tests}
    assert set(NO_KERNEL) <= untested
    assert {f"kernel_{name}" for name in NO_KERNEL_FILE} <= tests


def test_benchmark_and_impl_may_reach_out(tmp_path):
    plant(
        tmp_path,
        {
            "kernels/minids_kernels/bench/a.py": "from minids.fp8 import TILE\nimport numpy, typer",
            "minids/impl.py": "def kernels():\n    import minids_kernels",
            "minids/learn/a.py": "def f():\n    import minids_kernels, triton",
        },
    )
    assert list(kernels_import_torch_and_triton_alone(tmp_path)) == []
    assert list(kernels_are_imported_in_one_place(tmp_path)) == []


def unlike(reference: Callable, wrapper: Callable) -> str | None:
    """Return what is wrong if a wrapper cannot be called as its reference is, and mean the same.

    Further parameters may follow if they have defaults; `impl` chose between the two.
    """
    asked, got = (list(inspect.signature(f).parameters.values()) for f in (reference, wrapper))
    asked = [parameter for parameter in asked if parameter.name != "impl"]
    for mine, theirs in zip(got, asked, strict=False):
        if (mine.name, mine.kind, mine.default) != (theirs.name, theirs.kind, theirs.default):
            return f"{mine} stands where the reference has {theirs}"
    if len(got) < len(asked):
        return f"{asked[len(got)]} is missing"
    needed = [str(extra) for extra in got[len(asked) :] if extra.default is extra.empty]
    return f"{needed} have no default" if needed else None


def test_wrappers_have_the_signatures_of_their_references():
    """A kernel takes its reference's place without a word."""
    kernels = pytest.importorskip("minids_kernels", reason="NOT RUN: Triton is not installed here")
    from minids import fp8, loss, mla, norm, rope, router
    from minids.experts import grouped, scaled, slots
    from minids.formats import groups
    from minids.fused import norm as fused_norm
    from minids.fused import swiglu

    wrappers = {
        name: getattr(kernels, name)
        for name in kernels.__all__
        if inspect.isfunction(getattr(kernels, name))
    }
    del wrappers["interpreted"]  # a question, no kernel
    modules = [groups, fp8, mla, norm, rope, router, loss, grouped, scaled, slots]
    modules += [fused_norm, swiglu]
    assert set(wrappers) >= {"dequantise", "quantise", "quantise_twice", "scaled_matmul"}
    for name, wrapper in wrappers.items():
        places = (getattr(module, name, None) for module in modules)
        reference = next(filter(None, places))
        assert unlike(reference, wrapper) is None, name


@pytest.mark.parametrize(
    ("wrapper", "words"),
    [
        (lambda x, size=2, *, out=None: x, None),
        (lambda x, size=2: x, None),
        (lambda x, n=2: x, "n=2 stands where"),
        (lambda x, size=3: x, "size=3 stands where"),
        (lambda x, *, size=2: x, "size=2 stands where"),
        (lambda x: x, "size=2 is missing"),
        (lambda x, size=2, *, out: x, "'out'] have no default"),
    ],
)
def test_unlike_sees_what_differs(wrapper, words):
    found = unlike(lambda x, size=2, impl=None: x, wrapper)
    assert found == words if words is None else words in (found or "")
