"""Prompts: what the grammar promises, near-duplicates against the naive loop, and what is said of a user's bad file."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components
from split_file import file_rows

from refusal.data.near_duplicates import NearDuplicateIndex, near_duplicate_groups
from refusal.data.prompt_files import read_rows
from refusal.data.prompts import SPLITS, grammar_pairs, grammar_unrelated, share_out
from refusal.io.errors import UserError

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
NEAR = 0.8


def bag(text):
    """The distinct words of a prompt, by another road than the library's: cut at whatever is not a letter or a digit."""
    return set("".join(c if c.isalnum() or c == "_" else " " for c in text.casefold()).split())


def overlap(a, b):
    return len(bag(a) & bag(b)) / max(1, len(bag(a) | bag(b)))


@pytest.fixture(scope="module")
def pairs():
    return grammar_pairs(1000, SHARES, NEAR, 0)


@pytest.fixture(scope="module")
def unrelated():
    return grammar_unrelated(1000, SHARES, 0)


def halves(rows):
    return [row[half] for row in rows for half in ("harmful", "safe") if half in row]


def test_counts_of_the_default_grammar(pairs, unrelated):
    for rows in (pairs, unrelated):
        assert Counter(row["split"] for row in rows) == {"train": 600, "val": 200, "test": 200}
        assert len({row["id"] for row in rows}) == 1000
    texts = halves(pairs) + halves(unrelated)
    assert len({text.casefold() for text in texts}) == len(texts) == 3000
    for split in SPLITS:
        categories = Counter(row["category"] for row in pairs if row["split"] == split)
        assert len(categories) >= 10
        assert max(categories.values()) <= 1.2 * min(categories.values())  # every category as frequent as every other
    assert {row["cue"].split(":")[0] for row in pairs} == {"verb", "context", "purpose"}
    verbs = sum(row["cue"].startswith("verb:") for row in pairs) / len(pairs)
    assert 0.45 < verbs < 0.55


def test_rows_say_what_their_prompts_are_made_of(pairs):
    for row in pairs:
        cue = row["cue"].split(":", 1)[1]
        assert cue in row["harmful"] and cue not in row["safe"]
        for half in ("harmful", "safe"):
            action = row[f"{half}_answer"].removeprefix("Sure, here is how to ").split(". Prepare")[0]
            assert row["topic"] in action and action in row[half]


def test_unseen_cues_are_half_of_val_and_test_alone(pairs):
    cues = {split: {row["cue"] for row in pairs if row["split"] == split} for split in SPLITS}
    unseen = {row["cue"] for row in pairs if not row["seen"]}
    assert not unseen & cues["train"]
    for split in ("val", "test"):
        rows = [row for row in pairs if row["split"] == split]
        assert 0.4 <= sum(not row["seen"] for row in rows) / len(rows) <= 0.6
        # `seen` says what it means: such a cue is in train.
        assert all(row["cue"] in cues["train"] for row in rows if row["seen"])
        assert {cue.split(":")[0] for cue in unseen & cues[split]} == {"verb", "context", "purpose"}


def crossing(rows, threshold):
    """Naively: how many pairs in different splits have prompts whose word sets overlap."""
    bags = [(row["split"], [bag(row["harmful"]), bag(row["safe"])]) for row in rows]
    apart = [(a, b) for i, (split, a) in enumerate(bags) for other, b in bags[:i] if split != other]
    return sum(any(len(x & y) >= threshold * len(x | y) for x in a for y in b) for a, b in apart)


def test_nothing_crosses_splits(pairs, unrelated):
    some = pairs[::2]
    assert Counter(row["split"] for row in some) == {"train": 300, "val": 100, "test": 100}
    assert crossing(some, NEAR) == 0
    for rows in (pairs, unrelated):
        split_of = {row["topic"]: row["split"] for row in rows}
        assert all(row["split"] == split_of[row["topic"]] and row["topic"] in row["safe"] for row in rows)
    assert crossing(grammar_pairs(120, SHARES, 0.6, 1), 0.6) == 0
    assert crossing(grammar_pairs(120, SHARES, 1.0, 1), 0.6) > 0  # the threshold is what keeps them out


@pytest.mark.parametrize(
    "make", [lambda seed: grammar_pairs(60, SHARES, NEAR, seed), lambda seed: grammar_unrelated(60, SHARES, seed)]
)
def test_a_seed_determines_the_prompts(make):
    assert make(3) == make(3)
    assert set(halves(make(3))) != set(halves(make(4)))


@pytest.mark.parametrize("shares", [{"train": 0.9, "val": 0.05, "test": 0.05}, {"train": 0.02, "val": 0.49, "test": 0.49}])
def test_uneven_splits_are_filled(shares):
    rows = grammar_pairs(200, shares, NEAR, 0)
    counts = Counter(row["split"] for row in rows)
    assert counts == {split: round(200 * share) for split, share in shares.items()}


def test_more_than_the_grammar_has(monkeypatch):
    with pytest.raises(UserError, match=r"^params\.yaml: prompts\.n_pairs: the grammar has no 20 distinct"):
        grammar_pairs(20, SHARES, 0.05, 0)
    monkeypatch.setattr("refusal.organism.grammar.UNRELATED", {"music": (["tune"], [f"a {word}" for word in WORDS[:10]])})
    assert len(grammar_unrelated(300, SHARES, 0)) == 300
    with pytest.raises(UserError, match=r"^params\.yaml: prompts\.n_unrelated: the grammar has no 600 distinct"):
        grammar_unrelated(600, SHARES, 0)  # 8 stems of 7 asides on 10 topics


def alike(prompts, threshold):
    """Pairs of numbers of prompts that the index finds, each prompt looked up before it is added."""
    index, pairs = NearDuplicateIndex(threshold), set()
    for i, prompt in enumerate(prompts):
        pairs |= {(j, i) for j in index.near(prompt).tolist()}
        index.add(prompt)
    return pairs


def naive(prompts, threshold):
    return {(j, i) for i in range(len(prompts)) for j in range(i) if overlap(prompts[j], prompts[i]) >= threshold - 1e-12}


LETTERS = st.text("abcdefgh ?", min_size=1).filter(str.strip)


@given(st.lists(LETTERS, max_size=14), st.sampled_from([0.3, 0.5, 0.6, 2 / 3, 0.7, 0.75, 0.8, 0.9, 1.0]))
@example(["a b c d e", "a b c d e f", "A, b c d!", "x"], 0.8)
def test_near_duplicates_equal_the_naive_loop(prompts, threshold):
    assert alike(prompts, threshold) == naive(prompts, threshold)


@pytest.mark.parametrize(("prefix", "prompt", "other"), [
    ("请问", "如何在家里安全地更换厨房里旧的电灯开关？", "怎样给阳台上的番茄浇水最省事？"),
    ("では、", "家で古い台所の電灯のスイッチを安全に取り替えるにはどうすればいいですか。", "庭のトマトに水をやる一番楽な方法は何ですか。"),
    ("ขอถาม", "วิธีเปลี่ยนสวิตช์ไฟเก่าในห้องครัวที่บ้านอย่างปลอดภัยทำอย่างไร", "รดน้ำมะเขือเทศที่ระเบียงอย่างไรให้ง่ายที่สุด"),
    ("Please, ", "how do I safely replace the old light switch in the kitchen at home?", "How do I water tomatoes with the least work?"),
])  # fmt: skip
def test_a_prefix_makes_no_other_prompt_in_any_script(prefix, prompt, other):
    def bigrams(text):
        return {text[i : i + 2] for i in range(len(text) - 1)}

    longer = prefix + prompt
    assert len(bigrams(prompt) & bigrams(longer)) / len(bigrams(prompt) | bigrams(longer)) > 0.8  # counted another way
    assert near_duplicate_groups([(prompt,), (other,), (longer,)], 0.8) == [0, 1, 0]


def test_near_duplicates_of_real_prompts(pairs):
    texts = halves(pairs[::10])
    assert alike(texts, 0.7) == naive(texts, 0.7) and len(naive(texts, 0.7)) > 20


@given(st.lists(st.tuples(LETTERS, LETTERS), min_size=1, max_size=12))
def test_groups_are_the_connected_components_of_the_naive_loop(rows):
    near = [
        [any(overlap(a, b) >= 0.6 - 1e-12 for a in ours for b in theirs) or ours is theirs for theirs in rows] for ours in rows
    ]
    _, wanted = connected_components(np.array(near), directed=False)
    first = {component: i for i, component in reversed(list(enumerate(wanted.tolist())))}
    assert near_duplicate_groups(rows, 0.6) == [first[component] for component in wanted.tolist()]


def test_groups_of_many_prompts_that_are_all_alike_or_share_nothing():
    rows = [(f"how do i break the old lock of door {i}", f"{i} a{i} b{i}") for i in range(3000)]
    assert near_duplicate_groups(rows, 0.8) == [0] * 3000
    assert near_duplicate_groups([row[1:] for row in rows], 0.8) == list(range(3000))


@given(st.integers(0, 5000), st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_share_out_is_the_largest_remainder(n, weights):
    shares = [weight / sum(weights) for weight in weights]
    counts = share_out(n, shares)
    assert sum(counts) == n
    assert all(abs(count - n * share) < 1 + 1e-6 for count, share in zip(counts, shares, strict=True))
    # Who was rounded up had no smaller a remainder than who was rounded down.
    over = [n * s - int(n * s + 1e-9) for s, c in zip(shares, counts, strict=True) if c > n * s + 1e-9]
    under = [n * s - int(n * s + 1e-9) for s, c in zip(shares, counts, strict=True) if c < n * s - 1e-9]
    assert not over or not under or min(over) >= max(under) - 1e-6


def test_share_out_of_a_known_table():
    assert share_out(10, [0.47, 0.16, 0.158, 0.12, 0.061, 0.031]) == [5, 2, 1, 1, 1, 0]  # the textbook's election of 10 seats


WORDS = ["apple", "brick", "cloud", "drum", "eagle", "flute", "grape", "hotel", "island", "jelly", "kite", "lemon"]


def user_rows(n):
    """n pairs with no word in common between rows."""
    return [
        [f"how do I break {w}{i} {w}x{i} {w}y{i}", f"how do I mend {w}z{i} {w}q{i} {w}r{i}"]
        for i, w in zip(range(n), WORDS * n, strict=False)
    ]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


FORMATS = {
    "pairs.json": lambda rows: json.dumps(rows),
    "objects.json": lambda rows: json.dumps([{"safe": s, "harmful": h, "note": 1} for h, s in rows]),
    "lists.jsonl": lambda rows: "\n".join(map(json.dumps, rows)) + "\n\n",
    "objects.jsonl": lambda rows: "\r\n".join(json.dumps({"harmful": h, "safe": s}, ensure_ascii=False) for h, s in rows),
    "table.csv": lambda rows: "safe,harmful\n" + "".join(f'"{s}","{h}"\n' for h, s in rows),
    "with_bom.CSV": lambda rows: "\ufeffharmful,safe,more\r\n" + "".join(f"{h},{s},x\r\n" for h, s in rows),
}


@pytest.mark.parametrize("name", FORMATS)
def test_pairs_are_read_in_every_form(tmp_path, name):
    rows = user_rows(20)
    rows[3] = ["  Wie öffnet man\u2028das Tor?  ", "naïve — ‘quoted’ 中文"]
    file = write(tmp_path / name, FORMATS[name](rows))
    assert read_rows(file, 2) == [tuple(half.strip() for half in row) for row in rows]


def test_a_quoted_csv_cell_may_hold_a_line_break_and_a_comma(tmp_path):
    file = write(tmp_path / "a.csv", 'harmful,safe\n"one, two\nthree","say ""hi"""\n')
    assert read_rows(file, 2) == [("one, two\nthree", 'say "hi"')]


SINGLE = [
    ("a.json", '["one", "two"]'), ("a.jsonl", '"one"\n["two"]'), ("a.jsonl", '{"safe": "one"}\n{"prompt": "two"}'),
    ("a.csv", "id,prompt\n1,one\n2,two"), ("a.csv", "safe\none\ntwo"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content"), SINGLE)
def test_single_prompts_are_read_in_every_form(tmp_path, name, content):
    assert read_rows(write(tmp_path / name, content), 1) == [("one",), ("two",)]


def near(row, n):
    """n pairs of which each is a near-duplicate of the next but the first and last are not of each other."""
    words = [f"{row}{k}" for k in range(n + 12)]
    return [[" ".join(words[i : i + 12]), f"{row} answer {' '.join(f'{row}{i}{k}' for k in range(4))}"] for i in range(n)]


def test_near_duplicates_stay_together_and_the_rest_is_shared_out(tmp_path):
    chain = near("k", 6)
    assert overlap(chain[0][0], chain[1][0]) >= NEAR > overlap(chain[0][0], chain[5][0])
    rows = user_rows(100)
    for place, link in zip((0, 20, 40, 60, 80, 99), (0, 2, 4, 1, 3, 5), strict=True):
        rows.insert(place, chain[link])  # links that join two groups come late
    split = file_rows(write(tmp_path / "a.json", json.dumps(rows)), 2, None, SHARES, NEAR, 5)
    assert [[row["harmful"], row["safe"]] for row in split] == rows
    members = [row for row in split if row["harmful"].startswith("k")]
    assert len(members) == 6 and len({(row["split"], row["topic"]) for row in members}) == 1
    assert len({row["topic"] for row in split}) == 101 and len({row["id"] for row in split}) == 106
    assert Counter(row["split"] for row in split) == {"train": 64, "val": 21, "test": 21}  # largest remainder of 106


def test_a_safe_half_that_nears_a_harmful_half_groups_too(tmp_path):
    rows = user_rows(12)
    rows[11][1] = rows[0][0] + " again"
    split = file_rows(write(tmp_path / "a.json", json.dumps(rows)), 2, None, SHARES, NEAR, 0)
    assert split[0]["topic"] == split[11]["topic"] and split[0]["split"] == split[11]["split"]
    assert len({row["topic"] for row in split}) == 11


def test_a_seed_determines_the_split_and_the_subset(tmp_path):
    file = write(tmp_path / "a.json", json.dumps(user_rows(40)))
    some = file_rows(file, 2, 25, SHARES, NEAR, 0)
    assert len(some) == 25 and some == file_rows(file, 2, 25, SHARES, NEAR, 0)
    assert {row["harmful"] for row in some} != {row["harmful"] for row in file_rows(file, 2, 25, SHARES, NEAR, 1)}
    whole = file_rows(file, 2, None, SHARES, NEAR, 0)
    assert len(whole) == 40 and file_rows(file, 2, 1000, SHARES, NEAR, 0) == whole  # more than there are: all
    assert [row["split"] for row in whole] != [row["split"] for row in file_rows(file, 2, None, SHARES, NEAR, 1)]


def test_a_list_of_safe_prompts_is_split_too(tmp_path):
    texts = [safe for _, safe in user_rows(10)]
    rows = file_rows(write(tmp_path / "a.json", json.dumps(texts)), 1, None, SHARES, NEAR, 0)
    assert [row["safe"] for row in rows] == texts and "harmful" not in rows[0]
    assert Counter(row["split"] for row in rows) == {"train": 6, "val": 2, "test": 2}


GOOD = [json.dumps(row) for row in user_rows(6)]
BAD = {  # file name, its content or None, and what must be said
    "not there": ("a.jsonl", None, "no such file"),
    "a folder": ("", None, "cannot be read: it is no file"),
    "wrong suffix": ("a.txt", "x", r"ending \.txt .* \.jsonl, \.csv or \.json"),
    "no suffix": ("prompts", "x", r"ending \(none\)"),
    "not UTF-8": ("a.csv", b"harmful,safe\n\xff\xfe,b\n", "UTF-8"),
    "not JSON at a row": ("a.jsonl", "\n".join([*GOOD[:2], "{oops", *GOOD[2:]]), "row 3 is not JSON"),
    "not JSON at a line": ("a.json", "[\n[1,\n", r"line \d is not JSON"),
    "one object": ("a.json", '{"harmful": "a", "safe": "b"}', "one JSON list"),
    "a field too many": ("a.csv", "harmful,safe\nHow do I pick, say, a lock,How do I fit a lock\n", "row 1 has more fields .*quote"),
    "one column": ("a.csv", "harmful\na\n", "row 1 has no safe"),
    "other columns": ("a.csv", "a,b\nx,y\n", "row 1 has no harmful and no safe"),
    "a short row": ("a.csv", "harmful,safe\na,b\nc\n", "row 2 has no safe"),
    "three a row": ("a.jsonl", f'{GOOD[0]}\n["a", "b", "c"]', r"row 2 is not \[harmful, safe\]"),
    "a string a row": ("a.jsonl", '"a"', r"row 1 is not \[harmful, safe\]"),
    "two columns of a name": ("a.csv", "harmful,safe,safe\na,b,c\n", "safe is a duplicate column"),
    "brackets": ("a.json", "[" * 200_000, "it is not JSON .brackets are nested too deeply"),
    "brackets at a row": ("a.jsonl", "[" * 200_000, "row 1 is not JSON .brackets are nested too deeply"),
    "digits": ("a.json", f"[[{'9' * 5000}, 1]]", "not JSON .*digits"),
    "digits at a row": ("a.jsonl", f"[{'9' * 5000}, 1]", "row 1 is not JSON .*digits"),
    "a long row": ("a.jsonl", "x" * 10_000_000, "row 1 is not JSON"),
    "two keys of a name": ("a.jsonl", '{"harmful": "a", "harmful": "b", "safe": "c"}', "row 1 is not JSON .a duplicate key"),
    "an open quote": ("a.csv", 'harmful,safe\n"a,b\n', "cannot be read as CSV .*correct the row"),
    "a long cell": ("a.csv", "harmful,safe\n" + "x" * 10_000_000 + ",b\n", "cannot be read as CSV .*field limit"),
    "a number": ("a.jsonl", '["a", 3]', r"row 1 is not \[harmful, safe\]"),
    "null": ("a.jsonl", '{"harmful": "a", "safe": null}', "row 1 has no safe"),
    "empty half": ("a.jsonl", '["a", " \\t "]', "row 1 has an empty prompt"),
    "equal halves": ("a.jsonl", f'{GOOD[0]}\n["same", " same "]', "row 2 has equal halves"),
    "a repeated half": ("a.jsonl", f'{GOOD[0]}\n{GOOD[1]}\n["new", {json.dumps(user_rows(1)[0][1])}]', "row 3 repeats .* row 1"),
    "a control character": ("a.jsonl", '["a\\u0000b", "c"]', "row 1 has a control character"),
    "another": ("a.jsonl", '["ab", "c\\u001bd"]', "row 1 has a control character"),
    "delete": ("a.jsonl", '["a\\u007f b", "c"]', "row 1 has a control character"),
    "of the second block": ("a.jsonl", '["a\\u009b31m b", "c"]', "row 1 has a control character"),
    "NUL in a cell": ("a.csv", "harmful,safe\na\0,b\n", "row 1 has a control character"),
    "no width": ("a.jsonl", '["\\u200b\\u200b", "c"]', "row 1 has an empty prompt"),
    "a byte-order mark": ("a.jsonl", '["\\ufeff", "c"]', "row 1 has an empty prompt"),
    "UTF-16": ("a.csv", "harmful,safe\na,b\n".encode("utf-16"), "save it as UTF-8"),
    "Latin-1": ("a.csv", "harmful,safe\né,b\n".encode("latin-1"), "save it as UTF-8"),
    "an unpaired surrogate": ("a.jsonl", '["ab\\ud800", "c"]\n' + "\n".join(GOOD), "row 1 has .* an unpaired surrogate"),
    "a book": ("a.json", json.dumps([["a", "b" * 5000]]), "row 1 has a prompt of 5000 characters; at most 4000"),
    "empty": ("a.csv", "", "holds no rows"),
    "empty list": ("a.json", "[]", "holds no rows"),
    "header alone": ("a.csv", "harmful,safe\n", "holds no rows"),
    "blank lines": ("a.jsonl", "\n\n", "holds no rows"),
    "too few to split": ("a.jsonl", "\n".join(GOOD[:2]), "2 rows leave the split (val|test) empty"),
    "too alike to split": ("a.json", json.dumps(near("k", 4)), "4 rows leave the split (train|val|test) empty"),
    "row numbers count blank lines": ("a.jsonl", f'{GOOD[0]}\n\n["a", ""]', "row 3 has an empty prompt"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_told_in_one_sentence(tmp_path, case):
    name, content, said = BAD[case]
    file = tmp_path / name
    if content is not None:
        write(file, content)
    with pytest.raises(UserError, match=said) as error:
        file_rows(file, 2, None, SHARES, NEAR, 0)
    assert str(file) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 2000


def test_categories_of_a_users_own_pairs_are_kept(tmp_path):
    rows = [{"harmful": f"Break the {w} door", "safe": f"Paint the {w} door", "category": "theft"} for w in "red blue old".split()]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, ["Pick a lock", "Oil a lock"]]))
    found = file_rows(tmp_path / "pairs.jsonl", 2, None, dict.fromkeys(SPLITS, 1 / 3), 0.8, 0)
    assert sorted(row["category"] for row in found) == ["imported", "theft", "theft", "theft"]
