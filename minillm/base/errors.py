"""Errors for the user. Each message names the wrong values and a way out."""


class MinillmError(Exception):
    """Base of the errors that programs print without a traceback."""


class ConfigError(MinillmError):
    """Invalid or incompatible options, sizes or files."""


class ScheduleError(MinillmError):
    """Pipeline schedule that is malformed or deadlocks."""


class CommError(MinillmError):
    """Failed communication. The subclasses distinguish the causes."""


class PeerFailed(CommError):
    """Operation that cannot complete because another rank has stopped."""


class RanksLost(CommError):
    """Loss of ranks that every living rank knows of, by `Communicator.unanimous`."""


class CommTimeout(CommError):
    """Operation that exceeded the communication time-out."""


class CheckpointError(MinillmError):
    """Checkpoint that is missing, damaged, or of another model."""
