"""What to prepare: finds the videos and images behind `--input`; names, captions, labels them.

An input is a folder (searched recursively), one file, a glob, WebDataset tars (a folder or glob of
them, or NAME-{000..099}.tar), a CSV or JSONL manifest, `tfds:NAME[/SPLIT]` with a TFDS dataset's
name or directory that has a Video or Image feature, or a published dataset's own layout (see
`layouts.py`). Folders, files, tars and manifests may lie in any fsspec store (gs://...).
"""

import csv
import dataclasses
import glob
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from walt_jax.data import stores, video
from walt_jax.data.layouts import LAYOUTS, read_layout
from walt_jax.data.source_kinds import FileSource, Source, TarSource, TfdsSource, open_tfds
from walt_jax.errors import UserError

MANIFEST_COLUMNS = ("path", "caption", "label", "start", "end")
TFDS_FPS = 25.0  # TFDS's Video feature has no times; used where there is no `fps` feature either


class Found(NamedTuple):
    """An input's sources, and its classes' names where it has an order of its own for them."""

    sources: list[Source]
    label_names: tuple[str, ...] | None = None


def find_sources(source: str | Path, **rules: Any) -> list[Source]:
    """The sources of `find_input`, whose arguments it takes."""
    return find_input(source, **rules).sources


def find_input(
    source: str | Path,
    *,
    split: str | None = None,
    label_from_folder: bool = False,
    label_from_name: bool = False,
    label_regex: str | None = None,
) -> Found:
    """Lists the videos and images of an input, in an order that depends on nothing but the input.

    Args:
      source: see the module's docstring. A manifest's columns are path, caption, label, start and
        end (seconds); only path is needed, and it is relative to the manifest.
      split: of a published dataset's layout.
      label_from_folder: the parent folder's name is the label.
      label_from_name: the file's name without its extension is the label.
      label_regex: the first group of this pattern, searched in the name, is the label.

    Raises:
      UserError: nothing there, a bad manifest line, or a label rule that does not apply.
    """
    text = str(source)
    rules = [label_from_folder, label_from_name, label_regex is not None]
    if sum(rules) > 1:
        raise UserError(
            "--label-from-folder, --label-from-name and --label-regex exclude each other: give one."
        )
    kind, _, rest = text.partition(":")
    if kind in LAYOUTS and not rest.startswith("//"):
        if any(rules):
            raise UserError(f"{kind}: has classes of its own: leave --label-... out.")
        sources, names = read_layout(kind, rest, split)
        return Found(_some(text, sources), names)
    if split is not None:
        raise UserError(f"--split is for {', '.join(LAYOUTS)}: leave it out for {text}.")
    sources = _some(text, _found(text))
    if not any(rules):
        return Found(sources)
    return Found([_labelled(s, label_from_folder, label_regex) for s in sources])


def _some(text: str, sources: list[Source]) -> list[Source]:
    if not sources:
        raise UserError(
            f"--input {text} holds no video or image: check the path and the files' extensions."
        )
    return sources


def _found(text: str) -> list[Source]:
    path, suffix = Path(text), PurePosixPath(text).suffix.lower()
    if text.startswith("tfds:"):
        return _from_tfds(text.removeprefix("tfds:"))
    if suffix == ".tar":
        return [source for tar in _tars(text) for source in _from_tar(tar)]
    if stores.is_remote(text):
        return _from_store(text)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file() and suffix in (".csv", ".jsonl"):
        return _from_manifest(path)
    if path.is_file():
        return [FileSource(path, path.name)]
    if glob.has_magic(text):
        return _from_glob(text)
    raise UserError(f"--input {text} does not exist: give a folder, file, glob or tfds:NAME.")


def _labelled(source: Source, from_folder: bool, regex: str | None) -> Source:
    if not isinstance(source, FileSource):
        raise UserError(f"{source.name} is no file: labels by name are for files, leave them out.")
    if from_folder:
        label = PurePosixPath(Path(source.path).absolute()).parent.name
    elif regex is None:
        label = PurePosixPath(str(source.path)).stem
    else:
        try:
            match = re.search(regex, source.name)
            label = match.group(1) if match else None
        except (re.error, IndexError) as error:
            raise UserError(
                f"--label-regex {regex!r} is not a pattern with one group ({error}): correct it."
            ) from error
        if label is None:
            raise UserError(f"--label-regex {regex!r} does not match {source.name}: correct it.")
    return dataclasses.replace(source, label=label)


def _is_source(name: str) -> bool:
    path = PurePosixPath(name)
    # macOS leaves ._name.mp4 beside name.mp4.
    known = path.suffix.lower() in video.EXTENSIONS | video.IMAGES
    return known and not path.name.startswith(".")


def _from_store(url: str) -> list[Source]:
    if PurePosixPath(url).suffix.lower() in (".csv", ".jsonl"):
        return _from_manifest(url)
    if glob.has_magic(url):
        store, inner = stores.store_of(url)
        root = inner[: re.search(r"[*?[]", inner).start()].rpartition("/")[0]
        names = [n.removeprefix(f"{root}/") for n in sorted(store.glob(inner))]
        root = store.unstrip_protocol(root)
    elif not stores.exists(url):
        raise UserError(f"--input {url} does not exist: give a folder, file, glob or tfds:NAME.")
    else:
        root, names = url, stores.files(url)
    if not names and stores.exists(url):
        return [FileSource(url, PurePosixPath(url).name)]
    return [FileSource(stores.join(root, n), n) for n in names if _is_source(n)]


def _tars(text: str) -> list[str]:
    """The tars of a path, a glob, or a name with {000..099}."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if braces:
        first, last = braces.groups()
        numbers = range(int(first), int(last) + 1)
        return [
            f"{text[: braces.start()]}{i:0{len(first)}d}{text[braces.end() :]}" for i in numbers
        ]
    if glob.has_magic(text) and stores.is_remote(text):
        store, inner = stores.store_of(text)
        return [store.unstrip_protocol(name) for name in sorted(store.glob(inner))]
    return sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else [text]


def _from_tar(tar: str) -> list[Source]:
    """WebDataset: members of one key (the name up to its first dot) belong together.

    A video or image, with `.txt` (caption), `.cls` (label) and `.json` (either, under `caption` and
    `label`) beside it.
    """
    media: list[tuple[str, tarfile.TarInfo]] = []
    said: dict[str, dict[str, str]] = {}
    try:
        with stores.open_file(tar) as file, tarfile.open(fileobj=file) as members:
            for member in members:
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key = f"{folder}/{stem}"
                if not member.isfile() or not stem:
                    continue
                if _is_source(member.name):
                    media.append((key, member))
                elif extension in ("txt", "cls", "json"):
                    text = members.extractfile(member).read().decode("utf-8-sig").strip()
                    about = said.setdefault(key, {})
                    if extension == "json":
                        values = json.loads(text)
                        for name in ("caption", "label"):
                            if name in values:
                                about.setdefault(name, str(values[name]))
                    else:
                        about["caption" if extension == "txt" else "label"] = text
    except (tarfile.TarError, EOFError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{tar} cannot be read as a tar ({error}): fetch it again.") from error
    return [
        TarSource(
            tar=tar,
            offset=member.offset_data,
            size=member.size,
            suffix=PurePosixPath(member.name).suffix,
            name=f"{PurePosixPath(tar).name}/{member.name}",
            **said.get(key, {}),
        )
        for key, member in media
    ]


def _from_folder(folder: Path) -> list[Source]:
    names = stores.files(folder)
    media = [FileSource(folder / name, name) for name in names if _is_source(name)]
    tars = [] if media else [name for name in names if name.endswith(".tar")]
    return media or [s for name in tars for s in _from_tar(str(folder / name))]


def _from_glob(pattern: str) -> list[Source]:
    # Names are relative to the part before the first wildcard.
    fixed = []
    for part in Path(pattern).parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    root = Path(*fixed)
    paths = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
    return [FileSource(p, p.relative_to(root).as_posix()) for p in paths]


def _from_manifest(manifest: str | Path) -> list[Source]:
    return [
        _manifest_source(manifest, f"{manifest} line {line}", row)
        for line, row in _manifest_rows(manifest)
    ]


def _manifest_rows(manifest: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with stores.open_file(manifest) as binary:
            text = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
            if PurePosixPath(str(manifest)).suffix.lower() == ".csv":
                reader = csv.DictReader(text, restkey="a column without a heading")
                yield from ((reader.line_num, row) for row in reader)
                return
            for line, content in enumerate(text, start=1):
                if content.strip():
                    row = json.loads(content)
                    if not isinstance(row, dict):
                        raise UserError(f"{manifest} line {line} is not a JSON object: correct it.")
                    yield line, row
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise UserError(f"{manifest} cannot be read ({error}): correct it.") from error


def _manifest_source(manifest: str | Path, where: str, row: dict[str, Any]) -> FileSource:
    unknown = sorted(set(row) - set(MANIFEST_COLUMNS))
    if unknown:
        raise UserError(
            f"{where} has {', '.join(map(repr, unknown))}, which nothing reads: the columns are "
            f"{', '.join(MANIFEST_COLUMNS)}."
        )
    given = {k: str(v).strip() for k, v in row.items() if v is not None and str(v).strip()}
    if "path" not in given:
        raise UserError(f"{where} has no path: give one, relative to the manifest.")
    times = {}
    for key in ("start", "end"):
        try:
            times[key] = float(given[key]) if key in given else None
        except ValueError as error:
            raise UserError(f"{where}: {key} {given[key]!r} is not seconds: correct it.") from error
    return FileSource(
        path=_beside(manifest, given["path"]),
        name=given["path"],
        caption=given.get("caption", ""),
        label=given.get("label"),
        start=times["start"] or 0.0,
        end=times["end"],
    )


def _beside(manifest: str | Path, name: str) -> str | Path:
    if stores.is_remote(name):
        return name
    if stores.is_remote(manifest):
        return stores.join(str(manifest).rpartition("/")[0], name)
    return Path(manifest).parent / name


def _from_tfds(name: str) -> list[Source]:
    try:
        splits = open_tfds(name)
    except Exception as error:  # TFDS raises whatever it trips over
        raise UserError(
            f"tfds:{name} cannot be opened ({type(error).__name__}: {str(error).splitlines()[0]}): "
            "check the name, or prepare it with tfds and give its directory."
        ) from error
    return [s for split in sorted(splits) for s in _from_tfds_split(name, split, splits[split])]


def _from_tfds_split(name: str, split: str, examples: Any) -> Iterator[TfdsSource]:
    features = examples.dataset_info.features

    def first(kind: type, *names: str) -> str | None:
        found = [
            k for k, f in features.items() if isinstance(f, kind) and (not names or k in names)
        ]
        return found[0] if found else None

    frames = first(tfds.features.Video) or first(tfds.features.Image)
    label = first(tfds.features.ClassLabel)
    caption = first(tfds.features.Text, "caption", "text", "description")
    if frames is None:
        raise UserError(
            f"tfds:{name} has no Video or Image feature, only {', '.join(features)}: give a "
            "dataset of videos or images."
        )
    described = label is not None or caption is not None or "fps" in features
    for i in range(len(examples)):
        example = examples[i] if described else {}
        known = label is not None and example[label] >= 0
        yield TfdsSource(
            dataset=name,
            split=split,
            index=i,
            feature=frames,
            fps=float(example["fps"]) if "fps" in features else TFDS_FPS,
            name=f"{split}/{i:06d}",
            caption=example[caption].decode() if caption else "",
            label=features[label].int2str(int(example[label])) if known else None,
        )
