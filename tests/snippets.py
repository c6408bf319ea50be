"""The Python samples of a page, run in order as a reader would run them.

- ```` ```python ```` is run.
- ```` ```python title="name.py" ````, and other languages with such a title, are files; they are
  written to the working directory, where samples import them.
- ``<!-- python ... -->`` is run too, but not shown: it stands for what a reader has, such as data.
- ```` ```python title="not run" ```` is not run; the title says so to the reader.
"""

import re
from pathlib import Path

_BLOCK = re.compile(
    r"^(?:```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<shown>.*?)^```"
    r"|<!-- python\n(?P<hidden>.*?)^-->)",
    re.MULTILINE | re.DOTALL,
)
_FRAMEWORK = re.compile(
    r"^(?:import|from) (?:srigl_core\.)?(equinox|flax|jax|optax|orbax|torch|transformers)\b",
    re.MULTILINE,
)


def shown(page):
    """Return the samples of a page that are run and that a reader sees."""
    return [match["shown"] for match in _BLOCK.finditer(page.read_text()) if _is_shown(match)]


def frameworks(page):
    """Return the frameworks that the samples of a page import."""
    found = _BLOCK.finditer(page.read_text())
    samples = [match["hidden"] or match["shown"] for match in found if _is_run(match)]
    return sorted(set(_FRAMEWORK.findall("\n".join(samples))))


def run_samples(page, folder, monkeypatch):
    """Run the samples of a page in a folder of their own."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    namespace = {"__name__": page.stem}
    for match in _BLOCK.finditer(page.read_text()):
        if _is_run(match):
            sample = match["hidden"] or match["shown"]
            exec(compile(sample, str(page), "exec"), namespace)
        elif match["title"] and re.fullmatch(r"\w+\.\w+", match["title"]):
            Path(match["title"]).write_text(match["shown"])


def _is_shown(match):
    return match["language"] == "python" and not match["title"]


def _is_run(match):
    return match["hidden"] is not None or _is_shown(match)
