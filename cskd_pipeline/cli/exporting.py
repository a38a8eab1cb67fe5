"""``export``: a student for others."""

from pathlib import Path
from typing import Annotated

import typer

from cskd_pipeline.cli.options import Outcome, one_of
from cskd_pipeline.cli.root import app
from cskd_pipeline.errors import UsageError

FORMATS = ("timm", "onnx")


@app.command(
    epilog="Example: cskd-pipeline export runs/tiny --out tiny-for-all --format timm --format onnx"
)
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="A student's .safetensors file, or a run's folder."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="An empty or new folder.")],
    format_: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="|".join(FORMATS),
            autocompletion=one_of(*FORMATS),
            help="timm: config.json and model.safetensors, which timm loads from the folder or the "
            "hub. onnx: model.onnx, the normalisation and the mean of the heads inside. May be "
            "given more than once; timm unless given.",
        ),
    ] = None,
    heads: Annotated[
        bool, typer.Option("--heads", help="The ONNX model also gives every head's own logits.")
    ] = False,
) -> Outcome:
    """Write a student for those without this package: for timm and the hub, or as ONNX.

    A README beside it says how it was trained and how to get its logits.
    """
    formats = tuple(dict.fromkeys(format_ or ("timm",)))
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise UsageError("no format of that name", found=unknown[0], expected=" or ".join(FORMATS))
    if heads and "onnx" not in formats:
        raise UsageError("--heads does nothing alone", action="give --format onnx too")
    from cskd_pipeline.tools.export import export_student as exporting

    return exporting.export_student(checkpoint, out, formats=formats, each_head=heads)
