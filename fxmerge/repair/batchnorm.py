"""BatchNorm statistics re-estimated on data (REPAIR, Jordan et al., arXiv 2211.08403, section 4.2)."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from fxmerge.errors import InputError
from fxmerge.interfaces import AbstractRepair, Context
from fxmerge.ranks import summed, summed_numbers
from fxmerge.running import fitting


def batchnorms(module: nn.Module) -> list[_BatchNorm]:
    """The normalisation layers that keep running statistics."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def _joined(layers: list[_BatchNorm], count: int) -> int:
    """Averages over all processes' batches, from those over each one's; the number of batches."""
    buffers = [b for m in layers for b in (m.running_mean, m.running_var) if b is not None]
    batches = round(summed_numbers([count])[0])
    if batches > count:
        for buffer, joined in zip(buffers, summed([b * (count / batches) for b in buffers]), strict=True):
            buffer.copy_(joined)
    return batches


class ResetBatchNorm(AbstractRepair):
    """Sets every BatchNorm's mean and variance to their averages over the batches (cumulative, no momentum)."""

    def repair(self, module: fx.GraphModule, context: Context) -> str:
        layers = batchnorms(module)
        if not layers:
            return "no BatchNorm statistics to reset"
        modes = {m: m.training for m in module.modules()}
        before = [(m, m.momentum, m.num_batches_tracked) for m in layers]
        counts = [None if n is None else n.clone() for _, _, n in before]
        module.eval()
        count = 0
        try:
            for m in layers:
                m.reset_running_stats()
                m.momentum = None
                m.train()
            with torch.no_grad():
                bar = tqdm(context.batches, desc="BatchNorm statistics", disable=not context.progress, leave=False)
                for batch in bar:
                    with fitting(count):
                        args, kwargs = context.feed(batch)
                        module(*args, **kwargs)
                    count += 1
            count = _joined(layers, count)
        finally:
            for (layer, momentum, tracked), count_before in zip(before, counts, strict=True):
                layer.momentum = momentum
                if tracked is not None and count_before is not None:
                    tracked.copy_(count_before)
            for part, training in modes.items():
                part.training = training
        if not count:
            raise InputError("the data is empty: no batch to re-estimate BatchNorm statistics on")
        return f"statistics of {len(layers)} BatchNorm layers re-estimated on {count} batches"
