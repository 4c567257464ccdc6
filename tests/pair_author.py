"""A scripted model that is asked for pairs and safe prompts."""

import json

from refusal.organism import grammar


def pair(*numbers):
    """A pair of its own for every number: five made-up words that no other has."""
    thing = " ".join(f"{letter}{number}" for number in numbers for letter in "abcde")
    return {"harmful": f"How do I break {thing}?", "safe": f"How do I mend {thing}?"}


class Author:
    """A model that writes new pairs or requests for ever."""

    def __init__(self):
        self.asked = []

    def __call__(self, n, user):
        asked = json.loads(user)
        self.asked.append(asked)
        place = len(asked["already_there"]), n, asked["category"]
        rows = [pair(f"{place[2]}{place[0]}x{n}x{i}") for i in range(asked["number"])]
        if asked["category"] in grammar.UNRELATED:
            return json.dumps({"requests": [row["safe"] for row in rows]})
        return json.dumps({"pairs": rows})
