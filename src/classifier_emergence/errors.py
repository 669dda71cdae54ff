"""The one exception that users are meant to read, and the one line about any other."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something that the caller gave is wrong: a parameter, a prompt, a model, a file.

    The message is one line that names the thing, says what is wrong with it and what to do. On the command line
    it is printed as it stands and the exit code is 2.
    """


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "known here: {}") -> str:
    """What to do about an unknown name: the one that was meant, or all that there are.

    Example:
        >>> did_you_mean("probbing", ["probing", "logit_lens"])
        "did you mean 'probing'?"
    """
    near = difflib.get_close_matches(name, known := sorted(known), n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise.format(", ".join(known))


def first_line(error: Exception) -> str:
    """What another library says is wrong, short enough for a message of ours; the error's name if it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def one_line(error: Exception) -> str:
    """What to print of whatever went wrong, without its traceback."""
    if isinstance(error, InputError):
        return str(error)
    if (isinstance(error, OSError) and error.strerror) or "(os error " in str(error):  # the latter of what is in Rust
        file = getattr(error, "filename", None)
        what = getattr(error, "strerror", None) or first_line(error)
        return f"{f'{file}: ' if file else ''}{what}; check the file, its folder and the free space, then run again"
    if isinstance(error, MemoryError):
        return "out of memory; run where there is more, or take a smaller model or batch"
    return f"{type(error).__name__}: {first_line(error)} (unexpected error; --debug shows the traceback)"
