"""Which files of a folder are taken: endings, contents and links, for every reader of folders."""

import io
import os
import sys
from pathlib import Path

import pytest
from PIL import Image, features

from iwin_dit.data.folders import FORMATS, Folder, ignored_line, image_format, list_files
from iwin_dit.data.images import decode_image
from iwin_dit.data.sources import ClipFolderSource, FolderSource, open_source
from iwin_dit.data.video import VIDEOS, frame_names
from iwin_dit.runtime.errors import DataError

WRITTEN = [format for format in FORMATS if format != "AVIF" or features.check("avif")]


def encoded(format, value=9):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (value, value, value)).save(file, format)
    return file.getvalue()


def write(path, data=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_contents_are_told_as_pillow_tells_them():
    """For each format that Pillow writes, whether it is one of ours or not."""
    Image.init()
    image = Image.new("RGB", (16, 16))
    tried = 0
    for format in set(Image.SAVE) - {"IM"}:  # which is deprecated
        file = io.BytesIO()
        try:
            image.save(file, format)
            found = Image.open(io.BytesIO(file.getvalue())).format
        except Exception:  # formats that need more than an image, or that Pillow only writes
            continue
        tried += 1
        assert image_format(file.getvalue()[:64]) == (found if found in FORMATS else None), format
    assert tried > 15
    for other in (b"", b"BM", b"BMW drivers", b"RIFF\0\0\0\0AVI LIST", b"\0\0\0 ftypheic", b"\xff\xd8"):
        assert image_format(other) is None


@pytest.mark.parametrize("ending", ["", ".image", ".JPG", ".jfif", ".tif", ".gif", ".avif"])
def test_images_are_read_whatever_their_ending(tmp_path, ending):
    """An image whose ending says another format, or nothing, is still that image."""
    for format in WRITTEN:
        write(tmp_path / "a" / f"{format}{ending}", encoded(format, 200))
    source = FolderSource(tmp_path)
    assert len(source) == len(WRITTEN)
    for i in range(len(source)):
        image = decode_image(source.read(i)[0], source.name(i))
        assert abs(image.getpixel((8, 8))[0] - 200) < 4


def test_what_is_ignored_is_named(tmp_path):
    kept = [write(tmp_path / "a" / name, encoded("PNG")).name for name in ("1.png", "noending", "x.dat")]
    ignored = ["a/empty", "a/notes", "a/caption.txt", "a/.hidden/4.png", "a/._1.png", "beside.png"]
    for name in ignored:
        write(tmp_path / name, b"" if name == "a/empty" else b"a note")
    os.mkfifo(tmp_path / "a" / "pipe.png")  # to open it would wait for ever
    source = FolderSource(tmp_path)
    assert [os.path.basename(source.name(i)) for i in range(len(source))] == kept
    expected = {"a/.hidden" if name == "a/.hidden/4.png" else name for name in ignored} | {"a/pipe.png"}
    assert set(source.ignored) == expected
    line = ignored_line(str(tmp_path), "images", source.ignored)
    assert line.startswith(f"ignored 7 in {tmp_path} that are no images: ")
    assert line.endswith("and 2 more")
    assert ignored_line("x", "images", []) is None


def test_only_unknown_endings_cost_a_look(tmp_path, monkeypatch):
    for name in ("1.png", "2.JPEG", "3.webp", "4.txt", "5.cls", "6.json", "7", "8.unknown"):
        write(tmp_path / "a" / name, encoded("PNG"))
    opened = []
    monkeypatch.setattr("iwin_dit.data.folders.read_file", lambda path, most: opened.append(path) or b"")
    stats = []
    monkeypatch.setattr(os, "stat", lambda *a, **k: stats.append(a) or os.lstat(*a))
    with Folder(tmp_path) as folder:
        assert folder.files_below("a") == ["a/1.png", "a/2.JPEG", "a/3.webp"]
    monkeypatch.undo()
    assert [os.path.basename(path) for path in opened] == ["7", "8.unknown"] or len(opened) == 2
    assert len(stats) < 5, "none for each file"


# Links


def chain(tmp_path):
    """Links of all kinds that stay readable: to files and folders, within and out of the folder."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    write(root / "a" / "1.png", encoded("PNG"))
    write(outside / "deep" / "3.png", encoded("PNG"))
    write(outside / "2.png", encoded("PNG"))
    (root / "a" / "file.png").symlink_to(outside / "2.png")
    (root / "b").symlink_to(outside)
    return root


def test_links_out_of_the_folder_are_followed_where_that_is_allowed(tmp_path):
    root = chain(tmp_path)
    for read in (FolderSource, list_files, lambda path: open_source(str(path))):
        with pytest.raises(
            DataError, match=r"is a link to .*outside.*--follow-links .*data\.follow_links true"
        ):
            read(root)
    names = ["a/1.png", "a/file.png", "b/2.png", "b/deep/3.png"]
    assert list_files(root, follow_links=True).files == names
    source = open_source(str(root), follow_links=True)
    assert [os.path.relpath(source.name(i), root) for i in range(len(source))] == names
    assert source.class_names == ["a", "b"]
    labels = tmp_path / "labels.csv"
    labels.write_text("file,label\na/1.png,0\na/file.png,1\nb/deep/3.png,1\n")
    with pytest.raises(DataError, match=r"line 3: .*file\.png is a link .*--follow-links"):
        open_source(str(root), str(labels))
    assert len(open_source(str(root), str(labels), follow_links=True)) == 3
    labels.write_text("file,label\na/1.png,0\nb/2.png,1\n")
    with pytest.raises(DataError, match=r"line 3: .*b is a link to .*outside.*--follow-links"):
        open_source(str(root), str(labels))
    (root / "b" / "deep" / "back").symlink_to(root / "b")
    with pytest.raises(DataError, match=r"leads back to .* a loop"):
        open_source(str(root), follow_links=True)


def test_links_of_clips_follow_the_same_rule(tmp_path):
    for frame in range(3):
        write(tmp_path / "frames" / f"{frame}.png", encoded("PNG"))
    write(tmp_path / "frames" / "notes.txt")
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / "clip").symlink_to(tmp_path / "frames")
    with pytest.raises(DataError, match="--follow-links"):
        ClipFolderSource(tmp_path / "root")
    source = ClipFolderSource(tmp_path / "root", follow_links=True)
    assert [source.name(i) for i in range(len(source))] == [str(tmp_path / "root" / "a" / "clip")]
    assert source.ignored == ["a/clip/notes.txt"]
    assert frame_names(source.path(0)) == ["0.png", "1.png", "2.png"]


def test_a_snapshot_of_the_hub_cache_is_read_as_it_is(tmp_path):
    """Its files are links to the folder of blobs, as huggingface_hub lays them out; other links are not."""
    cache = tmp_path / "datasets--someone--something"
    for revision, folder in (("r1", "images/cat"), ("r1", "images/dog"), ("r2", "images/cat")):
        blob = write(cache / "blobs" / f"{revision}{folder[-3:]}", encoded("PNG"))
        link = cache / "snapshots" / revision / folder / "1.png"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    snapshot = cache / "snapshots" / "r1"
    assert list_files(snapshot).files == ["images/cat/1.png", "images/dog/1.png"]
    assert FolderSource(snapshot / "images").class_names == ["cat", "dog"]
    (snapshot / "images" / "cat" / "2.png").symlink_to(write(tmp_path / "secret.png", encoded("PNG")))
    with pytest.raises(DataError, match=r"is a link to .*secret"):
        list_files(snapshot)


@pytest.mark.parametrize("target", ["nowhere", "self.png"])
def test_links_that_lead_nowhere_are_named(tmp_path, target):
    write(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "self.png").symlink_to(target)
    for follow_links in (False, True):
        with pytest.raises(DataError, match=r"self\.png is a link that loops or leads nowhere"):
            list_files(tmp_path, follow_links=follow_links)


def test_videos_are_taken_by_their_ending_alone(tmp_path):
    for name in ("a/1.mp4", "a/2.GIF", "a/3", "a/4.png", "b/5.webm"):
        write(tmp_path / name, encoded("GIF"))
    assert list_files(tmp_path, VIDEOS).files == ["a/1.mp4", "a/2.GIF", "b/5.webm"]


def test_listing_needs_no_torch():
    """A script that lists a folder answers before torch would be loaded."""
    import subprocess

    code = "import iwin_dit.data.folders, sys; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_a_bitmap_is_known_by_the_size_of_its_second_header():
    """Of OS/2's two and its short one, of Windows 3, 4 and 5, and of Adobe's with masks: as Pillow reads."""
    start = b"BM" + bytes(12)
    sizes = [size for size in range(256) if image_format(start + size.to_bytes(4, "little") + bytes(46))]
    assert sizes == [12, 16, 40, 52, 56, 64, 108, 124]
    assert image_format(b"BM is a text that begins with these two letters".ljust(64)) is None
