"""The exceptions this library raises on purpose.

Every message names what was given, the rule it breaks, and what to do instead.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailableError",
    "FileFormatError",
    "SriglError",
    "ValueTypeError",
]


class SriglError(ValueError):
    """Base of every error raised deliberately by srigl_core."""


class ValueTypeError(SriglError, TypeError):
    """An argument has the wrong type or dtype."""


class BackendUnavailableError(SriglError, ImportError):
    """A backend or an optional package was asked for and cannot be used here."""


class FileFormatError(SriglError):
    """A file does not hold what it claims to hold."""
