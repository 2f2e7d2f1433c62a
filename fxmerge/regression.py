"""Layers fitted in closed form to what they should give, from sums over rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fxmerge.ranks import from_first, place, summed, summed_numbers

LAYERS = {nn.Linear: 0, nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
"""Types of layers that can be fitted, with the spatial axes of their inputs."""


class Sums:
    """Second moments of rows z [R, g, d] and targets t [R, g, o], per group: single products, summed in float64."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._rows = self._count = 0
        self._shift: tuple[Tensor, Tensor] | None = None

    def add(self, z: Tensor, t: Tensor) -> None:
        narrow = z.dtype in (torch.float16, torch.bfloat16)
        self._waiting.append((z.float(), t.float()) if narrow else (z, t))
        self._rows += len(z)
        if self._rows >= z.shape[2]:  # a product costs a pass over d^2, however few its rows
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        z, t = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._rows = [], 0
        if self._shift is None:  # rough means, without which single products would be worth little
            self._shift = z.mean(0), t.mean(0)
            self._sums: list[Any] = [0.0] * 4
        z, t = ((x - shift).transpose(0, 1) for x, shift in zip((z, t), self._shift, strict=True))
        self._count += z.shape[1]
        new = (z.mT @ torch.cat([z, t], 2), t.square().sum(1), z.sum(1), t.sum(1))
        wide = torch.float64 if z.device.type != "mps" else torch.float32
        self._sums = [total + part.to(wide) for total, part in zip(self._sums, new, strict=True)]

    def __bool__(self) -> bool:
        return bool(self._count)

    def join(self) -> None:
        """Adds what the other processes have, seen from the first one's rough means."""
        self._flush()
        if place()[1] == 1:
            return
        if summed_numbers([self._shift is not None])[0] < place()[1]:  # one has none
            self._count = 0
            return
        assert self._shift is not None
        own, (products, square, z, t) = self._shift, self._sums
        here, there = from_first(own)
        self._shift = here, there
        dz, dt = own[0].to(z) - here.to(z), own[1].to(t) - there.to(t)
        n, both, d = self._count, torch.cat([z, t], 1), torch.cat([dz, dt], 1)
        products = products + _outer(z, d) + _outer(dz, both) + n * _outer(dz, d)
        square = square + 2 * dt * t + n * dt * dt
        counted = torch.tensor([n], dtype=z.dtype, device=z.device)
        *self._sums, counted = summed([products, square, z + n * dz, t + n * dt, counted])
        self._count = round(float(counted))

    def moments(self, centred: bool) -> tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Rows, E[zz'] [g, d, d], E[zt'] [g, d, o], E[tt] [g, o], E[z], E[t]; centred: less the means' products."""
        self._flush()
        assert self._shift is not None
        products, square, z, t = (x.to("cpu" if x.device.type == "mps" else x.device).double() for x in self._sums)
        n, d = self._count, z.shape[1]
        gram, cross = (products / n).split([d, t.shape[1]], 2)
        z, t = z / n, t / n
        gram, cross, square = gram - _outer(z, z), cross - _outer(z, t), square / n - t * t
        z, t = z + self._shift[0].to(z), t + self._shift[1].to(t)
        if not centred:
            gram, cross, square = gram + _outer(z, z), cross + _outer(z, t), square + t * t
        return n, gram, cross, square.clamp_min(0), z, t


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[:, :, None] * b[:, None, :]


def patches(layer: Any, x: Tensor, places: tuple[Tensor, ...]) -> Tensor:
    """[R, g, d]: what the layer multiplies with its weights at these places of its output."""
    if isinstance(layer, nn.Linear):
        return x[places][:, None]
    pad = layer._reversed_padding_repeated_twice
    if any(pad):
        x = F.pad(x, pad, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    windows = x
    for axis, (size, step, gap) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 2):
        windows = windows.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]
    windows = windows.movedim(1, x.dim() - 1)  # [N, positions.., C, kernel..], a view until it is indexed
    return windows[places].reshape(len(places[0]), layer.groups, -1)


def refit(layer: Any, norm: Any, sums: Sums, ridge: float, statistics: dict[_BatchNorm, Any]) -> bool:
    """Sets the layer, and the BatchNorm behind it so that both compute W z + c; False if that would be no better."""
    n, gram, cross, square, z, t = sums.moments(norm is not None or layer.bias is not None)
    tiny = torch.finfo(gram.dtype).tiny
    plain = layer.weight.to(gram).reshape(len(gram), -1, gram.shape[1])  # [g, o, d]
    power, fit = ((plain @ gram) * plain).sum(2), (plain * cross.mT).sum(2)
    start = plain * (fit / power.clamp_min(tiny))[:, :, None]
    pull = ridge * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(tiny)[:, None, None]
    factor, failed = torch.linalg.cholesky_ex(gram + pull * torch.eye(gram.shape[1]).to(gram))
    if bool(failed.any()):
        return False
    weight = torch.cholesky_solve(cross + pull * start.mT, factor).mT

    def error(w: Tensor) -> Tensor:
        return (square - 2 * (w * cross.mT).sum(2) + ((w @ gram) * w).sum(2)).sum()

    if not bool(error(weight) <= error(start) + 1e-9 * square.sum()):  # also where something is not finite
        return False
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    made = (weight @ z[:, :, None])[:, :, 0].flatten()
    if norm is not None:
        variance = ((weight @ gram) * weight).sum(2).flatten().clamp_min(0) * (n / max(n - 1, 1))
        set_statistics(statistics, norm, made if layer.bias is None else made + layer.bias.to(made), variance)
        norm.weight.copy_((norm.running_var + norm.eps).sqrt())
        norm.bias.copy_(t.flatten())
    elif layer.bias is not None:
        layer.bias.copy_(t.flatten() - made)
    return True


def set_statistics(statistics: dict[_BatchNorm, Any], norm: Any, mean: Tensor, variance: Tensor) -> None:
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    statistics[norm] = norm.running_mean.clone(), norm.running_var.clone()
