"""Arrays of other libraries: read where they lie, and results given back as what came in.

Each library has one file with all that is particular to its arrays. None is imported here: whoever
hands in an array of a library has imported it, so that it is in ``sys.modules``.
"""

from srigl_core._arrays.libraries.library import ArrayLibrary
from srigl_core._arrays.libraries.lookup import borrowed, common_library, device_of, library_of

__all__ = ["ArrayLibrary", "borrowed", "common_library", "device_of", "library_of"]
