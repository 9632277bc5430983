"""One lookup of classes: the same id in Python, sample.py, evaluation, and after saving and loading."""

import json

import pytest
import torch
from conftest import make_model, make_vae

from iwin_dit import IwinDiTPipeline
from iwin_dit.build import loading
from iwin_dit.config.schema import SampleConfig
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.evaluation.drawing import drawer
from iwin_dit.runtime.errors import ConfigError

COUNT = 12
NAMES = {
    "ImageNet": [
        *("tench, Tinca tinca", "Cardigan, Cardigan Welsh corgi", "cardigan", "crane", "golden retriever"),
        *("crane", "polecat, fitch", "skunk, polecat", "missile", "projectile, missile", "Äpfel", "ox"),
    ],
    "cases": ["Cat", "cat", "dog", "Dog house", "id:2", *map("class {}".format, "fghijkl")],
    "folders": sorted(map(str, range(COUNT))),  # 0, 1, 10, 11, 2, ...
    "padded": [f"{number:03d}" for number in range(1, COUNT + 1)],
    "decimals": sorted(f"{number}.0" for number in range(COUNT)),  # 0.0, 1.0, 10.0, 11.0, 2.0, ...
    "none": [],
}
ROWS = [  # names, label, and its id or what the error says
    ("ImageNet", "cardigan", 2),  # an exact name wins over case and over synonyms
    ("ImageNet", "Cardigan", "id:1 (named 'Cardigan, Cardigan Welsh corgi') or id:2 (named 'cardigan')"),
    ("ImageNet", "Cardigan Welsh corgi", 1),
    ("ImageNet", "tinca TINCA", 0),
    ("ImageNet", "tench, Tinca tinca", 0),
    ("ImageNet", "crane", "id:3 (named 'crane') or id:5 (named 'crane'); say which by its id, such as id:3"),
    ("ImageNet", "polecat", "id:6 (named 'polecat, fitch') or id:7 (named 'skunk, polecat')"),
    ("ImageNet", "missile", 8),
    ("ImageNet", "  golden   retriever ", 4),
    ("ImageNet", "A\u0308PFEL", 10),  # decomposed, as file names of macOS are
    ("ImageNet", "2", 2),
    ("ImageNet", "id:2", 2),
    ("ImageNet", "12", "class 12 is out of range: this model has 12 classes, 0 to 11"),
    ("ImageNet", "id:12", "class 12 is out of range"),
    ("ImageNet", "007", "class '007' is the name of no class; for the number say id:7"),
    ("ImageNet", "polcat", "unknown class name 'polcat'; nearest names: polecat"),
    ("cases", "cat", 1),
    ("cases", "Cat", 0),
    ("cases", "CAT", "id:0 (named 'Cat') or id:1 (named 'cat')"),
    ("cases", "DOG", 2),
    ("cases", "name:dog  HOUSE", 3),
    ("cases", "name:id:2", 4),
    ("cases", "", "unknown class name ''"),
    ("folders", "0", 0),
    ("folders", "2", "id:2 (named '10') or id:4 (named '2'); say which by its id, such as id:2, or name:2"),
    ("folders", "id:2", 2),
    ("folders", "name:2", 4),
    ("folders", 2, 2),  # a whole number is an id
    ("padded", "1", "id:0 (named '001') or id:1 (named '002')"),
    ("padded", "001", 0),
    ("padded", " 002 ", 1),
    ("padded", "name:1", 0),
    ("padded", "12", 11),  # no id
    ("decimals", "2", "id:2 (named '10.0') or id:4 (named '2.0')"),
    ("decimals", "2.0", 4),
    ("decimals", "name:2", 4),
    ("none", "11", 11),
    ("none", "cat", "unknown class name 'cat'; the model has 12 classes"),
    ("none", True, "class True is neither a whole number nor a name"),
]


@pytest.fixture(scope="module")
def pipelines():
    model, vae = make_model(num_classes=COUNT, prediction_type="flow_prediction"), make_vae()
    made = {}
    for title, names in NAMES.items():
        scheduler = FlowMatching().scheduler()
        made[title] = IwinDiTPipeline(model, vae, scheduler, id2label=dict(enumerate(names)))
        made[title].set_progress_bar_config(disable=True)
    return made


def outcome(pipeline, label):
    """The one id; or the error's words."""
    try:
        (index,) = pipeline.get_label_ids([label])
    except ValueError as error:
        return str(error)
    assert pipeline.get_label_ids(label) == [index]
    return index


def check(found, expected):
    if isinstance(expected, str):
        assert isinstance(found, str), found
        assert expected in found
    else:
        assert found == expected


@pytest.mark.parametrize(("title", "label", "expected"), ROWS)
def test_a_label_in_python(pipelines, title, label, expected):
    check(outcome(pipelines[title], label), expected)


def test_labels_after_saving_and_loading(pipelines, tmp_path):
    for title, pipeline in pipelines.items():
        pipeline.save_pretrained(tmp_path / title)
        loaded = loading.load_pipeline(str(tmp_path / title))
        for _, label, expected in (row for row in ROWS if row[0] == title):
            check(outcome(loaded, label), expected)


def test_labels_of_the_command_line(pipelines, script_here, tmp_path, monkeypatch):
    """One command for all labels of a model that are taken, and one for each that is refused."""
    for title, pipeline in pipelines.items():
        monkeypatch.setattr(loading, "load_pipeline", lambda *arguments, p=pipeline, **options: p)
        monkeypatch.setattr(loading, "sampling_of", lambda source: SampleConfig())
        rows = [
            (label, expected) for name, label, expected in ROWS if name == title and isinstance(label, str)
        ]
        taken = [(label, expected) for label, expected in rows if isinstance(expected, int)]
        command = ("sample.py", "--num-images", 1, "--steps", 1, "--guidance-scale", 1)
        command = (*command, "--checkpoint", title)
        out = tmp_path / title
        code, output = script_here(*command, "--out", out, "--class", *[label for label, _ in taken])
        assert not code, output
        recipe, ids = json.loads((out / "recipe.json").read_text()), list(dict.fromkeys(e for _, e in taken))
        assert recipe["classes"] == ids
        names = dict(enumerate(NAMES[title]))
        assert recipe["class_names"] == [names.get(index) for index in ids]
        assert sorted(path.name for path in out.glob("*.png")) == sorted(f"{i:04d}-00000.png" for i in ids)
        for label, expected in rows:
            if isinstance(expected, str):
                code, output = script_here(*command, "--out", tmp_path / "x.png", "--class", label)
                assert code == 2
                assert expected in output


def test_labels_of_evaluation_draw_what_their_ids_draw(pipelines):
    def noise(count):
        return [torch.Generator().manual_seed(k) for k in range(count)]

    for title, pipeline in pipelines.items():
        rows = [(label, expected) for name, label, expected in ROWS if name == title]
        labels, ids = zip(*[row for row in rows if isinstance(row[1], int)], strict=True)
        draw = drawer(pipeline, dict(num_inference_steps=1, guidance_scale=1.0))
        assert torch.equal(draw(list(labels), noise(len(ids))), draw(list(ids), noise(len(ids))))
        for label, expected in rows:
            if isinstance(expected, str):
                with pytest.raises(ConfigError) as error:
                    draw([label], noise(1))
                assert expected in str(error.value)


def test_names_beyond_the_classes_draw_nothing(pipelines):
    """Their ids would be the null label's, or nobody's."""
    for index in (COUNT, COUNT + 1):
        pipeline = IwinDiTPipeline(**pipelines["none"].components | {"id2label": {index: "of another model"}})
        with pytest.raises(ValueError, match=f"class {index} is out of range"):
            pipeline.get_label_ids("of another model")
