"""What the benchmark counts, against what torch and the system count; what it times and prints."""

import math
import re
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig
from results import bench
from test_measure import KINDS, in_a_folder_of_its_own, save, tiny  # noqa: F401 (a fixture)


def main(*words):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["bench.py", *map(str, words), "--device", "cpu"])
        bench.main()


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_those_that_torch_counts(kind):
    model, idx = tiny(kind), torch.zeros(3, 40, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(idx)
    counts = counter.get_flop_counts()["Global"].items()
    matrices = sum(count for op, count in counts if "mm" in str(op))
    blocks, head = bench.operations(model.config, 40)
    keys = [[min(i + 1, window or 40) for i in range(40)] for window in model.config.windows]
    attention = 4 * model.config.n_embd * sum(map(sum, keys)) / 40
    assert matrices == pytest.approx(3 * 40 * (blocks - attention + head), rel=1e-12)


def test_the_least_work_of_a_step_the_peaks_and_the_mean_over_the_schedule(monkeypatch):
    model = tiny(widths=(24, 16))
    full, half = model.config, replace(model.config, mlp_widths=(12, 8))
    work, moved = bench.least_work(full, 1.0, (3, 40), 0, False)
    assert work == 3 * 120 * sum(bench.operations(full, 40))
    assert moved == 4 * 11 * sum(p.numel() for p in model.parameters() if p.dim() == 2)
    student, teacher = sum(bench.operations(half, 40)), sum(bench.operations(full, 40))
    work, _ = bench.least_work(full, 0.5, (3, 40), 120, True)
    assert work == 120 * (3 * student + teacher + 12**2 + 8**2)
    monkeypatch.setattr(bench, "timed", lambda task, device: (2.0, None))
    assert bench.peaks("cpu", torch.float32) == (2 * 2048**3 / 2, 2 * 4 * 2**25 / 2)
    for v in (0.1, 0.25):  # a tenth of it at 1, 3 tenths at v, a cubic between, its mean 1/4
        expected = v + (1 - v) * (0.1 + 0.6 / 4)
        assert bench.over_schedule(list(bench.V_TS), v) == pytest.approx(expected, rel=0.01)
        assert bench.over_schedule([3.0] * 4, v) == pytest.approx(3.0)


def test_what_is_timed_are_training_steps_that_keep_the_share_asked_for():
    args = Namespace(device="cpu", dtype="float32", accumulate=2, distill=True, compile=False,
                     gradient_checkpointing=False)
    step, losses = bench.stepper(tiny(widths=(24, 16)).config, (4, 8), list(bench.ROWS), args), []
    for name, (_, scope) in bench.ROWS.items():
        for v_t in bench.V_TS if name != "none" else [1.0]:
            widths, loss, norm = step(name, v_t, sim_tokens=8)
            layers = [round(v_t * 24), round(v_t * 16)]
            assert widths == layers if scope == "layer" else sum(widths) == round(v_t * 40)
            assert math.isfinite(loss) and norm > 0
            losses += [float(loss)] * (v_t == 1)
    assert losses == pytest.approx(losses[:1] * 4, rel=1e-5)  # no step has changed the weights
    assert abs(float(step("none", 1.0, distill=1)[1]) / losses[0] - 1) > 0.01  # there is a teacher
    torch.set_flush_denormal(False)


def test_peak_memory_is_the_tasks_own_also_where_the_parent_has_used_more():
    pytest.importorskip("resource")
    model = GPT(GPTConfig(vocab_size=257, n_embd=64, n_layer=2, n_head=2, mlp_widths=(40_000,) * 2))
    model.save_pretrained("model")
    weights = sum(p.nbytes for p in model.parameters())  # 41 MB
    torch.ones(100_000_000)  # 400 MB
    how = "model", "cpu", torch.float32, (1, 9), 3
    assert 0.9 * weights < bench.peak_memory("cpu", bench.load_and_generate, *how) < 5 * weights


def test_generation_shows_what_is_reached_of_what_counting_allows(capsys, monkeypatch):
    save("dense", widths=(64, 64))
    save("pruned", widths=(6, 6))
    monkeypatch.setattr(bench, "peak_memory", lambda device, task, path, *_: 1e6 * len(path.name))
    main("generation", "pruned", "--dense", "dense", "--rounds", 1)
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:20].strip(): line[20:].split() for line in lines}
    for what in ("prefill, batch 1", "decode, batch 1", "prefill, batch 8", "decode, batch 8"):
        dense, this, ratio, allowed, reached = (float(cell.strip("x%").replace(",", ""))
                                                for cell in rows[what])  # rounded in print
        assert ratio == pytest.approx(this / dense, rel=0.02, abs=0.006) and 1 < allowed < 3
        assert reached == pytest.approx(100 * ratio / allowed, rel=0.02, abs=2)
    before, after = (Path(name, "model.safetensors").stat().st_size for name in ("dense", "pruned"))
    assert rows["file size"] == (f"{before / 1e6:.1f} MB {after / 1e6:.1f} MB "
                                 f"{after / before:.2f}x").split()
    assert rows["peak memory, batch 8"] == "5.0 MB 6.0 MB 1.20x".split()
    assert "widths 6, 6 are awkward" in lines[-1] and "multiple_of=8" in lines[-1]


def test_steps_are_timed_with_and_without_a_teacher(capsys, monkeypatch):
    monkeypatch.setattr(bench, "resource", None)
    monkeypatch.setattr(bench, "peaks", lambda device, dtype: (2e11, 3e10))
    save("small")
    main(*"steps --model small --batch-size 2 --block-size 16 --rounds 1 --sim-tokens 8".split(),
         *"--distill --accumulate 2 --gradient-checkpointing".split())
    out = capsys.readouterr().out
    _, _, *rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line[:2] == "| "]
    names = ["none", "topv", "Global Top_v", "gum", "gum, 8 tokens for the similarity"]
    assert [row[0] for row in rows] == [*names, *(f"{name}, distilled" for name in names)]
    assert all(len(row) == 7 for row in rows) and rows[0][1] == "1.00 (1.00)"
    assert rows[4][3].split("(")[1] < "1" <= rows[5][1].split("(")[1]  # floors, also a teacher's
    assert "0.2 TFLOP/s, a copy 30 GB/s" in out and "memory: this system does not say" in out
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("words,says", [
    ("generation small", "small --dense"), ("generation nowhere", "nowhere"), ("generation", "RUN"),
    ("steps --model nowhere", "nowhere config.json"), ("steps --rounds 0", "--rounds above"),
    ("steps --compile --gradient-checkpointing", "--compile --gradient-checkpointing together")])
def test_a_mistake_gets_one_line_and_status_2(words, says, capsys):
    save("small")
    assert pytest.raises(SystemExit, main, *words.split()).value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(r"bench.py \w+: error: ", line) and all(word in line for word in says.split())
