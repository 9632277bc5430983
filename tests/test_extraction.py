"""extract_latents.py: the bytes of the shards, faults, and training on what it made."""

import hashlib
import json
import os
import random
import resource
import shutil
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import execute, make_vae, run, start
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from iwin_dit.data import extraction
from iwin_dit.data.codec import encode, encode_posterior, load_vae, weights_sha256
from iwin_dit.data.extraction import Settings, extract
from iwin_dit.data.latents import LatentDataset
from iwin_dit.data.sources import ClipFolderSource, FolderSource, open_source
from iwin_dit.runtime.errors import DataError, DiskError
from iwin_dit.runtime.processes import use_all_cores

SIZE, COUNT, SHARD = 16, 100, 12
TWO_PROCESSES = (
    *(str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)


def draw_images(root, count=COUNT, side=20):
    """Class folders of noise; names with spaces and signs of other scripts."""
    rng = np.random.default_rng(0)
    for i in range(count):
        folder = root / ("golden retriever", "ünï 漢", "umbrella")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (side, side + i % 5, 3), dtype=np.uint8)).save(
            folder / f"{i:03d} é.png"
        )


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    root = tmp_path_factory.mktemp("work shop")
    draw_images(root / "images")
    make_vae().save_pretrained(root / "vae")
    return root


def arguments(workshop, out, *more):
    return (
        *("extract_latents.py", "--images", workshop / "images", "--vae", workshop / "vae", "--out", out),
        *("--size", SIZE, "--batch-images", 5, "--shard-images", SHARD, "--workers", 0, *more),
    )


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def made(workshop):
    out = workshop / "made"
    assert not execute(*arguments(workshop, out))
    return out


def test_latents_are_what_the_vae_says(workshop, made):
    """In ImageFolder's order, by the same few lines that a user would write."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.v2.functional import pil_to_tensor

    folder = ImageFolder(str(workshop / "images"))
    vae, dataset = load_vae(str(workshop / "vae")), LatentDataset(made)
    assert dataset.class_names == folder.classes
    assert dataset.labels.tolist() == folder.targets
    for i in (0, 11, 12, COUNT - 1):
        image = folder[i][0]
        scale = SIZE / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
        pixels = pil_to_tensor(image.crop((left, top, left + SIZE, top + SIZE)))[None] / 127.5 - 1
        torch.testing.assert_close(dataset.read_raw([i]), encode(vae, pixels), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            dataset.read_raw([i], True), encode(vae, pixels.flip(-1)), atol=1e-4, rtol=1e-4
        )


def test_statistics_are_those_of_numpy(made):
    latents = np.concatenate([load_file(p)["latents"].numpy() for p in sorted(made.glob("*.safetensors"))])
    index = json.loads((made / "index.json").read_text())
    np.testing.assert_allclose(index["mean"], latents.mean((0, 2, 3), dtype=np.float64), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(index["std"], latents.std((0, 2, 3), dtype=np.float64), rtol=1e-6)


def test_a_finished_set_is_looked_at(made, workshop, run_here):
    stdout = run_here("extract_latents.py", "--verify", made)
    assert "100 images, every shard is what the index says" in stdout
    stdout = run_here("extract_latents.py", "--info", made)
    assert "100 in 9 shards" in stdout
    assert "golden retriever" in stdout
    assert Image.open(made / "contact.png").width > 16 * SIZE
    before = hashes(made)
    stdout = run_here(*arguments(workshop, made))  # again: nothing is left to do
    assert f"{COUNT} images in" in stdout
    assert hashes(made) == before


@pytest.mark.slow
def test_killed_extractions_make_the_same_bytes(workshop, made, tmp_path):
    """Killed at a random moment, and then the same command again."""
    out = tmp_path / "out"
    process = start(*arguments(workshop, out))
    while not list(out.glob("*.safetensors")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.random() * 0.05)
    process.kill()
    process.communicate()
    run(*arguments(workshop, out))
    assert hashes(out) == hashes(made)
    assert json.loads((out / "index.json").read_text()) == json.loads((made / "index.json").read_text())


@pytest.mark.slow
def test_two_processes_make_the_same_bytes(workshop, made, tmp_path):
    run(*arguments(workshop, tmp_path / "out"), launcher=TWO_PROCESSES, ACCELERATE_USE_CPU="true")
    assert hashes(tmp_path / "out") == hashes(made)
    assert (tmp_path / "out" / "index.json").read_text() == (made / "index.json").read_text()


def in_process(workshop, out, **options):
    """With the threads of the script, since they decide the rounding."""
    threads = torch.get_num_threads()
    use_all_cores(1)
    try:
        return _extract(workshop, out, **options)
    finally:
        torch.set_num_threads(threads)


def _extract(workshop, out, **options):
    vae = load_vae(str(workshop / "vae"))
    settings = Settings(size=(SIZE, SIZE), batch_images=5, shard_images=SHARD)
    return extract(open_source(str(workshop / "images")), vae, out, settings, {"vae": "vae"}, **options)


@pytest.mark.parametrize("moment", range(1, 11))
def test_whatever_operation_is_the_last_the_bytes_are_the_same(workshop, made, tmp_path, monkeypatch, moment):
    """Killed between any two file operations; ten moments spread over the whole extraction."""
    from iwin_dit.runtime import files

    real, calls = files.replace, []

    def breaks(path, data):
        calls.append(path)
        if len(calls) == 2 * moment - moment % 2:
            path.with_name(f".tmp-{path.name}").write_bytes(data[: len(data) // 2])
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(files, "replace", breaks)
    with pytest.raises(KeyboardInterrupt):
        in_process(workshop, tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out" / "index.json").exists()
    in_process(workshop, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(made)


def test_other_settings_do_not_continue_what_was_begun(workshop, tmp_path):
    out = tmp_path / "out"
    in_process(workshop, out)
    next(out.glob("*shard003*")).unlink()
    (out / "index.json").unlink()
    settings = Settings(size=(SIZE, SIZE), batch_images=5, shard_images=SHARD, store="float16")
    with pytest.raises(DataError, match=r"begun with other settings \(store: 'float32' -> 'float16'\)"):
        extract(open_source(str(workshop / "images")), make_vae(), out, settings, {"vae": "vae"})
    in_process(workshop, out)
    assert len(LatentDataset(out)) == COUNT


@pytest.fixture
def few(workshop, tmp_path):
    """Two shards' worth of images, in folders of their own, and the VAE."""
    draw_images(tmp_path / "images", count=2 * SHARD)
    shutil.copytree(workshop / "vae", tmp_path / "vae")
    return tmp_path


def test_latents_of_other_images_are_not_taken_for_theirs(few):
    out, images = few / "out", few / "images" / "umbrella"
    in_process(few, out)
    before, first, last = hashes(out), min(images.iterdir()), max(images.iterdir())
    shutil.move(few / "images", few / "elsewhere")
    shutil.copytree(few / "elsewhere", few / "images", copy_function=shutil.copyfile)  # with other times
    in_process(few, out)

    data = last.read_bytes()
    Image.new("RGB", (30, 20)).save(last)
    with pytest.raises(DataError, match=r"shard001\.safetensors was made of other images than are there now"):
        in_process(few, out)
    last.write_bytes(data)
    first.rename(images / "zzz.png")
    (out / "latents_rank00_shard000.safetensors").unlink()  # as if it had not been finished
    with pytest.raises(DataError, match="was made of other images"):
        in_process(few, out)
    (images / "zzz.png").rename(first)
    in_process(few, out)
    assert hashes(out) == before

    Image.new("RGB", (30, 20)).save(last)
    for path in (out / ".entries").glob("shard*.json"):  # as an older version left them
        entry = json.loads(path.read_text())
        del entry["images_sha256"]
        path.write_text(json.dumps(entry))
    in_process(few, out)
    assert hashes(out) == before


def test_a_shard_that_lacks_bad_images_is_made_again_when_they_are_mended(few):
    image = min((few / "images" / "umbrella").iterdir())
    data = image.read_bytes()
    image.write_bytes(data[:200])
    with pytest.raises(
        DataError, match=r"mend them or raise --max-bad-images; after a removal, extract into"
    ):
        in_process(few, few / "out")
    assert len(in_process(few, few / "out", max_bad_images=1)) == 1
    image.write_bytes(data)
    assert in_process(few, few / "out") == []
    assert len(LatentDataset(few / "out")) == 2 * SHARD
    in_process(few, few / "clean")
    assert hashes(few / "out") == hashes(few / "clean")


def test_what_is_in_a_source_is_told_without_reading_it(tmp_path):
    """In each kind, of one example: the same in a copy, another with other bytes or another label."""

    def fingerprints(kind):
        root = tmp_path / kind
        root.mkdir()
        for label, size in ((0, 5), (0, 6), (1, 6)):
            data, where = bytes(size), root / "set" / f"{'ab'[label]}"
            shutil.rmtree(root / "set", ignore_errors=True)
            where.mkdir(parents=True)
            if kind == "clips":
                (where / "clip").mkdir()
                for frame in range(2):
                    (where / "clip" / f"{frame}.png").write_bytes(data[frame:])
                source = ClipFolderSource(root / "set")
            elif kind == "csv":
                (root / "set" / "x.png").write_bytes(data)
                (root / "labels.csv").write_text(f"file,label\nx.png,{label}\n")
                source = open_source(str(root / "set"), str(root / "labels.csv"))
            elif kind == "tar":
                (root / "x.png").write_bytes(data)
                (root / "x.cls").write_text(str(label))
                with tarfile.open(root / "set" / "0.tar", "w") as tar:
                    for name in ("x.png", "x.cls"):
                        tar.add(root / name, name)
                source = open_source(str(root / "set"))
            else:
                (where / "x.png").write_bytes(data)
                source = open_source(str(root / "set"))
            yield source.stamp(0)[0]

    for kind in ("folders", "csv", "tar", "clips"):
        found = list(fingerprints(kind))
        assert len(set(found)) == 3, found
        assert str(tmp_path) not in "".join(found)


def test_what_is_ignored_or_odd_is_said(few, run_here, refused_here):
    (few / "images" / "umbrella" / "notes.txt").write_text("mine")
    assert "ignored 1 in" in run_here(*arguments(few, few / "out"))
    assert "umbrella/notes.txt" in run_here("extract_latents.py", "--info", few / "out")
    (few / "images" / "umbrella" / "more.txt").write_text("mine")
    run_here(*arguments(few, few / "out"))  # what lies beside the images is no other set
    (few / "splits").mkdir()
    for split in ("train", "val"):
        shutil.copytree(few / "images" / "umbrella", few / "splits" / split)
    (few / "images").rename(few / "pictures")
    (few / "splits").rename(few / "images")
    error = refused_here(*arguments(few, few / "other"))
    assert "names of splits; give the folder of one split" in error
    assert not (few / "other").exists(), "before any work"
    run_here(*arguments(few, few / "other", "--allow-odd-classes"))


def test_an_extraction_that_was_begun_keeps_the_order_of_its_classes(few, run_here):
    """Older versions sorted class folders as texts: 10 before 2."""
    for old, new in zip(sorted((few / "images").iterdir()), ("10", "2", "30"), strict=True):
        old.rename(few / "images" / new)
    assert "class 0 is 2, class 2 is 30" in run_here(*arguments(few, few / "new"))
    assert LatentDataset(few / "new").class_names == ["2", "10", "30"]
    settings = Settings(size=(SIZE, SIZE), batch_images=5, shard_images=SHARD)
    source = FolderSource(few / "images", order=["10", "2", "30"])
    vae = load_vae(str(few / "vae"))
    extract(source, vae, few / "out", settings, {"vae": "vae", "vae_sha256": weights_sha256(vae)})
    next((few / "out").glob("*shard001*")).unlink()
    assert "class 0 is 10" in run_here(*arguments(few, few / "out"))
    dataset = LatentDataset(few / "out")
    assert dataset.class_names == ["10", "2", "30"]
    names = [source.name(i).split("/")[-2] for i in range(len(source))]
    assert [dataset.class_names[label] for label in dataset.labels] == names


@pytest.mark.parametrize("name", ["index.json", "latents_rank01_shard000.safetensors"])
def test_latents_made_by_something_else_are_not_overwritten(few, name):
    out = few / "out"
    out.mkdir()
    (out / name).write_text("published")
    with pytest.raises(
        DataError, match=rf"out holds latents that were not begun here \({name}\); take another"
    ):
        in_process(few, out)
    assert [path.name for path in out.iterdir()] == [name]


def test_a_full_disk_is_said_when_the_vae_is_saved(few):
    """The kernel's own error, by a limit on the sizes of files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(DiskError, match=r"vae cannot be saved .*make room on this disk"):
            in_process(few, few / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    in_process(few, few / "out")
    assert len(LatentDataset(few / "out")) == 2 * SHARD


def test_there_are_no_more_workers_than_cores_unless_asked_for(few, monkeypatch):
    asked = []

    def loader(*positional, num_workers, timeout, **options):
        asked.append(num_workers)
        return DataLoader(*positional, **options)

    monkeypatch.setattr(extraction, "DataLoader", loader)
    for cores, given in ((1, None), (64, None), (1, 3)):
        monkeypatch.setattr(extraction, "cores", lambda cores=cores: cores)
        in_process(few, few / f"{cores} {given}", num_workers=given)
    assert asked == [1, 4, 3]


def test_a_class_whose_name_is_no_text_is_refused(few):
    os.rename(few / "images" / "umbrella", os.fsencode(few / "images") + b"/caf\xe9")
    with pytest.raises(DataError, match=r"class folder caf\? of .* has a name that is not UTF-8; rename it"):
        open_source(str(few / "images"))


def test_damaged_shards_are_found_and_made_again(workshop, made, tmp_path, run_here, refused_here):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    shard = out / "latents_rank00_shard004.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    error = refused_here("extract_latents.py", "--verify", out)
    assert "latents_rank00_shard004.safetensors; remove these files and run the extraction again" in error
    shard.write_bytes(content[:-1])
    with pytest.raises(
        DataError, match=f"has {len(content) - 1} bytes, the index says {len(content)}; remove it"
    ):
        LatentDataset(out)
    shard.unlink()
    run_here(*arguments(workshop, out))
    assert hashes(out) == hashes(made)


def test_bad_images_are_counted_and_left_out(workshop, tmp_path, run_here, refused_here):
    shutil.copytree(workshop / "images", tmp_path / "images")
    images = sorted((tmp_path / "images" / "umbrella").iterdir())
    images[0].write_bytes(b"")
    images[1].write_bytes(images[2].read_bytes()[:200])
    (tmp_path / "images" / "umbrella" / ".hidden.png").write_bytes(b"x")
    (tmp_path / "images" / ".git").mkdir()
    shutil.copytree(workshop / "vae", tmp_path / "vae")
    error = refused_here(*arguments(tmp_path, tmp_path / "out"))
    assert "bad images, allowed are 0" in error
    assert images[0].name in error
    stdout = run_here(*arguments(tmp_path, tmp_path / "out", "--max-bad-images", 2))
    assert f"{COUNT - 2} images in" in stdout
    assert stdout.count("left out: ") == 2
    assert len(LatentDataset(tmp_path / "out")) == COUNT - 2


def test_mistakes_are_one_line(workshop, tmp_path, refused_here):
    out = tmp_path / "out"
    assert "--vae is missing" in refused_here(
        "extract_latents.py", "--images", workshop / "images", "--out", out
    )
    error = refused_here(*arguments(workshop, out), "--size", 15)
    assert "is no multiple of the VAE's factor 2; nearest" in error
    with pytest.raises(DataError, match=r"is no preset, folder or hub id .*did you mean sd-vae-ft-ema\?"):
        load_vae("sd-vae-ft-em")
    with pytest.raises(DataError, match=r"did you mean va-vae-f16d32\?"):
        load_vae("va-vae")
    for more, message in (
        (("--workers", -1), "--workers and --max-bad-images are at least 0"),
        (("--max-bad-images", -1), "--workers and --max-bad-images are at least 0"),
        (("--vae-config", "nope.yaml"), "--vae-config is for an original file"),
        (("--out", ""), "--out is missing or empty"),
    ):
        assert message in refused_here(*arguments(workshop, out), *more)
    marker = tmp_path / "marker"

    class Malicious:
        def __reduce__(self):
            return (marker.write_text, ("ran",))

    torch.save({"state_dict": Malicious()}, tmp_path / "bad.ckpt")
    error = refused_here(*arguments(workshop, out), "--vae", tmp_path / "bad.ckpt")
    assert "cannot be read as tensors" in error
    assert not marker.exists()
    assert not out.exists()


def test_an_autoencoder_that_may_not_compute_in_float16_computes_in_float32(workshop, tmp_path):
    """Its activations overflow there; without ``force_upcast`` that is an error, not latents of zeros."""
    source = open_source(str(workshop / "images"))
    halves = Settings(size=(SIZE, SIZE), batch_images=5, shard_images=SHARD, precision="float16")
    written = {}
    for precision in ("float16", "float32"):
        vae = make_vae()
        with torch.no_grad():
            vae.encoder.conv_in.weight *= 3e6
        settings = replace(halves, precision=precision)
        extract(source, vae, tmp_path / precision, settings, {"vae": "vae"})
        assert vae.dtype == torch.float32
        shards = sorted((tmp_path / precision).glob("*.safetensors"))
        written[precision] = [load_file(path) for path in shards]
    for half, full in zip(*written.values(), strict=True):
        assert all(torch.equal(half[name], full[name]) for name in full)
    vae.register_to_config(force_upcast=False)
    with pytest.raises(DataError, match="is not finite; take --precision float32"):
        extract(source, vae, tmp_path / "refused", halves, {"vae": "vae"})


def test_latents_that_are_not_finite_are_not_written(workshop, tmp_path):
    vae = make_vae()
    torch.nn.init.constant_(vae.quant_conv.bias, torch.inf)
    settings = Settings(size=(SIZE, SIZE), batch_images=5, shard_images=SHARD)
    with pytest.raises(DataError, match="is not finite; take --precision float32"):
        extract(open_source(str(workshop / "images")), vae, tmp_path / "out", settings, {"vae": "vae"})
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_the_posterior_is_sampled_by_position(workshop, tmp_path):
    from iwin_dit.data.examples import TrainingExamples

    settings = Settings(size=(SIZE, SIZE), batch_images=5, shard_images=50, posterior=True)
    vae = load_vae(str(workshop / "vae"))
    extract(open_source(str(workshop / "images")), vae, tmp_path, settings, {"vae": "vae"})
    dataset = LatentDataset(tmp_path)
    assert dataset.has_posterior
    stream = TrainingExamples(dataset, 0, False, 0.0, None)
    assert torch.equal(stream[3].x0, stream[3].x0)
    draws = torch.stack([stream[3 + p * COUNT].x0 - stream[3].x0 for p in range(3)])
    assert draws[1:].abs().max() > 0
    first = next(iter(sorted((workshop / "images").iterdir())[0].iterdir()))
    assert first.exists()
    _, std = encode_posterior(vae, torch.zeros(1, 3, SIZE, SIZE))
    assert dataset.read_std([0]).shape == std.shape


def assert_no_code_runs(statistics, config, refused_here):
    """A pickle in the place of the statistics is refused unread."""
    good, marker = statistics.read_bytes(), statistics.with_name("marker")

    class Malicious:
        def __reduce__(self):
            return (marker.write_text, ("ran",))

    torch.save({"mean": Malicious()}, statistics)
    assert "cannot be read as tensors" in refused_here("train_dit.py", "--config", config)
    assert not marker.exists()
    statistics.write_bytes(good)


def test_a_published_folder_trains_as_it_is(recipe, tmp_path, workshop, run_here, refused_here):
    """LightningDiT's layout: several ranks, no index, statistics in a .pt file."""
    folder = tmp_path / "imagenet"
    folder.mkdir()
    for rank in range(2):
        latents = torch.randn(30, 4, 8, 8)
        tensors = {"latents": latents, "latents_flip": latents.flip(-1), "labels": torch.arange(30) % 3}
        name = f"latents_rank{rank:02d}_shard000.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name)
    statistics = {"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}
    torch.save(statistics, folder / "latents_stats.pt")
    before = sorted(folder.iterdir())
    config = recipe(data={"path": str(folder), "vae": "x"})
    assert_no_code_runs(folder / "latents_stats.pt", config, refused_here)
    config = recipe(data={"path": str(folder)}, train={"max_steps": 2})
    assert "set data.vae to a folder" in refused_here("train_dit.py", "--config", config)
    stdout = run_here("train_dit.py", "--config", config, "--data.vae", workshop / "vae")
    assert "trained to step 2" in stdout
    assert sorted(folder.iterdir()) == before


def test_extract_train_and_sample(recipe, tmp_path, made, run_here, refused_here):
    """From images to images; class names come from the folders; later, another VAE's latents are refused."""
    config = recipe(data={"path": str(made)}, train={"max_steps": 3})
    run_here("train_dit.py", "--config", config)
    run_here(
        *("sample.py", "--checkpoint", tmp_path / "run", "--class", "golden retriever", "--num-images", 1),
        *("--steps", 2, "--out", tmp_path / "x.png"),
    )
    other = tmp_path / "other"
    shutil.copytree(made, other)
    index = json.loads((other / "index.json").read_text())
    (other / "index.json").write_text(json.dumps(index | {"vae_sha256": "0"}))
    error = refused_here("train_dit.py", "--config", config, "--data.path", other, "--train.max_steps", 4)
    assert "was begun on other data (vae_sha256" in error


@pytest.mark.slow
def test_pictures_become_samples_with_the_architecture_of_stable_diffusion(tmp_path):
    """The benchmark, on few pictures: drawn, extracted, trained on, sampled, by the scripts themselves."""
    stdout, _ = run("benchmarks/own_images.py", "--images", 24, "--size", 64, "--folder", tmp_path)
    assert "in the autoencoder" in stdout
    assert "trained to step 20" in stdout
    assert "8 images in" in stdout
    assert len(LatentDataset(tmp_path / "24_64px" / "latents")) == 24
