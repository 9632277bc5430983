"""What tests/mutation.py cannot know: which tests concern a folder, and mutants to leave out or to add."""

STUDIES = tuple(
    f"{n}.py" for n in ("compare*", "transfer", "runs", "judge", "costs", "connectivity", "*_report")
)

TESTS = {  # files of tests/, from which those that execute a line are chosen
    "iwin_dit/diffusion": "diffusion guidance pipeline",
    "iwin_dit/training": "data optimizer reports state posthoc checkpoint classification training levers",
    "iwin_dit/data": "data codec digits pixels images folders limits video extraction classification "
    "clip_training",
    "iwin_dit/evaluation": "rules frechet metrics extractors evaluate clips",
}

EQUIVALENT = {  # (file, line as changed): why no test can notice it
    (
        "iwin_dit/diffusion/ddpm.py",
        "upper = torch.where(x >= 0.999, torch.ones_like(upper), upper)",
    ): "no number of 8 bits is 0.999",
    (
        "iwin_dit/diffusion/ddpm.py",
        "lower = torch.where(x <= -0.999, torch.zeros_like(lower), lower)",
    ): "no number of 8 bits is -0.999",
    (
        "iwin_dit/diffusion/ddpm.py",
        "return torch.where(first, code_length, divergence).flatten(1).mean((-1)) / math.log(2)",
    ): "of two axes, the second is the last",
}

# (file, text that occurs once, what takes its place)
NAMED: list[tuple[str, str, str]] = []
