"""How every command ends: with its own last line, or with one sentence that says what is wrong."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from refusal.io.errors import UserError


def sentence_of(error: Exception) -> str | None:
    """What is wrong and what to do, of an error that a user can fix; None for an error of this package."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return str(error) if isinstance(error, UserError) else None


@contextmanager
def in_one_sentence(stage: str | None = None, sentence: Callable[[Exception], str | None] = sentence_of) -> Iterator[None]:
    """End the process with one sentence on stderr and exit status 1 at an error, 130 where it is interrupted.

    The sentence begins with the `stage`, where it is one, whose results are kept. A traceback is shown with REFUSAL_DEBUG=1, and
    of an error that `sentence` has none for.
    """
    start, ours = (f"{stage}: ", " and params.yaml; what is computed is kept") if stage else ("", "")
    try:
        yield
    except KeyboardInterrupt:
        kept = "; what is computed is kept, the same command goes on" if stage else ""
        print(f"{start}interrupted{kept}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        said = sentence(error)
        if said is None or os.environ.get("REFUSAL_DEBUG") == "1":
            traceback.print_exc()
        internal = f"internal error ({type(error).__name__}): please report it with the lines above{ours}"
        sys.exit(f"{start}{said or internal}")
