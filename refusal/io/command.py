"""What the commands that need no pipeline share."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from refusal.io.errors import UserError


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """End the process with one sentence on stderr and exit status 1 where a user can fix what is wrong; REFUSAL_DEBUG=1 shows the
    traceback too."""
    try:
        yield
    except (UserError, OSError) as error:
        if os.environ.get("REFUSAL_DEBUG") == "1":
            traceback.print_exc()
        sys.exit(f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error))
