"""The notebooks of docs/notebooks, cell by cell in a kernel, with tiny sizes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.launch.harness import ROOT, environment

FOLDER = ROOT / "docs" / "notebooks"
COLAB, PARAMETERS = "colab", "parameters"
"""Tags of cells: those that only Colab can run, and the one whose values are a person's to change."""
CVFP = "--num-samples 40 --batch-size 16 --model.width 16 --model.layers 1 --max-iterations 1 --report.log-every 2"
TINY = {
    "cvfp_colab": f"""
TEST_RECIPE, RECIPE, DRIVE, PROMPT = "cvfp_tiny", "cvfp_tiny", "drive", "The sea"
TEST_FLAGS = "{CVFP} --report.no-plots"
FLAGS = "{CVFP} --epochs 1"
""",
    "mimir_colab": """
PRESET, RUN_NAME, DATA, SYNTHETIC, PEPTIDES = "tiny", "notebook", "data/dataset.csv", 600, 3
FLAGS = "--epochs 1 --batch-size 64 --model.width 16 --model.layers 1 --model.heads 2 --report.log-every 4"
""",
}
"""Values by notebook, in place of its own."""


def check_mimir(folder: Path, text: str) -> None:
    run = folder / "outputs" / "notebook"
    assert (run / "checkpoints" / "latest").exists() and (folder / "outputs" / "notebook.zip").stat().st_size > 1000
    assert (run / "background.fasta").read_text().count(">") == 3


def check_cvfp(folder: Path, text: str) -> None:
    assert (folder / "cache").is_symlink() and list((folder / "drive" / "cache").glob("stdlib_40samples_128len*"))
    kept = folder / "drive" / "outputs"
    for name in ("test_10k", "tokens_100k"):
        assert (kept / name / "checkpoints" / "latest").exists()
    assert (kept / "tokens_100k.zip").stat().st_size > 1000
    assert "effective rank / width, validation" in text and "converged training tokens" in text
    assert "Progress: " in text and "unigram_ppl" in text


CHECKS = {"cvfp_colab": check_cvfp, "mimir_colab": check_mimir}
"""What each has made, in its folder and as text."""


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def test_every_notebook_is_executed() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(TINY)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TINY)
def test_a_notebook_runs_to_its_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells), (
        "saved without output"
    )
    notebook.cells = [cell for cell in notebook.cells if COLAB not in tags(cell)]
    (parameters,) = (cell for cell in notebook.cells if PARAMETERS in tags(cell))
    given = {line.partition(" =")[0] for line in parameters.source.splitlines()}
    parameters.source = TINY[name]
    assert all(word in TINY[name] for word in given), "every value of the notebook has a tiny one"
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    # The kernel of this interpreter, whatever kernels are installed on the machine.
    client = NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}})
    manager = client.create_kernel_manager()
    manager.kernel_spec.argv[0] = sys.executable
    client.execute()
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    CHECKS[name](tmp_path, text)
    assert "Traceback" not in text and os.linesep in text


def test_links_to_drive_are_made_whatever_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that dangles, a folder of a run before, and links of an earlier start."""
    notebook = nbformat.read(FOLDER / "cvfp_colab.ipynb", as_version=4)
    (source,) = (cell.source for cell in notebook.cells if "symlink_to" in cell.source)
    monkeypatch.chdir(tmp_path)
    drive = tmp_path / "drive"
    (tmp_path / "cache").symlink_to(tmp_path / "gone")
    (tmp_path / "outputs" / "run").mkdir(parents=True)
    (tmp_path / "outputs" / "run" / "log").write_text("kept")
    for _ in range(2):
        exec(source, {"DRIVE": str(drive)})
        for name in ("cache", "outputs"):
            assert Path(name).is_symlink() and Path(name).resolve() == drive / name and (drive / name).is_dir()
        assert (drive / "outputs" / "run" / "log").read_text() == "kept"
    Path("outputs").unlink()
    (tmp_path / "outputs" / "run").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"outputs/run is also in .*drive/outputs: move one of them away"):
        exec(source, {"DRIVE": str(drive)})
    assert (tmp_path / "outputs" / "run").is_dir() and (drive / "outputs" / "run" / "log").read_text() == "kept"
