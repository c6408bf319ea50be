"""Train on handwritten digits, dense and sparse; save, load and time the result.

``make demo``, or ``python examples/demo --help``. Needs the extra ``demo``.
"""

import os
import signal
import sys
from importlib.util import find_spec

if __name__ == "__main__":
    # One thread for everything: training runs are spread over processes, and inference is timed on
    # one thread. NumPy and Numba read these variables when they are imported.
    for library in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
        os.environ[f"{library}_NUM_THREADS"] = "1"
    os.environ["VECLIB_MAXIMUM_THREADS"] = "1"

    missing = [
        name
        for name in ("srigl_core", "sklearn", "matplotlib", "rich", "joblib")
        if not find_spec(name)
    ]
    if missing:
        sys.exit(
            f"error: the demo cannot import {', '.join(missing)}; "
            f'install its packages with: pip install -e ".[demo]"'
        )
    try:
        from run import main

        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
