"""Makes the notebooks of their scripts: `python -m colabs.build [NAME ...]`.

A script, `colabs/scripts/NAME.py`, has cells that begin with `# %%`, text with `# %% [markdown]`,
as editors and jupytext read them. `colabs/NAME.ipynb` is that with a cell that installs walt_jax
where it is not, and the outputs of a run from top to bottom. Scripts are what is edited. Needs the
extra `colabs`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from walt_jax import cli
from walt_jax.errors import UserError

FOLDER = Path(__file__).resolve().parent
SCRIPTS = FOLDER / "scripts"
REPOSITORY = "OWNER/walt_jax"  # where Colab finds the notebooks: the fork's, if it is one
_MARK = "# %%"
_INSTALL = f"""# Installs walt_jax where it is not, for the TPU, the GPU or the CPU that is there.
import glob
import importlib.util
import shutil
import subprocess
import sys

if importlib.util.find_spec("walt_jax") is None:
    tpu, gpu = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/*"), shutil.which("nvidia-smi")
    extra = "[tpu]" if tpu else "[cuda]" if gpu else ""
    source = f"walt_jax{{extra}} @ git+https://github.com/{REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source], check=True)"""


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and writes the notebooks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", help="such as 01_quickstart (default: all)")
    parser.add_argument("--timeout", type=int, default=300, help="seconds of a notebook")
    args = parser.parse_args(argv)
    for name in args.names or sorted(path.stem for path in SCRIPTS.glob("*.py")):
        path = FOLDER / f"{name}.ipynb"
        path.write_text(json.dumps(run(notebook(name), args.timeout), indent=1) + "\n")
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def cells(name: str) -> list[tuple[str, str]]:
    """The cells of a script's notebook: ("markdown" or "code", source).

    Raises:
      UserError: there is no such script, or it does not begin with a title.
    """
    path = SCRIPTS / f"{name}.py"
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the name of a script in {SCRIPTS}.")
    found: list[tuple[str, str]] = []
    for part in f"\n{path.read_text()}".split(f"\n{_MARK}")[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            found.append(("markdown", "\n".join(lines)))
        elif body.strip():
            found.append(("code", body.strip()))
    if not found or found[0][0] != "markdown" or not found[0][1].startswith("# "):
        raise UserError(f"{path} must begin with a cell {_MARK} [markdown] and a title, # # Title.")
    badge = "https://colab.research.google.com/assets/colab-badge.svg"
    link = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/colabs/{name}.ipynb"
    title = f"{found[0][1]}\n\n[![Open in Colab]({badge})]({link})"
    return [("markdown", title), ("code", _INSTALL), *found[1:]]


def notebook(name: str) -> dict[str, Any]:
    """The notebook of a script, without outputs, as JSON of nbformat 4.5."""
    made = []
    for i, (kind, source) in enumerate(cells(name)):
        cell = {"cell_type": kind, "id": f"cell-{i}", "metadata": {}}
        cell["source"] = source.splitlines(keepends=True)
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def run(made: dict[str, Any], timeout: int) -> dict[str, Any]:
    """The same with the outputs of a run from top to bottom, without progress bars.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell fails.
    """
    import nbclient
    import nbformat

    node = nbformat.reads(json.dumps(made), as_version=4)
    resources = {"metadata": {"path": str(FOLDER.parent)}}
    nbclient.NotebookClient(
        node, timeout=timeout, kernel_name="python3", record_timing=False, resources=resources
    ).execute()
    for cell in node.cells:
        if cell.cell_type == "code":
            kept = [out for out in cell.outputs if out.get("name") != "stderr"]
            cell.outputs, cell.metadata = kept, {}
    nbformat.validate(node)
    return json.loads(nbformat.writes(node))


if __name__ == "__main__":
    cli.run(main)
