"""The folders of published datasets as their makers and mirrors lay them out.

    ucf101:DIR     DIR/UCF-101/CLASS/*.avi and DIR/ucfTrainTestlist/{classInd,trainlist01,...}.txt;
                   splits train01 to train03, test01 to test03, all
    kinetics:DIR   the CSV annotations (label, youtube_id, time_start, time_end) in DIR or in
                   DIR/annotations, and the clips below DIR/SPLIT, in folders of classes or not,
                   named ID_START_END as DeepMind's and CVDF's downloads are; any SPLIT with a CSV
    imagenet:DIR   DIR/train/WNID/*.JPEG and DIR/val, in folders of classes or with Kaggle's
                   LOC_val_solution.csv; also below DIR/ILSVRC/Data/CLS-LOC; splits train, val

Labels are numbered over all classes, whatever the split holds. A file that a list names and that is
not there becomes a source all the same, so that the report names it.
"""

import csv
import io
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from walt_jax.data import stores, video
from walt_jax.data.source_kinds import FileSource
from walt_jax.errors import UserError

Root = str | Path
Listing = tuple[list[FileSource], tuple[str, ...]]  # sources and all class names, in their order


def read_layout(kind: str, root: str, split: str | None) -> Listing:
    """The sources of one split.

    Args:
      kind: a name in `LAYOUTS`.
      root: the dataset's folder or URL.
      split: its split, None for the layout's first.

    Raises:
      UserError: a file of the layout is missing, or there is no such split.
    """
    if not stores.exists(root):
        raise UserError(f"--input {kind}:{root} does not exist: give the dataset's folder.")
    return LAYOUTS[kind](root, split)


def _ucf101(root: Root, split: str | None) -> Listing:
    split = split or "train01"
    lists = _first(root, ("ucfTrainTestlist", "UCF101TrainTestSplits-RecognitionTask"))
    if stores.exists(stores.join(lists, "ucfTrainTestlist")):
        lists = stores.join(lists, "ucfTrainTestlist")
    videos = _first(root, ("UCF-101", "UCF101"))
    known = [f"{kind}{i:02d}" for kind in ("train", "test") for i in (1, 2, 3)] + ["all"]
    if split not in known:
        raise UserError(f"ucf101 has no split {split!r}: give --split {', '.join(known)}.")
    parts = ("train01", "test01") if split == "all" else (split,)
    names = []
    for part in parts:
        path = stores.join(lists, f"{part[:-2]}list{part[-2:]}.txt")
        # Lists of the training half have the class's number after the name.
        names += [line.split()[0] for line in stores.read_text(path).splitlines() if line.strip()]
    rows = [line.split() for line in _text(lists, "classInd.txt").splitlines() if line.strip()]
    classes = tuple(row[1] for row in sorted(rows, key=lambda row: int(row[0])))
    sources = [
        FileSource(stores.join(videos, name), name, label=PurePosixPath(name).parent.name)
        for name in names
    ]
    return sources, _checked(sources, classes, lists)


def _kinetics(root: Root, split: str | None) -> Listing:
    split = split or "train"
    tables = {
        PurePosixPath(name).stem.split("_")[-1]: stores.join(root, name)
        for name in _tables(root)
        if name.endswith(".csv")
    }
    if split not in tables:
        found = ", ".join(sorted(tables)) or "none"
        raise UserError(
            f"{root} has no annotations of the split {split!r} (found: {found}): put "
            f"{split}.csv there, or give another --split."
        )
    rows = {name: _kinetics_rows(path) for name, path in tables.items()}
    # A test list without labels names no class.
    classes = tuple(sorted({r["label"] for table in rows.values() for r in table if r["label"]}))
    folder = stores.join(root, split)
    there = {
        PurePosixPath(name).stem: name
        for name in stores.files(folder)
        if PurePosixPath(name).suffix.lower() in video.EXTENSIONS
    }
    sources = []
    for row in rows[split]:
        times = [round(float(row[key])) for key in ("time_start", "time_end")]
        stem = f"{row['youtube_id']}_{times[0]:06d}_{times[1]:06d}"
        name = there.get(stem) or there.get(row["youtube_id"]) or f"{stem}.mp4"
        sources.append(FileSource(stores.join(folder, name), name, label=row["label"] or None))
    return sources, classes


def _kinetics_rows(path: Root) -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(stores.read_text(path))))
    needed = {"youtube_id", "time_start", "time_end"}
    if rows and not needed <= set(rows[0]):
        raise UserError(
            f"{path} lacks {', '.join(sorted(needed - set(rows[0])))}: give Kinetics' own CSV."
        )
    return [{"label": "", **row} for row in rows]


def _tables(root: Root) -> list[str]:
    inner = [f"annotations/{name}" for name in stores.files(stores.join(root, "annotations"))]
    if inner:
        return inner
    if stores.is_remote(root):
        return [name for name in stores.files(root) if "/" not in name]
    return sorted(path.name for path in Path(root).glob("*.csv"))


def _imagenet(root: Root, split: str | None) -> Listing:
    split = split or "train"
    if split not in ("train", "val"):
        raise UserError(f"imagenet has no split {split!r}: give --split train or val.")
    base = stores.join(root, "ILSVRC/Data/CLS-LOC")
    base = base if stores.exists(base) else root
    names = _images(stores.files(stores.join(base, split)))
    if not names:
        raise UserError(f"{stores.join(base, split)} holds no image: check --input and --split.")
    folder = stores.join(base, split)
    if "/" in names[0]:
        labels = [name.split("/")[0] for name in names]
    else:
        # Kaggle's file: ImageId,"WNID x y x y ..."
        rows = csv.reader(io.StringIO(_text(root, "LOC_val_solution.csv")))
        of = {row[0]: row[1].split()[0] for row in rows if len(row) == 2 and row[1].strip()}
        missing = next((name for name in names if PurePosixPath(name).stem not in of), None)
        if missing:
            raise UserError(f"{root}/LOC_val_solution.csv has no class of {missing}: get it anew.")
        labels = [of[PurePosixPath(name).stem] for name in names]
    # The numbering in use everywhere is that of the sorted WordNet ids of the training half.
    classes = set(labels)
    if split != "train":
        trained = stores.files(stores.join(base, "train"))
        classes |= {name.split("/")[0] for name in trained if "/" in name}
    sources = [
        FileSource(stores.join(folder, name), name, label=label)
        for name, label in zip(names, labels)
    ]
    return sources, tuple(sorted(classes))


LAYOUTS: dict[str, Callable[[Root, str | None], Listing]] = {
    "ucf101": _ucf101,
    "kinetics": _kinetics,
    "imagenet": _imagenet,
}


def _images(names: Iterable[str]) -> list[str]:
    return [name for name in names if PurePosixPath(name).suffix.lower() in video.IMAGES]


def _first(root: Root, names: tuple[str, ...]) -> Root:
    for name in names:
        if stores.exists(stores.join(root, name)):
            return stores.join(root, name)
    raise UserError(f"{root} has no {names[0]}: unpack the dataset's archives there.")


def _text(root: Root, name: str) -> str:
    path = stores.join(root, name)
    if not stores.exists(path):
        raise UserError(f"{path} is missing: put the dataset's own file there.")
    return stores.read_text(path)


def _checked(sources: list[FileSource], classes: tuple[str, ...], where: Root) -> tuple[str, ...]:
    unknown = sorted({s.label for s in sources} - set(classes))
    if unknown:
        raise UserError(f"{where} knows no class {unknown[0]!r}: its lists do not belong together.")
    return classes
