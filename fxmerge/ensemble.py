"""The ensemble of the parents: the ceiling that one network is measured against."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxmerge.errors import InputError
from fxmerge.ranks import summed_numbers
from fxmerge.running import evaluating
from fxmerge.stats import Feed


class Ensemble(nn.Module):
    """The weighted mean of several networks' outputs; costs as much as all of them.

    Args:
        models: take the same inputs and give outputs of the same shapes.
        weights: shares (default: equal).

    Example:
        >>> fxmerge.Ensemble(model_a, model_b)(x)
    """

    def __init__(self, *models: nn.Module, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(models) if weights is None else list(weights)
        if not models or len(weights) != len(models) or min(weights) < 0 or not sum(weights) > 0:
            raise InputError(f"an ensemble of {len(models)} networks with weights {weights}: give one share for each")
        self.models = nn.ModuleList(models)
        self.weights = [w / sum(weights) for w in weights]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The mean of all networks' outputs on these inputs; tensors that are no floats come from the first."""
        outputs = [m(*args, **kwargs) for m in self.models]

        def mean(*leaves: Any) -> Any:
            if not (isinstance(leaves[0], Tensor) and leaves[0].is_floating_point()):
                return leaves[0]
            return sum(w * x for w, x in zip(self.weights, leaves, strict=True))

        return pytree.tree_map(mean, *outputs)


def disagreement(
    module: nn.Module, parents: Sequence[nn.Module], weights: Sequence[float], batches: Iterable[Any], feed: Feed
) -> float:
    """Squared error of a merged network's outputs, at their best scale, over the variance of what they should be.

    That is the parents' weighted mean or, where the merged network returns more outputs, each parent's own. The scale
    is left free since averaging shrinks outputs, and what they say does not change with it.
    """
    square = product = target_square = spread = 0.0
    with evaluating(module, *parents):
        for batch in batches:
            args, kwargs = feed(batch)
            own = _leaves(module(*args, **kwargs))
            each = [_leaves(p(*args, **kwargs)) for p in parents]
            if len(own) == len(each[0]):
                targets = [sum(w * x for w, x in zip(weights, xs, strict=True)) for xs in zip(*each, strict=True)]
            else:
                targets = [x for outputs in each for x in outputs]
            for x, y in zip(own, targets, strict=True):
                assert isinstance(y, Tensor)
                x, y = x.double(), y.double()
                square += float((x * x).sum())
                product += float((x * y).sum())
                target_square += float((y * y).sum())
                spread += float((y - y.mean(0)).square().sum())
    square, product, target_square, spread = summed_numbers([square, product, target_square, spread])
    return (target_square - product**2 / max(square, 1e-30)) / max(spread, 1e-30)


def _leaves(outputs: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]
