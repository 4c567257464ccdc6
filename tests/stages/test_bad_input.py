"""What a user or an endpoint may hand in that is broken: parameters, pair files, answers. One sentence each, and nothing is lost."""

import json
import os
import re
import string

import pytest
import yaml
from api_server import Reply, serve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_mistakes import ROOT, Place
from test_params import REMOVED, changed

from refusal.data.prompts import SPLITS, file_rows, grammar_unrelated
from refusal.data.prompts_api import api_pairs
from refusal.io.errors import UserError
from refusal.io.params import Endpoint, PromptsApi, load_params
from refusal.io.store import Store

SHARES, NEAR = {"train": 0.6, "val": 0.2, "test": 0.2}, 0.8
COMMITTED = (ROOT / "params.yaml").read_text(encoding="utf-8")
SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def sentence(error: pytest.ExceptionInfo, where: object) -> str:
    text = str(error.value)
    assert str(where) in text and "\n" not in text and len(text) < 2000
    return text


# Parameters

PHASE = yaml.safe_load(COMMITTED)["organism"]["phase_1"]
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"organism.phase_1": PHASE | {"learning_rate": float("inf")}}, "organism.phase_1.learning_rate: .*finite"),
        ({"organism.phase_1": PHASE | {"weight_decay": float("nan")}}, "organism.phase_1.weight_decay: .*finite"),
        ({"prompts.n_unrelated": 10**12}, "prompts.n_unrelated: .*10000"),
        ({"prompts.source": "data/raw/a\0.csv"}, "prompts.source: .*NUL"),
        ({"prompts.source": ""}, "prompts.source: is empty"),
        ({"model.id": " "}, "model.id: is empty"),
        ({"judge.labelled": "a\0"}, "judge.labelled: .*NUL"),
        ({"model.system_prompt": "Be\0kind"}, "model.system_prompt: .*control character"),
        ({"compute.threads": 10**9}, "compute.threads: .*1024"),
        ({"sweep.n_random": 10**30}, "sweep.n_random: .*10000"),
        ({"sweep.batch_size": 1.0}, r"sweep.batch_size: .*integer \(it is 1.0\); sweep.batch_size: .*'auto'"),
        ({"activations.methods": ["sequential", "sequential"]}, "activations.methods: one stands twice"),
        ({"directions.pairings": ["matched", "matched"]}, "directions.pairings: one stands twice"),
        ({"benchmark.suite": ["../evil"]}, "benchmark.suite: .*names of lm-eval tasks"),
        ({"benchmark.suite": ["/tmp/evil"]}, "benchmark.suite: .*names"),
        ({"benchmark.suite": ["piqa", "piqa"]}, "benchmark.suite: .*each once"),
        ({"benchmark.suite": [""]}, "benchmark.suite"),
        ({"judge.base_url": "http://"}, "judge.base_url: .*a host"),
        ({"judge.base_url": "http://localhost:99999999/v1"}, "judge.base_url: .*a port"),
        ({"judge.base_url": "http://local\x01host"}, "judge.base_url"),
        ({"prompts.seed": "x" * 100_000}, r"prompts.seed: .*integer \(it is 'xxx.*\.\.\..*xxx'\)"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_meant_is_named(tmp_path, changes, said):
    with pytest.raises(UserError, match=said) as error:
        load_params(changed(tmp_path, changes))
    sentence(error, tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (COMMITTED + "\nsweep: {}\n", r"line \d+: sweep stands twice; delete one"),
        (COMMITTED.replace("  seed: 0\n", "  seed: 0\n  seed: 1\n", 1), "seed stands twice; delete one"),
        (COMMITTED + "\n? [1, 2]\n: 3\n", "unhashable"),
        (COMMITTED + "\n1: 2\n", "1: Keys should be strings"),
        (COMMITTED + "\nmore: &a [*a]\n", "more: Extra inputs are not permitted"),
        (COMMITTED + "\n" + BOMB, "a0: Extra inputs .*a8: Extra inputs"),
        (COMMITTED + "\n---\na: 1\n", "single document"),
        (COMMITTED.replace("seed: 0", "seed: " + "9" * 5000), "cannot be read as YAML"),
        (COMMITTED.replace("seed: 0", "seed: 2020-01-01", 1), "seed: .*integer"),
        (COMMITTED.replace("  seed", "\tseed"), "cannot be read as YAML"),
        ("[" * 600, "too many brackets in one another"),
        (COMMITTED + "\0", "cannot be read as YAML"),
    ],
    ids=range(12),
)
def test_a_file_that_says_two_things_or_none_is_no_parameters(tmp_path, text, said):
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said) as error:
        load_params(tmp_path / "params.yaml")
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'params.yaml'}: ") and "\n" not in text and len(text) < 4000


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


@given(st.sampled_from(leaves(yaml.safe_load(COMMITTED))), st.one_of(SCALARS, st.just(REMOVED)))
@SETTINGS
def test_any_value_of_any_key_is_taken_as_it_is_or_named(tmp_path, key, value):
    file = changed(tmp_path, {key: value})
    try:
        taken = load_params(file)
    except UserError as error:
        assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
        # A rule about a section names the section, and says which key of it.
        assert key in str(error) or (key.split(".")[0] in str(error) and key.rsplit(".")[-1] in str(error)), (key, str(error))
    else:
        for part in key.split("."):
            taken = getattr(taken, part)
        # What an endpoint is like may be left out: `calibrate` takes the same ones from its command line.
        assert taken == (Endpoint.model_fields[key.rsplit(".")[-1]].default if value is REMOVED else value)


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
@SETTINGS
def test_any_bytes_for_params_are_told_in_one_sentence(tmp_path, content):
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(UserError) as error:
        load_params(tmp_path / "params.yaml")
    sentence(error, "params.yaml: ")


# Pair files

PAIRS = [[f"how do I break a{i} b{i} c{i}", f"how do I mend d{i} e{i} f{i}"] for i in range(10)]


def jsonl(*rows: object) -> str:
    return "\n".join(json.dumps(row) for row in (*rows, *PAIRS))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", "[" * 200_000, "not JSON .too many brackets in one another"),
        ("a.jsonl", "[" * 200_000, "row 1 is not JSON .too many brackets in one another"),
        ("a.json", f"[[{'9' * 5000}, 1]]", "not JSON .*digits"),
        ("a.jsonl", f"[{'9' * 5000}, 1]", "row 1 is not JSON .*digits"),
        ("a.jsonl", '{"harmful": "a", "harmful": "b", "safe": "c"}', "row 1 is not JSON .duplicate key"),
        ("a.csv", "harmful,safe,safe\na,b,c\n", "column safe stands twice"),
        ("a.csv", 'harmful,safe\n"a,b\n', "cannot be read as CSV .*correct the row"),
        ("a.csv", "harmful,safe\n" + "x" * 10_000_000 + ",b\n", "cannot be read as CSV .*field limit"),
        ("a.jsonl", jsonl(["x" * 10_000_000, "b"]), "row 1 has a prompt of 10000000 characters"),
        ("a.jsonl", "x" * 10_000_000, "row 1 is not JSON"),
        ("a.csv", "harmful,safe\na\0,b\n", "row 1 has a control character"),
        ("a.jsonl", jsonl(["a\x7f b", "c"]), "row 1 has a control character"),
        ("a.jsonl", jsonl(["a\x9b31m b", "c"]), "row 1 has a control character"),
        ("a.jsonl", jsonl(["\u200b\u200b", "c"]), "row 1 has an empty prompt"),
        ("a.jsonl", jsonl(["\ufeff", "c"]), "row 1 has an empty prompt"),
        ("a.csv", "harmful,safe\na,b\n".encode("utf-16"), "save it as UTF-8"),
        ("a.csv", "harmful,safe\né,b\n".encode("latin-1"), "save it as UTF-8"),
    ],
    ids=range(17),
)
def test_a_broken_pair_file_is_told_with_its_row(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said) as error:
        file_rows(tmp_path / name, 2, None, SHARES, NEAR, 0)
    sentence(error, tmp_path / name)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"a\.json: cannot be read: it is no file"):
        file_rows(tmp_path / "a.json", 2, None, SHARES, NEAR, 0)


def test_right_to_left_text_is_text(tmp_path):
    row = ["كيف أكسر هذا القفل القديم", "איך מתקנים את החלון \u200fהזה\u200e"]
    (tmp_path / "a.jsonl").write_text(jsonl(row), encoding="utf-8")
    found = file_rows(tmp_path / "a.jsonl", 2, None, SHARES, NEAR, 0)
    assert [found[0]["harmful"], found[0]["safe"]] == row and len(found) == 11


def test_names_in_a_pair_file_become_no_ids(tmp_path):
    rows = [{"id": "../../x", "split": "../train", "topic": "/etc", "harmful": a, "safe": b} for a, b in PAIRS]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = file_rows(tmp_path / "a.jsonl", 2, None, SHARES, NEAR, 0)
    assert [row["id"] for row in found] == [f"pair-{i:05d}" for i in range(10)]
    assert {row["split"] for row in found} == set(SPLITS) and all(row["topic"].startswith("group ") for row in found)


@given(
    st.sampled_from(["a.json", "a.jsonl", "a.csv"]),
    st.one_of(
        st.binary(max_size=100),
        st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=8).map(
            lambda v: json.dumps(v, default=str).encode()
        ),
        st.text(string.printable, max_size=60).map(lambda text: f"harmful,safe\n{text}".encode()),
    ),
    st.sampled_from([1, 2]),
)
@SETTINGS
def test_any_bytes_for_pairs_are_rows_or_one_sentence(tmp_path, name, content, width):
    (tmp_path / name).write_bytes(content)
    try:
        rows = file_rows(tmp_path / name, width, None, SHARES, NEAR, 0)
    except UserError as error:
        assert str(error).startswith(f"{tmp_path / name}: ") and "\n" not in str(error)
    else:
        assert {row["split"] for row in rows} == set(SPLITS)
        assert all(row[half].strip() == row[half] != "" for row in rows for half in ("harmful", "safe")[2 - width :])


def test_more_requests_than_the_grammar_has_are_refused():
    with pytest.raises(UserError, match=r"n_unrelated: the grammar has no 100000 distinct .*ask for fewer"):
        grammar_unrelated(100_000, SHARES, 0)


# Answers of an endpoint that is asked for pairs; the judge's are in test_llm.py


def message(content: object) -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    return Reply(raw=json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}))


NO_ANSWER = r"params.yaml: prompts.api: deepseek-chat at \S+ did not answer .the answers were no chat completions.*mend the cause"
NO_PAIRS = "prompts.source: deepseek-chat gave 0 of 20 valid pairs in 1 rounds"


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        *((Reply(raw=raw), NO_ANSWER) for raw in ("<html>", "", "[]", "null", '"x"', "[" * 100_000, "9" * 5000, '{"error": {}}')),
        *((Reply(raw=f'{{"choices": {raw}}}'), NO_ANSWER) for raw in ("null", "[]", '"x"', '[{"message": null}]')),
        (Reply(status=204, raw=""), NO_ANSWER),
        (Reply(raw="xx", headers={"Content-Encoding": "gzip"}), "did not answer .no connection"),
        (Reply(status=302, headers={"Location": "file:///etc/hostname"}), "did not answer .no connection"),
        (Reply(status=418, error="I'm a\nteapot"), "rejects every request .418: I'm a teapot.*mend the cause"),
        (Reply(status=400, raw="[1]"), "rejects every request .400: no reason given"),
        (message([{"type": "text", "text": "x"}]), NO_PAIRS),
        (message(3), NO_PAIRS),
        (Reply('{"pairs": ' + "[" * 100_000), NO_PAIRS),
        (Reply('{"pairs": ' + "9" * 5000 + "}"), NO_PAIRS),
        (Reply('{"pairs": [NaN, 1, {"harmful": {}, "safe": []}]}'), rf"{NO_PAIRS}.*a half missing"),
        (
            Reply('{"pairs": [{"harmful": "How do I break \\ud800 it?", "safe": "How do I mend it?"}]}'),
            rf"{NO_PAIRS}.*not one line",
        ),
    ],
    ids=range(23),
)
def test_an_answer_that_is_none_is_one_sentence(tmp_path, reply, said):
    with serve(lambda n, question: reply) as server, pytest.raises(UserError, match=said) as error:
        api = PromptsApi(base_url=server.url, api_key_variable=None, batch=4, max_rounds=1, timeout_seconds=5.0, max_attempts=1)
        api_pairs(20, SHARES, NEAR, 0, api, Store(tmp_path / "store.sqlite"))
    sentence(error, "params.yaml: prompts.")


@pytest.mark.parametrize("broken", [Reply(raw="<html>"), Reply(status=400, error="no such model")], ids=["garbled", "rejected"])
def test_an_endpoint_that_is_mended_is_asked_again(tmp_path, broken):
    """What was no answer is not kept for one: the next run asks anew, and for nothing that it has."""
    store, mended = Store(tmp_path / "store.sqlite"), []

    def reply(n: int, question: str) -> str | Reply:
        asked = json.loads(question)
        if not mended:
            return broken
        rows = [" ".join([f"{asked['category']}{i}{c}" for c in "abcde"]) for i in range(asked["number"])]
        return json.dumps({"pairs": [{"harmful": f"How do I break {row}?", "safe": f"How do I mend {row}?"} for row in rows]})

    with serve(reply) as server:
        api = PromptsApi(base_url=server.url, api_key_variable=None, batch=4, max_rounds=2, timeout_seconds=5.0, max_attempts=1)
        with pytest.raises(UserError, match="every answer so far is kept"):
            api_pairs(20, SHARES, NEAR, 0, api, store)
        mended.append(True)
        assert len(api_pairs(20, SHARES, NEAR, 0, api, store)) == 20
        n = server.asked.total()
        assert len(api_pairs(20, SHARES, NEAR, 0, api, store)) == 20 and server.asked.total() == n


# As a user meets it: in a process of its own, and what was there before is there after

BROKEN_INPUT = {
    "params": (lambda place: place.write("params.yaml", COMMITTED + "\nprompts: {}\n"), "params.yaml: .* prompts stands twice"),
    "pairs": (lambda place: place.set("prompts", source="data/raw/a.json"), r"data/raw/a\.json: .*too many brackets"),
}


@pytest.mark.parametrize("name", BROKEN_INPUT)
def test_what_was_computed_stays(tmp_path, name):
    place = Place(tmp_path)
    place.write("data/raw/a.json", "[" * 5000)
    before = {path: path.read_bytes() for path in (tmp_path / "data/prompts").iterdir()}
    breaks, said = BROKEN_INPUT[name]
    breaks(place)
    status, output = place.stage("prompts")
    last = output.strip().splitlines()[-1]
    assert status == 1 and "Traceback" not in output and last.startswith("prompts: "), output
    assert re.search(said, last)
    assert {path: path.read_bytes() for path in (tmp_path / "data/prompts").iterdir()} == before
