"""What the benchmark counts, against what torch and the operating system count; what it times; and
what it prints."""

import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig
from prune import shrink
from results import bench

KINDS = {"gpt2": {}, "gpt_neo": dict(model_type="gpt_neo", qkv_bias=False, attn_scaled=False,
                                     windows=(None, 8))}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_flush_denormal(False)


def small(kind="gpt2", widths=(24, 16), **more):
    shape = dict(vocab_size=257, n_positions=128, n_embd=16, n_layer=2, n_head=2) | more
    return GPT(GPTConfig(mlp_widths=widths, **shape, **KINDS[kind]))


def main(*words):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["bench.py", *map(str, words)])
        bench.main()


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_those_that_torch_counts(kind):
    model, idx = small(kind), torch.zeros(3, 40, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(idx)
    counts = counter.get_flop_counts()["Global"].items()
    matrices = sum(count for op, count in counts if "mm" in str(op))
    blocks, head = bench.operations(model.config, 40)
    keys = [[min(i + 1, window or 40) for i in range(40)] for window in model.config.windows]
    attention = 4 * model.config.n_embd * sum(map(sum, keys)) / 40
    assert matrices == pytest.approx(3 * 40 * (blocks - attention + head), rel=1e-12)


def test_the_least_work_of_a_step():
    model = small()
    work, moved = bench.least_work(model.config, 1.0, (3, 40), 0, False)
    assert work == 3 * 120 * sum(bench.operations(model.config, 40))
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert moved == 4 * 11 * matrices
    half = replace(model.config, mlp_widths=(12, 8))
    taught, _ = bench.least_work(model.config, 0.5, (3, 40), 120, True)
    assert taught == 120 * (3 * sum(bench.operations(half, 40))
                            + sum(bench.operations(model.config, 40)) + 12**2 + 8**2)


def test_the_mean_over_the_schedule():
    # A tenth of it at 1, three tenths at v, and a cubic between, whose mean is a quarter.
    for v in (0.1, 0.25):
        expected = v + (1 - v) * (0.1 + 0.6 / 4)
        assert bench.over_schedule(list(bench.V_TS), v) == pytest.approx(expected, rel=0.01)
        assert bench.over_schedule([3.0] * 4, v) == pytest.approx(3.0)


def args_of(**settings):
    usual = dict(device="cpu", dtype="float32", accumulate=2, distill=True, compile=False,
                 gradient_checkpointing=False)
    return Namespace(**usual | settings)


def test_what_is_timed_are_training_steps_that_keep_the_share_asked_for():
    step = bench.stepper(small().config, (4, 8), list(bench.ROWS), args_of())
    losses = []
    for name in bench.ROWS:
        for v_t in bench.V_TS if name != "none" else [1.0]:
            widths, loss, norm = step(name, v_t, sim_tokens=8, distill=False)
            per_layer = [round(v_t * m) for m in (24, 16)]
            assert widths == per_layer or bench.ROWS[name][1] == "global"
            assert sum(widths) == (round(v_t * 40) if bench.ROWS[name][1] == "global"
                                   else sum(per_layer))
            assert math.isfinite(loss) and norm > 0
            losses += [float(loss)] if v_t == 1 else []
    assert losses == pytest.approx(losses[:1] * 4, rel=1e-5)  # no step has changed the weights
    _, loss, _ = step("none", 1.0, distill=True)
    assert abs(float(loss) / losses[0] - 1) > 0.01  # there is a teacher


def test_peak_memory_is_the_tasks_own_also_where_the_parent_has_used_more():
    pytest.importorskip("resource")
    model = small(widths=(40_000, 40_000), n_embd=64)
    model.save_pretrained("model")
    weights = sum(p.nbytes for p in model.parameters())  # 41 MB
    torch.ones(100_000_000)  # 400 MB
    peak = bench.peak_memory("cpu", bench.load_and_generate, "model", "cpu", torch.float32, (1, 9), 3)
    assert 0.9 * weights < peak < 3 * weights + 1e8


def test_generation_shows_what_is_reached_of_what_counting_allows(capsys, monkeypatch):
    small(widths=(64, 64)).save_pretrained("dense")
    small(widths=(6, 6)).save_pretrained("pruned")
    monkeypatch.setattr(bench, "peak_memory", lambda device, task, path, *args: 1e6 * len(str(path)))
    main("generation", "pruned", "--dense", "dense", "--rounds", 1, "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:20].strip(): line[20:].split() for line in lines}
    for what in ("prefill, batch 1", "decode, batch 1", "prefill, batch 8", "decode, batch 8"):
        dense, this, ratio, allowed, reached = (float(cell.strip("x%").replace(",", ""))
                                                for cell in rows[what])
        assert ratio == pytest.approx(this / dense, rel=0.02, abs=0.006)  # of the rounding in print
        assert reached == pytest.approx(100 * ratio / allowed, rel=0.02, abs=2) and 1 < allowed < 3
    sizes = [Path(name, "model.safetensors").stat().st_size / 1e6 for name in ("dense", "pruned")]
    assert rows["file size"] == [f"{sizes[0]:.1f}", "MB", f"{sizes[1]:.1f}", "MB",
                                 f"{sizes[1] / sizes[0]:.2f}x"]
    assert rows["peak memory, batch 8"] == ["5.0", "MB", "6.0", "MB", "1.20x"]
    assert "widths 6, 6 are awkward" in lines[-1] and "multiple_of=8" in lines[-1]
    model, idx = GPT.from_pretrained("pruned"), torch.arange(30)[None]
    expected = model(idx)[0]
    assert shrink(model, multiple_of=8).config.mlp_widths == (8, 8)
    torch.testing.assert_close(model(idx)[0], expected)


def test_steps_are_timed_with_and_without_a_teacher(capsys, monkeypatch):
    monkeypatch.setattr(bench, "resource", None)
    small(widths=()).save_pretrained("small")
    main("steps", "--model", "small", "--batch-size", 2, "--block-size", 16, "--rounds", 1,
         "--sim-tokens", 8, "--distill", "--accumulate", 2, "--gradient-checkpointing",
         "--device", "cpu")
    out = capsys.readouterr().out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    names = ["none", "topv", "Global Top_v", "gum", "gum, 8 tokens for the similarity"]
    assert [row[0].strip("| ") for row in rows[2:]] == names + [f"{name}, distilled"
                                                                for name in names]
    assert all(len(row) == 7 for row in rows) and rows[2][1] == "1.00 (1.00)"
    quarter, distilled = (float(cell.split("(")[1].strip(")")) for cell in (rows[6][3], rows[7][1]))
    assert quarter < 1 < distilled
    assert "Peak memory: this system does not say" in out


@pytest.mark.parametrize("words,says", [
    ("generation small", "small --dense"),
    ("generation nowhere", "nowhere"),
    ("generation", "RUN"),
    ("steps --model nowhere", "nowhere config.json"),
    ("steps --rounds 0", "--rounds least"),
    ("steps --compile --gradient-checkpointing", "--compile --gradient-checkpointing together"),
    ("steps --device foo", "--device foo cuda")])
def test_a_mistake_gets_one_line_and_status_2(words, says, capsys):
    small().save_pretrained("small")
    with pytest.raises(SystemExit) as stopped:
        main(*words.split(), *["--device", "cpu"] * ("foo" not in words))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("bench.py: error: ") and all(word in line for word in says.split())
