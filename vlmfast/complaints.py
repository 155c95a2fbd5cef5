"""What a user is told of an error: one line where vlmfast raised it on purpose, the traceback where it is a fault."""

import dis
from types import TracebackType

TOLD = (ValueError, TypeError, NotImplementedError, RuntimeError, ImportError)  # errors that vlmfast raises on purpose


def told(error: BaseException) -> str | None:
    """The line for the user; None for a fault of ours, whose traceback is wanted."""
    if isinstance(error, OSError):
        message = system_error(error)
    elif isinstance(error, TOLD) and raised_on_purpose(error.__traceback__):
        message = str(error)
    else:
        return None
    return " ".join(message.split())


def raised_on_purpose(trace: TracebackType | None) -> bool:
    """Whether an error comes from a ``raise`` statement of vlmfast itself: then its message is meant for the user."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    by_raise = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    module = str(trace.tb_frame.f_globals.get("__name__", ""))
    return by_raise and module.partition(".")[0] in ("vlmfast", "__main__")


def system_error(error: OSError) -> str:
    """An OSError in plain words: without its number."""
    if error.errno is None or error.strerror is None:
        return str(error)
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
