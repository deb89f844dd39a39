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
    held = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    held += -model.wpe.weight.numel() + 2 * 2 * 16 * 24  # a cache: 2 layers, keys and values
    read, written = bench.least_of_token(full, 1, 20, 8, torch.bfloat16)
    assert read == bench.operations(full, 20)[0] + 2 * 16 * 257 / 20 and written == 2 * held
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


def test_all_memory_is_measured_before_this_process_takes_any(monkeypatch):
    # What it had on a GPU, the process that is measured could not have.
    save("dense", widths=(64, 64))
    save("pruned", widths=(6, 6))
    taken = []
    for name in ("ready", "stepper", "peaks", "peak_memory"):
        def noted(*args, name=name, real=getattr(bench, name)):
            taken.append(name)
            return dict(peak_memory="not known", peaks=(1.0, 1.0)).get(name) or real(*args)
        monkeypatch.setattr(bench, name, noted)
    monkeypatch.setattr(bench, "show_agreement", print)  # it takes long
    flags = "--model dense --batch-size 2 --block-size 16".split()
    for command in (["generation", "pruned", "pruned", "--dense", "dense"], ["steps", *flags],
                    ["report", *flags]):
        taken.clear()
        main(*command, "--rounds", 1)
        first = taken.count("peak_memory")
        assert first == (4 if command[0] == "generation" else 2) < len(taken)
        assert set(taken[:first]) == {"peak_memory"}
    torch.set_flush_denormal(False)


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
    assert "timed as they are" in lines[0]


def test_a_gpu_gets_widths_that_suit_it_and_the_same_function(capsys, monkeypatch):
    assert bench.batches("cpu") == (1, 8) and max(bench.batches("cuda")) > 8
    monkeypatch.setitem(bench.ALIGNED, "cpu", 64)
    monkeypatch.setattr(bench, "peak_memory", lambda *_: 1.0)
    idx = torch.randint(257, (2, 9))
    model = tiny(widths=(70, 6)).float()
    wanted = model(idx)[0]
    ready = bench.ready(model, "cpu", torch.float32)
    assert [block.mlp.c_fc.out_features for block in ready.h] == [128, 64]
    torch.testing.assert_close(ready(idx)[0], wanted)
    save("dense", widths=(640, 640))
    save("pruned", widths=(70, 6))
    main("generation", "pruned", "--dense", "dense", "--rounds", 1)
    out = capsys.readouterr().out
    assert "multiples of 64 with zero neurons" in out and "widths 70, 6 are awkward" in out
    # What is allowed is counted without them.
    dense, pruned = (16 * (4 * 16 * 2 + 2 * m + 257) for m in (1280, 76))
    cache = 2 * 2 * 16 * (64 + 32 / 2)
    (decode,) = (line.split() for line in out.splitlines() if line.startswith("decode, batch 1"))
    most = (dense + cache) / (pruned + cache)
    assert float(decode[-2].strip("x")) == pytest.approx(most, abs=0.01)


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
    assert "0.2 TFLOP/s, a copy 30 GB/s" in out and "gum: this system does not say" in out
    torch.set_flush_denormal(False)


SECTIONS = ("Machine", "Speed in float32", "Memory of a step", "Training", "Whole trainings",
            "Reading and writing", "GPU against CPU")


def report(capsys):
    """The report's sections by title, and the cells of their tables, as numbers."""
    save("small")
    main(*"report --model small --batch-size 2 --block-size 16 --rounds 1".split())
    torch.set_flush_denormal(False)
    head, *parts = re.split(r"^## ", capsys.readouterr().out, flags=re.MULTILINE)
    assert "`python -m results.bench report --model small --batch-size 2" in head
    return dict(part.split("\n", 1) for part in parts)


def cells(part):
    """The rows of its table, below the head: {label: cells}."""
    _, _, *rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line[:1] == "|"]
    return {label: of_row for label, *of_row in rows}


def test_the_report_has_a_number_wherever_one_belongs(capsys, monkeypatch):
    monkeypatch.setattr(bench, "peak_memory", lambda *_: 3e9)
    monkeypatch.setattr(bench, "peaks", lambda device, dtype: (2e11, 3e10))
    parts = report(capsys)
    assert tuple(parts) == SECTIONS
    assert f"torch {torch.__version__}" in parts["Machine"]
    assert f"{torch.get_num_threads()} threads" in parts["Machine"]
    assert "0.2 TFLOP/s, a copy 30 GB/s" in parts["Speed in float32"]
    assert "none 3 GB, gum 3 GB" in parts["Memory of a step"]
    assert re.search(r"makes [\d.]+% of the TFLOP/s", parts["Training"])
    training, reading = cells(parts["Training"]), cells(parts["Reading and writing"])
    assert [*training] == ["none", "topv", "gum", "none, distilled", "topv, distilled",
                           "gum, distilled"]
    assert [*reading] == [f"{what}, batch {B}" for B in (1, 8) for what in ("prefill", "decode")]
    for row in (*training.values(), *(row[1:] for row in reading.values())):
        assert len(row) in (6, 4)
        assert all(re.fullmatch(r"\d+\.\d\d \(\d+\.\d\d\)", cell) for cell in row)
    whole = cells(parts["Whole trainings"])
    assert [*whole] == ["topv", "gum", "obs"]
    assert all(re.fullmatch(r"\d+\.\d\d", cell) for row in whole.values() for cell in row)
    (differences,) = cells(parts["GPU against CPU"]).values()
    assert "no GPU" in parts["GPU against CPU"]
    assert float(differences[0]) < 1e-4 and re.fullmatch(r"\d+ of 512", differences[1])


@pytest.mark.parametrize("broken, section", [
    ("show_machine", 0), ("peaks", 1), ("peak_of_steps", None), ("stepper", 3),
    ("time_training", 4), ("in_turns", 5), ("pruned_by_gum", 6)])
def test_a_part_of_the_report_that_fails_does_not_end_it(broken, section, capsys, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(bench, "peak_memory", lambda *_: "out of memory" if section is None else 1)
    monkeypatch.setattr(bench, "peaks", lambda device, dtype: (2e11, 3e10))
    if section is not None:
        monkeypatch.setattr(bench, broken, fails)
    if broken != "pruned_by_gum":
        taught = bench.pruned_by_gum("cpu", torch.float32, 2)
        monkeypatch.setattr(bench, "pruned_by_gum", lambda *_: taught)
    parts = report(capsys)
    assert tuple(parts) == SECTIONS
    for title, part in parts.items():
        assert ("out of memory" in part) == (title == SECTIONS[2 if section is None else section])
        assert "failed" not in part


def test_a_step_that_fails_is_words_in_its_cells(capsys, monkeypatch):
    monkeypatch.setattr(bench, "resource", None)
    monkeypatch.setattr(bench, "peaks", lambda device, dtype: (2e11, 3e10))
    real = bench.stepper

    def stepper(*args):
        step = real(*args)

        def some(name, v_t, sim_tokens=None, distill=0):
            if (name, v_t) == ("gum", 0.5):
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            if distill and name == "topv":
                raise KeyError("a | b")
            return step(name, v_t, sim_tokens, distill)

        return some

    monkeypatch.setattr(bench, "stepper", stepper)
    save("small")
    main(*"steps --model small --batch-size 2 --block-size 16 --rounds 1 --distill".split())
    rows = cells(capsys.readouterr().out)
    words = [cell == "out of memory" for cell in rows["gum"]]
    assert words == [False, True, False, False, True, True]
    assert set(rows["topv, distilled"]) == {"failed (KeyError: 'a / b')"}
    assert all(re.match(r"\d", cell) for cell in rows["topv"] + rows["Global Top_v, distilled"])
    torch.set_flush_denormal(False)


def test_too_little_memory_even_for_plain_steps_is_told_in_a_line(capsys, monkeypatch):
    def stepper(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 GB")

    monkeypatch.setattr(bench, "stepper", stepper)
    monkeypatch.setattr(bench, "peak_memory", lambda *_: "out of memory")
    save("small")
    with pytest.raises(SystemExit) as ended:
        main(*"steps --model small --batch-size 2 --block-size 16 --rounds 1".split())
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "bench.py steps: error: out of memory: DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 1 GB")
    torch.set_flush_denormal(False)


def test_no_step_measures_the_similarity_of_more_tokens_than_it_has():
    config, speeds = GPTConfig(n_layer=1, n_embd=8, n_head=1, vocab_size=16), (1.0, 1.0)
    floors = [bench.floor(("gum", 1.0, tokens, False), config, (2, 8), speeds)
              for tokens in (4, 16, 64, None)]
    assert floors[0] < floors[1] == floors[2] == floors[3]


def test_narrowed_shapes_keep_the_share_asked_for_and_fall_as_gums_do():
    for share in (0.25, 0.1):
        alike, falling = (bench.narrowed(GPTConfig(), share, how).mlp_widths for how in (1, 0))
        assert set(alike) == {round(share * 3072)} and list(falling) == sorted(falling)[::-1]
        assert sum(falling) == pytest.approx(share * 12 * 3072, abs=6) and falling[0] <= 3072
        assert falling[0] / falling[-1] == pytest.approx(20, rel=0.02)


def test_whole_trainings_end_at_the_leftover_and_are_told_as_ratios(capsys, monkeypatch):
    tiny(widths=(24, 16)).save_pretrained("shape")
    left, real = [], bench.losses_of

    def noted(model, pruner, shape, how):
        losses = real(model, pruner, shape, how)
        kept = [mlp.c_fc.out_features if mlp.keep is None else len(mlp.keep) for mlp in pruner.mlps]
        left.append((pruner.method.name, sum(kept), len(losses)))
        return losses

    monkeypatch.setattr(bench, "losses_of", noted)
    monkeypatch.setattr(bench, "timed", lambda task, _: (task(), left[-1][1])[::-1])
    main("trainings", "--model", "shape", "--steps", 20, "--rounds", 2, "--methods", "topv,obs",
         "--batch-size", 2, "--block-size", 8)
    assert left == [("Dense", 40, 3)] + 2 * [
        ("Dense", 40, 20), ("Top_v", 10, 20), ("Top_v", 4, 20), ("OBS", 10, 20), ("OBS", 4, 20)]
    assert cells(capsys.readouterr().out) == dict(topv=["0.25", "0.10"], obs=["0.25", "0.10"])
    torch.set_flush_denormal(False)


def test_devices_are_compared_from_the_same_start(capsys):
    bench.show_agreement("cpu:0")  # as if it were another
    rows = cells(capsys.readouterr().out)
    losses, kept = rows["float32, cpu:0 against CPU"]
    assert float(losses) < 1e-4 and kept == "0 of 512" and len(rows) == 2
    losses, kept = bench.pruned_by_gum("cpu", torch.float64)
    assert losses.shape == (20,) and losses[-1] < losses[0] - 1  # it has learned
    assert kept.sum() == 512 and len({int(layer.sum()) for layer in kept.split(512)}) > 1  # GUM's


def test_differences_between_devices_are_counted(capsys, monkeypatch):
    found = {"cpu": (torch.tensor([3.0, 2.0]), torch.tensor([True, True, False, False])),
             "cuda": (torch.tensor([3.5, 2.25]), torch.tensor([True, False, False, True]))}
    monkeypatch.setattr(bench, "pruned_by_gum", lambda device, dtype: found[device])
    bench.show_agreement("cuda")
    rows = cells(capsys.readouterr().out)
    assert rows["float32, cuda against CPU"] == ["5.0e-01", "1 of 2"]
    assert rows["CPU, float32 against float64"] == ["0.0e+00", "0 of 2"]


@pytest.mark.parametrize("words,says", [
    ("generation small", "small --dense"), ("generation nowhere", "nowhere"), ("generation", "RUN"),
    ("trainings --methods gum,ibs", "ibs"), ("trainings --methods none", "none is not"),
    ("steps --model nowhere", "nowhere config.json"),
    ("steps --rounds 0", "--rounds above"),
    ("report --model nowhere", "nowhere config.json"),
    ("steps --compile --gradient-checkpointing", "--compile --gradient-checkpointing together")])
def test_a_mistake_gets_one_line_and_status_2(words, says, capsys):
    save("small")
    assert pytest.raises(SystemExit, main, *words.split()).value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(r"bench.py \w+: error: ", line) and all(word in line for word in says.split())
