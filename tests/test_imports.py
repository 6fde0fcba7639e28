"""Imports point one way: every module, those under TYPE_CHECKING and inside functions included."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (
    ("errors", "spelling", "units", "host", "files"),
    ("data_commands", "data_config", "evaluation_config", "model_config"),
    ("config", "precision", "schedule", "run_name", "durations", "global_batch"),
    ("parallel", "ops", "data"),
    ("runtime",),
    ("evaluation_result", "heat_map", "panel", "system", "update_events"),
    ("capabilities", "lm"),
    (
        "ds_config",
        "loss_scale",
        "run",
        "callbacks",
        "engine",
        "checkpoint",
        "meter",
        "config_file",
        "phases",
        "compilation",
        "intervals",
        "gradient_norms",
        "event_counts",
    ),
    ("downstream", "load", "run_folder", "skipped_updates", "update_watch"),
    ("create_run", "end_run", "evaluations"),
    ("train",),
    ("job",),
    ("systems",),
    ("recipes",),
    ("inference",),
    ("commands", "plan", "evals", "export", "bench"),
    ("launch", "cli"),
)
"""The modules and folders of pipeline/, lowest first: each imports from its own layer and from those before it."""
DEEPSPEED = ("engine", "ds_config", "parallel", "checkpoint")
KNOW_SYSTEMS = ("systems", "recipes")
"""What may import or name a system: for all else, `create_system` finds one by what a config says."""
SAME_NAMES = ("pipeline.lm.config", "pipeline.lm.olmo_folder")
"""Where a model type of transformers, or a layout of files, may have the name of a system."""


def imports() -> dict[str, set[str]]:
    """Every module of the package, and the modules (of any package) that it imports, wherever in it."""
    found: dict[str, set[str]] = {}
    for name, path in PATHS.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name].update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, f"{path}: a relative import"
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    found[name].add(whole if whole in PATHS else node.module)
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top_name(module: str) -> str:
    """The module or folder right under pipeline/; "" for the package itself."""
    return module.partition(".")[2].partition(".")[0]


PATHS = {module_name(path): path for path in (ROOT / "pipeline").rglob("*.py")}
IMPORTS = imports()
OWN = {name: {other for other in found if other in IMPORTS} for name, found in IMPORTS.items()}


def test_no_circle() -> None:
    try:
        graphlib.TopologicalSorter(OWN).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" -> ".join(reversed(error.args[1]))) from None


def test_every_module_has_a_layer_and_imports_from_no_higher_one() -> None:
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    names = {top_name(name) for name in OWN} - {"", "__main__"}
    assert names == set(layer), "name new folders and modules in LAYERS, and those that are gone no more"
    wrong = [
        f"{name} imports {other}"
        for name, found in sorted(OWN.items())
        for other in sorted(found)
        if top_name(name) in layer and top_name(other) in layer and layer[top_name(other)] > layer[top_name(name)]
    ]
    assert not wrong, "\n".join(wrong)


def test_only_systems_and_recipes_import_or_name_a_system() -> None:
    systems = {path.name for path in (ROOT / "pipeline" / "systems").iterdir() if path.is_dir()} - {"__pycache__"}
    wrong = []
    for name, found in IMPORTS.items():
        if top_name(name) in KNOW_SYSTEMS:
            continue
        wrong += [f"{name} imports {other}" for other in found if f"{other}.".startswith("pipeline.systems.")]
        for node in ast.walk(ast.parse(PATHS[name].read_text())):
            if isinstance(node, ast.Constant) and node.value in systems and name not in SAME_NAMES:
                wrong.append(f"{name}, line {node.lineno}: {node.value!r}")
    assert systems and not wrong, "\n".join(wrong)


def test_deepspeed_is_imported_in_few_places() -> None:
    wrong = [
        name
        for name, found in IMPORTS.items()
        if any(other.partition(".")[0] == "deepspeed" for other in found)
        and not name.removeprefix("pipeline.").startswith(DEEPSPEED)
    ]
    assert not wrong


def at_import(path: Path) -> set[str]:
    """What a module imports when it is imported itself."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
            found.add(node.module or "")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
    return found


def test_the_harness_is_imported_where_tasks_run_alone() -> None:
    """It takes seconds, and is an extra: no command needs it for anything else."""
    own = {name: at_import(path) for name, path in PATHS.items()}
    heavy = {name for name, found in own.items() if any(f"{other}.".startswith("lm_eval.") for other in found)}
    assert heavy == {"pipeline.downstream.harness_model"}
    while True:
        more = {name for name, found in own.items() if found & heavy} - heavy
        if not more:
            break
        heavy |= more
    assert heavy == {"pipeline.downstream.harness_model", "pipeline.downstream.scores"}


def test_the_kernels_hold_no_package() -> None:
    assert not list((ROOT / "kernels").rglob("__init__.py")), "a package `kernels` hides that of Hugging Face"


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_the_loop_is_read_in_one_sitting() -> None:
    assert lines(ROOT / "pipeline" / "train.py") < 300
    assert len(OWN["pipeline.train"]) <= 15


def test_modules_are_short_but_for_the_mathematics_of_ops() -> None:
    ops = ROOT / "pipeline" / "ops"
    long = [str(path) for path in (ROOT / "pipeline").rglob("*.py") if lines(path) > 300 and path.parent != ops]
    assert not long
