"""Every measure against a computation of its own; then what is written, tabled, drawn, and said to
mistakes. Models are in float64 where equal choices or more than five digits are asked."""

import csv
import json
import math
import os
import re
import statistics
import subprocess
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
from results import cli, compare, runs, texts

KINDS = {"gpt2": {}, "gpt_neo": dict(model_type="gpt_neo", qkv_bias=False, attn_scaled=False,
                                     windows=(None, 8))}
TEXTS = [("a b", "x y z"), ("c", "longer than the others, this one"), ("d e f", "x"), ("g", "yy"),
         ("hhh", "z z z")]
WIDTHS = 24, 17


@cache
def load_once(*args, real=data.load):
    """A data set as `data.load` gives it, blocks cut short."""
    loaded = real(*args)
    if isinstance(loaded, data.Blocks):
        loaded.tokens = loaded.tokens[:2000]
    return loaded


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", load_once)
    measure.load.cache_clear()
    measure.measure.cache_clear()


def tiny(kind="gpt2", widths=WIDTHS, scale=2.0):
    """A GPT whose weights are large enough for its neurons to differ; two of a layer are alike."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, n_positions=128, n_embd=16, n_layer=2, n_head=2,
                          mlp_widths=widths, **KINDS[kind])).double().eval()
    for name, p in model.named_parameters():
        if "ln_" not in name:
            p.data = p.data * scale + 0.1 * torch.randn_like(p) * name.endswith("bias")
            if ".mlp.c_fc." in name and len(p) > 5:
                p.data[5] = p.data[2] * 1.1
    return model


def examples_of(pairs=TEXTS):
    return data.Examples(pairs, 64, data.tokenizer(257))


def blocks_of(tokens=150):
    ids = torch.randint(256, (tokens,), generator=torch.Generator().manual_seed(3))
    return data.Blocks(ids.numpy().astype("uint16"), 32, 256)


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
        own = F.cross_entropy(model(idx[None, :length]).logits[0], targets[:length])
        for layer, gradient in enumerate(torch.autograd.grad(own, hs)):
            h = hs[layer][0].detach()[:, : WIDTHS[layer]]  # [length, k], without the padding
            Cs[layer] = Cs[layer] + h.T @ h
            for i in range(WIDTHS[layer]):
                sensitivity += abs(float(h[:, i] @ gradient[0, :, i]))
        loss, asked = loss + own.item() * count, asked + count
        hs.clear()
    return loss / asked, sensitivity / len(examples), Cs


def span_by_hand(C, ridge=1e-6):
    """What a regression of each neuron on the others leaves of it, by determinants (same ridge)."""
    A, n = C + ridge * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype), range(len(C))
    others = [A[[j for j in n if j != i]][:, [j for j in n if j != i]] for i in n]
    return [float(A.det() / B.det() / A[i, i]) for i, B in enumerate(others)]


@pytest.mark.parametrize("which,tokens", [("blocks", 64), ("blocks", 2048), ("examples", 1),
                                          ("examples", 130), ("examples", 2048)])
@pytest.mark.parametrize("kind,rel", [("gpt2", 1e-9), ("gpt_neo", 1e-4)])  # attention in float32
def test_loss_and_redundancy_equal_brute_force(kind, rel, which, tokens):
    examples, model = examples_of() if which == "examples" else blocks_of(), tiny(kind)
    loss, expected, expected_Cs = brute_force(kind, which)
    # The model takes its loss in float32: 257 additions, 2^-24 each.
    assert measure.mean_loss(model, examples, nullcontext()) == pytest.approx(loss, rel=2e-5 + rel)
    examples.by_length = lambda: list(range(len(examples)))  # very different lengths in a batch
    sensitivity, Cs, seen = measure.activation_statistics(model, examples, tokens)
    assert sensitivity == pytest.approx(expected, rel=rel)
    for C, expected_C in zip(Cs, expected_Cs):
        assert (C - expected_C).abs().max() <= rel * expected_C.abs().max()
    assert seen == sum(int(examples.batch([i])[2].sum()) for i in range(len(examples)))
    values, counts = measure.redundancy(Cs)
    shares = [share for C in Cs for share in span_by_hand(C)]
    assert values["span_uniqueness"] == pytest.approx(statistics.fmean(shares), rel=1e-7)
    rows = [(i, [abs(C[i, j]) / (C[i, i] * C[j, j]) ** 0.5 for j in range(len(C))])
            for C in Cs for i in range(len(C))]
    shares = [not any(cosine >= 0.8 for cosine in row[i + 1 :]) for i, row in rows]
    assert values["uniqueness"] == pytest.approx(statistics.fmean(shares)) and 0 < sum(shares) < 41
    largest = [max(row[:i] + row[i + 1 :]) for i, row in rows]
    for of_layer, chosen in zip(counts, (largest[:24], largest[24:])):
        assert of_layer == [sum(n / 10 <= x < (n + 1) / 10 for x in chosen) for n in range(10)]


def test_only_the_first_sequences_or_one_batch_in_a_few_count_when_asked():
    model = tiny()
    found, Cs, seen = measure.activation_statistics(model, examples_of(), first=2)
    expected, *others = measure.activation_statistics(model, examples_of(TEXTS[:2]))
    assert found == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close([Cs, seen], others)
    blocks = blocks_of(tokens=200 * 32 + 1)  # 64 of them in a batch
    with torch.no_grad():
        losses = [model(*blocks.batch([i])[:2])[1].item() for i in range(200)]
    expected = statistics.fmean(losses[:64] + losses[128:192])
    assert measure.mean_loss(model, blocks, nullcontext(), 2) == pytest.approx(expected, rel=2e-5)
    assert expected != pytest.approx(statistics.fmean(losses[:128]), rel=1e-3)  # the first two


def test_evaluations_on_the_way_see_short_and_long_examples():
    examples = data.load("toysql", "validation", 257, 128)
    lengths = [examples.batch([i])[2].sum() for i in examples.by_length()]
    seen = [int(real.sum(1).max()) for *_, real in measure.batches("", tiny(), examples, every=5)]
    assert len(seen) == math.ceil(len(examples) / 16 / 5) and seen[0] == lengths[15]
    assert seen[-1] > statistics.median(map(int, lengths)) > seen[0]


def normal(tokens, k, seed=0):
    return torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed)).double()


def uniqueness(*layers):
    return measure.redundancy([h.T @ h for h in layers])[0]["uniqueness"]


def test_k_copies_are_k_minus_1_duplicates_and_an_opposite_one_counts():
    h = torch.linalg.qr(normal(50, 10))[0]  # orthonormal
    assert uniqueness(h) == 1
    assert uniqueness(torch.cat([h, 2 * h[:, :1], 0.5 * h[:, :1]], 1)) == pytest.approx(1 - 2 / 12)
    assert uniqueness(torch.cat([-3 * h[:, 4:5], h], 1), h) == pytest.approx(1 - 1 / 21)
    for cosine, unique in (0.79, 1), (0.81, 0.5), (-0.81, 0.5):
        C = torch.tensor([[4.0, 6 * cosine], [6 * cosine, 9.0]], dtype=torch.float64)
        assert measure.redundancy([C])[0]["uniqueness"] == unique


def test_what_is_in_the_span_of_others_is_not_unique_though_its_cosines_are_small():
    h = torch.linalg.qr(normal(60, 8))[0]
    h = torch.cat([h, h[:, :1] + h[:, 1:2], torch.zeros(60, 2)], 1)
    shares = measure.span_residuals(h.T @ h)
    assert uniqueness(h) == 1  # a silent neuron is like nothing, and in every span
    assert shares[[0, 1, 8]].max() < 1e-4 and shares[2:8].min() > 0.99
    assert shares[9:].tolist() == [0, 0]
    assert measure.span_residuals(torch.zeros(3, 3, dtype=torch.float64)).tolist() == [0, 0, 0]
    h = normal(10, 30)
    assert measure.span_residuals(h.T @ h).max() < 1e-3  # more neurons than tokens


def test_too_few_tokens_give_no_span_uniqueness_and_it_is_said_how_to_have_more(capsys):
    Cs = [h.T @ h for h in (normal(60, 10), normal(60, 30))]
    assert measure.redundancy(Cs, 60)[0] == measure.redundancy(Cs)[0]
    fewer = measure.redundancy(Cs, 59)[0]
    assert fewer["span_uniqueness"] is None and fewer["uniqueness"] > 0
    save("small")  # with 64 neurons a layer
    for examples, enough in (1, False), (2, True):
        main(*"small --dataset stdlib --block-size 64 --device cpu --examples".split(), examples)
        values = json.loads(Path("small/measure.json").read_text())["values"]
        assert (values["span_uniqueness"] is not None) == enough
        assert ("raise --examples" in capsys.readouterr().out) != enough
    fake("run", "gum", value=0.5)  # whose span uniqueness is None
    assert "| GUM | - |" in table_of(capsys, "run", "--metric", "span_uniqueness")
    main("figures", "run")


# Exact match and texts.


def test_exact_match_by_teacher_forcing_is_greedy_decodings():
    pairs, model = data.toysql("validation")[0][:100], tiny()
    examples = data.Examples(pairs, 128, data.tokenizer(257))
    written = model.generate(examples.prompts, 4, temperature=0)
    for i, ids in enumerate(written):  # for every other one, a token is a different one
        examples.targets[i] = [(token + (n == i / 2 % 4)) % 257 for n, token in enumerate(ids)]
    matches = dict(zip(examples.by_length(), measure.exact_matches(model, examples)))
    assert matches == {i: ids == examples.targets[i] for i, ids in enumerate(written)}
    assert sum(matches.values()) == 50


def test_rouge_and_bleu_equal_the_libraries_with_several_references():
    from rouge_score import rouge_scorer
    from sacrebleu.metrics import BLEU

    written = ["the cat is on a mat", "loud dogs bark at night", "one reference here"]
    references = [["the cat sat on the mat", "a cat is on the mat today"],
                  ["dogs bark loudly at night", "at night dogs bark", "dogs at night are loud"],
                  ["one reference only here it is"]]
    values = texts.text_scores(written, references)
    for name in ("rouge1", "rouge2", "rougeL"):
        score = rouge_scorer.RougeScorer([name]).score
        best = [max(score(reference, text)[name].fmeasure for reference in group)
                for text, group in zip(written, references)]
        assert values[name] == pytest.approx(sum(best) / 3)
    streams = [[group[n] if n < len(group) else None for group in references] for n in range(3)]
    assert 0 < values["bleu"] == pytest.approx(BLEU().corpus_score(written, streams).score)


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_written_once_per_distinct_prompt_and_have_all_its_references(beams):
    model, examples = tiny(), examples_of([("p\n", "one"), ("q\n", "two"), ("p\n", "three"),
                                           ("long prompt\n", "four")])
    written, references = texts.write_texts(model, examples, beams=beams)
    assert references == [["one", "three"], ["two"], ["four"]]
    prompts = [examples.prompts[i] for i in (0, 1, 3)]
    if beams == 1:
        alone = [model.generate([prompt], 6, temperature=0, eot=256)[0] for prompt in prompts]
    else:
        alone = [texts.beam_search(model, [prompt], 6, beams, length_penalty=0.9,
                                   no_repeat_ngram=4, eot=256)[0] for prompt in prompts]
    assert written == [" ".join(data.tokenizer(257).decode(ids).split()) for ids in alone]
    two = texts.write_texts(model, examples, prompts=2, beams=beams)
    assert two == (written[:2], references[:2])


# Runs: the command line.


def run(*flags, dataset="stdlib"):
    words = "--model small --block-size 64 --steps 6 --batch-size 2 --lr 1e-2 --log-every 2"
    flags += ("--dataset", dataset, "--device", "cpu")
    return train.run(train.parse([*words.split(), *flags]))


def save(folder, kind="gpt2", widths=(), scale=2.0):
    tiny(kind, widths, scale).float().save_pretrained(folder)


def main(*words):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["measure.py", *map(str, words)])
        cli.call(*measure.read_flags())


def evaluate(*words):
    """What measuring a run writes."""
    main(*words, "--examples", 8, "--device", "cpu")
    return json.loads(Path(words[0], "measure.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_every_method_are_measured_tabled_and_drawn(kind, capsys):
    save("small", kind, scale=1.0)
    metrics = {method: run("--method", method, "--out", f"out/{method}", *(
        [] if method == "none" else ["--leftover", "0.25"])) for method in prune.METHODS}
    folders = [f"out/{method}" for method in prune.METHODS]
    unmeasured = os.listdir("out/gum")
    dense = evaluate("out/none")
    assert set(dense["ratios"].values()) == {1.0}  # it is its own dense run
    for method, folder in zip(prune.METHODS, folders):
        found, model = evaluate(folder), GPT.from_pretrained(folder)
        values, result = found["values"], metrics[method]["result"]
        assert values["perplexity"] == pytest.approx(result["val_perplexity"], rel=1e-5)
        assert (values["leftover"], found["leftover_per_layer"]) == tuple(
            metrics[method][name] for name in ("leftover", "leftover_per_layer"))
        split = load_once("stdlib", "train", 257, 64, None, None)
        sensitivity, Cs, _ = measure.activation_statistics(model, split, first=8)
        assert values["sensitivity"] == pytest.approx(sensitivity)
        assert values["uniqueness"] == measure.redundancy(Cs)[0]["uniqueness"]
        widths = list(model.config.mlp_widths)
        assert found["widths"] == widths == [sum(counts) for counts in found["counts"]]
        printed = capsys.readouterr().out
        for name, ratio in found["ratios"].items():
            assert ratio == values[name] / dense["values"][name] and f"{ratio:.4g}" in printed
    first = Path("out/gum/measure.json").read_bytes()
    measure.measure.cache_clear()
    evaluate("out/gum")
    assert Path("out/gum/measure.json").read_bytes() == first
    assert sorted(os.listdir("out/gum")) == sorted([*unmeasured, "measure.json"])
    assert "| GUM |" in table_of(capsys, *folders) and len(drawn_by(folders)) == 6
    assert capsys.readouterr().out.count("figures/") == 6
    for _ in range(2):
        main("sample", "out/gum", "--prompt", "def f(x):", "--tokens", 20, "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]  # the same each time
    assert re.match("dense: out/none +[|] pruned: out/gum$", lines[0])
    assert lines[2].count("def f(x):") == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_with_only_a_model_is_measured(kind, capsys):
    for name, widths in ("shrunk", (5, 0)), ("full", (8, 4)), ("none", (0, 0)):
        save(name, kind, widths)
    found = evaluate("shrunk", "--dataset", "toysql", "--dense", "full")
    assert found["leftover_per_layer"] == [5 / 8, 0] and found["values"]["leftover"] == 5 / 12
    assert "--dense" not in capsys.readouterr().out
    assert 0 <= found["values"]["exact_match"] <= 1 and found["ratios"]["sensitivity"] > 0
    assert sum(found["counts"][0]) == 5 and found["counts"][1] == [0] * 10
    found = evaluate("shrunk", "--dataset", "stdlib", "--block-size", 32)
    assert found["leftover_per_layer"] is None and found["dense"] is None
    assert "name one with --dense" in capsys.readouterr().out
    found = evaluate("none", "--dataset", "stdlib", "--dense", "none")  # no number is null
    assert found["values"]["uniqueness"] is None and found["ratios"]["sensitivity"] is None
    assert found["values"]["sensitivity"] == 0 and found["ratios"]["perplexity"] == 1


def test_a_run_measured_on_other_texts_is_in_no_table_of_its_own(capsys):
    save("small")
    run("--method", "topv", "--out", "run")
    for words in ("--dataset", "toysql"), ("--block-size", 32):
        evaluate("run", *words)
        with pytest.raises(SystemExit):
            main("table", "run")
        line = capsys.readouterr().err.strip().rpartition("\n")[2]
        assert "run/measure.json is of " in line
        assert line.endswith("first python measure.py run, or remove run/measure.json")
    evaluate("run")
    assert "| Top_v |" in table_of(capsys, "run")
    run("--method", "topv", "--out", "more", "--seed", "1")
    main("more", "--examples", 4, "--device", "cpu")  # of which 8 were measured there
    assert "| Top_v |" in table_of(capsys, "run", "more")  # all of the same validation texts
    with pytest.raises(SystemExit):
        main("table", "run", "more", "--metric", "uniqueness")
    told = "--split train, --examples 4 or --split train, --examples 8: first python measure.py"
    assert f"uniqueness was measured with {told} run more" in capsys.readouterr().err


def test_a_pruned_model_is_no_dense_one(capsys):
    save("small")
    run("--method", "topv", "--out", "run")
    with pytest.raises(SystemExit):
        main("run", "--dense", "run", "--device", "cpu", "--examples", 4)
    assert "run is no dense model, but pruned" in capsys.readouterr().err


def test_a_dense_model_with_another_vocabulary_is_refused(capsys):
    save("small")
    run("--method", "topv", "--out", "run")
    GPT(GPTConfig(50257, 128, 16, 2, 2)).save_pretrained("other")
    with pytest.raises(SystemExit):
        main("run", "--dense", "other", "--device", "cpu", "--examples", 4)
    assert "other is no dense model of run" in capsys.readouterr().err
    assert not Path("run/measure.json").exists()


@pytest.mark.parametrize("dataset,columns", [
    ("samsum", ("dialogue", "summary")), ("e2e", ("meaning_representation", "human_reference"))])
def test_texts_are_scored_and_read_back_as_e2e_metrics_reads_them(dataset, columns):
    rows = [("name[Aromi]", "Aromi is here ."), ("name[Aromi]", "There is Aromi ."),
            ("name[Zizzi], food[French]", "Zizzi is French .")]
    references = ["Aromi is here .\nThere is Aromi .\n", "Zizzi is French .\n"]
    for split in ("train", "validation"):
        Path("data", split).mkdir(parents=True)
        lines = [json.dumps(dict(zip(columns, row))) + "\n" for row in rows]
        Path("data", split, "0.jsonl").write_text("".join(lines))
    save("small", scale=1.0)
    run("--data-path", "data", "--out", "run", dataset=dataset)
    values = evaluate("run", "--outputs")["values"]
    assert Path("run/references.txt").read_text() == "\n".join(references)
    outputs = Path("run/outputs.txt").read_text().split("\n")[:-1]
    scores = texts.text_scores(outputs, [group.splitlines() for group in references])
    assert scores.items() <= values.items() and "exact_match" not in values
    evaluate("run", "--outputs", "--generate", 1)
    assert Path("run/references.txt").read_text() == references[0]


def test_texts_are_written_with_as_many_beams_as_asked_for_and_of_the_validation_split():
    columns = "meaning_representation", "human_reference"
    for split, place in ("train", "Rome"), ("validation", "Oslo"):
        Path("places", split).mkdir(parents=True)
        rows = [dict(zip(columns, (f"near[{place}] {n}", f"Near {place} {n} .")))
                for n in range(4)]
        Path("places", split, "0.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    save("small")
    model, examples = GPT.from_pretrained("small"), data.load(
        "e2e", "validation", 257, 64, "places", None)
    for beams in 1, 3:
        main(*"small --dataset e2e --data-path places --block-size 64 --device cpu".split(),
             "--outputs", "--beams", beams)
        assert "Near Oslo 0 ." in Path("small/references.txt").read_text()
        wanted, _ = texts.write_texts(model, examples, beams=beams)
        assert Path("small/outputs.txt").read_text() == "\n".join(wanted) + "\n"


def test_exact_match_is_of_the_validation_split(monkeypatch):
    seen = []
    monkeypatch.setattr(measure, "exact_matches", lambda _, examples: seen.append(examples) or [1])
    save("small")
    main(*"small --dataset toysql --block-size 128 --examples 2 --device cpu".split())
    assert [len(examples.sizes) for examples in seen] == [1000]


# Made-up runs, side by side.


def fake(folder, method, leftover=0.5, seed=0, distill=False, value=None, real=None, v_t=None,
         **settings):
    """A finished run's folder with just what tables and figures read."""
    os.makedirs(folder)
    settings = dict(dataset="toysql", data_config=None, model="small", method=method,
                    distill=distill, leftover=leftover, seed=seed, lr=0.1,
                    dtype="float32") | settings
    widths = [round(20 * leftover)] * 2
    log = Path(folder, "log.jsonl")
    log.write_text("".join(json.dumps(dict(
        step=step, loss=9 / step, v_t=v_t or leftover, leftover=leftover, widths=widths)) + "\n"
        for step in range(1, 30)))
    files = dict(metrics=dict(
        settings=settings, log=runs.log_state(log.read_bytes()), model=seed, started=seed,
        data={split: dict(sha256=settings["dataset"] + split, source="there")
              for split in ("train", "validation")},
        block_size=64,
        start=dict(widths=[20, 20]), result=dict(val_perplexity=5.0 + seed),
        leftover=real or leftover, leftover_per_layer=[leftover] * 2))
    if value is not None:
        values = dict(exact_match=value, perplexity=3.0, loss=1 - value, sensitivity=value,
                      uniqueness=0.9, span_uniqueness=None, leftover=leftover)
        counts = [[0] * 5 + [width] + [0] * 4 for width in widths]
        on = dict(block_size=64, split="train", examples=512, generate=0, beams=1)
        files["measure"] = dict(model=seed, values=values, ratios=values, counts=counts, on=on,
                                data=files["metrics"]["data"])
    for name, content in files.items():
        runs.write_json(Path(folder, f"{name}.json"), content)


def test_the_dense_run_is_of_the_same_data_model_and_seed_and_most_alike():
    save("small")
    fake("out/gum", "gum", model=os.path.abspath("small"))
    mine = runs.read_run("out/gum").settings
    others = [dict(seed=1), dict(dataset="stdlib"), dict(data_config="b"), dict(model="tiny"),
              dict(distill=True), dict(method="topv")]
    for n, settings in enumerate(others):
        fake(f"out/{n}", **dict(method="none") | settings)
    assert runs.find_dense(["out", "nowhere"], mine) is None
    for name, lr in ("another-lr", 0.2), ("same", 0.1), ("then", 0.1):
        fake(f"out/{name}", "none", lr=lr)
        expected = "another-lr" if name == "another-lr" else "same"
        assert runs.find_dense(["out", Path("out")], mine).path == Path("out", expected)


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


def table_of(capsys, *words):
    main("table", *words)
    return capsys.readouterr().out.replace(r"$\pm$", "±").replace(r"\_", "_")


def test_a_table_has_means_and_sample_standard_deviations_over_seeds(fakes, capsys):
    header, *rows = csv.reader(table_of(capsys, *fakes, "--format", "csv").splitlines())
    assert header == ["toysql, small: exact match", "1", "0.25", "0.1"]
    table = {row[0]: dict(zip(header[1:], row[1:])) for row in rows}
    assert list(table) == ["Dense", "Top_v", "Soft movement", "GUM", "Top_v, distilled",
                           "GUM, distilled"]
    for (method, leftover), values in EXACT.items():
        for label, scale in ("", 1), (", distilled", 0.5):
            text = table[prune.METHODS[method].name + label][str(leftover)]
            expected = [scale * statistics.mean(values), len(values)]
            if len(values) > 1:
                expected.insert(1, scale * statistics.stdev(values))
            numbers = [float(number) for number in re.findall(r"[\d.]+", text)]
            assert numbers == pytest.approx(expected, rel=0.05)
    assert table["Top_v"]["0.1"] == "-"
    assert "0.13" in table["Soft movement"]["0.1"]  # it left more than it was asked to
    for form, between in ("markdown", " | "), ("latex", " & "):
        text = table_of(capsys, *fakes, "--format", form)
        assert all(between.join(row) in text for row in (header, *rows))


def test_unmeasured_runs_show_their_perplexity_and_ablations_have_rows_of_their_own(capsys):
    fake("a", "gum", lambda_gum=10.0, accumulate=1)
    fake("b", "gum", lambda_gum=10.0, accumulate=2, seed=1)
    fake("c", "gum", lambda_gum=0.0)
    assert table_of(capsys, "a", "b") == ("| toysql, small: perplexity | 0.5 |\n| --- | --- |\n"
                                          "| GUM | 5.5 ± 0.71 (2) |\n\n")
    assert ("| GUM, lambda_gum 10.0 | 5.5 ± 0.71 (2) |\n| GUM, lambda_gum 0.0 | 5 (1) |\n"
            in table_of(capsys, "a", "b", "c"))


def test_a_run_made_again_in_a_way_that_changes_no_result_is_no_repetition(capsys):
    fake("a", "gum")
    fake("b", "gum", accumulate=2, device="cuda")
    for other, says in (("b", "differ only in device, accumulate, which has no row of its own"),
                        ("./a", "are the same run twice")):
        with pytest.raises(SystemExit):
            main("table", "a", other)
        assert f"a and {Path(other)} {says}: name one" in capsys.readouterr().err


def test_perplexities_of_several_precisions_are_not_compared(capsys):
    fake("a", "gum", dtype="bfloat16")
    fake("b", "gum", seed=1, dtype="bfloat16", value=0.5)  # measured, and so in float32
    assert "| GUM | 5 (1) |" in table_of(capsys, "a")
    with pytest.raises(SystemExit):
        main("table", "a", "b", "--metric", "perplexity")
    assert ("perplexity was measured in bfloat16 or float32: first python measure.py a b"
            in capsys.readouterr().err)


def student(t, n):
    """The share of Student's distribution of n degrees of freedom within ±t, by summing it up."""
    x = torch.linspace(-t, t, 200_001, dtype=torch.float64)
    density = math.gamma((n + 1) / 2) / math.gamma(n / 2) / math.sqrt(n * math.pi)
    return torch.trapezoid(density * (1 + x**2 / n) ** (-(n + 1) / 2), x).item()


@pytest.mark.parametrize("n", [*range(2, 25), 60])
def test_a_paired_differences_interval_is_students(n):
    values = [0.1 * (i * i % 7) for i in range(n)]
    others = [1 + 0.05 * (i % 3) for i in range(n)]
    differences = [a - b for a, b in zip(values, others)]
    mean, half = compare.paired(values, others)
    assert mean == pytest.approx(sum(differences) / n)
    t = half * math.sqrt(n) / statistics.stdev(differences)
    assert student(t, n - 1) == pytest.approx(0.95, abs=3e-4)


def test_a_table_shows_differences_to_a_row_seed_by_seed(fakes, capsys):
    text = table_of(capsys, *fakes, "--against", "Top_v", "--format", "csv")
    header, *rows = csv.reader(text.splitlines())
    assert header[0] == "toysql, small: exact match, less Top_v's"
    table = {row[0]: dict(zip(header[1:], row[1:])) for row in rows}
    assert "Top_v" not in table and table["Dense"] == {"1": "-", "0.25": "-", "0.1": "-"}
    assert table["GUM"]["0.25"] == "+0.375 (1)"  # of three seeds, the one that Top_v has too
    text = table_of(capsys, *fakes, "--against", "GUM", "--format", "csv")
    assert "Top_v,-,-0.375 (1),-" in text
    text = table_of(capsys, *fakes, "--against", "GUM, distilled", "--format", "csv")
    # 0.5, 0.75, 0.7 less half of each: 0.325 on average, its standard error 0.0382; times 4.303.
    assert "GUM,-,+0.325 ± 0.16 (3)," in text
    with pytest.raises(SystemExit):
        main("table", *fakes, "--against", "Topv")
    assert "no row is Topv: they are Dense; Top_v; " in capsys.readouterr().err


def drawn_by(folders):
    """The figures that `folders` give: {name: (panels, styles)}."""
    seen = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compare, "draw", lambda path, *figure, **how: seen.update(
            {path.name: figure}))
        main("figures", *folders)
    return {name.removesuffix("-toysql-small"): figure for name, figure in seen.items()}


def test_figures_show_the_runs_and_are_not_blank(fakes):
    from matplotlib import image

    figures, left = drawn_by(fakes), "share of neurons left"
    assert figures.keys() == {"loss", "redundancy-ratios", "redundancy-values", "layers", *(
        f"{kind}-{which}" for kind in ("similarity", "training")
        for which in ("0.25", "0.1", "0.25-distilled", "0.1-distilled"))}
    without, taught = (figures["redundancy-values"][0][
        how + " distillation", "leftover wanted (share of neurons)", "sensitivity (nats)"]
        for how in ("without", "with"))
    assert sorted((*xs, *ys) for curve, xs, ys in without if curve == "GUM") == [
        (0.1, 0.25), (0.1, 0.5), (0.25, 0.5), (0.25, 0.7), (0.25, 0.75)]
    assert [(*xs, *ys) for curve, xs, ys in taught if curve == "Dense"] == [(1.0, 0.9)] * 2
    losses = figures["loss"][0]["without distillation", "leftover wanted (share of neurons)",
                                "validation loss (nats/token)"]
    assert sorted((*xs, *ys) for curve, xs, ys in losses if curve == "GUM") == [
        (0.1, 0.5), (0.1, 0.75), (0.25, 0.25), (0.25, pytest.approx(0.3)), (0.25, 0.5)]
    layers = figures["layers"][0]["leftover 0.1, with distillation", "layer", left]
    assert [(curve, *xs, *ys) for curve, xs, ys in layers] == [("GUM", 1, 2, 0.1, 0.1)] * 2
    counted = figures["similarity-0.25"][0]["layer 2", "largest |cos| to another neuron",
                                            "share of neurons"]
    assert {curve for curve, *_ in counted} == {"Dense", "Top_v", "GUM"}
    assert all(ys == [0] * 5 + [1] + [0] * 4 and xs[5] == 0.55 for _, xs, ys in counted)
    of_gum = figures["training-0.25"][0]["GUM", "step", left]
    assert {curve for curve, *_ in of_gum} == {"layer 1", "layer 2"}
    assert all(xs == [*range(1, 30)] and ys == [5 / 20] * 29 for _, xs, ys in of_gum)
    main("figures", *fakes[:1], *(folder for folder in fakes if "none" in folder), "--out", "drawn")
    names = ["layers", "loss", "redundancy-ratios", "redundancy-values", "similarity-0.1",
             "training-0.1"]
    assert sorted(os.listdir("drawn")) == [f"{name}-toysql-small.{form}" for name in names
                                           for form in ("pdf", "png")]
    for path in Path("drawn").glob("*.png"):
        pixels = image.imread(path)
        dark = (pixels[..., :3].min(2) < 0.9).mean()
        assert pixels.shape[1] == 1800 and 0.01 < dark < 0.5, path


def test_each_panel_has_the_dense_runs_of_its_own_kind_and_a_schedule_that_all_its_runs_have():
    fake("plain", "none", 1.0, value=0.8)
    fake("taught", "none", 1.0, distill=True, value=0.9)
    fake("gum", "gum", distill=True, value=0.5)
    fake("obs", "obs", distill=True, value=0.6)
    fake("own", "topv", value=0.4)
    panel = "leftover wanted (share of neurons)", "validation loss (nats/token)"
    figures = drawn_by(["plain", "taught", "gum", "obs", "own"])
    for how, dense in ("without", 0.2), ("with", 0.1):
        curves = figures["loss"][0][f"{how} distillation", *panel]
        found, = (ys for curve, _, ys in curves if curve.startswith("Dense"))
        assert found == [pytest.approx(dense)]
    left = "all layers", "step", "share of neurons left"
    assert [curve for curve, *_ in figures["training-0.5-distilled"][0][left]].count("v_t") == 2
    fake("early", "topv", distill=True, value=0.5, v_t=0.4)
    figures = drawn_by(["plain", "taught", "gum", "obs", "early"])
    assert "v_t" not in [curve for curve, *_ in figures["training-0.5-distilled"][0][left]]
    figures = drawn_by(["plain", "taught"])
    assert {"similarity-1", "similarity-1-distilled"} <= figures.keys()


def test_a_method_is_drawn_by_a_full_line_and_its_ablations_by_others():
    fake("out/gum", "gum", value=0.5)
    fake("out/ablation", "gum", value=0.5, scope="layer")
    one, = compare.read_runs(["out/gum"]).values()
    assert compare.styles_of(one)["GUM"]["ls"] == "-"
    two, = compare.read_runs(["out/gum", "out/ablation"]).values()
    assert [compare.styles_of(two)[run.label]["ls"] for run in two] == ["-", "--"]


def test_every_method_has_its_own_look_also_a_new_one(fakes, monkeypatch, capsys):
    for name, value in ("mine", 0.6), ("yours", 0.7):
        monkeypatch.setitem(prune.METHODS, name, prune.Method(f"Method {name}", "a new one"))
        fake(f"out/{name}", name, 0.25, value=value)
        fakes.append(f"out/{name}")
    assert "| Method mine | - | 0.6 (1) | - |" in table_of(capsys, *fakes)
    figures, fewer = drawn_by(fakes), drawn_by(name for name in fakes if "soft" not in name)
    names, looks = {method.name for method in prune.METHODS.values()}, {}
    for _, styles in (*figures.values(), *fewer.values()):
        for name in names & styles.keys():
            looks.setdefault(name, set()).add((styles[name]["color"], styles[name]["marker"]))
    assert looks.keys() == names - {"Magnitude", "Random", "OBS"}
    colours, markers = (set(each) for each in zip(*(look for [look] in looks.values())))
    assert len(colours) == len(markers) == 6
    panels, styles = figures["training-0.25"]
    assert any("Method mine" in line for lines in panels.values() for line in lines)
    compare.draw(Path("drawn"), panels, styles)


# Mistakes.


@pytest.mark.parametrize("words,says", [
    ("sample small --prompt x --dense unfinished", "unfinished finished --resume"), ("", "RUN"),
    ("small --dataset stdlib --device foo", "--device foo cpu"), ("sample small", "--prompt"),
    ("small --dataset stdlib --examples -1", "--examples from"), ("small", "small --dataset"),
    ("small --dataset stdlib --outputs", "--outputs stdlib"), ("figures fake", "measure.py fake"),
    ("small --dataset e2e --data-path nothing", "nothing"), ("table small", "small metrics.json"),
    ("small --dataset stdlib --block-size 999", "999 128"), ("sample small --prompt=", "prompt"),
    ("small --dataset stdlib --dense nowhere", "nowhere"), ("table fake --beams 3", "--beams"),
    ("small --dataset stdlib --beams 0", "--beams above"), ("table unknown", "unknown mine"),
    ("table fake --metric bleu", "bleu measure.py fake"),
    ("full", "full neither config.json"), ("small --dataset wiki", "wiki stdlib"),
    ("damaged", "damaged/metrics.json damaged remove"), ("nowhere", "nowhere"),
    ("table fake --metric speed", "speed perplexity"),
    ("table cut", "cut/measure.json damaged remove"),
    ("empty --dataset stdlib", "empty config.json"),
    ("sample wild --prompt x --device cpu", "logits"),
    ("unfinished", "unfinished finished --resume"),
    ("tabel fake", "tabel evaluate, table, figures, sample")])
def test_a_mistake_gets_one_line_and_status_2(words, says, capsys):
    save("small")
    fake("fake", "gum")
    fake("unknown", "mine")
    for name, content in (("empty/a", ""), ("damaged/metrics", "{half"), ("cut/measure", "{}")):
        os.mkdir(Path(name).parent)
        Path(f"{name}.json").write_text(content)
    wild = GPT.from_pretrained("small")
    wild.wte.weight.data.fill_(1e34)  # finite, but no product of them
    wild.ln_f.weight.data.fill_(1e37)
    wild.save_pretrained("wild")
    for name in "unfinished", "full":
        os.mkdir(name)
    runs.write_json(Path("unfinished/settings.json"), dict(method="gum"))
    assert pytest.raises(SystemExit, main, *words.split()).value.code == 2
    *before, line = capsys.readouterr().err.strip().splitlines()
    assert not before or before[0].startswith("reading") and len(before) == 1
    assert re.match(r"measure.py \w+: error: ", line)
    assert all(word in line for word in says.split())
    assert list(Path().glob("*/measure.json")) == [Path("cut/measure.json")]


@pytest.mark.parametrize("words,usage,says", [
    ("--help", "evaluate", "measure.py [evaluate] out/RUN"), ("figures --help", "figures", "--out"),
    ("evaluate --help", "evaluate", "--split"), ("table --help", "table", "--metric"),
    ("sample --help", "sample", "--prompt"), ("export --help", "export", "--multiple-of")])
def test_help_is_no_mistake(words, usage, says, capsys):
    assert pytest.raises(SystemExit, main, *words.split()).value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: measure.py {usage} [-h]") and says in out
    assert (" RUN [RUN ...]\n" in out) == (usage != "export")


LOOK = """import sys
from pathlib import Path
from results import cli

sys.argv = ["measure.py", "table", "run"]
cli.look("measure.py", "read_flags")
ours = {"results", *(file.stem for file in Path().glob("*.py"))}
print([name for name in sys.modules if name.split(".")[0] in ours])
"""


def test_what_was_imported_with_a_stand_in_for_torch_is_imported_anew():
    done = subprocess.run([sys.executable, "-c", LOOK], cwd=Path(measure.__file__).parent,
                          text=True, stdout=subprocess.PIPE, check=True)
    assert done.stdout == "['results.cli']\n"
