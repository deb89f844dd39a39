"""model.py against transformers, torch and formulas by hand: what it computes, what it reads and what it writes."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

import model as model_module
from model import GPT, GPTConfig

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


# Models with random weights, far larger than an initialisation's, so that a mistake shows in the logits.


def randomise(model, std=0.15, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=std, generator=generator)
            if ".ln_" in name and name.endswith("weight"):
                parameter += 1
    return model.eval()


def hf_gpt2(**settings):
    settings = dict(vocab_size=97, n_positions=320, n_embd=32, n_layer=4, n_head=4) | settings
    return randomise(GPT2LMHeadModel._from_config(GPT2Config(**settings), attn_implementation="eager"))


def hf_neo(**settings):
    settings = dict(vocab_size=97, max_position_embeddings=320, hidden_size=32, num_layers=4, num_heads=4,
                    attention_types=[[["global", "local"], 2]]) | settings
    return randomise(GPTNeoForCausalLM(GPTNeoConfig(**settings)))


FAMILIES = {"gpt2": hf_gpt2, "gpt_neo": hf_neo}
both_families = pytest.mark.parametrize("family", FAMILIES)


def tokens(length, batch=2, vocab=97, seed=1):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def distance(ours, hf, length, **kwargs):
    idx = tokens(length, **kwargs)
    return (ours(idx)[0] - hf(idx).logits).abs().max().item()


def saved(hf, folder, **kwargs):
    hf.save_pretrained(folder, **kwargs)
    return folder


def ours(family="gpt2", widths=(5, 0, 40, 17)):
    windows = (None, 8, None, 8) if family == "gpt_neo" else ()
    config = GPTConfig(vocab_size=97, n_positions=64, n_embd=32, n_layer=4, n_head=4, model_type=family,
                       windows=windows, mlp_widths=widths, attn_scaled=family == "gpt2", qkv_bias=family == "gpt2")
    return randomise(GPT(config))


# The logits.


@both_families
@pytest.mark.parametrize("length", [1, 7, 300, 320])
def test_logits_equal_transformers(tmp_path, family, length):
    hf = FAMILIES[family]()
    assert distance(GPT.from_pretrained(saved(hf, tmp_path)), hf, length) < 1e-4


@pytest.mark.parametrize("window", [1, 8, 256])
def test_neo_beyond_its_window_equals_transformers_and_the_window_matters(tmp_path, window):
    hf = hf_neo(window_size=window)
    model = GPT.from_pretrained(saved(hf, tmp_path))
    assert model.config.windows == (None, window, None, window)
    assert distance(model, hf, 320) < 1e-4
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"window_size": 320}))
    everywhere = GPT.from_pretrained(tmp_path)
    assert distance(everywhere, hf, window) < 1e-4  # within the window nothing changes
    assert distance(everywhere, hf, 320) > 1e-2


@pytest.mark.parametrize("types", [[[["local"], 4]], [[["global"], 1], [["local"], 3]], [[["global"], 4]]])
def test_neo_attention_types_in_any_order(tmp_path, types):
    hf = hf_neo(attention_types=types, window_size=16)
    assert distance(GPT.from_pretrained(saved(hf, tmp_path)), hf, 100) < 1e-4


@pytest.mark.parametrize("hf", [lambda: hf_gpt2(n_inner=50), lambda: hf_neo(intermediate_size=50),
                                lambda: hf_gpt2(layer_norm_epsilon=0.1), lambda: hf_neo(layer_norm_epsilon=0.1),
                                lambda: hf_gpt2(scale_attn_weights=False)],
                         ids=["n_inner", "intermediate_size", "gpt2 epsilon", "neo epsilon", "scale_attn_weights"])
def test_settings_that_change_the_function_are_read(tmp_path, hf):
    hf = hf()
    assert distance(GPT.from_pretrained(saved(hf, tmp_path)), hf, 60) < 1e-4


@pytest.fixture(scope="module")
def real_gpt2(tmp_path_factory):
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config()).eval()
    folder = saved(hf, tmp_path_factory.mktemp("gpt2"))
    yield hf, folder
    shutil.rmtree(folder)  # pytest keeps its folders; half a gigabyte is not worth keeping


@pytest.fixture(scope="module")
def real_neo(tmp_path_factory):
    torch.manual_seed(0)
    config = GPTNeoConfig(hidden_size=768, num_layers=12, num_heads=12, attention_types=[[["global", "local"], 6]])
    hf = GPTNeoForCausalLM(config).eval()
    folder = saved(hf, tmp_path_factory.mktemp("neo"))
    yield hf, folder
    shutil.rmtree(folder)


@pytest.fixture
def all_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize("name, count", [("real_gpt2", 124_439_808), ("real_neo", 125_198_592)])
def test_logits_at_the_real_shapes(request, name, count):
    hf, folder = request.getfixturevalue(name)
    model = GPT.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == count
    assert distance(model, hf, 7, batch=1, vocab=50257) < 1e-4
    idx = tokens(model.config.n_positions, batch=1, vocab=50257)
    with torch.no_grad():  # the output head at the last positions alone: at all of them it is half the work
        last = F.linear(model.features(idx)[:, -64:], model.wte.weight)
        assert (last - hf(idx, logits_to_keep=64).logits).abs().max() < 1e-4


def test_a_sequence_longer_than_the_context_is_an_error():
    with pytest.raises(ValueError, match="65 tokens .* context of 64"):
        ours()(tokens(65))


# The loss.


def test_loss_is_the_mean_over_the_targets_that_count():
    model, idx, targets = ours(), tokens(20), tokens(20, seed=2)
    targets[0, :13] = -100
    targets[1, 5] = -100
    logits, loss = model(idx, targets)
    probabilities = logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)
    by_hand = [-probabilities[b, t, targets[b, t]].log() for b in range(2) for t in range(20) if targets[b, t] != -100]
    assert len(by_hand) == 26
    assert abs(loss - sum(by_hand) / 26) < 1e-5
    assert model(idx)[1] is None


def test_label_smoothing_mixes_in_the_uniform_distribution():
    model, idx, targets = ours(), tokens(20), tokens(20, seed=2)
    targets[0, :13] = -100
    logits, loss = model(idx, targets, label_smoothing=0.1)
    log_probs = logits.double().log_softmax(-1)[targets != -100]  # [n, V]
    wanted = torch.full_like(log_probs, 0.1 / 97)
    wanted[torch.arange(len(wanted)), targets[targets != -100]] += 0.9
    assert abs(loss + (wanted * log_probs).sum(-1).mean()) < 1e-5


# Skipping neurons.


@both_families
@pytest.mark.parametrize("keep", [[0, 3, 4, 31, 39], [17, 2], []], ids=["some", "unsorted", "none"])
def test_skipping_neurons_equals_zeroing_them(family, keep):
    skipping, zeroed = (ours(family, widths=(40,) * 4).double() for _ in range(2))
    idx, targets = tokens(30), tokens(30, seed=2)
    mask = torch.zeros(40, dtype=torch.double)
    mask[keep] = 1
    for layer in (0, 2):
        skipping.h[layer].mlp.keep = torch.tensor(keep, dtype=torch.long)

        def masked(x, mlp=zeroed.h[layer].mlp):
            w1, b1, w2 = mask[:, None] * mlp.c_fc.weight, mask * mlp.c_fc.bias, mlp.c_proj.weight * mask
            return F.gelu(x @ w1.T + b1, approximate="tanh") @ w2.T + mlp.c_proj.bias

        zeroed.h[layer].mlp.forward = masked
    (logits, loss), (wanted_logits, wanted_loss) = skipping(idx, targets), zeroed(idx, targets)
    loss.backward()
    wanted_loss.backward()
    torch.testing.assert_close(logits, wanted_logits, rtol=0, atol=1e-10)
    for (name, parameter), wanted in zip(skipping.named_parameters(), zeroed.parameters()):
        torch.testing.assert_close(parameter.grad, wanted.grad, rtol=0, atol=1e-10, msg=name)
    pruned = mask == 0
    mlp = skipping.h[0].mlp
    assert not mlp.c_fc.weight.grad[pruned].any() and not mlp.c_proj.weight.grad[:, pruned].any()


def test_an_observer_sees_the_activations_of_the_kept_neurons():
    model, idx = ours(widths=(40,) * 4), tokens(9)
    mlp = model.h[1].mlp
    inputs, seen = [], []
    mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(idx)
    mlp.observer, mlp.keep = seen.append, torch.tensor([3, 8])
    model(idx)
    mlp.padded = torch.tensor([3, 8, 0, 0])
    model(idx)
    wanted = F.gelu(inputs[1] @ mlp.c_fc.weight.T + mlp.c_fc.bias, approximate="tanh")[..., [3, 8]]
    for h in seen:
        torch.testing.assert_close(h, wanted, rtol=0, atol=1e-5)
    assert len(seen) == 2


# Reading Hugging Face's files.

LAYOUTS = ["safetensors", "safetensors shards", "bin", "legacy bin", "bin shards"]


def write(folder, hf, layout="safetensors", prefix=True, change=lambda tensors: tensors, config=None):
    """A folder in Hugging Face's format with the weights of `hf`, as some version of some tool would have written."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf.config.to_dict() | (config or {})))
    drop = "" if prefix else "transformer."
    tensors = change({name.removeprefix(drop): p.detach().clone() for name, p in hf.named_parameters()})

    def put(part, stem):
        if "safetensors" in layout:
            save_file(part, folder / f"{stem}.safetensors", metadata={"format": "pt"})
        else:
            torch.save(part, folder / f"{stem}.bin", _use_new_zipfile_serialization=layout != "legacy bin")

    stem, suffix = ("model", "safetensors") if "safetensors" in layout else ("pytorch_model", "bin")
    if "shards" not in layout:
        put(tensors, stem)
        return folder
    weight_map = {}
    for n in range(3):
        part = {name: tensors[name] for name in list(tensors)[n::3]}
        put(part, f"{stem}-0000{n + 1}-of-00003")
        weight_map |= {name: f"{stem}-0000{n + 1}-of-00003.{suffix}" for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def with_buffers(tensors):
    """What older releases also wrote: the causal masks, and the output head that is tied to the token embedding."""
    prefix = "transformer." if "transformer.wte.weight" in tensors else ""
    for layer in range(4):
        for name in ("attn.bias", "attn.masked_bias", "attn.attention.bias", "attn.attention.masked_bias"):
            tensors[f"{prefix}h.{layer}.{name}"] = torch.ones(1, 1, 8, 8).tril()
    tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"].clone()
    return tensors


@both_families
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "no prefix"])
def test_every_layout_loads_exactly(tmp_path, family, layout, prefix):
    hf = FAMILIES[family]()
    plain = GPT.from_pretrained(write(tmp_path / "plain", hf, layout, prefix))
    assert distance(plain, hf, 20) < 1e-4
    extra = GPT.from_pretrained(write(tmp_path / "extra", hf, layout, prefix, with_buffers))
    for (name, a), b in zip(plain.named_parameters(), extra.parameters()):
        assert torch.equal(a, b) and a.dtype == torch.float32 and a.is_contiguous() and a.requires_grad, name


@both_families
def test_shards_as_transformers_writes_them(tmp_path, family):
    hf = FAMILIES[family]()
    hf.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert distance(GPT.from_pretrained(str(tmp_path)), hf, 20) < 1e-4


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_as_float32(tmp_path, layout, dtype):
    def halve(tensors):
        return {name: tensor.to(dtype) for name, tensor in with_buffers(tensors).items()}

    hf = hf_neo()
    model = GPT.from_pretrained(write(tmp_path, hf, layout, change=halve))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert distance(model, hf.to(dtype).float(), 20) < 1e-4


def test_a_bin_with_tied_tensors_loads(tmp_path):
    hf = hf_gpt2()
    (tmp_path / "config.json").write_text(json.dumps(hf.config.to_dict()))
    torch.save(hf.state_dict(), tmp_path / "pytorch_model.bin")  # lm_head.weight and wte.weight are one tensor in it
    assert distance(GPT.from_pretrained(tmp_path), hf, 20) < 1e-4


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_tensors_are_named(tmp_path, layout):
    lost = ("transformer.h.1.attn.attention.k_proj.weight", "transformer.ln_f.bias")
    with pytest.raises(ValueError, match=r"lack h\.1\.attn\.attention\.k_proj\.weight, ln_f\.bias$"):
        GPT.from_pretrained(write(tmp_path, hf_neo(), layout, change=without(*lost)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_leftover_tensors_are_named(tmp_path, layout):
    def add(tensors):
        return tensors | {"transformer.h.4.ln_1.bias": torch.zeros(32), "transformer.h.0.attn.biased": torch.zeros(1)}

    with pytest.raises(ValueError, match=r"hold h\.0\.attn\.biased, h\.4\.ln_1\.bias, which"):
        GPT.from_pretrained(write(tmp_path, hf_gpt2(), layout, change=add))


@pytest.mark.parametrize("family, name, tensor", [
    ("gpt2", "transformer.h.0.mlp.c_fc.weight", torch.zeros(128, 32)),  # transposed
    ("gpt2", "transformer.wte.weight", torch.zeros(98, 32)),
    ("gpt_neo", "transformer.h.2.mlp.c_proj.bias", torch.zeros(1)),  # must not be broadcast
    ("gpt_neo", "transformer.h.3.attn.attention.out_proj.weight", torch.zeros(32, 32, 1))])
def test_a_wrong_shape_is_an_error_that_names_the_tensor(tmp_path, family, name, tensor):
    folder = write(tmp_path, FAMILIES[family](), change=lambda tensors: tensors | {name: tensor})
    with pytest.raises(ValueError, match=name.removeprefix("transformer.") + " has shape"):
        GPT.from_pretrained(folder)


def test_an_untied_output_head_is_an_error(tmp_path):
    def untie(tensors):
        return tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}

    with pytest.raises(ValueError, match="lm_head.weight differs"):
        GPT.from_pretrained(write(tmp_path, hf_gpt2(), change=untie))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("damage", ["cut", "cut short", "empty", "garbage", "text"])
def test_damaged_files_are_one_clear_error(tmp_path, layout, damage):
    folder = write(tmp_path, hf_gpt2(), layout)
    victim = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])[-1]
    data = victim.read_bytes()
    victim.write_bytes({"cut": data[:-1000], "cut short": data[:100], "empty": b"", "garbage": b"\x9b\x01" * 5000,
                        "text": b"version https://git-lfs.github.com/spec/v1\n"}[damage])
    with pytest.raises(ValueError, match=f"{victim.name} is damaged, cut off or no weights file") as caught:
        GPT.from_pretrained(folder)
    assert "\n" not in str(caught.value)


class Trap:
    """Unpickled, it creates the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_pickled_code_never_runs(tmp_path, form):
    folder, sprung = write(tmp_path / "model", hf_gpt2(), "bin"), tmp_path / "sprung"
    tensors = torch.load(folder / "pytorch_model.bin") | {"trap": Trap(sprung)}
    if form == "plain pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"trap": Trap(sprung)}))
    else:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        GPT.from_pretrained(folder)
    assert not sprung.exists()
    if form == "plain pickle":  # the trap is a real one
        pickle.loads((folder / "pytorch_model.bin").read_bytes())
    else:
        torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert sprung.exists()


@pytest.mark.parametrize("content", [[torch.zeros(3)], torch.zeros(3), {"wte.weight": 5}, {3: torch.zeros(3)}, {}],
                         ids=["list", "tensor", "number", "key", "nothing"])
def test_a_bin_that_holds_something_else_is_an_error(tmp_path, content):
    folder = write(tmp_path, hf_gpt2(), "bin")
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ValueError):
        GPT.from_pretrained(folder)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        GPT.from_pretrained(tmp_path)
    write(tmp_path, hf_gpt2())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no model: .*model.safetensors.*pytorch_model.bin"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("layout", ["safetensors shards", "bin shards"])
def test_a_missing_shard_is_named(tmp_path, layout):
    folder = write(tmp_path, hf_gpt2(), layout)
    shard = next(folder.glob("*-00002-of-00003.*"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} is missing"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_bad_index_is_an_error(tmp_path, index):
    folder = write(tmp_path, hf_gpt2(), "safetensors shards")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="index.json can't be read"):
        GPT.from_pretrained(folder)


def test_an_index_that_names_a_tensor_its_shard_lacks(tmp_path):
    folder = write(tmp_path, hf_gpt2(), "safetensors shards")
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("-00001-of", "-00002-of"))
    with pytest.raises(ValueError, match="-00002-of-00003.safetensors"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "llama"}, "model_type is 'llama'; gpt2 and gpt_neo"), ({"model_type": None}, "model_type is None"),
    ({"activation_function": "relu"}, "activation_function is 'relu'"), ({"tie_word_embeddings": False}, "untied"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ({"n_head": 5}, "multiple of n_head"), ({"n_head": 0}, "config.json: n_head is 0"),
    ({"n_layer": "4"}, "config.json: n_layer is '4'"), ({"n_embd": None}, "config.json: n_embd is None"),
    ({"vocab_size": "many"}, "config.json: vocab_size is 'many'"), ({"mlp_widths": [1, 2]}, "4 layers want"),
    ({"mlp_widths": [1, 2, 3, -4]}, "config.json: MLPs can't have .1, 2, 3, -4. neurons"),
    ({"n_inner": 128.0}, "MLPs can't have .128.0"), ({"layer_norm_epsilon": "x"}, "config.json: could not convert")])
def test_a_configuration_that_is_not_known_is_an_error(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(write(tmp_path, hf_gpt2(), config=change))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"gpt2"', '{"model_type": "gpt2", "n_embd": 32}'])
def test_a_config_that_is_no_config_is_an_error(tmp_path, text):
    write(tmp_path, hf_gpt2())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        GPT.from_pretrained(tmp_path)


# The Hub, without a network.


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/gpt-neo-125m"])
def test_a_hub_name_without_network_says_what_to_do(hub_cache, name):
    with pytest.raises(ConnectionError, match=f"'{name}'.*give a folder.*--model tiny") as caught:
        GPT.from_pretrained(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gtp2", "no/such/folder", "/no/such/folder", "", "owner/", "../model"])
def test_a_name_that_is_no_hub_name_is_not_looked_for(hub_cache, monkeypatch, name):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match="no model .*: there is no such folder.*EleutherAI/gpt-neo-125m"):
        GPT.from_pretrained(name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gpt2", "someone/some-gpt.2"])
def test_a_model_in_the_local_cache_loads_by_name(hub_cache, name, layout):
    repo = hub_cache / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    hf = hf_gpt2()
    write(snapshot, hf, layout)
    assert distance(GPT.from_pretrained(name), hf, 20) < 1e-4


# Memory.

MEASURE = """
import sys
from model import GPT
def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
GPT.from_pretrained(sys.argv[2])  # a tiny model: what Python imports on the way is not what is measured
before = peak()
model = GPT.from_pretrained(sys.argv[1])
print((peak() - before) / sum(4 * p.numel() for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("layout", ["safetensors", "bin", "fp16 bin"])
def test_reading_a_124m_model_peaks_below_one_and_a_half_times_its_size(real_gpt2, tmp_path, layout):
    hf, folder = real_gpt2
    if layout != "safetensors":
        tensors = load_file(folder / "model.safetensors")
        if layout == "fp16 bin":
            tensors = {name: tensor.half() for name, tensor in tensors.items()}
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        shutil.copy(folder / "config.json", tmp_path)
        folder = tmp_path
    environment = os.environ | {"PYTHONPATH": str(Path(model_module.__file__).parent)}
    command = [sys.executable, "-c", MEASURE, folder, write(tmp_path / "tiny", hf_gpt2(), layout.removeprefix("fp16 "))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert 0.9 < float(run.stdout) < 1.5
    if folder == tmp_path:
        (tmp_path / "pytorch_model.bin").unlink()


# Writing.

WIDTHS = [(128,) * 4, (50,) * 4, (5, 0, 40, 17), (0, 0, 0, 0)]


@both_families
@pytest.mark.parametrize("widths", WIDTHS)
def test_saved_and_read_again_is_bit_equal(tmp_path, family, widths):
    model = ours(family, widths)
    model.save_pretrained(tmp_path / "new" / "folder")
    again = GPT.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config and again.config.mlp_widths == widths
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))
    assert torch.equal(again(tokens(30))[0], model(tokens(30))[0])


@both_families
@pytest.mark.parametrize("widths", WIDTHS)
def test_a_padded_model_is_the_same_function_in_transformers(tmp_path, family, widths):
    model = ours(family, widths)
    model.save_pretrained(tmp_path, pad=True)
    hf, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading  # nothing missing, unexpected or of another shape
    assert distance(model, hf.eval(), 64) < 1e-5
    assert distance(GPT.from_pretrained(tmp_path), hf, 64) < 1e-5


@both_families
def test_equal_widths_need_no_padding_for_transformers(tmp_path, family):
    model = ours(family, (50,) * 4)
    model.save_pretrained(tmp_path)
    assert "mlp_widths" not in json.loads((tmp_path / "config.json").read_text())
    assert distance(model, AutoModelForCausalLM.from_pretrained(tmp_path).eval(), 64) < 1e-5


@both_families
@pytest.mark.parametrize("pad", [False, True])
def test_saving_leaves_exactly_two_files_also_over_an_older_model(tmp_path, family, pad):
    ours(family, (60,) * 4).save_pretrained(tmp_path)
    model = ours(family)
    model.save_pretrained(tmp_path, pad=pad)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert distance(GPT.from_pretrained(tmp_path), lambda idx: type("Out", (), {"logits": model(idx)[0]}), 30) < 1e-5


def test_a_failed_save_leaves_the_older_model(tmp_path, monkeypatch):
    model = ours()
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full_disk(tensors, path, metadata=None):
        Path(path).write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        ours(widths=(3,) * 4).save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_saving_does_not_change_the_model(tmp_path):
    model = ours("gpt_neo")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, pad=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# The configuration.


def test_a_configuration_that_does_not_fit_together_is_an_error():
    with pytest.raises(ValueError, match="3 layers want as many windows and MLP widths, not 3 and 2"):
        GPTConfig(n_layer=3, mlp_widths=(4, 4))
    with pytest.raises(ValueError, match="n_embd 10 is not a multiple of n_head 4"):
        GPTConfig(n_embd=10, n_head=4)
