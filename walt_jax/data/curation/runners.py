"""How the parts of a preparation are run: threads of this process, or any Beam runner."""

import argparse
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from walt_jax.data import stores
from walt_jax.data.curation.work import Work
from walt_jax.errors import UserError

logger = logging.getLogger(__name__)
Item = tuple[int, int]  # a part's number, and where its sources are listed
THREADS = "threads"
_POLL, _FAR_POLL = 1.0, 10.0  # seconds between two looks at what Beam's workers have done


def run_parts(
    work: Work,
    items: Sequence[Item],
    *,
    runner: str | None,
    workers: int,
    flags: Sequence[str],
    arrived: Callable[[set[int]], set[int]],
    advance: Callable[[int], None],
) -> None:
    """Runs `work` on every item.

    Args:
      work: called with each item.
      items: the parts to make.
      runner: "threads", or Beam's name of a runner.
      workers: threads, or processes of the DirectRunner.
      flags: Beam's own options, as on its command lines.
      arrived: which of some parts are there.
      advance: told every part as it is made, in this thread.

    Raises:
      UserError: what the work raised, a flag that Beam does not know, or a runner that fails.
    """
    if not items:
        return
    if runner == THREADS:
        _run_threads(work, items, workers, advance)
    else:
        _run_beam(work, items, runner, workers, flags, arrived, advance)


def has_beam() -> bool:
    """Whether apache-beam is installed."""
    return importlib.util.find_spec("apache_beam") is not None


def _run_threads(
    work: Work, items: Sequence[Item], workers: int, advance: Callable[[int], None]
) -> None:
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for (part, _), _note in zip(items, pool.map(lambda item: work(*item, stop), items)):
                advance(part)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _run_beam(
    work: Work,
    items: Sequence[Item],
    runner: str,
    workers: int,
    flags: Sequence[str],
    arrived: Callable[[set[int]], set[int]],
    advance: Callable[[int], None],
) -> None:
    import apache_beam as beam
    from apache_beam.runners.runner import PipelineState

    errors = stores.join(work.folder, "errors")
    stores.remove(str(errors))
    pause = _FAR_POLL if stores.is_remote(work.folder) else _POLL
    left = {part for part, _ in items}

    def look() -> None:
        for part in sorted(arrived(left)):
            left.discard(part)
            advance(part)

    options = pipeline_options(runner, workers, flags)
    pipeline = beam.Pipeline(options=options)
    build(pipeline, work, items)
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(pipeline.run().wait_until_finish())
        except BaseException as error:  # raised again in the thread that waits
            outcome.append(error)

    # A daemon, so that an interrupt ends the program.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(pause)
        look()
    look()
    if left:
        said = stores.files(errors)
        if said:
            raise UserError(stores.read_text(stores.join(errors, said[0])))
    if isinstance(outcome[0], BaseException) or outcome[0] != PipelineState.DONE:
        raise UserError(
            f"Beam's {runner} failed ({_last_line(outcome[0])}): see the log above; the parts that "
            "are done are kept, so run again to go on."
        ) from (outcome[0] if isinstance(outcome[0], BaseException) else None)
    if left:
        raise UserError(
            f"Beam's workers finished, but {work.folder} lacks {len(left)} parts: --output must "
            "lie where all workers and this process can write; or give a store as --staging."
        )


def build(pipeline: Any, work: Work, items: Sequence[Item]) -> Any:
    """Adds the preparation to a Beam pipeline; returns its output, a count of records a part."""
    import apache_beam as beam

    from walt_jax.data.curation.beam_work import MakePart

    return (
        pipeline
        | "parts" >> beam.Create(list(items), reshuffle=False)
        | "spread" >> beam.Reshuffle()  # else one worker gets all
        | "prepare" >> beam.ParDo(MakePart(work))
    )


def pipeline_options(runner: str, workers: int, flags: Sequence[str]) -> Any:
    """Beam's options of a runner and of flags that are passed through.

    The DirectRunner gets `workers` processes unless the flags say otherwise.

    Raises:
      UserError: no Beam option has that name.
    """
    from apache_beam.options.pipeline_options import PipelineOptions

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for group in PipelineOptions.__subclasses__():
        if hasattr(group, "_add_argparse_args"):
            known = set(parser._option_string_actions)
            try:
                group._add_argparse_args(parser)
            except argparse.ArgumentError:  # two groups share a name
                logger.debug("%s repeats one of %s", group, known)
    unknown = parser.parse_known_args(list(flags))[1]
    if unknown:
        raise UserError(f"Nothing reads the argument {unknown[0]!r}: see --help.")
    flags = [f"--runner={runner}", *flags]
    if runner == "DirectRunner":
        default = {
            "direct_running_mode": "multi_processing",
            "direct_num_workers": workers,
            "default_sdk_harness_log_level": "ERROR",
        }
        flags += [
            f"--{name}={value}"
            for name, value in default.items()
            if not any(f.partition("=")[0] == f"--{name}" for f in flags)
        ]
        # Else Beam would fetch the binary of its Prism runner from the network.
        flags.append("--allow_unsafe_triggers")
    return PipelineOptions(flags)


def _last_line(outcome: Any) -> str:
    lines = [line for line in str(outcome).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(outcome).__name__


def default_runner(sources: int, scored: bool) -> str:
    """Threads where starting Beam's processes would cost more than it gives."""
    if not scored and sources <= 1024:
        return THREADS
    if not has_beam():
        logger.info("apache-beam is not installed (pip install 'walt_jax[data]'): using threads.")
        return THREADS
    return "DirectRunner"


def default_workers() -> int:
    """One for every core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
