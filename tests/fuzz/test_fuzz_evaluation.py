"""Files of evaluations: statistics, arrays of images, stored results."""

import io
import json
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from mutate import NUMBERS, fuzz, mutate_bytes, mutate_json_text, mutate_safetensors

from iwin_dit.evaluation.archives import NpzImages
from iwin_dit.evaluation.metrics import Features, Moments
from iwin_dit.evaluation.rules import read_result, stored_command
from iwin_dit.evaluation.statistics import read_statistics, write_statistics

EXTRACTOR = SimpleNamespace(name="inception", sha256="abc", preprocessing="none")
TYPES = ["|u1", "<f8", "<f4", "|O", "<U9", "<M8[s]", "|V8", ">f8", "<c16", "|b1", "x", "", "<f99", "<i8,<i8"]


def npz(rng, arrays):
    """An archive of arrays whose headers may lie."""
    buffer = io.BytesIO()
    kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, array in arrays.items():
            part = io.BytesIO()
            np.save(part, array)
            data = part.getvalue()
            if rng.random() < 0.5:
                shape = [rng.choice((side, side + 1, *NUMBERS)) for side in array.shape][
                    : rng.choice((0, 1, 9, 9))
                ]
                header = f"{{'descr': {rng.choice(TYPES)!r}, 'fortran_order': {rng.random() < 0.2}, "
                header = (header + f"'shape': ({', '.join(map(str, shape))},), }}").encode()
                header = rng.choice((header, header, mutate_bytes(rng, header), b"(" * 3000)) + b"\n"
                data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data[128:]
            elif rng.random() < 0.3:
                data = mutate_bytes(rng, data)
            archive.writestr(f"{name}.npy", data)
    data = buffer.getvalue()
    return mutate_bytes(rng, data) if rng.random() < 0.5 else data


@pytest.mark.filterwarnings("ignore")
def test_evaluation(tmp_path):
    draw = np.random.default_rng(0)
    mean, sigma, images = draw.normal(size=3), np.eye(3), draw.integers(0, 256, (5, 4, 4, 3), np.uint8)
    features = Features(["fid"])
    features.moments["pool"] = Moments(7, mean, sigma * 6)
    write_statistics(tmp_path / "good.safetensors", features, EXTRACTOR, {"folder": "x"})
    ours = (tmp_path / "good.safetensors").read_bytes()
    result = {
        "figures": {"fid": 1.0},
        "generated": {"folder": "x", "sha256": "y"},
        "reference": None,
        "arguments": {
            "generated": "x",
            "metrics": ["fid"],
            "steps": 5,
            "compile": True,
            "interval": [0.0, 1.0],
        },
    }

    def read(rng):
        what = rng.randrange(4)
        path = tmp_path / ("a.npz", "a.safetensors", "b.npz", "a.json")[what]
        if what == 0:
            path.write_bytes(npz(rng, {"mu": mean, "sigma": sigma}))
        elif what == 1:
            path.write_bytes(mutate_safetensors(rng, ours))
        elif what == 2:
            path.write_bytes(npz(rng, {"arr_0": images}))
        else:
            path.write_bytes(mutate_json_text(rng, json.dumps(result).encode()))
        if what < 2:
            moments = read_statistics(path, ["fid"], EXTRACTOR).moments["pool"]
            assert np.isfinite(moments.mean).all()
            assert np.isfinite(moments.covariance).all()
        elif what == 2:
            found = NpzImages(path)
            shown = found.read(0, len(found))
            assert len(shown) == len(found)
        else:
            stored_command(read_result(path))
        return path.name

    ends = fuzz("evaluation", read, full=6_000, short=200)
    assert len(ends) == 5, ends
