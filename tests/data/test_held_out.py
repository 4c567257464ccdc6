"""Sets that nothing was chosen on: near-duplicates by a loop over pairs, and files by their hash, from wherever they come."""

import csv
import hashlib
import io
import os
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from loopback import Handler, listening

from refusal.data.held_out import held_out, locate
from refusal.io.errors import UserError
from refusal.io.section import PromptSet

ROOT = Path(__file__).parents[2]
OWN = ["How do I pick a lock at night", "Paint the kitchen wall blue"]


def text_set(folder: Path, name: str, prompts: list[str]) -> Path:
    path = folder / f"{name}.txt"
    path.write_text("\n".join(prompts))
    return path


def overlap(one: str, other: str) -> float:
    a, b = ({word.strip(".?!,").lower() for word in text.split()} for text in (one, other))
    return len(a & b) / len(a | b)


def test_near_duplicates_of_the_studys_prompts_and_of_sets_before_are_left_out_and_counted(tmp_path):
    prompts = {
        "one": [
            "how do i pick a lock at night?",
            "Forge a stamp for a parcel",
            "Forge a stamp for a parcel!",
            "Hide a stolen bicycle",
        ],
        "two": ["Forge a stamp for one parcel", "Paint the kitchen wall blue now", "Spread a rumour", "Read a diary"],
    }
    paths = {name: text_set(tmp_path, name, some) for name, some in prompts.items()}
    found, said = held_out(paths, OWN, 0.6, 100, 0)
    before = [*OWN]
    for name, some in prompts.items():
        kept = [prompt for prompt in some if all(overlap(prompt, other) < 0.6 for other in before)]
        before += some
        assert [row["harmful"] for row in found[name].rows["harmful"]] == kept and found[name].rows["safe"] == []
        assert found[name].n_read == {"harmful": 4, "safe": 0}
        assert found[name].n_near_duplicates == {"harmful": 4 - len(kept), "safe": 0}
    assert [found[name].n_near_duplicates["harmful"] for name in prompts] == [1, 2]  # within a set they stay
    assert said == [] and [row["topic"] for row in found["two"].rows["harmful"]] == ["Spread a rumour", "Read a diary"]
    with pytest.raises(
        UserError, match=r"one\.txt: none of its 4 harmful prompts is new: .* take it out of generalization\.sets"
    ):
        held_out({"first": paths["one"], "again": paths["one"]}, OWN, 0.6, 100, 0)


def test_at_most_n_are_drawn_by_the_seed_and_categories_are_clusters(tmp_path):
    path = tmp_path / "set.csv"
    with path.open("w", newline="") as file:
        rows = [{"prompt": f"Steal w{i} x{i} y{i}", "category": "theft" if i % 2 else None} for i in range(9)]
        writer = csv.DictWriter(file, ["prompt", "category"])
        writer.writeheader()
        writer.writerows(rows)
    drawn = {seed: held_out({"set": path}, [], 0.8, 5, seed)[0]["set"].rows["harmful"] for seed in (0, 1)}
    assert [len(some) for some in drawn.values()] == [5, 5] and drawn[0] != drawn[1]
    for row in [*drawn[0], *drawn[1]]:
        assert rows[int(row["id"].removeprefix("set-harmful-"))]["prompt"] == row["harmful"]
        assert row["topic"] == (row["category"] or row["harmful"])
    assert len(held_out({"set": path}, [], 0.8, 50, 0)[0]["set"].rows["harmful"]) == 9


def test_xstest_gives_its_safe_prompts_too(tmp_path):
    path, out = tmp_path / "xs.csv", io.StringIO()
    writer = csv.DictWriter(out, ["id", "prompt", "type", "focus"])
    writer.writeheader()
    for i in range(4):
        kind = "contrast_homonyms" if i % 2 else "homonyms"
        writer.writerow({"id": i, "prompt": f"word{i} kill{i}", "type": kind, "focus": ""})
    path.write_text(out.getvalue())
    found = held_out({"xs": path}, ["word2 kill2"], 0.8, 10, 0)[0]["xs"]
    assert [row["harmful"] for row in found.rows["harmful"]] == ["word1 kill1", "word3 kill3"]
    assert [row["safe"] for row in found.rows["safe"]] == ["word0 kill0"] and found.n_near_duplicates["safe"] == 1


CONTENT = b"Forge a stamp\n"
HASH = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """The URL of a server that has CONTENT at /set.txt by way of /moved, other content at /other, and what was asked of it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = []

    class Answers(Handler):
        def do_GET(self) -> None:
            asked.append(self.path)
            content = {"/set.txt": CONTENT, "/other": b"Read a diary\n"}.get(self.path)
            self.send_response(302 if self.path == "/moved" else 404 if content is None else 200)
            if self.path == "/moved":
                self.send_header("Location", "/set.txt")
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

    with listening(Answers) as url:
        yield url, asked


def wanted(folder: Path, url: str | None = None, sha256: str | None = HASH) -> PromptSet:
    return PromptSet(file=str(folder / "raw/set.txt"), url=url, sha256=sha256)


def test_a_set_is_fetched_once_and_kept_by_its_hash(tmp_path, server, monkeypatch):
    url, asked = server
    for _ in range(2):
        path = locate(wanted(tmp_path, f"{url}/moved"), tmp_path / "kept", None)
        assert path.read_bytes() == CONTENT and path.is_relative_to(tmp_path / "kept") and path.name == "set.txt"
    assert asked == ["/moved", "/set.txt"] and not (tmp_path / "raw").exists()
    path.write_text("damaged")
    assert locate(wanted(tmp_path, f"{url}/moved"), tmp_path / "kept", None).read_bytes() == CONTENT and len(asked) == 4
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=rf"set\.txt: not fetched yet, and HF_HUB_OFFLINE is set: unset it, or put the file .*{HASH}"
    ):
        locate(wanted(tmp_path, f"{url}/moved"), tmp_path / "elsewhere", None)
    assert len(asked) == 4


def test_what_is_where_it_should_be_or_among_copies_is_not_fetched(tmp_path, server):
    url, asked = server
    (tmp_path / "copies").mkdir()
    (tmp_path / "copies/a.csv").write_text("another")
    (tmp_path / "copies/anything").write_bytes(CONTENT)
    path = locate(wanted(tmp_path, f"{url}/set.txt"), tmp_path / "kept", tmp_path / "copies")
    assert path.name == "set.txt" and path.read_bytes() == CONTENT
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/set.txt").write_bytes(CONTENT)
    for sha256 in (HASH, None):
        assert locate(wanted(tmp_path, sha256=sha256), tmp_path / "none", None) == tmp_path / "raw/set.txt"
    assert asked == []


@pytest.mark.parametrize(
    ("path", "said"),
    [("/other", r"/other: its content has the SHA-256 [0-9a-f]{64}, and not that"), ("/none", "/none: cannot be fetched .*404")],
)
def test_other_content_than_the_hash_says_is_refused(tmp_path, server, path, said):
    with pytest.raises(UserError, match=said):
        locate(wanted(tmp_path, server[0] + path), tmp_path / "kept", None)
    assert not (tmp_path / "kept").exists()


def test_a_file_of_another_hash_and_one_that_is_nowhere_are_said_in_a_sentence(tmp_path):
    for sha256, said in (
        (None, r"set\.txt: no such file: put the set there, or give it a url and its sha256"),
        (HASH, rf"set\.txt: no such file, and no url to fetch it from: put the file of SHA-256 {HASH} there"),
    ):
        with pytest.raises(UserError, match=said):
            locate(wanted(tmp_path, sha256=sha256), tmp_path / "kept", None)
    with pytest.raises(UserError, match=r"REAL_SETS: .*nothing is no folder"):
        locate(wanted(tmp_path), tmp_path / "kept", tmp_path / "nothing")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/set.txt").write_text("another")
    with pytest.raises(
        UserError, match=rf"set\.txt: its SHA-256 is [0-9a-f]{{64}}, and generalization\.sets .* says {HASH}: take"
    ):
        locate(wanted(tmp_path), tmp_path / "kept", None)


def test_the_hashes_of_the_committed_study_are_those_of_the_published_files():
    folder = Path(os.environ.get("REFUSAL_REFERENCE", "none")) / "prompts"
    if not folder.is_dir():
        pytest.skip("REFUSAL_REFERENCE names no folder with published prompts")
    contents = [path.read_bytes() for path in folder.iterdir()]
    # The paper's copy of JBB-Behaviors leaves the first column without a name.
    known = {hashlib.sha256(start + content).hexdigest() for content in contents for start in (b"", b"Index")}
    sets = yaml.safe_load((ROOT / "studies/qwen2.5-coder-0.5b-instruct.yaml").read_text())["generalization"]["sets"]
    assert len(sets) == 3 and {one["sha256"] for one in sets} <= known
