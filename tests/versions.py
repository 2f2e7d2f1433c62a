"""Tests of what old versions of torch cannot do by themselves; with those, merging goes on without it."""

import inspect

import pytest
import torch
from torch.fx import graph_module

RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])


def needs(what: str, there: bool = RELEASE >= (2, 11)) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not there, reason=f"torch {torch.__version__} does not {what}")


SYMBOLIC_SIZES = needs(
    "trace what is made of traced sizes, or buffers that are assigned to: such networks are recorded"
)
_COPY = inspect.getsource(graph_module._copy_attr)
PERSISTENCE = needs("keep buffers out of state dicts in copies of graphs", "persistent" in _COPY)
ONNX = needs("name the axes of every graph, or translate every layer")
GROUPED = needs("have grouped products", hasattr(torch, "_grouped_mm"))
