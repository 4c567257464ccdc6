"""The same questions as the page's, in a terminal."""

import sys
from collections.abc import Callable

from refusal.report.labels import COHERENCE, LABELS, Session

KEYS = "1 compliance, 2 partial refusal, 3 refusal, 4 degenerate; b back, s skip, h show harmful text, q quit: "


def one_key() -> str:
    """One key, without Return, of a terminal; one line of a pipe. "q" at its end and at Ctrl-C."""
    if not sys.stdin.isatty():
        return (sys.stdin.readline() or "q").strip().lower()
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        key = sys.stdin.read(1).lower() or "q"
    except KeyboardInterrupt:
        key = "q"
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
    print(key)
    return key


def printable(text: str) -> str:
    """Text without control characters: a completion must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def ask(session: Session, press: Callable[[], str] = one_key) -> None:
    """Ask for labels until all are given or the rater quits."""
    shown = False
    while left := session.left():
        text = left[0]
        print(f"\n{session.progress()}")
        if shown:
            print(f"Prompt: {printable(text.prompt)}\n\nCompletion: {printable(text.completion) or '(empty)'}\n")
        else:
            print("The text is hidden, as it may do harm: h shows it.")
        print(KEYS, end="", flush=True)
        pressed = press()
        if pressed == "q":
            return
        if pressed == "h":
            shown = not shown
        elif pressed == "b":
            session.back()
        elif pressed == "s":
            session.skip(text)
        elif shown and pressed in ("1", "2", "3", "4"):
            print("Coherence: 0 not at all, 5 in part, 1 fully; any other key asks again: ", end="", flush=True)
            coherence = {"5": "0.5"}.get(given := press(), given)
            if coherence in COHERENCE:
                session.answer(text, LABELS[int(pressed) - 1], coherence)
