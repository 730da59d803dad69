"""The one exception of this project's own."""


class UserError(ValueError):
    """A mistake of the user's that one line explains; scripts print it and exit with status 2."""
