"""What a merge says of itself."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fxmerge.barrier import Barrier
from fxmerge.errors import InputError
from fxmerge.facts import Facts


def table(rows: Sequence[Sequence[object]], right: Sequence[int] = ()) -> str:
    """Rows as aligned text, the first one a heading; columns in ``right`` are set flush right."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(
            f"{c:>{w}}" if i in right else f"{c:<{w}}" for i, (c, w) in enumerate(zip(r, widths, strict=True))
        ).rstrip()
        for r in cells
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Report(Facts):
    """The merge in figures: ``print`` it, or look at it in a browser."""

    def html(self, barrier: Barrier | None = None) -> str:
        """One page with tables and pictures, which needs no other file and no network.

        Args:
            barrier: what ``evaluate_barrier`` found between the networks, to be drawn on the page.
        """
        from fxmerge.page import page

        return page(self, barrier)

    def to_html(self, path: str | Path, barrier: Barrier | None = None) -> Path:
        """Writes ``html(barrier)`` to a file and returns its path."""
        path = Path(path)
        partial = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
        try:
            partial.write_text(self.html(barrier), encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def _repr_html_(self) -> str:
        from fxmerge.page import summary

        return summary(self)

    def plot_depth(self, path: str | Path) -> None:
        """Writes a picture of every stage's costs with the chosen layers marked; needs matplotlib.

        Raises:
            InputError: no stages of different depth were aligned.
        """
        if not self.depth:
            raise InputError("there is no depth map: the networks had the same layers")
        from matplotlib.figure import Figure

        widest = max(len(link.long) for link in self.depth)
        rows = sum(len(link.short) + 2 for link in self.depth)
        figure = Figure(figsize=(3 + 0.6 * widest, 1 + 0.5 * rows), layout="constrained")
        panels = figure.subplots(len(self.depth), 1, squeeze=False)[:, 0]
        for axes, link in zip(panels, self.depth, strict=True):
            image = axes.imshow(link.costs.cpu().numpy(), cmap="viridis_r", aspect="auto")
            axes.plot(link.chosen, range(len(link.chosen)), "o-", color="tab:red", markersize=6)
            axes.set_yticks(range(len(link.short)), link.short)
            axes.set_xticks(range(len(link.long)), link.long, rotation=30, ha="right", rotation_mode="anchor")
            axes.set_title(f"network {link.parent + 1}", loc="left", fontsize="medium")
            figure.colorbar(image, ax=axes, label="cost")
        figure.savefig(path, dpi=150)

    def __str__(self) -> str:
        shares = ", ".join(f"{w:.3g} {n}" for n, w in zip(self.parents, self.weights, strict=True))
        lines = [f"merged {shares} by {self.alignment.method}", ""]
        rows: list[tuple[object, ...]] = [("class", "neurons", "match")]
        pinned: dict[str, int] = {}
        for k, c in enumerate(self.classes):
            if c.free:
                indent = "  " * (1 if c.parents else 0)
                quality = self.alignment.quality.get(k)
                rows.append((indent + c.name, c.size, "" if quality is None else f"{quality:.3f}"))
            elif c.pinned is not None:
                pinned[c.pinned] = pinned.get(c.pinned, 0) + c.size
        lines += [table(rows, right=(1, 2)), ""]
        lines.append(f"{self.classes.free} of {self.classes.total} neurons free; pinned:")
        lines += [f"  {n:>6}  {reason}" for reason, n in pinned.items()] or ["  none"]
        for link in self.depth:
            lines.append(str(link))
        for name, v in zip(self.parents, self.verifications, strict=False):
            lines.append(f"verified {name}: {v}")
        lines.append(f"repair: {self.repair}")
        if self.variance:
            before, after = (sorted(v[i] for v in self.variance.values()) for i in (0, 1))
            middle = len(before) // 2
            lines.append(
                f"variance of activations over the parents' (median, lowest of {len(before)} layers): "
                f"{before[middle]:.2f}, {before[0]:.2f} before repair; {after[middle]:.2f}, {after[0]:.2f} after"
            )
        lines += [f"note: {n}" for n in self.notes]
        lines.append("seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in self.seconds.items()))
        return "\n".join(lines)
