"""Text in, batches of token ids out.

`stdlib` and `wikitext` are *language modelling*: one stream of tokens, cut into blocks, every token predicted from
those before it (`Blocks`). `toysql`, `wikisql`, `samsum` and `e2e` are *prompt -> target*: only the target's tokens
count in the loss (`Examples`). For both, `load("stdlib", "train", 257, 128).batch([0, 1, 2])` gives three tensors

    idx      [B, T] int64   what the model reads
    targets  [B, T] int64   what it should say next at each place, -100 where nothing is asked
    real     [B, T] bool    False on padding
"""

import hashlib
import json
import random
import re
import sys
import sysconfig
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

# Where each data set is (None: on every machine), its columns there, and the measure it asks for. The Hub's `wikisql`
# and `e2e_nlg` are scripts, which `datasets` no longer runs; the Hub keeps what they produced on a branch of its own.
PARQUET = "refs/convert/parquet"
DATASETS = {
    "stdlib": dict(hub=None, metric="perplexity"),
    "wikitext": dict(hub="Salesforce/wikitext", config="wikitext-103-v1", columns=["text"], metric="perplexity"),
    "toysql": dict(hub=None, metric="exact_match"),
    "wikisql": dict(hub="Salesforce/wikisql", revision=PARQUET, metric="exact_match",
                    columns=["question", "table.header", "sql.human_readable"]),
    "samsum": dict(hub="knkarthick/samsum", columns=["dialogue", "summary"], metric="rouge"),
    "e2e": dict(hub="tuetschek/e2e_nlg", revision=PARQUET, metric="bleu",
                columns=["meaning_representation", "human_reference"]),
}


def load(dataset, split, vocab_size, block_size, path=None, config=None, cache_dir="cache"):
    """A split ("train" or "validation") as `Blocks` or `Examples` of at most `block_size` tokens.

    `path`, a folder, replaces the Hub; `config` names a configuration of the source; `cache_dir` keeps token streams.
    What the user can get wrong ends in a ValueError or an OSError with one line that says what would work.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown dataset {dataset!r}: --dataset is one of {', '.join(DATASETS)}")
    known = DATASETS[dataset]
    if not known["hub"] and (path or config):
        raise ValueError(f"{dataset} reads no data files: leave out --data-path and --data-config")
    if path and not Path(path).is_dir():
        raise FileNotFoundError(f"--data-path {path} is not a folder: give one that holds a copy of {known['hub']}")
    if block_size < 1:
        raise ValueError(f"a block of {block_size} tokens holds nothing: --block-size must be at least 1")
    tok = tokenizer(vocab_size)
    if known["metric"] == "perplexity":
        documents, fingerprint = stdlib(split) if dataset == "stdlib" else wikitext(split, path, config)
        # Named by a hash of all that decides the content; 2 stands for the code below: raise it when that changes.
        source = repr((2, dataset, split, vocab_size, str(path and Path(path).resolve()), config, fingerprint))
        name = f"{dataset}-{split}-{vocab_size}-{hashlib.sha256(source.encode()).hexdigest()[:16]}.bin"
        tokens = cached(Path(cache_dir) / name, documents, tok)
        if len(tokens) < max(block_size, 2):
            raise ValueError(f"{dataset} {split} has {len(tokens)} tokens: choose a smaller --block-size, or more data")
        return Blocks(tokens, block_size, tok.eot)
    pairs = toysql(split) if dataset == "toysql" else hub_pairs(dataset, split, path, config)
    examples = Examples(pairs, block_size, tok)
    if examples.skipped:
        message = (f"{dataset} {split}: {examples.skipped} of {len(pairs)} examples are longer than the block of "
                   f"{block_size} tokens (the shortest has {min(examples.sizes)}, the longest {max(examples.sizes)})")
        if not len(examples):
            raise ValueError(f"{message}: choose a larger --block-size")
        print(f"{message} and are left out", file=sys.stderr)
    return examples


def tokenizer(vocab_size):
    """The tokenizer of a vocabulary: `.encode(text) -> list[int]`, `.decode(ids) -> str`, `.eot`, the end-of-text id.

    257: UTF-8 bytes, and 256 for end of text. 50257: GPT-2's byte pairs. No text encodes to end of text, not even one
    that spells "<|endoftext|>"; decoding leaves it out. Raises ValueError for other sizes, OSError if out of reach.
    """
    if vocab_size == 257:
        return SimpleNamespace(encode=lambda text: list(text.encode("utf-8", errors="replace")), eot=256,
                               decode=lambda ids: bytes(int(i) for i in ids if i < 256).decode(errors="replace"))
    if vocab_size != 50257:
        raise ValueError(f"no tokenizer has {vocab_size} tokens: a vocabulary is 257 (bytes) or 50257 (GPT-2's)")
    import tiktoken
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network, or a damaged file
        raise OSError("GPT-2's tokenizer is out of reach: set TIKTOKEN_CACHE_DIR to a folder with tiktoken's files, "
                      "or use --model tiny, which reads bytes") from error
    return SimpleNamespace(encode=gpt2.encode_ordinary, eot=gpt2.eot_token,
                           decode=lambda ids: gpt2.decode([int(i) for i in ids if i != gpt2.eot_token]))


class Blocks:
    """A stream of N tokens as ceil((N - 1) / T) blocks side by side: every token but the first is predicted once."""

    def __init__(self, tokens, block_size, eot):
        self.tokens, self.block_size, self.eot = tokens, block_size, eot  # tokens: [N] uint16, a memory map

    def __len__(self):
        return -(-(len(self.tokens) - 1) // self.block_size)

    def batch(self, indices):
        """Blocks number `indices` (B ints): idx, targets, real, each [B, T]. The last block is padded on the right."""
        places = torch.as_tensor(indices)[:, None] * self.block_size + torch.arange(self.block_size + 1)  # [B, T + 1]
        real = places[:, 1:] < len(self.tokens)  # [B, T]; here every real place has a target
        ids = torch.tensor(self.tokens[places.clamp(max=len(self.tokens) - 1)], dtype=torch.int64)  # [B, T + 1]
        return ids[:, :-1].where(real, self.eot), ids[:, 1:].where(real, -100), real

    def by_length(self):
        """The order to evaluate in: blocks are all as long, so as they come."""
        return list(range(len(self)))


class Examples:
    """(prompt, target) pairs of text as token ids; the loss is on the target and the end of text after it.

    `prompts[i]`, `targets[i]` (with end of text): lists of ids. `references[i]`: the texts of all targets that the data
    has for this prompt. `skipped`: pairs left out because prompt and target exceed `block_size` tokens together.
    """

    def __init__(self, pairs, block_size, tok):
        self.block_size, self.eot, self.prompts, self.targets, self.references = block_size, tok.eot, [], [], []
        self.first = {}  # prompt -> the first example that has it
        self.sizes = []  # tokens of every pair, also of those left out
        references = {}  # prompt -> all its targets' texts: those too long to train on are right answers too
        for prompt, target in pairs:
            references.setdefault(prompt, []).append(target)
            p, t = tok.encode(prompt), tok.encode(target) + [tok.eot]
            self.sizes.append(len(p) + len(t))
            if self.sizes[-1] <= block_size:
                self.first.setdefault(prompt, len(self.prompts))
                self.prompts.append(p)
                self.targets.append(t)
                self.references.append(references[prompt])
        self.skipped = len(self.sizes) - len(self.prompts)

    def __len__(self):
        return len(self.prompts)

    def batch(self, indices):
        """Examples number `indices` (B ints), padded on the right to the longest: idx, targets, real, each [B, T]."""
        # Attention looks only to the left, so no real token ever sees this padding: it changes no result.
        texts = [torch.tensor(self.prompts[i] + self.targets[i]) for i in indices]
        asked = [torch.tensor([-100] * (len(self.prompts[i]) - 1) + self.targets[i]) for i in indices]
        idx = pad_sequence([text[:-1] for text in texts], True, self.eot)  # [B, T]; a text's last token is never read
        targets = pad_sequence(asked, True, -100)  # [B, T]
        real = pad_sequence([torch.ones(len(text) - 1, dtype=torch.bool) for text in texts], True)  # [B, T]
        return idx, targets, real

    def by_length(self):
        """The order to evaluate in: the shortest first, so that neighbours need little padding."""
        return sorted(range(len(self)), key=lambda i: len(self.prompts[i]) + len(self.targets[i]))

    def distinct(self):
        """One example per distinct prompt: what to generate from, where `references` has several answers to each."""
        return list(self.first.values())


def micro_batches(batch, device, parts=1, process=0, processes=1, sim_tokens=None, seed=0):
    """The share of `process` in a `batch` of B sequences, as `parts` micro-batches on `device`. Each has

        idx      [B', T]   what the model reads
        places   [n]       which of its B' * T tokens are asked for the next one, None = all of them
        targets  [n]       and what that is
        similar  [s]       which of its B' * T tokens the running similarity sees, None = all of them
        divisor            tokens asked for in the whole batch, over `processes`: a sum of losses
                           divided by it, averaged over the processes, is the mean over the batch

    The similarity sees all that is not padding, or `sim_tokens` = N random tokens of it, drawn from
    `seed` for the whole batch: how that is cut up changes nothing. Indices are made on the CPU, for
    finding them on a GPU would mean to wait for it. Raises ValueError if there are fewer sequences
    than micro-batches.
    """
    idx, targets, seen = batch
    if len(idx) < parts * processes:
        raise ValueError(f"a batch of {len(idx)} sequences can't be split into {parts * processes} "
                         "micro-batches")
    if sim_tokens is not None:
        places = seen.flatten().nonzero().squeeze(1)
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
        seen = torch.zeros(seen.numel(), dtype=torch.bool).index_fill_(
            0, places[order[:sim_tokens]], True).view_as(seen)  # [B, T]
    asked, made = targets != -100, []
    for part in range(process * parts, (process + 1) * parts):
        micro = dict(zip(("idx", "targets", "places", "similar"), (
            tensor.tensor_split(parts * processes)[part] for tensor in (idx, targets, asked, seen))))
        micro["targets"] = micro["targets"][micro["places"]]  # [n]
        for name in ("places", "similar"):
            everything = bool(micro[name].all())
            micro[name] = None if everything else micro[name].flatten().nonzero().squeeze(1)
        if device.startswith("cuda"):  # copying from pinned memory holds up nobody
            micro = {name: tensor if tensor is None else tensor.pin_memory().to(device, non_blocking=True)
                     for name, tensor in micro.items()}
        made.append(SimpleNamespace(**micro, divisor=int(asked.sum()) / processes))
    return made


# Language modelling: documents, and the stream of tokens made from them.


def stdlib(split):
    """The running Python's standard library: (its sources as texts, their fingerprint); about 5 % are validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # Left out: installed packages; tests, which some distributions strip, so machines would differ; generated tables.
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
    documents, digest = [], hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if skip.intersection(parts) or any(part.startswith(("config-", "_sysconfigdata")) for part in parts):
            continue
        source = file.read_bytes()
        # A hash of the content, not of the path, chooses the split: so a copied file never stands in both.
        if source and (hashlib.sha256(source).digest()[0] < 13) == (split == "validation"):  # 13 of 256
            documents.append(source.decode("utf-8", errors="replace"))
            digest.update(b"%d " % len(source) + source)
    return documents, digest.hexdigest()


def wikitext(split, path, config):
    """WikiText: (its articles as texts, made one at a time, a fingerprint of their files or of the Hub's commit)."""
    rows = read("wikitext", split, path, config)

    def articles():
        article = ""
        for line in rows["text"]:
            if re.fullmatch(r" = (?!= ).+ = \n", line) and article:  # " = Title = ", not " = = Section = = "
                yield article
                article = ""
            article += line
        yield article

    return articles(), rows._fingerprint


def cached(file, documents, tok):
    """The documents' tokens, end of text between them: a memory map [N] uint16 of `file`, written first if need be.

    The file, tokens and then their CRC-32, is moved into place when written: whole or absent. Damaged, it is made anew.
    """
    if file.exists() and file.stat().st_size >= 4 and file.stat().st_size % 2 == 0:
        stored = np.memmap(file, np.uint16, mode="r")
        if zlib.crc32(stored[:-2]) == int(stored[-2:].view(np.uint32)[0]):
            return stored[:-2]
    file.parent.mkdir(parents=True, exist_ok=True)
    stream = bytearray()  # 0.2 GB for WikiText-103
    for i, document in enumerate(documents):
        stream += np.array([tok.eot] * (i > 0) + tok.encode(document), dtype=np.uint16).tobytes()
    stream += np.uint32(zlib.crc32(stream)).tobytes()
    with TemporaryDirectory(dir=file.parent) as beside:  # one of its own: others may be writing theirs
        Path(beside, "tokens").write_bytes(stream)
        Path(beside, "tokens").replace(file)
    return np.memmap(file, np.uint16, mode="r")[:-2]


# Prompts and targets. A prompt ends with a newline, and GPT-2's tokenizer joins no newline with a letter: so the two,
# encoded apart, give the tokens of the whole text.


def hub_pairs(dataset, split, path, config):
    """wikisql, samsum or e2e as a list of (prompt, target) texts."""
    if dataset == "wikisql" and path and list(Path(path).glob("*.tables.jsonl")):
        return wikisql_release(Path(path), split)
    table = read(dataset, split, path, config)
    rows = zip(*(table[column] for column in DATASETS[dataset]["columns"]))
    if dataset == "wikisql":
        return [(sql_prompt(header, question), sql) for question, header, sql in rows]
    if dataset == "samsum":
        return [(f"{dialogue or ''}\nSummary:\n", summary or "") for dialogue, summary in rows]  # one has no dialogue
    return [(f"{meaning}\n", reference) for meaning, reference in rows]


def sql_prompt(header, question):
    """The prompt of wikisql and toysql: the table's columns ("No. | Player") on one line, the question on the next."""
    return f"{' | '.join(header)}\n{question}\n"


def to_sql(header, select, aggregate, conditions):
    """WikiSQL's human-readable form. Columns and operators are numbers; conditions are (column, operator, value)."""
    aggregate = ["", "MAX ", "MIN ", "COUNT ", "SUM ", "AVG "][aggregate]
    where = " AND ".join(f"{header[column]} {'=><'[operator]} {value}" for column, operator, value in conditions)
    return f"SELECT {aggregate}{header[select]} FROM table" + (f" WHERE {where}" if where else "")


def wikisql_release(folder, split):
    """WikiSQL as its authors publish it: questions in {train,dev}.jsonl, headers in {train,dev}.tables.jsonl."""
    name = "train" if split == "train" else "dev"
    questions, tables = folder / f"{name}.jsonl", folder / f"{name}.tables.jsonl"
    pairs = []
    try:
        headers = {table["id"]: table["header"] for table in map(json.loads, open(tables, encoding="utf-8"))}
        for row in map(json.loads, open(questions, encoding="utf-8")):
            header, sql = headers[row["table_id"]], row["sql"]
            pairs.append((sql_prompt(header, row["question"]), to_sql(header, sql["sel"], sql["agg"], sql["conds"])))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{questions} is not WikiSQL's release: {type(error).__name__} {error}") from error
    if not pairs:
        raise ValueError(f"the {split} split is empty: {questions} has no questions")
    return pairs


def toysql(split, train=20_000, validation=1_000):
    """A made-up WikiSQL for small models: (prompt, target) texts, the same ones always, at most 128 bytes together.

        cityK | goalF | teamX
        how many team with goal over 312?
        SELECT COUNT teamX FROM table WHERE goalF > 312

    The question lacks the last letter of a column's name, which is drawn anew for every schema: so there is no answer
    without looking columns up in the header.
    """
    rng = random.Random(2023)
    # A table has a column of each of these kinds, in this order. No two nouns end alike, so the byte before the capital
    # tells the kind, hence the place in the header: a small model learns to look it up in minutes.
    kinds = ["area band city desk fish".split(), "goal hero jobs loan mile".split(), "rent song team view wolf".split()]
    capitals, consonants, vowels = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "bdfgklmnprstvz", "aeiou"
    asking = [["which", "what"], ["highest", "largest"], ["lowest", "smallest"], ["how many", "count the"],
              ["total", "sum of"], ["average", "mean"]]              # for each aggregate of `to_sql`
    compare = [["is", "of"], ["over", "above"], ["under", "below"]]  # for each operator
    pairs = {}  # prompt -> target: no prompt twice, so train and validation share none
    while len(pairs) < train + validation:
        table = [rng.choice(kind) for kind in kinds]
        header = [noun + rng.choice(capitals) for noun in table]
        select, column = rng.sample(range(len(table)), 2)
        aggregate, operator = rng.randrange(6), rng.choice([0, 0, 1, 2])
        value = rng.randrange(100, 1000) if operator else "".join(map(rng.choice, [consonants, vowels] * 2))
        question = (f"{rng.choice(asking[aggregate])} {table[select]} {rng.choice(['with', 'for'])} "
                    f"{table[column]} {rng.choice(compare[operator])} {value}?")
        pairs[sql_prompt(header, question)] = to_sql(header, select, aggregate, [(column, operator, value)])
    pairs = list(pairs.items())
    return pairs[:train] if split == "train" else pairs[train:]


def read(dataset, split, path, config):
    """A split from the Hub, or a folder like it, nested columns flattened ("table.header"), with its `columns`."""
    import datasets  # only here: data sets that need no files do without
    import huggingface_hub

    for library in datasets, huggingface_hub.utils:
        library.disable_progress_bars()
        library.logging.set_verbosity(library.logging.CRITICAL)
    known = DATASETS[dataset]
    source = str(Path(path).resolve()) if path else known["hub"]
    if not path:
        print(f"reading {source} from the Hub", file=sys.stderr)  # which may take its time, also to give up
    try:
        # A folder that declares no configuration has just one, which the library calls "default".
        plain = path and datasets.get_dataset_config_names(source) == ["default"]
        config = config or (None if plain else known.get("config"))
        revision = None if path else known.get("revision")
        rows = datasets.load_dataset(source, config, split=split, revision=revision)
    except Exception as error:  # the library's, the network's or a parser's: there is no list of them
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        if path or isinstance(error, ValueError):
            raise ValueError(f"cannot read the {split} split of {source}: {reason} (is a file empty or damaged? "
                             f"If not, choose another --data-config, now {config or 'not given'})") from error
        raise ConnectionError(f"{source} is out of reach ({reason}): pass --data-path DIR with a local copy of it, "
                              "or --dataset stdlib or toysql, which need no download") from error
    found, rows = rows.column_names, rows.flatten()
    if missing := [column for column in known["columns"] if column not in rows.column_names]:
        raise ValueError(f"{source} is not {dataset}: its columns are {', '.join(found)}; {', '.join(missing)} missing")
    return rows
