"""A scratchpad is no answer: what a model that thinks aloud says in the end."""


def answer_of(text: str) -> str | None:
    """What follows the last `</think>`, the whole text where there is none; None where a thought begins and never ends."""
    _, _, rest = text.rpartition("</think>")
    return None if "<think>" in rest else rest
