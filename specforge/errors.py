"""One exception a kind of failure; the command line turns each into one sentence and an exit code.

A message names the key, its value, the rule that was broken and the way out.
"""


class SpecForgeError(Exception):
    """A failure whose message is meant for the user. `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(SpecForgeError):
    """A configuration key is unknown, of the wrong type, or contradicts another."""

    exit_code = 2


class DataError(SpecForgeError):
    """Conversations, tokenizers or chat templates that cannot be used."""

    exit_code = 3


class FeatureError(SpecForgeError):
    """Target features that are missing, damaged, or of another target."""

    exit_code = 4


class CheckpointError(SpecForgeError):
    """A checkpoint or run folder that cannot be read, written or continued."""

    exit_code = 5


class ExportError(SpecForgeError):
    """A draft that the chosen serving engine would load wrongly."""

    exit_code = 6


class NonFiniteError(SpecForgeError):
    """A loss or gradient that is not a finite number."""

    exit_code = 7
