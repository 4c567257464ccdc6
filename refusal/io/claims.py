"""The list of claims that others make, and the section of params.yaml that says how much `make claims` spends on them."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError

from refusal.io.errors import UserError
from refusal.io.section import AtMost10000, Count, Distinct, Dtype, NonEmpty, Resampled, Section, Text


class ClaimsSection(Resampled):
    layers: Distinct[Annotated[int, Field(ge=0)]] | None
    n: Count | None
    n_pairs: NonEmpty[Count]
    n_random: AtMost10000
    dtype: Dtype | None


class Claim(Section):
    """A row of the list. source, read: where it is said, what of that was read. their_n, their_figure: what it rests on there.

    measure: the name of our quantity (`refusal.analysis.claims.MEASURES`), which `quantity` says in words. at_least, at_most:
    where the claim puts it. control_outside: the control must not lie there too. decides: what would decide where ours does not.
    """

    claim: Text
    source: Text
    read: Text
    their_n: Text
    their_figure: Text
    measure: Text
    quantity: Text
    decides: Text
    at_least: float | None = None
    at_most: float | None = None
    control_outside: bool = False

    def contradictions(self) -> Any:
        if self.at_least is None and self.at_most is None:
            yield "nothing is predicted: give at_least, at_most or both"

    def holds(self, value: float) -> bool:
        """Whether a value lies where the claim puts it."""
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


def read(rows: Mapping[str, Any], measures: Collection[str], of: str) -> dict[str, Claim]:
    """The claims of a list by their names; `of` is its file. Raises UserError for a row that lacks a field, has one too many, or
    asks for none of `measures`."""
    claims = {}
    for name, row in rows.items():
        try:
            claims[name] = Claim.model_validate(row)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise UserError(f"{of}: {name}{f'.{field}' if field else ''}: {first['msg']}: correct the row") from None
        if claims[name].measure not in measures:
            raise UserError(f"{of}: {name}.measure: {claims[name].measure} is none: choose among {', '.join(measures)}")
    return claims
