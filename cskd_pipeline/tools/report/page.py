"""One self-contained HTML page: styles, script, images and data are inline.

Pages are Jinja2 templates in ``templates/``. Every value a template prints counts as foreign text:
made printable, cut to length and escaped, unless marked ``|safe`` (our own styles, scripts, plots
and base64). The page's content security policy allows only its own script, by digest, and
``data:`` images, so that markup that slipped through could neither run nor load anything.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cskd_pipeline.errors import printable
from cskd_pipeline.runtime.atomic import write_text
from cskd_pipeline.runtime.console import format_value, to_plain
from cskd_pipeline.tools.report.plot_files import Plot
from cskd_pipeline.tools.report.plots import css_style

PAGE = "index.html"
_PACKAGE = "cskd_pipeline.tools.report"
_LONGEST = 500  # characters of foreign text


@dataclass(frozen=True)
class PageOptions:
    """Options for a page.

    Args:
        shards, split: the images of the cache. Without them a page of runs has no predictions.
        cache: the cache that runs were trained from; None: the folder named by the first recipe.
        images: views in the gallery; None: 12 for a cache, 8 for runs.
        samples: views whose labels are counted; None: 2048 for a cache, 256 for runs.
        epochs: number of epochs on a cache page's slider; None: 300.
        export: one of ``plot_files.FORMATS``, in which each plot is also written to a file.
        accept_classes: match classes of shards, cache and students by number, whatever their names.
    """

    shards: str | None = None
    split: str | None = None
    cache: str | None = None
    images: int | None = None
    samples: int | None = None
    epochs: int | None = None
    export: str | None = None
    accept_classes: bool = False


def render(
    template: str,
    title: str,
    *,
    data: Mapping[str, Any],
    scripts: Sequence[str] = (),
    **context: Any,
) -> str:
    """Render a page.

    Args:
        template: a file in ``templates/`` that extends ``base.html``.
        title: foreign text.
        data: numbers and text that the scripts read, as JSON.
        scripts: files in ``templates/`` that the page runs, in order.
        context: values for the template.
    """
    script = "".join(map(_read, scripts))
    return (
        _environment()
        .get_template(template)
        .render(
            context,
            title=title,
            style=_read("page.css"),
            script=script,
            script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            data=to_plain(data),
        )
    )


def write_page(
    out: Path, document: str, plots: Iterable[Plot], export: str | None
) -> dict[str, Any]:
    """Write ``out/index.html``, and each plot to a file if ``export`` names a format.

    Returns:
        The paths and the page's size in bytes.
    """
    write_text(out / PAGE, document)
    exported = {} if export is None else {out / f"{plot.name}.{export}": plot for plot in plots}
    for path, plot in exported.items():
        plot.write(path)
    return {
        "page": str(out / PAGE),
        "bytes": len(document.encode()),
        "plots": [str(path) for path in exported],
    }


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(_PACKAGE),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["style_of"] = css_style
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def _finalize(value: object) -> object:
    """Return a value as printable text, unless it is already our own markup."""
    return value if hasattr(value, "__html__") else printable(format_value(value), _LONGEST)


def _read(name: str) -> str:
    return files(_PACKAGE).joinpath("templates", name).read_text(encoding="utf-8")
