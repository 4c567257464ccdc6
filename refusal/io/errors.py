"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input or an impossible request: one sentence naming the file, the field and the fix."""
