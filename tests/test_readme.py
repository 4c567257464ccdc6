"""What the README tells people to type exists."""

import re
from pathlib import Path

import yaml

from refusal.params import Params

ROOT = Path(__file__).parents[1]


def test_every_parameter_that_a_command_sets_exists_and_may_have_that_value():
    commands = re.findall(r"-S (\w+)\.(\w+)=(\S+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(commands) > 15
    for section, name, text in commands:
        params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        assert name in params[section], f"{section}.{name}"
        for value in text.split(","):
            params[section][name] = yaml.safe_load(value)
            if (section, name) == ("model", "revision"):
                params[section]["id"] = "owner/name"
            Params.model_validate(params)
