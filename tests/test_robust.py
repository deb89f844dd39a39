"""What happens around a run: its data change, its files are damaged, the disk is full, nobody
reads, somebody is impatient. One line says so, and nothing is lost."""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from test_measure import fake, main
from test_train import (SMALL, STEP, assert_fails, assert_same_run, assert_same_weights, contents,
                        hook, killed_run, load_once, program, run, save_small)

import data
import measure
import train
from model import GPT
from results import runs
from results.compare import draw_training
from results.tokenizer import write_tokenizer

ROOT = Path(__file__).parents[1]
FLAGS = "--method topv --out run"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Every test runs next to the model `small`; data are read anew where they may change."""
    monkeypatch.chdir(tmp_path)
    real = data.load
    monkeypatch.setattr(data, "load", lambda name, *args: (
        real if name == "e2e" else load_once)(name, *args))
    measure.load.cache_clear()
    measure.measure.cache_clear()
    monkeypatch.setattr(train, "draw_training", lambda *_: None)
    save_small("small")


def refused(capsys, *words):
    """The last line of measure.py, which ends with status 2."""
    assert pytest.raises(SystemExit, main, *words).value.code == 2
    line = capsys.readouterr().err.strip().rpartition("\n")[2]
    assert re.match(r"measure.py \w+: error: ", line)
    return line


# Other data.

E2E = "--dataset e2e --block-size 64 --batch-size 2 --steps 4"


def write_e2e(folder, text):
    """Two pairs to train on, one to validate on; returns their files by their split."""
    files = {}
    for split, rows in ("train", 2), ("validation", 1):
        lines = [dict(meaning_representation=f"{split}[{n}]", human_reference=f"{text} {n} ü")
                 for n in range(rows)]
        files[split] = Path(folder, split, "0.jsonl")
        files[split].parent.mkdir(parents=True, exist_ok=True)
        files[split].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


def test_metrics_and_the_first_line_tell_the_data(capsys):
    files = write_e2e("data", "Aromi")
    metrics = run(f"{E2E} --data-path data --out run")
    first, about = capsys.readouterr().err.splitlines()[0], metrics["data"]
    assert first.startswith(f"data: {Path('data').resolve()}; ") and len(about) == 2
    assert json.loads(Path("run/metrics.json").read_text())["data"] == about
    for split, rows in ("train", 2), ("validation", 1):
        name, content = f"{split}/0.jsonl", files[split].read_bytes()
        sha256 = hashlib.sha256(f"{name} {len(content)} ".encode() + content).hexdigest()
        tokens = rows * len(f"{split}[0]\nAromi 0 ü\0".encode())  # the last is the end of text
        assert about[split] == dict(source=str(Path("data").resolve()), sha256=sha256, rows=rows,
                                    files={name: len(content)}, tokens=tokens)
        assert f"; {split}: {tokens} tokens, sha256 {sha256[:8]}" in first


def test_an_interrupted_run_whose_data_have_changed_is_refused(capsys):
    flags = f"{E2E} --data-path data --out run --checkpoint-every 2"
    write_e2e("data", "Aromi")
    killed_run("before the first checkpoint", flags)
    before = contents("run")
    write_e2e("data", "Zizzi")
    assert_fails(capsys, f"{SMALL} {flags} --resume",
                 f"run was made with other data|split, {os.getcwd()}/data, has changed since|move")
    assert contents("run") == before
    write_e2e("data", "Aromi")
    Path("data").rename("elsewhere")  # where they are does not matter
    run(f"{flags} --resume --data-path elsewhere")


@pytest.mark.parametrize("flags", ["--method topv", "--method none --distill"])
def test_a_dense_run_of_other_data_is_refused_but_not_of_the_same_elsewhere(flags, capsys):
    for folder, text in ("one", "Aromi"), ("same", "Aromi"), ("two", "Zizzi"):
        write_e2e(folder, text)
    assert program(capsys, f"{E2E} --device cpu --method none --data-path one")[0] == 0
    (dense,) = Path("out").iterdir()
    before = contents(dense)
    flags = f"{E2E} {flags} --out run --device cpu --data-path"
    assert_fails(capsys, f"{flags} two", f"{dense} was made with other data|/one|/two")
    assert not Path("run").exists() and contents(dense) == before
    assert program(capsys, f"{flags} same")[0] == 0 and contents(dense) == before


def test_a_run_is_measured_on_its_own_data_or_others_that_are_named(capsys):
    write_e2e("data", "Aromi")
    run(f"{E2E} --data-path data --out run")
    files = write_e2e("data", "Other")
    assert re.search("run was made with other data.*/data, has changed since .*: to measure it on "
                     "these, add --dataset e2e$", refused(capsys, "run"))
    assert not Path("run/measure.json").exists()
    main("run", "--dataset", "e2e")
    found = json.loads(Path("run/measure.json").read_text())["data"]["validation"]
    assert found["files"] == {"validation/0.jsonl": files["validation"].stat().st_size}
    main("run", "--dataset", "toysql", "--examples", "8")  # what the run says of e2e is not meant
    assert json.loads(Path("run/measure.json").read_text())["on"]["data_path"] is None


def test_measures_of_another_run_are_noticed(capsys):
    fake("out/one", "topv", seed=1, value=0.5)
    fake("out/two", "topv", seed=2, value=0.7)
    shutil.copy("out/one/measure.json", "out/two/measure.json")
    assert "out/two/measure.json is of another run" in refused(capsys, "table", "out/two")


def test_a_file_that_only_ends_like_a_temporary_one_stays():
    killed_run("in the middle of a step", FLAGS)
    Path("run/notes.tmp").write_text("mine")
    Path("run/config.json.123.tmp").write_text("left by a process that was killed")
    run(f"{FLAGS} --resume")
    assert Path("run/notes.tmp").read_text() == "mine" and len([*Path("run").glob("*.tmp")]) == 1


def test_a_copy_of_a_run_is_no_other_seed(capsys):
    fake("out/one", "topv")
    shutil.copytree("out/one", "out/two")
    assert "out/one and out/two are the same run" in refused(capsys, "table", "out/one", "out/two")
    metrics = runs.read_run("out/two").metrics
    metrics["settings"]["data_path"] = "a copy of the data"
    runs.write_json(Path("out/two/metrics.json"), metrics)
    assert "out/one and out/two are the same run" in refused(capsys, "table", "out/one", "out/two")


def test_the_dense_run_beside_a_run_is_of_the_same_data(capsys):
    fake("out/topv", "topv")
    fake("out/dense", "none", lr=0.2)
    fake("out/others", "none")  # more alike, but of other data
    metrics = runs.read_run("out/others").metrics
    metrics["data"]["train"]["sha256"] = "other"
    runs.write_json(Path("out/others/metrics.json"), metrics)
    os.mkdir("out/damaged")
    Path("out/damaged/metrics.json").write_text("{")
    assert runs.dense_run(runs.read_run("out/topv"), None).path == Path("out/dense")


def test_a_dense_model_that_another_has_replaced_is_not_compared_with():
    fake("out/topv", "topv")
    for name, of in ("its own", 0), ("another", 9):
        fake(f"out/{name}", "none")
        metrics = runs.read_run(f"out/{name}").metrics | dict(model=of, started=of)
        runs.write_json(Path(f"out/{name}/metrics.json"), metrics)
    assert runs.dense_run(runs.read_run("out/topv"), None).path == Path("out/its own")
    shutil.rmtree("out/its own")
    assert runs.dense_run(runs.read_run("out/topv"), None) is None


@pytest.mark.parametrize("way", ["deleted", "moved"])
def test_a_folder_that_goes_while_its_run_is_at_work_is_told_and_a_moved_one_goes_on(way, capsys):
    run("--method topv --out whole")
    go = {"deleted": lambda *_: shutil.rmtree("run"), "moved": lambda *_: os.rename("run", "new")}
    with pytest.MonkeyPatch.context() as patch:
        hook(patch, *STEP, 7, go[way])
        assert_fails(capsys, f"{SMALL} {FLAGS}", "run is gone: if it was|--out NEW --resume|back")
    assert not Path("run").exists()
    if way == "moved":
        assert program(capsys, f"{SMALL} {FLAGS} --out new --resume")[0] == 0
        assert_same_run("whole", "new")


# Damaged files.


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def other_digit(content):
    return re.sub(rb"\d", lambda digit: flip(digit[0], 0), content, count=1)


@pytest.mark.parametrize("damage", ["flipped", "a dict", "a list", "of another run"])
def test_a_damaged_or_another_runs_checkpoint_is_named_and_kept(damage, capsys):
    killed_run("in the middle of a step", FLAGS)
    path = Path("run/checkpoint.pt")
    if damage == "flipped":
        largest = max(zipfile.ZipFile(path).infolist(), key=lambda part: part.file_size)
        middle = largest.header_offset + largest.file_size // 2
        path.write_bytes(flip(path.read_bytes(), middle))
    elif damage == "of another run":
        killed_run("in the middle of a step", "--method topv --lr 0.02 --out other")
        shutil.copy("other/checkpoint.pt", path)
    else:
        torch.save({"a": 1} if damage == "a dict" else [1], path)
    before = contents("run")
    assert_fails(capsys, f"{SMALL} {FLAGS} --resume", "go on from run/checkpoint.pt|remove run")
    assert contents("run") == before


@pytest.mark.parametrize("how", ["", "--resume"])
def test_a_checkpoint_without_settings_is_told_and_kept(how, capsys):
    killed_run("in the middle of a step", FLAGS)
    settings = Path("run/settings.json").read_bytes()
    Path("run/settings.json").unlink()
    before = contents("run")
    assert_fails(capsys, f"{SMALL} {FLAGS} {how}", "run lacks its settings.json|checkpoint.pt|back")
    assert "run lacks its settings.json" in refused(capsys, "run") and contents("run") == before
    Path("run/settings.json").write_bytes(settings)
    run(f"{FLAGS} --resume")


def test_without_its_checkpoint_a_run_begins_anew_and_says_so(capsys):
    run("--method topv --out whole")
    killed_run("in the middle of a step", FLAGS)
    Path("run/checkpoint.pt").unlink()
    run(f"{FLAGS} --resume")
    assert "no checkpoint in run: the run begins with its first" in capsys.readouterr().err
    assert_same_run("whole", "run")


def test_a_link_to_nothing_is_no_place_for_a_run(capsys):
    Path("run").symlink_to("nowhere")
    assert_fails(capsys, f"{SMALL} {FLAGS}", "run is a link to nothing|--out")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_model_that_is_not_as_it_was_written_is_named(file, capsys):
    run(FLAGS)
    path = Path("run", file)
    content = path.read_bytes()
    path.write_bytes(flip(content, len(content) - 50) if "model" in file else
                     content.replace(b"1e-05", b"2e-05"))
    for words in ("run",), ("sample", "run", "--prompt", "x"):
        assert "run is damaged" in refused(capsys, *words, "--device", "cpu")
    assert_fails(capsys, "--out more --model run --device cpu", "the model in run is damaged")
    assert_fails(capsys, f"{SMALL} {FLAGS} --resume", "the model in run is damaged")
    path.write_bytes(content)
    assert runs.load_model("run")


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json"])
def test_a_model_with_another_tokenizer_is_neither_trained_nor_measured(file, capsys):
    write_tokenizer("small", 257, 128)  # what texts are read by
    path = Path("small", file)
    written = json.loads(Path("small/tokenizer.json").read_text())
    ids = written["model"]["vocab"]
    content = ids if file == "vocab.json" else written
    Path("small/tokenizer.json").unlink()
    path.write_text(json.dumps(content))
    run("--out run")  # the same
    ids["a"], ids["b"] = ids["b"], ids["a"]
    path.write_text(json.dumps(content))
    says = f"small/{file} is another tokenizer"
    assert_fails(capsys, "--model small --out other", says)
    assert_fails(capsys, "--model run --distill --teacher small --out other", says)
    assert says in refused(capsys, "small", "--dataset", "stdlib", "--device", "cpu")
    for damage in "{", "[]":
        path.write_text(damage)
        assert_fails(capsys, "--model small --out other", f"small/{file} is damaged, or of another")
    path.unlink()
    run("--out other")  # none is known


@pytest.mark.parametrize("damage", [other_digit, lambda log: log[:-50], lambda log: b""])
def test_a_log_that_is_not_as_the_checkpoint_knows_it_is_named(damage, capsys):
    killed_run("after training", FLAGS)
    log = Path("run/log.jsonl")
    log.write_bytes(damage(log.read_bytes()))
    before = contents("run")
    assert_fails(capsys, f"{SMALL} {FLAGS} --resume", "run/log.jsonl is damaged|put that back")
    assert contents("run") == before


@pytest.mark.parametrize("when", ["in the middle of a step", "after training"])
def test_without_its_log_a_run_goes_on_to_the_same_model_and_says_so(when, capsys):
    run("--method topv --out whole")
    killed_run(when, FLAGS)
    Path("run/log.jsonl").unlink()
    run(f"{FLAGS} --resume")
    assert "run/log.jsonl is gone: the curves begin where" in capsys.readouterr().err
    assert_same_weights("whole", "run")
    lines = Path("whole/log.jsonl").read_text().splitlines()
    left = Path("run/log.jsonl").read_text().splitlines()
    assert len(left) < len(lines)
    draw_training("run", runs.read_run("run").metrics)  # which has noted this log
    assert Path("run/training.png").stat().st_size > 1000


def test_what_was_logged_after_the_checkpoint_comes_again():
    run("--method topv --out whole")
    killed_run("in the middle of a step", FLAGS)
    with open("run/log.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"st')
    run(f"{FLAGS} --resume")
    assert_same_run("whole", "run")


@pytest.mark.parametrize("file,command", [
    ("settings.json", "table"), ("metrics.json", "table"), ("measure.json", "table"),
    ("log.jsonl", "figures")])
def test_a_changed_digit_is_noticed(file, command, capsys):
    fake("run", "topv", value=0.5)
    runs.write_json(Path("run/settings.json"), dict(method="topv"))  # as if not yet finished
    path = Path("run", file)
    path.write_bytes(other_digit(path.read_bytes()))
    assert f"{path} is damaged, or of another " in refused(capsys, command, "run")


# A full disk.


@pytest.fixture
def room():
    """Sets how large a file may become, in bytes, as on a disk that is full; or again as before."""
    resource = pytest.importorskip("resource")  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def room(size=before[0]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield room
    room()


@pytest.mark.parametrize("file,size,place", [
    ("settings.json", 100, (train, "load_model", 1)), ("log.jsonl", 100, (*STEP, 7)),
    ("checkpoint.pt", 20_000, (*STEP, 7)), ("config.json", 100, (train, "shrink", 1)),
    ("model.safetensors", 20_000, (train, "shrink", 1)),
    ("tokenizer.json", 1500, (train, "write_tokenizer", 1)),
    ("README.md", 1500, (train, "write_card", 1)),
    ("metrics.json", 1500, (train, "write_card", 1, None))])
def test_a_run_goes_on_after_a_full_disk_as_if_nothing_had_been(file, size, place, capsys, room):
    run("--method topv --out whole")
    with pytest.MonkeyPatch.context() as patch:
        hook(patch, *place, lambda *_: room(size))
        assert_fails(capsys, f"{SMALL} {FLAGS}", f"error: can't write run/{file}: |File too large")
    room()
    left = set(os.listdir("run"))
    assert not [name for name in left if name.endswith(".tmp")] and "metrics.json" not in left
    assert ("checkpoint.pt" in left) == (file != "settings.json")
    run(FLAGS + " --resume" * (file != "settings.json"))
    assert_same_run("whole", "run")


@pytest.mark.parametrize("file,command", [
    ("small/measure.json", "small --dataset stdlib --examples 2 --device cpu"),
    ("drawn/similarity-0.5-toysql-small.png", "figures run --out drawn")])
def test_measures_and_figures_need_room_as_well(file, command, capsys, room):
    fake("run", "topv", value=0.5)
    main(*command.split())
    Path(file).unlink()
    room(300)
    assert refused(capsys, *command.split()).endswith(f"can't write {file}: File too large")
    room()
    assert not list(Path().rglob("*.tmp")) and not Path(file).exists()
    main(*command.split())


def test_what_was_measured_is_printed_though_it_can_not_be_written(capsys, room):
    room(300)
    stopped = pytest.raises(SystemExit, main, *"small --dataset stdlib --examples 2".split(),
                            "--device", "cpu")
    room()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and "can't write small/measure.json" in err
    assert re.search(r"^perplexity +\d", out, re.MULTILINE)


# Processes: mistakes before torch is imported, Ctrl-C meanwhile, and nobody who reads.


def process(command, torch_is=None, **how):
    """A command line, with another torch if `torch_is` is given: its status, output and errors."""
    if torch_is:
        os.makedirs("stub/torch")
        Path("stub/torch/__init__.py").write_text(torch_is)
    program, *words = command.split()
    done = subprocess.run([sys.executable, ROOT / program, *words], text=True, timeout=300,
                          env=os.environ | dict(PYTHONPATH="stub"),
                          **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | how)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command,status,says", [
    ("train.py --leftover 2", 2, "--leftover 2.0"), ("train.py --method gumm", 2, "gumm"),
    ("train.py --method none --leftover 0.5", 2, "nothing"), ("train.py --methd x", 2, "--methd"),
    ("measure.py tabel", 2, "tabel"), ("measure.py table --metric x", 2, "--metric"),
    ("measure.py", 2, "RUN"), ("train.py --help", 0, "--leftover"),
    ("measure.py --help", 0, "measure.py table"), ("measure.py table --help", 0, "--metric"),
    ("train.py --leftover 0.5", 1, "was imported"), ("measure.py small", 1, "was imported")])
def test_mistakes_are_told_and_help_given_before_torch_is_imported(command, status, says):
    found, out, err = process(command, "raise ImportError('torch was imported')")
    assert found == status and says in out + err
    assert status == 1 or (out + err).count("\n") == err.count("\n") == 1 or not err


def test_what_follows_the_look_at_the_flags_is_the_real_thing():
    status, out, err = process("measure.py sample small --prompt x --tokens 3 --device cpu")
    assert (status, err) == (0, "") and "pruned: small" in out


def test_an_empty_word_is_no_word(capsys):
    assert_fails(capsys, "--out=", "--out is empty")
    assert "no run's folder" in refused(capsys, "")


@pytest.mark.parametrize("command", ["train.py", "measure.py table small"])
def test_ctrl_c_while_torch_is_imported_ends_it_without_a_word(command):
    interrupt = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    assert process(command, interrupt) == (-signal.SIGINT, "", "")


TRAIN = f"train.py {SMALL} --dataset toysql --block-size 128 --steps 2 --out run"


NONSENSE = dict(MPLBACKEND="x", TQDM_MININTERVAL="x", TQDM_NCOLS="x", TQDM_BAR_FORMAT="{x",
                TQDM_DISABLE="", RANK="", PYTHONIOENCODING="ascii")


def test_no_environment_variable_ends_a_run_nor_a_character_that_can_t_be_printed(monkeypatch):
    for name, value in NONSENSE.items():
        monkeypatch.setenv(name, value)
    Path("matplotlibrc").write_text("text.usetex: True")  # for which a program has to be there
    status, out, _ = process(TRAIN)
    assert status == 0 and "?" in out and out.endswith("are in run\n")
    assert Path("run/training.png").exists() and GPT.from_pretrained("run")


@pytest.mark.parametrize("given,says", [
    ("RANK=1", "torchrun"), ("RANK=x", "torchrun"), ("WORLD_SIZE=x", "torchrun"),
    ("WORLD_SIZE=2", "torchrun"), ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost", "torchrun"),
    ("HF_HUB_ETAG_TIMEOUT=x", "HF_HUB_ETAG_TIMEOUT: ")])
def test_an_environment_variable_that_can_t_be_used_is_named_at_once(given, says, monkeypatch):
    for word in given.split():
        monkeypatch.setenv(*word.split("="))
    status, out, err = process(TRAIN, "raise ImportError('torch was imported')")
    assert status == 2 and err.count("\n") == 1 and says in err and not out
    assert err.startswith("train.py: error: the environment variable")
    assert given.partition("=")[0] in err


@pytest.mark.skipif(os.name == "nt", reason="its shell has other words")
def test_closed_streams_stop_no_run():
    command = shlex.join([sys.executable, str(ROOT / "train.py"), *TRAIN.split()[1:]])
    assert subprocess.run(["sh", "-c", f"{command} >&- 2>&-"]).returncode == 0
    assert GPT.from_pretrained("run")


def test_a_full_disk_behind_stdout_loses_no_run():
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with open("/dev/full", "w") as full:
        status, _, err = process(TRAIN, stdout=full)
    *_, saved, error = err.splitlines()
    assert status == 2 and saved == "the model is in run" and GPT.from_pretrained("run")
    assert error == "train.py: error: can't print: No space left on device"


@pytest.mark.parametrize("command", [
    f"train.py {SMALL} --dataset toysql --block-size 128 --steps 2 --out run",
    "measure.py table run"])
def test_nobody_has_to_read_what_is_printed(command):
    if "table" in command:
        fake("run", "topv")
    reading, writing = os.pipe()
    os.close(reading)
    status, _, err = process(command, stdout=writing)
    if "table" not in command:  # nor what is said meanwhile
        shutil.rmtree("run")
        assert process(command, stdout=writing, stderr=writing)[0] == 0
    os.close(writing)
    assert status == ("table" in command) and "Traceback" not in err and "xception" not in err
    assert "table" in command or err.endswith("is in run\n") and GPT.from_pretrained("run")
