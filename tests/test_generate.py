"""Generation against transformers, against running the whole model anew for every token, and against probabilities."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM

from model import GPT, GPTConfig, KVCache

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

CONTEXT = 64
EOT = {"gpt2": 14, "gpt_neo": 3}  # tokens that these models come to write at many different times
both_families = pytest.mark.parametrize("family", EOT)


def random_model(family="gpt2", widths=(), vocab=61, seed=0):
    """A small model with weights so large that its choices are clear, and depend on all that it has read."""
    neo = family == "gpt_neo"
    config = GPTConfig(vocab_size=vocab, n_positions=CONTEXT, n_embd=32, n_layer=4, n_head=4, model_type=family,
                       attn_scaled=not neo, qkv_bias=not neo, windows=(None, 16) * 2 if neo else (), mlp_widths=widths)
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.3 if name.startswith(("wte", "wpe")) else 0.1 if parameter.dim() == 1 else 0.4
            parameter.normal_(std=std, generator=generator)
            if name.endswith("weight") and "ln_" in name:
                parameter += 2 if "ln_f" in name else 1
    return model


def random_prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(61, (length,), generator=generator).tolist() for length in lengths]


MIXED = (3, 24, 1, 11, 17, 3, 8, 24, 19, 2, 14, 6)


def in_transformers(model, folder):
    model.save_pretrained(folder, pad=True)
    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    hf.generation_config.eos_token_id = None  # config.json names one, which would end what has no other
    return hf


def hf_generate(hf, prompts, max_new_tokens, eot=None, **settings):
    """What transformers' own `generate` adds to `prompts`, without end token; prompts of one length make a batch."""
    config = transformers.GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=eot, pad_token_id=0,
                                           do_sample=False, **settings)
    outputs = [None] * len(prompts)
    for length in {len(prompt) for prompt in prompts}:
        at = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        idx = torch.tensor([prompts[i] for i in at])
        new = hf.generate(idx, attention_mask=torch.ones_like(idx), generation_config=config)[:, length:].tolist()
        for i, row in zip(at, new):
            outputs[i] = row[: row.index(eot)] if eot in row else row
    return outputs


def anew(model, prompt, max_new_tokens, eot=None):
    """Greedy decoding the slow way."""
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + max_new_tokens, CONTEXT):
        with torch.no_grad():
            token = model(torch.tensor([tokens]))[0][0, -1].argmax().item()
        if token == eot:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


WAYS = {"greedy": dict(temperature=0), "greedy without repeats": dict(temperature=0, no_repeat_ngram=2),
        "beams": dict(beams=10, length_penalty=0.9, no_repeat_ngram=4)}
IN_TRANSFORMERS = {"greedy": {}, "greedy without repeats": dict(no_repeat_ngram_size=2),
                   "beams": dict(num_beams=10, length_penalty=0.9, no_repeat_ngram_size=4, early_stopping=False)}
every_way = pytest.mark.parametrize("way", WAYS)


# Against transformers: 64 prompts for each way.


@both_families
@every_way
@pytest.mark.parametrize("ends", [True, False], ids=["eot", "no eot"])
def test_equals_transformers(tmp_path, family, way, ends):
    model, eot = random_model(family), EOT[family] if ends else None
    hf, prompts = in_transformers(model, tmp_path), random_prompts((1, 5, 14, 24) * 4, seed=int(ends))
    outputs = model.generate(prompts, 30, **WAYS[way], eot=eot)
    assert outputs == hf_generate(hf, prompts, 30, eot, **IN_TRANSFORMERS[way])
    if ends:
        assert len({len(output) for output in outputs}) > 5
    if way != "greedy":  # and it is not by doing nothing that they agree
        assert outputs != model.generate(prompts, 30, temperature=0, eot=eot)


@pytest.mark.parametrize("beams, length_penalty, ngram", [(2, 2.0, 0), (4, 0.0, 0), (5, -0.5, 3), (3, 1.0, 1)])
def test_other_beam_searches_equal_transformers(tmp_path, beams, length_penalty, ngram):
    model, prompts = random_model("gpt_neo"), random_prompts((2, 9) * 4)
    settings = dict(num_beams=beams, length_penalty=length_penalty, no_repeat_ngram_size=ngram, early_stopping=False)
    wanted = hf_generate(in_transformers(model, tmp_path), prompts, 30, EOT["gpt_neo"], **settings)
    assert model.generate(prompts, 30, beams=beams, length_penalty=length_penalty, no_repeat_ngram=ngram,
                          eot=EOT["gpt_neo"]) == wanted


@both_families
@every_way
@pytest.mark.parametrize("widths", [(5, 0, 40, 17), (0, 0, 0, 0)])
def test_shrunk_models_equal_transformers(tmp_path, family, way, widths):
    model, prompts = random_model(family, widths), random_prompts((4, 20, 20))
    hf = in_transformers(model, tmp_path)
    assert model.generate(prompts, 20, **WAYS[way]) == hf_generate(hf, prompts, 20, **IN_TRANSFORMERS[way])


@every_way
def test_skipped_neurons_are_skipped_in_generation_too(way):
    model, zeroed, prompts = random_model(), random_model(), random_prompts(MIXED)
    keep = torch.arange(0, 128, 3)
    gone = torch.ones(128, dtype=torch.bool).index_fill(0, keep, False)
    for skipping, block in zip(model.h, zeroed.h):
        skipping.mlp.keep = keep
        block.mlp.c_proj.weight.data[:, gone] = 0
    outputs = model.generate(prompts, 20, **WAYS[way])
    assert outputs == zeroed.generate(prompts, 20, **WAYS[way]) != random_model().generate(prompts, 20, **WAYS[way])


# The cache.


@both_families
def test_greedy_equals_running_the_model_anew_for_every_token(family):
    model, prompts = random_model(family), random_prompts(MIXED)
    for eot in (None, EOT[family]):
        assert model.generate(prompts, 50, temperature=0, eot=eot) == [anew(model, p, 50, eot) for p in prompts]


@both_families
@pytest.mark.parametrize("chunks", [(1,) * 64, (40,) + (1,) * 24, (5, 1, 30, 2, 20, 6)])
def test_reading_in_pieces_with_padding_equals_reading_at_once(family, chunks):
    model = random_model(family).double()
    start = torch.tensor([0, 3, 20])  # rows of 64, 61 and 44 tokens
    idx = torch.randint(61, (3, 64), generator=torch.Generator().manual_seed(3))
    cache = KVCache(model.config, start, 64, torch.double)
    with torch.no_grad():
        pieces = torch.cat([model.features(piece, cache, start) for piece in idx.split(chunks, dim=1)], dim=1)
        for row, padding in enumerate(start):
            whole = model.features(idx[row : row + 1, padding:])[0]
            torch.testing.assert_close(pieces[row, padding:], whole, rtol=0, atol=1e-10)


def test_work_per_token_does_not_grow_with_what_was_read(monkeypatch):
    model, read, attended, headed = random_model("gpt_neo"), [], [], []
    features, attention, linear = model.features, F.scaled_dot_product_attention, F.linear

    def spy_features(idx, *args):
        read.append(tuple(idx.shape))
        return features(idx, *args)

    def spy_attention(q, k, v, **kwargs):
        attended.append(k.size(2))
        return attention(q, k, v, **kwargs)

    def spy_linear(x, weight, bias=None):
        if weight is model.wte.weight:
            headed.append(x.shape[:-1].numel())
        return linear(x, weight, bias)

    monkeypatch.setattr(model, "features", spy_features)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy_attention)
    monkeypatch.setattr(F, "linear", spy_linear)
    model.generate(random_prompts((24, 10)), 5, temperature=0)
    assert read == [(2, 24)] + [(2, 1)] * 4  # the prompt once, then only what is new
    assert headed == [2] * 5  # the output head, for the last token alone
    assert attended[:4] == [24] * 4 and attended[4:] == [25, 16] * 2 + [26, 16] * 2 + [27, 16] * 2 + [28, 16] * 2
    read.clear()
    model.generate(random_prompts((24, 10)), 3, beams=4)
    assert read == [(2, 24)] + [(8, 1)] * 2  # the beams of a prompt share its reading


# Batches, and the end of the context.


@both_families
@every_way
@pytest.mark.parametrize("ends", [True, False], ids=["eot", "no eot"])
def test_a_batch_gives_what_each_prompt_alone_gives(family, way, ends):
    model, prompts, eot = random_model(family), random_prompts(MIXED + (50, 60), seed=5), EOT[family] if ends else None
    together = model.generate(prompts, 30, **WAYS[way], eot=eot)
    assert together == [model.generate([prompt], 30, **WAYS[way], eot=eot)[0] for prompt in prompts]
    assert together[::-1] == model.generate(prompts[::-1], 30, **WAYS[way], eot=eot)


@both_families
@every_way
def test_stops_where_the_context_is_full(tmp_path, family, way):
    model, lengths = random_model(family), (CONTEXT, 3, CONTEXT - 1, CONTEXT - 9, 30)
    prompts = random_prompts(lengths)
    outputs = model.generate(prompts, 1000, **WAYS[way])
    assert [len(output) for output in outputs] == [0, CONTEXT - 3, 1, 9, CONTEXT - 30]
    hf = in_transformers(model, tmp_path)
    for prompt, output in list(zip(prompts, outputs))[1:]:
        assert [output] == hf_generate(hf, [prompt], CONTEXT - len(prompt), **IN_TRANSFORMERS[way])


# Beam search against trying everything.


@pytest.mark.parametrize("eot", [None, 2])
def test_enough_beams_find_the_likeliest_continuation_of_all(eot):
    found = []
    for seed in range(8):
        model, prompt = random_model(vocab=6, seed=seed), [1, 4]
        continuations = list(itertools.product(range(6), repeat=3))
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt + list(c) for c in continuations]))[0].log_softmax(-1)
        likelihood = {}
        for c, row in zip(continuations, log_probs):
            length = c.index(eot) + 1 if eot in c else 3
            likelihood[c[:length]] = sum(row[1 + t, c[t]].item() for t in range(length))
        best = max(likelihood, key=likelihood.get)
        found.append(best)
        # Without a length penalty, going on never raises a likelihood, so that stopping early misses nothing.
        [output] = model.generate([prompt], 3, beams=36, length_penalty=0.0, eot=eot)
        assert output == [token for token in best if token != eot]
    assert len(set(found)) > 4 and (eot is None or any(eot in best for best in found))


# No repeats.


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_ngram_comes_twice(n):
    model, prompts = random_model(), random_prompts(MIXED)
    for way in (dict(temperature=0), dict(temperature=0.3), dict(beams=3)):
        for prompt, output in zip(prompts, model.generate(prompts, 30, no_repeat_ngram=n, **way)):
            tokens = prompt + output
            for t in range(len(prompt), len(tokens)):
                if t + 1 >= n:
                    earlier = [tokens[i : i + n] for i in range(t + 1 - n)]
                    assert tokens[t + 1 - n : t + 1] not in earlier
    assert any(len(set(output)) < 30 for output in model.generate(prompts, 30, temperature=0))  # left alone, it repeats


@pytest.mark.parametrize("way", [dict(temperature=0), dict(temperature=1.0), dict(beams=3)])
def test_when_every_token_would_repeat_something_still_comes(way):
    long, short = random_model(vocab=6).generate([[0, 4], [2]], 9, no_repeat_ngram=1, **way)
    assert sorted(long[:4]) == [1, 2, 3, 5] and len(long) == 9
    assert sorted(short[:5]) == [0, 1, 3, 4, 5] and len(short) == 9


# Sampling.


def brute_force(logits, temperature, top_k, top_p):
    """Probability of each token that may be drawn, by hand."""
    weights = {token: math.exp(logit / temperature) for token, logit in enumerate(logits)}
    likeliest = sorted(weights, key=weights.get, reverse=True)[:top_k]
    total, nucleus = sum(weights[token] for token in likeliest), []
    for token in likeliest:
        if top_p is None or sum(weights[t] for t in nucleus) / total < top_p:
            nucleus.append(token)
    return {token: weights[token] / sum(weights[t] for t in nucleus) for token in nucleus}


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, None, None), (0.5, None, None), (2.0, None, None), (1.0, 5, None), (1.0, None, 0.7), (1.5, 8, 0.8),
    (1.0, 500, 1.0)])
def test_sampling_draws_each_token_with_its_probability(temperature, top_k, top_p):
    model, draws, [prompt] = random_model(), 20_000, random_prompts((6,), seed=4)
    with torch.no_grad():
        wanted = brute_force(model(torch.tensor([prompt]))[0][0, -1].tolist(), temperature, top_k, top_p)
    drawn = model.generate([prompt] * draws, 1, temperature, top_k, top_p, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([token for [token] in drawn]).bincount(minlength=61)
    assert {token for token in range(61) if counts[token]} <= set(wanted)
    expected = {token: draws * p for token, p in wanted.items() if draws * p >= 5}
    assert len(expected) > 2 and all(counts[token] for token in expected)
    chi_square = sum((counts[token].item() - e) ** 2 / e for token, e in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_later_tokens_are_drawn_given_the_earlier_ones():
    model, draws = random_model(vocab=5), 20_000
    pairs = model.generate([[1, 3]] * draws, 2, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([5 * a + b for a, b in pairs]).bincount(minlength=25)
    with torch.no_grad():
        first = model(torch.tensor([[1, 3]]))[0][0, -1].softmax(-1)
        second = model(torch.tensor([[1, 3, a] for a in range(5)]))[0][:, -1].softmax(-1)
    expected = draws * (first[:, None] * second).flatten()
    assert ((counts - expected) ** 2 / expected.clamp(min=1)).sum() < 24 + 4 * 48**0.5


def test_sampling_depends_on_nothing_but_its_generator():
    model, prompts = random_model(), random_prompts(MIXED)

    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(prompts, 20, temperature=0.9, top_k=20, top_p=0.9, generator=generator)

    assert sample(1) == sample(1) != sample(2)


@pytest.mark.parametrize("way", [dict(top_k=1), dict(top_p=1e-9), dict(temperature=1e-6)])
def test_sampling_from_one_token_is_greedy(way):
    model, prompts = random_model(), random_prompts(MIXED)
    assert model.generate(prompts, 20, **way) == model.generate(prompts, 20, temperature=0)


# What goes in and what comes out.


@every_way
def test_nothing_to_do_is_no_error(way):
    model = random_model()
    assert model.generate([], 5, **WAYS[way]) == []
    assert model.generate([[1, 2], [3]], 0, **WAYS[way]) == [[], []]


def test_the_end_token_in_a_prompt_does_not_end_it():
    model, prompt = random_model(), [EOT["gpt2"]] * 3
    assert model.generate([prompt], 6, temperature=0, eot=EOT["gpt2"]) == [anew(model, prompt, 6, EOT["gpt2"])] != [[]]


@pytest.mark.parametrize("length", [0, 65])
@every_way
def test_prompts_that_cannot_be_continued_are_errors(length, way):
    with pytest.raises(ValueError, match=f"a prompt has {length} tokens; this model continues 1 to 64"):
        random_model().generate([[1], [2] * length], 5, **WAYS[way])


@pytest.mark.parametrize("way", [dict(beams=0), dict(temperature=-1), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)])
def test_settings_that_mean_nothing_are_errors(way):
    with pytest.raises(ValueError, match="wants beams >= 1, temperature >= 0, top_k >= 1 and 0 < top_p <= 1"):
        random_model().generate([[1]], 5, **way)


@every_way
def test_bfloat16_and_training_mode_generate_too(way):
    model = random_model().train().bfloat16()
    assert [len(output) for output in model.generate(random_prompts((4, 9)), 8, **WAYS[way])] == [8, 8]
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
