"""What data.py promises. Oracles: bytes and rows read here, tiktoken, pyarrow, and brute force."""
import collections
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path
from unittest.mock import Mock, call

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import torch

import data

SHARED = Path(__file__).parents[2] / "shared"
HUB, TIKTOKEN = SHARED / "hub", SHARED / "tiktoken_cache"
needs_hub = pytest.mark.skipif(not HUB.exists(), reason=f"real data not found in {HUB}")
needs_gpt2 = pytest.mark.skipif(not TIKTOKEN.exists(), reason=f"no GPT-2 tokenizer in {TIKTOKEN}")
WIKITEXT = dict(dataset="wikitext", path=HUB / "Salesforce/wikitext", config="wikitext-2-v1")
WIKISQL = dict(dataset="wikisql", path=HUB / "Salesforce/wikisql")
E2E = dict(dataset="e2e", path=HUB / "tuetschek/e2e_nlg")
TOK = data.tokenizer(257)


@pytest.fixture(autouse=True)
def nothing_outside_tmp(monkeypatch, tmp_path, tmp_path_factory):
    """`datasets` read its environment when it was imported: its own setting counts by now."""
    hf_cache = tmp_path_factory.getbasetemp() / "hf"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hf_cache)
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):  # for processes started here
        monkeypatch.setenv(name, str(hf_cache))
    monkeypatch.setenv("PYTHONPATH", str(Path(data.__file__).parent))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def load(dataset, split="validation", vocab_size=257, block_size=128, **kwargs):
    return data.load(dataset, split, vocab_size, block_size, **kwargs)


def both(dataset, **kwargs):
    return [load(dataset, split, **kwargs) for split in ("train", "validation")]


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(**columns):
    pq.write_table(pa.table(columns), buffer := pa.BufferOutputStream())
    return buffer.getvalue().to_pybytes()


def parquet_rows(folder, pattern):
    """The rows of the one file that matches, without the library under test."""
    (file,) = folder.glob(pattern)
    return pq.read_table(file).to_pylist()


def write(files):
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)


def mistake(kind=(ValueError, OSError), call=load, **kwargs):
    """The message of the error that a call ends in: one line."""
    with pytest.raises(kind) as error:
        call(**kwargs)
    message = str(error.value)
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize("size, oracle", [
    (257, lambda text: list(text.encode())),
    pytest.param(50257, lambda text: tiktoken.get_encoding("gpt2").encode(text), marks=needs_gpt2)])
def test_tokens_are_utf8_bytes_or_tiktokens_and_end_of_text_is_in_no_text(size, oracle):
    tok, text = data.tokenizer(size), "Movement pruning, né à Zürich: 12345  \n\tdef f(x):"
    assert tok.eot == size - 1 and tok.encode(text) == oracle(text)
    assert tok.decode(np.array(oracle(text) + [tok.eot], np.uint16)) == text
    ids = tok.encode("a<|endoftext|>b")
    assert tok.eot not in ids and tok.decode(torch.tensor(ids)) == "a<|endoftext|>b"
    assert TOK.decode([0xC3, 0x6E]) == "\ufffdn"  # no UTF-8


def test_gpt2_out_of_reach_is_an_error_that_names_the_cache(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", Mock(side_effect=OSError("no\nhost")))
    assert "TIKTOKEN_CACHE_DIR" in mistake(call=data.tokenizer, vocab_size=50257)


@pytest.mark.parametrize("n", [2, 9, 15, 16, 17, 18, 40])
def test_every_token_but_the_first_is_predicted_once_from_the_one_before_it(n):
    tokens = np.random.default_rng(n).integers(0, 256, n).astype(np.uint16)
    blocks = data.Blocks(tokens, block_size=8, eot=256)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(n))
    idx, targets, real = (tensor[order.argsort()] for tensor in blocks.batch(order))
    asked = targets != -100
    assert (idx.dtype, targets.dtype, real.dtype) == (torch.int64, torch.int64, torch.bool)
    assert targets[asked].tolist() == tokens[1:].tolist()
    assert idx[asked].tolist() == tokens[:-1].tolist()
    assert (idx[~asked] == 256).all() and torch.equal(real, asked)
    assert idx.shape == targets.shape == real.shape == (-(-(n - 1) // 8), 8)


def documents(blocks):
    """The texts between a stream's ends of text."""
    ends = np.flatnonzero(blocks.tokens == 256)
    return [TOK.decode(part) for part in np.split(blocks.tokens, ends)]


def test_stdlib_holds_each_source_once_and_its_content_chooses_the_split(monkeypatch, tmp_path):
    assert Path(json.__file__).read_bytes().decode() in sum(map(documents, both("stdlib")), [])
    files = {f"package{i % 7}/module{i}.py": f"x = {i if i % 3 else 1}\n" for i in range(300)}
    others = ["site-packages/a", "dist-packages", "test", "json/tests", "lib2to3/tests",
              "encodings", "pydoc_data", "config-3.11-x86_64-linux-gnu", "re/__pycache__"]
    left_out = [*(f"{folder}/it.py" for folder in others), "_sysconfigdata__linux.py", "it.txt"]
    write({f"python/{name}": text.encode() for name, text in files.items()})
    write({f"python/{name}": b"LEFT OUT" for name in left_out})
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python")})
    train, validation = map(documents, both("stdlib", block_size=16))
    assert sorted(train + validation) == sorted(files.values())
    assert not set(train) & set(validation)  # copies, here every third, are in the same
    assert 0.02 < len(validation) / 300 < 0.1  # about a twentieth
    write({"python/a_new_one.py": b"print('new')\n"})
    Path("python/package1").rename("python/elsewhere")
    now = set(documents(load("stdlib", block_size=16)))
    assert now - {"print('new')\n"} == set(validation)


def test_a_sources_hash_puts_13_of_256_into_validation(monkeypatch, tmp_path):
    texts = [f"x = {i}\n" for i in range(300)]
    write({f"python/{i}.py": text.encode() for i, text in enumerate(texts)})
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python")})
    train, validation = map(documents, both("stdlib", block_size=16))
    asked = {text for text in texts if int(hashlib.sha256(text.encode()).hexdigest()[:2], 16) < 13}
    assert set(validation) == asked and set(train) == set(texts) - asked


def test_a_folder_of_plain_texts_is_read_with_its_lines_and_spaces():
    text = "one\n\n  two\r\n = A title = \n\nfour"
    write({f"texts/{split}.txt": f"{split}\n{text}".encode() for split in ("train", "validation")})
    for split in "train", "validation":
        assert documents(load("wikitext", split, path="texts", block_size=4)) == [
            f"{split}\none\n\n  two\n", " = A title = \n\nfour"]


@needs_hub
@needs_gpt2
@pytest.mark.parametrize("split, count", [("train", 48), ("validation", 12)])
def test_wikitext_is_its_articles_with_end_of_text_between(split, count):
    articles = [""]
    for row in parquet_rows(WIKITEXT["path"], f"wikitext-2-v1/{split}-*"):
        if re.fullmatch(" = [^=]+ = \n", row["text"]) and articles[-1]:
            articles.append("")
        articles[-1] += row["text"]
    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    oracle = [i for article in articles for i in [50256] + encode(article)][1:]
    assert load(split=split, vocab_size=50257, **WIKITEXT).tokens.tolist() == oracle
    assert len(articles) == count


def corpus(folder, *lines):
    """What loads a WikiText with these lines, after one that names the split."""
    write({f"{folder}/{split}.jsonl": jsonl(*({"text": f"{line}\n"} for line in (split, *lines)))
           for split in ("train", "validation")})
    return dict(dataset="wikitext", path=folder, block_size=4)


def test_an_article_begins_with_a_title_and_no_other_heading():
    source = corpus("a", " = One = ", " = = Part = = ", "a = b = c", " = Two = ", " = b")
    assert documents(load(**source)) == ["validation\n", " = One = \n = = Part = = \na = b = c\n",
                                         " = Two = \n = b\n"]


def test_what_another_process_has_put_in_the_cache_is_not_tokenised_again(monkeypatch):
    source = corpus("a")
    command = "import data; data.load('wikitext', 'validation', 257, 4, 'a')"
    subprocess.run([sys.executable, "-c", command], check=True)
    monkeypatch.setattr(data, "tokenizer", Mock())
    assert documents(load(**source)) == ["validation\n"]
    assert not data.tokenizer().encode.called and len(list(data.cache_folder().iterdir())) == 1


def test_other_texts_folders_splits_and_vocabularies_do_not_share_a_cache():
    assert documents(load(**corpus("a", "one"))) == ["validation\none\n"]
    assert documents(load(**corpus("b/a", "six"))) == ["validation\nsix\n"]
    source = corpus("a", "two")  # as many bytes
    assert documents(load(**source)) == ["validation\ntwo\n"]
    assert documents(load(split="train", **source)) == ["train\ntwo\n"]
    if TIKTOKEN.exists():
        ids = load(vocab_size=50257, **source).tokens.tolist()
        assert ids == tiktoken.get_encoding("gpt2").encode("validation\ntwo\n")


@pytest.mark.parametrize("damage", [
    lambda b: b"", lambda b: b[:3], lambda b: b[:-2], lambda b: b[:-1], lambda b: b + b"ab",
    lambda b: b[:9] + b"X" + b[10:], lambda b: bytes(len(b))
], ids=["empty", "stub", "short", "odd", "long", "changed", "zeros"])
def test_a_damaged_cache_is_noticed_and_made_anew(damage):
    source = corpus("a")
    load(**source)
    (file,) = data.cache_folder().iterdir()
    whole = np.array([*b"validation\n"], np.uint16).tobytes()  # two bytes a token
    whole += zlib.crc32(whole, 1).to_bytes(4, "little")
    assert file.read_bytes() == whole
    file.write_bytes(damage(whole))
    assert documents(load(**source)) == ["validation\n"]
    assert file.read_bytes() == whole


def test_a_cache_is_whole_or_absent_whoever_else_writes(monkeypatch):
    def slow():
        yield "ab"
        data.cached(Path("cache", "stream"), ["ab", "cd"], TOK)  # meanwhile, the other finishes
        yield "cd"
    assert data.cached(Path("cache", "stream"), slow(), TOK).tolist() == [97, 98, 256, 99, 100]
    monkeypatch.setattr(Path, "write_bytes", lambda path, whole: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.cached(Path("cache", "another"), ["first"], TOK)
    assert [file.name for file in Path("cache").iterdir()] == ["stream"]


CARD = b"""---
configs:
- config_name: wikitext-103-v1
  data_files: [{split: validation, path: wikitext-103-v1/validation-*}]
dataset_info: {config_name: wikitext-103-v1, features: [{name: text, dtype: string}]}
---
"""


def hub_copy(folder, **columns):
    """What loads a WikiText like the Hub's, with these columns."""
    path = f"{folder}/Salesforce/wikitext"
    write({f"{path}/README.md": CARD, f"{path}/wikitext-103-v1/validation-0.parquet":
           columns and parquet(**columns) or b""})
    return dict(dataset="wikitext", path=path, block_size=2)


def test_folders_of_the_same_names_and_cards_are_told_apart_by_their_files():
    assert documents(load(**hub_copy("a", text=["one"]))) == ["one"]
    assert documents(load(**hub_copy("b", text=["a second"]))) == ["a second"]
    for columns, told in [(dict(line=["one"]), "['line'], without ['text']"), ({}, "is empty"),
                          (dict(text=pa.array([], pa.string())), "holds no rows")]:
        assert told in mistake(**hub_copy("c", **columns))


def test_replaced_files_are_read_anew_though_of_the_same_size_and_time():
    for text in "one", "six":
        write({"text/validation.jsonl": jsonl({"text": text}),
               "pair/validation.jsonl": jsonl({"dialogue": text, "summary": text})})
        source = hub_copy("hub", text=[text])
        for file in Path().rglob("validation*.*"):
            os.utime(file, (1e9, 1e9))
        assert documents(load("wikitext", path="text", block_size=2)) == [text]
        assert load("samsum", path="pair").references == [[text]]
        assert documents(load(**source)) == [text]


def told_about(folder, dataset, files):
    write({f"{folder}/{name}": content for name, content in files.items()})
    return load(dataset, path=folder, block_size=6).about


def test_about_counts_what_was_read_and_is_the_same_in_another_process(tmp_path):
    files = {"d/validation-0.jsonl": jsonl({"text": "né"}, {"text": "\n = A = \n"}),
             "d/validation-1.jsonl": jsonl({"text": " = B = \n"}), "train.jsonl": jsonl({})}
    about = told_about("a", "wikitext", files)
    sizes = {name: len(files[name]) for name in list(files)[:2]}
    assert about == dict(source=str(tmp_path / "a"), files=sizes, sha256=about["sha256"],
                         documents=3, tokens=len("né\n = A = \n = B = \n".encode()) + 2)
    pair = dict(meaning_representation="ab", human_reference="c")
    files = {"validation.jsonl": jsonl(pair, pair, pair | dict(human_reference="too long" * 9))}
    pairs = told_about("b", "e2e", files)
    sizes = {name: len(content) for name, content in files.items()}
    assert pairs == dict(source=str(tmp_path / "b"), files=sizes, sha256=pairs["sha256"], rows=3,
                         tokens=5 + 5, left_out=1)  # one exceeds the block
    made = [load(dataset).about for dataset in ("stdlib", "toysql")]
    assert made[1].items() >= dict(source="toysql", files={}, rows=1000).items()
    blocks = load("stdlib")
    assert made[0]["documents"] == len(documents(blocks)) and made[0]["files"] == {}
    assert made[0]["tokens"] == len(blocks.tokens) and sys.version.split()[0] in made[0]["source"]
    command = ("import data, json\nprint(json.dumps([data.load(*args, path=path).about for *args, "
               "path in json.loads(input())]))")
    calls = [("wikitext", "a"), ("e2e", "b"), ("stdlib", None), ("toysql", None)]
    calls = [(dataset, "validation", 257, 6 if path else 128, path) for dataset, path in calls]
    done = subprocess.run([sys.executable, "-c", command], input=json.dumps(calls), text=True,
                          stdout=subprocess.PIPE, check=True)
    assert json.loads(done.stdout) == [about, pairs, *made]


def test_the_hash_about_tells_any_change_of_content_name_or_order_but_not_the_folder():
    one, two = jsonl({"text": "one"}), jsonl({"text": "two"})
    names = "validation-0.jsonl", "validation-1.jsonl"
    sources = [dict(zip(names, [one, two])), dict(zip(names, [two, one])),
               dict(zip(names, [one, one])), {names[0]: one + two}, {names[1]: one + two},
               {names[0]: one + b"\n", names[1]: two}, {"d/" + names[0]: one + two},
               {"d/" + names[1]: one + two}]
    hashes = [[told_about(f"{folder}{i}", "wikitext", files)["sha256"]
               for i, files in enumerate(sources)] for folder in "ab"]
    assert hashes[0] == hashes[1] and len(set(hashes[0])) == len(sources)
    hashes = [load(dataset, split).about["sha256"] for dataset in ("toysql", "stdlib")
              for split in ("train", "validation")]
    assert len(set(hashes)) == 4 and all(re.fullmatch("[0-9a-f]{64}", x) for x in hashes)


@pytest.mark.parametrize("why", ["full", "a file", "a file within"])
def test_a_cache_that_cannot_be_written_names_the_way_out_and_leaves_nothing(why, tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    source, (soft, hard) = corpus("a", 5000 * "x"), resource.getrlimit(resource.RLIMIT_FSIZE)
    if why != "full":
        write({"cache" if why == "a file" else "cache/fine-pruning": b""})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if why == "full" else soft, hard))
        message = mistake(OSError, **source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "cache/fine-pruning") in message and "XDG_CACHE_HOME" in message
    left = [path.name for path in Path("cache").rglob("*")]
    assert left == ([] if why == "a file" else ["fine-pruning"])
    if why == "full":
        assert documents(load(**source)) == [f"validation\n{5000 * 'x'}\n"]  # with room, it goes on


@pytest.mark.parametrize("name", ["a b", "{v,w}", "né", "#%20", ".a/.b", "a:b"])
def test_any_name_of_a_folder_will_do(name):
    file = "default/validation [1].jsonl"
    for folder in ("v", "v1", "w", name):  # a pattern in place of the name would find those
        write({f"{folder}/{file}": jsonl({"text": f"in {folder}"})})
    blocks = load("wikitext", path=name, block_size=2)
    assert documents(blocks) == [f"in {name}"] and [*blocks.about["files"]] == [file]
    hub_copy("v", text=["beside"])
    assert documents(load(**hub_copy(name, text=[f"in {name}"]))) == [f"in {name}"]


def test_one_odd_row_makes_no_json_of_the_others():
    write({"validation.jsonl": jsonl(*({"text": "abc"} for _ in range(300)), {"text": {"a": 1}})})
    message = mistake(dataset="wikitext", path=".", block_size=2)
    assert "text" in message and re.search("row 30[01]", message)  # some releases count from 0


@pytest.mark.parametrize("name", ["[v1]", "*", "v?"])
def test_a_name_that_stands_for_others_is_a_mistake(name):
    for folder in ("v", "v1", name):
        write({f"{folder}/validation.jsonl": jsonl({"text": f"in {folder}"})})
    assert f"rename {Path(name).resolve()}" in mistake(dataset="wikitext", path=name)


# Prompts and targets.

RNG = random.Random(0)
PAIRS = [["".join(RNG.choices("abc", k=RNG.randint(1, 9))) for _ in "pt"] for _ in range(40)]
EXAMPLES = data.Examples(PAIRS, 100, TOK)


def test_a_batch_asks_for_the_target_and_end_of_text_only():
    order = random.Random(1).sample(range(40), 16)
    idx, targets, real = EXAMPLES.batch(order)
    assert (idx.dtype, targets.dtype, real.dtype) == (torch.int64, torch.int64, torch.bool)
    assert idx.shape[1] == max(EXAMPLES.sizes[i] for i in order) - 1
    for row, i in enumerate(order):
        prompt, target = (list(text.encode()) for text in PAIRS[i])
        n, pad = len(prompt + target), idx.shape[1] - len(prompt + target)
        assert idx[row].tolist() == prompt + target + [256] * pad
        assert targets[row].tolist() == [-100] * (len(prompt) - 1) + target + [256] + [-100] * pad
        assert real[row].tolist() == [True] * n + [False] * pad


def test_examples_longer_than_the_block_are_left_out_whole_but_right_answers():
    pairs = [("ab", "cd"), ("ab", "cde"), ("abcdef", "x"), ("a", "bcd"), ("ab", "y")]
    examples = data.Examples(pairs, 5, TOK)
    kept = [(bytes(p), bytes(t[:-1])) for p, t in zip(examples.prompts, examples.targets)]
    assert kept == [(b"ab", b"cd"), (b"a", b"bcd"), (b"ab", b"y")] and len(examples) == 3
    assert examples.sizes == [5, 6, 8, 5, 4]  # with end of text
    assert examples.references == [["cd", "cde", "y"], ["bcd"], ["cd", "cde", "y"]]
    assert examples.distinct() == [0, 1]  # one for each prompt
    assert examples.by_length() == [2, 0, 1]  # the shortest first


@pytest.mark.parametrize("block, wide", [(200, 128), (100, 100)])
def test_on_a_gpu_a_batch_of_examples_is_as_wide_as_many_others(block, wide):
    examples = data.Examples([("x" * 60, "y" * 9), ("z", "")], block, data.tokenizer(257))
    idx, targets, real = examples.batch([0, 1], "cuda")
    narrow = examples.batch([0, 1])
    T = narrow[0].size(1)
    for ours, plain, value in zip((idx, targets, real), narrow, (256, -100, False)):
        assert ours.shape == (2, wide) and ours[:, :T].equal(plain) and (ours[:, T:] == value).all()


def test_examples_left_out_are_reported_in_one_line(capsys):
    left_out = 1000 - len(load("toysql", block_size=100))
    (line,) = capsys.readouterr().err.splitlines()
    assert all(words in line for words in ("toysql validation", f"{left_out} of 1000", "of 100"))


def numbered(sequences):
    """A batch of ten in which each token is its place in the batch."""
    _, targets, real = sequences.batch(range(10))
    return torch.arange(real.numel()).view_as(real), targets, real


PADDED = numbered(EXAMPLES)
FULL = numbered(data.Blocks(np.zeros(100, dtype=np.uint16), 9, 256))


def cut(batch, parts=1, processes=1, **kwargs):
    """The micro-batches of all processes; the tokens in their `places`, and in `similar`."""
    micros, places, similar = [], [], []
    for process in range(processes):
        for micro in data.micro_batches(batch, "cpu", parts, process, processes, **kwargs):
            micros.append(micro)
            for tokens, some in (places, micro.places), (similar, micro.similar):
                tokens += micro.idx.flatten()[slice(None) if some is None else some].tolist()
    return micros, places, similar


@pytest.mark.parametrize("sim_tokens", [None, 0, 7, 60, 10_000])
@pytest.mark.parametrize("parts, processes", [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)])
@pytest.mark.parametrize("batch", [PADDED, FULL], ids=["padded", "full"])
def test_micro_batches_are_together_the_whole_batch(batch, parts, processes, sim_tokens):
    idx, targets, real = batch
    asked, seen = targets != -100, set(idx[real].tolist())
    micros, places, similar = cut(batch, parts, processes, sim_tokens=sim_tokens, seed=3)
    assert len(micros) == parts * processes
    assert torch.equal(torch.cat([micro.idx for micro in micros]), idx)
    assert torch.equal(torch.cat([micro.targets for micro in micros]), targets[asked])
    assert places == idx[asked].tolist()
    assert {micro.divisor * processes for micro in micros} == {asked.sum().item()}
    assert len(similar) == min(len(seen), 10_000 if sim_tokens is None else sim_tokens)
    assert seen.issuperset(similar) and len(set(similar)) == len(similar)
    assert similar == cut(batch, sim_tokens=sim_tokens, seed=3)[2]  # however the batch is cut up
    for micro in micros:  # None says: all of them
        for some in (micro.places, micro.similar):
            assert some is None or len(some) < micro.idx.numel()
    assert "10 sequences" in mistake(call=data.micro_batches, batch=batch, device="cpu", parts=11)


def test_the_similarity_sees_each_token_as_often_as_any_other():
    counts = collections.Counter(i for seed in range(500)
                                 for i in cut(PADDED, sim_tokens=30, seed=seed)[2])
    p = 30 / int(PADDED[2].sum())
    within = 6 * (500 * p * (1 - p)) ** 0.5  # six standard deviations
    assert len(counts) == PADDED[2].sum()
    assert all(abs(count - 500 * p) < within for count in counts.values())


def test_toysql_is_answered_by_looking_columns_up_in_the_header():
    """An independent solver: rules over the question's words, and columns without last letter."""
    said = {"highest": "MAX ", "largest": "MAX ", "lowest": "MIN ", "smallest": "MIN ",
            "how many": "COUNT ", "count the": "COUNT ", "total": "SUM ", "sum of": "SUM ",
            "average": "AVG ", "mean": "AVG ", "which": "", "what": ""}
    compared = {"over": ">", "above": ">", "under": "<", "below": "<", "is": "=", "of": "="}
    capitals = collections.Counter()
    for prompt, target in data.toysql("train")[0]:
        header, question = prompt.splitlines()
        column = {name[:-1]: name for name in header.split(" | ")}
        asked, noun, name, word, value = re.fullmatch(
            r"([a-z ]+) ([a-z]+) (?:with|for) ([a-z]+) ([a-z]+) (\w+)\?", question).groups()
        assert target == (f"SELECT {said[asked]}{column[noun]} FROM table "
                          f"WHERE {column[name]} {compared[word]} {value}")
        capitals.update(re.findall("[a-z]([A-Z])", target))
    assert len(capitals) == 26 and max(capitals.values()) < 0.05 * sum(capitals.values())


def test_toysql_is_the_same_everywhere_and_its_splits_share_no_prompt():
    digests = [hashlib.sha256(repr(data.toysql(split)[0]).encode()).hexdigest()[:16]
               for split in ("train", "validation")]
    assert digests == ["d1b14708fb834628", "9a8853ca2202a4f6"]
    train, validation = both("toysql")  # none is longer than the block of 128
    assert (len(train), len(validation)) == (20_000, 1_000)
    assert len({tuple(p) for p in train.prompts + validation.prompts}) == 21_000


@needs_hub
@pytest.mark.parametrize("source, count, pair_of", [
    (WIKISQL, 1619, lambda row: (" | ".join(row["table"]["header"]) + f"\n{row['question']}\n",
                                 row["sql"]["human_readable"])),
    (E2E, 1078, lambda row: (row["meaning_representation"] + "\n", row["human_reference"]))])
def test_prompts_targets_and_references_are_the_files(source, count, pair_of):
    examples, answers = load(block_size=1000, **source), collections.defaultdict(list)
    pairs = [*map(pair_of, parquet_rows(source["path"], "default/validation/*.parquet"))]
    for prompt, target in pairs:
        answers[prompt].append(target)
    assert [*zip(map(TOK.decode, examples.prompts), map(TOK.decode, examples.targets))] == pairs
    assert examples.references == [answers[prompt] for prompt, _ in pairs] and len(pairs) == count
    distinct = [TOK.decode(examples.prompts[i]) for i in examples.distinct()]
    assert sorted(distinct) == sorted(answers)


@needs_hub
@pytest.mark.parametrize("name, split", [("train", "train"), ("dev", "validation")])
def test_wikisqls_release_gives_the_hubs_prompts_and_sql(name, split):
    rows, tables = parquet_rows(WIKISQL["path"], f"default/{split}/*.parquet"), {}
    for row in rows:
        table, sql = row.pop("table"), row["sql"]
        row["table_id"], tables[table["id"]] = table["id"], table
        conds = [sql["conds"][key] for key in ("column_index", "operator_index", "condition")]
        row["sql"] = dict(sel=sql["sel"], agg=sql["agg"], conds=list(zip(*conds)))
    write({f"{name}.jsonl": jsonl(*rows), f"{name}.tables.jsonl": jsonl(*tables.values())})
    release = load("wikisql", split, path=".", block_size=1000)
    hub = load(split=split, block_size=1000, **WIKISQL)
    assert release.prompts == hub.prompts and release.targets == hub.targets


@needs_hub
@needs_gpt2
def test_prompt_and_target_apart_are_gpt2s_tokens_of_the_whole_text():
    oracle = tiktoken.get_encoding("gpt2")
    examples = load(vocab_size=50257, block_size=512, **WIKISQL)
    for prompt, target in zip(examples.prompts, examples.targets):
        assert prompt + target[:-1] == oracle.encode(oracle.decode(prompt + target[:-1]))


def test_samsum_summarises_a_dialogue_also_one_of_no_words():
    write({"train.jsonl": jsonl(dict(dialogue="Ann: Tea?\r\nBob: Yes!", summary="Bob wants tea."),
                                dict(dialogue=None, summary="-"))})
    examples = load("samsum", "train", path=".")
    assert [TOK.decode(p) for p in examples.prompts] == [
        "Ann: Tea?\r\nBob: Yes!\nSummary:\n", "\nSummary:\n"]
    assert examples.references == [["Bob wants tea."], ["-"]]


@pytest.mark.parametrize("name, sign", [("validation.csv", ","), ("validation.tsv", "\t")])
def test_a_cell_of_a_table_is_the_text_that_stands_there(name, sign):
    pairs = [["NA", "null"], ["", "one"], ["nan", ""], ["None", "12"], ["3.5", "-"]]
    lines = [["id", "dialogue", "summary"], *([str(i), *pair] for i, pair in enumerate(pairs))]
    write({name: "\n".join(map(sign.join, lines)).encode()})
    examples = load("samsum", path=".")
    assert [TOK.decode(p) for p in examples.prompts] == [f"{a}\nSummary:\n" for a, _ in pairs]
    assert [TOK.decode(t) for t in examples.targets] == [b for _, b in pairs]


def test_a_folder_of_parquet_files_without_a_readme_needs_no_configuration():
    for split in ("train", "validation"):
        write({f"default/{split}/0000.parquet": parquet(text=[split])})
    assert documents(load("wikitext", "train", path=".", block_size=2)) == ["train"]
    assert documents(load("wikitext", path=".", block_size=2, config="default")) == ["validation"]


# The user's mistakes: one line each.

def case(told, dataset, files={}, path=".", **kwargs):
    kwargs |= dict(dataset=dataset, path=path)
    return pytest.param(told.split(" + "), files, kwargs, id=told)


README = b"---\nconfigs:\n- {config_name: small, data_files: it.txt}\n---\n"
ONE_TABLE = {"dev.tables.jsonl": jsonl({"id": "1", "header": ["a"]})}
NO_ROWS = parquet(text=pa.array([], pa.string()))
QUERY = dict(question=["?"], sql=[{"human_readable": "SELECT a FROM table"}])
A_ROW = b'{"table_id": "1", "question": "", "sql": {"sel": 0, "agg": 0, "conds": []}}'


def not_text(dataset, columns, column, value, row, **others):
    """A parquet file with a `value`, in a column, that is no text."""
    return case(f"HERE + column {column} + {value} + row {row}", dataset,
                {"default/validation/0.parquet": parquet(**columns, **others)})


TYPED = b"---\ndataset_info: {features: [{name: text, dtype: string}]}\n---\n"
MEANINGS = jsonl(*(dict(meaning_representation=n * "a", human_reference="de") for n in (3, 7)))


@pytest.mark.parametrize("told, files, kwargs", [
    case(" + ".join(["imdb", *data.DATASETS]), "imdb"),
    case("--block-size", "toysql", path=None, block_size=0),
    case("257 + 50257", "toysql", path=None, vocab_size=50304),
    case("--data-path", "toysql"),
    case("--data-config", "stdlib", path=None, config="all"),
    case("nowhere", "wikitext", path="nowhere"),
    case("a file", "samsum", {"a file": b""}, path="a file"),
    case("HERE", "e2e"),
    case("HERE + validation", "wikitext", {"train.jsonl": jsonl({"text": "only this"})}),
    case("HERE + Parquet", "e2e", {"validation.parquet": b"PAR1 not really"}),
    case("HERE + validation split + holds no rows", "wikitext", {"validation.parquet": NO_ROWS}),
    case("HERE + validation split + holds no rows + validation.jsonl is empty", "samsum",
         {"validation.jsonl": b""}),
    case("HERE + validation split + row 1 makes no query", "wikisql", ONE_TABLE | {
        "dev.jsonl": A_ROW.replace(b'"1"', b'"2"', 1)}),
    case("HERE + validation split + row 1 makes no query + below 0", "wikisql", ONE_TABLE | {
        "dev.jsonl": A_ROW.replace(b'"agg": 0', b'"agg": -1')}),
    case("HERE + validation split + row 2 makes no query", "wikisql", ONE_TABLE | {
        "dev.jsonl": A_ROW + b"\n" + A_ROW.replace(b'"sel": 0', b'"sel": 1')}),
    case("HERE + validation split + it has only train", "samsum", {"train.jsonl": b"{}"}),
    case("has 0 tokens, too few", "wikitext", {"validation.jsonl": jsonl({"text": ""})}),
    case("HERE + validation split + holds no rows", "samsum", {
        "validation.csv": b"dialogue,summary\n"}),
    case("HERE + validation split + holds no rows", "wikisql", {"dev.jsonl": b""} | ONE_TABLE),
    case("its configurations are small, without wikitext-103-v1", "wikitext",
         {"README.md": README, "it.txt": b"text"}),
    case("its configurations are default, without cleaned", "e2e", {"validation.jsonl": MEANINGS},
         config="cleaned"),
    case("HERE + files are in a, b, and no README.md + --data-path", "wikitext",
         {f"{name}/validation.txt": b"text" for name in "ab"}),
    case("dialogue + summary + a.b", "samsum", {"validation.jsonl": b'{"a": {"b": 1}}'}),
    case("dev.jsonl", "wikisql", ONE_TABLE),
    *(case("dev.jsonl", "wikisql", ONE_TABLE | {"dev.jsonl": row}) for row in
      (b"{", b"[]", b"{}", b'{"table_id": "2", "question": "", "sql": {}}',
       b'{"table_id": "1", "question": "", "sql": {"sel": 7, "agg": 0, "conds": []}}')),
    *(not_text("wikitext", dict(text=values), "text", *told) for values, *told in (
        ([7, 8], 7, 1), ([b"a"], "b'a'", 1), (["a", "b", None], "None", 3), ([["a"]], "['a']", 1))),
    *(not_text("e2e", dict(human_reference=values), "human_reference", *told,
               meaning_representation=["m"] * len(values)) for values, *told in (
        ([7, 8], 7, 1), ([b"a"], "b'a'", 1), (["a", "b", None], "None", 3), ([True], "True", 1))),
    *(not_text("wikisql", dict(table=[{"header": header}]), "table.header", told, 1, **QUERY)
      for header, told in (
          (None, "None"), ("a", "'a'"), (["a", None], "['a', None]"), ([7], "[7]"))),
    case("column table.header + 'ab' + row 1", "wikisql", {
        "dev.tables.jsonl": jsonl({"id": "1", "header": "ab"}), "dev.jsonl": A_ROW}),
    case("column dialogue + 17 + row 1", "samsum", {"validation.csv": b"dialogue,summary\n17,a\n"}),
    case("column text + 7 + row 1", "wikitext", {"README.md": TYPED,
                                                 "validation.parquet": parquet(text=[7])}),
    case("column text + 7 + row 2", "wikitext", {f"validation-{i}.jsonl": jsonl({"text": text})
                                                 for i, text in enumerate(["a", 7])}),
    case("too high + HERE/hub/Salesforce/wikitext would do", "wikitext",
         {"hub/Salesforce/wikitext/validation.txt": b"text"}, path="hub"),
    case("too high + HERE/hub/Salesforce/wikitext would do", "wikitext",
         {"hub/Salesforce/wikitext/validation.txt": b"text"}, path="hub/Salesforce"),
    case("11 tokens + --block-size", "wikitext", {"validation.txt": b"eleven byte"}, block_size=12),
    case("2 of 2 + 7 to 11 + --block-size", "e2e", {"validation.jsonl": MEANINGS}, block_size=6)])
def test_a_mistake_is_told_in_one_line(told, files, kwargs, tmp_path, capfd, caplog):
    write(files)
    message = mistake(**kwargs)
    assert all(word.replace("HERE", str(tmp_path)) in message for word in told)
    assert capfd.readouterr().err == "" and not caplog.records  # nor has the library its say


@pytest.mark.parametrize("dataset, revision, wanted", [
    ("wikitext", None, ["README.md", "wikitext-103-v1/*"]), ("samsum", None, None),
    ("e2e", "refs/convert/parquet", None), ("wikisql", "refs/convert/parquet", None)])
def test_a_hub_out_of_reach_is_named_beside_what_works(dataset, revision, wanted, monkeypatch):
    no_network, hub = Mock(side_effect=OSError("two\nlines")), data.DATASETS[dataset]["hub"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    message = mistake(ConnectionError, dataset=dataset)
    assert all(word in message for word in (hub, "OSError", "--data-path", "--dataset stdlib"))
    assert no_network.call_args_list[0] == call(hub, repo_type="dataset", revision=revision,
                                                allow_patterns=wanted, local_files_only=False)
    write({"validation.jsonl": b""})
    mistake(ValueError, dataset=dataset, path=".")
    assert no_network.call_count == 2  # the second time for what is kept; a folder asks nobody


def test_the_library_itself_offline_ends_in_the_same_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = ("import data\ntry: data.load('samsum', 'train', 257, 128)\n"
               "except OSError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and "--data-path" in done.stdout
    assert done.stderr.endswith("reading knkarthick/samsum from the Hub\n")  # and nothing after it
