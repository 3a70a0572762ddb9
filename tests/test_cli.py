"""The command line: arguments, overrides, and errors as one sentence."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from walt_jax import cli
from walt_jax.errors import UserError


def parse(*argv):
    args, overrides = cli.parse(cli.config_parser("Tests."), argv)
    return args.config, args.workdir, overrides


def test_parse_collects_overrides():
    assert parse(
        *("--config.a.b=1", "--config", "c.py:debug", "--config.sizes=((1, 2),)"),
        *("--config.rate", "-0.5", "--workdir=w", "--config.path", "out dir", "--config.x=a=b"),
    ) == ("c.py:debug", "w", ["a.b=1", "sizes=((1, 2),)", "rate=-0.5", "path=out dir", "x=a=b"])


@pytest.mark.parametrize(
    "argument", ["--batch_size=3", "--work=w", "--config_=3", "stray", "-n", "--conf.a=1"]
)
def test_unknown_argument(argument):
    with pytest.raises(UserError, match=f"Nothing reads the argument '{argument}'.*--help"):
        parse("--config", "c.py", "--workdir", "w", argument)


@pytest.mark.parametrize("rest", [(), ("--config.b=1",)])
def test_override_without_a_value(rest):
    with pytest.raises(UserError, match=r"--config\.a has no value.*--config\.a=VALUE"):
        parse("--config", "c.py", "--workdir", "w", "--config.a", *rest)


@pytest.fixture
def quiet_logger():
    """`cli.run` sets up the package's logger for the whole process: put it back."""
    logger = logging.getLogger("walt_jax")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])


@pytest.mark.parametrize(
    "error, status, line",
    [
        (UserError("No such thing."), 2, "error: No such thing."),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_run_tells_users_errors_in_a_line(quiet_logger, capsys, error, status, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit_:
        cli.run(main)
    assert exit_.value.code == status
    assert capsys.readouterr() == ("", f"{line}\n")


def test_run_lets_bugs_through(quiet_logger):
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0)


def test_train_with_an_unknown_override_fails_in_one_line(tmp_path):
    """In a real process: the sentence on stderr, status 2, and nothing written."""
    command = [
        "-m",
        "walt_jax.train",
        "--config",
        "configs/sprites_tokenizer.py:debug",
        "--workdir",
    ]
    result = subprocess.run(
        [sys.executable, *command, str(tmp_path / "run"), "--config.task.model.chanels=8"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert result.stderr.splitlines() == [
        "error: Nothing reads config.task.model.chanels; did you mean 'channels'?"
    ]
    assert (result.returncode, result.stdout) == (2, "")
    assert not (tmp_path / "run").exists()
