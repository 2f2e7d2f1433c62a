"""Timings to look at, not to assert: ``pytest tests/benchmarks --benchmark-group-by=group``."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from torchvision.models import get_model

import fxmerge

IMAGES = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["resnet50", "densenet121", "vit_b_16"])
@pytest.mark.parametrize("tool", ["fxmerge", "torch_pruning"])
def test_trace_and_infer(benchmark, name, tool):
    """Which axes move together, from the module to the answer, beside Torch-Pruning's dependency graph and groups."""
    benchmark.group = f"trace and infer {name}"
    model = get_model(name, weights=None).eval()
    if tool == "fxmerge":
        benchmark.pedantic(fxmerge.infer_classes, (model, IMAGES), rounds=3, warmup_rounds=1)
    else:
        pruning = pytest.importorskip("torch_pruning")

        def groups():
            graph = pruning.DependencyGraph().build_dependency(model, example_inputs=IMAGES)
            return list(graph.get_all_groups())

        benchmark.pedantic(groups, rounds=3, warmup_rounds=1)
