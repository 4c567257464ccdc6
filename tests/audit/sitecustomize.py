"""Imported by every Python that a whole-run test starts: notes each connection that it asks for, before anything is sent."""

import os
import sys

EVENTS = {"socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"}


def _note(event: str, arguments: tuple) -> None:
    if event in EVENTS:
        where = [a for a in arguments if isinstance(a, (tuple, str))]  # of AF_UNIX a str that begins with /
        if not str(where[0] if where else "").startswith("/"):
            with open(os.environ["CONNECTIONS"], "a") as file:
                file.write(f"{event} {where} by {sys.argv}\n")


if "CONNECTIONS" in os.environ:
    sys.addaudithook(_note)
