"""READMEs for hubs: Jinja2 templates, in which the text of others stays text.

Whatever a template prints is escaped, unless the template marks it ``|safe``: code, and what is
Markdown already.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cskd_pipeline.errors import printable


def text(value: object) -> str:
    """Return ``value`` as Markdown that shows just these characters, on one line."""
    if hasattr(value, "__html__"):  # of |safe
        return str(value)
    line = re.sub(r"([\\`*_\[\]{}()#+!|~$@]|:(?=//))", r"\\\1", printable(value, 2000).strip())
    line = re.sub(r"^(\d+)([.)])(?= )", r"\1\\\2", line)  # of a list
    line = re.sub(r"^([-=])", r"\\\1", line)  # of a list, or a rule
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def fenced(block: str) -> str:
    """Return code for a fence, in which only another fence would be read."""
    return block.replace("```", "'''")


def front_matter(fields: Mapping[str, Any]) -> str:
    """Return YAML; strings as JSON has them, which YAML reads alike."""
    lines = (f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items())
    return "\n".join(lines)


def render(template: str, **context: Any) -> str:
    """Return the README that a file in ``templates/`` and its context give."""
    environment = Environment(
        loader=PackageLoader("cskd_pipeline.tools"),
        finalize=text,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(context)
