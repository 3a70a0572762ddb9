"""Published datasets as their makers lay them out: UCF-101, Kinetics, ImageNet."""

import cv2
import numpy as np
import pytest

from walt_jax import media, prepare
from walt_jax.data.preparation import prepare_dataset
from walt_jax.data.records import open_dataset
from walt_jax.data.sources import find_input
from walt_jax.errors import UserError


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def listed(source, split=None):
    found = find_input(source, split=split)
    return [(s.name, s.label) for s in found.sources], found.label_names


@pytest.fixture
def ucf101(tmp_path):
    root = tmp_path / "ucf"
    clips = {
        "Archery": ("v_Archery_g01_c01", "v_Archery_g08_c01"),
        "YoYo": ("v_YoYo_g01_c01", "v_YoYo_g08_c02"),
        "ApplyEyeMakeup": ("v_ApplyEyeMakeup_g08_c01",),
    }
    for name, files in clips.items():
        for file in files:
            path = root / "UCF-101" / name / f"{file}.avi"
            path.parent.mkdir(parents=True, exist_ok=True)
            media.write_mp4(path, np.full((4, 32, 32, 3), 80, np.uint8), 25)
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 ApplyEyeMakeup\r\n2 Archery\r\n10 YoYo\r\n")
    (lists / "trainlist01.txt").write_text(
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\nArchery/v_Archery_g08_c01.avi 2\n"
        "YoYo/v_YoYo_g08_c02.avi 10\nYoYo/v_YoYo_g09_c09.avi 10\n"
    )
    (lists / "testlist01.txt").write_text(
        "Archery/v_Archery_g01_c01.avi\r\nYoYo/v_YoYo_g01_c01.avi\r\n"
    )
    return root


def test_ucf101(ucf101, tmp_path, capsys):
    names = ("ApplyEyeMakeup", "Archery", "YoYo")
    test = [("Archery/v_Archery_g01_c01.avi", "Archery"), ("YoYo/v_YoYo_g01_c01.avi", "YoYo")]
    assert listed(f"ucf101:{ucf101}", "test01") == (test, names)
    train = listed(f"ucf101:{ucf101}")[0]
    assert len(train) == 4 and listed(f"ucf101:{ucf101}", "all")[0] == train + test
    prepare.main(
        ["--input", f"ucf101:{ucf101}", "--split", "test01", "--output", str(tmp_path / "test")]
    )
    dataset = open_dataset(tmp_path / "test")
    # Of all classes, though the split lacks the first.
    assert dataset.label_names == names and dataset.index["label"].tolist() == [1, 2]
    report = prepare_dataset(f"ucf101:{ucf101}", tmp_path / "train")
    (missing,) = report.skipped
    assert missing["source"] == "YoYo/v_YoYo_g09_c09.avi" and "is not a file" in missing["reason"]


def test_ucf101_in_disorder(ucf101):
    with pytest.raises(UserError, match="no split 'train04': give --split train01"):
        listed(f"ucf101:{ucf101}", "train04")
    with pytest.raises(UserError, match="has classes of its own"):
        find_input(f"ucf101:{ucf101}", label_from_folder=True)
    (ucf101 / "ucfTrainTestlist" / "classInd.txt").write_text("1 Archery\n")
    with pytest.raises(UserError, match="knows no class 'ApplyEyeMakeup'"):
        listed(f"ucf101:{ucf101}")
    (ucf101 / "ucfTrainTestlist" / "classInd.txt").unlink()
    with pytest.raises(UserError, match=r"classInd\.txt is missing"):
        listed(f"ucf101:{ucf101}")
    with pytest.raises(UserError, match="does not exist"):
        listed("ucf101:/nowhere/at/all")


@pytest.mark.parametrize("layout", ["flat", "classes"])
@pytest.mark.parametrize("table", ["annotations/train.csv", "train.csv", "kinetics600_train.csv"])
def test_kinetics(tmp_path, layout, table):
    root = tmp_path / "k600"
    rows = ["label,youtube_id,time_start,time_end,split,is_cc"]
    rows += ["zumba,-abc_DEF123,5,15,train,0", "abseiling,xyz00000000,12.0,22.0,train,1"]
    rows += ["abseiling,gone0000000,0,10,train,0"]
    (root / table).parent.mkdir(parents=True, exist_ok=True)
    (root / table).write_text("\n".join(rows) + "\n")
    inner = {"flat": ("", ""), "classes": ("zumba/", "abseiling/")}[layout]
    touch(root / "train" / f"{inner[0]}-abc_DEF123_000005_000015.mp4")
    touch(root / "train" / f"{inner[1]}xyz00000000_000012_000022.mkv")
    found, names = listed(f"kinetics:{root}", "train")
    assert names == ("abseiling", "zumba")
    assert found == [
        (f"{inner[0]}-abc_DEF123_000005_000015.mp4", "zumba"),
        (f"{inner[1]}xyz00000000_000012_000022.mkv", "abseiling"),
        ("gone0000000_000000_000010.mp4", "abseiling"),
    ]
    with pytest.raises(UserError, match=r"no annotations of the split 'val' \(found: train\)"):
        listed(f"kinetics:{root}", "val")
    (root / table).write_text("label,id\nx,y\n")
    with pytest.raises(UserError, match="lacks time_end, time_start, youtube_id"):
        listed(f"kinetics:{root}", "train")


@pytest.mark.parametrize("base", [".", "ILSVRC/Data/CLS-LOC"])
def test_imagenet(tmp_path, base):
    root = tmp_path / "imagenet"
    for wnid, count in (("n02", 2), ("n01", 1), ("n03", 1)):
        for i in range(count):
            touch(root / base / "train" / wnid / f"{wnid}_{i}.JPEG")
    for i in (1, 2):
        touch(root / base / "val" / f"ILSVRC2012_val_0000000{i}.JPEG")
    names = ("n01", "n02", "n03")
    train = [("n01/n01_0.JPEG", "n01"), ("n02/n02_0.JPEG", "n02"), ("n02/n02_1.JPEG", "n02")]
    assert listed(f"imagenet:{root}") == ([*train, ("n03/n03_0.JPEG", "n03")], names)
    with pytest.raises(UserError, match=r"LOC_val_solution\.csv is missing"):
        listed(f"imagenet:{root}", "val")
    (root / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nILSVRC2012_val_00000001,n03 1 2 3 4 n03 5 6 7 8 \n"
        "ILSVRC2012_val_00000002,n01 1 2 3 4\n"
    )
    val = [("ILSVRC2012_val_00000001.JPEG", "n03"), ("ILSVRC2012_val_00000002.JPEG", "n01")]
    assert listed(f"imagenet:{root}", "val") == (val, names)


def test_imagenet_to_records(tmp_path):
    for wnid in ("n01", "n02"):
        path = tmp_path / "in" / "train" / wnid / "a.JPEG"
        path.parent.mkdir(parents=True)
        cv2.imwrite(str(path), np.full((32, 40, 3), 90, np.uint8))
    prepare_dataset(f"imagenet:{tmp_path / 'in'}", tmp_path / "out", short_side=16)
    index = open_dataset(tmp_path / "out").index
    assert index["num_frames"].tolist() == [1, 1] and index["label"].tolist() == [0, 1]


def test_split_is_for_layouts(tmp_path):
    with pytest.raises(UserError, match="--split is for ucf101, kinetics, imagenet"):
        find_input(tmp_path, split="train")
