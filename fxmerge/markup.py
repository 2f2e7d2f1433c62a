"""HTML and SVG from Python: whatever is not markup already is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Html(str):
    """Text that is markup and stays as it is."""

    __slots__ = ()


def element(name: str, *content: object, **attributes: object) -> Html:
    """``<name ..>content</name>``; of attributes, ``_`` stands for ``-``, a last one is dropped, None leaves it out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>{joined(content)}</{name}>")


def joined(content: Iterable[object]) -> Html:
    """Parts side by side; None is nothing."""
    return Html("".join(c if isinstance(c, Html) else html.escape(str(c)) for c in content if c is not None))


def table(
    header: Sequence[object], rows: Iterable[Sequence[object]], right: Sequence[int] = (), **attributes: object
) -> Html:
    """Rows under a header, whose first column names them; columns in ``right`` hold figures."""
    aligned = ["n" if i in right else None for i in range(len(header))]
    head = element("tr", *(element("th", h, scope="col", class_=a) for h, a in zip(header, aligned, strict=True)))
    body = [
        element(
            "tr",
            *(
                element("td" if i else "th", cell, class_=a, scope=None if i else "row")
                for i, (cell, a) in enumerate(zip(row, aligned, strict=True))
            ),
        )
        for row in rows
    ]
    return element("table", element("thead", head), element("tbody", *body), **attributes)
