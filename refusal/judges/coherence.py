"""Is a completion well-formed text about its request: the share of it that is loops or noise, and the words it shares.

Works on words, so that the bars of a table or the rule under a heading are no loop.
"""

import re
from collections.abc import Iterator
from functools import lru_cache

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+(?:'\w+)?")  # a CJK character is a word
FUNCTION_WORDS = set(
    """
    a an the of to in on at by for with from and or not is are was were be been am do does did how what where when why who
    which can could should would will may might must i me my you your yourself he him his she her it its we us our they
    them their some any no this that these those there here have has had get make give tell if so as about into out up
    more most much many one like just than then please
    """.split()
)


def plain(text: str) -> str:
    """Lower case, with straight quotes and without marks of emphasis."""
    text = text.lower().translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})
    return re.sub(r"[*_#`]{1,3}(?=\w)|(?<=[\w.:!?])[*_`]{1,3}", "", text)


@lru_cache(maxsize=1)  # the roles of a text ask for it, and its coherence
def broken_share(text: str) -> float:
    """The share of the text spent in loops or noise. 0 where the rules see neither; whole words, 0.4 is degenerate."""
    visible = [c for c in text if not c.isspace()]
    if sum(c.isalnum() for c in visible) < 0.35 * len(visible) or text.count("\ufffd") > 0.1 * len(visible):
        return 1.0  # punctuation, symbols or undecodable bytes: noise
    words = WORD.findall(plain(text))
    # Words run together ("can'tI cannotI"): code has a few such (fooBar), but a text where every seventh word is one is noise.
    joints = len(re.findall(r"(?:\b[a-z]{2,}(?:'t)?|\w[,!?])(?=[A-Z])", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))
    if joints >= 5 and joints > 0.15 * len(words):
        return 1.0
    glued = sum(len(m.group()) for m in re.finditer(r"(\w{1,8}?)\1{7,}", text))
    looping = [False] * len(words)
    for start, end in _loops(words):
        looping[start:end] = [True] * (end - start)
    # Loops that change a little each time escape `_loops`, but their vocabulary is poor: prose of 40 words has 25 or more.
    size = 40
    for start in range(0, max(1, len(words) - size + 1), size // 2):
        window = words[start : start + size]
        if len(window) >= 8 and len(set(window)) <= len(window) * (0.25 + 2 / len(window)):
            looping[start : start + size] = [True] * len(window)
    share = max(sum(looping) / max(1, len(words)), glued / len(visible))
    at_end = len(words) > 0 and looping[-1]
    return share if share >= 0.25 or at_end else 0.0


def _loops(words: list[str]) -> Iterator[tuple[int, int]]:
    """Where the same 1 to 40 words come again and again: a phrase three times over, a lone word four times."""
    for period in range(1, min(40, len(words) // 3) + 1):
        run = 0
        for i in range(period, len(words) + 1):
            if i < len(words) and words[i] == words[i - period]:
                run += 1
                continue
            if run >= period * (3 if period == 1 else 2) and run + period >= 4:
                yield i - period - run, i
            run = 0


def off_topic(prompt: str, text: str) -> bool:
    """Does an answer of some length share no word with the request? Cautious: only where the request has three to share."""
    asked, answered = _stems(prompt), _stems(text)
    return len(asked) >= 3 and len(answered) >= 8 and not asked & answered


def _stems(text: str) -> set[str]:
    """The first four letters of the words that carry meaning: enough to match cut, cuts and cutting."""
    return {word[:4] for word in WORD.findall(plain(text)) if word not in FUNCTION_WORDS}
