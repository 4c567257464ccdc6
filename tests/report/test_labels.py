"""Labels by people: what is asked for, the file of answers, the page in a real browser, and how far two raters agree."""

import csv
import http.client
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
from browser import serious
from pipeline.study import outputs, run, stages_run
from place import ROOT, Place

from refusal.io.errors import UserError
from refusal.judges.calibrate import read_labelled
from refusal.report.label_terminal import ask
from refusal.report.labels import COLUMNS, LABELS, Answer, LabelFile, Session, Text, raters_agree, sample

ROWS = [
    {
        "arm": f"arm_{arm}",
        "id": f"pair-{i}",
        "category": "fraud",
        "half": half,
        "name": "secret-intervention",
        "prompt": f"{half} {i}?",
    }
    | {"completion": f'Said, "so"\n{arm} {i} ü', "label": "secret-verdict", "compliance": float(i < passed), "coherence": 1.0}
    for arm, passed in (("a", 2), ("b", 20), ("c", 40))
    for half in ("harmful", "safe")
    for i in range(40)
]
HARMFUL = [row for row in ROWS if row["half"] == "harmful"]
NASTY = [Text("a, b", 'say "no"'), Text("x", "two\nlines\r\nand a \r"), Text("=1+1", ""), Text("ü", "\t\0 '")]


def strata(texts: list[Text]) -> Counter:
    of = {Text(row["prompt"], row["completion"]): (row["arm"], row["compliance"]) for row in HARMFUL}
    return Counter(of[text] for text in texts)


def test_strata_share_evenly_as_far_as_they_go():
    sizes = strata(sample(HARMFUL, 42, 0))
    assert sizes == {("arm_a", 1): 2, ("arm_a", 0): 10, ("arm_b", 1): 10, ("arm_b", 0): 10, ("arm_c", 1): 10}
    assert set(strata(sample(HARMFUL, 43, 0)).values()) == {2, 10, 11}
    assert len(sample(HARMFUL, 1000, 0)) == 120


def test_a_sample_depends_on_seed_and_texts_alone():
    drawn, shuffled = sample(HARMFUL, 30, 0), random.Random(1).sample(HARMFUL, len(HARMFUL))
    assert sample(shuffled, 30, 0) == drawn and sample(HARMFUL, 30, 1) != drawn
    assert set(drawn) < set(sample(HARMFUL, 60, 0))
    twice = [*HARMFUL, *({**row, "arm": "again"} for row in HARMFUL)]
    assert len(set(sample(twice, 1000, 0))) == len(sample(twice, 1000, 0)) == 120


def test_every_text_of_a_stratum_is_as_likely_and_the_order_tells_nothing():
    """Over 400 seeds: 20 of 40 expected in one stratum of 20, and an arm's mean place is the middle."""
    drawn, places = Counter(), defaultdict(list)
    for seed in range(400):
        for place, text in enumerate(sample(HARMFUL, 42, seed)):
            drawn[text] += 1
            places[next(iter(strata([text])))].append(place)
    counts = [drawn[Text(row["prompt"], row["completion"])] for row in HARMFUL if row["arm"] == "arm_b"]
    assert sum(counts) == 400 * 20 and sum((n - 200) ** 2 / 100 for n in counts) < 80  # chi-squared, 38 degrees: p < .0001
    assert all(abs(sum(p) / len(p) - 20.5) < 4 * 12.2 / len(p) ** 0.5 for p in places.values())


def test_answers_come_back_as_they_were(tmp_path):
    file = LabelFile(tmp_path / "deep/labels.csv")
    given = [Answer(text, label, "0.5") for text, label in zip(NASTY, LABELS, strict=True)]
    for answer in given:
        file.append(answer)
    assert file.answers() == given and file.repair() is None
    with file.path.open(encoding="utf-8", newline="") as read:
        assert [tuple(row) for row in csv.reader(read)] == [COLUMNS, *((*a.text, a.label, a.coherence) for a in given)]
    file.remove(NASTY[1])
    assert file.answers() == [given[0], *given[2:]]


def test_judge_labelled_reads_the_file(tmp_path):
    file = LabelFile(tmp_path / "labels.csv")
    for text, label in zip(NASTY, LABELS[:3], strict=False):
        file.append(Answer(text, label, "1"))
    assert read_labelled(str(file.path)) == [(*text, label) for text, label in zip(NASTY, LABELS[:3], strict=False)]


def test_a_file_cut_at_any_byte_goes_on(tmp_path):
    """As kill -9 may leave it: whole answers stay, half of one is named and asked again."""
    file, answers = LabelFile(tmp_path / "labels.csv"), [Answer(text, "refusal", "0.5") for text in NASTY]
    ends = [0]
    for answer in answers:
        file.append(answer)
        ends.append(file.path.stat().st_size)
    data = file.path.read_bytes()
    header = data.index(b"\n") + 1
    for cut in sorted({*range(1, len(data), 5), *ends[1:-1], header}):
        file.path.write_bytes(data[:cut])
        n = sum(end <= cut for end in ends[1:])
        said = file.repair()
        assert file.answers() == answers[:n]
        assert (said is None) == (cut in ends or cut == header)
        if said and cut > header:
            assert f"labels.csv, row {n + 1}: half a row" in said
        for answer in answers[n:]:
            file.append(answer)
        assert file.path.read_bytes() == data
    assert (tmp_path / "labels.csv.corrupt-1").read_bytes() == data[:1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,label\n", "its header is prompt,label; make it prompt,completion,label,coherence"),
        ("{h}a,b,refusal,1\na,c,refusal\n", "row 2: it has 3 fields and not 4"),
        ("{h}a,b,refused,1\n", "row 1: label is 'refused'; make it one of compliance"),
        ("{h}a,b,refusal,0.7\n", "row 1: coherence is '0.7'; make it one of 0, 0.5, 1"),
        ("{h}a,b,refusal,1\na,b,refusal,0\n", "row 2: it labels a text that an earlier row labels"),
        ("{h}a\udcffb,b,refusal,1\n", "is not in UTF-8"),
    ],
)
def test_a_damaged_file_is_named_with_its_row(tmp_path, text, said):
    path = tmp_path / "labels.csv"
    path.write_bytes(text.replace("{h}", ",".join(COLUMNS) + "\n").encode(errors="surrogateescape"))
    with pytest.raises(UserError) as error:
        LabelFile(path).answers()
    assert said in str(error.value) and str(path) in str(error.value)


def test_two_raters():
    """A textbook table (Cohen 1960's formula by hand): 35 of 50 alike, kappa .4."""
    table = {
        ("compliance", "compliance"): 20,
        ("compliance", "refusal"): 5,
        ("refusal", "compliance"): 10,
        ("refusal", "refusal"): 15,
    }
    pairs = [pair for pair, k in table.items() for _ in range(k)]
    first = [Answer(Text(str(i), ""), a, "1") for i, (a, _) in enumerate(pairs)]
    second = [Answer(Text(str(i), ""), b, "1" if i % 2 else "0") for i, (_, b) in enumerate(pairs)]
    figures = raters_agree([*first, Answer(Text("only", ""), "refusal", "1")], second[::-1])
    assert (figures["n"], figures["n_first_only"], figures["n_second_only"]) == (50, 1, 0)
    assert figures["agreement"] == 0.7 and figures["kappa"] == pytest.approx(0.4) and figures["coherence_agreement"] == 0.5
    assert figures["kappa_low"] < 0.4 < figures["kappa_high"] and figures["confusion"]["compliance"]["refusal"] == 5
    with pytest.raises(UserError, match="no text in common"):
        raters_agree(first, [Answer(Text("other", ""), "refusal", "1")])


def test_the_terminal(tmp_path, capsys):
    """Nothing shown or labelled until h; an answer, a skip, a key that is none, an answer; back over both, and others."""
    session = Session([Text("p0", "c\x1b[2J0"), Text("p1", "c1"), Text("p2", "")], LabelFile(tmp_path / "l.csv"))
    keys = iter("1h" + "11" + "s" + "2x25" + "bb" + "31" + "40")
    ask(session, lambda: next(keys, "q"))
    told = capsys.readouterr().out
    assert told.count("is hidden") == 2 and told.index("is hidden") < told.index("p0")
    assert "c\ufffd[2J0" in told and "\x1b" not in told and "(empty)" in told and "1 of 3" in told
    given = {a.text.prompt: (a.label, a.coherence) for a in session.file.answers()}
    assert given == {"p0": ("compliance", "1"), "p1": ("refusal", "1"), "p2": ("degenerate", "0")}


@pytest.fixture
def served(tmp_path):
    """Starts the command in a folder with completions; gives the process and the address. Killed at the end."""
    place = Place(tmp_path)
    place.write_rows("data/evaluated/completions.jsonl", ROWS)
    started = []

    def start(*arguments: str) -> tuple[subprocess.Popen, str]:
        command = [sys.executable, "-m", "stages.label", "--n", "10", "--port", "0", *arguments]
        process = subprocess.Popen(command, cwd=tmp_path, env=place.environment, stdout=subprocess.PIPE, text=True)
        started.append(process)
        for line in process.stdout:
            if "label: open " in line:
                return process, line.split()[2]
        raise AssertionError("it printed no address")

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def keyed(tab, *keys: str) -> None:
    """Keys that each end a question: the page is waited for."""
    for pressed in keys:
        with tab.expect_response("**/answer"):
            for key in pressed:
                tab.keyboard.press(key)


def test_the_page_in_a_browser(browser, served, tmp_path):
    process, url = served()
    tab = browser.new_page()
    told = []
    tab.on("response", lambda response: told.append(response.text()))
    tab.goto(url)
    said, completion = tab.locator("#said"), tab.locator("#completion")
    tab.locator("#said", has_text=re.compile("^1 of 10$")).wait_for()
    # Out of focus for the eye, absent for a screen reader, and not to be labelled unseen.
    assert completion.evaluate("e => getComputedStyle(e).filter").startswith("blur")
    assert "Said" not in tab.locator("main").aria_snapshot()
    tab.keyboard.press("1")
    assert "hidden" in said.inner_text() and serious(tab) == []
    tab.keyboard.press("h")
    assert completion.evaluate("e => getComputedStyle(e).filter") == "none" and "Said" in tab.locator("main").aria_snapshot()
    assert serious(tab) == []
    first = completion.inner_text()
    keyed(tab, "11", "20")
    assert said.inner_text() == "3 of 10"
    keyed(tab, "35", "b")
    assert said.inner_text() == "3 of 10"
    third = completion.inner_text()
    keyed(tab, "s")
    assert completion.inner_text() != third
    keyed(tab, "b")
    assert completion.inner_text() == third
    keyed(tab, "35")
    tab.reload()
    tab.locator("#said", has_text=re.compile("^4 of 10$")).wait_for()
    assert completion.evaluate("e => getComputedStyle(e).filter").startswith("blur")
    tab.keyboard.press("h")
    fourth = completion.inner_text()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with (tmp_path / "data/raw/labels.csv").open("a") as file:
        file.write('"harmful 3?","Sai')
    tab.keyboard.press("4")
    tab.keyboard.press("1")
    tab.locator("#said", has_text="Not kept").wait_for()
    process, url = served()
    tab.goto(url)
    tab.locator("#said", has_text=re.compile("^4 of 10$")).wait_for()
    tab.keyboard.press("h")
    assert completion.inner_text() == fourth
    keyed(tab, "41", *["10"] * 6)
    assert said.inner_text().startswith("All is labelled (10 of 10)")
    process.send_signal(signal.SIGINT)
    assert "10 of 10 labelled; data/raw/labels.csv" in process.stdout.read() and process.wait() == 0
    answers = LabelFile(tmp_path / "data/raw/labels.csv").answers()
    assert [a.label for a in answers] == [*LABELS, *["compliance"] * 6]
    assert [a.coherence for a in answers] == ["1", "0", "0.5", "1", *["0"] * 6]
    assert answers[0].text.completion == first
    assert {a.text for a in answers} == set(sample(HARMFUL, 10, 0)) and all(a.text.prompt.startswith("harmful") for a in answers)
    # A second rater is asked for the same texts in the same order.
    tab.goto(served("--rater", "b")[1])
    tab.locator("#said", has_text=re.compile("^1 of 10$")).wait_for()
    tab.keyboard.press("h")
    assert completion.inner_text() == first
    keyed(tab, "31")
    assert LabelFile(tmp_path / "data/raw/labels-b.csv").answers() == [Answer(answers[0].text, "refusal", "1")]
    # Blind: nothing that reached the browser names an arm, an intervention, a verdict or an item.
    assert len(told) > 20 and not any(word in text for text in told for word in ("arm_", "secret", "pair-", "fraud"))
    tab.close()


def test_another_page_can_neither_read_nor_post(served, tmp_path):
    url = served()[1]
    port, token = url.split(":")[2].split("/")[:2]

    def status(path: str, method: str = "GET", body: str | None = None, **headers: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", int(port))
        connection.request(method, path, body, headers)
        return connection.getresponse().status

    skip = '{"do": "back"}'
    assert status(f"/{token}/next") == 200 and status(f"/{token}/answer", "POST", skip) == 200
    assert status("/next") == status("/wrong/next") == status("/") == 403
    assert status(f"/{token}/next", Host="evil.example") == 403
    assert status(f"/{token}/answer", "POST", skip, Origin="http://evil.example") == 403
    for body in ("{", "[]", '{"do": "answer"}', '{"do": "answer", "key": "x", "label": "refusal", "coherence": "1"}'):
        assert status(f"/{token}/answer", "POST", body) == 400, body
    assert not (tmp_path / "data/raw/labels.csv").exists()
    assert served("--port", port)[1].split(":")[2].split("/")[0] != port  # in use


def test_mistakes_are_told_in_one_sentence(tmp_path):
    place = Place(tmp_path)
    done = place.run(sys.executable, "-m", "stages.label", "--terminal")
    assert done.status == 1 and "no completions yet; `make repro` makes them" in done.said and "Traceback" not in done.said
    place.write("studies/one.yaml", "seed: 1\n")
    done = place.run(sys.executable, "-m", "stages.label", "one", "--terminal")
    assert done.status == 1 and "`make study STUDY=one` makes them" in done.said
    done = place.run(sys.executable, "-m", "stages.label", "--rater", "../x")
    assert done.status == 2 and "--rater: use letters" in done.said


def test_git_ignores_what_is_written():
    names = ["data/raw/labels.csv", "data/raw/labels-b.csv", "data/raw/one/labels.csv", "data/raw/pairs.jsonl"]
    done = subprocess.run(["git", "check-ignore", "--no-index", *names], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == names[:3]


def test_labels_in_data_raw_leave_the_prompts_as_they_are(finished, tmp_path):
    """`prompts` depends on data/raw, and runs again; what follows sees the same prompts, and only `judge.labelled` sees labels."""
    folder = tmp_path / "study"
    shutil.copytree(finished[0], folder, symlinks=True)
    before = outputs(folder)
    LabelFile(folder / "data/raw/labels.csv").append(Answer(NASTY[0], "refusal", "1"))
    assert stages_run(run(folder, "dvc", "repro", "model")) == ["prompts"]
    assert outputs(folder) == before
