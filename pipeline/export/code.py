"""The code that an exported folder carries, for `trust_remote_code=True` where this package is not installed.

It is this package's own: the module of the model's class and all that it imports from here, found by walking the
imports. transformers copies the modules of a folder that are imported relatively, one flat folder of them, so each
becomes a file of its own, and its imports of others relative ones; nothing else is changed.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from pipeline.host.package import PACKAGE

ROOT, PREFIX = "modeling_mnemos", "mnemos_"
"""Names of the files: of the module with the model's class, and how those of the others begin."""
HASH = "code_sha256"
"""Key of config.json: `code_hash` of the folder."""


class _Import(NamedTuple):
    """A statement `from pipeline... import ...`."""

    node: ast.ImportFrom
    modules: tuple[tuple[str, str], ...]
    """Modules that it binds, and the names that it binds them to."""
    names: tuple[tuple[str, str], ...]
    """Names that it takes from `node.module`, and what it binds them to."""
    checked_alone: bool
    """Whether only type checkers run it."""


def carry_code(model: PreTrainedModel, folder: Path) -> list[Path]:
    """Writes the modules that the class of the model needs into a folder, and says in the model's config, which
    `save_pretrained` writes, where they are and what they hash to. Gives the files; none for a class of transformers.
    """
    kind, config = type(model), model.config
    if kind.__module__.partition(".")[0] != PACKAGE.name:
        return []
    files = []
    for name, text in carried_files(kind.__module__).items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        files.append(path)
    config.auto_map = {
        "AutoConfig": f"{ROOT}.{type(config).__name__}",
        "AutoModelForCausalLM": f"{ROOT}.{kind.__name__}",
    }
    setattr(config, HASH, code_hash(folder))
    return files


def code_hash(folder: Path) -> str:
    """SHA-256 of the Python files of a folder, names and bytes, in hex."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def carried_files(root: str) -> dict[str, str]:
    """The files of a module and of all that it imports from this package: their text by name."""
    found = carried_modules(root)
    names = {module: _file_name(module) for module in found} | {root: ROOT}
    if len(set(names.values())) < len(names):
        raise AssertionError(f"two of these modules would be one file: {sorted(names)}")
    files = {f"{names[module]}.py": _rewritten(module, names) for module in found}
    # It goes through the relative imports of one file after the other, and would read some of them many times.
    others = "".join(f"    from .{name} import *  # noqa: F403\n" for name in sorted(names.values()) if name != ROOT)
    files[f"{ROOT}.py"] += (
        "\n# transformers copies the files that are imported here.\nfrom typing import TYPE_CHECKING  # noqa: E402\n\n"
        f"if TYPE_CHECKING:\n{others}"
    )
    return dict(sorted(files.items()))


def carried_modules(root: str) -> list[str]:
    """A module and those of this package that it needs, sorted."""
    found: set[str] = set()
    left = [root]
    while left:
        module = left.pop()
        if module in found:
            continue
        found.add(module)
        for statement in _imports(module, ast.parse(_source(module))):
            if not statement.checked_alone:
                left += [name for name, _ in statement.modules]
                left += [str(statement.node.module)] if statement.names else []
    return sorted(found)


def _rewritten(module: str, names: dict[str, str]) -> str:
    """The text of a module with relative imports of the files in `names`."""
    source = _source(module)
    lines = source.splitlines()
    # From the last to the first, so that the numbers of the lines before stay right.
    for statement in sorted(_imports(module, ast.parse(source)), key=lambda found: -found.node.lineno):
        node, indent = statement.node, " " * statement.node.col_offset
        new = [
            f"{indent}from . import {names[other]} as {bound}" for other, bound in statement.modules if other in names
        ]
        if statement.names and node.module in names:
            taken = ", ".join(name if name == bound else f"{name} as {bound}" for name, bound in statement.names)
            new.append(f"{indent}from .{names[node.module]} import {taken}")
        lines[node.lineno - 1 : node.end_lineno] = new or [f"{indent}pass"]
    return "\n".join([f"# {module} of Mnemos, copied when a model was exported.", *lines, ""])


def _imports(module: str, tree: ast.Module) -> Iterator[_Import]:
    alone = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == PACKAGE.name for alias in node.names):
            raise AssertionError(f"{module}, line {node.lineno}: write it as `from ... import ...`")
        if not isinstance(node, ast.ImportFrom) or str(node.module).partition(".")[0] != PACKAGE.name:
            continue
        bound = [(alias.name, alias.asname or alias.name) for alias in node.names]
        modules = [(f"{node.module}.{name}", as_name) for name, as_name in bound if _is_module(f"{node.module}.{name}")]
        names = [(name, as_name) for name, as_name in bound if not _is_module(f"{node.module}.{name}")]
        yield _Import(node, tuple(modules), tuple(names), node in alone)


def _file_name(module: str) -> str:
    return PREFIX + module.partition(".")[2].replace(".", "_")


def _is_module(name: str) -> bool:
    return _path(name) is not None


def _path(module: str) -> Path | None:
    """The file of a module of this package; None where there is none."""
    folder = PACKAGE.parent.joinpath(*module.split("."))
    return next((path for path in (folder.with_suffix(".py"), folder / "__init__.py") if path.is_file()), None)


def _source(module: str) -> str:
    path = _path(module)
    assert path is not None, module
    return path.read_text(encoding="utf-8")
