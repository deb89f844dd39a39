"""Every measure against a computation of its own; then what is written, tabled, drawn, and said to
mistakes. Models are in float64 where equal choices or more than five digits are asked."""

import csv
import json
import os
import re
import statistics
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

import data
import measure
import prune
import train
from model import GPT, GPTConfig
from results import compare

SHARED = Path(__file__).parents[2] / "shared"
KINDS = {"gpt2": {}, "gpt_neo": dict(model_type="gpt_neo", qkv_bias=False, attn_scaled=False,
                                     windows=(None, 8))}
TEXTS = [("a b", "x y z"), ("c", "longer than the others, this one"), ("d e f", "x"), ("g", "yy"),
         ("hhh", "z z z")]


@cache
def load_once(*args, real=data.load):
    """A data set as `data.load` gives it, its validation split cut short."""
    loaded = real(*args)
    if isinstance(loaded, data.Blocks):
        loaded.tokens = loaded.tokens[:2000]
    elif args[1] == "validation":
        for name in ("prompts", "targets", "references"):
            setattr(loaded, name, getattr(loaded, name)[:40])
        loaded.first = {prompt: i for prompt, i in loaded.first.items() if i < 40}
    return loaded


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", load_once)
    measure.load.cache_clear()
    measure.measure.cache_clear()


WIDTHS = 24, 17


def tiny(kind="gpt2", widths=WIDTHS, scale=2.0, vocab_size=257):
    """A GPT whose weights are large enough for its neurons to differ; two of a layer are alike."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=vocab_size, n_positions=128, n_embd=16, n_layer=2, n_head=2,
                          mlp_widths=widths, **KINDS[kind])).double()
    for name, p in model.named_parameters():
        if "ln_" not in name:
            p.data = p.data * scale + 0.1 * torch.randn_like(p) * name.endswith("bias")
            if ".mlp.c_fc." in name and len(p) > 5:
                p.data[5] = p.data[2] * 1.1
    return model.eval()


def examples_of(pairs=TEXTS, block_size=64):
    return data.Examples(pairs, block_size, data.tokenizer(257))


def blocks_of(tokens=150, block_size=32):
    ids = torch.randint(256, (tokens,), generator=torch.Generator().manual_seed(3))
    return data.Blocks(ids.numpy().astype("uint16"), block_size, 256)


# Loss, sensitivity, uniqueness, span uniqueness, one sequence and one neuron at a time.


@cache
def brute_force(kind, which):
    """(mean loss, sensitivity, C of each layer) of the tiny model of `kind` on the data `which`, by
    transformers' model."""
    examples, hs = examples_of() if which == "examples" else blocks_of(), []
    tiny(kind).save_pretrained("padded", pad=True)
    model = transformers.AutoModelForCausalLM.from_pretrained("padded", dtype=torch.float64)
    for block in model.transformer.h:
        block.mlp.act.register_forward_hook(lambda module, x, h: hs.append(h))
    loss, asked, sensitivity, Cs = 0.0, 0, 0.0, [0.0, 0.0]
    for number in range(len(examples)):
        idx, targets, real = (tensor[0] for tensor in examples.batch([number]))
        length, count = int(real.sum()), int((targets != -100).sum())  # the last block is padded
        logits = model(idx[None, :length]).logits[0]  # [length, V]
        own = F.cross_entropy(logits, targets[:length])
        for layer, gradient in enumerate(torch.autograd.grad(own, hs)):
            h = hs[layer][0].detach()[:, :WIDTHS[layer]]  # [length, k], without the padding
            Cs[layer] = Cs[layer] + h.T @ h
            for i in range(WIDTHS[layer]):
                sensitivity += abs(float(h[:, i] @ gradient[0, :, i]))
        loss, asked = loss + float(own) * count, asked + count
        hs.clear()
    return loss / asked, sensitivity / len(examples), Cs


def uniqueness_by_hand(Cs):
    duplicates = 0
    for C in Cs:
        for i in range(len(C)):
            cosines = [abs(C[i, j]) / (C[i, i] * C[j, j]) ** 0.5 for j in range(i + 1, len(C))]
            duplicates += any(cosine >= 0.8 for cosine in cosines)
    return 1 - duplicates / sum(map(len, Cs))


def span_by_hand(C, ridge=1e-6):
    """The residual of each neuron's regression on the others, solved one by one (same ridge)."""
    A, shares = C + ridge * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype), []
    for i in range(len(A)):
        others = [j for j in range(len(A)) if j != i]
        b, B = A[others, i], A[others][:, others]
        shares.append(float((A[i, i] - b @ torch.linalg.solve(B, b)) / A[i, i]))
    return shares


@pytest.mark.parametrize("which", ["examples", "blocks"])
@pytest.mark.parametrize("kind,rel", [("gpt2", 1e-9), ("gpt_neo", 1e-4)])  # whose attention
def test_loss_and_redundancy_equal_brute_force(kind, rel, which):  # transformers has in float32
    examples, model = examples_of() if which == "examples" else blocks_of(), tiny(kind)
    loss, expected, expected_Cs = brute_force(kind, which)
    # The model takes its loss in float32: 257 additions, 2^-24 each.
    assert measure.mean_loss(model, examples, nullcontext()) == pytest.approx(loss, rel=2e-5 + rel)
    sensitivity, Cs = measure.activation_statistics(model, examples)
    assert sensitivity == pytest.approx(expected, rel=rel)
    for C, expected_C in zip(Cs, expected_Cs):
        assert (C - expected_C).abs().max() <= rel * expected_C.abs().max()
    values, counts = measure.redundancy(Cs)
    assert 0 < values["uniqueness"] < 1
    assert values["uniqueness"] == pytest.approx(uniqueness_by_hand(Cs))
    shares = [share for C in Cs for share in span_by_hand(C)]
    assert values["span_uniqueness"] == pytest.approx(statistics.fmean(shares), rel=1e-7)
    assert [sum(of_layer) for of_layer in counts] == list(WIDTHS)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_depends_on_batches_order_or_padding(kind):
    model, autocast = tiny(kind), nullcontext()
    reference, Cs = measure.activation_statistics(model, examples_of())
    unique = measure.redundancy(Cs)[0]
    for pairs, tokens in (TEXTS, 1), (TEXTS, 128), (TEXTS[::-1], 8192), (TEXTS[2:] + TEXTS[:2], 200):
        shuffled = examples_of(pairs)
        shuffled.by_length = lambda n=len(pairs): list(range(n))  # very different lengths in a batch
        found, Cs = measure.activation_statistics(model, shuffled, tokens)
        assert found == pytest.approx(reference, rel=1e-9)
        assert measure.redundancy(Cs)[0] == pytest.approx(unique, rel=1e-7)
    found, Cs = measure.activation_statistics(model, examples_of(), first=2)
    expected, expected_Cs = measure.activation_statistics(model, examples_of(TEXTS[:2]))
    assert found == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(Cs, expected_Cs)
    # Of blocks of 32 tokens, two batches are the first 128.
    many, first = blocks_of(tokens=32 * 200 + 1), blocks_of(tokens=32 * 128 + 1)
    expected = measure.mean_loss(model, first, autocast)
    assert measure.mean_loss(model, many, autocast, most=2) == pytest.approx(expected, rel=2e-5)


def orthonormal(tokens, k, seed=0):
    drawn = torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed)).double()
    return torch.linalg.qr(drawn)[0]


def uniqueness(*layers):
    return measure.redundancy([h.T @ h for h in layers])[0]["uniqueness"]


def test_k_copies_are_k_minus_1_duplicates_and_an_opposite_one_counts():
    h = orthonormal(50, 10)
    assert uniqueness(h) == 1
    assert uniqueness(torch.cat([h, 2 * h[:, :1], 0.5 * h[:, :1]], 1)) == pytest.approx(1 - 2 / 12)
    assert uniqueness(torch.cat([-3 * h[:, 4:5], h], 1), h) == pytest.approx(1 - 1 / 21)


@pytest.mark.parametrize("cosine,unique", [(0.79, 1), (0.81, 0.5), (-0.81, 0.5)])
def test_a_duplicate_begins_at_08(cosine, unique):
    C = torch.tensor([[4.0, 6 * cosine], [6 * cosine, 9.0]], dtype=torch.float64)
    assert measure.redundancy([C])[0]["uniqueness"] == unique


def test_what_is_in_the_span_of_others_is_not_unique_though_its_cosines_are_small():
    h = orthonormal(60, 8)
    h = torch.cat([h, h[:, :1] + h[:, 1:2]], 1)
    shares = measure.span_residuals(h.T @ h)
    assert uniqueness(h) == 1
    assert shares[[0, 1, 8]].max() < 1e-4 and shares[2:8].min() > 0.99
    h = torch.randn(10, 30, generator=torch.Generator().manual_seed(0)).double()
    assert measure.span_residuals(h.T @ h).max() < 1e-3  # more neurons than tokens


def test_silent_neurons_are_like_nothing_and_in_every_span():
    h = torch.cat([orthonormal(30, 4), torch.zeros(30, 2)], 1)
    assert uniqueness(h) == 1
    assert measure.span_residuals(h.T @ h).tolist() == pytest.approx([1, 1, 1, 1, 0, 0])
    assert measure.span_residuals(torch.zeros(3, 3, dtype=torch.float64)).tolist() == [0, 0, 0]


def test_layers_without_neurons():
    sensitivity, Cs = measure.activation_statistics(tiny(widths=(5, 0)), blocks_of())
    assert sensitivity > 0 and measure.redundancy(Cs)[1][1] == [0] * 10
    sensitivity, Cs = measure.activation_statistics(tiny(widths=(0, 0)), blocks_of())
    assert sensitivity == 0
    assert measure.redundancy(Cs)[0] == dict(uniqueness=None, span_uniqueness=None)


def test_the_counts_are_of_the_largest_similarity():
    h = torch.randn(40, 12, generator=torch.Generator().manual_seed(4)).double()
    cosines = [max(abs(F.cosine_similarity(h[:, i], h[:, j], 0)) for j in range(12) if j != i)
               for i in range(12)]
    expected = [sum(n / 10 <= cosine < (n + 1) / 10 for cosine in cosines) for n in range(10)]
    assert measure.redundancy([h.T @ h])[1] == [expected]


# Exact match and texts.


@pytest.mark.parametrize("dataset", ["toysql", "wikisql"])
def test_exact_match_by_teacher_forcing_is_greedy_decodings(dataset, monkeypatch):
    if dataset == "toysql":
        vocab_size, pairs = 257, data.toysql("validation")[:100]
    else:
        folder, vocabulary = SHARED / "hub" / "Salesforce" / "wikisql", SHARED / "tiktoken_cache"
        if not (folder.is_dir() and vocabulary.is_dir()):
            pytest.skip("no local copy of WikiSQL and of the GPT-2 vocabulary in ../shared")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(vocabulary))
        vocab_size, pairs = 50257, data.hub_pairs("wikisql", "validation", str(folder), None)[:100]
    examples = data.Examples(pairs, 128, data.tokenizer(vocab_size))
    first = statistics.mode(ids[0] for ids in examples.targets)
    for i, ids in enumerate(examples.targets):  # what can be learned in no time: for most the same
        examples.targets[i] = [first if i % 3 else ids[-2], examples.eot]
    model = tiny(widths=(64, 64), scale=1.0, vocab_size=vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(30):
        idx, targets, _ = examples.batch([(8 * step + n) % len(examples) for n in range(8)])
        asked = targets != -100
        logits = F.linear(model(idx, head=False)[asked], model.wte.weight)
        F.cross_entropy(logits, targets[asked]).backward()
        optimizer.step()
        optimizer.zero_grad()
    matches = dict(zip(examples.by_length(), measure.exact_matches(model, examples)))
    new = model.generate(examples.prompts, 2, temperature=0, eot=examples.eot)
    assert matches == {i: ids == examples.targets[i][:-1] for i, ids in enumerate(new)}
    assert set(matches.values()) == {True, False}


REFERENCES = [["the cat sat on the mat", "a cat is on the mat today"],
              ["dogs bark loudly at night", "at night dogs bark", "barking dogs at night are loud"],
              ["one reference only here it is"]]
WRITTEN = ["the cat is on a mat", "loud dogs bark at night", "one reference here"]


def test_rouge_and_bleu_equal_the_libraries_with_several_references():
    from rouge_score import rouge_scorer
    from sacrebleu.metrics import BLEU

    values = measure.text_scores(WRITTEN, REFERENCES)
    for name in ("rouge1", "rouge2", "rougeL"):
        scorer = rouge_scorer.RougeScorer([name])
        best = [max(scorer.score(reference, text)[name].fmeasure for reference in references)
                for text, references in zip(WRITTEN, REFERENCES)]
        assert values[name] == pytest.approx(sum(best) / 3)
    streams = [[references[n] if n < len(references) else None for references in REFERENCES]
               for n in range(3)]
    assert values["bleu"] == pytest.approx(BLEU().corpus_score(WRITTEN, streams).score)
    assert 0 < values["bleu"] < 100


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_written_once_per_distinct_prompt_and_have_all_its_references(beams):
    examples = examples_of([("p\n", "one"), ("q\n", "two"), ("p\n", "three"),
                            ("long prompt\n", "four")])
    written, references = measure.write_texts(model := tiny(), examples, beams=beams)
    assert references == [["one", "three"], ["two"], ["four"]]
    alone = [model.generate([examples.prompts[i]], 6, temperature=0, eot=256, beams=beams,
                            length_penalty=0.9, no_repeat_ngram=4 * (beams > 1))[0]
             for i in (0, 1, 3)]
    assert written == [" ".join(data.tokenizer(257).decode(ids).split()) for ids in alone]
    two = measure.write_texts(model, examples, prompts=2, beams=beams)
    assert two == (written[:2], references[:2])


# Runs: the command line.


def run(*flags, model="small", dataset="stdlib", steps=6):
    common = ["--model", model, "--dataset", dataset, "--steps", steps, "--batch-size", 2,
              "--block-size", 64, "--lr", 1e-2, "--log-every", 2, "--device", "cpu"]
    return train.run(train.parse([str(word) for word in [*common, *flags]]))


def start(kind="gpt2"):
    tiny(kind, widths=(), scale=1.0).float().save_pretrained("small")


def main(*words):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["measure.py", *map(str, words)])
        measure.main()


def evaluate(*words):
    main(*words, "--examples", 8, "--device", "cpu")


def measured(folder):
    def no_constant(name):
        raise AssertionError(f"{name} in measure.json")

    return json.loads((Path(folder) / "measure.json").read_text(), parse_constant=no_constant)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", prune.METHODS)
def test_a_run_of_every_method_is_measured(method, kind):
    start(kind)
    leftover = [] if method == "none" else ["--leftover", 0.25]
    metrics = run("--method", method, *leftover, "--out", "out/run")
    evaluate("out/run")
    found, model = measured("out/run"), GPT.from_pretrained("out/run")
    values = found["values"]
    assert values["perplexity"] == pytest.approx(metrics["result"]["val_perplexity"], rel=1e-5)
    assert values["leftover"] == metrics["leftover"]
    assert found["leftover_per_layer"] == metrics["leftover_per_layer"]
    split = load_once("stdlib", "train", 257, 64, None, None)
    sensitivity, Cs = measure.activation_statistics(model, split, first=8)
    assert values["sensitivity"] == pytest.approx(sensitivity)
    assert values["uniqueness"] == measure.redundancy(Cs)[0]["uniqueness"]
    widths = list(model.config.mlp_widths)
    assert found["widths"] == widths == [sum(counts) for counts in found["counts"]]
    if method == "none":  # it is its own dense run
        assert set(found["ratios"].values()) == {1.0}
    else:
        assert found["dense"] is None and set(found["ratios"].values()) == {None}


def test_ratios_are_to_the_dense_run_beside(capsys):
    start()
    run("--method", "none", "--seed", 1, "--out", "out/other-seed")
    run("--method", "none", "--out", "out/other-steps", steps=4)
    run("--method", "none", "--out", "out/same")
    run("--method", "none", "--distill", "--teacher", "small", "--out", "out/a-student")
    run("--method", "gum", "--leftover", 0.25, "--out", "out/gum", model=os.path.abspath("small"))
    evaluate("out/gum", "out/same")
    gum, same = measured("out/gum"), measured("out/same")
    assert gum["dense"] == "same"
    for name in ("perplexity", "sensitivity", "uniqueness", "span_uniqueness"):
        assert gum["ratios"][name] == gum["values"][name] / same["values"][name]
    assert f"{gum['ratios']['sensitivity']:.4g}" in capsys.readouterr().out
    evaluate("out/gum", "--dense", "out/other-seed")
    assert measured("out/gum")["dense"] == "other-seed"


def test_measuring_twice_gives_the_same_bytes():
    start()
    run("--method", "none", "--out", "out/dense")
    run("--method", "gum", "--leftover", 0.5, "--out", "out/gum")
    evaluate("out/gum")
    first = Path("out/gum/measure.json").read_bytes()
    measure.measure.cache_clear()
    evaluate("out/gum")
    assert Path("out/gum/measure.json").read_bytes() == first
    files = ["config.json", "log.jsonl", "measure.json", "metrics.json", "model.safetensors"]
    assert sorted(os.listdir("out/gum")) == files


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_with_only_a_model_is_measured(kind):
    tiny(kind, widths=(5, 0)).float().save_pretrained("shrunk")
    tiny(kind, widths=(8, 4)).float().save_pretrained("full")
    evaluate("shrunk", "--dataset", "toysql", "--dense", "full")
    found = measured("shrunk")
    assert found["leftover_per_layer"] == [5 / 8, 0] and found["values"]["leftover"] == 5 / 12
    assert 0 <= found["values"]["exact_match"] <= 1 and found["ratios"]["sensitivity"] > 0
    evaluate("shrunk", "--dataset", "stdlib", "--block-size", 32)
    assert measured("shrunk")["leftover_per_layer"] is None


def test_numbers_that_do_not_exist_are_null():
    tiny(widths=(0, 0)).float().save_pretrained("empty")
    evaluate("empty", "--dataset", "stdlib", "--dense", "empty")
    found = measured("empty")
    assert found["values"]["uniqueness"] is None and found["ratios"]["sensitivity"] is None
    assert found["values"]["sensitivity"] == 0 and found["ratios"]["perplexity"] == 1


def test_e2e_is_measured_by_its_texts_which_read_back_as_e2e_metrics_reads_them():
    from datasets import Dataset

    rows = [("name[Aromi]", "Aromi is here ."), ("name[Aromi]", "There is Aromi ."),
            ("name[Zizzi], food[French]", "Zizzi is French .")]
    table = Dataset.from_dict(dict(zip(("meaning_representation", "human_reference"), zip(*rows))))
    for split in ("train", "validation"):
        os.makedirs(f"data/{split}")
        table.to_parquet(f"data/{split}/0000.parquet")
    start()
    run("--method", "none", "--data-path", "data", "--out", "run", dataset="e2e")
    evaluate("run", "--outputs")
    references = "Aromi is here .\nThere is Aromi .\n\nZizzi is French .\n"
    assert Path("run/references.txt").read_text() == references
    outputs = Path("run/outputs.txt").read_text().split("\n")[:-1]
    groups = [group.splitlines() for group in references.split("\n\n")]
    values = measured("run")["values"]
    assert measure.text_scores(outputs, groups).items() <= values.items()
    assert "exact_match" not in values
    evaluate("run", "--outputs", "--generate", 1)
    assert Path("run/references.txt").read_text() == references[: references.index("\n\n") + 1]


def test_dialogues_are_measured_by_rouge():
    chats = [("Ann: Lunch at noon?\nBob: At one.", "Ann and Bob will have lunch at one."),
             ("Eve: Where are my keys?\nTom: On the fridge!", "Eve's keys are on the fridge.")]
    lines = [json.dumps(dict(id=chat[:3], dialogue=chat, summary=text)) for chat, text in chats]
    os.mkdir("chats")
    for split in ("train", "validation"):
        Path("chats", f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    start()
    run("--method", "gum", "--data-path", "chats", "--out", "run", dataset="samsum",
        *["--block-size", 128])
    evaluate("run")
    examples = load_once("samsum", "validation", 257, 128, "chats", None)
    written, references = measure.write_texts(GPT.from_pretrained("run"), examples)
    assert references == [[text] for _, text in chats]
    scores = measure.text_scores(written, references)
    assert scores.items() <= measured("run")["values"].items()


# Tables and figures, of made-up runs.


def fake(folder, method, leftover, seed, distill=False, value=None, real=None, **settings):
    """A finished run's folder with just what tables and figures read."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    settings = dict(dataset="toysql", data_config=None, model="small", method=method,
                    distill=distill, leftover=leftover, seed=seed, lr=0.1) | settings
    widths = [round(20 * leftover)] * 2
    metrics = dict(settings=settings, start=dict(widths=[20] * 2), leftover=real or leftover,
                   result=dict(val_perplexity=5.0 + seed), leftover_per_layer=[leftover] * 2)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    log = [dict(step=step, loss=9 / step, v_t=leftover, leftover=leftover, widths=widths)
           for step in range(1, 30)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    if value is not None:
        values = dict(exact_match=value, perplexity=3.0, sensitivity=value, uniqueness=0.9,
                      span_uniqueness=None, leftover=leftover)
        counts = [[0] * 5 + [width] + [0] * 4 for width in widths]
        (folder / "measure.json").write_text(json.dumps(dict(values=values, ratios=values,
                                                             counts=counts)))


EXACT = {("gum", 0.25): [0.5, 0.75, 0.7], ("gum", 0.1): [0.25, 0.5], ("topv", 0.25): [0.125]}


@pytest.fixture
def fakes():
    for seed in range(2):
        fake(f"out/none-{seed}", "none", 1.0, seed, value=0.9)
    for (method, leftover), values in EXACT.items():
        for seed, value in enumerate(values):
            fake(f"out/{method}-{leftover}-{seed}", method, leftover, seed, value=value)
            fake(f"out/{method}-{leftover}-{seed}-d", method, leftover, seed, True, value / 2)
    fake("out/soft", "soft", 0.1, 0, value=0.3, real=0.13)
    return sorted(map(str, Path("out").iterdir()))


def rows_of(text, form):
    if form == "csv":
        return [row for row in csv.reader(text.splitlines()) if row]
    if form == "markdown":
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
                if line.startswith("|") and "---" not in line]
    text = text.replace(r"$\pm$", "±").replace(r"\_", "_").replace(r" \\", "")
    return [[cell.strip() for cell in line.split("&")] for line in text.splitlines() if "&" in line]


@pytest.mark.parametrize("form", ["markdown", "csv", "latex"])
def test_a_table_has_means_and_sample_standard_deviations_over_seeds(form, fakes, capsys):
    main("table", *fakes, "--format", form)
    header, *rows = rows_of(capsys.readouterr().out, form)
    assert header == ["toysql, small: exact match", "1", "0.25", "0.1"]
    table = {row[0]: dict(zip(header[1:], row[1:])) for row in rows}
    assert list(table) == ["Dense", "Top_v", "Soft movement", "GUM", "Top_v, distilled",
                           "GUM, distilled"]
    for (method, leftover), values in EXACT.items():
        for label, scale in (("", 1), (", distilled", 0.5)):
            text = table[prune.METHODS[method].name + label][str(leftover)]
            mean, *std, n = [float(number) for number in re.findall(r"[\d.]+", text)]
            assert mean == pytest.approx(scale * statistics.mean(values), rel=1e-3)
            assert n == len(values) and len(std) == (n > 1)
            if std:
                assert std == [pytest.approx(scale * statistics.stdev(values), rel=0.05)]
    assert table["Top_v"]["0.1"] == "-"
    assert "0.13" in table["Soft movement"]["0.1"]  # it left more than it was asked to


def test_a_table_of_unmeasured_runs_shows_their_perplexity(capsys):
    for seed in range(2):
        fake(f"run{seed}", "gum", 0.5, seed)
    main("table", "run0", "run1")
    text = capsys.readouterr().out
    assert "small: perplexity" in text and "5.5 ± 0.71 (2)" in text


def test_ablations_have_rows_of_their_own(capsys):
    fake("a", "gum", 0.5, 0, lambda_gum=10.0, value=0.5, log_every=10)
    fake("b", "gum", 0.5, 0, lambda_gum=0.0, value=0.25, log_every=20)
    main("table", "a", "b", "--format", "csv")
    rows = rows_of(capsys.readouterr().out, "csv")[1:]
    assert rows == [["GUM, lambda_gum 10.0", "0.5 (1)"], ["GUM, lambda_gum 0.0", "0.25 (1)"]]


def test_figures_are_drawn_and_not_blank(fakes):
    from matplotlib import image

    main("figures", *fakes, "--out", "drawn")
    names = {path.stem.removesuffix("-toysql-small") for path in Path("drawn").glob("*.png")}
    assert names == {"redundancy-ratios", "redundancy-values", "layers", *(
        f"{kind}-{which}" for kind in ("similarity", "training")
        for which in ("0.25", "0.1", "0.25-distilled", "0.1-distilled"))}
    files = {path.name for path in Path("drawn").iterdir()}
    assert files == {f"{name}-toysql-small.{kind}" for name in names for kind in ("png", "pdf")}
    for path in Path("drawn").glob("*.png"):
        pixels = image.imread(path)
        dark = (pixels[..., :3].min(2) < 0.9).mean()
        assert pixels.shape[1] == 1800 and 0.01 < dark < 0.5, path


def drawn_by(folders):
    """The figures that `folders` give: {name: (panels, styles)}."""
    seen = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compare, "draw", lambda path, *figure: seen.update({path.name: figure}))
        main("figures", *folders)
    return seen


def test_each_method_has_its_own_colour_and_marker_always_the_same(fakes):
    all_figures = drawn_by(fakes)
    fewer = drawn_by(folder for folder in fakes if "soft" not in folder)
    names, looks = {method.name for method in prune.METHODS.values()}, {}
    for _, styles in (*all_figures.values(), *fewer.values()):
        for name in names & styles.keys():
            looks.setdefault(name, set()).add((styles[name]["color"], styles[name]["marker"]))
    assert looks.keys() == {"Dense", "Top_v", "Soft movement", "GUM"}
    (colours, markers) = (set(each) for each in zip(*(look for [look] in looks.values())))
    assert len(colours) == len(markers) == 4


def test_the_curves_are_those_of_the_runs(fakes):
    figures = {name.removesuffix("-toysql-small"): panels for name, (panels, _)
               in drawn_by(fakes).items()}
    points = {}
    for (how, _, y_label), lines in figures["redundancy-values"].items():
        for curve, xs, ys in lines:
            points.setdefault((how, y_label, curve), []).extend(zip(xs, ys))
    of_gum = points["without distillation", "sensitivity (nats)", "GUM"]
    assert sorted(of_gum) == [(0.1, 0.25), (0.1, 0.5), (0.25, 0.5), (0.25, 0.7), (0.25, 0.75)]
    assert points["with distillation", "sensitivity (nats)", "Dense"] == [(1.0, 0.9)] * 2
    (layers,) = [lines for (title, *_), lines in figures["layers"].items()
                 if title == "leftover 0.1, with distillation"]
    assert [(curve, list(xs), ys) for curve, xs, ys in layers] == [("GUM", [1, 2], [0.1, 0.1])] * 2
    counted = figures["similarity-0.25"]["layer 2", "largest |cos| to another neuron",
                                         "share of neurons"]
    assert {curve for curve, *_ in counted} == {"Dense", "Top_v", "GUM"}
    assert all(ys == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0] and xs[5] == 0.55 for _, xs, ys in counted)
    panels = figures["training-0.25"]
    assert {title for title, *_ in panels} == {"all methods", "all layers", "Top_v", "GUM"}
    for curve, xs, ys in panels["GUM", "step", "share of neurons left"]:
        assert curve in ("layer 1", "layer 2") and ys == [5 / 20] * 29 and xs == [*range(1, 30)]


def test_a_new_method_is_in_tables_and_figures_at_once(fakes, monkeypatch, capsys):
    for n, name in enumerate(("mine", "yours")):
        monkeypatch.setitem(prune.METHODS, name, prune.Method(f"Method {name}", "a new one"))
        fake(f"out/{name}", name, 0.25, 0, value=0.6 + n / 10)
    main("table", *fakes, "out/mine", "out/yours", "--format", "csv")
    assert ["Method mine", "-", "0.6 (1)", "-"] in rows_of(capsys.readouterr().out, "csv")
    main("figures", *fakes, "out/mine", "out/yours", "--out", "drawn")
    styles = drawn_by([*fakes, "out/mine", "out/yours"])["training-0.25-toysql-small"][1]
    looks = [(style["color"], style["marker"]) for name, style in styles.items()
             if "marker" in style and not name.startswith("layer")]
    assert len(looks) == len(set(looks)) == 6
    assert Path("drawn/training-0.25-toysql-small.png").stat().st_size > 0


def test_real_runs_are_tabled_and_drawn(capsys):
    start()
    folders = []
    for seed in (0, 1):
        for flags in (["none"], ["gum", "--leftover", 0.25], ["topv", "--leftover", 0.25]):
            folders.append(f"out/{flags[0]}{seed}")
            run("--method", *flags, "--seed", seed, "--out", folders[-1])
    evaluate(*folders)
    main("table", *folders)
    assert "| GUM |" in capsys.readouterr().out
    main("figures", *folders, "--out", "drawn")
    assert len(list(Path("drawn").glob("*.png"))) == 5


def test_a_sample_stands_beside_the_dense_models_and_is_the_same_each_time(capsys):
    start()
    run("--method", "none", "--out", "out/dense")
    run("--method", "gum", "--leftover", 0.25, "--out", "out/gum")
    texts = []
    for _ in range(2):
        main("sample", "out/gum", "--prompt", "def f(x):", "--tokens", 20, "--device", "cpu")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].count("def f(x):") == 2
    assert re.match("dense: out/dense +[|] pruned: out/gum\n", texts[0])


# Mistakes.


@pytest.mark.parametrize("words,says", [
    ("nowhere", "nowhere"),
    ("", "RUN"),
    ("small", "small --dataset"),
    ("small --dataset wiki", "wiki stdlib"),
    ("small --dataset stdlib --block-size 999", "999 128"),
    ("small --dataset stdlib --outputs", "--outputs stdlib"),
    ("small --dataset stdlib --examples -1", "--examples least"),
    ("small --dataset stdlib --beams 0", "--beams least"),
    ("small --dataset stdlib --device foo", "--device foo cuda"),
    ("small --dataset e2e --data-path nothing", "nothing"),
    ("small --dataset stdlib --dense nowhere", "nowhere"),
    ("empty --dataset stdlib", "empty config.json"),
    ("unfinished", "unfinished finished --resume"),
    ("sample small --prompt x --dense unfinished", "unfinished finished --resume"),
    ("damaged", "damaged/metrics.json damaged remove"),
    ("table cut", "cut/measure.json damaged remove"),
    ("table small", "small metrics.json"),
    ("table fake --metric bleu", "bleu measure.py fake"),
    ("table fake --metric speed", "speed perplexity"),
    ("table unknown", "unknown mine"),
    ("figures fake", "measure.py fake"),
    ("sample small", "--prompt"),
    ("sample small --prompt=", "prompt"),
    ("table fake --beams 3", "--beams")])
def test_a_mistake_gets_one_line_and_status_2(words, says, capsys):
    start()
    fake("fake", "gum", 0.5, 0)
    fake("unknown", "mine", 0.5, 0)
    for name, file, text in (("empty", "a", ""), ("unfinished", "settings.json", '{"method": "gum"}'),
                             ("damaged", "metrics.json", "{half"), ("cut", "measure.json", "{}")):
        os.mkdir(name)
        Path(name, file).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(*words.split())
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("measure.py: error: ")
    assert len(lines) <= 1 + lines[0].startswith("reading")
    for word in says.split():
        assert word in lines[-1], lines[-1]
    assert list(Path().glob("*/measure.json")) == [Path("cut/measure.json")]


def test_help_is_no_mistake(capsys):
    with pytest.raises(SystemExit) as stopped:
        main("--help")
    assert stopped.value.code == 0 and "table" in capsys.readouterr().out
