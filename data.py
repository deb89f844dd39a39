"""Text in, batches of token ids out.

`stdlib` and `wikitext` are *language modelling*: `Blocks` of tokens, each predicted from those
before it. `toysql`, `wikisql`, `samsum` and `e2e` are *prompt -> target*: `Examples`, of which only
the target counts in the loss. `load("stdlib", "train", 257, 128).batch([0, 1, 2])` gives

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

# Each with its measure; if it is on the Hub, where, its columns there and the (prompt, target) made
# of them. Two are scripts there, which `datasets` no longer runs: their output is on a branch.
DATASETS = {
    "stdlib": dict(metric="perplexity"),
    "wikitext": dict(metric="perplexity", hub="Salesforce/wikitext", config="wikitext-103-v1",
                     columns=["text"]),
    "toysql": dict(metric="exact_match"),
    "wikisql": dict(metric="exact_match", hub="Salesforce/wikisql", revision="refs/convert/parquet",
                    columns=["table.header", "question", "sql.human_readable"],
                    pair=lambda header, question, sql: (sql_prompt(header, question), sql)),
    "samsum": dict(metric="rouge", hub="knkarthick/samsum", columns=["dialogue", "summary"],
                   pair=lambda dialogue, summary:  # one has no dialogue
                   (f"{dialogue or ''}\nSummary:\n", summary or "")),
    "e2e": dict(metric="bleu", hub="tuetschek/e2e_nlg", revision="refs/convert/parquet",
                columns=["meaning_representation", "human_reference"],
                pair=lambda meaning, reference: (f"{meaning}\n", reference)),
}


def load(dataset, split, vocab_size, block_size, path=None, config=None, cache_dir="cache"):
    """A split ("train" or "validation") as `Blocks` or `Examples` of at most `block_size` tokens.

    `path`, a folder, replaces the Hub; `config` names a configuration; `cache_dir` keeps tokens.
    Raises ValueError or OSError for a user's mistake, in one line that says what would work.
    """
    if dataset not in DATASETS:
        raise ValueError(f"--dataset {dataset} is none of {', '.join(DATASETS)}")
    hub = DATASETS[dataset].get("hub")
    if not hub and (path or config):
        raise ValueError(f"{dataset} reads no files: leave out --data-path and --data-config")
    if path and not Path(path).is_dir():
        raise FileNotFoundError(f"--data-path {path} is no folder: give one with a copy of {hub}")
    if block_size < 1:
        raise ValueError(f"--block-size {block_size}: a block has at least 1 token")
    tok = tokenizer(vocab_size)
    if DATASETS[dataset]["metric"] == "perplexity":
        documents, fingerprint = wikitext(split, path, config) if hub else stdlib(split)
        # 3 stands for the code that makes tokens: raise it when that changes.
        file = Path(cache_dir, f"{dataset}-{split}-{vocab_size}-3-{fingerprint}.bin")
        tokens = cached(file, documents, tok)
        if len(tokens) < max(block_size, 2):
            raise ValueError(f"{dataset} {split} has {len(tokens)} tokens: lower --block-size")
        return Blocks(tokens, block_size, tok.eot)
    pairs = hub_pairs(dataset, split, path, config) if hub else toysql(split)
    examples = Examples(pairs, block_size, tok)
    sizes = examples.sizes
    if len(examples) < len(sizes):
        message = (f"{dataset} {split}: {len(sizes) - len(examples)} of {len(sizes)} examples (of "
                   f"{min(sizes)} to {max(sizes)} tokens) exceed the block of {block_size}")
        if not len(examples):
            raise ValueError(f"{message}: raise --block-size")
        print(f"{message} and are left out", file=sys.stderr)
    return examples


def tokenizer(vocab_size):
    """`.encode(text) -> list[int]`, `.decode(ids) -> str`, and `.eot`, the id of end of text.

    257: UTF-8 bytes and end of text. 50257: GPT-2's byte pairs. No text encodes to end of text, not
    even "<|endoftext|>"; decoding leaves it out. Raises ValueError for another size, OSError if
    GPT-2's is out of reach.
    """
    if vocab_size == 257:
        encode, decode, eot = (lambda text: list(text.encode(errors="replace")),
                               lambda ids: bytes(ids).decode(errors="replace"), 256)
    elif vocab_size == 50257:
        import tiktoken
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # no network, or a damaged file
            raise OSError("GPT-2's tokenizer is out of reach: set TIKTOKEN_CACHE_DIR to a folder "
                          "with tiktoken's files, or read bytes: --model tiny") from error
        encode, decode, eot = gpt2.encode_ordinary, gpt2.decode, gpt2.eot_token
    else:
        raise ValueError(f"a vocabulary is 257 (bytes) or 50257 (GPT-2's), not {vocab_size}")
    return SimpleNamespace(encode=encode, eot=eot,
                           decode=lambda ids: decode([int(i) for i in ids if i != eot]))


class Blocks:
    """N tokens as ceil((N - 1) / T) blocks: each token but the first is predicted once."""

    def __init__(self, tokens, block_size, eot):
        self.tokens, self.block_size, self.eot = tokens, block_size, eot  # tokens: [N] uint16

    def __len__(self):
        return -(-(len(self.tokens) - 1) // self.block_size)

    def batch(self, indices):
        """idx, targets, real of blocks number `indices`; the last is padded on the right."""
        starts = torch.as_tensor(indices)[:, None] * self.block_size  # [B, 1]
        places = starts + torch.arange(self.block_size + 1)  # [B, T + 1]
        real = places[:, 1:] < len(self.tokens)  # [B, T]; here every real place has a target
        ids = np.take(self.tokens, places.numpy(), mode="clip").astype(np.int64)  # [B, T + 1]
        ids = torch.from_numpy(ids)
        return ids[:, :-1].where(real, self.eot), ids[:, 1:].where(real, -100), real

    def by_length(self):
        """The order to evaluate in: as they come, for all are as long."""
        return list(range(len(self)))


class Examples:
    """(prompt, target) pairs of text; the loss is on the target and the end of text after it.

    `prompts[i]`, `targets[i]`: lists of ids. `references[i]`: the texts of all targets of a prompt.
    `sizes`: tokens of every pair; those longer than `block_size` are left out.
    """

    def __init__(self, pairs, block_size, tok):
        self.block_size, self.eot, self.sizes = block_size, tok.eot, []
        self.prompts, self.targets, self.references = [], [], []
        self.first = {}  # prompt -> the first example that has it
        references = {}  # prompt -> all its targets: one too long to train on is a right answer too
        for prompt, target in pairs:
            references.setdefault(prompt, []).append(target)
            p, t = tok.encode(prompt), tok.encode(target) + [tok.eot]
            self.sizes.append(len(p) + len(t))
            if self.sizes[-1] <= block_size:
                self.first.setdefault(prompt, len(self))
                self.prompts.append(p)
                self.targets.append(t)
                self.references.append(references[prompt])

    def __len__(self):
        return len(self.prompts)

    def batch(self, indices):
        """idx, targets, real of examples number `indices`, padded on the right: attention looks
        left, so no real token ever sees that."""
        def padded(rows, value):
            return pad_sequence([torch.tensor(row) for row in rows], True, value)  # [B, T]

        pairs = [(self.prompts[i], self.targets[i]) for i in indices]
        idx = padded([(p + t)[:-1] for p, t in pairs], self.eot)  # the last token is never read
        targets = padded([[-100] * (len(p) - 1) + t for p, t in pairs], -100)
        return idx, targets, padded([[True] * (len(p + t) - 1) for p, t in pairs], False)

    def by_length(self):
        """The order to evaluate in: the shortest first, so that neighbours need little padding."""
        return sorted(range(len(self)), key=lambda i: len(self.prompts[i]) + len(self.targets[i]))

    def distinct(self):
        """One example per distinct prompt: what to generate from."""
        return list(self.first.values())


def micro_batches(batch, device, parts=1, process=0, processes=1, sim_tokens=None, seed=0):
    """The share of `process` in a `batch` of B sequences, as `parts` micro-batches. Each has

        idx      [B', T]   what the model reads
        places   [n]       which of its B' * T tokens are asked for the next one, None = all of them
        targets  [n]       and what that is
        similar  [s]       which of them the running similarity sees, None = all of them
        divisor            tokens asked for in the whole batch, over `processes`: sums of losses
                           divided by it, averaged over the processes, are the batch's mean

    The similarity sees all but padding, or `sim_tokens` random ones, drawn from `seed` for the
    whole batch: how that is cut up changes nothing. Raises ValueError for too few sequences.
    """
    idx, targets, seen = batch
    pieces, made = parts * processes, []
    if len(idx) < pieces:
        raise ValueError(f"{len(idx)} sequences can't be cut into {pieces} micro-batches")
    if sim_tokens is not None:
        places = seen.flatten().nonzero().squeeze(1)
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
        left_out = places[order[sim_tokens:]]
        seen = seen.flatten().index_fill(0, left_out, False).view_as(seen)  # [B, T]
    asked = targets != -100  # [B, T]

    def where(mask):  # on the CPU: to find it on a GPU is to wait for it
        return None if mask.all() else mask.flatten().nonzero().squeeze(1)

    for rows in torch.arange(len(idx)).tensor_split(pieces)[process * parts :][:parts]:
        micro = dict(idx=idx[rows], targets=targets[rows][asked[rows]], places=where(asked[rows]),
                     similar=where(seen[rows]))
        for name, tensor in micro.items():
            if device.startswith("cuda") and tensor is not None:  # nobody waits for pinned memory
                micro[name] = tensor.pin_memory().to(device, non_blocking=True)
        made.append(SimpleNamespace(**micro, divisor=int(asked.sum()) / processes))
    return made


# Language modelling: documents, one stream of tokens.


def stdlib(split):
    """The running Python's standard library: (its sources, a fingerprint); 5 % are validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # Left out: installed packages; generated tables; tests, which some distributions strip.
    skip = ("(site|dist)-packages|tests?|idle_test|encodings|pydoc_data|__pycache__|config-.*|"
            "_sysconfigdata.*")
    documents = []
    for file in sorted(root.rglob("*.py")):
        if any(re.fullmatch(skip, part) for part in file.relative_to(root).parts):
            continue
        source = file.read_bytes()
        # A hash of the content, not of the path, chooses the split: no copied file stands in both.
        validation = hashlib.sha256(source).digest()[0] < 13  # of 256
        if source and validation == (split == "validation"):
            documents.append(source.decode(errors="replace"))
    return documents, hashlib.sha256(repr(documents).encode()).hexdigest()[:16]


def wikitext(split, path, config):
    """WikiText: (its articles, when asked for, a fingerprint)."""
    rows = read("wikitext", split, path, config)

    def articles():  # split before " = Title = ", not before " = = Section = = "
        yield from filter(None, re.split("(?m)^(?= = (?!= ).+ = $)", "".join(rows["text"])))

    return articles(), rows._fingerprint  # of the files' names and times, or the Hub's commit


def cached(file, documents, tok):
    """The documents' tokens [N] uint16, end of text between them: from `file`, once it is made.

    The file, tokens and then their CRC-32, is whole or absent; a damaged one is made anew.
    """
    if file.exists():
        stored = np.fromfile(file, np.uint8)
        if stored[-4:].tobytes() == zlib.crc32(stored[:-4]).to_bytes(4, "little"):
            return stored[:-4].view(np.uint16)
    file.parent.mkdir(parents=True, exist_ok=True)
    ids = (i for document in documents for i in [*tok.encode(document), tok.eot])
    tokens = np.fromiter(ids, np.uint16)[:-1]  # 0.2 GB for WikiText-103
    with TemporaryDirectory(dir=file.parent) as beside:  # its own: others may be writing theirs
        crc = zlib.crc32(tokens).to_bytes(4, "little")
        Path(beside, "tokens").write_bytes(tokens.tobytes() + crc)
        Path(beside, "tokens").replace(file)
    return tokens


# Prompts and targets. GPT-2's tokenizer joins no letter with the newline that ends a prompt: so the
# two, encoded apart, are the tokens of the whole text.


def hub_pairs(dataset, split, path, config):
    """wikisql, samsum or e2e as a list of (prompt, target) texts."""
    pair = DATASETS[dataset]["pair"]
    return [pair(*row.values()) for row in read(dataset, split, path, config)]


def sql_prompt(header, question):
    """The table's columns on one line, the question on the next."""
    return f"{' | '.join(header)}\n{question}\n"


def to_sql(header, sel, agg, conds):
    """WikiSQL's human-readable form, from numbers; `conds` are (column, operator, value)."""
    aggregate = ["", "MAX ", "MIN ", "COUNT ", "SUM ", "AVG "][agg]
    where = " AND ".join(f"{header[column]} {'=><'[operator]} {value}"
                         for column, operator, value in conds)
    return f"SELECT {aggregate}{header[sel]} FROM table" + (f" WHERE {where}" if where else "")


def wikisql_release(file):
    """The rows of WikiSQL's own release: train.jsonl or dev.jsonl, with its tables beside it."""
    rows, tables = (map(json.loads, open(path, encoding="utf-8"))
                    for path in (file, file.with_suffix(".tables.jsonl")))
    headers = {table["id"]: table["header"] for table in tables}
    return [{"table.header": (header := headers[row["table_id"]]), "question": row["question"],
             "sql.human_readable": to_sql(header, **row["sql"])} for row in rows]


def toysql(split):
    """A made-up WikiSQL for small models: (prompt, target) texts, always the same.

        cityK | goalF | teamX
        how many team with goal over 312?
        SELECT COUNT teamX FROM table WHERE goalF > 312

    The question lacks the last letter of a column's name, drawn anew for every table: it has to be
    looked up in the header. All fits into 128 bytes.
    """
    rng = random.Random(2023)
    # A column of each kind. No two nouns end alike, so the byte before the capital tells the place
    # in the header: a small model learns to look there in minutes.
    kinds = ["area band city desk fish", "goal hero jobs loan mile", "rent song team view wolf"]
    asking = [["which", "what"], ["highest", "largest"], ["lowest", "smallest"],
              ["how many", "count the"], ["total", "sum of"], ["average", "mean"]]
    compare = [["is", "of"], ["over", "above"], ["under", "below"]]  # both as `to_sql` counts them
    pairs = {}  # prompt -> target: no prompt twice, so train and validation share none
    while len(pairs) < 21_000:
        table = [rng.choice(kind.split()) for kind in kinds]
        header = [noun + rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for noun in table]
        sel, column = rng.sample(range(3), 2)
        agg, operator = rng.randrange(6), rng.choice([0, 0, 1, 2])
        value = (rng.randrange(100, 1000) if operator else
                 "".join(map(rng.choice, ["bdfgklmnprstvz", "aeiou"] * 2)))
        question = (f"{rng.choice(asking[agg])} {table[sel]} {rng.choice(['with', 'for'])} "
                    f"{table[column]} {rng.choice(compare[operator])} {value}?")
        pairs[sql_prompt(header, question)] = to_sql(header, sel, agg, [(column, operator, value)])
    pairs = list(pairs.items())
    return pairs[:20_000] if split == "train" else pairs[20_000:]


def read(dataset, split, path, config):
    """A split's columns, on the Hub or in a folder like it; "table.header" is a nested one."""
    import datasets  # only here: data sets that need no files do without
    import huggingface_hub

    for library in datasets, huggingface_hub.utils:
        library.disable_progress_bars()
        library.logging.set_verbosity(library.logging.CRITICAL)
    known = DATASETS[dataset]
    source = str(Path(path).resolve()) if path else known["hub"]
    if not path:
        print(f"reading {source} from the Hub", file=sys.stderr)
    try:
        if dataset == "wikisql" and path and list(Path(path).glob("*.tables.jsonl")):
            source = Path(source, "train.jsonl" if split == "train" else "dev.jsonl")
            rows = datasets.Dataset.from_list(wikisql_release(source))
        else:
            # A folder that declares no configuration has one, which the library calls "default".
            if not path or datasets.get_dataset_config_names(source) != ["default"]:
                config = config or known.get("config")
            rows = datasets.load_dataset(source, config, split=split,
                                         revision=None if path else known.get("revision"))
        return rows.flatten().select_columns(known["columns"])
    except Exception as error:  # the library's, the network's, a parser's: nobody lists them
        reason = " ".join(f"{type(error).__name__} {error} {error.__cause__ or ''}".split())
        if path or isinstance(error, ValueError):
            raise ValueError(f"can't read the {split} split of {source}: {reason} (is a file empty "
                             f"or damaged, or is --data-config {config} wrong?)") from error
        raise ConnectionError(f"{source} is out of reach ({reason}): give --data-path DIR, a copy, "
                              "or --dataset stdlib or toysql") from error
