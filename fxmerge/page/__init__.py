"""A merge as one page: tables first, figures where people would rather look than read.

The page needs no other file and no network, and its own policy forbids both. Whatever comes from the network is
escaped, and no script runs but the one whose hash the policy holds.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files

from fxmerge.barrier import Barrier
from fxmerge.facts import Facts
from fxmerge.markup import Html, element, joined
from fxmerge.page import figures, tables
from fxmerge.page.picture import picture
from fxmerge.page.words import amount, share


@cache
def _part(name: str) -> Html:
    return Html(files(__package__).joinpath(name).read_text(encoding="utf-8"))


def page(facts: Facts, barrier: Barrier | None = None) -> str:
    """The whole page; the same for the same facts."""
    script = _part("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    head = joined(
        [
            Html('<meta charset="utf-8">'),
            Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
            Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html('<meta name="color-scheme" content="light dark">'),
            Html('<link rel="icon" href="data:,">'),
            element("title", _title(facts)),
            Html(f"<style>{_part('page.css')}</style>"),
        ]
    )
    data = Html(json.dumps(picture(facts), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))
    body = joined(
        [
            _header(facts),
            element("main", *_sections(facts, barrier)),
            element("script", data, type="application/json", id="data"),
            element("script", script),
        ]
    )
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>{body}</body>\n</html>\n'


def summary(facts: Facts) -> str:
    """The tables alone, without a script, for notebooks."""
    rows = tables.pinned(facts)
    parts = [
        element("p", element("strong", _title(facts))),
        tables.networks(facts),
        element("details", element("summary", _free(facts)), tables.plain_classes(facts), rows),
        element("p", f"repair: {facts.repair}"),
        *(element("p", f"note: {note}") for note in facts.notes),
    ]
    return element("div", *parts)


def _title(facts: Facts) -> str:
    parents = ", ".join(f"{share(w)} {n}" for n, w in zip(facts.parents, facts.weights, strict=True))
    return f"Merged {parents} by {facts.alignment.method}"


def _free(facts: Facts) -> str:
    return f"{facts.classes.free} of {facts.classes.total} neurons free"


def _header(facts: Facts) -> Html:
    result = facts.sizes[-1]
    parents = sum(s.parameters for s in facts.sizes[:-1]) / len(facts.parents)
    quality = [(facts.classes[k].size, q) for k, q in facts.alignment.quality.items()]
    total = sum(n for n, _ in quality)
    cards = [
        ("networks", str(len(facts.parents))),
        ("parameters", amount(result.parameters)),
        ("size over a parent's", f"{result.parameters / parents:.2f}×"),
        ("mean match quality", f"{sum(n * q for n, q in quality) / total:.3f}" if total else "–"),
        ("neurons free", f"{100 * facts.classes.free / max(facts.classes.total, 1):.0f} %"),
        ("symmetry", _checked(facts)),
        ("seconds", f"{sum(facts.seconds.values()):.1f}"),
    ]
    items = [element("div", element("dt", name), element("dd", said)) for name, said in cards]
    method = facts.alignment.method
    names = ", ".join(f"{share(w)} × {n}" for n, w in zip(facts.parents, facts.weights, strict=True))
    return element(
        "header",
        element("h1", f"{names}"),
        element("p", "merged by ", element("code", method), f"; repair: {facts.repair}"),
        element("dl", *items, class_="cards"),
    )


def _checked(facts: Facts) -> str:
    if not facts.verifications:
        return "not checked"
    return "verified" if all(v.ok for v in facts.verifications) else "FAILED"


def _folded(rows: Html) -> Html:
    return element("details", element("summary", "As a table"), element("div", rows, class_="tall"))


def _section(name: str, title: str, *content: object) -> Html:
    heading = element("h2", title, id=name)
    return element("section", heading, *content, aria_labelledby=name)


def _sections(facts: Facts, barrier: Barrier | None) -> list[Html]:
    found = [
        _section(
            "networks",
            "Networks",
            element("div", tables.networks(facts), class_="wide"),
            element("p", tables.networks_note(facts), class_="dim"),
        ),
        _section("graph", "The fused network", _part("picture.html")),
    ]
    if facts.depth:
        said = "Which layers of the parents stand for which of the result; what a parent lacks passes on what it reads."
        found.append(_section("depth", "Layers side by side", element("p", said), tables.depth(facts)))
    found.append(
        _section(
            "classes",
            "Neurons that may stand in for each other",
            element("p", f"{_free(facts)}. A class is a set of axes that one permutation moves together."),
            tables.legend(facts),
            element(
                "div", tables.classes(facts), class_="wide tall", tabindex="0", role="region", aria_label="classes"
            ),
        )
    )
    if (pinned := tables.pinned(facts)) is not None:
        found.append(_section("pinned", "Pinned, and why", element("div", pinned, class_="wide")))
    drawn = figures.variances(facts.variances)
    if drawn is not None:
        said = "Variance of the fused network's activations over the parents' mean: 1 is as it should be."
        key = element(
            "p",
            element("i", class_="dot before"),
            "before repair",
            element("i", class_="dot after"),
            "after",
            class_="legend",
        )
        rows = _folded(tables.variances(facts))
        found.append(
            _section("repair", "Repair", element("p", f"{facts.repair}. {said}"), key, element("figure", drawn), rows)
        )
    if barrier is not None:
        said = f"Loss barrier {barrier.barrier:.4g}: how far the loss rises above the straight line between its ends."
        found.append(
            _section(
                "barrier",
                "Between the two networks",
                element("p", said),
                figures.barriers(barrier),
                _folded(tables.barriers(barrier)),
            )
        )
    if facts.notes:
        found.append(_section("notes", "Notes", element("ul", *(element("li", n) for n in facts.notes))))
    found.append(_section("seconds", "Time", element("div", tables.timings(facts), class_="wide")))
    return found
