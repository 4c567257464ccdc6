"""The study as its files have it: what evaluate and science begin with."""

from pathlib import Path

from refusal.analysis.study import Study
from refusal.io.files import read_jsonl
from refusal.io.params import Params, Resampled
from refusal.io.prompts import by_split, kept_rows, resolve_pairing, with_kept
from refusal.io.store import Store
from refusal.judges.panel import judge_with
from refusal.lm.load import load_lm
from refusal.method.directions import read_directions, select_directions
from refusal.method.select import checked
from stages import STORE, read_json

BASE, BEHAVIOUR = Path("models/base"), Path("data/behaviour/train.jsonl")


def load_study(params: Params, section: Resampled) -> Study:
    """The study of these parameters; intervals are those of `section`."""
    rank_1 = checked(read_json(Path("metrics/select.json")))["rank_1"]  # before anything that takes time
    s, directions = params.sweep, read_directions(Path("models/directions.safetensors"))
    matched, harmless = (select_directions(directions, s.method, pairing) for pairing in (s.pairing, "harmless"))
    is_matched = resolve_pairing(s.pairing, s.method, directions) == "matched"
    pairs, unrelated = (read_jsonl(Path(f"data/prompts/{name}.jsonl")) for name in ("pairs", "unrelated"))
    kept = kept_rows(read_jsonl(BEHAVIOUR))
    store = Store(STORE / "store.sqlite")
    return Study(
        params,
        load_lm(BASE, **params.model.loading),
        store,
        judge_with(params.judge, params.endpoint, store),
        matched,
        harmless,
        with_kept(by_split(pairs), kept["train.harmful"]),
        with_kept(by_split(unrelated), kept["train.unrelated"]),
        rank_1,
        section.n_resamples,
        section.seed,
        unrelated_unit=select_directions(directions, s.method, "unrelated")["unit"] if is_matched else None,
    )
