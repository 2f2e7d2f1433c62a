"""How figures and classes are written on a page."""

from __future__ import annotations

from collections.abc import Sequence

from fxmerge.facts import Facts
from fxmerge.markup import Html, element, joined

COLOURS = 6
"""Of classes; they differ for readers who are blind to some colours, too. The style sheet holds them."""
PATTERNS = 4


def amount(value: float | None, unit: str = "") -> str:
    """Three digits and a prefix of a thousand: 11.7 M."""
    if value is None:
        return "not counted"
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 999.5 or prefix == "P":
            break
        value /= 1000
    digits = f"{value:.0f}" if not prefix and value == int(value) else f"{value:#.3g}".rstrip(".")
    return f"{digits} {prefix}{unit}".rstrip()


def share(weight: float) -> str:
    return f"{weight:.3g}"


def shape(lengths: Sequence[int]) -> str:
    return " × ".join(map(str, lengths)) or "scalar"


def listed(names: Sequence[str], word: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"


def sharing(who: Sequence[int], parents: int) -> str:
    """In whom a fused neuron has counterparts: (0, 1) of 2 -> "shared by both"."""
    if len(who) == parents:
        return "shared by both" if parents == 2 else f"shared by all {parents}"
    if not who:
        return "read by none"
    names = listed([str(p + 1) for p in who])
    return f"from network {names} alone" if len(who) == 1 else f"shared by {names}"


def numbers(facts: Facts) -> dict[int, int]:
    """Class -> number on the page, 1 and up; free classes alone, in the order in which they show in the network."""
    place = {n.name: i for i, n in enumerate(facts.classes.traced.graph_module.graph.nodes)}
    free = [k for k, c in enumerate(facts.classes) if c.free and c.sites]

    def first(k: int) -> tuple[int, int]:
        return min((place.get(t.node, len(place)) for t in facts.classes[k].taps), default=len(place)), k

    return {k: i + 1 for i, k in enumerate(sorted(free, key=first))}


def chip(number: int | None) -> Html:
    """The mark of a class: colour, pattern and number."""
    if number is None:
        return element("span", element("i", class_="swatch pin", aria_hidden="true"), class_="chip")
    look = f"swatch c{(number - 1) % COLOURS} p{(number - 1) // COLOURS % PATTERNS}"
    return element("span", element("i", class_=look, aria_hidden="true"), number, class_="chip")


def mixture(shared: dict[tuple[int, ...], int], parents: int) -> Html:
    """A bar: how many fused neurons which of the parents share."""
    total = max(sum(shared.values()), 1)
    parts = [
        element(
            "i", class_=kind(who, parents), style=f"width:{100 * n / total:.3g}%", title=f"{n} {sharing(who, parents)}"
        )
        for who, n in shared.items()
    ]
    said = ", ".join(f"{n} {sharing(who, parents)}" for who, n in shared.items())
    return element("span", *parts, class_="mix", role="img", aria_label=said)


def kind(who: Sequence[int], parents: int) -> str:
    """The style of neurons that these parents share: all, some, or one (and which)."""
    return "all" if len(who) == parents else "some" if len(who) > 1 else f"only o{who[0] % 4}" if who else "none"


def quality(value: float | None) -> Html:
    """Match quality as a figure and a bar; a match worse than none has no bar."""
    if value is None:
        return element("span", "–", class_="dim")
    width = 100 * min(max(value, 0.0), 1.0)
    bar = element("span", element("i", style=f"width:{width:.3g}%"), class_="bar", aria_hidden="true")
    return joined([bar, f"{value:.3f}"])
