"""What tests/mutation.py cannot know: which tests concern a folder, and mutants to leave out or to add."""

STUDIES = tuple(
    f"{n}.py" for n in ("compare*", "transfer", "runs", "judge", "costs", "connectivity", "*_report")
)

TESTS = {  # files of tests/, from which those that execute a line are chosen
    "iwin_dit/diffusion": "diffusion guidance pipeline",
    "iwin_dit/training": "data optimizer posthoc checkpoint classification training micro_batches levers "
    "classifier monitor",
    "iwin_dit/data": "data pixels images video clips extraction classification training clip_training "
    "clip_classifier video_pipeline",
    "iwin_dit/evaluation": "frechet metrics extractors evaluate monitor clips",
}

# (file, line, old, new): why no test can notice it
EQUIVALENT: dict[tuple[str, str, str, str], str] = {}

# (file, text that occurs once, what takes its place)
NAMED: list[tuple[str, str, str]] = []
