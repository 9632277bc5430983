"""Launch files and docs/cluster.md: what the launchers accept, and what the Slurm script calls when."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, logged_steps
from torch.distributed.run import get_args_parser

DOC, BATCH = ROOT / "docs" / "cluster.md", ROOT / "docs" / "train.sbatch"
CONFIGS = sorted((ROOT / "configs" / "accelerate").iterdir())
EXPECTED = {  # kind, machines, processes of all machines
    "one_gpu": ("NO", 1, 1),
    "eight_gpus": ("MULTI_GPU", 1, 8),
    "two_nodes": ("MULTI_GPU", 2, 16),
    "fsdp2": ("MULTI_GPU", 1, 8),
}
PARSERS = {"accelerate launch ": launch_command_parser, "torchrun ": get_args_parser}


def test_accelerate_reads_every_config(tmp_path):
    assert {path.stem for path in CONFIGS} == set(EXPECTED)
    for path in CONFIGS:
        config = load_config_from_file(str(path))
        found = config.distributed_type.value, config.num_machines, config.num_processes
        assert found == EXPECTED[path.stem]
        assert (config.mixed_precision, config.dynamo_config, config.use_cpu) == ("no", {}, False)
        assert not config.fsdp_config, "the trainer shards"
        wrong = tmp_path / path.name
        wrong.write_text(path.read_text() + "num_gpus: 8\n")
        with pytest.raises(ValueError, match=r"unknown keys .*num_gpus"):
            load_config_from_file(str(wrong))
    defaults = launch_command_parser().parse_args(["train_dit.py"])
    assert (defaults.rdzv_backend, defaults.max_restarts) == ("static", 0), "a file cannot change these"


def launch_commands(path):
    """The launch commands in a file's blocks, lines or comments: ``[(parser, words after the launcher)]``."""
    text = path.read_text()
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S))
    text = re.sub(r"\\\n[# ]*", " ", text)
    return [
        (make_parser(), shlex.split(line.partition(launcher)[2].removesuffix("&")))
        for line in text.splitlines()
        for launcher, make_parser in PARSERS.items()
        if line.lstrip("# ").startswith(launcher) and "train_dit.py" in line
    ]


@pytest.mark.parametrize("path", [DOC, BATCH, *CONFIGS], ids=lambda p: p.name)
def test_launchers_know_the_flags(path):
    commands = launch_commands(path)
    assert len(commands) == (3 if path == DOC else 1)
    for parser, words in commands:
        known = {option for action in parser._actions for option in action.option_strings}
        own = words[: words.index("train_dit.py")]
        assert {word.partition("=")[0] for word in own if word.startswith("-")} <= known
        parsed = parser.parse_args(words)
        assert parsed.training_script == "train_dit.py"
        if config := getattr(parsed, "config_file", None):
            assert (ROOT / config).is_file()
            assert path in (DOC, ROOT / config)


def test_the_document_names_what_exists():
    text = DOC.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (DOC.parent / target).exists(), target
    for target in re.findall(r"\b(?:configs|docs|tests)/[\w/]+\.\w+", text):
        assert (ROOT / target).exists(), target
    assert len(text.splitlines()) <= 120


# Stand-ins for Slurm's commands. Each writes a line to $CALLS. srun starts $NODES tasks, kills the others
# after one fails, as --kill-on-bad-exit does, and exits with the highest code; scancel signals tasks twice.
RECORD = """#!/bin/bash
line="${0##*/} $*"
echo "${line//$'\\n'/ }" >> "$CALLS"
"""
STAND_INS = {
    "scontrol": '[ "$1" != show ] || echo localhost',
    "scancel": 'tasks=$(cat "$CALLS.tasks"); kill -TERM $tasks; sleep 0.1; kill -TERM $tasks',
    "srun": """
while [[ $1 == --* ]]; do shift; done
tree() { for child in $(pgrep -P $1); do tree $child; done; echo $1; }
for node in $(seq $NODES); do "$@" & tasks+=($!); done
echo ${tasks[@]} > "$CALLS.tasks"
worst=0
for node in $(seq $NODES); do
    wait -n -p ended; code=$?
    [ -n "$ended" ] && ((code > worst)) && worst=$code
    if ((code && node < NODES)); then sleep 2; for task in ${tasks[@]}; do kill -KILL $(tree $task); done; fi
done 2>/dev/null
exit $worst""",
}
TORCHRUN = """
printf '%s\\0' "$@" > "$CALLS.torchrun"
[ "$TORCHRUN_EXITS" != never ] && exit $TORCHRUN_EXITS
for rank in 0 1; do
    (trap 'echo trainer stops >> "$CALLS"; sleep 0.3; exit 143' TERM; while :; do sleep 0.05; done) &
done
trap 'echo torchrun ends >> "$CALLS"; exit 1' TERM
echo ready >> "$CALLS"
while :; do wait; sleep 0.05; done"""


class Job:
    """train.sbatch with stand-ins first on the path."""

    def __init__(self, folder, commands, *arguments, **environment):
        self.calls = folder / "calls"
        self.calls.write_text("")
        for name, body in (STAND_INS | commands).items():
            path = folder / name
            path.write_text(RECORD + body)
            path.chmod(0o755)
        environment = {
            "PATH": os.pathsep.join((str(folder), str(Path(sys.executable).parent), os.environ["PATH"])),
            "CALLS": str(self.calls),
            "NODES": "1",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NODELIST": "node-[0-1]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "64",
        } | environment
        self.process = subprocess.Popen(
            ["bash", str(BATCH), *map(str, arguments)],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_until(self, condition, seconds):
        deadline = time.time() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0][-3000:]
            assert time.time() < deadline
            time.sleep(0.05)

    def end(self, seconds):
        """The exit code, the output, and the first words of what was called."""
        output, _ = self.process.communicate(timeout=seconds)
        calls = [" ".join(line.split()[:3]) for line in self.calls.read_text().splitlines()]
        return self.process.returncode, output, calls


def test_the_batch_script_is_bash():
    subprocess.run(["bash", "-n", BATCH], check=True)
    directives = re.findall(r"^#SBATCH (\S+)", BATCH.read_text(), re.M)
    assert {"--signal=B:TERM@120", "--requeue", "--ntasks-per-node=1"} <= set(directives)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (143, True), (1, False)])
def test_a_job_is_requeued_when_it_was_preempted(tmp_path, code, requeued):
    arguments = ["--config", "a recipe.yaml", "--train.max_steps", "7"]
    job = Job(tmp_path, {"torchrun": TORCHRUN}, *arguments, TORCHRUN_EXITS=str(code))
    exit_code, output, calls = job.end(30)
    assert exit_code == code, output
    assert ("scontrol requeue 4242" in calls) == requeued
    assert calls[:2] == ["scontrol show hostnames", "srun --kill-on-bad-exit=1 --cpus-per-task=64"]
    words = (tmp_path / "calls.torchrun").read_text().split("\0")[:-1]
    parsed = get_args_parser().parse_args(words)
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.max_restarts) == ("2", "8", 1)
    assert (parsed.rdzv_backend, parsed.rdzv_endpoint, parsed.rdzv_id) == ("c10d", "localhost:24242", "4242")
    assert (parsed.training_script, parsed.training_script_args) == ("train_dit.py", arguments)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])  # --signal=B:TERM@120, B:USR1@120
def test_sigterm_reaches_each_trainer_once(tmp_path, number):
    """And torchrun after them, which would start them again; however often Slurm says it."""
    job = Job(tmp_path, {"torchrun": TORCHRUN}, TORCHRUN_EXITS="never")
    job.wait_until(lambda: "ready" in job.calls.read_text(), 20)
    job.process.send_signal(number)
    job.wait_until(lambda: "trainer" in job.calls.read_text(), 20)
    job.process.send_signal(number)
    exit_code, output, calls = job.end(30)
    assert exit_code == 143, output
    after = calls[calls.index("ready") + 1 :]
    assert after == [
        *("scancel --signal=TERM 4242.0", "trainer stops", "trainer stops", "torchrun ends"),
        "scontrol requeue 4242",
    ]


@pytest.mark.slow
def test_stop_requeue_and_go_on_with_one_node_less(recipe, tmp_path):
    """The trainer itself on two nodes by torchrun's rendezvous, with data workers; then on one."""
    config = recipe(train={"max_steps": 100_000, "save_every_steps": 100_000, "num_workers": 1})
    run = tmp_path / "run"
    environment = {
        **{"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        **{"SLURM_JOB_ID": str(os.getpid()), "SLURM_GPUS_ON_NODE": "1"},
    }
    job = Job(tmp_path, {}, "--config", config, NODES="2", **environment)
    job.wait_until(lambda: max(logged_steps(run), default=0) >= 4, 240)
    job.process.send_signal(signal.SIGTERM)
    exit_code, output, calls = job.end(120)
    assert exit_code == 143, output[-3000:]
    assert calls[-1] == f"scontrol requeue {os.getpid()}"
    step = int(output.split("stopped at step ")[1].split()[0])
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{step:08d}"]

    more = ["--config", config, "--train.max_steps", str(step + 4)]
    job = Job(tmp_path, {}, *more, SLURM_JOB_NUM_NODES="1", **environment)
    exit_code, output, calls = job.end(240)
    assert exit_code == 0, output[-3000:]
    assert f"trained to step {step + 4}" in output
    assert not [call for call in calls if "requeue" in call]
