"""The exception that users see: bad input or a bad environment, told in one line. And two kinds of it."""


class UserError(Exception):
    """Something outside the code is wrong. The message says where, what, and what to do, in one line.

    The CLI prints it and exits with code 2; in a pipeline step it is the last line of the log.
    """


class MissingFile(UserError):
    """There is no file, folder, object or bucket at the path."""


class Conflict(UserError):
    """A conditional write found that somebody else had written."""
