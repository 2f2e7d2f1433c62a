"""The house rules: imports go one way, methods do not know each other, nothing knows a network by name."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import fxmerge

ROOT = Path(fxmerge.__file__).parent
FILES = {
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

# A module imports only from those above it; an entry that is a package stands for all its files, inside which the
# order is: every file, then ``__init__``. A new module gets its place here.
ORDER = """
    errors clock atoms markup ir heap products linalg shards stored running size ranks moments
    symbolic batch recorder record guess trace vocabulary document fingerprint folder alignment listing
    card export exchange barrier
    symmetry stacks
    label calls slots meeting labels rules interpret sides places colours classes
    alike units coupling layout stats collect regression interfaces matching checks descent literals rewrite
    widths affinity cells budget matchers data correspond ensemble repair depth facts page recipe report plan gather
    provenance pipeline sources loaders commands cli api __init__
    """.split()

# Inside a package, who may import whom: a file of its own that all the others stand on.
BASES = {
    "rules": {"registry", "affine", "choice", "pointwise"},
    "matchers": set(),
    "repair": {"batchnorm", "runs"},
    "depth": {"tensors", "identity", "grow", "shrink", "insert"},
    "page": {"words", "layers", "figures"},
}


def place(module: str) -> str:
    return module.split(".")[0]


@cache
def imports(module: str) -> list[tuple[str, bool]]:
    """The modules of the package that ``module`` imports, wherever in the file, and whether for types only."""
    path = FILES[module]
    found: list[tuple[str, bool]] = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["fxmerge", *path.relative_to(ROOT).parts[:-1]] if path.is_relative_to(ROOT) else ["fxmerge"]
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{source}.{a.name}" for a in node.names] if source == "fxmerge" else [source]
        inside = (name for name in names if f"{name}.".startswith("fxmerge."))
        found += [(name.removeprefix("fxmerge").lstrip(".") or "__init__", id(node) in typing) for name in inside]
    return found


def test_the_reader_of_imports_reads_all_forms(tmp_path, monkeypatch):
    source = (
        "import fxmerge.ir\nfrom fxmerge import export\nfrom fxmerge.rules.affine import linear\nfrom . import atoms\n"
        "from .errors import InputError\nimport torch\nif TYPE_CHECKING:\n    from fxmerge.stats import Statistics\n"
        "def f():\n    from fxmerge.trace import trace\n"
    )
    (tmp_path / "sample.py").write_text(source)
    monkeypatch.setitem(FILES, "sample", tmp_path / "sample.py")
    assert set(imports("sample")) == {
        ("ir", False), ("export", False), ("rules.affine", False), ("atoms", False), ("errors", False), ("stats", True),
        ("trace", False),
    }  # fmt: skip


def test_the_order_names_every_module():
    assert {place(m) for m in FILES} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_from_those_above_it(module):
    for other, for_types in imports(module):
        if place(other) == place(module):
            inside = other.partition(".")[2]
            is_init = FILES[module].name == "__init__.py"
            assert is_init or inside in BASES[place(module)], f"{module} imports its sibling {other}"
            continue
        above = ORDER.index(place(other)) < ORDER.index(place(module))
        assert above or for_types, f"{module} imports {other}, which stands below it"


def test_nothing_needs_a_type_of_a_module_below():
    needed = {(m, o) for m in FILES for o, for_types in imports(m) if for_types}
    assert needed <= {("__init__", "api")}


def test_matchers_and_repairs_know_neither_each_other_nor_rules_nor_rewriting():
    forbidden = {"rules", "rewrite", "labels", "interpret", "atoms", "trace", "pipeline"}
    methods = [m for m in FILES if m.startswith(("matchers.", "repair."))]
    assert len(methods) >= 5
    for module in methods:
        base = {f"{place(module)}.{name}" for name in BASES[place(module)]}
        known = {place(o) for o, _ in imports(module) if o not in base}
        assert not known & (forbidden | {"repair", "matchers"}), module


def test_no_network_is_known_by_name():
    names = """
        resnet resnext resne[sx]t wide_resnet vgg alexnet densenet inception googlenet squeezenet shufflenet mobilenet
        mnasnet efficientnet regnet convnext vit vision_transformer swin maxvit deit beit bert roberta distilbert gpt
        gpt2 llama mistral t5 whisper unet yolo mixer lenet
        """.split()
    pattern = re.compile(rf"(?<![a-z])({'|'.join(names)})(?![a-z])", re.IGNORECASE)
    assert pattern.search("def merge_ResNet18(): ...")
    for module, path in FILES.items():
        if module == "cli":
            continue  # words only: the examples in its help take networks from the zoos
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not pattern.search(line), f"{module}:{number}: {line.strip()}"


def test_files_fit_in_the_head():
    lengths = {m: len(path.read_text(encoding="utf-8").splitlines()) for m, path in FILES.items()}
    assert {m: n for m, n in lengths.items() if n > 400} == {}


def test_importing_the_package_is_light():
    """Plots, optimal transport and model zoos are for those who use them; torch's settings stay as they are."""
    program = (
        "import sys, torch\nbefore = set(sys.modules)\nthreads = torch.get_num_threads()\nimport fxmerge\n"
        "heavy = {'ot', 'matplotlib', 'torchvision', 'networkx', 'sklearn', 'onnx', 'pandas'}\n"
        "print(sorted(heavy & (set(sys.modules) - before)), threads == torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[] True"


PUBLIC = [name for name in fxmerge.__all__ if callable(getattr(fxmerge, name))]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    thing = getattr(fxmerge, name)
    members = vars(thing).items() if inspect.isclass(thing) else ()
    for one in (thing, *(m for n, m in members if not n.startswith("_") and inspect.isfunction(m))):
        text = (one.__doc__ or "").strip()
        assert text, f"{name}: {one.__name__} has no docstring"
        assert not text.startswith(f"{one.__name__}("), f"{name}: a dataclass's own signature is no docstring"


def test_the_public_names_are_those_of_the_contract():
    contract = {"merge", "align", "permute", "infer_classes", "verify", "evaluate_barrier", "save", "load", "rule"}
    assert contract <= set(fxmerge.__all__)
    assert sorted(fxmerge.__all__) == list(fxmerge.__all__)
    assert all(hasattr(fxmerge, name) for name in fxmerge.__all__)
    assert {"WeightMatching", "ActivationMatching", "Average"} <= set(fxmerge.matchers.__all__)
    assert {"ResetBatchNorm", "Rescale"} <= set(fxmerge.repair.__all__)
