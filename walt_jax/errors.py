"""What ends a command before its time: one sentence and an exit status each."""

EXIT_USER = 2  # a UserError: the same command would fail again
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the same command goes on
EXIT_HUNG = 76


class UserError(Exception):
    """Bad input, told in one sentence: what is wrong, where (file, record, key), what to do.

    Command lines print the sentence after `error: ` and exit with status 2; no traceback.
    """


class Preempted(Exception):
    """A run that was told to leave has saved; its command exits with `EXIT_PREEMPTED`."""
