"""What data.py promises. Oracles: bytes and rows read here, tiktoken and pyarrow directly, and brute force."""
import collections
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import torch

import data

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared"
HUB = SHARED / "hub"
TIKTOKEN = SHARED / "tiktoken_cache"
needs_hub = pytest.mark.skipif(not HUB.exists(), reason=f"real data not found in {HUB}")
needs_gpt2 = pytest.mark.skipif(not TIKTOKEN.exists(), reason=f"GPT-2's tokenizer not found in {TIKTOKEN}")
WIKITEXT = dict(dataset="wikitext", path=HUB / "Salesforce/wikitext", config="wikitext-2-v1")
WIKISQL = dict(dataset="wikisql", path=HUB / "Salesforce/wikisql")
E2E = dict(dataset="e2e", path=HUB / "tuetschek/e2e_nlg")


@pytest.fixture(scope="session")
def hf_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(autouse=True)
def nothing_outside_tmp(monkeypatch, tmp_path, hf_cache):
    """`datasets` read its environment when it was imported: its own setting is what counts by now."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hf_cache)
    monkeypatch.setenv("HF_HOME", str(hf_cache))  # for processes started here
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN))
    monkeypatch.chdir(tmp_path)


def load(dataset, split="validation", vocab_size=257, block_size=128, **kwargs):
    return data.load(dataset, split, vocab_size, block_size, **kwargs)


def parquet_rows(pattern):
    """The rows of the one file that matches, without the library under test."""
    (file,) = HUB.glob(pattern)
    return pq.read_table(file).to_pylist()


def one_line(error):
    message = str(error.value)
    assert message and "\n" not in message
    return message


# Tokenizers.

def test_bytes_are_utf8_and_end_of_text_is_256():
    tok = data.tokenizer(257)
    assert tok.encode("né\n") == [0x6E, 0xC3, 0xA9, 0x0A]
    assert tok.eot == 256


def test_bytes_decode_without_end_of_text_and_replace_what_is_not_utf8():
    tok = data.tokenizer(257)
    assert tok.decode([0x6E, 0xC3, 0xA9, 256]) == "né"
    assert tok.decode([0xC3, 0x6E]) == "\ufffdn"
    assert tok.decode(np.array([0x6E], np.uint16)) == tok.decode(torch.tensor([0x6E])) == "n"


@needs_gpt2
def test_gpt2_tokens_are_tiktokens():
    tok, oracle = data.tokenizer(50257), tiktoken.get_encoding("gpt2")
    text = "Movement pruning, né à Zürich: 12345  \n\tdef f(x):"
    assert tok.encode(text) == oracle.encode(text)
    assert tok.decode(oracle.encode(text) + [50256]) == text
    assert tok.eot == 50256


@needs_gpt2
def test_no_text_encodes_to_end_of_text():
    for size in (257, 50257):
        tok = data.tokenizer(size)
        ids = tok.encode("a<|endoftext|>b")
        assert tok.eot not in ids and tok.decode(ids) == "a<|endoftext|>b"


def test_another_vocabulary_is_an_error_that_names_the_two():
    with pytest.raises(ValueError) as error:
        data.tokenizer(50304)
    assert "257" in one_line(error) and "50257" in one_line(error)


def test_gpt2_out_of_reach_is_an_error_that_names_the_cache(monkeypatch):
    def no_network(name):
        raise OSError("Failed to resolve\nsome host")
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(OSError) as error:
        data.tokenizer(50257)
    assert "TIKTOKEN_CACHE_DIR" in one_line(error)


# Blocks.

@pytest.mark.parametrize("n", [2, 9, 15, 16, 17, 18, 40])
def test_every_token_but_the_first_is_predicted_once_from_the_one_before_it(n):
    tokens = np.random.default_rng(n).integers(0, 256, n).astype(np.uint16)
    blocks = data.Blocks(tokens, block_size=8, eot=256)
    idx, targets, real = blocks.batch(range(len(blocks)))
    asked = targets != -100
    assert targets[asked].tolist() == tokens[1:].tolist()
    assert idx[asked].tolist() == tokens[:-1].tolist()
    assert (idx[~asked] == 256).all() and torch.equal(real, asked)
    assert idx.shape == targets.shape == real.shape == (-(-(n - 1) // 8), 8)


def test_a_batch_of_blocks_is_the_blocks_asked_for_in_torchs_types():
    blocks = data.Blocks(np.arange(100, dtype=np.uint16), block_size=10, eot=256)
    idx, targets, real = blocks.batch(torch.tensor([4, 0, 9]))
    assert (idx.dtype, targets.dtype, real.dtype) == (torch.int64, torch.int64, torch.bool)
    assert idx[0].tolist() == list(range(40, 50)) and targets[0].tolist() == list(range(41, 51))
    assert idx[1, 0] == 0 and targets[2].tolist() == [*range(91, 100), -100]


# The standard library.

@pytest.fixture
def python_tree(tmp_path, monkeypatch):
    """A standard library of 300 made-up files, every third a copy of another, and files that are not part of it."""
    root = tmp_path / "python"
    files = {f"package{i % 7}/module{i}.py": f"x = {i if i % 3 else 1}\n" for i in range(300)}
    others = ["site-packages/a", "dist-packages", "test", "json/tests", "lib2to3/tests", "encodings", "pydoc_data",
              "config-3.11-x86_64-linux-gnu", "re/__pycache__"]
    files |= {f"{folder}/left_out.py": "LEFT OUT\n" for folder in others}
    files |= {"_sysconfigdata__linux.py": "LEFT OUT\n", "notes.txt": "LEFT OUT\n"}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


def documents(blocks):
    """The texts between a stream's ends of text."""
    stream = np.asarray(blocks.tokens)
    return [bytes(part[part != 256].astype(np.uint8)) for part in np.split(stream, np.flatnonzero(stream == 256))]


def test_stdlib_holds_each_source_file_once_in_one_of_two_splits(python_tree):
    splits = [documents(load("stdlib", split, block_size=16)) for split in ("train", "validation")]
    found = collections.Counter(splits[0] + splits[1])
    wanted = collections.Counter(file.read_bytes() for file in python_tree.glob("package*/*.py"))
    assert found == wanted


def test_stdlib_never_has_copies_of_a_file_in_both_splits(python_tree):
    train, validation = (set(documents(load("stdlib", split, block_size=16))) for split in ("train", "validation"))
    assert train and validation and not train & validation


def test_a_file_stays_in_its_split_when_the_library_changes_around_it(python_tree):
    before = set(documents(load("stdlib", block_size=16)))
    (python_tree / "a_new_one.py").write_text("print('new')\n")
    (python_tree / "package1").rename(python_tree / "elsewhere")
    assert set(documents(load("stdlib", block_size=16))) - {b"print('new')\n"} == before


def test_the_real_stdlib_is_its_bytes_about_a_twentieth_for_validation():
    train, validation = load("stdlib", "train"), load("stdlib", "validation")
    source = Path(json.__file__).read_bytes()
    assert source in documents(train) + documents(validation)
    assert 0.02 < len(validation.tokens) / (len(train.tokens) + len(validation.tokens)) < 0.1
    assert len(train.tokens) > 2_000_000


@needs_gpt2
def test_stdlib_as_gpt2_tokens_decodes_to_the_same_sources(python_tree):
    as_bytes, as_gpt2 = load("stdlib", block_size=16), load("stdlib", vocab_size=50257, block_size=16)
    oracle = tiktoken.get_encoding("gpt2")
    assert oracle.decode(as_gpt2.tokens.tolist()).split("<|endoftext|>") == [d.decode() for d in documents(as_bytes)]


# WikiText.

def wikitext_oracle(split):
    """GPT-2's ids of the split: the lines joined, cut before each title, end of text between."""
    text = "".join(row["text"] for row in parquet_rows(f"Salesforce/wikitext/wikitext-2-v1/{split}-*"))
    articles = re.split(r"(?m)^(?= = [^=]+ = $)", text)
    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    return len(articles) - 1, [i for article in articles[1:] for i in [50256] + encode(article)][1:]


@needs_hub
@needs_gpt2
@pytest.mark.parametrize("split", ["train", "validation"])
def test_wikitext_is_its_articles_with_end_of_text_between(split):
    tokens = load(split=split, vocab_size=50257, **WIKITEXT).tokens
    articles, oracle = wikitext_oracle(split)
    assert tokens.tolist() == oracle
    assert articles == {"train": 48, "validation": 12}[split] == (tokens == 50256).sum() + 1


@needs_hub
def test_tokens_come_from_a_memory_map_of_two_bytes_each():
    tokens = load(**WIKITEXT).tokens
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16


@pytest.fixture
def corpus(tmp_path):
    """write(text): a folder with a WikiText of one article for each split."""
    def write(text):
        for split in ("train", "validation"):
            file = tmp_path / "corpus" / f"{split}.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps({"text": f"{split} {text}\n"}) + "\n")
        return dict(dataset="wikitext", path=tmp_path / "corpus", block_size=4, cache_dir=tmp_path / "cache")
    return write


def text_of(blocks):
    return bytes(np.asarray(blocks.tokens, np.uint8)).decode()


def test_a_second_load_reads_the_cache_and_does_not_tokenise(corpus, monkeypatch):
    source = corpus("one")
    first = load(**source)
    tokenizer = data.tokenizer(257)
    monkeypatch.setattr(tokenizer, "encode", lambda text: pytest.fail("tokenised again"))
    monkeypatch.setattr(data, "tokenizer", lambda vocab_size: tokenizer)
    assert text_of(load(**source)) == text_of(first) == "validation one\n"


def test_the_cache_is_the_same_file_for_another_process(corpus):
    source = corpus("one")
    load(**source)
    before = sorted(source["cache_dir"].iterdir())
    command = f"import data; data.load('wikitext', 'validation', 257, 4, {str(source['path'])!r}, None, 'cache')"
    subprocess.run([sys.executable, "-c", command], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert sorted(source["cache_dir"].iterdir()) == before and len(before) == 1


def test_a_changed_source_is_read_anew(corpus):
    load(**corpus("one"))
    assert text_of(load(**corpus("two"))) == "validation two\n"  # as many bytes


def test_splits_and_vocabularies_do_not_share_a_cache(corpus):
    source = corpus("one")
    assert text_of(load(**source)) == "validation one\n"
    assert text_of(load(split="train", **source)) == "train one\n"
    if TIKTOKEN.exists():
        assert load(vocab_size=50257, **{**source, "block_size": 2}).tokens.tolist() \
            == tiktoken.get_encoding("gpt2").encode("validation one\n")


@pytest.mark.parametrize("damage", [
    lambda b: b"", lambda b: b[:3], lambda b: b[:-2], lambda b: b[:-1], lambda b: b + b"ab",
    lambda b: b[:9] + b"X" + b[10:]
], ids=["empty", "stub", "short", "odd", "long", "changed"])
def test_a_damaged_cache_is_noticed_and_made_anew(corpus, damage):
    source = corpus("one")
    load(**source)
    (file,) = source["cache_dir"].iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert text_of(load(**source)) == "validation one\n"
    assert file.read_bytes() == whole


def test_a_cache_is_whole_or_absent_when_writing_it_fails(tmp_path):
    def breaks():
        yield "first"
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        data.cached(tmp_path / "cache" / "stream", breaks(), data.tokenizer(257))
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_writer_in_between_does_no_harm(tmp_path):
    file, tok = tmp_path / "stream", data.tokenizer(257)

    def slow():
        yield "ab"
        data.cached(file, iter(["ab", "cd"]), tok)  # meanwhile, the other finishes
        yield "cd"
    assert data.cached(file, slow(), tok).tolist() == [97, 98, 256, 99, 100]
    assert list(tmp_path.iterdir()) == [file]


# Examples.

def pairs_of_letters(n=40, seed=0):
    rng = random.Random(seed)
    word = lambda: "".join(rng.choice("abc") for _ in range(rng.randint(1, 9)))
    return [(word(), word()) for _ in range(n)]


def test_a_batch_asks_for_the_target_and_end_of_text_only():
    pairs = pairs_of_letters()
    examples = data.Examples(pairs, block_size=100, tok=data.tokenizer(257))
    order = random.Random(1).sample(range(len(pairs)), 16)
    idx, targets, real = examples.batch(order)
    assert (idx.dtype, targets.dtype, real.dtype) == (torch.int64, torch.int64, torch.bool)
    assert idx.shape[1] == max(len(p + t) for p, t in (pairs[i] for i in order))
    for row, i in enumerate(order):
        prompt, target = (list(text.encode()) for text in pairs[i])
        whole = prompt + target + [256]
        n = len(whole) - 1
        pad = idx.shape[1] - n
        assert idx[row].tolist() == whole[:-1] + [256] * pad
        assert targets[row].tolist() == [-100] * (len(prompt) - 1) + target + [256] + [-100] * pad
        assert real[row].tolist() == [True] * n + [False] * pad


def test_examples_longer_than_the_block_are_left_out_whole_and_counted():
    pairs = [("ab", "cd"), ("ab", "cde"), ("abcdef", "x"), ("a", "bcd")]  # 5, 6, 8 and 5 tokens with end of text
    examples = data.Examples(pairs, block_size=5, tok=data.tokenizer(257))
    assert examples.skipped == 2 and len(examples) == 2
    assert [bytes(p + t[:-1]) for p, t in zip(examples.prompts, examples.targets)] == [b"abcd", b"abcd"]


def test_skipped_examples_are_reported_in_one_line(capsys):
    assert load("toysql", block_size=100).skipped > 0
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "toysql validation" in line and "of 1000" in line and "block of 100" in line


def test_references_are_all_answers_to_a_prompt_and_distinct_has_one_example_each():
    pairs = [("a", "x"), ("b", "y"), ("a", "z"), ("a", "much too long")]
    examples = data.Examples(pairs, block_size=5, tok=data.tokenizer(257))
    assert examples.references == [["x", "z", "much too long"], ["y"], ["x", "z", "much too long"]]
    assert examples.distinct() == [0, 1]


def test_by_length_is_every_example_once_the_shortest_first():
    pairs = pairs_of_letters()
    order = data.Examples(pairs, block_size=100, tok=data.tokenizer(257)).by_length()
    assert sorted(order) == list(range(len(pairs)))
    lengths = [len(pairs[i][0] + pairs[i][1]) for i in order]
    assert lengths == sorted(lengths)


# toysql.

def test_toysql_splits_share_no_prompt_and_fit_a_block_of_128():
    train, validation = load("toysql", "train"), load("toysql", "validation")
    assert (len(train), len(validation), train.skipped, validation.skipped) == (20_000, 1_000, 0, 0)
    prompts = {tuple(p) for p in train.prompts}
    assert len(prompts) == 20_000 and not prompts & {tuple(p) for p in validation.prompts}


def test_toysql_is_the_same_every_time():
    random.seed(5)
    first = load("toysql")
    random.seed(6)
    second = load("toysql")
    assert first.prompts == second.prompts and first.targets == second.targets


def test_toysql_is_answered_by_looking_columns_up_in_the_header():
    """An independent solver: rules over the question's words, and the header's columns without their last letter."""
    for prompt, target in data.toysql("validation"):
        header, question = prompt.splitlines()
        column = {name[:-1]: name for name in header.split(" | ")}
        asks, noun, name, word, value = re.fullmatch(r"(.+) (\w+) (?:with|for) (\w+) (\w+) (\w+)\?", question).groups()
        aggregate = {"highest": "MAX ", "largest": "MAX ", "lowest": "MIN ", "smallest": "MIN ", "how many": "COUNT ",
                     "count the": "COUNT ", "total": "SUM ", "sum of": "SUM ", "average": "AVG ", "mean": "AVG ",
                     "which": "", "what": ""}
        operator = {"over": ">", "above": ">", "under": "<", "below": "<", "is": "=", "of": "="}[word]
        assert target == f"SELECT {aggregate[asks]}{column[noun]} FROM table WHERE {column[name]} {operator} {value}"


def test_toysql_cannot_be_answered_without_the_header():
    """The capitals of the answer's columns are nowhere in the question, and one is about as frequent as another."""
    capitals = collections.Counter()
    for prompt, target in data.toysql("train"):
        question = prompt.splitlines()[1]
        assert question == question.lower()
        capitals.update(re.findall(r"[a-z]([A-Z])", target))
    assert len(capitals) == 26 and max(capitals.values()) < 0.05 * capitals.total()


# WikiSQL, E2E, SAMSum.

@needs_hub
def test_wikisql_reads_header_and_question_and_targets_the_sql():
    examples, tok = load(block_size=1000, **WIKISQL), data.tokenizer(257)
    rows = parquet_rows("Salesforce/wikisql/default/validation/*.parquet")
    assert len(examples) == len(rows) == 1619
    for row, prompt, target in zip(rows, examples.prompts, examples.targets):
        assert tok.decode(prompt) == " | ".join(row["table"]["header"]) + "\n" + row["question"] + "\n"
        assert tok.decode(target) == row["sql"]["human_readable"] and target[-1] == 256


@needs_hub
def test_wikisqls_release_gives_the_hubs_prompts_and_sql(tmp_path):
    for name, split in [("train", "train"), ("dev", "validation")]:
        rows, tables = parquet_rows(f"Salesforce/wikisql/default/{split}/*.parquet"), {}
        with open(tmp_path / f"{name}.jsonl", "w") as out:
            for row in rows:
                table, sql = row["table"], row["sql"]
                tables[table["id"]] = dict(id=table["id"], header=table["header"], types=[], rows=[])
                conds = zip(*(sql["conds"][key] for key in ["column_index", "operator_index", "condition"]))
                sql = dict(sel=sql["sel"], agg=sql["agg"], conds=list(conds))
                out.write(json.dumps(dict(phase=1, question=row["question"], sql=sql, table_id=table["id"])) + "\n")
        (tmp_path / f"{name}.tables.jsonl").write_text("".join(json.dumps(table) + "\n" for table in tables.values()))
    for split in ("train", "validation"):
        release = load("wikisql", split, path=tmp_path, block_size=1000)
        hub = load(split=split, block_size=1000, **WIKISQL)
        assert release.prompts == hub.prompts and release.targets == hub.targets


@needs_hub
@needs_gpt2
def test_prompt_and_target_apart_are_gpt2s_tokens_of_the_whole_text():
    oracle = tiktoken.get_encoding("gpt2")
    examples = load(vocab_size=50257, block_size=512, **WIKISQL)
    for prompt, target in zip(examples.prompts, examples.targets):
        assert prompt + target[:-1] == oracle.encode(oracle.decode(prompt + target[:-1]))


@needs_hub
def test_e2e_trains_on_every_pair_and_knows_all_references_of_a_meaning():
    examples, tok = load(block_size=1000, **E2E), data.tokenizer(257)
    rows = parquet_rows("tuetschek/e2e_nlg/default/validation/*.parquet")
    references = collections.defaultdict(list)
    for row in rows:
        references[row["meaning_representation"]].append(row["human_reference"])
    assert len(examples) == len(rows) == 1078
    for i, row in enumerate(rows):
        assert tok.decode(examples.prompts[i]) == row["meaning_representation"] + "\n"
        assert tok.decode(examples.targets[i]) == row["human_reference"]
        assert examples.references[i] == references[row["meaning_representation"]]
    meanings = [tok.decode(examples.prompts[i])[:-1] for i in examples.distinct()]
    assert sorted(meanings) == sorted(references)


def test_samsum_summarises_a_dialogue_also_one_of_no_words(tmp_path):
    rows = [dict(dialogue="Ann: Tea?\r\nBob: Yes!", summary="Bob wants tea."), dict(dialogue=None, summary="-")]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    examples, tok = load("samsum", "train", path=tmp_path), data.tokenizer(257)
    assert [tok.decode(p) for p in examples.prompts] == ["Ann: Tea?\r\nBob: Yes!\nSummary:\n", "\nSummary:\n"]
    assert examples.references == [["Bob wants tea."], ["-"]]


def test_a_folder_of_parquet_files_without_a_readme_needs_no_configuration(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / "default" / split).mkdir(parents=True)
        table = pa.table({"meaning_representation": ["name[X]"], "human_reference": [f"X in {split}."]})
        pq.write_table(table, tmp_path / "default" / split / "0000.parquet")
    assert load("e2e", "train", path=tmp_path).references == [["X in train."]]
    assert load("e2e", "validation", path=tmp_path, config="default").references == [["X in validation."]]


# The user's mistakes: one line each, before anything is tokenised.

def mistake(kind=ValueError, **kwargs):
    with pytest.raises(kind) as error:
        load(**kwargs)
    return one_line(error)


def test_an_unknown_dataset_is_told_which_there_are():
    message = mistake(dataset="imdb")
    assert "imdb" in message and all(name in message for name in data.DATASETS)


def test_a_block_of_no_tokens_is_refused():
    assert "--block-size" in mistake(dataset="toysql", block_size=0)


def test_a_path_that_is_no_folder_is_named(tmp_path):
    assert "nowhere" in mistake(FileNotFoundError, dataset="wikitext", path=tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "file" in mistake(FileNotFoundError, dataset="samsum", path=tmp_path / "file")


@pytest.mark.parametrize("dataset", ["stdlib", "toysql"])
def test_a_path_for_data_without_files_is_refused_not_ignored(dataset, tmp_path):
    assert "--data-path" in mistake(dataset=dataset, path=tmp_path)


@needs_hub
@pytest.mark.parametrize("dataset, wanted", [("wikitext", "text"), ("samsum", "dialogue, summary"),
                                             ("e2e", "meaning_representation, human_reference")])
def test_missing_columns_are_named_beside_those_found(dataset, wanted, capsys):
    message = mistake(dataset=dataset, path=WIKISQL["path"], config="default")
    assert wanted in message and "phase, question, table, sql" in message
    assert capsys.readouterr().err == ""


@needs_hub
def test_a_configuration_that_is_not_there_is_told_those_that_are():
    assert "wikitext-2-v1" in mistake(**{**WIKITEXT, "config": None})  # wikitext-103-v1 is the default
    assert "default" in mistake(**E2E, config="cleaned")


def test_a_missing_split_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "only this\n"}) + "\n")
    assert "validation" in mistake(dataset="wikitext", path=tmp_path)


def test_a_missing_half_of_wikisqls_release_is_named(tmp_path):
    (tmp_path / "train.tables.jsonl").write_text("")
    assert "train.jsonl" in mistake(FileNotFoundError, dataset="wikisql", split="train", path=tmp_path)


@pytest.mark.parametrize("row", ["{", "[]", "{}", '{"table_id": "2", "question": "", "sql": {}}',
                                 '{"table_id": "1", "question": "", "sql": {"sel": 7, "agg": 0, "conds": []}}'])
def test_a_broken_row_of_wikisqls_release_is_one_line(row, tmp_path):
    (tmp_path / "dev.tables.jsonl").write_text('{"id": "1", "header": ["a"]}\n')
    (tmp_path / "dev.jsonl").write_text(row + "\n")
    assert "dev.jsonl" in mistake(dataset="wikisql", path=tmp_path)


def test_an_empty_split_is_named(tmp_path, capfd):
    for name in ("parquet", "csv", "release"):
        (tmp_path / name).mkdir()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "parquet" / "validation.parquet")
    (tmp_path / "csv" / "validation.csv").write_text("dialogue,summary\n")
    for name in ("dev.jsonl", "dev.tables.jsonl"):
        (tmp_path / "release" / name).write_text("")
    for dataset, name in [("wikitext", "parquet"), ("samsum", "csv"), ("wikisql", "release")]:
        message = mistake(dataset=dataset, path=tmp_path / name)
        assert "validation split" in message and "empty" in message and str(tmp_path / name) in message
    assert capfd.readouterr().err == ""  # the library keeps its own account to itself


def test_a_folder_without_data_and_a_file_that_is_no_parquet_are_one_line(tmp_path):
    assert str(tmp_path) in mistake(dataset="e2e", path=tmp_path)
    (tmp_path / "validation.parquet").write_bytes(b"PAR1 not really")
    assert str(tmp_path) in mistake(dataset="e2e", path=tmp_path)


def test_fewer_tokens_than_one_block_are_counted(corpus):
    assert "15 tokens" in mistake(**{**corpus("one"), "block_size": 16})
    assert len(load(**{**corpus("one"), "block_size": 15})) == 1


def test_a_split_of_examples_all_too_long_tells_their_lengths(tmp_path):
    row = dict(meaning_representation="abc", human_reference="de")
    (tmp_path / "validation.jsonl").write_text(json.dumps(row) + "\n")
    assert "the shortest has 7" in mistake(dataset="e2e", path=tmp_path, block_size=6)
    assert len(load("e2e", path=tmp_path, block_size=7)) == 1


@pytest.mark.parametrize("dataset", ["wikitext", "wikisql", "samsum", "e2e"])
def test_no_network_says_what_works_instead(dataset, monkeypatch):
    def no_network(*args, **kwargs):  # what the library raises then
        raise ConnectionError(f"Couldn't reach '{args[0]}' on the Hub\n(LocalEntryNotFoundError)")
    monkeypatch.setattr(datasets, "load_dataset", no_network)
    message = mistake(OSError, dataset=dataset)
    assert data.DATASETS[dataset]["hub"] in message and "--data-path" in message and "--dataset stdlib" in message


def test_the_library_itself_offline_ends_in_the_same_line(tmp_path):
    command = ("import data\ntry: data.load('samsum', 'train', 257, 128)\n"
               "except OSError as error: print(error)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1 and "--data-path" in done.stdout
    assert done.stderr == "reading knkarthick/samsum from the Hub\n"


@pytest.mark.parametrize("dataset, source", [("wikisql", "Salesforce/wikisql"), ("e2e", "tuetschek/e2e_nlg")])
def test_the_hubs_scripts_are_read_from_its_parquet_branch_a_folder_as_it_is(dataset, source, monkeypatch, tmp_path):
    calls = []

    def record(name, config=None, split=None, revision=None):
        calls.append((name, split, revision))
        raise ValueError("enough")
    monkeypatch.setattr(datasets, "load_dataset", record)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: ["default"])
    mistake(dataset=dataset)
    mistake(dataset=dataset, path=tmp_path)
    assert calls == [(source, "validation", "refs/convert/parquet"), (str(tmp_path), "validation", None)]
