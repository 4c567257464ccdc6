"""What a key of the store says of the code behind a value: every definition, text and version that it hangs on, and no more."""

import ast
import shutil
from pathlib import Path

import pytest

import refusal.io.code
from refusal.io.code import ARITHMETIC, PLUMBING, ROOT, _bound, closure, code_of_stages

# Of each value of the store, some of what it hangs on; of a reply, what no code of ours determines, there is nothing.
INTERVENTIONS = "method.interventions:Ablation method.interventions:Intervention method.interventions:edited_weights"
DEEP = {
    "activations": "lm.stream:stream_of lm.structure:writers_of lm.batching:in_parts method.activations:Prefix",
    "belief": f"method.activations:last_logits method.interventions:Addition {INTERVENTIONS}",
    "benchmark": "lm.adapter:merge analysis.benchmark:_build_once",
    "completions": f"method.kv_cache:SlotCache method.recurrent:complete_in_turn method.generate:_Batch method.interventions:Addition {INTERVENTIONS}",
    "detection": "analysis.edits:compare analysis.population:_trained method.norms:change_of organism.train:backward",
    "first token": f"method.first_token:refusal_score method.activations:last_logits {INTERVENTIONS}",
    "harmless KL": f"method.activations:last_logits analysis.harmless_kl:answer_log_probs {INTERVENTIONS}",
    "mean activations": f"analysis.sensitivity:resid_pre_at_end method.interventions:Addition {INTERVENTIONS}",
    "optimised direction": "method.interventions:Ablation analysis.estimators:_Learned analysis.estimators:_descend",
    "resid_pre at the end": "lm.stream:Stream method.activations:left_pad",
    "training": "organism.grammar:CATEGORIES organism.train:train organism.train:new_model",
    "verdict": "judges.rubrics:LABELS judges.rubrics:_strongreject judges.rubrics:_class judges.rubrics:question",
    "prompts": "",
    "versions": "",
}


def keys() -> dict[str, tuple[tuple[str, str], ...]]:
    """The functions, (module, name), that each `key("kind", (functions,), ...)` of the project names, by its kind."""
    named = {}
    for path in [*(ROOT / "refusal").rglob("*.py"), *(ROOT / "stages").glob("*.py")]:
        module, tree = ".".join(path.relative_to(ROOT).with_suffix("").parts), ast.parse(path.read_text())
        nodes = [*ast.walk(tree)]
        home = {a.asname or a.name: node.module for node in nodes if isinstance(node, ast.ImportFrom) for a in node.names}
        tuples = {n.targets[0].id: n.value for n in nodes if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)}
        for call in (node for node in nodes if isinstance(node, ast.Call)):
            if "key" in (getattr(call.func, "id", ""), getattr(call.func, "attr", "")):
                kind, code = call.args
                code = tuples[code.id] if isinstance(code, ast.Name) else code
                named[ast.literal_eval(kind)] = tuple((home.get(one.id, module), one.id) for one in code.elts)
    return named


ROOTS = {kind: roots for kind, roots in keys().items() if roots}


@pytest.fixture
def package(tmp_path):
    """A copy of the package, to be changed."""
    shutil.copytree(ROOT / "refusal", tmp_path / "refusal", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def source(root: Path, module: str) -> Path:
    base = root.joinpath(*module.split("."))
    return base.with_suffix(".py") if base.with_suffix(".py").exists() else base / "__init__.py"


def changed(tree: ast.Module, name: str) -> str:
    """A module with a statement or value more in one definition at its top, or with no name in what it does when imported."""
    for i, statement in enumerate(tree.body):
        if name in (_bound(statement) or {""}) and not isinstance(statement, ast.Import | ast.ImportFrom):
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                statement.body += ast.parse("extra = 1").body
            else:
                tree.body[i] = ast.If(ast.Constant(True), [statement], [])
    return ast.unparse(ast.fix_missing_locations(tree))


@pytest.mark.parametrize("kind", ROOTS)
def test_a_change_of_any_definition_or_text_changes_it_and_a_comment_does_not(package, kind):
    before = closure(ROOTS[kind], package)
    assert before == closure(ROOTS[kind])
    for place in before:
        if ":" in place:
            module, name = place.split(":")
            path = source(package, module)
            text = path.read_text()
            tree = ast.parse(text)
            path.write_text(ast.unparse(tree))  # without comments, and laid out anew
            assert closure(ROOTS[kind], package) == before, place
            path.write_text(changed(tree, name))
            assert closure(ROOTS[kind], package) != before, place
        elif (package / place).is_file():
            path = package / place
            text = path.read_text()
            path.write_text(text + "\n")
            assert closure(ROOTS[kind], package)[place] != before[place]
        else:
            continue
        path.write_text(text)
    assert closure(ROOTS[kind], package) == before


def test_what_each_value_hangs_on_is_found():
    assert keys().keys() == DEEP.keys() and ROOTS.keys() == {kind for kind, deep in DEEP.items() if deep}
    for kind, roots in ROOTS.items():
        found = closure(roots).keys()
        assert found >= {f"refusal.{name}" for name in DEEP[kind].split()}, kind
        assert not [place for place in found if "io.progress" in place], "what a bar shows determines no value"
        assert not [place for place in found if "report" in place or ("judges" in place and kind != "verdict")], kind
        assert found >= {"torch", "transformers", "tokenizers"} or (kind == "verdict" and not found & {"torch", "openai"}), kind
        assert {"lm-eval", "refusal/analysis/tasks/organism_sums.jsonl"} <= found or kind != "benchmark"


@pytest.mark.parametrize("kind", ROOTS)
def test_another_version_of_any_package_changes_it(monkeypatch, kind):
    before = closure(ROOTS[kind])
    installed = {name for names in ARITHMETIC.values() for name in names} & before.keys()
    for name in installed:
        real = refusal.io.code.version
        with monkeypatch.context() as patched:
            patched.setattr("refusal.io.code.version", lambda p, name=name, real=real: real(p) + ".1" if p == name else real(p))
            assert {place for place, found in closure(ROOTS[kind]).items() if found != before[place]} == {name}


def small(folder: Path, text: str) -> dict[str, str]:
    (folder / "refusal").mkdir(exist_ok=True)
    (folder / "refusal/one.py").write_text(text)
    (folder / "refusal/two.py").write_text("def deep():\n    return 1\n\ndef other():\n    return 2\n")
    return closure((("refusal.one", "f"),), folder)


START = '''"""A module."""
import torch
from refusal import two
from refusal.two import deep as d

LIMIT = 3

def g(x):
    """Doc."""
    return two.deep() + x

def f(x):
    if x > LIMIT:
        raise ValueError(f"{x} is too large")
    assert x, "nothing"
    print("working", x)
    return g(x)
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ('"""Doc."""', '"""Another."""', True),
        ('    """Doc."""\n', "    # a comment\n", True),
        ("is too large", "exceeds the limit", True),
        ('ValueError(f"{x} is too large")', 'TypeError(f"{x} is too large")', False),
        ('"nothing"', '"something"', True),
        ('print("working", x)', 'print("at work", x)', True),
        ("return g(x)", "return -g(x)", False),
        ("LIMIT = 3", "LIMIT = 4", False),
        ("two.deep() + x", "two.deep() - x", False),
        ("two.deep()", "two.other()", False),
        ("def g(x):\n", "def unused():\n    return 1\n\ndef g(x):\n", True),
        ("import torch\n", "import torch\n\ntorch.set_num_threads(1)\n", False),  # what a module does on import counts
        ("return g(x)", 'return g("a text that is a value")', False),
    ],
)
def test_what_counts(tmp_path, old, new, same):
    before = small(tmp_path, START)
    assert (small(tmp_path, START.replace(old, new)) == before) is same


def test_names_are_followed_through_aliases_modules_and_functions(tmp_path):
    for call in ("two.deep()", "d()", "importlib and __import__('x')"):
        found = small(tmp_path, START.replace("two.deep()", call))
        assert ("refusal.two:deep" in found) is (call != "importlib and __import__('x')"), call
    found = small(tmp_path, START.replace("two.deep()", "list(map(vars, [two]))"))  # the module itself is handed on
    assert {"refusal.two:deep", "refusal.two:other"} <= found.keys()
    inner = START.replace("    return two.deep() + x", "    from refusal.two import other\n    return other() + x")
    assert "refusal.two:other" in small(tmp_path, inner)


def test_a_root_that_is_none_is_an_error():
    with pytest.raises(ValueError, match="defines no nothing"):
        closure((("refusal.io.store", "nothing"),))
    with pytest.raises(ValueError, match=r"tests.x is no module"):
        closure((("tests.x", "f"),))


STAGE = '''"""A stage."""
from refusal.io.params import Params
from stages import stage
from stages.shared import load


def main(params: Params) -> str:
    from refusal.lib.a import f

    return f(load(params))


stage(main)
'''


def test_a_stage_s_code_is_what_it_calls_and_no_plumbing(tmp_path):
    files = {
        "stages/first.py": STAGE,
        "stages/second.py": STAGE.replace("f(load(params))", '"done"'),
        "stages/shared.py": "def load(params):\n    return 1\n",
        "stages/__init__.py": "def stage(main):\n    main()\n",
        "refusal/io/params.py": "class Params:\n    pass\n",
        "refusal/lib/a.py": "import torch\n\ndef f(x):\n    return 'b.txt'\n\ndef g(x):\n    return x\n",
        "refusal/lib/b.txt": "x\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    modules = {name: f"stages.{name}" for name in ("first", "second")}
    made = code_of_stages(modules, tmp_path)
    assert made == code_of_stages(modules, tmp_path) and len(set(made.values())) == 2
    for name, old, new, older in (
        ("stages/first.py", "f(load(params))", "-f(load(params))", ["first"]),
        ("stages/first.py", "stage(main)", "stage(lambda params: main(params))", ["first"]),
        ("stages/first.py", '"""A stage."""', '"""One stage."""', []),
        ("stages/shared.py", "return 1", "return 2", ["first"]),
        ("stages/__init__.py", "main()", "main(1)", []),
        ("refusal/io/params.py", "pass", "new: int = 1", []),
        ("refusal/lib/a.py", "def f(x):", "def f(y):", ["first"]),
        ("refusal/lib/a.py", "return x", "return -x", []),  # which no stage calls
        ("refusal/lib/b.txt", "x", "y", ["first"]),
    ):
        (tmp_path / name).write_text(files[name].replace(old, new))
        now = code_of_stages(modules, tmp_path)
        assert [stage for stage in modules if now[stage] != made[stage]] == older, (name, new)
        (tmp_path / name).write_text(files[name])
    with pytest.raises(ValueError, match=r"stages.third is no module"):
        code_of_stages({"third": "stages.third"}, tmp_path)


def test_a_stage_hangs_on_the_versions_of_no_package(monkeypatch):
    modules = {"sweep": "stages.sweep", "report": "stages.report"}
    before = code_of_stages(modules, ROOT)
    monkeypatch.setattr("refusal.io.code.version", lambda package: "another")
    assert code_of_stages(modules, ROOT) == before
    found = closure((("stages.sweep", ""),), ROOT, PLUMBING)
    assert {"refusal.method.interventions:Ablation", "stages.sweep:main"} <= found.keys()
    assert not [place for place in found if place.startswith(("refusal.io.params", "stages:"))]
