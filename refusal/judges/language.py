"""Whether prompts are in English, the only language that the rules read."""

import re
from collections.abc import Sequence

# Function words that nearly every English request has one of, and that other languages in Latin script do not write.
_ENGLISH = re.compile(r"\b(the|how|what|which|of|my|your|their|with|without|from|someone|is|are|can|should|and|an|for|to|i)\b")
_OTHER_SCRIPT = re.compile(r"[^\W\d_\u0000-\u024f]")  # a letter that is not Latin


def english_share(prompts: Sequence[str]) -> float:
    """The share of the prompts that hold an English function word, and no more letters of another script than of Latin."""

    def english(prompt: str) -> bool:
        letters = [c for c in prompt if c.isalpha()]
        return bool(_ENGLISH.search(prompt.casefold())) and 2 * len(_OTHER_SCRIPT.findall(prompt)) <= len(letters)

    return sum(map(english, prompts)) / len(prompts)
