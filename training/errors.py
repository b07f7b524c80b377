"""What can go wrong through no fault of the code."""


class UserError(Exception):
    """A wrong file, column, value or option.

    Its message is one sentence for the person at the terminal: what was expected, what came, and where.
    """
