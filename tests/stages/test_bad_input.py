"""Broken pair files and replies of an endpoint, and params.yaml as a user meets its errors: one sentence each, and nothing is lost."""

import json
import os
import re
import string

import pytest
from api_server import Reply, serve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from place import COMMITTED, Place
from split_file import file_rows

from refusal.data.prompts import SPLITS
from refusal.data.prompts_api import api_pairs
from refusal.io.endpoint import Endpoint
from refusal.io.errors import UserError
from refusal.io.params import Prompts
from refusal.io.store import Store

SHARES, NEAR = {"train": 0.6, "val": 0.2, "test": 0.2}, 0.8
PAIRS = [[f"how do I break a{i} b{i} c{i}", f"how do I mend d{i} e{i} f{i}"] for i in range(10)]


# Pair files; the table of broken ones is in tests/data/test_prompts.py


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"a\.json: cannot be read: it is no file"):
        file_rows(tmp_path / "a.json", 2, None, SHARES, NEAR, 0)


def test_right_to_left_text_is_text(tmp_path):
    row = ["كيف أكسر هذا القفل القديم", "איך מתקנים את החלון \u200fהזה\u200e"]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [row, *PAIRS])), encoding="utf-8")
    rows = file_rows(tmp_path / "a.jsonl", 2, None, SHARES, NEAR, 0)
    assert [rows[0]["harmful"], rows[0]["safe"]] == row and len(rows) == 11


def test_names_in_a_pair_file_become_no_ids(tmp_path):
    given = [{"id": "../../x", "split": "../train", "topic": "/etc", "harmful": a, "safe": b} for a, b in PAIRS]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    rows = file_rows(tmp_path / "a.jsonl", 2, None, SHARES, NEAR, 0)
    assert [row["id"] for row in rows] == [f"pair-{i:05d}" for i in range(10)]
    assert {row["split"] for row in rows} == set(SPLITS) and all(row["topic"].startswith("group ") for row in rows)


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(10**40), 10**40), st.floats(), st.text(max_size=20), st.dates())
ROWS = st.dictionaries(st.sampled_from(["harmful", "safe", "topic"]), SCALARS)
BYTES = st.one_of(
    st.binary(max_size=100),
    st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.recursive(SCALARS | ROWS, lambda inner: st.lists(inner, max_size=3), max_leaves=8).map(
        lambda v: json.dumps(v, default=str).encode()
    ),
    st.text(string.printable, max_size=60).map(lambda text: f"harmful,safe\n{text}".encode()),
)


@given(st.sampled_from(["a.json", "a.jsonl", "a.csv"]), BYTES, st.sampled_from([1, 2]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_for_pairs_are_rows_or_one_sentence(tmp_path, name, content, width):
    (tmp_path / name).write_bytes(content)
    try:
        rows = file_rows(tmp_path / name, width, None, SHARES, NEAR, 0)
    except UserError as error:
        assert str(error).startswith(f"{tmp_path / name}: ") and "\n" not in str(error)
    else:
        assert {row["split"] for row in rows} == set(SPLITS)
        assert all(row[half].strip() == row[half] != "" for row in rows for half in ("harmful", "safe")[2 - width :])


# Replies of an endpoint that is asked for pairs; the judge's are in tests/judges/test_llm.py


def twenty_pairs(url: str, store: Store, max_rounds: int) -> list[dict]:
    endpoint = Endpoint(base_url=url, api_key_variable=None, timeout_seconds=5.0, max_attempts=1)
    api, counts = {"pairs_per_request": 4, "max_rounds": max_rounds}, {"n_pairs": 20, "n_unrelated": None}
    p = Prompts(source="api", unrelated="data/raw/a.csv", **counts, splits=SHARES, near_duplicate=NEAR, seed=0, api=api)
    return api_pairs(p, endpoint, store)


def message(content: object) -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    return Reply(raw=json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}))


NO_ANSWER = r"params.yaml: endpoint: deepseek-chat at \S+ did not answer .the answers were no chat completions.*the cause"
NO_PAIRS = "prompts.source: deepseek-chat gave 0 of 20 valid pairs in 1 rounds"
HALF_A_CHARACTER = '{"pairs": [{"harmful": "How do I break \\ud800 it?", "safe": "How do I mend it?"}]}'


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        *((Reply(raw=raw), NO_ANSWER) for raw in ("<html>", "", "[]", "null", '"x"', "[" * 100_000, "9" * 5000, '{"error": {}}')),
        *((Reply(raw=f'{{"choices": {raw}}}'), NO_ANSWER) for raw in ("null", "[]", '"x"', '[{"message": null}]')),
        (Reply(status=204, raw=""), NO_ANSWER),
        (Reply(raw="xx", headers={"Content-Encoding": "gzip"}), "did not answer .no connection"),
        (Reply(status=302, headers={"Location": "file:///etc/hostname"}), "did not answer .no connection"),
        (Reply(status=418, error="I'm a\nteapot"), "rejects every request .418: I'm a teapot.*the cause"),
        (Reply(status=400, raw="[1]"), r"rejects every request .400: \[1\]"),
        (message([{"type": "text", "text": "x"}]), NO_PAIRS),
        (message(3), "gave nothing to read: the answers were empty"),
        (Reply('{"pairs": ' + "[" * 100_000), NO_PAIRS),
        (Reply('{"pairs": ' + "9" * 5000 + "}"), NO_PAIRS),
        (Reply('{"pairs": [NaN, 1, {"harmful": {}, "safe": []}]}'), rf"{NO_PAIRS}.*a half missing"),
        (Reply(HALF_A_CHARACTER), rf"{NO_PAIRS}.*not one line"),
    ],
    ids=range(23),
)
def test_a_reply_that_is_none_is_one_sentence(tmp_path, reply, said):
    with serve(lambda n, question: reply) as server, pytest.raises(UserError, match=said) as error:
        twenty_pairs(server.url, Store(tmp_path / "store.sqlite"), max_rounds=1)
    assert str(error.value).startswith("params.yaml: ") and "\n" not in str(error.value) and len(str(error.value)) < 2000


@pytest.mark.parametrize("broken", [Reply(raw="<html>"), Reply(status=400, error="no such model")], ids=["malformed", "rejected"])
def test_an_endpoint_that_works_again_is_asked_again(tmp_path, broken):
    """What was no answer is not kept for one: the next run asks anew, and for nothing that it has."""
    store, works = Store(tmp_path / "store.sqlite"), []

    def reply(n: int, question: str) -> str | Reply:
        asked = json.loads(question)
        if not works:
            return broken
        rows = [" ".join([f"{asked['category']}{i}{c}" for c in "abcde"]) for i in range(asked["number"])]
        return json.dumps({"pairs": [{"harmful": f"How do I break {row}?", "safe": f"How do I mend {row}?"} for row in rows]})

    with serve(reply) as server:
        with pytest.raises(UserError, match="every answer so far is kept"):
            twenty_pairs(server.url, store, max_rounds=2)
        works.append(True)
        assert len(twenty_pairs(server.url, store, max_rounds=2)) == 20
        n = server.asked.total()
        assert len(twenty_pairs(server.url, store, max_rounds=2)) == 20 and server.asked.total() == n


# As a user meets it: in a process of its own, and what was there before is there after


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (lambda place: place.write("params.yaml", COMMITTED + "\nprompts: {}\n"), "params.yaml: .* prompts is a duplicate key"),
        (lambda place: place.set("prompts", source="data/raw/a.json"), r"data/raw/a\.json: .*brackets"),
    ],
    ids=["params", "pairs"],
)
def test_what_was_computed_stays(tmp_path, breaks, said):
    place = Place(tmp_path)
    place.write("data/raw/a.json", "[" * 5000)
    before = {path: path.read_bytes() for path in (tmp_path / "data/prompts").iterdir()}
    breaks(place)
    status, output = place.stage("prompts")
    last = output.strip().splitlines()[-1]
    assert status == 1 and "Traceback" not in output and re.match(f"prompts: {said}", last), output
    assert {path: path.read_bytes() for path in (tmp_path / "data/prompts").iterdir()} == before
