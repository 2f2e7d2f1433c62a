"""The tables of the page, each a section or a part of one."""

from __future__ import annotations

from fxmerge.barrier import Barrier
from fxmerge.facts import Facts
from fxmerge.markup import Html, element, table
from fxmerge.page.figures import costs
from fxmerge.page.layers import Layer, side_by_side
from fxmerge.page.words import amount, chip, kind, listed, mixture, numbers, quality, shape, share, sharing


def networks(facts: Facts) -> Html:
    """The parents and the result: shares, sizes, and what the checks said."""
    *parents, result = facts.sizes
    mean = [sum(getattr(s, f) or 0 for s in parents) / len(parents) for f in ("parameters", "bytes", "flops")]

    def cells(size: object, compare: bool) -> list[object]:
        found: list[object] = []
        for unit, name, average in zip(("", "B", ""), ("parameters", "bytes", "flops"), mean, strict=True):
            value = getattr(size, name)
            ratio = f" ({value / average:.2f}×)" if compare and value is not None and average else None
            found.append(element("span", amount(value, unit), element("span", ratio, class_="dim") if ratio else None))
        return found

    rows: list[list[object]] = []
    for p, (name, weight, size) in enumerate(zip(facts.parents, facts.weights, parents, strict=True)):
        checked = str(facts.verifications[p]) if facts.verifications else "switched off"
        rows.append([f"network {p + 1}: {name}", share(weight), *cells(size, False), checked])
    rows.append(["result", "", *cells(result, True), ""])
    header = ("network", "share", "parameters", "size", "FLOPs", "symmetry checked on it")
    return table(header, rows, right=(1, 2, 3, 4), class_="networks")


def networks_note(facts: Facts) -> str:
    traced = facts.classes.traced
    inputs = [shape(t.shape) for t in (*traced.args, *traced.kwargs.values()) if hasattr(t, "shape")]
    return (
        f"FLOPs of one run on the example inputs ({', '.join(inputs)}): matrix products, convolutions and attention, a "
        "multiplication and an addition counting as two. In brackets: over the mean of the parents. The check draws a "
        "random element of the inferred symmetry and applies it in float64; the output must not move."
    )


def classes(facts: Facts) -> Html:
    """Every class that may move: neurons in parents and result, how they were coupled, how well they match."""
    number = numbers(facts)
    rows = []
    for k in sorted(number, key=number.__getitem__):
        c, widths = facts.classes[k], facts.widths(k)
        blocks = [str(number[p]) for p in c.parents if p in number]
        inside = element("span", f" in blocks of {listed(blocks)}", class_="dim") if blocks else None
        rows.append(
            [
                chip(number[k]),
                element("span", c.name, inside),
                " + ".join(map(str, widths)),
                facts.alignment.couplings[k].size,
                mixture(facts.shared[k], len(widths)),
                quality(facts.alignment.quality.get(k)),
            ]
        )
    header = ("class", "first site", "neurons in the parents", "in the result", "coupling", "match quality")
    return table(header, rows, right=(2, 3, 5), class_="classes")


def plain_classes(facts: Facts) -> Html:
    """The same without colours and bars."""
    rows = []
    for k, c in enumerate(facts.classes):
        if c.free and c.sites:
            widths, value = facts.widths(k), facts.alignment.quality.get(k)
            said = ", ".join(f"{n} {sharing(who, len(widths))}" for who, n in facts.shared[k].items())
            size = facts.alignment.couplings[k].size
            rows.append([c.name, " + ".join(map(str, widths)), size, said, "" if value is None else f"{value:.3f}"])
    return table(
        ("class", "neurons in the parents", "in the result", "coupling", "match quality"), rows, right=(1, 2, 4)
    )


def legend(facts: Facts) -> Html:
    """What the parts of a coupling's bar mean, for those that occur."""
    parents = len(facts.parents)
    known = {who for k in numbers(facts) for who in facts.shared[k]}
    keys = {
        kind(who, parents): sharing(who, parents) if len(who) != 1 else f"from network {who[0] + 1} alone"
        for who in sorted(known)
    }
    if "some" in keys:
        keys["some"] = "shared by some"
    parts = [
        element("span", element("span", element("i", class_=style, style="width:100%"), class_="mix key"), said)
        for style, said in sorted(keys.items())
    ]
    return element("p", *parts, class_="legend")


def pinned(facts: Facts) -> Html | None:
    """Why neurons stay in place: reasons, how many neurons, and where."""
    reasons: dict[str, list[int]] = {}
    for k, c in enumerate(facts.classes):
        if c.pinned is not None:
            reasons.setdefault(c.pinned, []).append(k)
    if not reasons:
        return None
    rows = []
    for reason, found in reasons.items():
        names = [facts.classes[k].name for k in found]
        where = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        rows.append([reason, sum(facts.classes[k].size for k in found), where])
    return table(("reason", "neurons", "classes, by first site"), rows, right=(1,))


def depth(facts: Facts) -> Html:
    """The layers of the parents beside those of the result, stage by stage, and what the choice was made from."""
    parts: list[Html] = []
    header = ("result", *(f"network {p + 1}" for p in range(len(facts.parents))))
    for rows in side_by_side(facts):
        body = [[row.unit, *(_layer(row.unit, p) for p in row.parents)] for row in rows]
        parts.append(table(header, body, class_="layers"))
    for link in facts.depth:
        said = (
            f"Costs of pairs, network {link.parent + 1}: {link.short[0]} .. against {link.long[0]} .. {link.long[-1]}"
        )
        parts.append(element("details", element("summary", said), element("div", costs(link), class_="wide")))
    return element("div", *parts, class_="depth")


def _layer(unit: str, layer: Layer | None) -> Html:
    if layer is None:
        return element("span", unit, class_="layer same")
    cost = "" if layer.cost is None else f" cost {layer.cost:.2f}"
    return element("span", layer, element("span", cost, class_="dim"), class_=f"layer {layer.kind}")


def timings(facts: Facts) -> Html:
    """Seconds per step, with bars."""
    longest = max(facts.seconds.values(), default=0) or 1
    rows = [
        (step, f"{s:.2f}", element("span", element("i", style=f"width:{100 * s / longest:.3g}%"), class_="bar wide"))
        for step, s in facts.seconds.items()
    ]
    return table(("step", "seconds", ""), [*rows, ("all", f"{sum(facts.seconds.values()):.2f}", "")], right=(1,))


def barriers(barrier: Barrier) -> Html:
    """Loss, and metric if there is one, at every place on the line."""
    columns = [barrier.t, barrier.loss, *([barrier.metric] if barrier.metric else [])]
    rows = [[f"{v:.5g}" for v in row] for row in zip(*columns, strict=True)]
    return table(("t", "loss", "metric")[: len(columns)], rows, right=(0, 1, 2))


def variances(facts: Facts) -> Html:
    rows = [(name, f"{a:.3f}", f"{b:.3f}") for name, (a, b) in facts.variances.items()]
    return table(("layer", "before repair", "after"), rows, right=(1, 2))
