"""What tests/mutation.py cannot know: which tests concern a folder, and mutants to leave out or to add."""

STUDIES = tuple(
    f"{n}.py" for n in ("compare*", "transfer", "runs", "judge", "costs", "connectivity", "*_report")
)

TESTS = {  # files of tests/, from which those that execute a line are chosen
    "iwin_dit/diffusion": "diffusion guidance schedules pipeline",
    "iwin_dit/training": "data optimizer reports state posthoc checkpoint classification replicas "
    "micro_batches levers monitor",
    "iwin_dit/data": "data codec digits pixels images folders sources labels limits transparency "
    "latent_faults video extraction classification clip_training clip_classifier",
    "iwin_dit/evaluation": "rules sets frechet metrics every_sample extractors evaluate clips monitor",
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
    ("iwin_dit/build_evaluation.py", "(images.float() * 255).round()", "(images.float() * 255)"),
]
