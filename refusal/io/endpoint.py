"""The section `endpoint` of `params.yaml`, which the judge and the writer of pairs share."""

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from refusal.io.section import Count, Section


class Endpoint(Section):
    """An OpenAI-compatible endpoint and how hard it may be used. Its key is in the environment and nowhere else.

    api_key_variable: the environment variable (None: it wants no key). timeout_seconds: of one attempt. max_calls: of one run.
    """

    base_url: str = "https://api.deepseek.com"
    model: Annotated[str, Field(min_length=1)] = "deepseek-chat"
    api_key_variable: str | None = "DEEPSEEK_API_KEY"
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    timeout_seconds: Annotated[float, Field(gt=0, le=300)] = 120.0
    max_attempts: Annotated[int, Field(ge=1, le=20)] = 6
    max_calls: Count | None = None

    # A key or password pasted into one of these two must not be printed: the message of a ValueError holds no value.
    @field_validator("base_url")
    @classmethod
    def _without_password(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            valid = bool(re.fullmatch(r"https?://[^@\s]+", url) and url.isprintable() and parts.hostname and parts.port != 0)
        except ValueError:  # urllib would say the value
            valid = False
        if not valid:
            raise ValueError("must be http:// or https:// with a host and, if need be, a port; no user name, password or blank")
        return url

    @field_validator("api_key_variable")
    @classmethod
    def _name_of_a_variable(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise ValueError("must be the NAME of an environment variable, such as DEEPSEEK_API_KEY, and never a key")
        return name
