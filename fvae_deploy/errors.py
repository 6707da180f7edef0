"""The one error tree.

    FvaeError                 exit code
    ├── UsageError            2   options that contradict each other
    ├── VolumeError           3   an input or output that cannot be read or written
    │   ├── OutputError       3   an output that cannot be written: a full disk, no permission
    │   └── LatentError       3   a latent store that is incomplete, damaged or of another model
    ├── ConditionError        3   a mask or text that does not fit the generator
    ├── BundleError           4   weights or a bundle that do not fit, or are damaged
    ├── EngineError           5   an engine that cannot run here
    ├── PlanError             6   a memory budget that cannot be met
    └── StoppedError        130   Ctrl-C; 143 SIGTERM, 129 SIGHUP

Every message is one line: what was expected, what was found, and the remedy.
Only the command line turns errors into exit codes.
"""


class FvaeError(Exception):
    """Base of every error that fvae raises on purpose."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        # Damaged files put control characters, even line breaks, into what a message quotes.
        super().__init__("".join(c if c.isprintable() else " " for c in message))


class UsageError(FvaeError):
    """Options that contradict each other or lie outside their range."""

    exit_code = 2


class VolumeError(FvaeError):
    """A volume that cannot be read, written or understood."""

    exit_code = 3


class OutputError(VolumeError):
    """An output that cannot be written, for want of space or permission; the input is sound."""


class LatentError(VolumeError):
    """A latent store that is incomplete, damaged, or made by another model."""


class ConditionError(FvaeError):
    """A mask or text that does not fit the generator."""

    exit_code = 3


class BundleError(FvaeError):
    """Weights or a bundle that are missing, damaged or of another version."""

    exit_code = 4


class EngineError(FvaeError):
    """An engine that was asked for and cannot run here."""

    exit_code = 5


class PlanError(FvaeError):
    """A memory budget that cannot be met; the message names the least that would do."""

    exit_code = 6


class StoppedError(FvaeError):
    """The user stopped the run."""

    exit_code = 130
