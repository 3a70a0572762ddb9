"""Running a job elsewhere: one command a target, each with `--dry_run`."""
