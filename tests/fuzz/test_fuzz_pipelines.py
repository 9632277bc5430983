"""Folders of pipelines: their index, configs of the components, and headers of the weights."""

import pytest
from conftest import make_pipeline
from mutate import fuzz, mutate_json_text, mutate_safetensors

from iwin_dit.pipelines.base import export_pipeline
from iwin_dit.pipelines.trust import check_pipeline_folder

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.filterwarnings("ignore")
def test_pipelines(tmp_path):
    folder = tmp_path / "pipeline"
    export_pipeline(make_pipeline(), folder, {"step": 1})
    names = [
        "model_index.json",
        "transformer/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
    ]
    names += [f"{part}/{WEIGHTS}" for part in ("transformer", "vae")]
    good = {name: (folder / name).read_bytes() for name in names}

    def read(rng):
        name = rng.choice([*names[:4], *names])  # a file of JSON twice as often
        change = mutate_json_text if name.endswith("json") else mutate_safetensors
        (folder / name).write_bytes(change(rng, good[name]))
        try:
            check_pipeline_folder(folder)
        finally:
            (folder / name).write_bytes(good[name])
        return "accepted"

    ends = fuzz("pipelines", read, full=3_000, short=40)
    assert ends["refused"] > ends["accepted"] > 0
