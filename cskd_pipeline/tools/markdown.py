"""Render READMEs for the Hub from Jinja2 templates, escaping foreign text.

Every value is escaped unless the template marks it ``|safe``, as it does code and Markdown.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cskd_pipeline.errors import printable


def escape(value: object) -> str:
    """Return one line of Markdown that displays ``value`` literally."""
    if hasattr(value, "__html__"):  # marked |safe
        return str(value)
    line = re.sub(r"([\\`*_\[\]{}()#+!|~$@]|:(?=//))", r"\\\1", printable(value, 2000).strip())
    line = re.sub(r"^(\d+)([.)])(?= )", r"\1\\\2", line)  # list
    line = re.sub(r"^([-=])", r"\\\1", line)  # list or rule
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def escape_fence(block: str) -> str:
    """Return ``block`` for a code fence, which only another fence could end."""
    return block.replace("```", "'''")


def front_matter(fields: Mapping[str, Any]) -> str:
    """Return ``fields`` as YAML, with JSON values, which are valid YAML."""
    lines = (f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items())
    return "\n".join(lines)


def render(template: str, **context: Any) -> str:
    """Render a file of ``templates/`` with its context."""
    environment = Environment(
        loader=PackageLoader("cskd_pipeline.tools"),
        finalize=escape,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(context)
