"""From sources to a dataset of video records: what `python -m walt_jax.prepare` does.

1. The sources are listed and dealt out to parts. Every part is made by a worker of its own, a
   thread or a process under Beam: decode, cut, score, caption, write. A part is whole or missing,
   so a run that was killed goes on with those that are missing.
2. The parts are joined to a dataset of all clips with their scores, `DIRECTORY.scored`.
3. What the filter keeps of it becomes `DIRECTORY`, by links and copies of bytes. Where the filter
   is off that is all, and the scored one goes; else it stays, and other thresholds start here.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from walt_jax.data import stores
from walt_jax.data.curation import filtering, runners, scores
from walt_jax.data.curation.config import PrepareConfig, endpoint_settings
from walt_jax.data.curation.report import write_report
from walt_jax.data.curation.work import LAST, Work, features, write_sources
from walt_jax.data.directories import check_free
from walt_jax.data.parts import Parts, PartStore, begun_with
from walt_jax.data.records import VIDEO_FEATURES, Dataset, open_dataset
from walt_jax.data.source_kinds import to_json
from walt_jax.data.sources import Found, find_input
from walt_jax.data.writer import DatasetWriter
from walt_jax.errors import UserError
from walt_jax.progress import bar as progress_bar

logger = logging.getLogger(__name__)
_DEFAULT = PrepareConfig()
_SOURCES_PER_SHARD, _MAX_SHARDS = 8, 1024


@dataclasses.dataclass(frozen=True)
class PrepareReport:
    """What became of the sources; `report.json` in the dataset holds the same.

    Attributes:
      sources, clips, records, frames: how many there were of each; records are the clips kept, and
        frames theirs.
      skipped: for each source not, or not wholly, read its `source` name, the `reason` and
        `records_kept`, how many clips came before it failed.
      rejected: for each clip that is not kept its `source`, `start` in seconds and the `reason`.
      refused: for each clip that the endpoint would not describe, the same.
    """

    sources: int
    clips: int
    records: int
    frames: int
    skipped: tuple[dict[str, Any], ...]
    rejected: tuple[dict[str, Any], ...] = ()
    refused: tuple[dict[str, Any], ...] = ()


def prepare_dataset(
    source: str | Path,
    directory: str | Path,
    *,
    config: PrepareConfig = _DEFAULT,
    split: str | None = None,
    label_from_folder: bool = False,
    label_from_name: bool = False,
    label_regex: str | None = None,
    short_side: int | None = None,
    max_seconds: float | None = None,
    shards: int | None = None,
    workers: int | None = None,
    runner: str | None = None,
    beam_flags: Sequence[str] = (),
    staging: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> PrepareReport:
    """Makes clips of an input and writes those that the filter keeps as `VIDEO_FEATURES` records.

    Records are in the order of the sources, and the shards' bytes depend on the input and the
    config only, not on runner or workers. Killed and called again, it goes on where it was. With a
    filter, the clips before it stay in `DIRECTORY.scored`; another filter with `overwrite`
    begins there.

    Args:
      source: folder, file, glob, manifest, tars, tfds:NAME, a dataset's layout, or a prepared
        dataset, which is filtered; see `walt_jax.data.sources`. So are the three label options and
        `split`. Label ids follow the sorted names, numbers by value, or the layout's own order.
      directory: where the dataset will be; see `DatasetWriter`.
      config: cuts, scores, captions, filter.
      short_side, max_seconds: in place of those of `config`.
      shards: number of parts (fewer if there are fewer sources); by default one for 8 sources, at
        most 1024.
      workers: threads, or processes of the DirectRunner; by default one a core.
      runner: "threads", or the name of a Beam runner; by default threads for little work, else
        "DirectRunner".
      beam_flags: Beam's own options.
      staging: a URL (gs://...) where workers leave their parts, from which this process fetches
        them; by default they write beside `directory`, on a file system that all share.
      overwrite: replace the dataset in `directory`.
      progress: show a progress bar.

    Raises:
      UserError: a bad input or option, the directory is taken, or no source could be decoded.
    """
    for option, value in (("short-side", short_side), ("shards", shards), ("workers", workers)):
        if value is not None and value < 1:
            raise UserError(f"--{option} must be at least 1, got {value}: give a larger one.")
    if short_side is not None:
        config = dataclasses.replace(config, short_side=short_side)
    if max_seconds is not None:
        cut = dataclasses.replace(config.cut, max_seconds=max_seconds)
        config = dataclasses.replace(config, cut=cut)
    if stores.is_remote(directory):
        raise UserError(
            f"--output {directory} is a URL: give a folder, and copy it there when it is done."
        )
    if staging is not None and not stores.is_remote(staging):
        raise UserError(f"--staging {staging} is no URL of a store: give one, such as gs://...")
    directory = Path(directory).absolute()
    check_free(directory, overwrite)
    if (Path(source) / "metadata.json").is_file():
        return _filter_only(open_dataset(source, VIDEO_FEATURES), directory, config, overwrite)
    found = find_input(
        source,
        split=split,
        label_from_folder=label_from_folder,
        label_from_name=label_from_name,
        label_regex=label_regex,
    )
    count = len(found.sources)
    parts = min(shards or math.ceil(count / _SOURCES_PER_SHARD), count, _MAX_SHARDS)
    scored_at = directory.with_name(directory.name + ".scored")
    settings = _settings(found, config, parts)
    scored = _already(scored_at, settings, overwrite)
    if scored is None:
        if config.captions.endpoint is not None:
            endpoint_settings(config.captions.endpoint)
        scores.check(config.scores)
        for said in scores.left_off(config.scores) if _scores(config) else ():
            logger.info(said)
        runner = runner or runners.default_runner(count, _scores(config))
        job = _Job(found, config, settings, parts, runner, tuple(beam_flags), staging, progress)
        scored = job.run(str(source), scored_at, workers or runners.default_workers(), overwrite)
    report = _keep(scored, directory, config, overwrite)
    if not config.filter.is_on:
        shutil.rmtree(scored_at)
    return report


def _scores(config: PrepareConfig) -> bool:
    return bool(scores.columns(config.scores)) or config.captions.endpoint is not None


def _settings(found: Found, config: PrepareConfig, parts: int) -> dict[str, Any]:
    listed = hashlib.sha256(json.dumps([to_json(s) for s in found.sources]).encode()).hexdigest()
    return {"sources": listed, "label_names": _label_names(found), "parts": parts} | (
        config.described()
    )


def _label_names(found: Found) -> list[str]:
    if found.label_names is not None:
        return list(found.label_names)
    return sorted({s.label for s in found.sources if s.label is not None}, key=_label_order)


def _label_order(name: str) -> tuple[bool, int, str]:
    """Numbers in the order of their value, before words."""
    return (False, int(name), name) if name.isdecimal() else (True, 0, name)


def _already(path: Path, settings: dict[str, Any], overwrite: bool) -> Dataset | None:
    """The scored clips of an earlier run with these settings."""
    if not (path / "metadata.json").is_file():
        return None
    dataset = open_dataset(path)
    if dataset.metadata.get("settings") == json.loads(json.dumps(settings)):
        logger.info("%s has all clips and their scores: only the filter runs", path)
        return dataset
    if not overwrite:
        raise UserError(
            f"{path} holds clips of another input or config: give --overwrite to make them anew, "
            "or another --output."
        )
    return None


@dataclasses.dataclass(frozen=True)
class _Job:
    """The making of the scored clips."""

    found: Found
    config: PrepareConfig
    settings: dict[str, Any]
    parts: int
    runner: str
    flags: tuple[str, ...]
    staging: str | None
    progress: bool

    def run(self, source: str, directory: Path, workers: int, overwrite: bool) -> Dataset:
        # What was begun with these settings goes on; --overwrite is for what is finished.
        resumes = begun_with(directory) == json.loads(json.dumps(self.settings))
        with Parts(
            directory,
            features(self.config),
            self.parts,
            self.settings,
            overwrite=overwrite and not resumes,
        ) as parts:
            sources, store = self.found.sources, parts.store
            folder = self._folder(store, directory.name)
            offsets = write_sources(folder, sources, self.parts)
            label_ids = {name: i for i, name in enumerate(_label_names(self.found))}
            work = Work(self.config, label_ids, folder, store.settings)
            bounds = [len(sources) * i // self.parts for i in range(self.parts + 1)]
            missing = set(parts.missing())
            missing -= _arrived(store, folder, missing)
            left = sum(bounds[i + 1] - bounds[i] for i in missing)
            with progress_bar(
                total=len(sources),
                initial=len(sources) - left,
                what="prepare",
                unit="video",
                disable=not self.progress,
            ) as bar:
                runners.run_parts(
                    work,
                    [(part, offsets[part]) for part in sorted(missing)],
                    runner=self.runner,
                    workers=workers,
                    flags=self.flags,
                    arrived=functools.partial(_arrived, store, folder),
                    advance=lambda part: bar.update(bounds[part + 1] - bounds[part]),
                )
            _arrived(store, folder, missing)
            dataset = self._joined(parts, source)
            if self.staging is not None:
                stores.remove(folder)
            return dataset

    def _folder(self, store: PartStore, name: str) -> str:
        """Where workers leave their parts; in a store, parts of other settings lie elsewhere."""
        if self.staging is None:
            return str(store.folder)
        digest = hashlib.sha256(json.dumps(store.settings, sort_keys=True).encode()).hexdigest()
        return f"{self.staging.rstrip('/')}/{name}-{digest[:16]}"

    def _joined(self, parts: Parts, source: str) -> Dataset:
        notes = [parts.store.note(i) for i in range(self.parts)] if not parts.joined else None
        if notes is not None and not any(note["records"] for note in notes):
            parts.discard()
            entries = [e for note in notes for e in (*note["skipped"], *note["dropped"])]
            raise UserError(
                f"none of the {len(self.found.sources)} videos of {source} can be decoded; the "
                f"first: {entries[0]['reason']}"
            )
        return parts.finish(
            description=f"Videos prepared by walt_jax from {Path(source).name}.",
            metadata={
                "kind": "videos",
                "label_names": _label_names(self.found),
                "settings": self.settings,
                "notes": _merged(notes or []),
            },
        )


def _arrived(store: PartStore, folder: str, parts: set[int]) -> set[int]:
    """Which of the parts are there; those that lie in a store are fetched first."""
    if stores.is_remote(folder):
        whole = {name.split("/")[0] for name in stores.files(folder) if name.endswith(LAST)}
        for part in parts:
            path = store.path(part)
            if path.name in whole and not store.is_whole(part):
                stores.download(f"{folder}/{path.name}", path)
    return {part for part in parts if store.is_whole(part)}


def _merged(notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    lists = ("skipped", "dropped", "refused")
    return {"sources": sum(note["sources"] for note in notes)} | {
        name: [entry for note in notes for entry in note[name]] for name in lists
    }


def _filter_only(
    scored: Dataset, directory: Path, config: PrepareConfig, overwrite: bool
) -> PrepareReport:
    changed = dataclasses.replace(config, filter=_DEFAULT.filter)
    if changed != _DEFAULT:
        raise UserError(
            f"{scored.directory} is a prepared dataset, of which only config.filter can choose: "
            "leave the other options out, or give the videos as --input."
        )
    if scored.directory.resolve() == directory.resolve():
        raise UserError(f"{directory} is the input itself: give another --output.")
    return _keep(scored, directory, config, overwrite)


def _keep(
    scored: Dataset, directory: Path, config: PrepareConfig, overwrite: bool
) -> PrepareReport:
    """Writes the clips that the filter keeps, and the report."""
    reasons = filtering.select(scored, config.filter)
    keep = [not reason for reason in reasons]
    index = scored.index
    notes = scored.metadata.get("notes") or {"sources": len(set(index["source"].tolist()))}
    if not any(keep):
        raise UserError(
            f"config.filter keeps none of the {len(keep)} clips of {scored.directory}; of the "
            f"first: {reasons[0]}. Lower the thresholds, with --overwrite where that is needed."
        )
    rejected = [
        {"source": str(index["source"][i]), "start": float(index["start"][i]), "reason": reason}
        for i, reason in enumerate(reasons)
        if reason
    ]
    report = PrepareReport(
        sources=notes["sources"],
        clips=len(keep),
        records=sum(keep),
        frames=int(index["num_frames"][keep].sum()),
        skipped=tuple(notes.get("skipped", ())),
        rejected=(*notes.get("dropped", ()), *rejected),
        refused=tuple(notes.get("refused", ())),
    )
    metadata = {
        k: v for k, v in scored.metadata.items() if k in ("kind", "label_names", "settings")
    }
    metadata["filter"] = dataclasses.asdict(config.filter)
    with DatasetWriter(
        directory,
        scored.features,
        description=f"Videos prepared by walt_jax: {report.records} of {report.clips} clips.",
        metadata=metadata,
        overwrite=overwrite,
    ) as writer:
        writer.add(scored, keep)
        write_report(writer.partial, scored, reasons, dataclasses.asdict(report), config.filter)
    return report
