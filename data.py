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
import os
import random
import re
import shutil
import sys
import sysconfig
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

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
                   null="",  # one has no dialogue
                   pair=lambda dialogue, summary: (f"{dialogue}\nSummary:\n", summary)),
    "e2e": dict(metric="bleu", hub="tuetschek/e2e_nlg", revision="refs/convert/parquet",
                columns=["meaning_representation", "human_reference"],
                pair=lambda meaning, reference: (f"{meaning}\n", reference)),
}


def load(dataset, split, vocab_size, block_size, path=None, config=None):
    """A split ("train" or "validation") as `Blocks` or `Examples` of at most `block_size` tokens.

    `path`, a folder, replaces the Hub; `config` names a configuration. Its `about` says what data
    these are: source, files and bytes, sha256, documents or rows, tokens. Raises ValueError or
    OSError for a user's mistake, in one line that says what would work.
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
        documents, about = wikitext(split, path, config) if hub else stdlib(split)
        # 4: the code that makes tokens; raise it with that.
        name = f"{dataset}-{split}-{vocab_size}-4-{about['sha256'][:16]}.bin"
        tokens = cached(cache_folder() / name, documents, tok)
        if len(tokens) < max(block_size, 2):
            way_out = ": lower --block-size" * (len(tokens) > 1) or ", too few"
            raise ValueError(f"{dataset} {split} has {len(tokens)} tokens{way_out}")
        blocks = Blocks(tokens, block_size, tok.eot)
        blocks.about = about | dict(documents=int((tokens == tok.eot).sum()) + 1,
                                    tokens=len(tokens))
        return blocks
    if hub:
        rows, about = read(dataset, split, path, config)
        pairs = [DATASETS[dataset]["pair"](*row) for row in rows]
    else:
        pairs, about = toysql(split)
    examples = Examples(pairs, block_size, tok)
    sizes = examples.sizes
    kept = [size for size in sizes if size <= block_size]
    examples.about = about | dict(rows=len(sizes), tokens=sum(kept))
    if len(examples) < len(sizes):
        examples.about["left_out"] = len(sizes) - len(examples)
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

    def batch(self, indices, device=None):
        """idx, targets, real of blocks number `indices`; the last is padded on the right."""
        starts = torch.as_tensor(indices)[:, None] * self.block_size  # [B, 1]
        places = starts + torch.arange(self.block_size + 1)  # [B, T + 1]
        real = places[:, 1:] < len(self.tokens)  # [B, T]; here every real place has a target
        ids = np.take(self.tokens, places.numpy(), mode="clip").astype(np.int64)  # [B, T + 1]
        ids = torch.from_numpy(ids)
        return ids[:, :-1].where(real, self.eot), ids[:, 1:].where(real, -100), real

    def by_length(self):
        """As they come: all are as long."""
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
        for prompt, target in bar("making tokens", unit="pair", of=pairs):
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

    def batch(self, indices, device="cpu"):
        """idx, targets, real of examples number `indices`, padded on the right: attention looks
        left, so no real token sees that. On a GPU to a multiple of 64, for each new length
        would have its kernels planned anew."""
        def padded(rows, value):
            rows = pad_sequence([torch.tensor(row) for row in rows], True, value)  # [B, T]
            T = rows.size(1)
            extra = min(-T % 64, self.block_size - T) if device.startswith("cuda") else 0
            return F.pad(rows, (0, extra), value=value)

        pairs = [(self.prompts[i], self.targets[i]) for i in indices]
        idx = padded([(p + t)[:-1] for p, t in pairs], self.eot)  # the last token is never read
        targets = padded([[-100] * (len(p) - 1) + t for p, t in pairs], -100)
        return idx, targets, padded([[True] * (len(p + t) - 1) for p, t in pairs], False)

    def by_length(self):
        """The order to evaluate in: the shortest first, so neighbours need little padding."""
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


# Progress bars.


class Screen:
    """stderr for progress bars, in lines if it is no terminal. Closed or full, it stops nothing."""

    def __getattr__(self, name):
        return getattr(sys.stderr, name)

    def write(self, text):
        with suppress(OSError):
            if sys.stderr.isatty():
                sys.stderr.write(text)
            elif text.strip():
                print(text.strip(), file=sys.stderr)

    def flush(self):
        with suppress(OSError):
            sys.stderr.flush()


def bar(about, total=None, unit="batch", of=None, **how):
    """A progress bar, also around the iterable `of`, for what takes over two seconds."""
    often = dict(mininterval=0.5 if sys.stderr.isatty() else 30, delay=2, leave=unit == "step")
    columns = shutil.get_terminal_size().columns if sys.stderr.isatty() else None
    return tqdm(of, about, total, unit=unit, file=Screen(), ncols=columns, **often | how)


# Language modelling: documents, one stream of tokens.


def stdlib(split):
    """The running Python's standard library: (its sources, about them); 5 % are validation."""
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
    source = f"Python {sys.version.split()[0]}'s standard library"
    return documents, dict(source=source, files={}, sha256=sha256(documents))


def wikitext(split, path, config):
    """WikiText: (its articles, when asked for, about them)."""
    rows, about = read("wikitext", split, path, config)

    def articles():  # split before " = Title = ", not before " = = Section = = "
        text = "".join(text for text, in rows)
        yield from filter(None, re.split("(?m)^(?= = (?!= ).+ = $)", text))

    return articles(), about


def sha256(texts):
    """Of a list of texts."""
    return hashlib.sha256(repr(texts).encode()).hexdigest()


def cache_folder():
    """Where tokens are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "fine-pruning")


def cached(file, documents, tok):
    """The documents' tokens [N] uint16, end of text between them: from `file`, once it is made.

    The file, tokens and then their CRC-32, is whole or absent; a damaged one is made anew.
    """
    if file.exists():
        stored = np.fromfile(file, np.uint8)
        if stored[-4:].tobytes() == zlib.crc32(stored[:-4], 1).to_bytes(4, "little"):
            return stored[:-4].view(np.uint16)
    documents = bar("making tokens", unit="document", of=[*documents])
    ids = (i for document in documents for i in [*tok.encode(document), tok.eot])
    tokens = np.fromiter(ids, np.uint16)[:-1]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=file.parent) as beside:  # its own: others may write theirs
            crc = zlib.crc32(tokens, 1).to_bytes(4, "little")  # 1: that of nothing is not 0
            Path(beside, "tokens").write_bytes(tokens.tobytes() + crc)
            Path(beside, "tokens").replace(file)
    except OSError as error:
        raise OSError(f"can't keep tokens in {file.parent} ({error.strerror}): name another place "
                      "by XDG_CACHE_HOME") from error
    return tokens


# Prompts and targets. GPT-2's tokenizer joins no letter with the newline that ends a prompt: so the
# two, encoded apart, are the tokens of the whole text.


def sql_prompt(header, question):
    """The table's columns on one line, the question on the next."""
    return f"{' | '.join(header)}\n{question}\n"


def to_sql(header, sel, agg, conds):
    """WikiSQL's readable form; `conds` are (column, operator, value)."""
    aggregate = ["", "MAX ", "MIN ", "COUNT ", "SUM ", "AVG "][agg]
    where = " AND ".join(f"{header[column]} {'=><'[operator]} {value}"
                         for column, operator, value in conds)
    return f"SELECT {aggregate}{header[sel]} FROM table" + (f" WHERE {where}" if where else "")


def wikisql_release(file, tables):
    """The rows of WikiSQL's own release: a `file`, and its `tables`."""
    rows, tables = (map(json.loads, path.read_bytes().splitlines()) for path in (file, tables))
    headers = {table["id"]: table["header"] for table in tables}
    for number, row in enumerate(rows, 1):
        try:
            header, sql = headers[row["table_id"]], row["sql"]
            if min(sql["sel"], sql["agg"], *(n for one in sql["conds"] for n in one[:2])) < 0:
                raise IndexError("below 0")
            pair = header, row["question"], to_sql(header, **sql)
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"row {number} makes no query: {error!r}") from error
        yield pair


def toysql(split):
    """A made-up WikiSQL for small models: (its pairs, always the same, about them).

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
    pairs = pairs[:20_000] if split == "train" else pairs[20_000:]
    return pairs, dict(source="toysql", files={}, sha256=sha256(pairs))


# Files, in a folder or on the Hub.


def read(dataset, split, path, config):
    """A split of a data set with files: (its rows, when asked for, about them).

    Rows are tuples of its columns ("table.header" is nested), as the files have them now: nothing
    that the library keeps comes in between.
    """
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    for library in datasets, huggingface_hub.utils:
        library.logging.set_verbosity(library.logging.CRITICAL)
    hub, columns, null = map(DATASETS[dataset].get, ("hub", "columns", "null"))
    usual = DATASETS[dataset].get("config")
    folder = Path(path).resolve() if path else download(dataset, config or usual)
    source = str(folder) if path else f"{hub}, commit {folder.name}"
    for below in (hub, Path(hub).name) if path else ():
        if (folder / below).is_dir():
            raise ValueError(f"--data-path {path} is too high up: {folder / below} would do")
    if set("*?[") & set(str(folder)):
        raise ValueError(f"*, ? and [ in a folder's name stand for others: rename {folder}")
    if dataset == "wikisql" and any(folder.glob("*.tables.jsonl")):
        name = "train" if split == "train" else "dev"
        source = str(folder / f"{name}.jsonl")
        files = [Path(source), folder / f"{name}.tables.jsonl"]
        rows = wikisql_release(*files)
    else:
        with readable(split, source), TemporaryDirectory() as kept:
            # A folder that declares no configuration has one, which the library calls "default".
            names = datasets.get_dataset_config_names(str(folder))
            config = config or (None if names == ["default"] else usual)
            if config and config not in names:
                raise ValueError(f"its configurations are {', '.join(names)}, without {config}: "
                                 "name one with --data-config")
            builder = datasets.load_dataset_builder(str(folder), config, cache_dir=kept)
            files = builder.config.data_files.get(split)
            if not files:
                raise ValueError(f"it has only {', '.join(map(str, builder.config.data_files))}")
            folders = sorted({os.path.relpath(Path(file).parent, folder) for file in files})
            if names == ["default"] and len(folders) > 1:
                raise ValueError(f"its files are in {', '.join(folders)}, and no README.md says "
                                 "which are meant: put that back, or give --data-path a folder "
                                 "with one of them alone")
        rows = parsed(builder, split, files, columns)

    def known():
        """The files' names and bytes, and a hash of all that."""
        sizes, digest = {}, hashlib.sha256()
        for file in files:
            name = Path(os.path.relpath(file, folder)).as_posix()
            content = Path(file).read_bytes()
            if not content:
                raise ValueError(f"it holds no rows: {name} is empty")
            sizes[name] = len(content)
            digest.update(f"{name} {len(content)} ".encode() + content)
        return dict(files=sizes, sha256=digest.hexdigest())

    def checked():
        number = 0
        with readable(split, source):
            for number, row in enumerate(rows, 1):
                row = [null if value is None else value for value in row]
                for name, value in zip(columns, row):
                    texts = value if name == "table.header" else [value]
                    if not (isinstance(texts, list) and all(isinstance(x, str) for x in texts)):
                        raise ValueError(f"column {name} is {value!r:.60} in row {number}")
                yield row
            if not number:
                raise ValueError("it holds no rows")
            if known() != about:
                raise ValueError("its files change while they are read")

    with readable(split, source):
        about = known()
    return checked(), dict(source=source) | about


@contextmanager
def readable(split, source):
    """Makes one ValueError of whatever goes wrong in reading."""
    try:
        yield
    except Exception as error:  # the library's, a parser's: nobody lists them
        name = "" if type(error) is ValueError else type(error).__name__
        reason = " ".join(f"{name} {error} {error.__cause__ or ''}".split())
        raise ValueError(f"can't read the {split} split of {source}: {reason}") from error


def parsed(builder, split, files, columns):
    """The rows of `files`, as `builder` of the library `datasets` reads them."""
    for number in re.findall(r"-of-(\d+)\.", " ".join(map(os.path.basename, files))):
        if int(number) != len(files):
            raise ValueError(f"{len(files)} files are there of {int(number)}")
    # NA in CSV is text, lines end; Parquet of no rows would make the size 0.
    vars(builder.config).update(keep_default_na=False, keep_linebreaks=True, batch_size=10_000)
    # Each alone, lest its types become another's, or the README's.
    for file in bar("reading", unit="file", of=files):
        builder.info.features, builder.config.data_files = None, {split: [file]}
        for table in builder.as_streaming_dataset(split).with_format("arrow").iter(10_000):
            table = table.flatten()  # pyarrow's
            if missing := [name for name in columns if name not in table.column_names]:
                raise ValueError(f"its columns are {table.column_names}, without {missing}")
            # If one row is no text, all are JSON here.
            yield from zip(*(map(json.loads, column.to_pylist()) if "json" in str(column.type)
                             else column.to_pylist() for column in map(table.column, columns)))


def download(dataset, config):
    """The folder of a Hub's data set in Hugging Face's cache, fetched if need be."""
    import huggingface_hub

    hub, revision = map(DATASETS[dataset].get, ("hub", "revision"))
    print(f"reading {hub} from the Hub", file=sys.stderr)
    which = dict(repo_type="dataset", revision=revision,
                 allow_patterns=["README.md", f"{config}/*"] if config else None)
    for kept in False, True:  # a Hub that breaks off is like none at all: what is kept will do
        try:
            return Path(huggingface_hub.snapshot_download(hub, **which, local_files_only=kept))
        except Exception as error:  # whatever went wrong, the way out is the same
            reason = error
    raise ConnectionError(f"{hub} is out of reach ({type(reason).__name__}): give --data-path DIR, "
                          "a copy, or --dataset stdlib or toysql") from reason
