"""What can go wrong through no fault of the code."""


class UserError(Exception):
    """A wrong file, column, value or option.

    Its message is one sentence for the person at the terminal: what was expected, what came, and where.
    """


class ConstantModelError(UserError):
    """A model that was trained and answers every row alike: of no use, though nothing was wrong with the command."""
