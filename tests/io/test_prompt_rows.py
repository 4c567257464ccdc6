"""Which rows are which prompts, where prompts are pairs and where they are none."""

import pytest

from refusal.io.errors import UserError
from refusal.io.prompts import by_split, is_paired, kept_rows, prompt_sets, resolve_pairing, safe_rows, with_kept

PAIRS = [{"split": split, "harmful": f"h{i}", "safe": f"s{i}"} for i, split in enumerate(("train", "val", "train", "test"))]
ALONE = [row | {"safe": None} for row in PAIRS]
UNRELATED = [{"split": split, "safe": f"u{i}"} for i, split in enumerate(("val", "train", "test"))]


def test_each_set_holds_its_own_half_of_its_own_split():
    sets = prompt_sets(PAIRS, UNRELATED, ("train", "val"))
    assert sets == {
        **{"train.harmful": ["h0", "h2"], "train.safe": ["s0", "s2"], "train.unrelated": ["u1"]},
        **{"val.harmful": ["h1"], "val.safe": ["s1"], "val.unrelated": ["u0"]},
    }
    assert prompt_sets(ALONE, UNRELATED, ("train",)) == {"train.harmful": ["h0", "h2"], "train.unrelated": ["u1"]}
    assert {split: [row["harmful"] for row in rows] for split, rows in by_split(PAIRS).items()} == {
        **{"train": ["h0", "h2"], "val": ["h1"], "test": ["h3"]}
    }


def test_the_safe_prompts_of_prompts_that_are_no_pairs_are_the_unrelated_ones():
    assert is_paired(PAIRS) and not is_paired(ALONE)
    assert safe_rows(PAIRS, UNRELATED) is PAIRS and safe_rows(ALONE, UNRELATED) is UNRELATED


def test_auto_is_matched_where_there_are_such_directions():
    both, one = ["a-matched.unit", "a-unrelated.unit", "b-unrelated.unit"], ["a-unrelated"]
    assert [resolve_pairing(wanted, "a", both) for wanted in ("auto", "matched", "unrelated")] == [
        "matched",
        "matched",
        "unrelated",
    ]
    assert resolve_pairing("auto", "b", both) == resolve_pairing("auto", "a", one) == "unrelated"
    with pytest.raises(UserError, match="there are no directions a-matched"):
        resolve_pairing("matched", "a", one)


def test_kept_prompts_are_told_by_set_and_place_and_only_train_loses_any():
    rows = [
        {"set": name, "kept": keep}
        for name, keep in [("train.harmful", 1), ("train.harmful", 0), ("train.unrelated", 1), ("train.harmful", 1)]
    ]
    assert kept_rows(rows) == {"train.harmful": [0, 2], "train.unrelated": [0]}
    splits = {split: [{"id": f"{split}{i}"} for i in range(3)] for split in ("train", "val", "test")}
    found = with_kept(splits, [0, 2])
    assert (
        [row["id"] for row in found["train"]] == ["train0", "train2"]
        and found["val"] == splits["val"]
        and found["test"] == splits["test"]
    )
    assert len(splits["train"]) == 3
