"""Classes, labels and identities of images, whatever keeps them; archives that strangers made."""

import io
import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from test_images import have_datasets, one_pixel, write, write_csv, write_parquet, write_tar

from iwin_dit.build import data
from iwin_dit.config.classifier import ClassifierConfig, ClassifierDataConfig
from iwin_dit.config.schema import Config, DataConfig
from iwin_dit.data.hugging_face import HuggingFaceSource
from iwin_dit.data.latents import LatentDataset, read_index
from iwin_dit.data.packed_sources import WebDatasetSource
from iwin_dit.data.sources import (
    ClipFolderSource,
    FolderSource,
    classes_begun,
    identity_of,
    open_images,
    open_source,
)
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import ConfigError, DataError
from iwin_dit.runtime.run import TIMES, RunDirectory

needs_datasets = pytest.mark.skipif(not have_datasets(), reason="needs the package datasets")


def options(**given):
    defaults = dict(labels=None, follow_links=False, allow_odd_classes=False)
    return SimpleNamespace(**defaults | dict(split=None, image_column=None, label_column=None) | given)


def class_folders(root, names, count=2):
    for name in names:
        for i in range(count):
            write(root / name / f"{i}.png", one_pixel(i))
    return root


# Order of classes


def test_folders_of_numbers_are_classes_in_the_order_of_the_numbers(tmp_path):
    numbers = [str(i) for i in range(12)]
    source = FolderSource(class_folders(tmp_path / "a", numbers))
    assert source.class_names == numbers
    for i in range(len(source)):
        assert f"/{source.read(i)[1]}/" in source.name(i), "folder 2 is class 2"
    padded = [f"{i:03d}" for i in range(1, 13)]
    assert FolderSource(class_folders(tmp_path / "b", padded)).class_names == padded
    words = ["10 euro", "2 euro", *numbers]
    assert FolderSource(class_folders(tmp_path / "c", words)).class_names == sorted(words)
    with pytest.raises(DataError, match=r"class folders 01 and 1 of .* are one number"):
        FolderSource(class_folders(tmp_path / "d", ["0", "1", "01"]))
    for name in numbers:
        (tmp_path / "clips" / name / "clip").mkdir(parents=True)
        write(tmp_path / "clips" / name / "clip" / "0.png")
    assert ClipFolderSource(tmp_path / "clips").class_names == numbers


def test_what_was_begun_keeps_its_order_and_its_oddities(tmp_path):
    numbers = [str(i) for i in range(12)]
    root = class_folders(tmp_path / "a", numbers, count=1)
    with pytest.raises(DataError, match="as many classes as images"):
        open_images(str(root), options())
    write(tmp_path / "data.json", json.dumps({"classes": sorted(numbers)}).encode())
    begun = classes_begun(tmp_path / "data.json", "classes")
    source = open_images(str(root), options(), begun=begun)
    assert source.class_names == sorted(numbers) != numbers
    assert [source.read(i)[1] for i in range(12)] == list(range(12))
    assert source.name(2).endswith("/10/0.png")
    (root / "2").rename(root / "two")
    with pytest.raises(DataError, match="as many classes"):
        open_images(str(root), options(), begun=begun)
    for content in (b"", b"[]", b'{"classes": 3}', b"\xff"):
        write(tmp_path / "data.json", content)
        assert classes_begun(tmp_path / "data.json", "classes") is None
    assert classes_begun(tmp_path / "gone", "classes") is None


# Odd classes


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["train", "val", "Test"], "names of splits; give the folder of one split"),
        (["cat"], "a single class, cat"),
        (["Cat", "cat", "dog"], "differ in case alone: Cat, cat"),
    ],
)
def test_odd_class_folders_are_questioned(tmp_path, names, problem):
    root = str(class_folders(tmp_path, names))
    with pytest.raises(DataError, match=rf"{problem}.*; if that is meant, say so with --allow-odd-classes"):
        open_images(root, options())
    assert open_images(root, options(allow_odd_classes=True)).class_names == sorted(names)
    for name in names:
        (tmp_path / "clips" / name / "clip").mkdir(parents=True)
        write(tmp_path / "clips" / name / "clip" / "0.png")
    with pytest.raises(DataError, match="--allow-odd-classes"):
        open_images(str(tmp_path / "clips"), options(), are_clips=True)


def test_usual_classes_are_not_questioned(tmp_path):
    for names in (["cat", "dog"], ["bus", "car", "train"], ["0", "1"]):
        root = class_folders(tmp_path / names[0], names)
        assert open_images(str(root), options()).class_names == names


def test_classes_without_images_are_questioned_in_every_source(tmp_path):
    """Labels from 1: class 0 would be trained as null, and drawn."""
    images = class_folders(tmp_path / "images", ["a"], count=4) / "a"
    from_one = write_csv(tmp_path, "file,label\n" + "".join(f"{i}.png,{i % 2 + 1}\n" for i in range(4)))
    write_tar(
        tmp_path / "tars" / "s.tar",
        [m for i in range(4) for m in ((f"{i}.png", one_pixel(i)), (f"{i}.cls", str(i % 2 + 1).encode()))],
    )
    for location, given in ((images, {"labels": str(from_one)}), (tmp_path / "tars", {})):
        with pytest.raises(DataError, match=r"no image of class 0, .*write labels from 0, not from 1"):
            open_images(str(location), options(**given))
        assert len(open_images(str(location), options(allow_odd_classes=True, **given)).class_names) == 3
    (tmp_path / "tars" / "classes.txt").write_text("background\ncat\ndog\nowl\n")
    with pytest.raises(DataError, match=r"no images of 2 of 4 classes, .*: background, owl; add images"):
        open_images(str(tmp_path / "tars"), options())


# Dirty labels


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["0", "1", "nan"], r"labels are missing \(line 4: 'nan'\); mend them or drop them"),
        (["cat", "dog", "N/A"], r"labels are missing \(line 4: 'N/A'\)"),
        (["", "", "0"], r"labels are missing \(line 2: '', line 3: ''\)"),
        (["cat", "cat ", " dog"], r"white space around them \(line 3: 'cat ', line 4: ' dog'\)"),
        (["0.0", "1.0", "2.0"], r"numbers, but not whole ones \(line 2: '0.0'\); write them as 0, 1"),
        (["0", "1.5", "1e2"], r"not whole ones \(line 3: '1.5'\)"),
    ],
)
def test_dirty_labels_are_refused_with_their_lines(tmp_path, labels, message):
    images = class_folders(tmp_path, ["a"], count=3) / "a"
    rows = "".join(f'{i}.png,"{label}"\n' for i, label in enumerate(labels))
    with pytest.raises(DataError, match=rf"labels\.csv, .*{message}"):
        open_source(str(images), str(write_csv(tmp_path, "file,label\n" + rows)))


def test_a_file_has_one_label(tmp_path):
    images = class_folders(tmp_path, ["a"], count=2) / "a"
    twice = write_csv(tmp_path, "file,label\n0.png,cat\n1.png,dog\n./0.png,dog\n")
    with pytest.raises(DataError, match=r"line 4: \./0\.png has the label 'dog', in line 2 it has 'cat'"):
        open_source(str(images), str(twice))
    again = write_csv(tmp_path, "file,label\n0.png,cat\n1.png,dog\n0.png,cat\n")
    assert len(open_source(str(images), str(again))) == 3, "what is repeated on purpose stays"


# Identity


def edits(root):
    """Each edit of a folder of images and a CSV, and which source would show it."""
    labels = root / "labels.csv"
    yield "csv", lambda: labels.write_text(labels.read_text().replace(",0", ",x").replace(",1", ",0"))
    yield "folders", lambda: shutil.move(root / "images" / "a" / "0.png", root / "images" / "b" / "9.png")
    yield "folders", lambda: (root / "images" / "a" / "0.png").write_bytes(one_pixel(3) + b"more")
    yield "tar", lambda: write_tar(root / "tars" / "s.tar", [("0.png", one_pixel(0)), ("0.cls", b"0")] * 1)


def make_sources(root):
    class_folders(root / "images", ["a", "b"])
    (root / "labels.csv").write_text("file,label\na/0.png,0\na/1.png,1\nb/0.png,1\n")
    write_tar(root / "tars" / "s.tar", [("0.png", one_pixel(0)), ("0.cls", b"1")])


def open_kind(root, kind):
    if kind == "csv":
        return open_source(str(root / "images"), str(root / "labels.csv"))
    return open_source(str(root / {"folders": "images", "tar": "tars"}[kind]))


@pytest.mark.parametrize("number", range(4))
def test_edits_of_the_data_change_its_identity(tmp_path, number):
    make_sources(tmp_path)
    kind, edit = list(edits(tmp_path))[number]
    before = identity_of(open_kind(tmp_path, kind))
    assert identity_of(open_kind(tmp_path, kind)) == before
    edit()
    after = identity_of(open_kind(tmp_path, kind))
    assert after["files_sha256"] != before["files_sha256"]


def test_a_copy_differs_in_its_times_alone(tmp_path):
    make_sources(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copyfile)
    for kind in ("folders", "csv", "tar"):
        here, there = (identity_of(open_kind(tmp_path / place, kind)) for place in ("here", "there"))
        assert [key for key in here if here[key] != there[key]] == [TIMES]
    image = tmp_path / "here" / "images" / "a" / "0.png"
    before = identity_of(open_kind(tmp_path / "here", "folders"))
    image.write_bytes(image.read_bytes()[::-1])  # as many bytes
    os.utime(image, ns=(0, 10**18))
    after = identity_of(open_kind(tmp_path / "here", "folders"))
    assert [key for key in before if before[key] != after[key]] == [TIMES]


def test_names_are_hashed_as_older_versions_hashed_them(tmp_path):
    """The words of version 0.1, so that its runs go on."""
    import hashlib

    make_sources(tmp_path)
    source = open_kind(tmp_path, "folders")
    names = "\n".join(source.name(i).rpartition("/")[2] for i in range(len(source)))
    assert identity_of(source)["names_sha256"] == hashlib.sha256(names.encode()).hexdigest()


def test_runs_go_on_with_copied_data_and_not_with_other_data(tmp_path, capsys):
    identity = {"images": 2, "names_sha256": "n", "files_sha256": "f", TIMES: "t"}

    def resume(**data):
        run = RunDirectory(tmp_path / "run", {"seed": 0}, frozenset(), data)
        run.begin(0)
        run._lock.close()

    resume(images=2, names_sha256="n")  # as an older version began it
    resume(**identity)
    assert "written or copied" not in capsys.readouterr().out
    resume(**identity | {TIMES: "later"})
    assert "names, labels and sizes are the same, so it goes on" in capsys.readouterr().out
    resume(**identity | {TIMES: "later"})
    assert "written or copied" not in capsys.readouterr().out, "it is said once"
    with pytest.raises(ConfigError, match=r"begun on other data .files_sha256: 'f' -> 'other'"):
        resume(**identity | {TIMES: "again", "files_sha256": "other"})


def test_latents_of_other_labels_are_other_data(latents_folder, tmp_path):
    """Their values, and so their means, are the same."""
    shutil.copytree(latents_folder, tmp_path / "latents")
    shutil.copytree(latents_folder.parent / "vae", tmp_path / "vae")
    assert LatentDataset(tmp_path / "latents").identity == LatentDataset(latents_folder).identity
    path = sorted((tmp_path / "latents").glob("*.safetensors"))[0]
    tensors = load_file(path)
    save_file(tensors | {"labels": tensors["labels"].flip(0).contiguous()}, path)
    index = read_index(tmp_path / "latents")
    index["shards"][0] |= files.fingerprint(path)
    (tmp_path / "latents" / "index.json").write_bytes(files.to_json(index))
    changed = LatentDataset(tmp_path / "latents").identity
    assert changed["shards_sha256"] != LatentDataset(latents_folder).identity["shards_sha256"]
    assert changed["mean"] == LatentDataset(latents_folder).identity["mean"]


def test_data_of_recipes_are_opened_by_the_same_rule(tmp_path):
    """For a generator and a classifier: links, odd classes, order of what was begun, what is ignored."""
    numbers = [str(i) for i in range(11)]
    root = class_folders(tmp_path / "images", numbers)
    write(root / "0" / "notes.txt")
    (tmp_path / "run").mkdir()
    generator = Config(output_dir=str(tmp_path / "run"), data=DataConfig(kind="images", path=str(root)))
    classifier = ClassifierConfig(
        output_dir=str(tmp_path / "run"), data=ClassifierDataConfig(path=str(root), held_out=str(root))
    )
    for begun, expected in ((None, numbers), (sorted(numbers), sorted(numbers))):
        if begun:
            write(tmp_path / "run" / "data.json", json.dumps({"classes": begun}).encode())
        count, line = data.count_images(generator)
        assert count == 22
        assert line.endswith("that are no images: 0/notes.txt")
        assert data.open_training(classifier).class_names == expected
        assert data.open_training(generator).class_names == expected
    shutil.rmtree(tmp_path / "run")
    (root / "0" / "link.png").symlink_to(write(tmp_path / "far.png", one_pixel(0)))
    for open_data in (
        lambda: data.count_images(generator),
        lambda: data.open_training(classifier),
    ):
        with pytest.raises(DataError, match=r"data\.follow_links true"):
            open_data()
    shutil.move(root / "0", tmp_path / "single" / "0")
    one = replace(classifier.data, path=str(tmp_path / "single"), follow_links=True)
    with pytest.raises(DataError, match=r"data\.allow_odd_classes true"):
        data.open_training(replace(classifier, data=one))
    one = replace(one, allow_odd_classes=True)
    assert data.open_training(replace(classifier, data=one)).class_names == ["0"]


# Tar shards that strangers made


def with_checksum(header):
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header


def test_a_long_chain_of_long_names_is_refused(tmp_path):
    """tarfile calls itself for each."""
    header = bytearray(512)
    header[:4], header[124:135], header[156:157], header[257:263] = b"name", b"0" * 11, b"L", b"ustar\0"
    write(tmp_path / "s.tar", bytes(with_checksum(header)) * 5000)
    with pytest.raises(DataError, match=r"s\.tar is not a whole"):
        WebDatasetSource(tmp_path / "s.tar")


def test_members_without_a_known_ending_are_looked_at(tmp_path):
    members = [("a.image", one_pixel(0)), ("a.cls", b"0"), ("b.jfif", one_pixel(1)), ("b.cls", b"1")]
    write_tar(tmp_path / "s.tar", [*members, ("b.txt", b"caption"), ("b.depth", b"\0" * 9)])
    source = open_source(str(tmp_path))
    assert [source.read(i) for i in range(2)] == [(one_pixel(0), 0), (one_pixel(1), 1)]
    assert source.ignored == ["s.tar:b.txt", "s.tar:b.depth"]


def test_shards_by_braces(tmp_path):
    for i in range(12):
        write_tar(
            tmp_path / f"s-{i:03d}.tar", [(f"{i}.png", one_pixel(i)), (f"{i}.cls", str(i % 2).encode())]
        )
    source = open_source(f"{tmp_path}/s-{{002..010}}.tar")
    assert [source.read(i)[0] for i in range(len(source))] == [one_pixel(i) for i in range(2, 11)]
    for names, count in (("{005..005}", 1), ("{004..005}", 2), ("01{0..1}", 2)):
        assert len(open_source(f"{tmp_path}/s-{names}.tar")) == count
    with pytest.raises(DataError, match=r"2 of 12 shards of .* are missing: .*s-012\.tar, .*s-013\.tar"):
        open_source(f"{tmp_path}/s-{{002..013}}.tar")
    for names in ("{5..4}", "{0..99999999999}", "{000..999}{0000..9999}"):
        with pytest.raises(DataError, match="shards, expected 1 to"):
            open_source(f"{tmp_path}/s-{names}.tar")


def test_links_to_shards_follow_the_rule_of_folders(tmp_path):
    tar = write_tar(tmp_path / "far" / "s.tar", [("a.png", one_pixel(0)), ("a.cls", b"0")])
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "s.tar").symlink_to(tar)
    (tmp_path / "parquet").mkdir()
    (tmp_path / "parquet" / "0.parquet").symlink_to(write(tmp_path / "far" / "0.parquet"))
    with pytest.raises(DataError, match="--follow-links"):
        open_source(str(tmp_path / "tars"))
    assert len(open_source(str(tmp_path / "tars"), follow_links=True)) == 1
    if have_datasets():
        with pytest.raises(DataError, match="--follow-links"):
            open_source(str(tmp_path / "parquet"))


def test_pointers_of_git_lfs_are_called_so(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    write(tmp_path / "tars" / "s.tar", pointer)
    with pytest.raises(DataError, match=r"s\.tar is a pointer of Git LFS.*git lfs pull"):
        open_source(str(tmp_path / "tars"))
    if have_datasets():
        write(tmp_path / "parquet" / "0.parquet", pointer)
        with pytest.raises(DataError, match=r"0\.parquet is a pointer of Git LFS.*git lfs pull"):
            open_source(str(tmp_path / "parquet"))


# Hugging Face


@needs_datasets
def test_splits_and_columns_are_chosen(tmp_path, monkeypatch):
    import datasets

    fine, coarse = datasets.ClassLabel(names=["oak", "cat"]), datasets.ClassLabel(names=["plant", "animal"])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = [{"bytes": one_pixel(i), "path": None} for i in range(2)]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "mask": datasets.Image(),
            "fine": fine,
            "coarse": coarse,
            "word": datasets.Value("string"),
        }
    )
    rows = {"image": images, "mask": images[::-1], "fine": [1, 0], "coarse": [1, 0], "word": ["cat", "oak"]}
    (tmp_path / "d").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d" / f"{split}-0.parquet")
    location = str(tmp_path / "d")
    with pytest.raises(DataError, match=r"2 columns of images.*--image-column .*data\.image_column"):
        open_source(location)
    with pytest.raises(DataError, match=r"2 columns of class labels.*--label-column"):
        open_source(location, image_column="image")
    source = open_source(location, split="test", image_column="mask", label_column="coarse")
    assert source.class_names == ["plant", "animal"]
    assert source.read(0) == (one_pixel(1), 1)
    source = open_source(location, image_column="image", label_column="word")
    assert source.class_names == ["cat", "oak"]
    assert list(source.labels) == [0, 1]
    with pytest.raises(DataError, match=r"no column words of class labels.*found image"):
        open_source(location, image_column="image", label_column="words")
    with pytest.raises(DataError, match="split is for Hugging Face data"):
        open_source(str(class_folders(tmp_path / "folders", ["a"])), split="test")
    with pytest.raises(DataError, match="split is for Hugging Face data; clips"):
        open_images(str(tmp_path / "folders"), options(split="test"), are_clips=True)


@needs_datasets
def test_text_labels_are_read_as_strictly_as_those_of_a_csv(tmp_path, monkeypatch):
    import datasets

    text = datasets.Value("string")
    write_parquet(tmp_path / "a/0.parquet", monkeypatch, ["owl", "cat", "owl"], text)
    source = open_source(str(tmp_path / "a"))
    assert (source.class_names, list(source.labels)) == (["cat", "owl"], [1, 0, 1])
    for folder, labels in (("b", ["cat", "cat "]), ("c", ["cat", None]), ("d", ["cat", "nan"])):
        write_parquet(tmp_path / folder / "0.parquet", monkeypatch, labels, text)
        with pytest.raises(DataError, match=rf"labels .*{folder}, row 1: "):
            open_source(str(tmp_path / folder))


@needs_datasets
def test_a_label_beyond_the_named_classes_is_refused(tmp_path, monkeypatch):
    import datasets
    from pyarrow import parquet

    names = datasets.ClassLabel(names=["cat", "owl", "eel"])
    write_parquet(tmp_path / "a/0.parquet", monkeypatch, [0, 2], names)
    table = parquet.read_table(tmp_path / "a/0.parquet")
    fewer = table.schema.metadata[b"huggingface"].replace(b', "eel"', b"")
    assert b"eel" not in fewer
    parquet.write_table(table.replace_schema_metadata({b"huggingface": fewer}), tmp_path / "a/0.parquet")
    with pytest.raises(DataError, match="row 1: found label 2, but only 2 classes are named"):
        open_source(str(tmp_path / "a"))


@needs_datasets
def test_what_save_to_disk_wrote_is_read(tmp_path):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "owl"])}
    )
    rows = {"image": [{"bytes": one_pixel(i), "path": None} for i in range(2)], "label": [1, 0]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "both")
    source = open_source(str(tmp_path / "one"))
    assert isinstance(source, HuggingFaceSource)
    assert source.class_names == ["cat", "owl"]
    assert [source.read(i) for i in range(2)] == [(one_pixel(0), 1), (one_pixel(1), 0)]
    assert len(identity_of(source)["files_sha256"]) == 64
    assert [len(open_source(str(tmp_path / "both"), split=split)) for split in (None, "test")] == [2, 1]
    with pytest.raises(DataError, match="has no split val; found test, train"):
        open_source(str(tmp_path / "both"), split="val")
    with pytest.raises(DataError, match="is of the split None, not of test"):
        open_source(str(tmp_path / "one"), split="test")
    path = next((tmp_path / "one").glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be loaded"):
        open_source(str(tmp_path / "one"))


@needs_datasets
@pytest.mark.parametrize("kind", ["labels", "images"])
def test_a_small_parquet_does_not_become_a_large_one(tmp_path, kind):
    """Values that are repeated take no room in the file: a label for each row, or one image for all."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = 200_000 if kind == "labels" else 600
    blob = bytes(200_000) if kind == "images" else b""
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, dtype=np.int32)), pa.array([blob]))
    labels = pa.array(np.zeros(rows, dtype=np.int64))
    path = tmp_path / "0.parquet"
    parquet.write_table(pa.table({"image": column, "label": labels}), path, dictionary_pagesize_limit=1 << 22)
    assert path.stat().st_size < 20_000
    with pytest.raises(DataError, match=r"0\.parquet (has 200,000 rows in|becomes more than) .*not opened"):
        open_source(str(tmp_path))


@needs_datasets
def test_one_large_image_beside_many_repeated_small_ones_is_no_bomb(tmp_path):
    """The rows are counted where their number times the largest value would be too much."""
    import pyarrow as pa
    from pyarrow import parquet

    rng = np.random.default_rng(0)
    large, small = io.BytesIO(), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (150, 150, 3), dtype=np.uint8)).save(large, "PNG")
    Image.new("RGB", (1, 1)).save(small, "PNG")
    rows = 5_000
    chosen = pa.array(np.minimum(np.arange(rows), 1).astype(np.int32))
    column = pa.DictionaryArray.from_arrays(chosen, pa.array([large.getvalue(), small.getvalue()]))
    table = pa.table({"image": column, "label": np.arange(rows) % 2})
    parquet.write_table(table, tmp_path / "0.parquet", dictionary_pagesize_limit=1 << 22)
    with pytest.raises(DataError, match="choose by --image-column"):  # it was opened: bytes are no images yet
        open_source(str(tmp_path))


@needs_datasets
def test_a_usual_parquet_is_no_bomb(tmp_path, monkeypatch):
    """Many small images of one kind, with few labels: repetition alone is no reason."""
    import datasets

    rng = np.random.default_rng(0)
    rows = []
    for _ in range(300):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    names = datasets.Value("string")
    write_parquet(tmp_path / "a/0.parquet", monkeypatch, ["cat", "owl"] * 150, names, rows=rows)
    assert len(open_source(str(tmp_path / "a"))) == 300
