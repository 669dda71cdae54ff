"""The one exception that users are meant to read."""


class InputError(ValueError):
    """Something that the caller gave is wrong: a parameter, a prompt, a model, a file.

    The message is one line that names the thing, says what is wrong with it and what to do. On the command line
    it is printed as it stands and the exit code is 2.
    """


def first_line(error: Exception) -> str:
    """What another library says is wrong, short enough for a message of ours; the error's name if it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]
