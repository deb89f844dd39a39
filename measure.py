"""What the paper measures of finished runs, to see why methods differ (section 3.2, Appendix E).

    python measure.py out/RUN ...                        writes measure.json into each run's folder
    python measure.py table out/RUN ...                  the paper's tables: methods by leftover
    python measure.py figures out/RUN ... --out figures  the paper's figures, and training curves
    python measure.py sample out/RUN --prompt TEXT       what the dense and the pruned model write

B sequences of T tokens; h [B, T, k] is what the k neurons left in a layer put out.
"""

import argparse
import json
import math
import os
import sys
import textwrap
import time
from collections import namedtuple
from contextlib import nullcontext
from functools import cache
from itertools import islice, zip_longest
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import data
from model import GPT
from prune import similarity

MEASURES = {  # a value in measure.json: its name in tables and figures
    "loss": "validation loss (nats/token)", "perplexity": "perplexity",
    "exact_match": "exact match", "bleu": "BLEU",
    "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L",
    "sensitivity": "sensitivity (nats)", "uniqueness": "uniqueness (share)",
    "span_uniqueness": "span uniqueness (share)", "leftover": "leftover (share)"}
load = cache(lambda *args: data.load(*args))  # runs share their data


def batches(model, examples, tokens=2048, first=None):
    """Batches of a split or its `first` sequences, on the model's device: neighbours in length, at
    most `tokens` tokens (or one sequence)."""
    order = [i for i in examples.by_length() if not first or i < first]
    rows, device = max(1, tokens // examples.block_size), model.wte.weight.device
    for start in range(0, len(order), rows):
        batch = examples.batch(order[start : start + rows])
        if device.type == "cuda":  # copying from pinned memory holds up nobody
            batch = [tensor.pin_memory().to(device, non_blocking=True) for tensor in batch]
        yield batch


@torch.no_grad()
def mean_loss(model, examples, autocast, most=None):
    """Mean loss in nats per token that counts, over a split or its first `most` batches of 2048
    tokens. Its exp() is the perplexity."""
    model.eval()
    total = count = torch.zeros((), dtype=torch.float64, device=model.wte.weight.device)
    for idx, targets, _ in islice(batches(model, examples), most):
        with autocast:
            loss = model(idx, targets)[1]
        asked = (targets != -100).sum()
        total, count = total + loss * asked, count + asked
    return (total / count).item()  # nothing before waits for the device


def timed(function, device):
    """How many seconds `function` takes, and what it returns."""
    began, result = time.perf_counter(), function()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


@torch.no_grad()
def prefill_speed(models, idx, rounds=7):
    """Tokens per second with which each of `models` reads `idx` [B, T]: medians of `rounds`, the
    models in turns."""
    idx = idx.to(models[0].wte.weight.device)
    seconds = [[timed(lambda: model(idx), idx.device)[0] for model in models]
               for _ in range(rounds + 1)]
    return [idx.numel() / median(times[1:]) for times in zip(*seconds)]  # the first round warms up


@torch.no_grad()
def exact_matches(model, examples):
    """For each example, in the order of `by_length`: would the model write exactly the target?

    Is every token of it, end of text included, the arg-max after the true ones before it? Greedy
    decoding then picks the same first token, so reads the same text, so picks the same second one,
    and so on: the same event, for one forward pass.
    """
    matches = []
    for idx, targets, _ in batches(model, examples):
        said = model(idx)[0].argmax(-1)  # [B, T, V] -> [B, T]
        matches += ((said == targets) | (targets == -100)).all(1).tolist()
    return matches


def sampled(model, ids, tokens):
    """The text of `ids` and up to `tokens` more: drawn, but always the same ones."""
    tokenizer = data.tokenizer(model.config.vocab_size)
    generator = torch.Generator(model.wte.weight.device).manual_seed(0)
    new, = model.generate([ids], tokens, 0.8, top_k=40, eot=tokenizer.eot, generator=generator)
    return tokenizer.decode(ids + new)


def write_texts(model, examples, prompts=0, beams=1):
    """What the model writes, a line each, to the first `prompts` distinct prompts (0: all), and
    their references. Greedily or by beam search, at most as long as the longest target."""
    def line(text):
        return " ".join(text.split())

    tokenizer, longest = data.tokenizer(model.config.vocab_size), max(map(len, examples.targets))
    chosen, rows, written = examples.distinct()[: prompts or None], max(1, 64 // beams), {}
    order = sorted(chosen, key=lambda i: len(examples.prompts[i]))
    for start in range(0, len(order), rows):
        indices = order[start : start + rows]
        new = model.generate([examples.prompts[i] for i in indices], longest, temperature=0,
                             beams=beams, eot=tokenizer.eot, length_penalty=0.9,  # usual for E2E,
                             no_repeat_ngram=4 if beams > 1 else 0)  # as is this
        written |= {i: line(tokenizer.decode(ids)) for i, ids in zip(indices, new)}
    return [written[i] for i in chosen], [[*map(line, examples.references[i])] for i in chosen]


def text_scores(written, references):
    """BLEU of the corpus (sacrebleu, 0 to 100) and mean ROUGE F-measures to the best reference."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score_multi(texts, text) for text, texts in zip(written, references)]
    values = {name: fmean(score[name].fmeasure for score in scores) for name in scorer.rouge_types}
    # sacrebleu wants all first references, then all second ones, ...; None where there is none.
    return values | {"bleu": corpus_bleu(written, [*zip_longest(*references)]).score}


def activation_statistics(model, examples, tokens=2048, first=None):
    """Sensitivity, and C of each layer, from one pass over a split or its `first` sequences.

    Sensitivity = sum_l sum_i |h_i(X) . dL/dh_i(X)| (Appendix E), the mean over sequences X, in
    nats: the dot product is over X's tokens, L is X's own mean loss. C [k, k] = sum over real tokens
    of h^T h, Algorithm 1 without decay, in float64, so that no order of summing shows: 8 k^2 bytes
    a layer, 0.9 GB in all for gpt2, 13 GB for GPT-Neo-1.3B.
    """
    hs, total, count = [], 0.0, 0
    Cs = [model.wte.weight.new_zeros(k, k, dtype=torch.float64) for k in model.config.mlp_widths]
    for block in model.h:
        block.mlp.record = hs.append
    for idx, targets, real in batches(model, examples, tokens, first):
        logits = model(idx)[0].flatten(0, 1)  # [B T, V]
        losses = F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)
        means = losses.sum(1) / (targets != -100).sum(1)  # [B]
        # Sequences do not see each other: the sum's gradient is for each that of its own loss.
        for h, gradient, C in zip(hs, torch.autograd.grad(means.sum(), hs), Cs):
            h = h.detach().double()  # [B, T, k]
            total += (h * gradient).sum(1).abs().sum().item()  # padding has no gradient
            C.addmm_(h[real].T, h[real])
        count += len(idx)
        hs.clear()
    for block in model.h:
        block.mlp.record = None
    return total / count, Cs


def span_residuals(C, ridge=1e-6):
    """The share of |h_i|^2 that no linear combination of the layer's other neurons gives. [k]

    1 / (C_ii (C^-1)_ii) (Definition 3.1), with `ridge` times the mean of C's diagonal added to it,
    lest C be singular: 0 if h_i is in the others' span, 1 if orthogonal to them. It takes more
    tokens than neurons to mean anything.
    """
    silent = C.diagonal() == 0  # h_i = 0 is in any span; its C_ii may be anything above 0
    ridged = C + torch.diag_embed(ridge * C.diagonal().mean() + silent)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged)).diagonal()  # [k]
    return torch.where(silent, 0.0, 1 / (ridged.diagonal() * inverse))


def redundancy(Cs, threshold=0.8, bins=10):
    """Uniqueness, span uniqueness (None if nothing is left) and `counts`, from all layers' C.

    Uniqueness = 1 - duplicates / neurons: a duplicate has |cos| >= 0.8 to a *later* neuron of its
    layer, so of k copies one is unique (Appendix E). Span uniqueness is the mean of
    `span_residuals`. `counts`: each layer's neurons by the largest |cos| to another one, in `bins`
    ranges from 0 to 1 (Figure 3).
    """
    duplicates, shares, counts = 0, [], [[0] * bins for _ in Cs]
    for layer, C in enumerate(Cs):  # one at a time: each takes a few times the memory of C
        if len(C):
            cos = similarity(C)
            duplicates += int((cos.triu(1) >= threshold).any(1).sum())
            counts[layer] = torch.histc(cos.amax(1).clamp(max=1).cpu(), bins, 0, 1).int().tolist()
            del cos
            shares += span_residuals(C).tolist()
    unique, span = (1 - duplicates / len(shares), fmean(shares)) if shares else (None, None)
    return dict(uniqueness=unique, span_uniqueness=span), counts


# Runs, as `train.py` leaves them.


def write_whole(path, text):
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_run(folder):
    """What a run's folder holds: `path`, `state` ("finished", "interrupted" or "new"), `settings`,
    `metrics` and `measures`, {} where it has none. Raises ValueError if a file is damaged."""
    path, found = Path(folder), []
    if not path.is_dir():
        raise FileNotFoundError(f"no such run: {folder} is not a folder")
    # In this order, lest a run that ends meanwhile look new: its settings.json goes last.
    for name, key in ("settings", "method"), ("metrics", "settings"), ("measure", "values"):
        file = path / f"{name}.json"
        try:
            content = json.loads(file.read_text())
            found.append({key: content[key], **content})
        except FileNotFoundError:
            found.append({})
        except (ValueError, KeyError, TypeError) as error:
            lost = file if name == "measure" else path
            raise ValueError(f"{file} is damaged: remove {lost} and start over") from error
    settings, metrics, measures = found
    state = "finished" if metrics else "interrupted" if settings else "new"
    return SimpleNamespace(path=path, state=state, settings=metrics.get("settings", settings),
                           metrics=metrics, measures=measures)


def read_model(folder):
    """`read_run`, of a finished run or a folder with only a model."""
    run = read_run(folder)
    if run.state == "interrupted":
        raise ValueError(f"{folder} is not finished: go on with its train.py command and --resume")
    return run


def find_dense(folders, settings):
    """The finished dense run among those in `folders` that is of the same data, model and seed as
    `settings`, and most alike in all else; or None."""
    def origin(settings):  # the same folder is the same model, however it was written
        return [os.path.realpath(settings.get("model", "")),
                *map(settings.get, ("dataset", "data_config", "seed"))]

    files = {file for folder in folders for file in Path(folder).glob("*/metrics.json")}
    dense = [run for run in (read_run(file.parent) for file in sorted(files))
             if run.settings["method"] == "none" and not run.settings["distill"]
             and origin(run.settings) == origin(settings)]
    return max(dense, default=None, key=lambda run: len(run.settings.items() & settings.items()))


def dense_run(run, folder):
    """The run in `folder`, or if that is None the dense one beside `run`, or None."""
    if folder or not run.metrics:
        return read_model(folder) if folder else None
    return find_dense([run.path.parent], run.settings)


# The commands. Those that compare runs are in results/compare.py.

On = namedtuple("On", "dataset data_path data_config block_size split examples generate beams "
                "outputs")  # the flags of `evaluate` that decide its values


@cache  # one dense run serves many
def measure(path, device, on):
    """A model's values by name, `counts` of `redundancy`, widths, and texts it wrote with their
    references. `on`: an `On`."""
    model = GPT.from_pretrained(path).to(device)
    longest, texts = model.config.n_positions, ()
    block_size = on.block_size or longest
    if block_size > longest:
        raise ValueError(f"--block-size {block_size} is more than the context of {path}, {longest}")
    where = model.config.vocab_size, block_size, on.data_path, on.data_config
    metric, validation = data.DATASETS[on.dataset]["metric"], load(on.dataset, "validation", *where)
    values = dict(loss=mean_loss(model, validation, nullcontext()))
    values["perplexity"] = math.exp(values["loss"])
    if metric == "exact_match":
        values[metric] = fmean(exact_matches(model, validation))
    if on.outputs or metric in ("rouge", "bleu"):
        if isinstance(validation, data.Blocks):
            raise ValueError(f"--outputs needs prompts, and {on.dataset} is plain text without any")
        texts = write_texts(model, validation, on.generate, on.beams)
        values |= text_scores(*texts)
    values["sensitivity"], Cs = activation_statistics(
        model, load(on.dataset, on.split, *where), first=on.examples)
    unique, counts = redundancy(Cs)
    return values | unique, counts, model.config.mlp_widths, texts


def ratio(value, base):
    """value / base, or None where there is none."""
    return value / base if base and value is not None else None


def evaluate(args):
    """Measure runs: write measure.json, and texts in the e2e-metrics format, into their folders;
    print the values."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    row = "{:40}{:>10}{:>10}{:>10}".format
    for run in map(read_model, args.runs):
        known = run.settings | dict(block_size=run.metrics.get("block_size")) | given
        on, dense, base, full = On(*map(known.get, On._fields)), dense_run(run, args.dense), {}, ()
        if not on.dataset:
            raise ValueError(f"{run.path} does not say what it was trained on: add --dataset, and "
                             "--block-size")
        values, counts, widths, texts = measure(run.path.absolute(), args.device, on)
        if dense:
            base, _, full, _ = measure(dense.path.absolute(), args.device, on)
        full = run.metrics["start"]["widths"] if run.metrics else full
        ratios = {name: ratio(value, base.get(name)) for name, value in values.items()}
        values = values | dict(leftover=ratio(sum(widths), sum(full)))
        shares = [k / max(m, 1) for k, m in zip(widths, full)]
        found = dict(on=on._asdict(), dense=dense and dense.path.name, values=values, ratios=ratios,
                     widths=widths, leftover_per_layer=shares or None, counts=counts)
        files = {"measure.json": json.dumps(found, indent=1, allow_nan=False)}
        if on.outputs:  # a line for each text; an empty line between groups of references
            groups = ("\n".join(filter(None, group)) for group in texts[1])
            files |= {"outputs.txt": "\n".join(texts[0]), "references.txt": "\n\n".join(groups)}
        for name, text in files.items():
            write_whole(run.path / name, text + "\n")
        print("\n" + row(str(run.path), "this", "dense", "ratio"))
        for name in values:
            numbers = [of.get(name) for of in (values, base, ratios)]
            print(row(MEASURES[name], *("-" if x is None else f"{x:.4g}" for x in numbers)))
        print("leftover per layer:", *(f"{share:.1%}" for share in shares))


def table(args):
    """Print the paper's tables."""
    from results import compare

    compare.table(args)


def figures(args):
    """Draw the paper's figures, and training curves."""
    from results import compare

    compare.figures(args)


def sample(args):
    """Print what the dense and the pruned model write after a prompt, side by side."""
    for run in map(read_model, args.runs):
        columns = []
        for title, one in ("dense", dense_run(run, args.dense)), ("pruned", run):
            if one:
                model = GPT.from_pretrained(one.path).to(args.device)
                ids = data.tokenizer(model.config.vocab_size).encode(args.prompt)
                text = sampled(model, ids, args.tokens)
                lines = [f"{title}: {one.path}", "", *text.splitlines()]
                columns.append([part for line in lines for part in textwrap.wrap(line, 56) or [""]])
        for parts in zip_longest(*columns, fillvalue=""):
            print(" | ".join(f"{part:56}" for part in parts).rstrip())


def at_least(least):
    """A whole number from `least` upwards, as argparse's `type`."""
    def number(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
        return int(text)

    return number


FLAGS = {  # a flag: the commands that have it, what argparse knows about it
    "runs": ("evaluate table figures sample", dict(metavar="RUN", nargs="+",
                                                   help="the folders of finished runs")),
    "--dense": ("evaluate sample", dict(help="the dense model's folder (default: the run of the "
                                        "same data, model and seed beside RUN)")),
    "--device": ("evaluate sample", dict(default="cuda" if torch.cuda.is_available() else "cpu",
                                         help="cuda or cpu")),
    "--dataset": ("evaluate", dict(choices=data.DATASETS, help="what to measure on (default, as of "
                                   "the next three: the run's)")),
    "--data-path": ("evaluate", dict(help="a local folder with the data")),
    "--data-config": ("evaluate", dict(help="the data's configuration")),
    "--block-size": ("evaluate", dict(type=at_least(1), help="tokens per sequence (of a folder "
                                      "with only a model: its context)")),
    "--split": ("evaluate", dict(choices=("train", "validation"), default="train",
                                 help="to measure redundancy on (default: train)")),
    "--examples": ("evaluate", dict(type=at_least(0), default=512, help="how many of its "
                                    "sequences, the first; 0 = all (default: 512)")),
    "--generate": ("evaluate", dict(type=at_least(0), default=0, help="how many prompts to write "
                                    "texts for, if need be (default: 0 = all)")),
    "--beams": ("evaluate", dict(type=at_least(1), default=1,
                                 help="for these texts (default: 1, greedy; for e2e: 10)")),
    "--outputs": ("evaluate", dict(action="store_true", help="write outputs.txt and references.txt "
                                   "as e2e-metrics reads")),
    "--metric": ("table", dict(choices=MEASURES,
                               help="what to show (default: what the data asks for)")),
    "--format": ("table", dict(choices=("markdown", "csv", "latex"), default="markdown",
                               help="default: markdown")),
    "--out": ("figures", dict(default="figures",
                              help="the folder to draw into (default: figures)")),
    "--prompt": ("sample", dict(required=True, help="the text to continue")),
    "--tokens": ("sample", dict(type=at_least(0), default=120,
                                help="how many to write at most (default: 120)"))}


def call(commands, flags, about):
    """Call the one of `commands` that the command line names, or the first. A mistake ends in one
    line and status 2."""
    names, words = [command.__name__ for command in commands], sys.argv[1:]
    name = words.pop(0) if words and words[0] in names else names[0]
    parser = argparse.ArgumentParser(description=about,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.print_usage = lambda file: None  # so that a mistake takes one line
    for flag, (having, how) in flags.items():
        if name in having.split():
            parser.add_argument(flag, **how)
    args = parser.parse_args(words)
    device = getattr(args, "device", "cpu")
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        parser.error(f"--device {device}: it is cpu, or cuda where this machine and this build of "
                     "torch have it")
    try:
        commands[names.index(name)](args)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))


def main():
    call((evaluate, table, figures, sample), FLAGS, __doc__)


if __name__ == "__main__":
    main()
