"""Data sets and models from a Hub that the tests play: what is fetched, when, and what goes wrong.
Oracles: the bytes that it serves."""
import io
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hub import Hub, Program, commit
from safetensors.torch import load_file

import data
import model


@pytest.fixture(scope="module")
def program():
    program = Program(str(Path(data.__file__).parent))
    yield program
    program.process.stdin.close()
    program.process.wait()


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub
        hub.shutdown()
        hub.nobody.close()


@pytest.fixture
def ask(hub, program, tmp_path):
    """What the program computes, or the kind and the one line of its error."""
    def ask(code, reachable=True, **environment):
        value, *error, said = program(
            code, HF_ENDPOINT=hub.address(reachable), HF_HUB_CACHE=str(tmp_path / "hf"),
            HF_HOME=str(tmp_path / "hf"), XDG_CACHE_HOME=str(tmp_path / "cache"), **environment)
        assert re.fullmatch(r"(reading \S+ from the Hub\n)?", said)  # the library keeps quiet
        assert not error or "\n" not in error[1]
        return error or value
    return ask


def without_hub(ask, code):
    """What is computed where nobody answers, and where nobody is to be asked."""
    return [ask(code, reachable=False), ask(code, HF_HUB_OFFLINE="1")]


# Data sets.

def parquet(**columns):
    pq.write_table(pa.table(columns), buffer := pa.BufferOutputStream())
    return buffer.getvalue().to_pybytes()


def wikitext(text):
    """A WikiText of two configurations."""
    files = {"README.md": b"---\nconfigs:\n", ".gitattributes": b""}
    for name in "wikitext-103-v1", "wikitext-2-v1":
        files["README.md"] += f"- config_name: {name}\n  data_files:\n".encode()
        for split in "train", "validation":
            files["README.md"] += f"  - {{split: {split}, path: {name}/{split}-*}}\n".encode()
            files[f"{name}/{split}-0.parquet"] = parquet(text=[f"{text} {name} {split}"])
    files["README.md"] += b"---\n"
    return {"main": files}


WIKITEXT = "datasets/Salesforce/wikitext"
OF_103 = ["README.md", "wikitext-103-v1/train-0.parquet", "wikitext-103-v1/validation-0.parquet"]
READ = """(lambda read: [bytes(i for i in read.tokens.tolist() if i < 256).decode(), read.about])(
    data.load("wikitext", "train", 257, 2, config={}))""".replace("\n", "").format
E2E = ("tuetschek/e2e_nlg", "refs/convert/parquet", {"default/train/0000.parquet": parquet(
    meaning_representation=["name[A]"], human_reference=["It is A."])})
SAMSUM = ("knkarthick/samsum", "main", {
    "train.csv": b'id,dialogue,summary\n1,"A: NA\nB: b",They speak.\n', "test.csv": b"id\n"})


def test_a_data_set_is_fetched_once_and_then_read_without_the_hub(hub, ask):
    hub.repos[WIKITEXT] = wikitext("one")
    first = ask(READ(None))
    text, about = first
    sha = commit(hub.repos[WIKITEXT]["main"])
    assert text == "one wikitext-103-v1 train"
    assert about["source"] == f"Salesforce/wikitext, commit {sha}"
    file = "wikitext-103-v1/train-0.parquet"
    assert about["files"] == {file: len(hub.repos[WIKITEXT]["main"][file])}
    assert hub.requests("files") == OF_103  # one configuration
    assert ask(READ(None)) == first
    assert hub.asked == [("commits", "main")]
    assert without_hub(ask, READ(None)) == [first] * 2 and len(hub.asked) == 1
    for kind, message in without_hub(ask, READ("'wikitext-2-v1'")):  # it hasn't got that
        assert kind == "ConnectionError" and "--data-path" in message
    assert ask(READ("'wikitext-2-v1'"))[0] == "one wikitext-2-v1 train"
    assert hub.requests("files") == [file.replace("103", "2") for file in OF_103[1:]]


def test_a_moved_commit_gives_the_new_text_and_another_about(hub, ask):
    read = []
    for text in "one", "six":
        hub.repos[WIKITEXT] = wikitext(text)
        read.append(ask(READ(None)))
        assert read[-1][0] == f"{text} wikitext-103-v1 train"
        assert commit(hub.repos[WIKITEXT]["main"]) in read[-1][1]["source"]
    assert read[0][1]["sha256"] != read[1][1]["sha256"]
    assert without_hub(ask, READ(None)) == [read[1]] * 2
    hub.repos[WIKITEXT] = wikitext("one")  # moved back
    assert ask(READ(None)) == read[0]


@pytest.mark.parametrize("dataset, repo, told", [
    ("e2e", E2E, ["name[A]\n", "It is A."]),
    ("samsum", SAMSUM, ["A: NA\nB: b\nSummary:\n", "They speak."])])
def test_pairs_come_from_the_branch_that_holds_them(hub, ask, dataset, repo, told):
    name, revision, files = repo
    hub.repos[f"datasets/{name}"] = {"main": {"script.py": b"1 / 0"}, revision: files}
    code = (f"(lambda read: [bytes(read.prompts[0]).decode(), *read.references[0], read.about])("
            f"data.load('{dataset}', 'train', 257, 99))")
    first = ask(code)
    assert first[:2] == told and first[2]["source"] == f"{name}, commit {commit(files)}"
    assert hub.requests("files") == sorted(files)
    assert [ask(code), *without_hub(ask, code)] == [first] * 3
    assert hub.asked == [("commits", revision)]


def trouble(hub, what, repo, file):
    """Has a repository be missing, say, or the connection break amid a file."""
    if what == "missing":
        hub.repos.pop(repo)
    elif what == "gated":
        hub.gated.add(repo)
    elif what == "breaks":
        hub.breaks[file] = 10**6
    else:
        hub.fault = what


TROUBLES = ["missing", "gated", "breaks", 500, "hang up"]


@pytest.mark.parametrize("what", TROUBLES)
def test_a_data_set_out_of_reach_is_told_in_a_line_and_nothing_half_is_read(hub, ask, what):
    hub.repos[WIKITEXT] = wikitext("one")
    trouble(hub, what, WIKITEXT, OF_103[1])
    for kind, message in [ask(READ(None)), *without_hub(ask, READ(None))]:
        assert kind == "ConnectionError"
        for words in "Salesforce/wikitext", "--data-path", "--dataset stdlib":
            assert words in message
    hub.forget()
    hub.repos[WIKITEXT] = wikitext("one")
    assert ask(READ(None))[0] == "one wikitext-103-v1 train"


def test_a_connection_that_breaks_once_is_taken_up_again(hub, ask):
    hub.repos[WIKITEXT] = wikitext("one")
    hub.breaks[OF_103[1]] = 1
    assert ask(READ(None))[0] == "one wikitext-103-v1 train"
    assert hub.requests("files") == sorted([*OF_103, OF_103[1]])


# Models.

LOAD = ("{name: x.tolist() for name, x in "
        "model.GPT.from_pretrained('owner/name').state_dict().items()}")
MODEL, SAFE, BIN = "models/owner/name", "model.safetensors", "pytorch_model.bin"


@pytest.fixture
def weights(hub, tmp_path):
    """What a model is, and a repository's files: both formats, of other weights."""
    torch.manual_seed(0)
    gpt = model.GPT(model.GPTConfig(vocab_size=7, n_positions=4, n_layer=2, n_head=2, n_embd=4))
    gpt.save_pretrained(tmp_path / "saved")
    files = {name: (tmp_path / "saved" / name).read_bytes() for name in ("config.json", SAFE)}
    other = {name: x + 1 for name, x in load_file(tmp_path / "saved" / SAFE).items()}
    torch.save(other, buffer := io.BytesIO())
    hub.repos[MODEL] = {"main": files | {BIN: buffer.getvalue(), "flax_model.msgpack": b"unwanted"}}
    return {name: x.tolist() for name, x in gpt.state_dict().items()}


def test_a_model_is_fetched_once_and_then_read_without_the_hub(hub, ask, weights):
    assert ask(LOAD) == weights
    assert hub.requests("files") == ["config.json", SAFE]  # of the two formats, the safe one
    assert ask(LOAD) == weights
    assert hub.asked == [("commits", "main")]
    assert without_hub(ask, LOAD) == [weights] * 2 and len(hub.asked) == 1


def test_a_model_of_pickled_weights_alone_is_read_and_a_moved_commit_is_the_new_one(
        hub, ask, weights):
    files = hub.repos[MODEL]["main"]
    safe = files.pop(SAFE)
    older = ask(LOAD)
    assert older == {name: (torch.tensor(x) + 1).tolist() for name, x in weights.items()}
    assert hub.requests("files") == ["config.json", BIN]
    assert [ask(LOAD), *without_hub(ask, LOAD)] == [older] * 3 and not hub.requests("files")
    files[SAFE] = safe
    assert [ask(LOAD), *without_hub(ask, LOAD)] == [weights] * 3


@pytest.mark.parametrize("what", TROUBLES)
def test_a_model_out_of_reach_is_told_in_a_line_and_nothing_half_is_read(hub, ask, weights, what):
    repo = hub.repos[MODEL]
    trouble(hub, what, MODEL, SAFE)
    kind, message = ask(LOAD)
    assert "'owner/name'" in message
    if what in ("missing", "gated"):
        assert kind == "FileNotFoundError"
    else:
        assert kind == "ConnectionError" and "--model DIR" in message
    for kind, message in without_hub(ask, LOAD):
        assert kind == "ConnectionError" and "'owner/name'" in message and "--model DIR" in message
    hub.forget()
    hub.repos[MODEL] = repo
    assert ask(LOAD) == weights


@pytest.mark.parametrize("missing", [["config.json"], [SAFE, BIN]])
def test_a_repository_that_holds_no_model_is_told_so(hub, ask, weights, missing):
    for name in missing:
        del hub.repos[MODEL]["main"][name]
    kind, message = ask(LOAD)
    assert kind == "FileNotFoundError" and all(name in message for name in missing)


@pytest.mark.parametrize("file", ["config.json", SAFE])
def test_a_model_whose_connection_breaks_once_is_fetched_whole(hub, ask, weights, file):
    hub.breaks[file] = 1
    assert ask(LOAD) == weights
    assert hub.requests("files") == sorted(["config.json", SAFE, file])


@pytest.mark.parametrize("what", [500, "missing", "hang up"])
def test_what_is_kept_is_read_while_the_hub_fails(hub, ask, weights, what):
    hub.repos[WIKITEXT] = wikitext("one")
    read = ask(LOAD), ask(READ(None))
    for repo in MODEL, WIKITEXT:
        trouble(hub, what, repo, None)
    assert (ask(LOAD), ask(READ(None))) == read
