"""Whose a model's name is: timm's, torchvision's, or that of the user's own factory."""

TORCHVISION = "torchvision:"
HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")  # timm's own


def is_factory(name: str) -> bool:
    """Return whether ``name`` is ``package.module:factory``, code that building the model runs."""
    return ":" in name and not name.startswith((TORCHVISION, *HUB_PREFIXES))
