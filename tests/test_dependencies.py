"""Which of our modules a stage imports, directly or through others, read from the source."""

import ast
from pathlib import Path


def _imported(root: Path, path: Path) -> set[Path]:
    names = set()
    for node in ast.walk(ast.parse((root / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    candidates = [Path(*name.split(".")) for name in names if name.split(".")[0] in {"refusal", "stages"}]
    files = [file for base in candidates for file in (base.with_suffix(".py"), base / "__init__.py")]
    return {file for file in files if (root / file).is_file()}


def closure(root: Path, stage: str) -> set[Path]:
    """The modules of `stages/<stage>.py` and of all that it imports, relative to `root`."""
    found, todo = set(), [Path("stages") / f"{stage}.py"]
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += _imported(root, path)
    return found


def test_the_library_knows_no_stage_and_no_path_of_the_pipeline():
    root = Path(__file__).parents[1]
    for path in sorted((root / "refusal").rglob("*.py")):
        names = {p.parts[0] for p in _imported(root, path.relative_to(root))}
        assert "stages" not in names, path
        for folder in ('"data/', '"models/', '"metrics/', '"plots/'):
            assert folder not in path.read_text(), (path, folder)
