"""The page on the shell: its files are written, its commands run, its outputs compared."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from snippets import run_samples

PAGE = Path(__file__).resolve().parents[2] / "docs" / "shell.md"
SESSION = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)


def plain(text):
    """Leave out white space and speed-ups, which depend on the processor."""
    return re.sub(r"\d+\.\d+x", "#x", " ".join(text.split()))


def commands(session):
    """Yield each command of a session and what it prints."""
    for part in session.split("$ ")[1:]:
        command, _, printed = part.partition("\n")
        yield command, printed


def test_the_page_is_what_happens(tmp_path, monkeypatch):
    run_samples(PAGE, tmp_path, monkeypatch)
    n_done = 0
    for session in SESSION.findall(PAGE.read_text()):
        for command, printed in commands(session):
            program, *arguments = shlex.split(command)
            if program == "cc" and shutil.which("cc") is None:
                return
            words = [sys.executable, "-m", "srigl_core.cli"] if program == "srigl" else [program]
            done = subprocess.run(
                [*words, *arguments],
                cwd=tmp_path,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert plain(done.stdout) == plain(printed), command
            n_done += 1
    assert n_done == 7
