"""Run directories: their config, what they were trained on, and their log."""

import os
import shutil

from mutate import fuzz, mutate_bytes, mutate_json_text, mutate_text

from iwin_dit.runtime import run as run_module
from iwin_dit.runtime.run import RunDirectory, read_config

CONFIG = {"output_dir": "x", "seed": 0, "data": {"path": "a", "labels": None}, "ema": {"decays": [0.9]}}
DATA = {"vae": "v", "images": 3, "classes": ["a", "b"], "mean": [0.0, 1.0]}
LOG = b"".join(b'{"step": %d, "loss": 1.5, "seconds": 0.25}\n' % step for step in (2, 4, 6, 8))
LINES = [
    *(
        b'{"loss": 1}',
        b'{"step": null}',
        b'{"step": "a"}',
        b'{"step": 4, "loss": NaN}',
        b'{"step": 1e400}',
        b"{}",
    ),
    *(
        b"\xff\xfe",
        b"[" * 100_000,
        bytes(4096),
        b'{"step": 2',
        b'{"step": true}',
        b'{"step": -1, "loss": []}',
        b"",
    ),
]


def test_run_directories(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(run_module, "say", lambda text: None)
    RunDirectory(tmp_path / "good", CONFIG, frozenset(), DATA).begin(0)
    (tmp_path / "good" / "log.jsonl").write_bytes(LOG)
    names = ("config.yaml", "data.json", "log.jsonl")
    good = {name: (tmp_path / "good" / name).read_bytes() for name in names}
    run = tmp_path / "run"

    def read(rng):
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        bad, name = dict(good), rng.choice(names)
        if name == "data.json":
            bad[name] = mutate_json_text(rng, good[name])
        elif name == "log.jsonl" and rng.random() < 0.5:
            lines = LOG.splitlines()
            lines[rng.randrange(4)] = rng.choice(LINES)
            bad[name] = b"\n".join(lines) + rng.choice((b"\n", b""))
        elif name == "config.yaml" and rng.random() < 0.5:
            pieces = ["[", "{", "!!int ", "&a ", "*a", "2001-99-99", "\n", ": ", "[1]: 2", "[" * 2000, "null"]
            bad[name] = mutate_text(rng, good[name].decode(), pieces).encode(errors="surrogatepass")
        else:
            bad[name] = mutate_bytes(rng, good[name])
        for file, content in bad.items():
            if rng.random() > 0.02:
                (run / file).write_bytes(content)
        if rng.random() < 0.02:
            (run / rng.choice(names)).unlink(missing_ok=True)
            (run / rng.choice(names)).with_suffix("").mkdir(exist_ok=True)
        found = RunDirectory(run, CONFIG, frozenset(), DATA, CONFIG)
        found.begin(5)
        steps = [record["step"] for record in found.read_log()]
        assert all(step <= 5 for step in steps)
        found.log({"step": 6})
        assert found.read_log()[-1] == {"step": 6}
        assert read_config(run) == CONFIG
        return "accepted"

    ends = fuzz("runs", read, full=6_000, short=200)
    assert min(ends["accepted"], ends["refused"]) > 20
