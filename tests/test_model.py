"""model.py against transformers, torch and formulas by hand: what it computes, reads and writes."""

import json
import os
import pickle
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from transformers import (AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoConfig,
                          GPTNeoForCausalLM)
from transformers.models.gpt_neo import modeling_gpt_neo

from model import ALIGNED, GPT, MLP, GPTConfig
from results.bench import SHAPES

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
# Its attention is in float32 whatever the weights are in. Here both sides compute in float64.
modeling_gpt_neo.torch = SimpleNamespace(**vars(torch) | {"float32": torch.float64})


def randomise(model):
    """Far larger weights than an initialisation's, so that a mistake shows in the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.15, generator=generator)
            if ".ln_" in name and name.endswith("weight"):
                parameter += 1
    return model.eval()


def hf_gpt2(**settings):
    settings = dict(vocab_size=97, n_positions=320, n_embd=32, n_layer=4, n_head=4) | settings
    return randomise(GPT2LMHeadModel(GPT2Config(**settings, attn_implementation="eager")))


def hf_neo(**settings):
    settings = dict(vocab_size=97, max_position_embeddings=320, hidden_size=32, num_layers=4,
                    num_heads=4, attention_types=[[["global", "local"], 2]]) | settings
    return randomise(GPTNeoForCausalLM(GPTNeoConfig(**settings)))


FAMILIES = {"gpt2": hf_gpt2, "gpt_neo": hf_neo}
both_families = pytest.mark.parametrize("family", FAMILIES)


def tokens(length, seed=1):
    return torch.randint(97, (2, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def distance(ours, hf, length):
    """The largest difference of logits; both models are in float64 from here on."""
    idx = tokens(length)
    return (ours.double()(idx)[0] - hf.double()(idx).logits).abs().max().item()


def loaded(hf, folder, **kwargs):
    hf.save_pretrained(folder, **kwargs)
    return GPT.from_pretrained(folder)


def ours(family="gpt2", widths=(5, 0, 40, 17)):
    gpt2, windows = family == "gpt2", () if family == "gpt2" else (None, 8, None, 8)
    return randomise(GPT(GPTConfig(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=4, n_head=4, model_type=family,
        windows=windows, mlp_widths=widths, attn_scaled=gpt2, qkv_bias=gpt2)))


# What the model computes.


@both_families
def test_logits_equal_transformers(tmp_path, family):
    hf = FAMILIES[family]()
    model = loaded(hf, tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert all(distance(model, hf, length) < 1e-10 for length in (1, 7, 300, 320))


@pytest.mark.parametrize("window", [1, 8, 256])
def test_neo_beyond_its_window_equals_transformers_and_the_window_matters(tmp_path, window):
    hf = hf_neo(window_size=window)
    model = loaded(hf, tmp_path)
    assert model.config.windows == (None, window, None, window)
    assert distance(model, hf, 320) < 1e-10
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"window_size": 320}))
    everywhere = GPT.from_pretrained(tmp_path)
    assert distance(everywhere, hf, window) < 1e-10  # within the window nothing changes
    assert distance(everywhere, hf, 320) > 1e-2


@pytest.mark.parametrize("family, settings", [
    ("gpt2", dict(n_inner=50)), ("gpt_neo", dict(intermediate_size=50)),
    ("gpt2", dict(layer_norm_epsilon=0.1)), ("gpt_neo", dict(layer_norm_epsilon=0.1)),
    ("gpt2", dict(n_embd=768, n_head=12)), ("gpt_neo", dict(hidden_size=768, num_heads=12)),
    ("gpt2", dict(scale_attn_weights=False)),
    ("gpt_neo", dict(attention_types=[[["local"], 4]], window_size=16)),
    ("gpt_neo", dict(attention_types=[[["global"], 1], [["local"], 3]], window_size=16)),
    ("gpt_neo", dict(attention_types=[[["global"], 4]], window_size=16))], ids=str)
def test_settings_that_change_the_function_are_read(tmp_path, family, settings):
    hf = FAMILIES[family](**settings)
    assert distance(loaded(hf, tmp_path), hf, 60) < 1e-10


def test_the_known_shapes_have_the_published_numbers_of_parameters():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in GPT(GPTConfig(**SHAPES[name])).parameters())
                  for name in ("gpt2", "EleutherAI/gpt-neo-125m", "EleutherAI/gpt-neo-1.3B")]
    assert counts == [124_439_808, 125_198_592, 1_315_575_808]


def test_a_sequence_longer_than_the_context_is_an_error():
    with pytest.raises(ValueError, match="65 tokens .* context of 64"):
        ours()(tokens(65))


def test_weights_start_out_as_gpt2s_scaled_to_the_width():
    model = GPT(GPTConfig(vocab_size=97, n_positions=64, n_embd=192, n_layer=8, n_head=4))
    for name, parameter in model.named_parameters():
        if "ln_" in name or name.endswith("bias"):
            assert (parameter == float("ln_" in name and name.endswith("weight"))).all(), name
        else:
            std = 0.04 / (4 if "c_proj" in name else 1)  # 768 / 192 = 4, 2 * 8 layers = 16
            error = std / (2 * parameter.numel()) ** 0.5  # one sigma of a measured std
            assert abs(parameter.std() - std) < 6 * error, name


def test_loss_is_the_mean_over_the_targets_that_count():
    model, idx, targets = ours().double(), tokens(20), tokens(20, seed=2)
    targets[0, :13] = targets[1, 5] = -100
    logits, loss = model(idx, targets)
    probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
    by_hand = [-probabilities[b, t, targets[b, t]].log()
               for b in range(2) for t in range(20) if targets[b, t] != -100]
    assert len(by_hand) == 26
    assert abs(loss - sum(by_hand) / 26) < 1e-5  # the loss of float32 logits
    assert model(idx)[1] is None
    torch.testing.assert_close(model(idx, head=False) @ model.wte.weight.T, logits)


@pytest.mark.parametrize("keep, width", [([], 0), ([3], 8), ([*range(8)], 8), ([*range(15)], 16)])
def test_zero_neurons_fill_up_an_awkward_width(keep, width, monkeypatch):
    mlp, given = MLP(GPTConfig(n_embd=4, n_layer=1, n_head=1), 0), []
    mlp.keep, mlp.record = torch.tensor(keep, dtype=torch.long), given.append
    monkeypatch.setitem(ALIGNED, "cpu", 8)
    mlp(torch.randn(2, 3, 4))
    assert given[0].shape == (2, 3, width) and not given[0][..., len(keep):].any()


@pytest.mark.parametrize("aligned", [1, 8])  # as on a CPU, as on a GPU
@pytest.mark.parametrize("family, keep", [
    ("gpt2", [0, 3, 4, 31, 39]), ("gpt_neo", [17, 2]), ("gpt2", [])], ids=str)
def test_skipping_neurons_equals_zeroing_them(family, keep, aligned, monkeypatch):
    monkeypatch.setitem(ALIGNED, "cpu", aligned)
    skipping, zeroed = (ours(family, widths=(40,) * 4).double() for _ in range(2))
    idx, targets = tokens(30), tokens(30, seed=2)
    mask = torch.zeros(40, dtype=torch.double)
    mask[keep] = 1
    for layer in (0, 2):
        skipping.h[layer].mlp.keep = torch.tensor(keep, dtype=torch.long)

        def masked(x, mlp=zeroed.h[layer].mlp):
            w1, b1, w2 = mask[:, None] * mlp.c_fc.weight, mask * mlp.c_fc.bias, mlp.c_proj.weight
            return F.gelu(x @ w1.T + b1, approximate="tanh") @ (w2 * mask).T + mlp.c_proj.bias

        zeroed.h[layer].mlp.forward = masked
    for model in (skipping, zeroed):  # a loss in float64
        F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten()).backward()
    torch.testing.assert_close(skipping(idx), zeroed(idx), rtol=0, atol=1e-10)
    for (name, parameter), wanted in zip(skipping.named_parameters(), zeroed.parameters()):
        torch.testing.assert_close(parameter.grad, wanted.grad, rtol=0, atol=1e-10, msg=name)
    mlp = skipping.h[0].mlp
    assert not mlp.c_fc.weight.grad[mask == 0].any()
    assert not mlp.c_fc.bias.grad[mask == 0].any()
    assert not mlp.c_proj.weight.grad[:, mask == 0].any()


# Reading Hugging Face's files.

LAYOUTS = ["safetensors", "safetensors shards", "bin", "legacy bin", "bin shards"]


def write(folder, hf, layout="safetensors", prefix=True, change=lambda tensors: tensors, **config):
    """A folder with the weights of `hf`, as some version of some tool would have written it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf.config.to_dict() | config))
    drop, safe = "" if prefix else "transformer.", "safetensors" in layout
    tensors = {name.removeprefix(drop): p.detach().clone() for name, p in hf.named_parameters()}
    tensors, weight_map = change(tensors), {}
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    shards = [f"-0000{n}-of-00003" for n in (1, 2, 3)] if "shards" in layout else [""]
    for n, shard in enumerate(shards):
        part = {name: tensors[name] for name in list(tensors)[n :: len(shards)]}
        file = f"{stem}{shard}.{suffix}"
        weight_map |= dict.fromkeys(part, file)
        if safe:  # knows no tied tensors
            save_file({name: part[name].clone() for name in part}, folder / file, {"format": "pt"})
        else:
            torch.save(part, folder / file, _use_new_zipfile_serialization="legacy" not in layout)
    if "shards" in layout:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def with_buffers(tensors):
    """What older releases also wrote: the causal masks, and the tied output head."""
    prefix = "transformer." if "transformer.wte.weight" in tensors else ""
    for name in ("bias", "masked_bias", "attention.bias", "attention.masked_bias"):
        for layer in range(4):
            tensors[f"{prefix}h.{layer}.attn.{name}"] = torch.ones(1, 1, 8, 8).tril()
    tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"]
    return tensors


@pytest.mark.parametrize("family, layout, prefix", [
    *(("gpt2", layout, True) for layout in LAYOUTS), ("gpt_neo", "safetensors", True),
    ("gpt2", "safetensors", False), ("gpt_neo", "bin shards", False)])
def test_every_layout_loads_exactly(tmp_path, family, layout, prefix):
    hf = FAMILIES[family]()
    plain = GPT.from_pretrained(write(tmp_path / "plain", hf, layout, prefix))
    extra = GPT.from_pretrained(write(tmp_path / "extra", hf, layout, prefix, with_buffers))
    for (name, a), b in zip(plain.named_parameters(), extra.parameters()):
        assert torch.equal(a, b) and a.dtype == torch.float32 and a.requires_grad, name
    assert distance(plain, hf, 20) < 1e-10


@pytest.mark.parametrize("layout, dtype", [("safetensors", torch.bfloat16), ("bin", torch.half)])
def test_half_precision_files_load_as_float32(tmp_path, layout, dtype):
    hf = hf_neo()
    model = GPT.from_pretrained(write(tmp_path, hf, layout, change=lambda tensors: {
        name: tensor.to(dtype) for name, tensor in with_buffers(tensors).items()}))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert distance(model, hf.to(dtype), 20) < 1e-10


@pytest.mark.parametrize("layout", ["safetensors", "bin shards"])
@pytest.mark.parametrize("family, changes, message", [  # tensors to write instead, None = none
    ("gpt_neo", {"h.1.attn.attention.k_proj.weight": None, "ln_f.bias": None},
     r"lack h\.1\.attn\.attention\.k_proj\.weight, ln_f\.bias$"),
    ("gpt2", {"h.4.ln_1.bias": torch.zeros(32), "h.0.attn.biased": torch.zeros(1)},
     r"hold h\.0\.attn\.biased, h\.4\.ln_1\.bias, unknown"),
    ("gpt2", {"h.0.mlp.c_fc.weight": torch.zeros(128, 32)}, r"h\.0\.mlp\.c_fc\.weight is \[128"),
    ("gpt2", {"wte.weight": torch.zeros(98, 32)}, r"wte\.weight is \[98, 32\], not \[97, 32\]"),
    ("gpt_neo", {"h.2.mlp.c_proj.bias": torch.zeros(1)}, r"c_proj\.bias is \[1\]"),
    ("gpt_neo", {"h.3.attn.attention.out_proj.weight": torch.zeros(32, 32, 1)}, r"\[32, 32, 1\]"),
    ("gpt2", {"lm_head.weight": torch.ones(97, 32)}, r"lm_head\.weight differs")], ids=str)
def test_tensors_that_do_not_fit_are_named(tmp_path, layout, family, changes, message):
    def change(tensors):
        return {n: tensor for n, tensor in (tensors | changes).items() if tensor is not None}

    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(write(tmp_path, FAMILIES[family](), layout, False, change))


@pytest.mark.parametrize("layout", ["safetensors", "bin shards"])
@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_a_number_that_is_not_finite_is_named_by_its_tensor(tmp_path, layout, number):
    hf, name = hf_gpt2(), "h.2.attn.c_proj.bias"
    hf.transformer.get_parameter(name).data[3] = float(number)
    with pytest.raises(ValueError, match=f"{name} holds numbers that are not finite"):
        GPT.from_pretrained(write(tmp_path, hf, layout))


@pytest.mark.parametrize("layout, damage", [
    *((layout, "cut") for layout in LAYOUTS),
    *(("safetensors", damage) for damage in ("short", "empty", "garbage", "text")),
    *(("bin", damage) for damage in ("short", "empty", "garbage", "text"))])
def test_damaged_files_are_one_clear_error(tmp_path, layout, damage):
    folder = write(tmp_path, hf_gpt2(), layout)
    victim = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])[-1]
    data = victim.read_bytes()
    victim.write_bytes({"cut": data[:-1000], "short": data[:100], "empty": b"",
                        "garbage": b"\x9b\x01" * 5000,
                        "text": b"version https://git-lfs.github.com/spec/v1\n"}[damage])
    message = f"{victim.name} is damaged, cut off or no weights file"
    with pytest.raises(ValueError, match=message) as caught:
        GPT.from_pretrained(folder)
    assert "\n" not in str(caught.value)


class Trap:
    """Unpickled, it creates a file."""

    def __reduce__(self):
        return open, ("sprung", "w")


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_pickled_code_never_runs(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, hf_gpt2(), "bin") / "pytorch_model.bin"
    tensors = torch.load(file) | {"trap": Trap()}
    torch.save(tensors, file, _use_new_zipfile_serialization=form == "zip")
    if form == "plain pickle":
        file.write_bytes(pickle.dumps({"trap": Trap()}, protocol=2))
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        GPT.from_pretrained(tmp_path)
    assert not Path("sprung").exists()
    with suppress(Exception):  # the trap is a real one
        torch.load(file, weights_only=False)
    assert Path("sprung").exists()


@pytest.mark.parametrize("content", [
    [torch.zeros(3)], torch.zeros(3), {"wte.weight": 5}, {3: torch.zeros(3)}, {}], ids=str)
def test_a_bin_that_holds_something_else_is_an_error(tmp_path, content):
    folder = write(tmp_path, hf_gpt2(), "bin")
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no weights file|its weights lack"):
        GPT.from_pretrained(folder)


def test_a_folder_without_a_model_or_a_part_of_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        GPT.from_pretrained(tmp_path)
    write(tmp_path, hf_gpt2())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model: .*model.safetensors.*pytorch_model.bin"):
        GPT.from_pretrained(tmp_path)
    for layout in ("safetensors shards", "bin shards"):
        shard = next(write(tmp_path / layout, hf_gpt2(), layout).glob("*-00002-of-00003.*"))
        shard.unlink()
        with pytest.raises(FileNotFoundError, match=f"{shard.name} is missing"):
            GPT.from_pretrained(tmp_path / layout)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_bad_index_is_an_error(tmp_path, index):
    path = write(tmp_path, hf_gpt2(), "safetensors shards") / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("-00001-of", "-00002-of"))  # misses a shard
    with pytest.raises(ValueError, match="weights lack .*wte"):
        GPT.from_pretrained(tmp_path)
    path.write_text(index)
    with pytest.raises(ValueError, match="model.safetensors.index.json is damaged"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "llama"}, "model_type is 'llama'; known: gpt2, gpt_neo"),
    ({"model_type": None}, "model_type is None"), ({"n_head": 5}, "multiple of n_head"),
    ({"activation_function": "relu"}, "activation_function is 'relu'"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ({"n_head": 0}, "config.json: n_head is 0"), ({"n_layer": "4"}, "config.json: n_layer is '4'"),
    ({"n_embd": None}, "config.json: n_embd is None"), ({"vocab_size": "97"}, "vocab_size is '97'"),
    ({"mlp_widths": [1, 2]}, "config.json: 4 layers, 4 windows, 2 MLP widths"),
    ({"mlp_widths": [1, 2, 3, -4]}, "config.json: layers can't have .1, 2, 3, -4. neurons"),
    ({"n_inner": 128.0}, "can't have .128.0"),
    ({"model_type": "gpt_neo", "max_position_embeddings": 64, "hidden_size": 32, "num_layers": 1,
      "num_heads": 2, "attention_types": [[["local"], 1]], "window_size": "x"}, "have .* windows"),
    ({"layer_norm_epsilon": "x"}, "could not convert"),
    ('{"model_type": "gpt2", "n_embd": 32}', "config.json: 'n_positions' is missing"),
    *(({"n_layer": n}, f"is no GPT's config.json: n_layer is {n!r}") for n in ("four", True, 1e9)),
    *((text, "config.json") for text in ("", "{", "[]", "{}", '"gpt2"')),
    ("[1]", "is no GPT's config.json")], ids=str)
def test_a_configuration_that_is_not_known_is_an_error(tmp_path, change, message):
    write(tmp_path, hf_gpt2(), **(change if isinstance(change, dict) else {}))
    if isinstance(change, str):  # the whole file
        (tmp_path / "config.json").write_text(change)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    """Where models of the Hub lie; the Hub itself is out of reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("name, error, message", [
    *((name, ConnectionError, f"no model '{name}': there is no such folder, and the Hub .* --model")
      for name in ("gpt2", "EleutherAI/gpt-neo-125m", "a/b")),
    *((name, FileNotFoundError, f"no model '{name}': there is no such folder, and a Hub's name is")
      for name in ("no/such/folder", "/no/such/folder", "", "owner/", "../model", "gpt5",
                   "results/mistyped"))])
def test_a_name_that_leads_to_no_model_is_one_clear_error(
        hub_cache, name, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    with pytest.raises(error, match=message) as caught:
        GPT.from_pretrained(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, layout", [
    ("gpt2", "safetensors"), ("gpt2", "bin shards"), ("an/other-gpt.2", "bin")])
def test_a_model_in_the_local_cache_loads_by_name(hub_cache, name, layout):
    repo = hub_cache / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    hf = hf_gpt2()
    write(snapshot, hf, layout)
    assert distance(GPT.from_pretrained(name), hf, 20) < 1e-10


MEASURE = """
import sys
from model import GPT
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
GPT.from_pretrained(sys.argv[2])  # a tiny model: what Python imports on the way is not measured
before = peak()
model = GPT.from_pretrained(sys.argv[1])
print((peak() - before) / sum(4 * p.numel() for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's peak memory")
@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_reading_a_model_peaks_below_one_and_a_half_times_its_size(tmp_path, layout):
    large = hf_gpt2(n_embd=768, n_head=12)  # 115 MB, of which the largest tensor is 8 %
    folders = [write(tmp_path / str(i), hf, layout) for i, hf in enumerate((large, hf_gpt2()))]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", MEASURE, *folders], env=environment,
                         capture_output=True, text=True, check=True)
    assert 0.9 < float(run.stdout) < 1.5


@pytest.mark.parametrize("make", [hf_gpt2, hf_neo])
def test_what_a_configuration_does_not_say_is_transformers_default(tmp_path, make):
    # As in the files of gpt2 itself, which lack scale_attn_weights.
    hf = make()
    path = write(tmp_path, hf) / "config.json"
    config = json.loads(path.read_text())
    for name in ("scale_attn_weights", "tie_word_embeddings", "window_size", "layer_norm_epsilon",
                 "activation_function", "n_inner", "intermediate_size",
                 "scale_attn_by_inverse_layer_idx"):
        config.pop(name, None)
    path.write_text(json.dumps(config))
    assert distance(GPT.from_pretrained(tmp_path), hf, 320) < 1e-10


# Writing.

every_width = pytest.mark.parametrize("widths", [(50,) * 4, (5, 0, 40, 17), (0, 0, 0, 0)], ids=str)


@both_families
@every_width
def test_saved_and_read_again_is_bit_equal(tmp_path, family, widths):
    model, folder = ours(family, widths), tmp_path / "new" / "folder"
    model.save_pretrained(folder)
    random_numbers = torch.get_rng_state()
    again = GPT.from_pretrained(folder)
    assert torch.equal(random_numbers, torch.get_rng_state())
    assert again.config == model.config and again.config.mlp_widths == widths
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


@both_families
@every_width
def test_a_padded_model_is_the_same_function_in_transformers(tmp_path, family, widths):
    model, untouched = ours(family, widths), ours(family, widths)
    model.save_pretrained(tmp_path, pad=len(set(widths)) > 1 or widths[0] == 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untouched.parameters()))
    assert "mlp_widths" not in json.loads((tmp_path / "config.json").read_text())
    hf, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading  # nothing missing, unexpected or of another shape
    assert distance(model, hf.eval(), 64) < 1e-10
    assert distance(GPT.from_pretrained(tmp_path), hf, 64) < 1e-10


def test_saving_leaves_exactly_its_files_also_over_an_older_model(tmp_path):
    ours(widths=(60,) * 4).save_pretrained(tmp_path)
    ours("gpt_neo").save_pretrained(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["config.json", "generation_config.json",
                                             "model.safetensors", "modeling_pruned.py"]
    assert len({file.stat().st_mode for file in files}) == 1  # whoever may read one, reads all
    assert GPT.from_pretrained(tmp_path).config == ours("gpt_neo").config


def test_a_failed_save_leaves_the_older_model(tmp_path, monkeypatch):
    ours().save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full_disk(tensors, path, metadata=None):
        Path(path).write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        ours(widths=(3,) * 4).save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("scaled", [True, False])
def test_attention_is_saved_as_scaled_as_it_is(tmp_path, scaled):
    hf = hf_gpt2(scale_attn_weights=scaled)
    loaded(hf, tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    assert distance(GPT.from_pretrained(tmp_path / "ours"), hf, 60) < 1e-10
