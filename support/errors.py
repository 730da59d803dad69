"""The exceptions of this project's own."""


class UserError(ValueError):
    """A mistake of the user's that one line explains; scripts print it and exit with status 2."""


class Interrupted(Exception):
    """The run was asked to stop (SIGINT, SIGTERM); what it had to save is saved."""
