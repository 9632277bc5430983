"""What tests/mutation.py cannot know: which tests concern a folder, and mutants to leave out or to add."""

STUDIES = tuple(
    f"{n}.py" for n in ("compare*", "transfer", "runs", "judge", "costs", "connectivity", "*_report")
)

TESTS = {  # files of tests/, from which those that execute a line are chosen
    "iwin_dit/diffusion": "test_diffusion test_guidance test_schedules test_pipeline",
    "iwin_dit/training": (
        "test_data test_optimizer test_reports test_state test_posthoc test_checkpoint "
        "test_classification test_replicas test_micro_batches test_levers test_monitor "
        "faults/test_saving faults/test_resuming faults/test_running"
    ),
    "iwin_dit/data": (
        "test_data test_codec test_digits test_pixels test_images test_folders test_sources "
        "test_labels test_limits test_transparency test_latent_faults test_video test_extraction "
        "test_classification test_clip_training test_clip_classifier test_extraction_faults "
        "test_storage faults/test_hostile_files faults/test_storage_errors"
    ),
    "iwin_dit/evaluation": (
        "test_rules test_sets test_frechet test_metrics test_every_sample test_extractors "
        "test_evaluate test_clips test_monitor faults/test_evaluation "
        "faults/test_evaluation_files"
    ),
}

EQUIVALENT = {  # (file, line as changed): why no test can notice it
    (
        "iwin_dit/diffusion/ddpm.py",
        "upper = torch.where((x >= 0.999), torch.ones_like(upper), upper)",
    ): "no number of 8 bits is 0.999",
    (
        "iwin_dit/diffusion/ddpm.py",
        "lower = torch.where((x <= -0.999), torch.zeros_like(lower), lower)",
    ): "no number of 8 bits is -0.999",
    (
        "iwin_dit/diffusion/ddpm.py",
        "return torch.where(first, code_length, divergence).flatten(1).mean((-1)) / math.log(2)",
    ): "of two axes, the second is the last",
    (
        "iwin_dit/training/posthoc.py",
        "widths = np.geomspace(1e-3, power_std(0.0) * (1 - 1e-9), (201))",
    ): "how finely widths are tried that a message of three digits names",
    (
        "iwin_dit/evaluation/clips.py",
        'bar = progress(looks, total=len(self), unit="clip", desc=f"look at {self.folder}", delay=(4))',
    ): "seconds until a bar is shown",
    (
        "iwin_dit/evaluation/sweep.py",
        "for panel, name in zip(axes[0], names, strict=(False)):",
    ): "there are as many panels as names by construction",
    (
        "iwin_dit/data/latents.py",
        "for path, entry in zip(paths, entries, strict=(False))",
    ): "there is an entry for each path by construction",
    (
        "iwin_dit/data/hugging_face.py",
        "for batch in file.iter_batches(max((2), most // max(1, largest)), row_groups=[group], columns=[column]):",  # noqa: E501
    ): "how many rows are counted together",
    (
        "iwin_dit/data/labelled_clips.py",
        "self.num_clips, self.places = views[0], CROPS[views[(-1)]]",
    ): "of two numbers, the second is the last",
    ("iwin_dit/data/sources.py", "STAMPS_AT_ONCE = (1001)"): "how many names are looked at together",
    (
        "iwin_dit/training/classification.py",
        "share = weights.mean((1, (-2), 3))[:, None]",
    ): "of four axes, the third is the last but one",
}

NAMED = [  # (file, text that occurs once, what takes its place)
    ("iwin_dit/evaluation/extractors.py", "Mixed_6d.branch1x1", "Mixed_6c.branch1x1"),
    ("iwin_dit/evaluation/extractors.py", "Mixed_6d.branch1x1", "Mixed_6d.branch_pool"),
    ("iwin_dit/evaluation/extractors.py", "output[:, :SPATIAL_CHANNELS]", "output[:, -SPATIAL_CHANNELS:]"),
    ("iwin_dit/evaluation/extractors.py", "SPATIAL_CHANNELS = 7", "SPATIAL_CHANNELS = 8"),
    (
        "iwin_dit/evaluation/every_sample.py",
        "KID_SUBSETS, KID_SUBSET = 100, 1000",
        "KID_SUBSETS, KID_SUBSET = 100, 500",
    ),
    (
        "iwin_dit/evaluation/every_sample.py",
        "KID_SUBSETS, KID_SUBSET = 100, 1000",
        "KID_SUBSETS, KID_SUBSET = 50, 1000",
    ),
    ("iwin_dit/evaluation/every_sample.py", "rng.choice(len(s), size, replace=False)", "np.arange(size)"),
    ("iwin_dit/evaluation/every_sample.py", "NEIGHBOURS = 3", "NEIGHBOURS = 4"),
    (
        "iwin_dit/evaluation/metrics.py",
        "precision_and_recall(own, others, device)",
        "precision_and_recall(others, own, device)",
    ),
    ("iwin_dit/evaluation/metrics.py", "kernel_distance(own, others)", "kernel_distance(own, own)"),
    ("iwin_dit/evaluation/drawing.py", "(images.float() * 255).round()", "(images.float() * 255)"),
]
