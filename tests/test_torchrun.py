"""Two processes on the CPU, launched by torchrun: they make the run of one process, and if one of
them dies, nothing is lost. Runs are in float64, where all choose the same neurons for certain."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import train
from prune import METHODS, Method, Pruner
from results import cli
from test_train import (STEP, Killed, assert_same_weights, die, hook, in_double, load_once,
                        save_small)

STEPS, SAVED, DEATH = 15, 8, 11  # a checkpoint comes every SAVED steps; a process dies in DEATH
FLAGS = (f"--model small --steps {STEPS} --batch-size 8 --block-size 32 --lr 0.01 --log-every 5 "
         f"--eval-every {STEPS} --checkpoint-every {SAVED} --device cpu")
# A method that somebody might add, one that measures activations (Sun et al.'s pruning metric).
WANDA = Method("Wanda", "weights times activations", measure=torch.square,
               score=lambda mlp, square: mlp.c_proj.weight.norm(dim=0) * square.sqrt(),
               defaults=dict(lambda_sim=0.1))
RUNS = {  # what two processes make, and the run of one that is the same
    **{run: run for run in (*METHODS, "wanda", "gum --lambda-gum 0",
                            "topv --distill --teacher small")},
    **{f"obs --prune-until 0.7{cut}": "obs --prune-until 0.7" for cut in ("", " --accumulate 2")},
    "topv --gradient-checkpointing": "topv", "wanda --accumulate 2": "wanda",
    **{run + cut: run for run in ("gum", "gum --distill --teacher small", "gum --sim-tokens 64")
       for cut in ("", " --accumulate 2", " --accumulate 4")}}


def prepare(patch):
    """Have runs be in float64 and know WANDA; returns a list of what each step is going to keep."""
    kept, select = [], Pruner.select

    def selected(pruner, step):
        widths = select(pruner, step)
        kept.append([mlp.keep if mlp.keep is None else mlp.keep.tolist() for mlp in pruner.mlps])
        return widths

    in_double(patch)
    patch.setattr(data, "load", load_once)
    patch.setattr(Pruner, "select", selected)
    patch.setitem(METHODS, "wanda", WANDA)
    return kept


def make(run, kept, out):
    """The run in the folder `out`, and which neurons each step keeps in a file beside it."""
    kept.clear()
    train.run(train.parse([*FLAGS.split(), "--out", out, "--method", *run.split()]))
    torch.save(kept, f"{out}.kept{train.PROCESS}")


def torchrun(victim, *runs):
    """Two processes make the runs, and in the last of them process `victim` is killed, or, if that
    is "stop", process 0 is told to stop. Returns their output."""
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2".split()]
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parents[1]))
    job = subprocess.run([*command, __file__, str(victim), *runs], env=env, text=True, timeout=900,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert job.returncode and all(Path(f"{run}.kept1").exists() for run in runs[:-1]), job.stdout
    assert time.time() - Path("interrupted").stat().st_mtime < 25, job.stdout  # it has not hung
    return job.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have made every run in RUNS, and process 1 was killed in `killed-1`."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_small("small")
        Path("output").write_text(torchrun(1, *RUNS, "gum --out killed-1"))
    return folder


@pytest.fixture(autouse=True)
def kept(folder, monkeypatch):
    """Which neurons each step keeps of what runs in this process, next to what two have made."""
    monkeypatch.chdir(folder)
    return prepare(monkeypatch)


def saved_step(out):
    return torch.load(Path(out, "checkpoint.pt"), weights_only=True)["progress"]["step"]


def assert_same(out, expected):
    assert_same_weights(out, expected, 1e-9)
    ours, theirs = ([json.loads(line)["loss"] for line in Path(run, "log.jsonl").open()]
                    for run in (out, expected))
    assert ours == pytest.approx(theirs, rel=0, abs=1e-9)


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_make_the_run_of_one_and_cutting_a_batch_up_changes_nothing(run, kept):
    same = f"1 {RUNS[run]}"
    if not Path(same).exists():
        make(RUNS[run], kept, same)
    ours, also = (torch.load(f"{run}.kept{process}") for process in (0, 1))
    assert ours == also == torch.load(f"{same}.kept0")
    assert len(ours) == STEPS + 1 and (ours[-1] == [None, None]) == (run == "none")
    assert_same(run, same)


def test_when_one_process_dies_the_job_ends_and_goes_on_from_a_checkpoint(kept):
    def saved(out, output):
        assert "another process of this job is gone" in output and "--resume" in output
        assert not Path(out, "metrics.json").exists()
        return saved_step(out)

    assert saved("killed-1", Path("output").read_text()) == SAVED
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        hook(patch, *STEP, DEATH, die)
        make("gum --out alone-1", kept, "alone-1")
    ours, theirs = (torch.load(f"{out}/checkpoint.pt", weights_only=True)["pruner"]
                    for out in ("killed-1", "alone-1"))
    assert ours.keys() == theirs.keys() > {"scores", "C.0", "C.1"}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-9)
    output = torchrun(0, "gum --out killed-1 --resume", "gum --out killed-0")
    assert saved("killed-0", output) == SAVED
    make("gum --out killed-0 --resume", kept, "alone")  # as one process
    assert_same("killed-0", "gum")
    assert_same("killed-1", "gum")


def test_who_is_not_writing_the_checkpoint_waits_for_it(kept):
    output = torchrun("stop", "topv --out stopped")
    assert f"stopped after step {DEATH} of {STEPS}" in output and "--resume" in output
    assert Path("found").read_text() == str(DEATH)
    make("topv --out stopped --resume", kept, "alone-2")
    assert_same("stopped", "topv")


def interrupt(victim):
    """What happens to this process in the middle of a step."""
    if victim == str(train.PROCESS) or victim == "stop" and train.PROCESS == 0:
        Path("interrupted").touch()
        if victim == "stop":
            signal.raise_signal(signal.SIGUSR1)
        else:
            os.kill(os.getpid(), signal.SIGKILL)


def slowly(save):
    def saved(*args):
        time.sleep(2 * (train.PROCESS == 0))
        save(*args)

    return saved


if __name__ == "__main__":  # one of the processes that torchrun launches
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, to those left: let them say why
    patch = pytest.MonkeyPatch()
    kept = prepare(patch)
    cli.join_processes(train.parse(FLAGS.split()).device)
    victim, *runs, last = sys.argv[1:]
    for run in runs:
        make(run, kept, run)
    hook(patch, *STEP, DEATH, None, lambda _: interrupt(victim))
    if victim == "stop":
        patch.setattr(train, "save", slowly(train.save))
    cli.join_processes = lambda _: None  # it has
    sys.argv = ["train.py", *FLAGS.split(), "--method", *last.split()]
    try:
        train.main()
    finally:
        if victim == "stop" and train.PROCESS == 1:
            Path("found").write_text(str(saved_step("stopped")))
