"""The commands that error messages name to install what is missing.

srigl-core is on no package index yet: its extras can be installed from a checkout or a wheel only.
What they name is on the index.
"""

from __future__ import annotations

__all__ = ["INSTALL_CHECKOUT", "install_command"]

INSTALL_CHECKOUT = "pip install -e . in the checkout, or pip install with the path of a wheel"

_PACKAGES = {
    "bench": ("matplotlib", "threadpoolctl", "typer", "rich"),
    "cli": ("typer", "rich"),
    "cupy": ("cupy-cuda13x",),
    "cupy12": ("cupy-cuda12x",),
    "equinox": ("equinox",),
    "flax": ("flax",),
    "jax": ("jax",),
    "lightning": ("lightning",),
    "onnx": ("onnx", "onnxscript"),
    "test": ("hypothesis", "pytest"),
    "torch": ("torch",),
    "transformers": ("transformers", "accelerate"),
}
"""Packages of the extras in pyproject.toml; a test compares the two."""


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra."""
    return f"pip install {' '.join(_PACKAGES[extra])}"
