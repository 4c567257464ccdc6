"""params.yaml: the committed one loads, and every mistake is one sentence that names the file, the key and what is wrong."""

import re
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from place import COMMITTED, REMOVED, params_with

from refusal.io.errors import UserError
from refusal.io.params import Params
from refusal.io.params_file import RENAMED, load_params, overlaid

RAW = yaml.safe_load(COMMITTED)
SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SECTIONS = """prompts model organism generation activations directions ablation sweep endpoint judge select orthogonalize evaluate
long_answers generalization science benchmark edits claims report compute""".split()
SEEDED = ["prompts", "directions", "sweep", "evaluate", "long_answers", "generalization", "science", "benchmark", "claims"]
RESAMPLED = ["directions", "evaluate", "generalization", "science", "benchmark", "claims"]


def refused(file: Path, said: str) -> str:
    """What `load_params` says of the file: one sentence that names it and matches `said`."""
    with pytest.raises(UserError, match=said) as error:
        load_params(file)
    message = str(error.value)
    assert message.startswith(f"{file}: ") and "\n" not in message and "pydantic" not in message and len(message) < 4000
    return message


def test_the_committed_file_loads_with_nothing_converted(tmp_path):
    params = load_params(params_with(tmp_path, {})).model_dump()
    for key, sections in (("seed", SEEDED), ("n_resamples", RESAMPLED)):
        for section in sections:
            if key not in RAW[section]:
                assert params[section].pop(key) == RAW[key]
    assert params == RAW
    assert set(Params.model_fields) == {"seed", "n_resamples", *SECTIONS}


@pytest.mark.parametrize(("key", "sections"), [("seed", SEEDED), ("n_resamples", RESAMPLED)])
def test_a_section_takes_the_seed_and_n_resamples_of_the_file_where_it_names_none(tmp_path, key, sections):
    named_by_none = {f"{section}.{key}": REMOVED for section in sections if key in RAW[section]}
    for own in sections:
        params_with(tmp_path, named_by_none | {key: 7})
        params = load_params(params_with(tmp_path, {f"{own}.{key}": 3})).model_dump()
        assert {s: values[key] for s, values in params.items() if s in sections} == {s: 3 if s == own else 7 for s in sections}
        # Nothing else takes it: the organism's seeds are its own, as is the number of draws of the sensitivity.
        for section in set(SECTIONS) - set(sections):
            assert params[section].get(key) == RAW[section].get(key)
        assert params["science"]["sensitivity"] == RAW["science"]["sensitivity"]
        (tmp_path / "params.yaml").unlink()


# The keys that params.yaml had before, and their new names.
OLD = {
    "sweep.max_new_tokens": "generation.max_new_tokens",
    "sweep.batch_size": "generation.batch_size",
    "prompts.api.batch": "prompts.api.pairs_per_request",
    **{
        f"{section}.{key}": f"endpoint.{key}"
        for section in ("judge", "prompts.api")
        for key in "base_url model api_key_variable concurrency timeout_seconds max_attempts max_calls".split()
    },
    "science.level": "science.n_val, n_test, optimised, sensitivity, padding and strength",
}


@pytest.mark.parametrize("old", OLD)
def test_a_renamed_key_answers_with_its_new_name(tmp_path, old):
    said = refused(params_with(tmp_path, {old: 8}), "is now")
    assert re.fullmatch(rf"\S+params.yaml: {old} is now {OLD[old]}[^;]*: change the name", said)
    section, keys = OLD[old].split(".", 1)
    assert set(re.split(", | and ", keys)) <= {*RAW[section], *(f"api.{key}" for key in RAW["prompts"]["api"])}
    assert RENAMED.keys() == OLD.keys()


INFINITE, NAN = float("inf"), float("nan")
MISTAKES = [  # the key that is set, its value, what is said
    ("swep", {}, "swep: there is no such key"),
    ("sweep", REMOVED, "sweep: .*required"),
    ("report", REMOVED, "report: .*required"),
    ("sweep.alpha", 1.0, "sweep.alpha: there is no such key"),
    ("sweep.alphas", REMOVED, "sweep.alphas: .*required"),
    ("sweep.alphas", ["1.0"], r"sweep.alphas.0: .*valid number \(it is '1.0'\)"),
    ("sweep.alphas", 1.0, "sweep.alphas: .*list"),
    ("sweep.alphas", [], "sweep.alphas: .*at least 1"),
    ("sweep.alphas", [0.5, 0.0], "sweep.alphas.1: .*greater than 0"),
    ("sweep.alphas", [-1.0], "sweep.alphas.0: .*greater than 0"),
    ("sweep.alphas", [NAN], "sweep.alphas.0: .*nan"),
    ("sweep.alphas", [11.0], "sweep.alphas.0: .*less than or equal to 10"),
    ("sweep.alphas", [1.0, 1.0], "sweep: two alphas .* are the same"),
    ("sweep.alphas", [0.751, 0.75], "sweep: two alphas .to two decimals. .* are the same"),  # both would be named alpha_75
    ("sweep.layers", [3, 3], "sweep: two .* layers are the same"),
    ("sweep.layers", [-1], "sweep.layers.0: .*-1"),
    ("sweep.layers", [1.5], "sweep.layers.0: .*1.5"),
    ("sweep.layers", "all", "sweep.layers: .*'all'"),
    ("sweep.n_random", True, "sweep.n_random: .*integer"),
    ("sweep.n_random", 10**30, "sweep.n_random: .*10000"),
    ("sweep.method", "parallel", "sweep.method: .*'parallel'"),
    ("sweep.pairing", "shuffled", "sweep.pairing: .*'shuffled'"),  # a control: not swept
    ("generation.batch_size", 0, "generation.batch_size: .*greater than or equal to 1"),
    ("generation.batch_size", "128", "generation.batch_size: .*'128'"),
    ("generation.batch_size", 1.0, r"generation.batch_size: .*integer \(it is 1.0\); generation.batch_size: .*'auto'"),
    ("seed", -1, r"yaml: seed: [^;]*-1\)$"),  # told once, and not of every section that takes it
    ("n_resamples", REMOVED, r"yaml: n_resamples: [^;]*required$"),
    ("prompts.seed", "x" * 100_000, r"prompts.seed: .*integer \(it is 'xxx.*\.\.\..*xxx'\)"),
    ("prompts.near_duplicate", 0, "prompts.near_duplicate: .*greater than 0"),
    ("prompts.splits.train", 0.7, "prompts.splits: .*add up to 1"),
    ("prompts.splits", {"train": 0.6, "val": 0.4, "test": 0.0}, "prompts.splits.test: .*greater than 0"),
    ("prompts.splits", {"train": 0.5, "val": 0.5}, "prompts.splits.test: .*required"),
    ("prompts.n_pairs", None, "prompts: n_pairs must be a number"),
    ("prompts.n_unrelated", None, "prompts: n_unrelated must be a number"),
    ("prompts.harmful", ["a.csv", "a.csv"], "prompts.harmful: duplicate value"),
    ("prompts.harmful", "", "prompts.harmful.0: is empty"),
    ("prompts.harmless", ["a.csv"], "prompts.harmless: .*string"),
    ("prompts.n_unrelated", 10**12, "prompts.n_unrelated: .*10000"),
    ("prompts.source", None, "prompts.source: .*string"),
    ("prompts.source", "data/raw/a\0.csv", "prompts.source: .*NUL"),
    ("prompts.source", "", "prompts.source: is empty"),
    ("model.id", " ", "model.id: is empty"),
    ("model.dtype", "float64", "model.dtype: .*'float64'"),
    ("model.device", "gpu", "model.device: .*pattern.*'gpu'"),
    ("model.revision", "v1.0", "model: revision must be null where id is organism"),
    ("model.system_prompt", "Be\0kind", "model.system_prompt: .*control character"),
    ("organism.kind", "double", "organism.kind: .*'double'"),
    ("organism.num_attention_heads", 5, "organism: .*multiple of num_attention_heads"),
    ("organism.ablation_layer", 8, "organism: ablation_layer must be below"),
    ("organism.phase_1.learning_rate", 0, "organism.phase_1.learning_rate: .*greater than 0"),
    ("organism.phase_1.learning_rate", "4e-3x", "organism.phase_1.learning_rate: .*'4e-3x'"),
    ("organism.phase_1.learning_rate", INFINITE, "organism.phase_1.learning_rate: .*finite"),
    ("organism.phase_1.weight_decay", NAN, "organism.phase_1.weight_decay: .*finite"),
    ("activations.methods", [], "activations.methods: .*at least 1"),
    ("activations.methods", ["batched"], "sweep.method sequential is not among activations.methods"),
    ("activations.methods", ["sequential", "sequential"], "activations.methods: duplicate value; delete it"),
    ("directions.pairings", ["unrelated"], "sweep.pairing auto needs matched among directions.pairings"),
    ("generation.max_new_tokens", 256, r"long_answers.max_new_tokens must be more than generation.max_new_tokens \(256\): raise it, or"),
    ("long_answers.n_random", 11, r"long_answers.n_random takes the first of the sweep's: at most sweep.n_random \(10\)"),
    ("directions.pairings", ["matched", "matched"], "directions.pairings: duplicate value; delete it"),
    ("ablation", {"kind": "affine", "sites": "writes"}, "ablation: .*resid_pre alone"),
    ("ablation", {"kind": "affine", "sites": "paper"}, "ablation: .*resid_pre alone"),
    ("ablation.sites", "resid_post", "ablation.sites: .*'resid_post'"),
    ("endpoint.base_url", "http://", "endpoint.base_url: .*a host"),
    ("endpoint.base_url", "http://localhost:99999999/v1", "endpoint.base_url: .*a port"),
    ("endpoint.base_url", "http://local\x01host", "endpoint.base_url: "),
    ("judge.kind", "mood", "judge.kind: .*'mood'"),
    ("judge.labelled", "a\0", "judge.labelled: .*NUL"),
    ("judge.calibration", {"sensitivity": [9, 8], "specificity": [1, 2]}, "judge.calibration: sensitivity is .*9 of 8 is no share"),
    ("judge.calibration", {"sensitivity": [1, 2], "specificity": [0, 0]}, "judge.calibration: specificity is .*0 of 0 is no share"),
    ("select.top", 0, "select.top: .*greater than or equal to 1"),
    ("select.by", "accuracy", "select.by: .*'accuracy'"),
    ("orthogonalize.include_embedding", "yes", "orthogonalize.include_embedding: .*'yes'"),
    ("benchmark.suite", [], "benchmark.suite: must be organism, standard, or a list"),
    ("benchmark.suite", "standrd", "benchmark.suite: must be organism, standard, or a list"),
    ("benchmark.suite", ["../evil"], "benchmark.suite: .*names of lm-eval tasks"),
    ("benchmark.suite", ["/tmp/evil"], "benchmark.suite: .*names"),
    ("benchmark.suite", ["piqa", "piqa"], "benchmark.suite: .*each once"),
    ("benchmark.suite", [""], "benchmark.suite: .*names"),
    ("edits.checkpoints", "rank_1", "edits.checkpoints: .*list"),
    ("edits.checkpoints", [1], "edits.checkpoints: each is rank_1, random, a path, or a mapping with id and revision, and 1 is not"),
    ("edits.checkpoints", [""], "edits.checkpoints.0.id: is empty"),
    ("edits.checkpoints", [{"revision": "v1.0"}], "edits.checkpoints.0.id: .*required"),
    ("edits.checkpoints", ["rank_4"], r"edits.checkpoints: rank_4 is not made, with select.top 3: raise that, or delete this"),
    ("edits.checkpoints", ["random", "random"], "edits: checkpoints: two are called random"),
    ("edits.checkpoints", ["a/x", "b/x.gguf"], "edits: checkpoints: two are called x: figures could not tell them apart"),
    ("edits.checkpoints", ["a/rank_1"], "edits.checkpoints.0: a/rank_1 would be called rank_1, as a checkpoint of this study is: rename it"),
    ("edits.checkpoints", [{"id": "rank_1", "revision": "v1"}], "checkpoints.0: rank_1 is a checkpoint of this study, which has neither"),
    ("edits.checkpoints", [{"id": "a/b", "file": "x.gguf"}], "checkpoints.0: file names one of a hub id at revision; of a file here"),
    ("edits.checkpoints", [{"id": "a/b", "revision": "main"}], "checkpoints.0: revision: 'main' pins nothing: give a commit hash or a tag"),
    ("edits.checkpoints", [{"id": "a/b", "revision": "v1", "file": "x.bin"}], r"edits.checkpoints.0.file: .*pattern.*'x.bin'"),
    ("edits.checkpoints", [{"id": "a", "claim": {}}], "edits.checkpoints.0.claim: there is no such key .the nearest is edits.checkpoints.claims"),
    ("edits.checkpoints", [{"id": "a", "claims": {}}], "checkpoints.0.claims: give refusals, as .n, of., or kl, or both; without either"),
    ("edits.checkpoints", [{"id": "a", "claims": {"refusals": [5, 4]}}], "claims: refusals is .how many, of how many., and 5 of 4 is no share"),
    ("edits.checkpoints", [{"id": "a", "claims": {"refusals": [0, 0]}}], "claims: refusals is .*0 of 0 is no share"),
    ("edits.checkpoints", [{"id": "a", "claims": {"refusals": [3]}}], "claims.refusals: .*at least 2"),
    ("edits.checkpoints", [{"id": "a", "claims": {"kl": -0.1}}], "claims.kl: .*greater than or equal to 0"),
    ("edits.checkpoints", [{"id": "a", "claims": {"kl": "low"}}], "claims.kl: .*number"),
    ("edits.checkpoints", [{"id": "a", "claims": {"kl": 0.1, "source": ""}}], "claims.source: .*at least 1"),
    ("activations.n_positions", 0, "activations.n_positions: .*greater than or equal to 1"),
    ("benchmark.limit", 0, "benchmark.limit: .*greater than or equal to 1"),
    ("compute.threads", 10**9, "compute.threads: .*1024"),
    ("compute.engine", "spark", "compute.engine: .*local.*ray"),
    ("compute.gpus_per_worker", -1, "compute.gpus_per_worker: "),
]


@pytest.mark.parametrize(("key", "value", "said"), MISTAKES, ids=[f"{key} {i}" for i, (key, _, _) in enumerate(MISTAKES)])
def test_a_mistake_is_one_sentence_naming_file_and_key(tmp_path, key, value, said):
    assert len(refused(params_with(tmp_path, {key: value}), said)) < 2000


def test_the_same_prompts_have_one_name(tmp_path):
    file = params_with(tmp_path, {"prompts.harmful": "a.csv", "prompts.source": "b.csv"})
    refused(file, r"prompts: harmful stands in place of source: b\.csv: set source back to grammar, or harmful to null")
    params_with(tmp_path, {"prompts.source": "grammar", "prompts.n_pairs": None, "prompts.n_unrelated": None})
    assert load_params(file).prompts.harmful == ["a.csv"]


def test_several_mistakes_are_all_told(tmp_path):
    file = params_with(tmp_path, {"sweep.alphas": ["1"], "judge.kind": "mood", "report": REMOVED})
    refused(file, r"sweep\.alphas\.0: .*judge\.kind: .*report: .*required")


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts.source": "data/raw/pairs.csv", "prompts.n_pairs": None},
        {"prompts.splits": {"train": 0.7, "val": 0.2, "test": 0.1}},
        {"sweep.alphas": [1], "sweep.layers": [3, 4]},
        {"activations.methods": ["sequential"]},
        {"ablation.kind": "affine"},
        {"ablation.sites": "writes"},
        {"science.sensitivity": None, "science.padding": None, "science.strength": None},
        {"benchmark.limit": 10, "benchmark.suite": ["piqa", "boolq"]},
        {"edits.checkpoints": []},
        {"edits.checkpoints": ["rank_2", "a/folder", {"id": "a/b", "revision": "v1", "claims": {"refusals": [3, 100], "kl": 0}}]},
        {"model.device": "cuda:1", "model.system_prompt": "Be kind."},
    ],
    ids=str,
)
def test_sensible_settings_load(tmp_path, changes):
    load_params(params_with(tmp_path, changes))


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
FILES = [  # no parameters, or two in one
    (None, "No such file"),
    (b"", "the file: .*dictionary"),
    (b"- a\n- b\n", "the file: .*dictionary"),
    (b"a: [1\n", "cannot be read as YAML"),
    (b"\xff\xfe", "cannot be read as YAML"),
    (b"a: !!python/object/apply:os.getcwd []\n", "cannot be read as YAML"),
    (b"[" * 600, "cannot be read as YAML: its brackets are nested too deeply"),
    (COMMITTED + "\nsweep: {}\n", r"line \d+: sweep is a duplicate key; delete one"),
    (COMMITTED.replace("  seed: 0", "  seed: 0\n  seed: 1", 1), r"line \d+: seed is a duplicate key; delete one"),
    (COMMITTED + "\n? [1, 2]\n: 3\n", "unhashable"),
    (COMMITTED + "\n1: 2\n", "1: Keys should be strings"),
    (COMMITTED + "\nmore: &a [*a]\n", "more: there is no such key"),
    (COMMITTED + "\n" + BOMB, "a0: there is no such key .*a8: there is no such key"),
    (COMMITTED + "\n---\na: 1\n", "single document"),
    (COMMITTED.replace("seed: 0", "seed: " + "9" * 5000), "cannot be read as YAML"),
    (COMMITTED.replace("seed: 0", "seed: 2020-01-01", 1), "seed: .*integer"),
    (COMMITTED.replace("  seed", "\tseed"), "cannot be read as YAML"),
    (COMMITTED + "\0", "cannot be read as YAML"),
]


@pytest.mark.parametrize(("content", "said"), FILES, ids=range(len(FILES)))
def test_a_file_that_is_no_parameters(tmp_path, content, said):
    file = tmp_path / "params.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(file, said)


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
@SETTINGS
def test_any_bytes_are_told_in_one_sentence(tmp_path, content):
    (tmp_path / "params.yaml").write_bytes(content)
    refused(tmp_path / "params.yaml", "params.yaml: ")


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**40), 10**40), st.floats(), st.text(st.characters(codec="utf-8"), max_size=20),
    st.dates(), st.lists(st.integers(), max_size=3), st.dictionaries(st.text(string.ascii_letters), st.integers(), max_size=2),
)  # fmt: skip


def leaves(model: dict, at: str = "") -> list[str]:
    return [
        leaf
        for name, value in model.items()
        for leaf in (leaves(value, f"{at}{name}.") if isinstance(value, dict) else [f"{at}{name}"])
    ]


@given(st.sampled_from(leaves(RAW)), st.one_of(SCALARS, st.just(REMOVED)))
@SETTINGS
def test_any_value_of_any_key_is_taken_as_it_is_or_named(tmp_path, key, value):
    (tmp_path / "params.yaml").unlink(missing_ok=True)
    file = params_with(tmp_path, {key: value})
    section, name = key.split(".")[0], key.split(".")[-1]
    try:
        taken = load_params(file)
    except UserError as error:
        assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
        # A rule about a section names the section, and says which key of it.
        assert key in str(error) or (section in str(error) and name in str(error)), (key, str(error))
    else:
        for part in key.split("."):
            taken = getattr(taken, part)
        if value is REMOVED:  # the file's own seed and n_resamples, else the key's default
            model = Params
            for part in key.split("."):
                field = model.model_fields[part]
                model = field.annotation
            value = RAW[name] if name in ("seed", "n_resamples") else field.default  # `model` is a section too
        if key == "prompts.harmful" and isinstance(value, str):  # one set is a list of one
            value = [value]
        assert taken == value


def test_an_overlay_changes_the_keys_it_names_and_no_other(tmp_path):
    file, overlay = params_with(tmp_path, {}), tmp_path / "overlay.yaml"
    overlay.write_text(
        "sweep: {alphas: [1.0], seed: 3}\nscience:\n  padding: null\n  optimised: {steps: 7}\nmodel: {system_prompt: 1e5}\n"
    )
    wanted = yaml.safe_load(COMMITTED)
    wanted["sweep"] |= {"alphas": [1.0], "seed": 3}
    wanted["science"]["padding"] = None
    wanted["science"]["optimised"]["steps"] = 7
    with pytest.raises(UserError, match=r"overlay.yaml: model.system_prompt: .* \(it is 100000.0\)$"):
        overlaid(file, overlay)
    overlay.write_text(overlay.read_text().replace("1e5", "'1e5'"))
    wanted["model"]["system_prompt"] = "1e5"
    assert overlaid(file, overlay) == wanted
    overlay.write_text("# nothing yet\n")
    assert overlaid(file, overlay) == RAW


def test_what_is_wrong_with_params_yaml_is_not_said_of_the_overlay(tmp_path):
    file, overlay = params_with(tmp_path, {"select.top": 0}), tmp_path / "overlay.yaml"
    overlay.write_text("select: {top: 0}\n")
    with pytest.raises(UserError, match=r"params.yaml: select.top: "):
        overlaid(file, overlay)
