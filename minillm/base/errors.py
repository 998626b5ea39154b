"""The errors minillm raises at its users: each names the values that were wrong and a way out."""


class MinillmError(Exception):
    """Base of every error that is a message to the user, printed without a traceback."""


class ConfigError(MinillmError):
    """Options, sizes or files that cannot work together."""


class ScheduleError(MinillmError):
    """A pipeline schedule that is malformed or would never finish."""


class CommError(MinillmError):
    """A message could not be delivered; see the subclasses for why."""


class PeerFailed(CommError):
    """Another rank has stopped, so this operation cannot complete."""


class CommTimeout(CommError):
    """An operation waited longer than the communication time-out."""


class CheckpointError(MinillmError):
    """A checkpoint is missing, damaged, or of another model."""
