"""Batches that do not fit into memory are drawn in parts."""

import pytest
import torch
from conftest import make_pipeline

from iwin_dit.evaluation.drawing import SampledImages, drawer
from iwin_dit.pipelines.sampling import draw_in_parts


def test_halves_begin_where_the_whole_began():
    calls = []

    def draw(labels, generators):
        calls.append(list(labels))
        noise = torch.stack([torch.randn(2, generator=g) for g in generators])
        if len(labels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return noise + torch.tensor(labels)[:, None]

    generators = [torch.Generator().manual_seed(i) for i in range(5)]
    found = torch.cat(draw_in_parts(draw, [0, 1, 2, 3, 4], generators))
    alone = [torch.randn(2, generator=torch.Generator().manual_seed(i)) + i for i in range(5)]
    assert torch.equal(found, torch.stack(alone))
    assert calls == [[0, 1, 2, 3, 4], [0, 1], [2, 3, 4], [2], [3, 4]]


def test_one_that_does_not_fit_and_other_errors_are_raised():
    def draw(labels, generators):
        raise error

    error = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(torch.OutOfMemoryError):
        draw_in_parts(draw, [0, 1], [torch.Generator(), torch.Generator()])
    error = RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes"):
        draw_in_parts(draw, [0, 1], [torch.Generator(), torch.Generator()])


def test_drawn_images_are_rounded_as_a_png_is_and_fit_into_memory():
    """127.6 of 255 is 128: truncated, it would be 127. In batches of four, of which two fit."""
    sizes = []

    def pipeline(labels, generator, output_type, return_dict):
        sizes.append(len(labels))
        if len(labels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        values = torch.tensor([0.0, 127.4, 127.6, 254.6]) / 255
        return (values.view(1, 1, 2, 2).expand(len(labels), 3, 2, 2),)

    images = SampledImages(drawer(pipeline, {}), [0] * 6, 0, {}, draw_batch=4).read(0, 6)
    assert images.dtype == torch.uint8
    assert images[0, 0].flatten().tolist() == [0, 127, 128, 255]
    assert images.shape == (6, 3, 2, 2)
    assert sizes == [4, 2, 2, 2]


def test_a_real_pipeline_draws_the_same_in_parts(monkeypatch):
    pipeline = make_pipeline()
    whole = SampledImages(drawer(pipeline, {"num_inference_steps": 2}), [0, 1, 2, 0], 0, {}).read(0, 4)
    call = type(pipeline).__call__

    def small(self, labels, **options):
        if len(labels) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return call(self, labels, **options)

    monkeypatch.setattr(type(pipeline), "__call__", small)
    parts = SampledImages(drawer(pipeline, {"num_inference_steps": 2}), [0, 1, 2, 0], 0, {}).read(0, 4)
    assert (parts.int() - whole.int()).abs().max() <= 1
    assert len(parts.unique()) > 20
