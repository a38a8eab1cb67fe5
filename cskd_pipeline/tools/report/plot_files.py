"""Figures as inline SVG in a page, or as SVG or PNG files.

In a page the ink is ``currentColor`` and the background transparent, so that text and axes follow
the page's light or dark scheme. Files have a white background and a title.
"""

import io
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from cskd_pipeline.errors import OutputError, printable
from cskd_pipeline.runtime.atomic import write_bytes
from cskd_pipeline.tools.report.plots import INK, settings

FORMATS = ("png", "svg")
_SVG = "http://www.w3.org/2000/svg"


@dataclass(frozen=True)
class Plot:
    """A figure and its texts.

    Args:
        name: file name, without ending.
        description: text for screen readers; defaults to the caption.
    """

    name: str
    title: str
    figure: Figure
    caption: str = ""
    description: str = ""

    @property
    def names(self) -> list[str]:
        """Return the names in the legend, in order of style; empty for a single curve."""
        return [text.get_text() for legend in self.figure.legends for text in legend.get_texts()]

    def svg(self) -> str:
        """Return an ``<svg>`` that fills its column, in the page's ink.

        It has no legend: a page shows one key for all plots.
        """
        legends = [*self.figure.legends]
        self.figure.legends.clear()
        try:
            root = self._tree(background="none")
        finally:
            self.figure.legends.extend(legends)
        for element in root.iter():
            if "style" in element.attrib:
                element.set("style", element.attrib["style"].replace(INK, "currentColor"))
        for name in ("width", "height"):
            root.attrib.pop(name, None)
        return ET.tostring(root, encoding="unicode")

    def write(self, path: Path) -> None:
        """Write the plot to a file atomically, in the format of its ending."""
        ending = path.suffix.lower().removeprefix(".")
        if ending not in FORMATS:
            raise OutputError(
                "unsupported plot format",
                where=path,
                found=path.suffix or "no ending",
                expected=" or ".join(f".{name}" for name in FORMATS),
            )
        axes, buffer = self.figure.axes[0], io.BytesIO()
        with settings():
            axes.set_title(printable(self.title, 70), loc="left")
            try:
                if ending == "svg":
                    root = self._tree(background="white")
                    ET.ElementTree(root).write(buffer, encoding="utf-8", xml_declaration=True)
                else:
                    metadata = {"Software": None}
                    self.figure.savefig(
                        buffer, format="png", dpi=200, facecolor="white", metadata=metadata
                    )
            finally:
                axes.set_title("", loc="left")
        write_bytes(path, buffer.getvalue())

    def _tree(self, *, background: str) -> ET.Element:
        """Return the figure as SVG with texts for screen readers, without date and style sheet.

        Ids without a reference are removed. The others are hashes salted with the title, so that
        several figures can share a page.
        """
        buffer = io.BytesIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with settings(), matplotlib.rc_context({"svg.hashsalt": printable(self.title)}):
            self.figure.savefig(buffer, format="svg", facecolor=background, metadata=metadata)
        root = ET.fromstring(buffer.getvalue())
        for parent in list(root.iter()):
            for style in parent.findall(f"{{{_SVG}}}style"):
                parent.remove(style)
        root.set("style", "stroke-linejoin: round; stroke-linecap: butt")  # as in the style sheet
        text = ET.tostring(root, encoding="unicode")
        for element in root.iter():
            element.tag = element.tag.rpartition("}")[2]
            element.attrib = {key.rpartition("}")[2]: value for key, value in element.items()}
            if f"#{element.get('id')}" not in text:
                element.attrib.pop("id", None)
        root.set("xmlns", _SVG)
        root.set("role", "img")
        root.set("aria-label", printable(self.title))
        texts = {"title": self.title, "desc": self.description or self.caption}
        for number, (tag, words) in enumerate(texts.items()):
            if words:
                element = ET.Element(tag)
                element.text = printable(words, 2000)
                root.insert(number, element)
        return root
