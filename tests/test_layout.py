"""How the package is laid out: which folder may import which, and which folders a stage depends on, read from the source."""

import ast
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
# From the bottom up: a folder imports from those before it and from itself.
LAYERS = ("io", "stats", "lm", "method", "organism", "judges", "data", "analysis", "report", "__main__")


def imported(path: Path) -> set[Path]:
    """The modules of the project that a module imports, at any depth of it, relative to ROOT."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    candidates = [Path(*name.split(".")) for name in names if name.split(".")[0] in {"refusal", "stages"}]
    files = [file for base in candidates for file in (base.with_suffix(".py"), base / "__init__.py")]
    return {file for file in files if (ROOT / file).is_file() and file.name != "__init__.py"}


def modules() -> dict[Path, set[Path]]:
    """Every module of the library and what it imports."""
    paths = (p.relative_to(ROOT) for p in sorted((ROOT / "refusal").rglob("*.py")) if p.name != "__init__.py")
    return {path: imported(path) for path in paths}


def closure(stage: str) -> set[Path]:
    """The modules of `stages/<stage>.py` and of all that it imports."""
    found, todo = set(), [Path("stages") / f"{stage}.py"]
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += imported(path)
    return found


def test_the_library_knows_no_stage_and_no_path_of_the_pipeline():
    for path, others in modules().items():
        assert "stages" not in {other.parts[0] for other in others}, path
        for folder in ('"data/', '"models/', '"metrics/', '"plots/'):
            # The command `refusal compare` is given whole studies.
            assert folder not in (ROOT / path).read_text() or path.name == "__main__.py", (path, folder)


def test_no_import_runs_back_up():
    for path, others in modules().items():
        for other in others:
            ours, theirs = (LAYERS.index(p.with_suffix("").parts[1]) for p in (path, other))
            assert theirs <= ours, f"{path} imports {other}"


def test_no_circle():
    done: set[Path] = set()

    def visit(path: Path, above: tuple[Path, ...]) -> None:
        assert path not in above, " -> ".join(map(str, [*above, path]))
        if path not in done:
            for other in graph[path]:
                visit(other, (*above, path))
            done.add(path)

    graph = modules()
    for path in graph:
        visit(path, ())


def test_files_and_functions_fit_on_a_screen_or_a_few():
    for path in (*modules(), *(p.relative_to(ROOT) for p in (ROOT / "stages").glob("*.py"))):
        text = (ROOT / path).read_text()
        assert len(text.splitlines()) <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                assert node.end_lineno - node.lineno < 60, (path, node.name)
                assert len([name for name in arguments if name not in ("self", "cls")]) <= 7, (path, node.name)


def test_each_stage_depends_on_the_folders_that_carry_its_method():
    for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items():
        declared = {dep for dep in stage["deps"] if dep.startswith(("refusal", "stages"))}
        needed = {
            str(Path(*path.parts[:2])) if path.parts[0] == "refusal" else str(path)
            for path in closure(name)
            if path.parts[:2] != ("refusal", "io") and path.name != "record.py"
        }
        assert declared == needed, name


def test_no_file_holds_the_marks_of_a_merge():
    marks = subprocess.run(["git", "grep", "-nE", "^(<<<<<<<|>>>>>>>|=======$)"], cwd=ROOT, capture_output=True, text=True)
    assert marks.stdout == ""
