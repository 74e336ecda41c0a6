"""The one exception for anything a user can cause."""


class BadInput(ValueError):
    """A fault in what the user gave: a file, a feature, an option.

    The message is one line that names what is wrong, where, and what to do about it.
    The command line prints it without a traceback and exits with code 2.
    """
