"""The one exception that users see."""


class UserError(Exception):
    """Bad input, told in one sentence: what is wrong, where (file, record, key), what to do.

    Command lines print the sentence after `error: ` and exit with status 2; no traceback.
    """
