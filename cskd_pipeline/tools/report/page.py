"""One self-contained HTML page: styles, script, pictures and data inside, and nothing from outside.

Text is foreign until it went through :func:`text`. The page's own policy (CSP) allows its one
script, by digest, and pictures in ``data:`` URLs; whatever might slip through could neither run nor
call home.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from matplotlib.figure import Figure

from cskd_pipeline.errors import printable
from cskd_pipeline.runtime.console import format_value, plain
from cskd_pipeline.tools.report import plots

_LONGEST = 500  # characters of a foreign text


def text(value: object) -> str:
    """``value`` as a person reads it, as HTML that shows just these characters."""
    return html.escape(printable(format_value(value), _LONGEST))


def asset(name: str) -> str:
    """A file beside this module, in ``assets/``."""
    return files("cskd_pipeline.tools.report").joinpath("assets", name).read_text(encoding="utf-8")


def page(title: str, parts: Iterable[str], *, data: Mapping[str, Any], script: str) -> str:
    """The whole page.

    Args:
        title: foreign text.
        parts: HTML, one element each.
        data: what the script reads, see ``shown`` in it.
        script: JavaScript, ours.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    policy += f"script-src 'sha256-{digest}'"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,">',
            f"<title>{text(title)}</title>",
            f"<style>{asset('page.css')}</style>",
            "</head>",
            "<body>",
            f"<header><h1>{text(title)}</h1></header>",
            "<main>",
            *parts,
            "</main>",
            f'<script type="application/json" id="data">{_json(data)}</script>',
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def section(title: str, *parts: str, name: str = "") -> str:
    """A section with its heading; ``name`` is its id."""
    identity = f' id="{name}"' if name else ""
    return f"<section{identity}><h2>{text(title)}</h2>{''.join(parts)}</section>"


def paragraph(value: object) -> str:
    return f"<p>{text(value)}</p>"


def definitions(pairs: Mapping[str, object]) -> str:
    """Names and values; values that are None are left out."""
    rows = [
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>"
        for name, value in pairs.items()
        if value is not None
    ]
    return f"<dl>{''.join(rows)}</dl>"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Numbers to the right; wide ones scroll inside their own box."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="table"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: object) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"<td{' class=number' if number else ''}>{text(value)}</td>"


def plot(figure: Figure, title: str, caption: str, description: str = "") -> str:
    """A plot in the page's own ink.

    Args:
        description: for those who cannot see it; the caption unless given.
    """
    drawn = plots.svg(figure, title, description or caption)
    return (
        f'<figure class="plot"><h3>{text(title)}</h3>{drawn}'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def picture(data: bytes, kind: str, alt: str) -> str:
    """An image inside the page; ``kind`` as in ``image/png``."""
    encoded = base64.b64encode(data).decode()
    return f'<img src="data:image/{kind};base64,{encoded}" alt="{text(alt)}">'


def _json(data: Mapping[str, Any]) -> str:
    """JSON that no HTML parser takes for anything but text."""
    dumped = json.dumps(plain(data), allow_nan=False, separators=(",", ":"))
    return dumped.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
