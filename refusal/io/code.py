"""The code that computes a value, as a hash: a part of every key of the resume store, so that no list of modules is kept by hand.

From a function, every definition of this package that it refers to is followed, through names, attributes of modules and
imports at any depth; so are the texts that these read (a string that names a file beside the module) and the installed
versions of the packages that do the arithmetic. What is hashed is the syntax tree, without comments, docstrings, and the texts
of errors, assertions and `print`: rewording one of these recomputes nothing. What a function is given as an argument is no part
of its code: the caller's key names that.
"""

import ast
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).parents[2]
PACKAGES = ("refusal", "stages")
SHOWS = ("refusal.io.progress",)  # how far work is, which determines no value
# What carries the values of a stage and determines none: how parameters are read, files written and values stored.
PLUMBING = (
    *(f"refusal.io.{name}" for name in ("edits", "errors", "files", "params", "params_file", "progress", "section", "store")),
    "refusal.io.sweep",
    "stages",
)
# Of the packages that a computation imports, those whose version may change a value, and the names they are installed by.
ARITHMETIC = {
    "lm_eval": ("lm-eval",),
    "numpy": ("numpy",),
    "scipy": ("scipy",),
    "sklearn": ("scikit-learn",),
    "torch": ("torch",),
    "transformers": ("transformers", "tokenizers"),
}


def code_of(*functions: Callable) -> str:
    """SHA-256 over all that `closure` finds of these functions of the package, or of the functions that they are nested in."""
    return _hash(tuple(sorted((f.__module__, f.__qualname__.split(".")[0]) for f in functions)))


def code_of_stages(modules: Mapping[str, str], root: Path) -> dict[str, str]:
    """A hash of the code behind each stage's figures: of all that its module and what it calls below `root` consist of, without
    plumbing; the versions of packages are no code of ours."""
    installed = {name for names in ARITHMETIC.values() for name in names}
    hashes = {}
    for stage, module in modules.items():
        found = closure(((module, ""),), root, PLUMBING)
        code = {place: of for place, of in found.items() if place not in installed}
        hashes[stage] = hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()
    return hashes


@cache
def _hash(roots: tuple[tuple[str, str], ...]) -> str:
    return hashlib.sha256(json.dumps(closure(roots), sort_keys=True).encode()).hexdigest()


def closure(roots: tuple[tuple[str, str], ...], root: Path = ROOT, without: Sequence[str] = SHOWS) -> dict[str, str]:
    """What computes the values of `roots`, (module, name) each: {"module:name": syntax tree, file: SHA-256, package: version}.

    The name "" is what a module does when it is run or imported. `root` is the folder that holds the package, `without` are
    modules that are not followed. Raises ValueError for a root that is no definition of the package.
    """
    modules: dict[str, _Module] = {}
    found: dict[str, str] = {}
    todo, seen = list(roots), set[tuple[str, str]]()
    while todo:
        place = todo.pop()
        if place in seen:
            continue
        seen.add(place)
        name, definition = place
        if name in without:
            continue
        if name not in modules:
            if (path := _path(name, root)) is None:
                raise ValueError(f"{name} is no module of {PACKAGES}")
            modules[name] = _module(name, path, root, path.read_text(encoding="utf-8"))
            todo += [(name, "")]  # what a module does when it is imported, beside defining
        module = modules[name]
        if place in roots and definition and definition not in module.definitions:
            raise ValueError(f"{name} defines no {definition}")
        tree, references = module.read(definition)
        if tree:
            found[f"{name}:{definition}"] = tree
        todo += references.places
        for file in references.files:
            found[file.relative_to(root).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
        for package in references.packages & ARITHMETIC.keys():
            found |= {installed: version(installed) for installed in ARITHMETIC[package]}
    return found


def _path(module: str, root: Path) -> Path | None:
    """The file of a module of the packages; None for what is none."""
    base = root.joinpath(*module.split("."))
    files = (base.with_suffix(".py"), base / "__init__.py")
    return next((file for file in files if module.split(".")[0] in PACKAGES and file.is_file()), None)


_PARSING = Lock()  # CPython 3.11 counts the depth of what it parses for all threads together, and fails where two do


class _Module:
    """A module's definitions by name, "" for statements that define nothing, and where its imported names come from."""

    def __init__(self, name: str, path: Path, root: Path, text: str) -> None:
        self.name, self.folder, self.root = name, path.parent, root
        self._read: dict[str, tuple[str, _References]] = {}
        with _PARSING:
            tree = ast.parse(text)
        self.definitions: dict[str, list[ast.stmt]] = {}
        self.imports: dict[str, tuple[str, str | None]] = {}  # local name: (module, name in it; None for the module itself)
        # Imports at any depth: a name that two functions import differently does not occur.
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for a in node.names:
                    top = a.name.split(".")[0]
                    self.imports[a.asname or top] = (a.name if a.asname else top, None)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for a in node.names:
                    inner = f"{node.module}.{a.name}"
                    self.imports[a.asname or a.name] = (inner, None) if _path(inner, root) else (node.module, a.name)
        for statement in tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom) or _is_text(statement) or _is_for_types(statement):
                continue
            for bound in _bound(statement) or {""}:
                self.definitions.setdefault(bound, []).append(statement)

    def read(self, definition: str) -> tuple[str, "_References"]:
        """The syntax tree of a definition, "" where there is none, and what it refers to."""
        if definition not in self._read:
            references, statements = _References(self, self.root), self.definitions.get(definition, [])
            for statement in statements:
                references.visit(statement)
            if not statements:  # handed on from another module, perhaps
                references.refer(definition, [])
            trees = [ast.dump(_Plain().visit(deepcopy(statement))) for statement in statements]
            self._read[definition] = "\n".join(trees), references
        return self._read[definition]


@cache
def _module(name: str, path: Path, root: Path, text: str) -> "_Module":
    return _Module(name, path, root, text)


def _bound(statement: ast.stmt) -> set[str]:
    """The names that a statement at the top of a module defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)
    )


def _is_for_types(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and isinstance(statement.test, ast.Name) and statement.test.id == "TYPE_CHECKING"


class _References(ast.NodeVisitor):
    """What one definition refers to: other definitions of the package, files beside its module, and other packages."""

    def __init__(self, module: _Module, root: Path) -> None:
        self.module, self.root = module, root
        self.places: list[tuple[str, str]] = []
        self.files: set[Path] = set()
        self.packages: set[str] = set()

    def visit_Name(self, node: ast.Name) -> None:
        self.refer(node.id, [])

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path, base = [node.attr], node.value
        while isinstance(base, ast.Attribute):
            path, base = [base.attr, *path], base.value
        if isinstance(base, ast.Name) and base.id in self.module.imports:
            self.refer(base.id, path)
        else:
            self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        name = node.value
        if isinstance(name, str) and 0 < len(name) < 100 and Path(name).name == name and not name.endswith(".py"):
            path = self.module.folder / name
            if path.is_dir() and not (path / "__init__.py").exists():
                self.files |= {file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
            elif path.is_file():
                self.files.add(path)

    def refer(self, name: str, path: list[str]) -> None:
        if name in self.module.definitions:
            self.places.append((self.module.name, name))
        if name not in self.module.imports:
            return
        module, attribute = self.module.imports[name]
        while attribute is None and path and _path(f"{module}.{path[0]}", self.root):
            module, path = f"{module}.{path[0]}", path[1:]
        if _path(module, self.root) is None:
            self.packages.add(module.split(".")[0])
        elif attribute is not None:
            self.places.append((module, attribute))
        elif path:
            self.places.append((module, path[0]))
        else:  # the module itself is handed on: all of it
            path_ = _path(module, self.root)
            assert path_ is not None
            whole = _module(module, path_, self.root, path_.read_text(encoding="utf-8"))
            self.places += [(module, definition) for definition in whole.definitions]


class _Plain(ast.NodeTransformer):
    """A syntax tree without docstrings and without what is only said to a person."""

    def visit(self, node: ast.AST) -> ast.AST:
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [statement for statement in body if not _is_text(statement)] or [ast.Pass()]  # type: ignore[attr-defined]
        return super().visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return self.generic_visit(_Silent().visit(node))

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.msg = None
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        called = (
            node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""
        )
        return self.generic_visit(_Silent().visit(node) if called == "print" or called.endswith("Error") else node)


class _Silent(ast.NodeTransformer):
    """A syntax tree whose strings are empty."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant("") if isinstance(node.value, str) else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return ast.Constant("")
