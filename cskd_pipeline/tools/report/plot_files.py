"""Figures as SVG inside a page, or as SVG or PNG files.

In a page a figure's ink becomes ``currentColor`` and its background nothing, so that text and axes
follow the page's light or dark scheme; files are on white, with the title above.
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
        name: of its file, without ending.
        description: for those who cannot see it; the caption unless given.
    """

    name: str
    title: str
    figure: Figure
    caption: str = ""
    description: str = ""

    @property
    def names(self) -> list[str]:
        """Return the legend's names, in the order of their styles; none of a single curve."""
        return [text.get_text() for legend in self.figure.legends for text in legend.get_texts()]

    def svg(self) -> str:
        """Return an ``<svg>`` as wide as its column in a page, in whose ink it is, and which has
        one key for all plots instead of legends.
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
        """Write the plot to a file, in the format of its ending, whole or not at all."""
        ending = path.suffix.lower().removeprefix(".")
        if ending not in FORMATS:
            raise OutputError(
                "a plot cannot be written in this format",
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
                    nobody = {"Software": None}
                    self.figure.savefig(
                        buffer, format="png", dpi=200, facecolor="white", metadata=nobody
                    )
            finally:
                axes.set_title("", loc="left")
        write_bytes(path, buffer.getvalue())

    def _tree(self, *, background: str) -> ET.Element:
        """Return the figure as SVG, without date and style sheet, with texts for screen readers.

        Ids that nothing points at are left out. The others are digests of what they name and of
        the title, so those of several figures can stand in one page.
        """
        buffer = io.BytesIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with settings(), matplotlib.rc_context({"svg.hashsalt": printable(self.title)}):
            self.figure.savefig(buffer, format="svg", facecolor=background, metadata=nothing)
        root = ET.fromstring(buffer.getvalue())
        for parent in list(root.iter()):
            for style in parent.findall(f"{{{_SVG}}}style"):
                parent.remove(style)
        root.set("style", "stroke-linejoin: round; stroke-linecap: butt")  # as the style sheet
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
