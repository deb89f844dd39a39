"""Every measure against a computation of its own; then what is written, tabled, drawn, and said to mistakes."""

import csv
import json
import math
import os
import re
import statistics
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import measure
import prune
import train
from model import GPT, GPTConfig

SHARED = Path(__file__).parents[2] / "shared"
KINDS = {"gpt2": {}, "gpt_neo": dict(model_type="gpt_neo", qkv_bias=False, attn_scaled=False, windows=(None, 8))}
TEXTS = [("a b", "x y z"), ("c", "longer than the others, this one"), ("d e f", "x"), ("g", "yy"), ("hhh", "z z z")]


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


def tiny(kind="gpt2", seed=0, widths=(24, 17), scale=2.0, vocab_size=257):
    """A GPT whose weights are large enough for its neurons to differ; two of a layer are alike."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=vocab_size, n_positions=128, n_embd=16, n_layer=2, n_head=2, mlp_widths=widths,
                          **KINDS[kind]))
    for name, parameter in model.named_parameters():
        if "ln_" not in name:
            parameter.data = parameter.data * scale + 0.1 * torch.randn_like(parameter) * name.endswith("bias")
            if ".mlp.c_fc." in name and len(parameter) > 5:
                parameter.data[5] = parameter.data[2] * 1.1
    return model.eval()


def examples_of(pairs=TEXTS, block_size=64):
    return data.Examples(pairs, block_size, data.tokenizer(257))


def blocks_of(tokens=150, block_size=32):
    ids = torch.randint(256, (tokens,), generator=torch.Generator().manual_seed(3))
    return data.Blocks(ids.numpy().astype("uint16"), block_size, 256)


# Sensitivity, uniqueness, span uniqueness: the explicit way, in float64, one sequence and one neuron at a time.


def explicit(model, idx, targets):
    """The model written out, in float64, for one sequence idx [T]: (h [T, m] of each layer, d loss / d h of each)."""
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    config, T = model.config, len(idx)
    x, held = w["wte.weight"][idx] + w["wpe.weight"][:T], []

    def norm(x, name):
        centred = x - x.mean(1, keepdim=True)
        normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return normed * w[name + ".weight"] + w[name + ".bias"]

    i, j = torch.arange(T)[:, None], torch.arange(T)
    for layer in range(config.n_layer):
        at, window = f"h.{layer}.", config.windows[layer] or T
        y, size, out = norm(x, at + "ln_1"), config.n_embd // config.n_head, []
        qkv = y @ w[at + "attn.c_attn.weight"].T + w.get(at + "attn.c_attn.bias", 0)
        q, k, v = qkv.split(config.n_embd, 1)
        for head in range(config.n_head):
            one = slice(head * size, (head + 1) * size)
            logits = q[:, one] @ k[:, one].T / (size**0.5 if config.attn_scaled else 1)
            out.append(logits.masked_fill((j > i) | (i - j >= window), -torch.inf).softmax(1) @ v[:, one])
        x = x + torch.cat(out, 1) @ w[at + "attn.c_proj.weight"].T + w[at + "attn.c_proj.bias"]
        z = norm(x, at + "ln_2") @ w[at + "mlp.c_fc.weight"].T + w[at + "mlp.c_fc.bias"]
        h = 0.5 * z * (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3)))  # [T, m]
        held.append(h if h.requires_grad else h.requires_grad_())
        x = x + held[-1] @ w[at + "mlp.c_proj.weight"].T + w[at + "mlp.c_proj.bias"]
    log_probs = (norm(x, "ln_f") @ w["wte.weight"].T).log_softmax(1)  # [T, V]
    asked = [t for t in range(T) if targets[t] != -100]
    loss = -sum(log_probs[t, targets[t]] for t in asked) / len(asked)
    return [h.detach() for h in held], torch.autograd.grad(loss, held)


@cache
def brute_force(kind, which, widths=(24, 17)):
    """(sensitivity, C of each layer as nested sums) of the tiny model of `kind` on the examples `which`."""
    model, examples = tiny(kind, widths=widths), examples_of() if which == "examples" else blocks_of()
    total, Cs = 0.0, [torch.zeros(m, m, dtype=torch.float64) for m in widths]
    for number in range(len(examples)):
        idx, targets, real = (tensor[0] for tensor in examples.batch([number]))
        assert real.all() or which == "blocks"
        length = int(real.sum())  # the last block is padded
        for C, h, gradient in zip(Cs, *explicit(model, idx[:length], targets[:length])):
            for i in range(h.size(1)):
                total += abs(float(sum(h[t, i] * gradient[t, i] for t in range(length))))
            C += h.T @ h
    return total / len(examples), Cs


def uniqueness_by_hand(Cs):
    duplicates = neurons = 0
    for C in Cs:
        m = len(C)
        neurons += m
        for i in range(m):
            later = [j for j in range(i + 1, m) if C[i, i] > 0 and C[j, j] > 0]
            cosines = [abs(C[i, j]) / (C[i, i] * C[j, j]).sqrt() for j in later]
            duplicates += any(cosine >= 0.8 for cosine in cosines)
    return 1 - duplicates / neurons


def span_by_hand(C, ridge=1e-6):
    """The residual of each neuron's regression on the others, solved one by one (with the same ridge)."""
    A = C + ridge * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    shares = []
    for i in range(len(A)):
        others = [j for j in range(len(A)) if j != i]
        b, B = A[others, i], A[others][:, others]
        shares.append(float((A[i, i] - b @ torch.linalg.solve(B, b)) / A[i, i]))
    return shares


@pytest.mark.parametrize("which", ["examples", "blocks"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype,rel", [(torch.float32, 1e-6), (torch.float64, 1e-9)])
def test_redundancy_equals_brute_force(kind, which, dtype, rel):
    examples = examples_of() if which == "examples" else blocks_of()
    sensitivity, Cs = measure.observe(tiny(kind).to(dtype), examples)
    expected, expected_Cs = brute_force(kind, which)
    assert sensitivity == pytest.approx(expected, rel=rel)
    for C, expected_C in zip(Cs, expected_Cs):
        assert (C - expected_C).abs().max() <= rel * expected_C.abs().max()
    values, counts = measure.redundancy(Cs)
    assert 0 < values["uniqueness"] < 1
    assert values["uniqueness"] == pytest.approx(uniqueness_by_hand(expected_Cs), rel=rel)
    shares = [share for C in expected_Cs for share in span_by_hand(C)]
    assert values["span_uniqueness"] == pytest.approx(statistics.fmean(shares), rel=rel)
    assert [sum(of_layer) for of_layer in counts] == [24, 17]


@pytest.mark.parametrize("kind", KINDS)
def test_redundancy_does_not_depend_on_batches_order_or_padding(kind):
    model = tiny(kind)
    reference, Cs = measure.observe(model, examples_of())
    unique = measure.redundancy(Cs)[0]
    for pairs, tokens in ((TEXTS, 1), (TEXTS, 128), (TEXTS[::-1], 8192), (TEXTS[2:] + TEXTS[:2], 200)):
        shuffled = examples_of(pairs)
        shuffled.by_length = lambda n=len(pairs): list(range(n))  # as they come: very different lengths in a batch
        found, Cs = measure.observe(model, shuffled, tokens)
        assert found == pytest.approx(reference, rel=1e-6)
        for name, value in measure.redundancy(Cs)[0].items():
            assert value == pytest.approx(unique[name], rel=1e-6)


def test_only_the_first_sequences_count_when_asked():
    model = tiny()
    found, Cs = measure.observe(model, examples_of(), first=2)
    expected, expected_Cs = measure.observe(model, examples_of(TEXTS[:2]))
    assert found == pytest.approx(expected, rel=1e-6)
    assert all(torch.allclose(C, expected_C, rtol=1e-6) for C, expected_C in zip(Cs, expected_Cs))


def gram_of(h):
    return h.double().T @ h.double()


def test_k_copies_are_k_minus_1_duplicates_and_an_opposite_one_counts():
    h = torch.linalg.qr(torch.randn(50, 10, generator=torch.Generator().manual_seed(0)))[0]  # orthonormal: all unique
    assert measure.redundancy([gram_of(h)])[0]["uniqueness"] == 1
    copies = torch.cat([h, 2 * h[:, :1], 0.5 * h[:, :1]], 1)  # 3 copies of neuron 0
    assert measure.redundancy([gram_of(copies)])[0]["uniqueness"] == pytest.approx(1 - 2 / 12)
    opposite = torch.cat([-3 * h[:, 4:5], h], 1)
    assert measure.redundancy([gram_of(opposite), gram_of(h)])[0]["uniqueness"] == pytest.approx(1 - 1 / 21)


@pytest.mark.parametrize("cosine,unique", [(0.79, 1), (0.81, 0.5), (-0.81, 0.5)])
def test_a_duplicate_begins_at_08(cosine, unique):
    C = torch.tensor([[4.0, 6 * cosine], [6 * cosine, 9.0]], dtype=torch.float64)
    assert measure.redundancy([C])[0]["uniqueness"] == unique


def test_copies_planted_in_a_model_are_found():
    model = tiny(widths=(24, 20))
    before = measure.redundancy(measure.observe(model, blocks_of())[1][:1])[0]["uniqueness"]
    mlp = model.h[0].mlp
    unlike = measure.similarity(measure.observe(model, blocks_of())[1][0]).amax(1).argmin().item()
    wider = tiny(widths=(27, 20))
    others = {name: value for name, value in model.state_dict().items() if ".0.mlp" not in name}
    wider.load_state_dict(others, strict=False)
    rows = [*range(24), *[unlike] * 3]
    c_fc, c_proj = wider.h[0].mlp.c_fc, wider.h[0].mlp.c_proj
    c_fc.weight.data, c_fc.bias.data = mlp.c_fc.weight.data[rows], mlp.c_fc.bias.data[rows]
    c_proj.weight.data, c_proj.bias.data = mlp.c_proj.weight.data[:, rows], mlp.c_proj.bias.data
    after = measure.redundancy(measure.observe(wider, blocks_of())[1][:1])[0]["uniqueness"]
    assert 27 * (1 - after) == pytest.approx(24 * (1 - before) + 3)


def test_a_neuron_that_is_the_sum_of_two_others_is_not_unique_though_its_cosines_are_small():
    h = torch.linalg.qr(torch.randn(60, 8, generator=torch.Generator().manual_seed(1)))[0]
    C = gram_of(torch.cat([h, h[:, :1] + h[:, 1:2]], 1))
    assert measure.similarity(C).max() < 0.8 and measure.redundancy([C])[0]["uniqueness"] == 1
    shares = measure.span_residuals(C)
    assert shares[[0, 1, 8]].max() < 1e-4 and shares[2:8].min() > 0.99


def test_silent_neurons_are_like_nothing_and_in_every_span():
    h = torch.linalg.qr(torch.randn(30, 4, generator=torch.Generator().manual_seed(2)))[0]
    C = gram_of(torch.cat([h, torch.zeros(30, 2)], 1))
    assert measure.redundancy([C])[0]["uniqueness"] == 1
    assert measure.span_residuals(C).tolist() == pytest.approx([1, 1, 1, 1, 0, 0])
    assert measure.span_residuals(torch.zeros(3, 3, dtype=torch.float64)).tolist() == [0, 0, 0]


def test_more_neurons_than_tokens_are_in_each_others_span():
    assert measure.span_residuals(gram_of(torch.randn(10, 30))).max() < 1e-3


def test_layers_without_neurons():
    sensitivity, Cs = measure.observe(tiny(widths=(5, 0)), blocks_of())
    assert sensitivity > 0 and measure.redundancy(Cs)[1][1] == [0] * 10
    sensitivity, Cs = measure.observe(tiny(widths=(0, 0)), blocks_of())
    assert sensitivity == 0 and measure.redundancy(Cs)[0] == dict(uniqueness=None, span_uniqueness=None)


def test_the_counts_are_of_the_largest_similarity():
    C = gram_of(torch.randn(40, 12, generator=torch.Generator().manual_seed(4)))
    cosines = [max(abs(C[i, j]) / (C[i, i] * C[j, j]).sqrt() for j in range(12) if j != i) for i in range(12)]
    assert measure.redundancy([C])[1][0] == [sum(n / 10 <= c < (n + 1) / 10 for c in cosines) for n in range(10)]


# Exact match and texts.


def assert_teacher_forcing_is_greedy_decoding(model, examples, outcomes):
    matches = dict(zip(examples.by_length(), measure.exact_matches(model, examples)))
    longest = max(map(len, examples.targets))
    new = model.generate(examples.prompts, longest, temperature=0, eot=examples.eot)
    for i, ids in enumerate(new):
        assert matches[i] == (ids == examples.targets[i][:-1] and len(examples.targets[i]) <= longest), i
    assert set(matches.values()) == outcomes


def planted(pairs, block_size, vocab_size, steps=60):
    """Examples that a small model, briefly trained on some, gets partly right: it learns how the answer begins."""
    model = tiny(widths=(64, 64), scale=1.0, vocab_size=vocab_size)
    tok = data.tokenizer(vocab_size)
    examples = data.Examples(pairs, block_size, tok)
    first = statistics.mode(ids[0] for ids in examples.targets)
    for i, ids in enumerate(examples.targets):  # a target it can learn: one token, not for all the same
        examples.targets[i] = [first if i % 3 else ids[-2], examples.eot]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        idx, targets, _ = examples.batch([(8 * step + n) % len(examples) for n in range(8)])
        model(idx, targets)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, examples


def test_exact_match_by_teacher_forcing_is_greedy_decodings_on_toysql():
    assert_teacher_forcing_is_greedy_decoding(*planted(data.toysql("validation")[:200], 128, 257), {True, False})


def test_exact_match_by_teacher_forcing_is_greedy_decodings_on_wikisql(monkeypatch):
    folder, vocabulary = SHARED / "hub" / "Salesforce" / "wikisql", SHARED / "tiktoken_cache"
    if not (folder.is_dir() and vocabulary.is_dir()):
        pytest.skip("no local copy of WikiSQL and of the GPT-2 vocabulary in ../shared")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(vocabulary))
    pairs = data.hub_pairs("wikisql", "validation", str(folder), None)[:200]
    assert_teacher_forcing_is_greedy_decoding(*planted(pairs, 128, 50257, steps=20), {True, False})


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
    streams = [[references[n] if n < len(references) else None for references in REFERENCES] for n in range(3)]
    assert values["bleu"] == pytest.approx(BLEU().corpus_score(WRITTEN, streams).score)
    assert 0 < values["bleu"] < 100


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_written_once_per_distinct_prompt_and_have_all_its_references(beams):
    examples = examples_of([("p\n", "one"), ("q\n", "two"), ("p\n", "three"), ("long prompt\n", "four")])
    written, references = measure.write_texts(model := tiny(), examples, beams=beams)
    assert references == [["one", "three"], ["two"], ["four"]]
    alone = [model.generate([examples.prompts[i]], 6, temperature=0, eot=256, beams=beams, length_penalty=0.9,
                            no_repeat_ngram=4 * (beams > 1))[0] for i in (0, 1, 3)]
    assert written == [" ".join(data.tokenizer(257).decode(ids).split()) for ids in alone]
    assert measure.write_texts(model, examples, prompts=2, beams=beams) == (written[:2], references[:2])


# Runs: the command line.


def run(*flags, model="small", dataset="stdlib", steps=6):
    common = ["--model", model, "--dataset", dataset, "--steps", steps, "--batch-size", 2, "--block-size", 64,
              "--lr", 1e-2, "--log-every", 2, "--device", "cpu"]
    return train.run(train.parse([str(word) for word in [*common, *flags]]))


def start(kind="gpt2", vocab_size=257):
    tiny(kind, widths=(), scale=1.0, vocab_size=vocab_size).save_pretrained("small")


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
@pytest.mark.parametrize("method", ["none", "magnitude", "random", "topv", "soft", "gum"])
def test_a_run_of_every_method_is_measured(method, kind):
    start(kind)
    metrics = run("--method", method, *([] if method == "none" else ["--leftover", 0.25]), "--out", "out/run")
    evaluate("out/run")
    found = measured("out/run")
    assert found["values"]["perplexity"] == pytest.approx(metrics["result"]["val_perplexity"], rel=1e-5)
    assert found["values"]["leftover"] == metrics["leftover"]
    assert found["leftover_per_layer"] == metrics["leftover_per_layer"]
    model = GPT.from_pretrained("out/run")
    sensitivity, Cs = measure.observe(model, load_once("stdlib", "train", 257, 64, None, None), first=8)
    assert found["values"]["sensitivity"] == pytest.approx(sensitivity)
    assert found["values"]["uniqueness"] == measure.redundancy(Cs)[0]["uniqueness"]
    assert found["widths"] == list(model.config.mlp_widths) == [sum(counts) for counts in found["counts"]]
    if method == "none":  # it is its own dense run
        assert set(found["ratios"].values()) == {1.0}
    else:
        assert found["dense"] is None and set(found["ratios"].values()) == {None}


def test_ratios_are_to_the_dense_run_beside(capsys):
    start()
    run("--method", "none", "--seed", 1, "--out", "out/other-seed")
    run("--method", "none", "--out", "out/other-steps", steps=4)
    run("--method", "none", "--out", "out/same")
    run("--method", "gum", "--leftover", 0.25, "--out", "out/gum")
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
    tiny(kind, widths=(5, 0)).save_pretrained("shrunk")
    tiny(kind, widths=(8, 4)).save_pretrained("full")
    evaluate("shrunk", "--dataset", "toysql", "--dense", "full")
    found = measured("shrunk")
    assert found["leftover_per_layer"] == [5 / 8, 0] and found["values"]["leftover"] == 5 / 12
    assert 0 <= found["values"]["exact_match"] <= 1 and found["ratios"]["sensitivity"] > 0
    evaluate("shrunk", "--dataset", "stdlib", "--block-size", 32)
    assert measured("shrunk")["leftover_per_layer"] is None


def test_numbers_that_do_not_exist_are_null():
    tiny(widths=(0, 0)).save_pretrained("empty")
    evaluate("empty", "--dataset", "stdlib", "--dense", "empty")
    found = measured("empty")
    assert found["values"]["uniqueness"] is None and found["ratios"]["sensitivity"] is None
    assert found["values"]["sensitivity"] == 0 and found["ratios"]["perplexity"] == 1


def test_outputs_read_back_as_e2e_metrics_reads_them():
    start()
    run("--method", "none", "--out", "out/run", dataset="toysql", *["--block-size", 128])
    evaluate("out/run", "--outputs", "--generate", 7)
    validation = load_once("toysql", "validation", 257, 128, None, None)
    groups = [group.splitlines() for group in Path("out/run/references.txt").read_text().split("\n\n")]
    outputs = Path("out/run/outputs.txt").read_text().split("\n")[:-1]
    assert groups == [validation.references[i] for i in validation.distinct()[:7]] and len(outputs) == 7
    values = measured("out/run")["values"]
    assert values["bleu"] == pytest.approx(measure.text_scores(outputs, groups)["bleu"])
    assert all("\n" not in text for text in outputs)


def local_e2e(folder):
    from datasets import Dataset

    rows = [("name[Aromi]", "Aromi is here ."), ("name[Aromi]", "There is Aromi ."),
            ("name[Zizzi], food[French]", "Zizzi is French .")]
    for split in ("train", "validation"):
        (Path(folder) / split).mkdir(parents=True)
        meanings, references = zip(*rows)
        table = Dataset.from_dict({"meaning_representation": meanings, "human_reference": references})
        table.to_parquet(Path(folder) / split / "0000.parquet")


def test_e2e_is_measured_by_bleu_and_rouge_with_several_references():
    start()
    local_e2e("data/default")
    Path("data/README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
                                      "    path: default/train/*.parquet\n  - split: validation\n"
                                      "    path: default/validation/*.parquet\n---\n")
    run("--method", "none", "--data-path", "data", "--out", "out/run", dataset="e2e")
    evaluate("out/run", "--outputs")
    assert Path("out/run/references.txt").read_text() == "Aromi is here .\nThere is Aromi .\n\nZizzi is French .\n"
    values = measured("out/run")["values"]
    assert values["bleu"] >= 0 and {"rouge1", "rouge2", "rougeL"} <= values.keys() and "exact_match" not in values


# Tables and figures, of made-up runs.


CHATS = [("Ann: Lunch at noon?\nBob: Make it one, please.", "Ann and Bob will have lunch at one."),
         ("Eve: Where are my keys?\nTom: On the fridge!", "Eve's keys are on the fridge."),
         ("Max: The train is late.\nIda: I'll wait by the clock.", "Ida waits for Max by the clock."),
         ("Lea: Did you feed the cat?\nJon: Twice.", "Jon has fed the cat twice.")]


def test_dialogues_train_and_are_measured_by_rouge():
    os.mkdir("chats")
    for split, chats in (("train", CHATS), ("validation", CHATS[:2])):
        lines = [json.dumps(dict(id=str(i), dialogue=chat, summary=text)) for i, (chat, text) in enumerate(chats)]
        Path("chats", f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    start()
    run("--method", "gum", "--data-path", "chats", "--block-size", 128, "--out", "run", dataset="samsum")
    evaluate("run")
    values = measured("run")["values"]
    model, examples = GPT.from_pretrained("run"), load_once("samsum", "validation", 257, 128, "chats", None)
    written, references = measure.write_texts(model, examples)
    assert references == [[CHATS[0][1]], [CHATS[1][1]]]
    for name in ("rouge1", "rouge2", "rougeL"):
        assert values[name] == measure.text_scores(written, references)[name]


def fake(folder, method, leftover, seed, distill=False, value=None, real=None, layers=2, **settings):
    """A finished run's folder with just what tables and figures read."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    settings = dict(dataset="toysql", data_config=None, model="small", method=method, distill=distill,
                    leftover=leftover, seed=seed, lr=0.1) | settings
    widths, full = [round(20 * leftover)] * layers, [20] * layers
    metrics = dict(settings=settings, start=dict(widths=full), result=dict(val_perplexity=5.0 + seed),
                   leftover=real or leftover, leftover_per_layer=[leftover] * layers)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "log.jsonl").write_text("".join(json.dumps(dict(step=step, loss=9 / step, v=leftover, leftover=leftover,
                                                              widths=widths)) + "\n" for step in range(1, 30)))
    if value is not None:
        values = dict(exact_match=value, perplexity=3.0, sensitivity=value, uniqueness=0.9, span_uniqueness=None,
                      leftover=leftover)
        (folder / "measure.json").write_text(json.dumps(dict(
            values=values, ratios=values, counts=[[0] * 5 + [w] + [0] * 4 for w in widths], widths=widths,
            leftover_per_layer=metrics["leftover_per_layer"])))


EXACT = {("gum", 0.25): [0.5, 0.75, 0.7], ("gum", 0.1): [0.25, 0.5], ("topv", 0.25): [0.125]}


@pytest.fixture
def fakes():
    for seed in range(2):
        fake(f"out/none-{seed}", "none", 1.0, seed, value=0.9)
    for (method, leftover), values in EXACT.items():
        for seed, value in enumerate(values):
            fake(f"out/{method}-{leftover}-{seed}", method, leftover, seed, value=value)
            fake(f"out/{method}-{leftover}-{seed}-d", method, leftover, seed, distill=True, value=value / 2)
    fake("out/soft", "soft", 0.1, 0, value=0.3, real=0.13)
    return sorted(map(str, Path("out").iterdir()))


def rows_of(text, form):
    if form == "csv":
        return [row for row in csv.reader(text.splitlines()) if row]
    lines = [line for line in text.splitlines() if (line.startswith("|") if form == "markdown" else " & " in line)]
    if form == "markdown":
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]
    return [[cell.strip().replace(r"$\pm$", "±").replace(r"\_", "_") for cell in line.removesuffix(r" \\").split("&")]
            for line in lines]


@pytest.mark.parametrize("form", ["markdown", "csv", "latex"])
def test_a_table_has_means_and_sample_standard_deviations_over_seeds(form, fakes, capsys):
    main("table", *fakes, "--format", form)
    header, *rows = rows_of(capsys.readouterr().out, form)
    assert header[0] == "toysql, small: exact match" and header[1:] == ["1", "0.25", "0.1"]
    table = {row[0]: dict(zip(header[1:], row[1:])) for row in rows}
    assert list(table) == ["Dense", "Top_v", "Soft movement", "GUM", "Top_v, distilled", "GUM, distilled"]
    for (method, leftover), values in EXACT.items():
        for label, scale in (("", 1), (", distilled", 0.5)):
            values_here = [scale * value for value in values]
            text = table[{"gum": "GUM", "topv": "Top_v"}[method] + label][str(leftover)]
            numbers = [float(number) for number in re.findall(r"[\d.]+", text)]
            assert numbers[0] == pytest.approx(statistics.mean(values_here), rel=1e-3) and numbers[-1] == len(values)
            if len(values) > 1:
                assert numbers[1] == pytest.approx(statistics.stdev(values_here), rel=0.05)
    assert table["Top_v"]["0.1"] == "-"
    assert "0.13" in table["Soft movement"]["0.1"]  # it left more than it was asked to


def test_a_table_of_unmeasured_runs_shows_their_perplexity(capsys):
    for seed in range(2):
        fake(f"run{seed}", "gum", 0.5, seed)
    main("table", "run0", "run1")
    text = capsys.readouterr().out
    assert "small: perplexity" in text and "5.5 ± 0.71 (2)" in text


def test_ablations_have_rows_of_their_own(capsys):
    fake("a", "gum", 0.5, 0, lambda_gum=10.0, value=0.5)
    fake("b", "gum", 0.5, 0, lambda_gum=0.0, value=0.25)
    main("table", "a", "b", "--format", "csv")
    rows = rows_of(capsys.readouterr().out, "csv")[1:]
    assert rows == [["GUM, lambda_gum 10.0", "0.5 (1)"], ["GUM, lambda_gum 0.0", "0.25 (1)"]]


def test_figures_are_drawn_and_not_blank(fakes, capsys):
    from matplotlib import image

    main("figures", *fakes, "--out", "drawn")
    names = {path.stem for path in Path("drawn").glob("*.png")}
    assert {name.removesuffix("-toysql-small") for name in names} == {
        "redundancy-ratios", "redundancy-values", "layers", *(f"{kind}-{which}" for kind in ("similarity", "training")
        for which in ("0.25", "0.1", "0.25-distilled", "0.1-distilled"))}
    assert names == {path.stem for path in Path("drawn").glob("*.pdf")} and not list(Path("drawn").glob("*.tmp"))
    for path in Path("drawn").glob("*.png"):
        pixels = image.imread(path)
        assert pixels.shape[1] == 1800 and 0.01 < (pixels[..., :3].min(2) < 0.9).mean() < 0.5, path


def test_each_method_has_its_own_colour_and_marker_always_the_same(fakes, monkeypatch):
    seen = []
    monkeypatch.setattr(measure, "draw", lambda path, panels, styles: seen.append((panels, styles)))
    main("figures", *fakes)
    main("figures", *(folder for folder in fakes if "soft" not in folder))
    methods = {label: {(styles[label]["color"], styles[label]["marker"]) for _, styles in seen if label in styles}
               for label, _, _ in measure.DRAWN.values()}
    assert all(len(looks) <= 1 for looks in methods.values())
    looks = [look for looks in methods.values() for look in looks]
    assert len({color for color, _ in looks}) == len({marker for _, marker in looks}) == len(looks) == 4
    panels = seen[0][0]
    (of_gum,) = [curves["GUM"] for (title, _, y), curves in panels.items()
                 if title == "without distillation" and y.startswith("sensitivity")]
    assert {x: sorted(ys.values()) for x, ys in of_gum.items()} == {0.25: [0.5, 0.7, 0.75], 0.1: [0.25, 0.5]}


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
    main("sample", "out/gum", "--prompt", "def f(x):", "--tokens", 20, "--device", "cpu")
    first = capsys.readouterr().out
    assert "dense: out/dense" in first and "pruned: out/gum" in first.splitlines()[0] and first.count("def f(x):") == 2
    main("sample", "out/gum", "--prompt", "def f(x):", "--tokens", 20, "--device", "cpu")
    assert capsys.readouterr().out == first


# Speed.


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_those_that_torch_counts(kind):
    model, idx = tiny(kind, widths=(24, 17)), torch.zeros(3, 40, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(idx)
    matrices = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    blocks, head = measure.operations(model.config, 40)
    keys = [[min(i + 1, window or 40) for i in range(40)] for window in model.config.windows]
    attention = 4 * model.config.n_embd * sum(map(sum, keys)) / 40
    assert matrices == pytest.approx(3 * 40 * (blocks - attention + head), rel=1e-12)


def test_the_least_work_of_a_step():
    model = tiny(widths=(24, 16))
    work, moved = measure.least_work(model.config, 1.0, (3, 40), 0, False)
    assert work == 3 * 120 * sum(measure.operations(model.config, 40))
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert moved == 4 * 11 * matrices
    half = replace(model.config, mlp_widths=(12, 8))
    taught, _ = measure.least_work(model.config, 0.5, (3, 40), 120, True)
    assert taught == 120 * (3 * sum(measure.operations(half, 40)) + sum(measure.operations(model.config, 40))
                            + 12**2 + 8**2)


def test_speed_shows_what_is_reached_of_what_counting_allows(capsys):
    start()
    run("--method", "none", "--out", "out/dense")
    run("--method", "topv", "--leftover", 0.1, "--out", "out/topv")
    main("speed", "out/topv", "--rounds", 1, "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:20].strip(): line[20:].split() for line in lines}
    for what in ("prefill, batch 1", "decode, batch 1", "prefill, batch 8", "decode, batch 8"):
        dense, this, ratio, allowed, reached = (float(cell.strip("x%").replace(",", "")) for cell in rows[what])
        assert ratio == pytest.approx(this / dense, rel=0.02, abs=0.006)  # of the rounding in print
        assert reached == pytest.approx(100 * ratio / allowed, abs=2) and 1 < allowed < 3
    sizes = [Path("out", run, "model.safetensors").stat().st_size / 1e6 for run in ("dense", "topv")]
    assert rows["file size"] == [f"{sizes[0]:.1f}", "MB", f"{sizes[1]:.1f}", "MB", f"{sizes[1] / sizes[0]:.2f}x"]
    assert float(rows["peak memory, batch 8"][0]) > 0
    assert "widths 6, 6 are awkward" in lines[-1] and "multiple_of=8" in lines[-1]
    shrunk = prune.shrink(GPT.from_pretrained("out/topv"), multiple_of=8)
    assert shrunk.config.mlp_widths == (8, 8)
    idx = torch.arange(30)[None]
    torch.testing.assert_close(shrunk(idx)[0], GPT.from_pretrained("out/topv")(idx)[0])


def test_bench_times_every_method_with_and_without_a_teacher(capsys, monkeypatch):
    monkeypatch.setattr(measure, "in_child", lambda function, *args: function(*args))
    start()
    main("bench", "--model", "small", "--batch-size", 2, "--block-size", 16, "--rounds", 1, "--sim-tokens", 8,
         "--distill", "--accumulate", 2, "--gradient-checkpointing", "--device", "cpu")
    out = capsys.readouterr().out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    names = ["none", "topv", "Global Top_v", "gum", "gum, 8 tokens for the similarity"]
    assert [row[0].strip("| ") for row in rows[2:]] == names + [name + ", distilled" for name in names]
    assert all(len(row) == 7 for row in rows)
    ratio, floor = rows[2][1].split()
    assert float(ratio) == 1 and floor == "(1.00)"
    assert float(rows[6][3].split("(")[1].strip(")")) < 1 < float(rows[7][1].split("(")[1].strip(")"))
    assert "Peak memory: none" in out


# Mistakes.


@pytest.mark.parametrize("words,says", [
    (["nowhere"], ["nowhere"]),
    ([], ["RUN"]),
    (["small"], ["small", "--dataset"]),
    (["small", "--dataset", "wiki"], ["wiki", "stdlib"]),
    (["small", "--dataset", "stdlib", "--block-size", "999"], ["999", "128"]),
    (["small", "--dataset", "stdlib", "--outputs"], ["--outputs", "stdlib"]),
    (["small", "--dataset", "stdlib", "--examples", "-1"], ["--examples", "at least 0"]),
    (["small", "--dataset", "stdlib", "--beams", "0"], ["--beams", "at least 1"]),
    (["small", "--dataset", "stdlib", "--device", "foo"], ["--device foo", "cuda"]),
    (["small", "--dataset", "e2e", "--data-path", "nothing"], ["nothing"]),
    (["small", "--dataset", "stdlib", "--dense", "nowhere"], ["nowhere"]),
    (["empty", "--dataset", "stdlib"], ["empty", "config.json"]),
    (["unfinished"], ["unfinished", "not finished", "--resume"]),
    (["damaged"], ["damaged"]),
    (["table", "small"], ["small", "metrics.json"]),
    (["table", "fake", "--metric", "bleu"], ["bleu", "python measure.py fake"]),
    (["table", "fake", "--metric", "speed"], ["speed", "perplexity"]),
    (["figures", "fake"], ["python measure.py fake"]),
    (["sample", "small"], ["--prompt"]),
    (["sample", "small", "--prompt", ""], ["prompt"]),
    (["table", "fake", "--beams", "3"], ["--beams"]),
    (["speed", "small"], ["small", "--dense"]),
    (["bench", "--model", "nowhere"], ["nowhere", "config.json"]),
    (["bench", "--rounds", "0"], ["--rounds", "at least 1"]),
])
def test_a_mistake_gets_one_line_and_status_2(words, says, capsys):
    start()
    fake("fake", "gum", 0.5, 0)
    for name in ("empty", "unfinished", "damaged"):
        os.mkdir(name)
    Path("unfinished/settings.json").write_text("{}")
    Path("damaged/metrics.json").write_text("{half")
    with pytest.raises(SystemExit) as stopped:
        main(*words)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("measure.py: error: ") and len(lines) <= 1 + lines[0].startswith("reading")
    for word in says:
        assert word in lines[-1], lines[-1]
    assert not list(Path().glob("*/measure.json"))


def test_help_is_no_mistake(capsys):
    with pytest.raises(SystemExit) as stopped:
        main("--help")
    assert stopped.value.code == 0 and "table" in capsys.readouterr().out
