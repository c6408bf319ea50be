"""``python -m srigl_core.cli`` is ``srigl``."""

from srigl_core.cli import main

if __name__ == "__main__":
    main()
