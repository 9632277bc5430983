"""Tar shards in three formats: fields of headers, kinds of members, blocks that move, cuts, labels."""

import io
import tarfile

import pytest
from mutate import fuzz, mutate_bytes

from iwin_dit.data.sources import open_source

SIZES = [b"\xff" * 12, b"\x80" + bytes(3) + b"\xff" * 8, b"\x80" + b"\xff" * 11, b"\xff" * 11 + b"\0"]
SIZES += [b"77777777777\0", b"-0000000777\0", b"00000000000\0", b"            ", b"0000000000x\0", bytes(12)]
LABELS = [
    b"0",
    b"3",
    b" 2\n",
    b"",
    b"x",
    b"-1",
    b"1e3",
    b"9" * 30,
    b"\xff",
    b"1.0",
    "²".encode(),
    b"99999999",
]
JSON = [
    b'{"label": 1}',
    b'{"label": null}',
    b"[" * 100_000,
    b"{",
    b"[]",
    b'{"label": 1e300}',
    b'{"label": [1]}',
]


def make_tar(form):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for i in range(4):
            key = f"d{i}/" + "a" * (120 if i == 2 and form != tarfile.USTAR_FORMAT else 3)
            for ending, data in ((".jpg", b"J" * 700), (".cls", str(i).encode())):
                member = tarfile.TarInfo(key + ending)
                member.size = len(data)
                if form == tarfile.PAX_FORMAT:
                    member.pax_headers = {"comment": "é" * 10, "mtime": "1.5"}
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


TARS = [make_tar(form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]


def headers(data):
    """Where headers begin."""
    return [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]


def change(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, what = rng.choice(headers(data) or [0]), rng.randrange(12)
        if what < 3:
            data[at + 124 : at + 136] = rng.choice([*SIZES, rng.randbytes(12)])
        elif what < 5:
            data[at + 156 : at + 157] = rng.choice([b"%c" % c for c in b"0123456789xgLKSVDNM\0"])
        elif what < 7:
            data[at + rng.randrange(512)] = rng.randrange(256)
        elif what == 7:
            del data[at : at + 512 * rng.choice((1, 2))]
        elif what == 8:
            data[at:at] = data[: 512 * rng.choice((1, 2, 4))]
        elif what == 9:
            content = rng.choice(LABELS + JSON)
            size, ending = b"%011o\0" % len(content), b".json" if content in JSON else b".cls"
            block = bytearray(data[at : at + 512])
            block[:20], block[124:136], block[156:157] = (b"d0/aaa" + ending).ljust(20, b"\0"), size, b"0"
            data[at:at] = block + content.ljust(-(-len(content) // 512) * 512, b"\0")
        elif what == 10:
            del data[rng.randrange(len(data) + 1) :]
        else:
            data = bytearray(mutate_bytes(rng, bytes(data)))
        if len(data) < 1024:
            break
    return seal(data) if rng.random() < 0.85 else bytes(data)


def seal(data):
    """With checksums that fit again."""
    data = bytearray(data)
    for at in headers(data):
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
def test_tars(tmp_path):
    path = tmp_path / "f.tar"

    def read(rng):
        path.write_bytes(change(rng, rng.choice(TARS)))
        source = open_source(str(path))
        for i in range(len(source)):
            data, label = source.read(i)
            assert len(data) <= path.stat().st_size
            assert 0 <= label < len(source.class_names)
            assert source.name(i)
            assert source.stamp(i)[0]
        return "accepted"

    ends = fuzz("tars", read, full=12_000, short=400)
    assert min(ends["accepted"], ends["refused"]) > 20
