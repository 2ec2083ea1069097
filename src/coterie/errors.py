"""Every error a user can cause: one sentence that says what is wrong, where, and the mend.

The CLI prints the sentence and leaves with `exit_code`; the API answers with `status`.
"""

from collections.abc import Sequence


class CoterieError(Exception):
    """Root of the errors that are the input's fault, not ours."""

    exit_code = 2
    status = 400
    code = "invalid_request"


def first_line(error: Exception) -> str:
    """What a library's error says first, in at most 200 characters: the rest is often a statement or a trace."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class DataError(CoterieError):
    """A data file that cannot be used: names file and line."""

    code = "invalid_data"


class ModelError(CoterieError):
    """A base model or weight file that is missing, truncated or of an unknown kind."""

    status = 500  # the file is ours to mend, not the client's
    code = "invalid_model"


class TrainingError(CoterieError):
    """Training that went wrong: its loss is no longer a number. `rows`: numbers of the batch's rows."""

    code = "training_failed"

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = rows


class UnknownExpert(CoterieError):
    """An expert that is not on the shelf."""

    status = 404
    code = "model_not_found"


class ContextTooLong(CoterieError):
    """A prompt that does not fit the model's context."""

    code = "context_length_exceeded"


class Busy(CoterieError):
    """The queue is full; try again in `retry_after_s` seconds."""

    status = 429
    code = "rate_limit_exceeded"
    retry_after_s = 2


class Stopped(CoterieError):
    """The engine has been closed."""

    exit_code = 1
    status = 503
    code = "stopped"


class CrmError(CoterieError):
    """The CRM is down, slow, full of nonsense, or refuses us."""

    status = 502
    code = "crm_unavailable"


class StorageError(CoterieError):
    """The disk is full or cannot be written."""

    exit_code = 3
    status = 507
    code = "storage"


class SourceError(CoterieError):
    """A knowledge source that cannot be read or asked: a broken file, a dead database, an endpoint that hangs."""

    status = 502
    code = "source_unavailable"


class Unreachable(SourceError):
    """A source on another machine that gives no answer at all: it is down, or hangs. It is left alone for a while."""


class QueryRefused(CoterieError):
    """SQL or SPARQL that asks for more than reading what is allowed; nothing of it was run."""

    code = "query_refused"
