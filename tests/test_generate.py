"""Generation against transformers, against trying everything, and against probabilities.

Weights are in float64, here and in transformers, so that rounding decides nowhere between tokens.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.gpt_neo import modeling_gpt_neo

from model import GPT, GPTConfig, KVCache
from results.texts import beam_search

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
# Its attention is in float32 whatever the weights are in. Here both sides compute in float64.
modeling_gpt_neo.torch = SimpleNamespace(**vars(torch) | {"float32": torch.float64})

CONTEXT = 64
MIXED = (3, 24, 1, 11, 17, 3, 8, 24, 19, 2, 14, 6)  # lengths of prompts
EOT = {"gpt2": 14, "gpt_neo": 3}  # tokens that these models come to write at many different times
both_families = pytest.mark.parametrize("family", EOT)


def random_model(family="gpt2", widths=(), vocab=61, seed=0):
    """A small model with weights so large that its choices depend on all that it has read."""
    gpt2, windows = family == "gpt2", () if family == "gpt2" else (None, 16) * 2
    model = GPT(GPTConfig(
        vocab_size=vocab, n_positions=CONTEXT, n_embd=32, n_layer=4, n_head=4, model_type=family,
        attn_scaled=gpt2, qkv_bias=gpt2, windows=windows, mlp_widths=widths))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.3 if name.startswith("w") else 0.1 if parameter.dim() == 1 else 0.4
            parameter.normal_(std=std, generator=generator)
            if name.endswith("weight") and "ln_" in name:
                parameter += 2 if "ln_f" in name else 1
    return model.double()


def random_prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(61, (length,), generator=generator).tolist() for length in lengths]


def in_transformers(model, folder):
    model.save_pretrained(folder, pad=True)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    hf.generation_config.eos_token_id = None  # config.json names one, which would end others
    return hf


def hf_generate(hf, prompts, max_new_tokens, eot=None, **settings):
    """What transformers adds to `prompts`, without end token; those of one length make a batch."""
    config = transformers.GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=eot,
                                           pad_token_id=0, do_sample=False, **settings)
    outputs = [None] * len(prompts)
    for length in {len(prompt) for prompt in prompts}:
        at = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        idx = torch.tensor([prompts[i] for i in at])
        new = hf.generate(idx, attention_mask=torch.ones_like(idx), generation_config=config)
        for i, row in zip(at, new[:, length:].tolist()):
            outputs[i] = row[: row.index(eot)] if eot in row else row
    return outputs


def greedy(model, prompts, max_new_tokens, eot=None):
    return model.generate(prompts, max_new_tokens, temperature=0, eot=eot)


def beams(model, prompts, max_new_tokens, eot=None):
    return beam_search(model, prompts, max_new_tokens, 10, 0.9, 4, eot)


IN_TRANSFORMERS = {greedy: {}, beams: dict(num_beams=10, length_penalty=0.9, no_repeat_ngram_size=4,
                                           early_stopping=False)}
every_way = pytest.mark.parametrize("way", [greedy, beams])


@both_families
@every_way
@pytest.mark.parametrize("ends", [True, False], ids=["eot", "no eot"])
def test_equals_transformers(tmp_path, family, way, ends):
    model, eot = random_model(family), EOT[family] if ends else None
    prompts = random_prompts((1, 5, 14, 24) * 4, seed=int(ends))
    outputs = way(model, prompts, 30, eot)
    hf = in_transformers(model, tmp_path)
    assert outputs == hf_generate(hf, prompts, 30, eot, **IN_TRANSFORMERS[way])
    if ends:
        assert len({len(output) for output in outputs}) > 5
    if way == beams:  # and it is not by doing nothing that they agree
        assert outputs != greedy(model, prompts, 30, eot)


@pytest.mark.parametrize("n_beams, penalty, ngram", [
    (1, 1.0, 0), (1, 1.0, 2), (2, 2.0, 0), (4, 0.0, 0), (5, -0.5, 3), (3, 1.0, 1)])
def test_other_beam_searches_equal_transformers(tmp_path, n_beams, penalty, ngram):
    model, eot, prompts = random_model("gpt_neo"), EOT["gpt_neo"], random_prompts((2, 9) * 4)
    wanted = hf_generate(in_transformers(model, tmp_path), prompts, 30, eot, num_beams=n_beams,
                         length_penalty=penalty, no_repeat_ngram_size=ngram, early_stopping=False)
    assert beam_search(model, prompts, 30, n_beams, penalty, ngram, eot) == wanted


@every_way
@pytest.mark.parametrize("family, widths", [
    ("gpt2", (5, 0, 40, 17)), ("gpt_neo", (0, 0, 0, 0)), ("gpt2", (128,) * 4)], ids=str)
def test_pruned_models_equal_transformers(tmp_path, way, family, widths):
    model, prompts = random_model(family, widths), random_prompts((4, 20, 20))
    hf = in_transformers(model, tmp_path)
    if widths == (128,) * 4:  # our model skips two thirds of the neurons; there they are zero
        for ours, theirs in zip(model.h, hf.transformer.h):
            ours.mlp.keep = torch.arange(0, 128, 3)
            theirs.mlp.c_proj.weight.data[torch.arange(128) % 3 > 0] = 0
    wanted = hf_generate(hf, prompts, 20, **IN_TRANSFORMERS[way])
    assert way(model, prompts, 20) == wanted


@both_families
@pytest.mark.parametrize("chunks", [(1,) * 64, (40,) + (1,) * 24, (5, 1, 30, 2, 20, 6)])
@torch.no_grad()
def test_reading_in_pieces_with_padding_equals_reading_at_once(family, chunks):
    model, start = random_model(family), torch.tensor([0, 3, 20])  # rows of 64, 61, 44 tokens
    idx = torch.randint(61, (3, 64), generator=torch.Generator().manual_seed(3))
    cache = KVCache(model.config, start, 64, torch.double)
    pieces = [model.features(piece, cache, start) for piece in idx.split(chunks, dim=1)]
    for row, padding in enumerate(start):
        read, whole = torch.cat(pieces, dim=1)[row], model.features(idx[row : row + 1, padding:])[0]
        torch.testing.assert_close(read[padding:], whole, rtol=0, atol=1e-10)


def test_work_per_token_does_not_grow_with_what_was_read(monkeypatch):
    model, calls = random_model("gpt_neo"), {"features": [], "linear": [], "attention": []}

    def spy(name, function):
        def call(*args, **kwargs):
            calls[name].append(args)
            return function(*args, **kwargs)

        return call

    attention = spy("attention", F.scaled_dot_product_attention)
    monkeypatch.setattr(model, "features", spy("features", model.features))
    monkeypatch.setattr(F, "linear", spy("linear", F.linear))
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    model.generate(random_prompts((24, 10)), 5, temperature=0)
    read = [tuple(args[0].shape) for args in calls["features"]]
    assert read == [(2, 24)] + [(2, 1)] * 4  # the prompt once, then only what is new
    headed = [x.shape for x, weight, *_ in calls["linear"] if weight is model.wte.weight]
    assert headed == [(2, 32)] * 5  # the output head, for the last token alone
    attended = [k.size(2) for _, k, *_ in calls["attention"]]
    assert attended == [24] * 4 + [keys for n in (25, 26, 27, 28) for keys in [n, 16] * 2]
    calls["features"].clear()
    beam_search(model, random_prompts((24, 10)), 3, beams=4)  # a prompt's beams share its reading
    assert [tuple(args[0].shape) for args in calls["features"]] == [(2, 24)] + [(8, 1)] * 2


@both_families
@every_way
@pytest.mark.parametrize("ends", [True, False], ids=["eot", "no eot"])
def test_a_batch_gives_what_each_prompt_alone_gives(family, way, ends):
    model, prompts = random_model(family), random_prompts(MIXED + (50, 60), seed=5)
    eot = EOT[family] if ends else None
    together = way(model, prompts, 30, eot)
    assert together == [way(model, [prompt], 30, eot)[0] for prompt in prompts]
    assert together[::-1] == way(model, prompts[::-1], 30, eot)


@both_families
@every_way
def test_stops_where_the_context_is_full(tmp_path, family, way):
    model, lengths = random_model(family), (CONTEXT, 3, CONTEXT - 1, CONTEXT - 9, 30)
    prompts = random_prompts(lengths)
    full, *outputs = way(model, prompts, 1000)
    assert full == [] and [len(output) for output in outputs] == [CONTEXT - 3, 1, 9, CONTEXT - 30]
    hf = in_transformers(model, tmp_path)
    for prompt, output in zip(prompts[1:], outputs):
        assert [output] == hf_generate(hf, [prompt], len(output), **IN_TRANSFORMERS[way])


@pytest.mark.parametrize("eot", [None, 2])
def test_enough_beams_find_the_likeliest_continuation_of_all(eot):
    found = []
    for seed in range(8):
        model, prompt = random_model(vocab=6, seed=seed), [1, 4]
        continuations = list(itertools.product(range(6), repeat=3))
        with torch.no_grad():
            logits = model(torch.tensor([prompt + list(c) for c in continuations]))[0]
        likelihood = {}
        for c, row in zip(continuations, logits.log_softmax(-1)):
            length = c.index(eot) + 1 if eot in c else 3
            likelihood[c[:length]] = sum(row[1 + t, c[t]].item() for t in range(length))
        found.append(max(likelihood, key=likelihood.get))
        # Without a length penalty, going on never raises a likelihood: stopping misses nothing.
        [output] = beam_search(model, [prompt], 3, beams=36, length_penalty=0.0, eot=eot)
        assert output == [token for token in found[-1] if token != eot]
    assert len(set(found)) > 4 and (eot is None or any(eot in best for best in found))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_ngram_comes_twice(n):
    model, prompts = random_model(), random_prompts(MIXED)
    for n_beams in 1, 3:
        outputs = beam_search(model, prompts, 30, n_beams, no_repeat_ngram=n)
        for prompt, output in zip(prompts, outputs):
            tokens = prompt + output
            for t in range(max(len(prompt), n - 1), len(tokens)):
                earlier = [tokens[i : i + n] for i in range(t + 1 - n)]
                assert tokens[t + 1 - n : t + 1] not in earlier
    # Left alone, it repeats.
    assert any(len(set(output)) < 30 for output in beam_search(model, prompts, 30, n_beams))


@pytest.mark.parametrize("n_beams", [1, 3])
def test_when_every_token_would_repeat_something_still_comes(n_beams):
    model = random_model(vocab=6)
    long, short = beam_search(model, [[0, 4], [2]], 9, n_beams, no_repeat_ngram=1)
    assert sorted(long[:4]) == [1, 2, 3, 5] and len(long) == 9
    assert sorted(short[:5]) == [0, 1, 3, 4, 5] and len(short) == 9


def assert_drawn(counts, expected):
    """A chi-square test by token, which a right program fails with one seed in a million."""
    counts, often = counts.double(), expected >= 20  # 0 of 20 expected: once in 500 million
    assert not counts[expected == 0].any() and often.sum() > 2 and counts[often].all()
    chi_square = ((counts - expected) ** 2 / expected)[often].sum()
    assert torch.special.gammaincc(often.sum() / 2, chi_square.float() / 2) > 1e-6


@pytest.mark.parametrize("temperature, top_k", [
    (1.0, None), (0.5, None), (2.0, None), (1.0, 5), (1.5, 8), (1.0, 500)])
def test_sampling_draws_each_token_with_its_probability(temperature, top_k):
    model, draws, prompt = random_model(), 20_000, [33]
    with torch.no_grad():
        logits = model(torch.tensor([prompt]))[0][0, -1].tolist()
    weights = [math.exp(logit / temperature) for logit in logits]
    likeliest = sorted(range(61), key=weights.__getitem__, reverse=True)[:top_k]
    expected = torch.tensor([weights[token] * (token in likeliest) for token in range(61)]).double()
    generator = torch.Generator().manual_seed(0)
    drawn = model.generate([prompt] * draws, 1, temperature, top_k, generator=generator)
    counts = torch.tensor(drawn).flatten().bincount(minlength=61)
    assert_drawn(counts, draws * expected / expected.sum())


def test_nothing_is_drawn_from_logits_that_are_no_numbers():
    model = random_model()
    with torch.no_grad():
        model.wte.weight[7] = math.nan
    with pytest.raises(ValueError, match="logits are no numbers"):
        model.generate([[1, 2]], 3)


def test_later_tokens_are_drawn_given_the_earlier_ones():
    model, draws = random_model(vocab=5), 20_000
    pairs = model.generate([[1, 3]] * draws, 2, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([5 * a + b for a, b in pairs]).bincount(minlength=25)
    with torch.no_grad():
        first = model(torch.tensor([[1, 3]]))[0][0, -1].softmax(-1)
        second = model(torch.tensor([[1, 3, a] for a in range(5)]))[0][:, -1].softmax(-1)
    assert_drawn(counts, draws * (first[:, None] * second).flatten())


def test_sampling_depends_on_nothing_but_its_generator():
    model, prompts = random_model(), random_prompts(MIXED)
    one, same, other = (model.generate(prompts, 20, temperature=0.9, top_k=20,
                                       generator=torch.Generator().manual_seed(seed))
                        for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("way", [dict(top_k=1), dict(temperature=1e-6)])
def test_sampling_from_one_token_is_greedy(way):
    model, prompts = random_model(), random_prompts(MIXED)
    assert model.generate(prompts, 20, **way) == greedy(model, prompts, 20)


@every_way
def test_nothing_to_do_is_no_error(way):
    model = random_model()
    assert way(model, [], 5) == []
    assert way(model, [[1, 2], [3]], 0) == [[], []]


def test_the_end_token_in_a_prompt_does_not_end_it(tmp_path):
    model, eot, prompts = random_model(), EOT["gpt2"], [[EOT["gpt2"]] * 3]
    outputs = greedy(model, prompts, 6, eot)
    assert outputs == hf_generate(in_transformers(model, tmp_path), prompts, 6, eot) != [[]]


@every_way
@pytest.mark.parametrize("length", [0, 65])
def test_a_prompt_that_cannot_be_continued_is_an_error(way, length):
    with pytest.raises(ValueError, match=f"a prompt has {length} tokens; allowed are 1 to 64"):
        way(random_model(), [[1], [2] * length], 5)


@pytest.mark.parametrize("write, settings, allowed", [
    (GPT.generate, dict(temperature=-1), "temperature >= 0"),
    (GPT.generate, dict(top_k=0), "top_k >= 1"), (beam_search, dict(beams=0), "beams >= 1")])
def test_settings_that_make_no_sense_are_an_error(write, settings, allowed):
    with pytest.raises(ValueError, match=allowed):
        write(random_model(), [[1], [2]], 5, **settings)


@every_way
def test_bfloat16_and_training_mode_generate_too(way):
    model = random_model().train().bfloat16()
    outputs = way(model, random_prompts((4, 9)), 8)
    assert [len(output) for output in outputs] == [8, 8]
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
