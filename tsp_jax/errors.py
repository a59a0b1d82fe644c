"""The one error that means "what was asked for cannot be": scripts print it as a line and exit with 2."""


class ConfigError(ValueError):
    """A field, the value it has, and a value that works, in one line."""
