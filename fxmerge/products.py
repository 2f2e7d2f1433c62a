"""Inner products kept as what they are made of: as one matrix they may be larger than the networks they are of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxmerge.heap import LARGE, give_back

Factor = Callable[[], tuple[Tensor, Tensor]]
"""X [n, f] and Y [m, f], made when they are asked for."""

_COLUMNS = 256  # features that are in float64 at a time


def kept(factor: Factor) -> Factor:
    """Made now, and not again."""
    made = factor()
    return lambda: made


class Products:
    """The matrix X_1 Y_1' + X_2 Y_2' + .. [n, m], of which any part can be had in float64.

    Args:
        factors: of every term.
        shape: (n, m).
        scale: what the sum is multiplied by.
    """

    def __init__(self, factors: Sequence[Factor], shape: tuple[int, int], scale: float = 1.0) -> None:
        self.factors, self.shape, self.scale = factors, shape, scale
        self._diagonal: Tensor | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """[rows, columns]"""
        if len(rows) * len(columns) >= LARGE:
            give_back()
        total: Tensor | None = None
        for factor in self.factors:
            x, y = factor()
            x, y = _chosen(x, rows), _chosen(y, columns)
            if total is None:
                total = torch.zeros(len(rows), len(columns), dtype=torch.float64, device=x.device)
            for k in range(0, x.shape[1], _COLUMNS):
                total.addmm_(x[:, k : k + _COLUMNS].double(), y[:, k : k + _COLUMNS].double().T, alpha=self.scale)
            del x, y  # before the next ones are made
        assert total is not None
        return total

    def pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
        """[rows]: entries (rows[i], columns[i])."""
        if self._diagonal is not None and torch.equal(rows, columns):
            return self._diagonal[rows]
        total: Tensor | None = None
        for factor in self.factors:
            x, y = factor()
            x, y = _chosen(x, rows), _chosen(y, columns)
            for k in range(0, x.shape[1], _COLUMNS):
                part = torch.linalg.vecdot(x[:, k : k + _COLUMNS].double(), y[:, k : k + _COLUMNS].double())
                total = part if total is None else total.add_(part)
            del x, y
        assert total is not None
        return total.mul_(self.scale)

    def diagonal(self) -> Tensor:
        if self._diagonal is None:
            here = torch.arange(min(self.shape))
            self._diagonal = self.pairs(here, here)
        return self._diagonal

    def at(self, rows: Tensor, columns: Tensor) -> Products:
        """A part, kept in the same way."""

        def part(factor: Factor) -> Factor:
            return lambda: (_chosen((both := factor())[0], rows), _chosen(both[1], columns))

        found = Products([part(f) for f in self.factors], (len(rows), len(columns)), self.scale)
        if self._diagonal is not None and torch.equal(rows, columns):
            found._diagonal = self._diagonal[rows]
        return found

    def whole(self) -> Tensor:
        return self.block(*map(torch.arange, self.shape))

    def __truediv__(self, number: Tensor) -> Products:
        return Products(self.factors, self.shape, self.scale / float(number))


def _chosen(x: Tensor, rows: Tensor) -> Tensor:
    """Some rows; a view where they follow each other."""
    if len(rows) and bool((rows == torch.arange(len(rows), device=rows.device) + rows[0]).all()):
        return x[int(rows[0]) : int(rows[0]) + len(rows)]
    return x.index_select(0, rows.to(x.device))


def whole(matrix: Tensor | Products) -> Tensor:
    return matrix.whole() if isinstance(matrix, Products) else matrix


def part(matrix: Tensor | Products, rows: Tensor, columns: Tensor) -> Tensor:
    """[rows, columns]"""
    if isinstance(matrix, Products):
        return matrix.block(rows, columns)
    return matrix[rows.to(matrix.device)][:, columns.to(matrix.device)]
