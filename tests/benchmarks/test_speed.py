"""Timings to look at, not to assert: ``pytest tests/benchmarks``. Compare the rows of one group, from one run."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torchvision.models import get_model

import fxmerge
from fxmerge.collect import collect
from fxmerge.matchers import WeightMatching
from fxmerge.stats import choose_taps
from fxmerge.trace import trace

torch.set_num_threads(os.cpu_count() or 1)  # the tests beside this folder run on one
IMAGES = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def network(name, seed=0):
    torch.manual_seed(seed)
    return get_model(name, weights=None).eval()


def fxmerge_trace(model):
    return trace(model, IMAGES)


def fxmerge_infer(model):
    return fxmerge.infer_classes(model, IMAGES)


def torch_pruning(model):
    pruning = pytest.importorskip("torch_pruning")
    graph = pruning.DependencyGraph().build_dependency(model, example_inputs=IMAGES)
    return list(graph.get_all_groups())


@pytest.mark.parametrize("name", ["resnet50", "densenet121", "vit_b_16"])
@pytest.mark.parametrize("tool", [fxmerge_trace, fxmerge_infer, torch_pruning], ids=lambda tool: tool.__name__)
@pytest.mark.filterwarnings("default")
def test_trace_and_infer(benchmark, name, tool):
    """From the module to what moves together, beside Torch-Pruning's dependency graph and all of its groups."""
    benchmark.group = f"trace and infer: {name}"
    benchmark.pedantic(tool, (network(name),), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("what", ["forward", "statistics"])
def test_statistics(benchmark, name, what):
    """Streaming every class's second moments, beside the plain forward passes of both parents on the same batches."""
    benchmark.group = f"statistics of {name}"
    parents = [network(name, seed) for seed in (0, 1)]
    batches = [torch.randn(16, 3, 224, 224) for _ in range(4)]
    if what == "forward":

        @torch.no_grad()
        def run():
            for batch in batches:
                for parent in parents:
                    parent(batch)

    else:
        classes = [fxmerge.infer_classes(parent, batches[0][:1]) for parent in parents]
        taps = [choose_taps(c) for c in classes]

        def run():
            collect(classes, batches, lambda batch: ((batch,), {}), taps)

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)


def test_weight_matching(benchmark):
    """A whole data-free merge of two ResNet-50: trace, infer, match, rewrite, verify."""
    a, b = (network("resnet50", seed) for seed in (0, 1))
    options = {"example_inputs": IMAGES, "matcher": WeightMatching()}
    result = benchmark.pedantic(fxmerge.merge, (a, b), options, rounds=2)
    benchmark.extra_info["report"] = str(result.report)


PEAK = """
    import json, resource, torch
    from torchvision.models import get_model
    import fxmerge
    from fxmerge.matchers import WeightMatching

    def resident():  # KiB; the high-water mark starts here, above what imports and building the parents took
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    a, b = (get_model("resnet50", weights=None).eval() for _ in range(2))
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        a(x)
    before = resident()
    fxmerge.merge(a, b, example_inputs=x, matcher=WeightMatching())
    parents = sum(t.numel() * t.element_size() for m in (a, b) for t in m.state_dict().values())
    print(json.dumps({"peak": (resident() - before) * 1024, "parents": parents}))
"""


def test_peak_memory_of_weight_matching(benchmark):
    """Peak resident memory above the parents', in units of the parents' parameters, of the merge above."""

    def run():
        command = [sys.executable, "-c", textwrap.dedent(PEAK)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])

    measured = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info |= measured | {"peak / parents": measured["peak"] / measured["parents"]}
