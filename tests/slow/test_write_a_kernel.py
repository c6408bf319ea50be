"""The page on writing a kernel: its files are written, its commands run, its outputs compared."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "write-a-kernel.md"
BLOCK = re.compile(r'^```(\w+)(?: title="(.*?)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
INSTALL = "pip install --quiet --no-index --no-build-isolation --no-deps --target site ."


def run(command, folder):
    """Run a command of the page; an installation goes to a folder that is found first."""
    words = shlex.split(INSTALL if command == "pip install ." else command)
    if words[0] in ("srigl", "pip"):
        words = ["-m", {"srigl": "srigl_core.cli"}.get(words[0], words[0]), *words[1:]]
    words = [sys.executable, *words[words[0] == "python" :]]
    return subprocess.run(
        [*words, *(["--seconds", "0"] if "bench" in words else [])],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "site"), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def plain(text):
    """Leave out the white space, and the numbers of a problem: these differ among Hypotheses."""
    text = " ".join(text.split())
    return re.sub(r"-?\d+(\.\d*)?(e[-+]\d+)?", "#", text)


@pytest.mark.timeout(900)
def test_the_page_is_what_happens(tmp_path):
    done, commands = None, 0
    for language, title, content in BLOCK.findall(PAGE.read_text()):
        if title:
            (tmp_path / title).write_text(content)
        elif language == "sh":
            for command in content.splitlines():
                done = run(command, tmp_path)
                commands += 1
                assert "Traceback" not in done.stderr, done.stderr
                assert not command.startswith("pip") or done.returncode == 0, done.stderr
        elif language == "text" and done is not None:
            for line in content.replace("...\n", "").splitlines():
                is_exact = "passed" in line or "checks run" in line
                same = (lambda part: " ".join(part.split())) if is_exact else plain
                assert same(line) in same(done.stdout), (line, done.stdout, done.stderr)
            assert done.returncode == int("expected" in content or "Error" in content)
            done = None
    assert commands == 10
