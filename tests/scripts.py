"""Run a script in a process of its own, as a user would."""

import os
import subprocess
import sys


def run_script(path, *arguments, folder, options=(), expected=0):
    """Return what a script prints when it runs in `folder` and ends with the code `expected`."""
    done = subprocess.run(
        [sys.executable, *options, str(path), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout
