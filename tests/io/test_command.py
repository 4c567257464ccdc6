"""How a command ends: a sentence for what a user can fix, a traceback for an error of this package, 130 where interrupted."""

import pytest

from refusal.io.command import in_one_sentence
from refusal.io.errors import UserError


def ended(error: BaseException, *arguments) -> int | str:
    with pytest.raises(SystemExit) as end, in_one_sentence(*arguments):
        raise error
    return end.value.code


@pytest.mark.parametrize("debug", ["0", "1"])
def test_what_a_user_can_fix(capsys, monkeypatch, debug):
    monkeypatch.setenv("REFUSAL_DEBUG", debug)
    assert ended(UserError("x.json: fix it.")) == "x.json: fix it."
    assert ended(UserError("x.json: fix it."), "sweep") == "sweep: x.json: fix it."
    assert ended(FileNotFoundError(2, "No such file", "x.json")) == "x.json: No such file"
    assert ended(OSError("no socket")) == "no socket"
    assert ended(KeyError("a"), "sweep", lambda error: f"what {error} means") == "sweep: what 'a' means"
    assert ("Traceback" in capsys.readouterr().err) is (debug == "1")


def test_what_is_an_error_of_this_package(capsys, monkeypatch):
    monkeypatch.delenv("REFUSAL_DEBUG", raising=False)
    assert ended(KeyError("a")) == "internal error (KeyError): please report it with the lines above"
    said = "sweep: internal error (ValueError): please report it with the lines above and params.yaml; what is computed is kept"
    assert ended(ValueError(), "sweep") == said
    assert capsys.readouterr().err.count("Traceback") == 2


def test_an_interruption(capsys):
    assert ended(KeyboardInterrupt(), "sweep") == 130 and ended(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.splitlines() == [
        "sweep: interrupted; what is computed is kept, the same command goes on",
        "interrupted",
    ]


def test_without_an_error_nothing_ends(capsys):
    with in_one_sentence("sweep"):
        done = True
    assert done and capsys.readouterr().err == ""
