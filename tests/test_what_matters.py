"""The study: which runs it takes and in which order, that none is made twice, and what it says."""

import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock, Timeout
from test_train import SMALL, save_small

import data
import measure
import results.what_matters as study
import train
from model import GPT
from results.runs import read_run

ROOT = Path(__file__).parents[1]
ARGS = SimpleNamespace(out="out", model="tiny", dataset="wikitext", data_path=None, data=None,
                       only=None, list=None, processes=60)


class AtOnce:
    """A pool that does all at once, in this process."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except RuntimeError as error:
            future.set_exception(error)
        return future


def loss_of(flags):
    """A made-up world: each method has a best rate, lambda and end, GUM the lowest loss."""
    best = dict(none=1e-3, random=4e-3, topv=4e-3, gum=4e-3).get(flags["method"], 2e-3)
    loss = 1 + abs(math.log(flags["lr"] / best)) / 10 if "lr" in flags else 1
    loss += dict(random=0.3, topv=0.2, gum=0.1).get(flags["method"], 0)
    loss += abs(math.log((flags.get("lambda_gum") or 1) / 100)) / 100
    return loss + 0.01 * (flags.get("seed", 0) % 5)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def made(monkeypatch):
    """The flags of all runs, in the order in which they were made, none of them really."""
    flags_of_all = []

    def make_run(flags, folder):
        assert flags not in flags_of_all
        for name in ("model", "teacher"):  # what it starts from is there
            if Path(flags.get(name) or "").parent == Path("out"):
                assert Path(flags[name]).is_dir()
        flags_of_all.append(flags)
        folder.mkdir(parents=True)
        (folder / "metrics.json").touch()
        if flags.get("tau") == "fails":
            raise RuntimeError("see its log")
        left = flags.get("leftover", 1.0) + 0.2 * (flags.get("lambda_mvp") == 2.0)
        return dict.fromkeys(study.COLUMNS) | dict(
            command=study.command(flags), loss=loss_of(flags), leftover=left, seconds=1.0,
            widths="100,50,30,25", data="0" * 8)

    monkeypatch.setattr(study, "make_run", make_run)
    monkeypatch.setattr(study, "new_model", lambda path: path.mkdir())
    monkeypatch.setattr(study, "ProcessPoolExecutor", AtOnce)
    monkeypatch.setattr(study, "CSV", Path("what-matters.csv"))
    return flags_of_all


def make(**how):
    study.make(SimpleNamespace(**vars(ARGS) | how))


def test_every_run_is_made_once_after_those_that_it_depends_on(made, capsys):
    make()
    assert made[0] == dict(method="none", steps=6000, seed=0, out="out/dense0")
    commands = [study.command(flags) for flags in made]
    assert len({*commands}) == len(made) > 500
    assert {*commands} == {*study.read_rows()}
    make()  # all there is
    assert capsys.readouterr().out == "nothing is left to make\n"
    assert len(commands) == len(made)
    assert {path.name.rsplit("-seed")[0] for path in Path("out").iterdir()} == {
        ".lock", "dense0", "dense1", "dense2", "neurons-100,50,30,25", "scratch-100,50,30,25",
        "dense6x192", "new-6x192", "dense-e2e", "copies-2"}


def test_tables_are_made_with_what_the_tuning_runs_have_chosen(made):
    make(only="^methods$")
    runs = [flags for flags in made if flags.get("seed") in range(5) and "leftover" in flags]
    assert {(flags["method"], flags["lr"]) for flags in runs} == {
        ("magnitude", 2e-3), ("random", 4e-3), ("topv", 4e-3), ("soft", 2e-3), ("gum", 4e-3),
        ("obs", 2e-3)}
    assert {flags["lambda_gum"] for flags in runs if flags["method"] == "gum"} == {100.0}
    # With 2 it leaves more than it should, whatever its loss.
    assert {flags["lambda_mvp"] for flags in runs if flags["method"] == "soft"} == {20.0}
    assert len(runs) == 7 * 4 * 5
    tuning = [flags for flags in made if flags.get("seed") == study.TUNING]
    rates = {leftover: {flags["lr"] for flags in tuning if flags.get("leftover") == leftover}
             for leftover in (0.1, 0.25, 0.5, 0.75, None)}  # None: of the dense model
    low = {1e-3, 2e-3, 4e-3, 8e-3}
    assert rates[0.1] == rates[0.25] == low
    assert rates[0.5] == rates[0.75] == low - {8e-3} | {5e-4}
    assert rates[None] == low | {5e-4}


def test_a_model_of_another_shape_takes_the_rest_of_the_dense_one(made):
    make(only="^other-shape$")
    assert [flags["out"] for flags in made[:2]] == ["out/dense0", "out/dense6x192"]
    assert made[1]["model"] == "out/new-6x192-seed0" and len(made) > 20
    assert {flags["model"] for flags in made[2:]} == {"out/dense6x192"}


def test_a_dense_model_that_knows_the_data_is_fine_tuned_before_it_is_pruned(made):
    make(only="^e2e-tuned$")
    dense, knows, *others = made
    assert dense["out"] == "out/dense0" == knows["model"] and "dataset" not in dense
    assert knows["method"] == "none" and knows["out"] == "out/dense-e2e"
    assert {flags["model"] for flags in others} == {"out/dense-e2e"} and len(others) > 40
    assert {flags["dataset"] for flags in [knows, *others]} == {"e2e"}
    assert {flags["batch_size"] for flags in [knows, *others]} == {8}


def test_where_pruning_begins_and_ends_each_schedule_is_tuned_by_itself(made):
    make(only="^surgeon$")
    when = {(flags.get("prune_from"), flags.get("prune_until")) for flags in made
            if flags.get("seed") == study.TUNING and flags["method"] == "topv"}
    # Of which only the end is given has that of 30 %.
    assert when == {(None, None), (None, 0.3), (0.0, 0.1)}


def test_only_one_question_is_made_if_one_is_asked_for_and_listing_makes_nothing(made, capsys):
    make(only="^memory$")
    assert {flags["method"] for flags in made} == {"none", "gum"}
    assert {flags.get("lambda_sim") for flags in made} == {None, 0.01, 0.1, 0.5, 0.99}
    number = len(made)
    make(list=True, only="^where$")
    lines = capsys.readouterr().out.splitlines()
    assert len(made) == number and all(line.startswith("python train.py ") for line in lines)
    assert sum("--scope 100,50,30,25" in line for line in lines) == 12  # three methods, four rates


def test_what_fails_is_told_and_all_else_is_made(made, monkeypatch, capsys):
    monkeypatch.setattr(study, "RANDOM", study.RANDOM | dict(tau="fails"))
    with pytest.raises(ValueError, match="8 runs failed"):
        make(only="^where$")
    assert capsys.readouterr().err.count("--tau fails: RuntimeError see its log") == 8
    assert any(flags["method"] == "magnitude" and "scope" in flags for flags in made)


def test_a_row_of_other_data_is_refused_and_none_is_lost(made, monkeypatch):
    make(only="^memory$")
    before, make_run = study.read_rows(), study.make_run
    monkeypatch.setattr(study, "make_run", lambda *how: make_run(*how) | dict(data="1" * 8))
    with pytest.raises(ValueError, match="stdlib is other data here"):
        make(only="^uniqueness$")
    assert study.read_rows() == before


@pytest.mark.parametrize("damage", [
    b"", b"\xff\xfe", b"command,loss\na,b\n", b"command,loss\na,1\n",
    ",".join((*study.COLUMNS, "more")).encode(), ",".join(study.COLUMNS).encode() + b"\na,1.0\n"])
def test_rows_that_are_no_longer_what_was_written_are_told(damage, made):
    study.CSV.write_bytes(damage)
    with pytest.raises(ValueError, match="what-matters.csv is damaged"):
        make()
    assert study.CSV.read_bytes() == damage and not made


def test_the_table_is_locked_while_a_row_is_added(made, monkeypatch):
    write_rows = study.write_rows

    def write(rows):
        with pytest.raises(Timeout):
            FileLock("what-matters.lock", timeout=0).acquire()
        write_rows(rows)

    monkeypatch.setattr(study, "write_rows", write)
    make(only="^memory$")
    assert made


def test_rows_that_another_study_makes_meanwhile_are_kept(made, monkeypatch):
    make_run = study.make_run

    def make_two(flags, folder):
        other = make_run(flags, folder) | dict(command=f"{study.command(flags)} --tau 1.0")
        study.write_rows(study.read_rows() | {other["command"]: other})
        return other | dict(command=study.command(flags))

    monkeypatch.setattr(study, "make_run", make_two)
    make(only="^memory$")
    assert sum("--tau 1.0" in name for name in study.read_rows()) == len(made)


def test_a_listed_command_names_its_data_and_data_that_are_missing_are_told(made, capsys):
    with pytest.raises(ValueError, match="--data hub is no folder"):
        make(list=True, data="hub")
    Path("hub").mkdir()
    make(only="^memory$")  # and with it the dense model
    capsys.readouterr()
    make(list=True, only="^e2e$", data="hub")
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line.endswith(" --data-path hub/tuetschek/e2e_nlg") for line in lines)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_what_ends_a_job_ends_it_as_ctrl_c_does(name, made, monkeypatch):
    if not hasattr(signal, name):
        pytest.skip("not on Windows")
    one, make_run = getattr(signal, name), study.make_run
    usual = signal.signal(one, before := lambda *_: pytest.fail("it was not told"))

    def told_to_end(flags, folder):
        os.kill(os.getpid(), one)
        return make_run(flags, folder)

    monkeypatch.setattr(study, "make_run", told_to_end)
    try:
        with pytest.raises(KeyboardInterrupt):
            make()
        assert signal.getsignal(one) is before and not made
    finally:
        signal.signal(one, usual)


POOL = """import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from results.what_matters import begin_process

if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn"), begin_process) as pool:
        pool.submit(time.sleep, 0).result()
        pool.submit(time.sleep, 1000)
        print(*(process.pid for process in active_children()), flush=True)
"""


def goes_on(process):
    """Whether it is there, and more than an end that nobody has asked for."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], stdout=subprocess.PIPE,
                           text=True)
    return found.stdout.strip()[:1] not in ("", "Z")


@pytest.mark.skipif(not shutil.which("ps"), reason="no ps, which tells what goes on")
def test_a_killed_studys_processes_end_with_it():
    Path("pool.py").write_text(POOL)
    with subprocess.Popen([sys.executable, "pool.py"], stdout=subprocess.PIPE, text=True,
                          env=os.environ | dict(PYTHONPATH=str(ROOT))) as parent:
        worker = int(parent.stdout.readline())
        assert goes_on(worker)
        parent.kill()
    until = time.monotonic() + 20
    while goes_on(worker):
        if time.monotonic() > until:
            os.kill(worker, signal.SIGKILL)
            pytest.fail("it goes on")
        time.sleep(0.1)


IDLE = """import signal, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from results.what_matters import begin_process, stopping

if __name__ == "__main__":
    with ProcessPoolExecutor(2, get_context("spawn"), begin_process) as pool, stopping():
        list(pool.map(time.sleep, (0.5, 0.5)))  # so that both are there
        signal.raise_signal(signal.SIGINT)
"""


def test_processes_that_make_nothing_end_without_a_word_on_ctrl_c():
    Path("pool.py").write_text(IDLE)
    ended = subprocess.run([sys.executable, "pool.py"], stderr=subprocess.PIPE, text=True,
                           env=os.environ | dict(PYTHONPATH=str(ROOT)), timeout=100)
    assert ended.stderr.count("Traceback") == ended.stderr.count("KeyboardInterrupt") == 1
    assert "Process Spawn" not in ended.stderr  # only the one that was told


@pytest.mark.parametrize("only, says", [("wheer", "matches none of where, when"),
                                        ("(", "no regular expression")])
def test_a_question_that_is_none_is_told(only, says, made):
    with pytest.raises(ValueError, match=says):
        make(only=only)
    assert not made


def test_a_rate_with_which_the_loss_is_no_number_is_not_chosen():
    save_small("small")
    words = f"{SMALL} --method topv --leftover 0.25 --steps 20 --lr 1e12"
    flags = {name: value for name, value in vars(train.parse(words.split())).items()
             if value is not None}
    assert study.make_run(flags, Path("made"))["loss"] == math.inf


def test_a_run_without_a_loss_keeps_none_of_the_others_from_being_made(made, monkeypatch):
    make_run = study.make_run

    def make_some(flags, folder):
        row = make_run(flags, folder)
        return row | dict(loss=math.inf, data=None) if flags.get("lr") == 1e-3 else row

    monkeypatch.setattr(study, "make_run", make_some)
    make(only="^(memory|toysql)$")
    count = len(made)
    assert sum(row["loss"] == math.inf for row in study.read_rows().values()) > 2
    make(only="^(memory|toysql)$")
    assert len(made) == count


def test_dense_models_that_are_gone_are_made_again_only_for_runs_that_take_them(made):
    make(only="^(where|other-models|other-shape)$")
    rows = study.read_rows()
    gone = next(name for name in rows if "scope" in name and "model out/dense0" in name)
    new = next(name for name in rows if "model out/neurons" in name and "seed 3" in name)
    for row in gone, new:
        shutil.rmtree("out")
        made.clear()
        study.write_rows({name: rows[name] for name in rows if name != row})
        make(only="^(where|other-models|other-shape)$")
        assert [flags.get("out") for flags in made] == ["out/dense0", None]
        assert study.command(made[1]) == row


def test_a_dense_model_that_is_made_again_and_is_another_is_told(made, monkeypatch, capsys):
    make(only="^memory$")
    rows, usual = study.read_rows(), loss_of
    for change in 0.0, 0.25:
        monkeypatch.setitem(
            globals(), "loss_of", lambda flags: usual(flags) + change * ("out" in flags))
        shutil.rmtree("out")
        made.clear()
        study.write_rows(dict(list(rows.items())[:-1]))
        capsys.readouterr()
        make(only="^memory$")
        assert ("6000 is another model than that which others in what-matters.csv are from: "
                "1.296052, it was 1.046052" in capsys.readouterr().out) == (change > 0)


def test_a_dense_model_without_a_loss_is_a_failure():
    save_small("small")
    words = f"{SMALL} --method none --steps 20 --lr 1e12 --out dense"
    flags = {name: value for name, value in vars(train.parse(words.split())).items()
             if value is not None}
    with pytest.raises(RuntimeError, match="see dense.log"):
        study.make_run(flags, Path("dense"))


def test_a_commands_defaults_are_left_out_so_that_no_run_has_two():
    gum = dict(method="gum", seed=0, lambda_gum=10.0, scope="global", prune_until=0.7, distill=None)
    assert study.command(gum) == "python train.py --method gum"
    assert study.command(gum | dict(data_path="x")) == study.command(gum)
    taught = gum | dict(distill=True)
    assert study.command(taught) == "python train.py --method gum --distill"
    samsum = taught | dict(dataset="samsum", model="x")  # its default is another then
    assert study.command(samsum).endswith(" --dataset samsum --lambda-gum 10.0 --distill")
    for flags in (gum, taught, samsum, dict(method="soft", scope=None, lambda_mvp=20.0)):
        words = shlex.split(study.command(flags))[2:]
        there, here = train.resolve(train.parse(words)), SimpleNamespace(**flags)
        assert all(getattr(there, name) == value for name, value in vars(here).items()
                   if value is not None)


def test_a_row_has_what_its_command_gives_and_what_was_left_when_pruning_ended():
    save_small("small")
    words = f"{SMALL} --method gum --leftover 0.25 --prune-until 1.0 --steps 20"
    flags = {name: value for name, value in vars(train.parse(words.split())).items()
             if value is not None}
    row = study.make_run(flags, Path("made"))
    metrics, model = read_run("made").metrics, GPT.from_pretrained("made")
    own = train.run(train.parse([*words.split(), "--out", "own"]))
    assert row["loss"] == metrics["result"]["val_loss"] == own["result"]["val_loss"]
    assert row["widths"] == ",".join(map(str, model.config.mlp_widths)) and row["leftover"] == 0.25
    # v is reached in the last step, whose learning rate is 0: so all measures are the final ones'.
    examples = data.load("stdlib", "train", 257, metrics["block_size"])
    sensitivity, Cs, tokens = measure.activation_statistics(model, examples, first=512)
    values = dict(sensitivity=sensitivity) | measure.redundancy(Cs, tokens)[0]
    for name, value in values.items():
        assert row[name] == pytest.approx(value, rel=1e-4)
        assert row[name + "_pruned"] == pytest.approx(value, rel=1e-4)
    assert row["loss_pruned"] == pytest.approx(row["loss"], rel=0.1)  # of some validation data


def test_new_models_have_the_widths_and_what_is_not_new_of_the_dense_one():
    save_small("dense0")
    for kind in ("neurons", "scratch"):
        path = Path(f"{kind}-5,60-seed3")
        study.new_model(path)
        old, new = GPT.from_pretrained("dense0"), GPT.from_pretrained(path)
        assert new.config.mlp_widths == (5, 60)
        kept = {name: torch.equal(value, new.state_dict()[name])
                for name, value in old.state_dict().items() if ".mlp." not in name}
        assert all(kept.values()) == (kind == "neurons")
    study.new_model(Path("new-3x64-seed0"))
    new = GPT.from_pretrained("new-3x64-seed0")
    assert new.config.mlp_widths == (256,) * 3 and new.wte.weight.shape == (257, 64)
    assert new.config.n_head == 2


@pytest.mark.parametrize("copies", [2, 3])
def test_a_model_with_copies_of_every_neuron_computes_the_same(copies):
    save_small("dense0")
    study.new_model(Path(f"copies-{copies}-seed0"))
    old, new = (GPT.from_pretrained(one).double() for one in ("dense0", f"copies-{copies}-seed0"))
    assert new.config.mlp_widths == tuple(copies * m for m in old.config.mlp_widths)
    idx = torch.arange(40).view(2, 20)
    torch.testing.assert_close(new(idx)[0], old(idx)[0], rtol=0, atol=1e-6)  # weights are float32
    for here, there in zip(new.h, old.h):
        for w2 in here.mlp.c_proj.weight.chunk(copies, dim=1):  # [d, m]
            share = (w2 / there.mlp.c_proj.weight).mean(0)
            assert share.min() >= 0.5 / (1.5 * copies - 1) and share.std() > 0.05
            torch.testing.assert_close(w2, share * there.mlp.c_proj.weight)
        for w1, b1 in zip(here.mlp.c_fc.weight.chunk(copies), here.mlp.c_fc.bias.chunk(copies)):
            assert torch.equal(w1, there.mlp.c_fc.weight) and torch.equal(b1, there.mlp.c_fc.bias)


def test_a_larger_penalty_stands_beside_uniqueness_without_any(made):
    make(only="^uniqueness-twice$")
    runs = [flags for flags in made if flags.get("seed") == 1]
    assert {flags["model"] for flags in runs} == {"out/copies-2-seed0"}
    alone = [flags for flags in runs if flags.get("lambda_mvp", 2.0) > 2.0]
    assert {flags["lambda_mvp"] for flags in alone} == {4.0, 8.0, 16.0}
    assert all(flags["scope"] == "global" and flags["leftover"] == 0.05
               and not flags.get("lambda_gum") for flags in alone)


# What it says.


def told(values, pairs=()):
    """A study of one question with rows of these losses {row: {column: [loss of each seed]}}."""
    known, table = {}, {}
    for row, columns in values.items():
        for column, losses in columns.items():
            name = f"{row}/{column}"
            for seed, loss in enumerate(losses):
                flags = dict(method="gum", leftover=0.1, teacher=name, seed=seed)
                known[study.command(flags)] = dict(loss=loss, leftover=0.1)
            table.setdefault(row, {})[column] = lambda seed, name=name: dict(
                method="gum", leftover=0.1, teacher=name, seed=seed)
    return study.Study(known, ARGS), study.Question("?", table, pairs)


def test_a_table_has_means_and_spreads_and_says_what_is_missing_and_what_was_left():
    one = told({"GUM": {"10%": [1.5, 1.6, 1.7, 1.8, 1.9], "50%": [1.0]}, "Top_v": {"10%": [2, 4]}})
    one[0].known[next(name for name in one[0].known if "Top_v" in name)]["leftover"] = 0.5
    assert study.table_of(*one) == (
        "|  | 10% | 50% |\n| --- | --- | --- |\n"
        "| GUM | 1.7000 ± 0.1581 | 1.0000 ± 0.0000 (1) |\n"
        "| Top_v | 3.0000 ± 1.4142 (2) at 0.300 |  |")


def test_differences_are_of_the_same_seeds_with_students_interval():
    pairs = (("GUM", "Top_v"), (("GUM", "a"), ("GUM", "b")))
    losses = {"GUM": {"a": [1.0, 2.0, 3.0], "b": [1.5, 2.4, 3.6, 9.0]}, "Top_v": {"a": [1.1, 2.1]}}
    lines = study.differences_of(*told(losses, pairs)).splitlines()[2:]
    # -0.5, -0.4, -0.6: their mean's standard error is 0.1 / 3^(1/2), Student's t 4.303.
    assert lines == ["| GUM − Top_v, a | -0.1000 | [-0.1000, -0.1000] | 2 |",
                     "| GUM, a − GUM, b | -0.5000 | [-0.7484, -0.2516] | 3 |"]


def test_predictors_are_rank_correlations_with_the_final_loss():
    rows = [dict(loss=loss, sensitivity=1 / loss, sensitivity_pruned=loss**3, uniqueness=u,
                 uniqueness_pruned=None, span_uniqueness=0.5 if loss > 2 else loss,
                 span_uniqueness_pruned=loss, loss_pruned=-loss)
            for loss, u in zip((1.0, 2.0, 3.0, 4.0), (2, 1, 4, 3))]
    lines = study.predictors(rows).splitlines()[2:]
    assert [line.split("|")[2:4] for line in lines] == [
        [" +1.00 (4) ", " -1.00 (4) "], ["  ", " +0.60 (4) "],
        [" +1.00 (4) ", " -0.74 (4) "], [" -1.00 (4) ", "  "]]


@pytest.fixture
def kept(monkeypatch):
    """The study's own rows and page, copied."""
    if not study.CSV.exists():
        pytest.skip("no run of the study is kept")
    for file in (study.CSV, study.CSV.with_suffix(".md")):
        shutil.copy(file, file.name)
    monkeypatch.setattr(study, "CSV", Path("what-matters.csv"))


def report(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["what_matters", "report", *flags])
    study.main()


def test_the_page_has_the_tables_that_its_rows_give(kept, monkeypatch):
    before = Path("what-matters.md").read_bytes()
    report(monkeypatch)
    assert Path("what-matters.md").read_bytes() == before


def test_predictors_have_each_run_of_tiny_once_and_no_other_models(kept, monkeypatch, capsys):
    found = []
    monkeypatch.setattr(study, "draw_figures", lambda _, __, at_10: found.extend(at_10))
    report(monkeypatch)
    assert len({row["loss"] for row in found}) == len(found) > 50
    unique = {study.label_of(row) for row in found if "--lambda-gum 100" in row["command"]}
    assert unique == {"Top_v", "GUM"}
    rows = study.read_rows()
    args = SimpleNamespace(**vars(ARGS) | dict(model="gpt2", only="^when$"))
    while wanted := study.wanted_by(args, rows):
        rows |= {name: dict.fromkeys(study.COLUMNS) | dict(
            command=name, loss=1.0, leftover=0.1, widths="1", data="0") for name in wanted}
    study.write_rows(rows)
    capsys.readouterr()
    report(monkeypatch, "--model", "gpt2")
    out = capsys.readouterr().out
    assert "When the leftover is reached" in out and "| measure |" not in out


def test_figures_have_a_point_for_every_run(made, monkeypatch):
    figures = {}
    make(only="^(methods|when|uniqueness)$")
    for row in (rows := study.read_rows()).values():
        row |= {f"{name}_pruned": 0.5 for name in ("sensitivity", "uniqueness", "span_uniqueness")}
    monkeypatch.setattr(study, "draw", lambda path, panels, *_, **__: figures.update(
        {path.name: panels}))
    one, at_10 = study.Study(rows, ARGS), [row for name, row in rows.items() if "0.1" in name]
    study.draw_figures(one, dict(one.questions()), at_10)
    assert set(figures) == {"what-matters", "predictors"}  # all of one length, so far
    by_leftover, by_end, by_weight = figures["what-matters"].values()
    points = [(curve, x) for curve, xs, _ in by_leftover for x in xs]
    assert sorted(points) == sorted([(name, v) for name in study.METHODS for v in study.LEFTOVERS
                                     for _ in range(5)])
    assert {x for _, (x,), _ in by_end} == {0.15, 0.3, 0.5, 0.7}
    assert {(curve, x) for curve, (x,), _ in by_weight} == {
        (scope, x) for scope in ("each layer", "all layers") for x in (0, 1, 3, 10, 30, 100)}
    assert all(len(curves) == len(at_10) for curves in figures["predictors"].values())
