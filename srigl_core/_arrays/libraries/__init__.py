"""Arrays of other libraries: inputs are read without a copy, results have the caller's type.

Each library has one file. No library is imported here: a caller who passes its arrays has imported
it, so it is in ``sys.modules``.
"""

from srigl_core._arrays.libraries.array_library import ArrayLibrary
from srigl_core._arrays.libraries.lookup import as_array, common_library, device_of, library_of

__all__ = ["ArrayLibrary", "as_array", "common_library", "device_of", "library_of"]
