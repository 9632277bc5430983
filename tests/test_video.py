"""Clips: reading and writing video files and folders of frames, and class folders of them."""

import io
import os
import pickle
import resource
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from iwin_dit.data import video_files
from iwin_dit.data.sources import ClipFolderSource
from iwin_dit.data.video import (
    EXTENSIONS,
    BadImage,
    ClipSpec,
    choose_clip,
    count_frames,
    read_frames,
    spread_clips,
    write_gif,
    write_mp4,
)
from iwin_dit.runtime import files, limits
from iwin_dit.runtime.errors import DataError

BACKGROUND = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8).repeat(6, 0).repeat(6, 1)
X264 = {"g": "12", "bf": "2", "threads": "1"}
OPEN_GOP = {"g": "12", "x264-params": "open-gop=1:bframes=3:scenecut=0:threads=1"}
REFRESH = {"g": "30", "bf": "0", "x264-params": "intra-refresh=1:threads=1"}
VP9 = {"g": "12", "cpu-used": "8", "deadline": "realtime"}
KINDS = {  # of files, each with several key frames, except a GIF
    "h264.mp4": ("libx264", X264),
    "h264.mov": ("libx264", {**X264, "movflags": "+frag_keyframe+empty_moov"}),
    "open gop.mkv": ("libx264", OPEN_GOP),
    "refresh.m4v": ("libx264", REFRESH),
    "vp9.webm": ("libvpx-vp9", VP9),
    "gif.gif": ("gif", {}),
    "mpeg4.avi": ("mpeg4", {"g": "12"}),
    "mpeg4 b.avi": ("mpeg4", {"g": "12", "bf": "2"}),  # no times, as H.264's below
    "h264.avi": ("libx264", X264),
}


def moving(number=40, size=48):
    """Frames that all differ."""
    return [Image.fromarray(BACKGROUND[k : k + size, 2 * k : 2 * k + size].copy()) for k in range(number)]


def greys(number, size=16):
    """Frame k has level 10 k."""
    return [Image.new("RGB", (size, size), (10 * k,) * 3) for k in range(number)]


def numbers(frames):
    """Which of :func:`greys` they are."""
    return [round(np.asarray(frame).mean() / 10) for frame in frames]


def make(path, frames, codec="libx264", options=X264):
    """A video by PyAV, with nothing of ours."""
    pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
    with av.open(str(path), "w", container_options=dict(options)) as container:
        stream = container.add_stream(codec, rate=10, options=dict(options))
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, pix_fmt
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame).reformat(format=pix_fmt)))
        container.mux(stream.encode())
    return str(path)


def mux(path, codec, packets, size=(16, 16)):
    """A video of packets that are encoded already."""
    with av.open(str(path), "w") as container:
        stream = container.add_mux_stream(codec, rate=10, width=size[0], height=size[1])
        for k, data in enumerate(packets):
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 10), k == 0
            packet.pts = packet.dts = k
            container.mux(packet)
    return str(path)


def decoded(path):
    """The witness: the whole file decoded from its start."""
    with av.open(path) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def places_of_packets(path):
    with av.open(path) as container:
        return [(p.pos, p.size) for p in container.demux(video=0) if p.size]


def damage(path, places):
    data = bytearray(Path(path).read_bytes())
    for start, size in places:
        data[start : start + size] = bytes(size)
    Path(path).write_bytes(data)


def folder_of(path, frames):
    path.mkdir(parents=True)
    for k, frame in enumerate(frames):
        frame.save(path / f"{k:03}.png")
    return str(path)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_equal(frames, expected):
    assert len(frames) == len(expected)
    for frame, other in zip(frames, expected, strict=True):
        assert frame.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(frame), np.asarray(other))


# Reading


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_of_decoding_everything(tmp_path, name):
    path = make(tmp_path / name, moving(), *KINDS[name])
    whole = decoded(path)
    assert count_frames(path) == len(whole) == 40
    for i in range(40):
        assert_equal(read_frames(path, [i]), [whole[i]])
    assert_equal(read_frames(path, range(1, 40, 7)), whole[1::7])


def test_decoding_begins_at_the_key_frame_and_ends_at_the_last_that_is_wanted(tmp_path, capfd):
    path = make(tmp_path / "a.mp4", moving())
    whole, places = decoded(path), places_of_packets(path)
    with av.open(path) as container:
        keys = [k for k, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    assert len(keys) == 4
    damage(path, places[: keys[2]] + places[keys[3] :])
    assert_equal(read_frames(path, [keys[2], keys[2] + 3]), [whole[keys[2]], whole[keys[2] + 3]])
    with pytest.raises(
        BadImage, match=r"a\.mp4 is damaged \(Invalid data found.*; restore, convert or remove it"
    ):
        read_frames(path, [3])
    assert capfd.readouterr() == ("", "")  # FFmpeg keeps quiet


def test_key_frames_that_are_none_cost_time_but_no_frame(tmp_path, monkeypatch):
    starts = []
    decode = video_files.VideoFile._decode
    monkeypatch.setattr(
        video_files.VideoFile, "_decode", lambda self, *a: starts.append(a[1]) or decode(self, *a)
    )
    path = make(tmp_path / "a.m4v", moving(), "libx264", REFRESH)
    assert_equal(read_frames(path, [30, 31]), decoded(path)[30:32])
    assert len(starts) == 2
    assert starts[0] > 0
    assert starts[1] is None


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.mkv", "a.avi"])
def test_the_order_is_that_of_showing(tmp_path, name):
    codec = {"a.gif": "gif", "a.avi": "mpeg4"}.get(name, "libx264")
    if codec == "gif":
        write_gif(greys(20), tmp_path / name, 10)
    else:
        make(tmp_path / name, greys(20), codec, {"g": "12", "bf": "2", "qmax": "2"})
    assert numbers(read_frames(str(tmp_path / name), range(20))) == list(range(20))
    assert numbers(read_frames(str(tmp_path / name), [2, 13])) == [2, 13]
    assert read_frames(str(tmp_path / name), []) == []


def test_frames_that_an_edit_list_cuts_are_not_there(tmp_path):
    path = make(tmp_path / "a.mp4", greys(20))
    with av.open(path) as container, av.open(str(tmp_path / "cut.mp4"), "w") as cut:
        stream = container.streams.video[0]
        cut.add_stream_from_template(stream)
        for packet in container.demux(stream):
            if packet.size:
                packet.pts -= 3 * 1024
                packet.dts -= 3 * 1024
                cut.mux(packet)
    path = str(tmp_path / "cut.mp4")
    assert numbers(decoded(path)) == list(range(3, 20))
    assert numbers(read_frames(path, range(count_frames(path)))) == list(range(3, 20))


def test_hidden_frames_of_vp8_are_not_counted(tmp_path):
    path = make(tmp_path / "a.webm", greys(10), "libvpx", {"g": "99"})
    with av.open(path) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    packets[4] = bytes([packets[4][0] & ~0x10]) + packets[4][1:]  # the bit show_frame, RFC 6386, section 9.1
    path = mux(tmp_path / "b.webm", "vp8", packets)
    assert len(decoded(path)) == count_frames(path) == 9
    assert numbers(read_frames(path, range(9))) == [0, 1, 2, 3, 5, 6, 7, 8, 9]


TURNS = {(0, 1, -1, 0): 270, (-1, 0, 0, -1): 180, (0, -1, 1, 0): 90}


@pytest.mark.parametrize(("matrix", "turn"), TURNS.items())
def test_a_phones_video_is_upright(tmp_path, matrix, turn):
    path = Path(make(tmp_path / "a.mp4", [frame.crop((0, 0, 48, 32)) for frame in moving(3)]))
    stored = decoded(str(path))
    assert stored[0].size == (48, 32)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44  # the matrix (a b u c d v x y w), ISO/IEC 14496-12, section 8.3.2
    a, b, c, d = (round(number * 65536).to_bytes(4, "big", signed=True) for number in matrix)
    data[at : at + 20] = a + b + bytes(4) + c + d
    path.write_bytes(data)
    # (x, y) of what is stored is shown at (a x + c y, b x + d y): PIL turns against the clock
    assert_equal(read_frames(str(path), [0, 2]), [stored[i].rotate(turn, expand=True) for i in (0, 2)])


@pytest.mark.parametrize("name", ["a b.mp4", "видео 影片.gif", "100%d.webm", "a:b.mkv", "http:x.avi"])
def test_any_name_will_do(tmp_path, name):
    codec = {"mp4": "libx264", "mkv": "libx264", "gif": "gif", "webm": "libvpx", "avi": "mpeg4"}
    make(tmp_path / f"x{name[-5:]}", greys(3), codec[name.rpartition(".")[2]], {})
    path = (tmp_path / f"x{name[-5:]}").rename(tmp_path / name)
    assert count_frames(str(path)) == 3


def test_names_need_not_be_text(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.mp4"
    os.rename(make(tmp_path / "a.mp4", greys(3)), path)
    assert numbers(read_frames(os.fsdecode(path), [1, 2])) == [1, 2]
    with pytest.raises(BadImage, match=r"/\?\.mp4 has 3 frames"):
        choose_clip(os.fsdecode(path), ClipSpec(4), rng())


def test_titles_need_not_be_text(tmp_path):
    path = Path(make(tmp_path / "a.mkv", greys(3)))
    encoder = b"Lavf"  # a text that FFmpeg leaves in the file
    data = path.read_bytes()
    assert encoder in data
    path.write_bytes(data.replace(encoder, b"Lav\xff"))
    with pytest.raises(UnicodeDecodeError):
        av.open(str(path))
    assert count_frames(str(path)) == 3


def test_a_folder_of_frames_is_read_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # PyAV is not needed
    path = folder_of(tmp_path / "clip", greys(6))
    Path(path, ".hidden.png").touch()
    Path(path, "notes.txt").touch()
    assert count_frames(path) == 6
    assert numbers(read_frames(path, [1, 4])) == [1, 4]
    assert [numbers(clip) for clip in spread_clips(path, ClipSpec(3, 2), 1)] == [[0, 2, 4]]


# Choosing clips


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_every_place_is_drawn_and_no_other(tmp_path, kind):
    path = folder_of(tmp_path / "a", greys(9)) if kind == "folder" else make(tmp_path / "a.mp4", greys(9))
    spec = ClipSpec(frames=3, stride=2)
    assert spec.span == 5
    generator = rng()
    clips = {tuple(numbers(choose_clip(path, spec, generator))) for _ in range(60)}
    assert clips == {(k, k + 2, k + 4) for k in range(5)}


def test_a_place_is_a_function_of_the_generator(tmp_path):
    path = folder_of(tmp_path / "a", greys(20))
    drawn = [[numbers(choose_clip(path, ClipSpec(2), g)) for _ in range(8)] for g in (rng(1), rng(1), rng(2))]
    assert drawn[0] == drawn[1] != drawn[2]
    first = int(torch.randint(19, (), generator=rng(1)))
    assert drawn[0][0] == [first, first + 1]


def test_clips_are_spread_from_the_first_place_to_the_last(tmp_path):
    path = make(tmp_path / "a.mp4", greys(11))
    spec = ClipSpec(3)
    assert [numbers(clip) for clip in spread_clips(path, spec, 3)] == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
    assert [numbers(clip) for clip in spread_clips(path, spec, 1)] == [[4, 5, 6]]
    assert [numbers(clip) for clip in spread_clips(path, ClipSpec(11), 2)] == [list(range(11))] * 2


def test_a_video_that_just_suffices_has_one_place(tmp_path):
    path = folder_of(tmp_path / "a", greys(15))
    assert numbers(choose_clip(path, ClipSpec(8, 2), rng())) == list(range(0, 15, 2))
    Path(path, "014.png").unlink()
    with pytest.raises(
        BadImage, match=r"/a has 14 frames, a clip of 8 frames with stride 2 takes 15; ask for fewer frames"
    ):
        choose_clip(path, ClipSpec(8, 2), rng())
    with pytest.raises(BadImage, match="/a has 14 frames; frame 14 is not there"):
        read_frames(path, [0, 14])


# What is broken


def test_without_pyav_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(DataError, match=r"a\.mp4 needs a package: pip install 'iwin-dit\[video\]'"):
        count_frames(str(tmp_path / "a.mp4"))
    with pytest.raises(DataError, match=r"pip install 'iwin-dit\[video\]'"):
        write_mp4(greys(2), tmp_path / "b.mp4", 8)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_what_is_no_video_is_refused(tmp_path, extension):
    path = tmp_path / f"a{extension}"
    path.write_bytes(b"")
    with pytest.raises(BadImage, match=rf"a\{extension} is empty, not a video; restore or remove it"):
        count_frames(str(path))
    path.write_text("just words, and many of them\n" * 100)
    with pytest.raises(
        BadImage, match=rf"a\{extension} starts with b'just wor' and is no whole \{extension} video"
    ):
        count_frames(str(path))


def test_what_is_not_there_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.mp4 cannot be read: No such file"):
        count_frames(str(tmp_path / "a.mp4"))
    with pytest.raises(DataError, match=r"a\.txt is neither a folder of frames nor a file with \.mp4"):
        count_frames(str(tmp_path / "a.txt"))
    with pytest.raises(BadImage, match="holds no images; expected the frames of a clip"):
        count_frames(str(tmp_path))
    other = make(tmp_path / "a.webm", greys(3), "libvpx", {})
    with pytest.raises(BadImage, match=r"is no whole \.mp4 video .*convert"):
        count_frames(str(Path(other).rename(tmp_path / "b.mp4")))


PLAYLISTS = {
    "concat": "ffconcat version 1.0\nfile secret.mp4\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\nsecret.mp4\n#EXT-X-ENDLIST\n",
}


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_playlist_opens_nothing(tmp_path, kind, extension):
    make(tmp_path / "secret.mp4", greys(3))
    path = tmp_path / f"x{extension}"
    path.write_text(PLAYLISTS[kind])
    with pytest.raises(BadImage, match="is no whole"):
        count_frames(str(path))
    if kind == "concat":  # which FFmpeg, left to guess, follows
        assert len(decoded(str(path))) == 3


def test_nothing_else_can_be_opened_even_in_a_format_that_points_elsewhere(tmp_path, monkeypatch):
    make(tmp_path / "secret.mp4", greys(3))
    path = tmp_path / "x.mp4"
    path.write_text(PLAYLISTS["concat"])
    monkeypatch.setitem(video_files.FORMATS, ".mp4", "concat")
    with pytest.raises(BadImage):
        read_frames(str(path), [0])


def test_sound_alone_is_no_clip(tmp_path):
    path = str(tmp_path / "a.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(BadImage, match=r"a\.mp4 has 1 streams, but none of video; restore or remove it"):
        count_frames(path)


CUT = {
    "end.mp4": ("libx264", X264),
    "start.mp4": ("libx264", {**X264, "movflags": "+faststart"}),
    "a.webm": ("libvpx-vp9", VP9),
    "a.mkv": ("libx264", X264),
    "a.gif": ("gif", {}),
    "a.avi": ("mpeg4", {}),
}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_a_file_that_is_cut_off_is_refused(tmp_path, name, part):
    path = Path(make(tmp_path / name, moving(20), *CUT[name]))
    assert count_frames(str(path)) == 20
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(BadImage, match=f"{name} (is cut off|starts with|has 1 streams, but none)"):
        count_frames(str(path))


def test_a_recording_that_does_not_know_its_end_is_whole(tmp_path):
    path = make(tmp_path / "a.mkv", greys(10), "libx264", {**X264, "live": "1"})
    assert b"\x18\x53\x80\x67\x01" + 7 * b"\xff" in Path(path).read_bytes()
    assert numbers(read_frames(path, [3, 9])) == [3, 9]


def huge_gif(folder):
    """Three gigabytes to whoever decodes it."""
    size = (16_000).to_bytes(2, "little") + (12_000).to_bytes(2, "little")
    image = b"," + bytes(4) + b"\1\0\1\0\0" + b"\2\2D\1\0"  # one pixel of them
    (folder / "a.gif").write_bytes(b"GIF89a" + size + b"\x80\0\0" + bytes(6) + image + b";")
    return str(folder / "a.gif")


def huge_webm(folder):
    path = make(folder / "small.webm", greys(2), "libvpx", {})
    with av.open(path) as container:
        data = bytes(next(container.demux(video=0)))
    size = (16_000).to_bytes(2, "little") + (12_000).to_bytes(2, "little")  # RFC 6386, section 9.1
    return mux(folder / "a.webm", "vp8", [data[:6] + size + data[10:]] * 2, (16_000, 12_000))


@pytest.mark.parametrize(
    ("make_huge", "found"), [(huge_gif, "no pixels, or more"), (huge_webm, "16000 x 12000 = 192000000, more")]
)
def test_huge_frames_are_refused_before_they_are_decoded(tmp_path, make_huge, found):
    path = make_huge(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImage, match=rf"/a\.\w+ has frames of {found} than the 36000000 allowed; shrink"):
        read_frames(path, [0])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def jpeg(frame):
    file = io.BytesIO()
    frame.save(file, "JPEG", subsampling="4:2:0")
    return file.getvalue()


def test_frames_that_outgrow_the_header_are_not_decoded(tmp_path, monkeypatch):
    path = mux(tmp_path / "a.avi", "mjpeg", [jpeg(frame) for frame in greys(2, 16) + greys(2, 64)])
    assert [frame.size for frame in read_frames(path, [2, 3])] == [(64, 64), (64, 64)]
    monkeypatch.setattr(limits, "FRAME_PIXELS", 3000)
    assert [frame.size for frame in read_frames(path, [0, 1])] == [(16, 16), (16, 16)]
    with pytest.raises(BadImage, match=r"a\.avi"):
        read_frames(path, [2, 3])


def test_frames_of_a_clip_have_one_size(tmp_path):
    frames = greys(3, 16) + greys(3, 32)
    path = mux(tmp_path / "a.avi", "mjpeg", [jpeg(frame) for frame in frames])
    with pytest.raises(
        BadImage, match=r"a\.avi, frame 3 is 32 x 32 pixels large, .*a\.avi, frame 1 16 x 16; .*one size"
    ):
        read_frames(path, [1, 2, 3])
    path = folder_of(tmp_path / "a", frames)
    with pytest.raises(BadImage, match=r"a/003\.png is 32 x 32 pixels large, .*a/002\.png 16 x 16"):
        read_frames(path, [2, 3])
    assert numbers(read_frames(path, [3, 4])) == [0, 1]


def test_a_broken_frame_of_a_folder_is_named(tmp_path):
    path = folder_of(tmp_path / "a", greys(4))
    Path(path, "002.png").write_bytes(b"x")
    assert numbers(read_frames(path, [0, 1, 3])) == [0, 1, 3]
    with pytest.raises(DataError, match=r"a/002\.png starts with b'x'"):
        read_frames(path, [1, 2])


# Writing


@pytest.mark.parametrize("codec", ["h264", "mpeg4"])
def test_an_mp4_keeps_the_frames(tmp_path, monkeypatch, codec):
    if codec == "mpeg4":
        monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    path = tmp_path / "a.mp4"
    write_mp4([frame.resize((31, 17)) for frame in greys(9)], path, 8)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == (codec, "yuv420p")
        assert stream.average_rate == 8
    frames = read_frames(str(path), range(count_frames(str(path))))
    assert numbers(frames) == list(range(9))
    assert frames[0].size == (32, 18)


def test_an_mp4_grows_by_its_last_row_and_column(tmp_path):
    frame = np.full((15, 15, 3), 40, np.uint8)
    frame[-3:], frame[:, -3:] = 200, 200
    write_mp4([Image.fromarray(frame)] * 2, tmp_path / "a.mp4", 29.97)
    grown = np.asarray(read_frames(str(tmp_path / "a.mp4"), [1])[0]).astype(int)
    assert grown.shape == (16, 16, 3)
    assert abs(grown[-1] - 200).max() < 12
    assert abs(grown[:, -1] - 200).max() < 12


def test_a_gif_of_greys_is_exact(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).permutation(256).astype(np.uint8).reshape(16, 16)  # every level once
    frames = [Image.fromarray(noise).convert("RGB"), *greys(6), greys(6)[5]]
    write_gif(frames, tmp_path / "a.gif", 8)
    assert_equal(read_frames(str(tmp_path / "a.gif"), range(count_frames(str(tmp_path / "a.gif")))), frames)
    monkeypatch.setitem(sys.modules, "av", None)
    write_gif(frames, tmp_path / "a.gif", 8)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.info["loop"]) == (8, 0)
        durations = []
        for k, frame in enumerate(frames):
            gif.seek(k)
            durations.append(gif.info["duration"])
            np.testing.assert_array_equal(np.asarray(gif.convert("RGB")), np.asarray(frame))
    assert sum(durations) == 1000  # 8 frames at 8 a second, each in whole hundredths
    assert set(durations) == {120, 130}


def test_a_gif_of_colours_is_close(tmp_path):
    frames = moving(4)
    write_gif(frames, tmp_path / "a.gif", 100)
    for found, frame in zip(read_frames(str(tmp_path / "a.gif"), range(4)), frames, strict=True):
        assert np.abs(np.asarray(found).astype(int) - np.asarray(frame)).mean() < 8
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["duration"] == 20  # viewers show shorter ones for longer


@pytest.mark.parametrize(("write", "name"), [(write_mp4, "a.mp4"), (write_gif, "a.gif")])
def test_writing_replaces_in_one_step(tmp_path, monkeypatch, write, name):
    write(greys(3), tmp_path / name, 8)
    before = (tmp_path / name).read_bytes()

    def full(path, data):
        path.write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", full)
        with pytest.raises(OSError, match="No space"):
            write(greys(5), tmp_path / name, 8)
    assert (tmp_path / name).read_bytes() == before
    write(greys(5), tmp_path / name, 8)
    assert count_frames(str(tmp_path / name)) == 5
    assert os.listdir(tmp_path) == [name]


# Class folders


def classes(root):
    """Two classes: b with two files and a folder deep down, a with one folder."""
    folder_of(root / "a" / "clip", greys(4))
    (root / "b" / "deep").mkdir(parents=True)
    make(root / "b" / "2.mp4", greys(5))
    write_gif(greys(6), root / "b" / "1.GIF", 8)
    folder_of(root / "b" / "deep" / "clip", greys(7))
    (root / "b" / ".hidden.mp4").touch()
    (root / "b" / "readme.txt").touch()
    (root / ".cache").mkdir()
    (root / "labels.csv").touch()


def test_class_folders_are_read_in_order(tmp_path):
    classes(tmp_path)
    source = pickle.loads(pickle.dumps(ClipFolderSource(tmp_path)))
    assert source.class_names == ["a", "b"]
    assert len(source) == 4
    paths = [str(tmp_path / name) for name in ("a/clip", "b/1.GIF", "b/2.mp4", "b/deep/clip")]
    assert [source.path(i) for i in range(4)] == [source.name(i) for i in range(4)] == paths
    assert [source.labels[i] for i in range(4)] == [0, 1, 1, 1]
    assert [count_frames(source.path(i)) for i in range(4)] == [4, 6, 5, 7]


def test_a_clip_that_cannot_be_read_is_named(tmp_path):
    classes(tmp_path)
    (tmp_path / "b" / "2.mp4").write_text("x")
    source = ClipFolderSource(tmp_path)
    for i in range(len(source)):
        with pytest.raises(BadImage, match=source.name(i)):
            choose_clip(source.path(i), ClipSpec(8), rng())


def test_class_folders_without_clips_are_refused(tmp_path):
    with pytest.raises(DataError, match="missing is not a folder"):
        ClipFolderSource(tmp_path / "missing")
    with pytest.raises(DataError, match=r"no clips in any class folder of .*CLASS/CLIP with \.mp4 "):
        ClipFolderSource(tmp_path)
    classes(tmp_path)
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match=r"1 of 3 class folders of .* have no clips: c; fill or remove them"):
        ClipFolderSource(tmp_path)


def test_images_without_a_folder_for_their_clip_are_refused(tmp_path):
    classes(tmp_path)
    greys(1)[0].save(tmp_path / "b" / "deep" / "thumbnail.png")
    assert ClipFolderSource(tmp_path).path(3) == str(tmp_path / "b" / "deep")
    make(tmp_path / "b" / "deep" / "a.mp4", greys(3))
    with pytest.raises(DataError, match="/b/deep has images beside videos; expected a folder of its own"):
        ClipFolderSource(tmp_path)
    folder_of(tmp_path / "images" / "cat", greys(3))
    with pytest.raises(DataError, match=r"/cat has images directly in a class folder; .*CLASS/CLIP/FRAME"):
        ClipFolderSource(tmp_path / "images")


def test_frames_out_of_order_are_refused(tmp_path):
    path = tmp_path / "a" / "clip"
    folder_of(path, greys(3))
    (path / "000.png").rename(path / "frame10.png")
    (path / "001.png").rename(path / "frame2.png")
    for read in (lambda: ClipFolderSource(tmp_path), lambda: count_frames(str(path))):
        with pytest.raises(DataError, match=r"frame10\.png comes before frame2\.png .* with leading zeros"):
            read()


def test_links_are_followed_inside_only(tmp_path):
    classes(tmp_path / "root")
    os.symlink("../a/clip", tmp_path / "root" / "b" / "again")
    assert len(ClipFolderSource(tmp_path / "root")) == 5
    make(tmp_path / "out.mp4", greys(3))
    os.symlink(tmp_path / "out.mp4", tmp_path / "root" / "b" / "out.mp4")
    with pytest.raises(DataError, match=r"b/out\.mp4 is a link to .*out\.mp4, out of .*root; copy"):
        ClipFolderSource(tmp_path / "root")
