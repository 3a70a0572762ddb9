"""Notebooks: what their scripts say, and a run from top to bottom."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from walt_jax.errors import UserError
from walt_jax.generation.walt import ASSETS

sys.path.append(str(Path(__file__).parents[1]))
from colabs import build

NAMES = sorted(path.stem for path in build.SCRIPTS.glob("*.py"))


def test_cells_are_those_of_the_script(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SCRIPTS", tmp_path)
    (tmp_path / "a.py").write_text(
        "# %% [markdown]\n# # Title\n#\n# Text *here*.\n\n# %%\nx = 1\n\n\ny = x  # %% is no mark\n"
        "\n# %%\n\n# %% [markdown]\n# End\n"
    )
    first, install, *rest = build.cells("a")
    assert first[1].startswith("# Title\n\nText *here*.\n\n[![Open in Colab](https://colab.")
    assert install[0] == "code" and 'find_spec("walt_jax") is None' in install[1]
    assert rest == [("code", "x = 1\n\n\ny = x  # %% is no mark"), ("markdown", "End")]
    (tmp_path / "b.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="must begin with a cell"):
        build.cells("b")
    with pytest.raises(UserError, match="does not exist: give the name"):
        build.cells("c")


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_are_made_of_their_scripts(name):
    path = build.FOLDER / f"{name}.ipynb"
    if not path.exists():
        pytest.skip(f"{path.name} is not made yet: python -m colabs.build {name}")
    made = json.loads(path.read_text())
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in made["cells"]]
    assert found == build.cells(name)
    code = [cell for cell in made["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert sum(len(cell["outputs"]) for cell in code) > 0
    assert path.stat().st_size < 8e6


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebooks_run_from_top_to_bottom(name):
    for module in ("nbclient", "nbformat", "ipykernel"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'walt_jax[colabs]'")
    if not (ASSETS / "sprites").is_dir():
        pytest.skip("this checkout has no walt_jax/assets/sprites")
    made = build.run(build.notebook(name), timeout=300)
    outputs = [out for cell in made["cells"] for out in cell.get("outputs", ())]
    assert any("image/png" in out.get("data", {}) for out in outputs)
