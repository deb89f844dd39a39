"""What the paper measures of finished runs, to see why methods differ (section 3.2, Appendix E).

    python measure.py [evaluate] out/RUN ...             writes measure.json into each run's folder
    python measure.py table out/RUN ...                  the paper's tables: methods by leftover
    python measure.py figures out/RUN ... --out figures  the paper's figures, and training curves
    python measure.py sample out/RUN --prompt TEXT       what the dense and the pruned model write
    python measure.py export out/RUN --out FOLDER        the model padded, for any loader

B sequences of T tokens; h [B, T, k] is what the k neurons left in a layer put out.
"""

import math
from collections import namedtuple
from contextlib import nullcontext
from functools import cache
from statistics import fmean

from results import cli

if __name__ == "__main__":
    cli.look(__file__, "read_flags")

import torch
import torch.nn.functional as F

import data
from model import read_config, whole
from prune import similarity
from results.cli import ABOVE_0, AT_LEAST_0, DEVICE, Flag
from results.runs import check_data, dense_run, load_model, read_model, write_json
from results.texts import text_scores, write_texts

MEASURES = {  # a value in measure.json: its name in tables and figures
    "loss": "validation loss (nats/token)", "perplexity": "perplexity",
    "exact_match": "exact match", "bleu": "BLEU",
    "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L",
    "sensitivity": "sensitivity (nats)", "uniqueness": "uniqueness (share)",
    "span_uniqueness": "span uniqueness (share)", "leftover": "leftover (share)"}
load = cache(lambda *args: data.load(*args))  # runs share their data


def batches(about, model, examples, tokens=2048, first=None, every=1):
    """Batches of a split or its `first` sequences, on the model's device: neighbours in length, at
    most `tokens` tokens (or one sequence), one in `every`. `about`: for their bar."""
    order = [i for i in examples.by_length() if not first or i < first]
    rows, device = max(1, tokens // examples.block_size), model.wte.weight.device
    for start in data.bar(about, of=range(0, len(order), rows * every)):
        batch = examples.batch(order[start : start + rows], device.type)
        if device.type == "cuda":
            batch = [tensor.pin_memory().to(device, non_blocking=True) for tensor in batch]
        yield batch


@torch.no_grad()
def mean_loss(model, examples, autocast, every=1):
    """Mean loss in nats per token that counts, over a split or one batch of 2048 tokens in
    `every`. Its exp() is the perplexity."""
    model.eval()
    total = count = torch.zeros((), dtype=torch.float64, device=model.wte.weight.device)
    for idx, targets, _ in batches("evaluating", model, examples, every=every):
        with autocast:
            loss = model(idx, targets)[1]
        asked = (targets != -100).sum()
        total, count = total + loss * asked, count + asked
    return (total / count).item()  # nothing before waits for the device


@torch.no_grad()
def exact_matches(model, examples):
    """For each example, in the order of `by_length`: would greedy decoding write just the target?

    It does if every token of it, end of text included, is the arg-max after the true ones before
    it: the first is picked, so the same text is read, so the second is picked.
    """
    matches = []
    for idx, targets, _ in batches("exact match", model, examples):
        said = model(idx)[0].argmax(-1)  # [B, T, V] -> [B, T]
        matches += ((said == targets) | (targets == -100)).all(1).tolist()
    return matches


def activation_statistics(model, examples, tokens=2048, first=None):
    """Sensitivity, C of each layer, and the number of tokens behind it, from one pass over a split
    or its `first` sequences.

    Sensitivity = sum_l sum_i |h_i(X) . dL/dh_i(X)| (Appendix E), the mean over sequences X, in
    nats: the dot product is over X's tokens, L is X's mean loss. C [k, k] = sum over real
    tokens of h^T h, Algorithm 1 without decay, in float64, so that no order of summing shows: 0.9
    GB in all for gpt2, 13 GB for GPT-Neo-1.3B.
    """
    hs, count, seen = [], 0, 0
    total = torch.zeros((), dtype=torch.float64, device=model.wte.weight.device)
    Cs = [model.wte.weight.new_zeros(k, k, dtype=torch.float64) for k in model.config.mlp_widths]
    for block in model.h:
        block.mlp.record = hs.append
    for idx, targets, real in batches("sensitivity", model, examples, tokens, first):
        logits = model(idx)[0].flatten(0, 1)  # [B T, V]
        losses = F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)
        means = losses.sum(1) / (targets != -100).sum(1)  # [B]
        # Sequences do not see each other: the sum's gradient is for each that of its own loss.
        for h, gradient, C in zip(hs, torch.autograd.grad(means.sum(), hs), Cs):
            h = h.detach().double()  # [B, T, k]
            total += (h * gradient).sum(1).abs().sum()  # padding has no gradient
            C.addmm_(h[real].T, h[real])
        count, seen = count + len(idx), seen + int(real.sum())
        hs.clear()
    for block in model.h:
        block.mlp.record = None
    return total.item() / count, Cs, seen


def span_residuals(C, ridge=1e-6):
    """The share of |h_i|^2 that no linear combination of the layer's other neurons gives. [k]

    1 / (C_ii (C^-1)_ii) (Definition 3.1), with `ridge` times the mean of C's diagonal added to it,
    lest C be singular: 0 in the others' span, 1 orthogonal to it. In k independent neurons, chance
    lets the others explain k / tokens of each.
    """
    silent = C.diagonal() == 0  # h_i = 0 is in any span; its C_ii may be anything above 0
    ridged = C + torch.diag_embed(ridge * C.diagonal().mean() + silent)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged)).diagonal()  # [k]
    return torch.where(silent, 0.0, 1 / (ridged.diagonal() * inverse))


def redundancy(Cs, tokens=math.inf, threshold=0.8, bins=10):
    """Uniqueness, span uniqueness (None if nothing is left) and `counts`, from all layers' C.

    Uniqueness = 1 - duplicates / neurons: a duplicate has |cos| >= 0.8 to a *later* neuron of its
    layer, so of k copies one is unique (Appendix E). Span uniqueness: the mean of `span_residuals`,
    or None if there are less than two of the `tokens` behind C to a neuron of the widest layer.
    `counts`: a layer's neurons by the largest |cos| to another, in `bins` from 0 to 1 (Figure 3).
    """
    duplicates, shares, counts = 0, [], [[0] * bins for _ in Cs]
    # One layer at a time: each takes a few times the memory of its C.
    for layer, C in enumerate(data.bar("uniqueness", unit="layer", of=Cs)):
        if len(C):
            cos = similarity(C)
            duplicates += int((cos.triu(1) >= threshold).any(1).sum())
            counts[layer] = torch.histc(cos.amax(1).clamp(max=1).cpu(), bins, 0, 1).int().tolist()
            del cos
            shares += span_residuals(C).tolist()
    unique, span = (1 - duplicates / len(shares), fmean(shares)) if shares else (None, None)
    enough = tokens >= 2 * max(map(len, Cs), default=0)
    return dict(uniqueness=unique, span_uniqueness=span if enough else None), counts


# The first command. Those that compare runs are in results/compare.py, export in export.py there;
# runs themselves in runs.py.

On = namedtuple("On", "dataset data_path data_config block_size split examples generate beams "
                "outputs")


@cache  # one dense run serves many
def measure(path, device, on):
    """A model's values by name, `counts` of `redundancy`, widths, texts it wrote with their
    references, and what is known about the data, measured as the flags `on` say."""
    model = load_model(path).to(device)
    longest, texts = model.config.n_positions, ()
    block_size = on.block_size or longest
    if block_size > longest:
        raise ValueError(f"--block-size {block_size} is more than the context of {path}, {longest}")
    where = model.config.vocab_size, block_size, on.data_path, on.data_config
    splits = {split: load(on.dataset, split, *where) for split in ("validation", on.split)}
    validation, metric = splits["validation"], data.DATASETS[on.dataset]["metric"]
    values = dict(loss=mean_loss(model, validation, nullcontext()))
    values["perplexity"] = math.exp(min(values["loss"], 700))
    if metric == "exact_match":
        values[metric] = fmean(exact_matches(model, validation))
    if on.outputs or metric in ("rouge", "bleu"):
        if isinstance(validation, data.Blocks):
            raise ValueError(f"--outputs needs prompts, and {on.dataset} is plain text without any")
        texts = write_texts(model, validation, on.generate, on.beams)
        values |= text_scores(*texts)
    values["sensitivity"], Cs, tokens = activation_statistics(model, splits[on.split],
                                                              first=on.examples)
    unique, counts = redundancy(Cs, tokens)
    about = {split: sequences.about for split, sequences in splits.items()}
    return values | unique, counts, model.config.mlp_widths, texts, about


def ratio(value, base):
    return value / base if base and value is not None else None


def evaluate(args):
    """Measure runs: print the values; write them as measure.json, and texts in the e2e-metrics
    format, into their folders."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    row = "{:40}{:>10}{:>10}{:>10}".format
    for run in map(read_model, args.runs):
        own = run.settings | dict(block_size=run.metrics.get("block_size"))
        known = (own if args.dataset in (None, own.get("dataset")) else {}) | given
        on, dense, base, full = On(*map(known.get, On._fields)), dense_run(run, args.dense), {}, ()
        if not on.dataset:
            raise ValueError(f"{run.path} does not say what to measure it on: add --dataset")
        if dense:
            size, other = (read_config(one.path).vocab_size for one in (run, dense))
            if size != other:
                raise ValueError(f"{dense.path} is no dense model of {run.path}: its vocabulary is "
                                 f"{other:,} tokens, not {size:,}: name another with --dense")
        values, counts, widths, texts, about = measure(run.path.absolute(), args.device, on)
        if run.metrics and not args.dataset:
            check_data(about, {split: run.metrics["data"][split] for split in about}, run.path,
                       f"to measure it on these, add --dataset {on.dataset}")
        if dense:
            base, _, full, *_ = measure(dense.path.absolute(), args.device, on)
        full = run.metrics["start"]["widths"] if run.metrics else full
        ratios = {name: ratio(value, base.get(name)) for name, value in values.items()}
        values = values | dict(leftover=ratio(sum(widths), sum(full)))
        shares = [k / max(m, 1) for k, m in zip(widths, full)]
        print("\n" + row(str(run.path), "this", "dense", "ratio"))
        for name in values:
            numbers = [of.get(name) for of in (values, base, ratios)]
            print(row(MEASURES[name], *("-" if x is None else f"{x:.4g}" for x in numbers)))
        print("leftover per layer:", *(f"{share:.1%}" for share in shares))
        if not dense:
            print("no dense run like it was found beside it: name one with --dense")
        if values["span_uniqueness"] is None and sum(widths):
            print("span uniqueness takes two tokens to each neuron of a layer: raise --examples")
        write_json(run.path / "measure.json", dict(
            model=run.metrics.get("model"), on=on._asdict(), data=about,
            dense=dense and dense.path.name, values=values, ratios=ratios, widths=widths,
            leftover_per_layer=shares or None, counts=counts))
        if on.outputs:  # a line for each text; an empty line between groups of references
            groups = ("\n".join(filter(None, group)) for group in texts[1])
            for name, lines in (("outputs.txt", "\n".join(texts[0])),
                                ("references.txt", "\n\n".join(groups))):
                with whole(run.path / name) as file:
                    file.write_text(lines + "\n", encoding="utf-8")


# The flags.

RUNS = Flag(str, "the folders of finished runs")
DENSE = Flag(str, "the dense model's folder (default: the dense run beside RUN, and like it)")
FLAGS = dict(
    evaluate=dict(
        runs=RUNS, dense=DENSE, device=DEVICE,
        dataset=Flag(data.DATASETS, "what to measure on (as the next three: the run's)"),
        data_path=Flag(str, "a local folder with the data"),
        data_config=Flag(str, "their configuration"),
        block_size=Flag(int, "tokens per sequence (of only a model: its context)",
                        within=ABOVE_0),
        split=Flag(("train", "validation"), "to measure redundancy on", "train"),
        examples=Flag(int, "sequences of it; 0 = all", 512, None, AT_LEAST_0),
        generate=Flag(int, "prompts to write texts for, if need be; 0 = all", 0, None,
                      AT_LEAST_0),
        beams=Flag(int, "for these texts (for e2e: 10)", 1, None, ABOVE_0),
        outputs=Flag(None, "write outputs.txt and references.txt as e2e-metrics reads")),
    table=dict(
        runs=RUNS, metric=Flag(MEASURES, "what to show (default: what the data asks for)"),
        against=Flag(str, "the row, as Top_v, to show the others' differences to, seed by seed"),
        format=Flag(("markdown", "csv", "latex"), "of the table", "markdown")),
    figures=dict(runs=RUNS, out=Flag(str, "the folder to draw into", "figures")),
    export=dict(
        run=Flag(str, "the folder of a finished run"),
        out=Flag(str, "the new folder to write", "exported"),
        multiple_of=Flag(int, "what to fill widths up to a multiple of, instead of to the widest",
                         within=ABOVE_0)),
    sample=dict(
        runs=RUNS, dense=DENSE, device=DEVICE, prompt=Flag(str, "the text to continue"),
        tokens=Flag(int, "how many to write at most", 120, None, AT_LEAST_0)))


def read_flags():
    from results import compare, export

    commands = evaluate, compare.table, compare.figures, compare.sample, export.export
    return cli.command_line(commands, FLAGS, __doc__)


if __name__ == "__main__":
    cli.call(*read_flags())
