"""A run's folder as a model of Hugging Face's: transformers, tiktoken, huggingface_hub, peft and
plain bytes are the oracles."""

import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path

import huggingface_hub.constants
import peft
import pytest
import tiktoken
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from test_model import FAMILIES, both_families, distance, ours, randomise, tokens
from test_train import hook
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline
from transformers.convert_slow_tokenizer import bytes_to_unicode

import measure
import train
from model import GPT, GPTConfig
from results import cli
from results.export import write_card
from results.runs import read_run
from results.tokenizer import check_tokenizer, write_tokenizer

ROOT, END = Path(__file__).parents[1], "<|endoftext|>"
TIKTOKEN = ROOT.parent / "shared" / "tiktoken_cache"
ODD = "It's  \u00c4\u00d6 \u6f22\u5b57 \U0001f642\0\x7f\u00ad\u3000 \t\r\n\n 007 "
TEXT = ODD + "".join(file.read_text(encoding="utf-8").replace(END, "") for file in sorted(
    [*ROOT.glob("*.py"), ROOT / "README.md"]))
CODE = "modeling_pruned.py"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(monkeypatch, tmp_path_factory):
    """transformers' copies of our code are no one else's."""
    monkeypatch.chdir(tmp_path_factory.mktemp("test"))
    modules = str(tmp_path_factory.getbasetemp() / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN))


def in_transformers(folder, **how):
    """The model, of which nothing is missing, left over or of another shape."""
    hf, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    assert not any(loading.values()), loading
    assert hf.lm_head.weight is hf.transformer.wte.weight
    return hf.eval()


def ragged(family):
    """A model with a layer without any neuron, and the same in transformers."""
    model = ours(family)
    model.save_pretrained("ragged")
    return model, in_transformers("ragged", trust_remote_code=True)


# Models of other widths in each layer.


@both_families
def test_a_model_without_any_neuron_is_the_same_in_transformers(family):
    model = ours(family, (0,) * 4)
    model.save_pretrained("none")
    hf = in_transformers("none", trust_remote_code=True).double()
    assert distance(model, hf, 64) < 1e-10


@both_families
def test_a_ragged_model_is_the_same_in_transformers(family):
    model, hf = ragged(family)
    assert [block.mlp.c_fc.weight.numel() for block in hf.transformer.h] == [160, 0, 1280, 544]
    with torch.no_grad():
        assert (hf(tokens(64)).logits - model(tokens(64))[0]).abs().max() < 1e-5
    model.save_pretrained("padded", pad=True)
    plain = in_transformers("padded").double()(tokens(64)).logits  # none of our code computes it
    assert (hf.double()(tokens(64)).logits - plain).abs().max() < 1e-10
    assert distance(model, hf, 64) < 1e-10


@both_families
def test_it_writes_the_same_tokens_in_transformers(family):
    model, hf = (one.double() for one in ragged(family))
    end, generator = 96, torch.Generator().manual_seed(2)
    prompts = [torch.randint(96, (n,), generator=generator).tolist() for n in range(1, 21)]
    written = model.generate(prompts, 20, temperature=0, eot=end)
    for prompt, new in zip(prompts, written):
        theirs = hf.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        theirs = theirs[0, len(prompt) :].tolist()
        assert new == (theirs[:-1] if theirs[-1] == end else theirs)


@both_families
def test_equal_widths_need_no_code(family):
    ours(family, (50,) * 4).save_pretrained("equal")
    ours(family).save_pretrained("padded", pad=True)
    for folder in ("equal", "padded"):
        in_transformers(folder)
        assert sorted(os.listdir(folder)) == ["config.json", "generation_config.json",
                                              "model.safetensors"]
        assert "auto_map" not in Path(folder, "config.json").read_text()


@both_families
@pytest.mark.parametrize("how", ["float16", "bfloat16", "shards", "bin"])
def test_saved_again_by_transformers_it_loads_in_both(family, how):
    _, hf = ragged(family)
    if how == "bin":  # as older releases did, the tied head among the others
        hf.save_pretrained("again")
        Path("again/model.safetensors").unlink()
        assert "lm_head.weight" in hf.state_dict()
        torch.save(hf.state_dict(), "again/pytorch_model.bin")
    elif how == "shards":
        hf.save_pretrained("again", max_shard_size="20KB")
        assert len(list(Path("again").glob("model-*-of-*.safetensors"))) > 2
    else:
        hf.to(getattr(torch, how)).save_pretrained("again")
        assert json.loads(Path("again/config.json").read_text())["dtype"] == how
    again = GPT.from_pretrained("again")
    assert again.config == ours(family).config and again.wte.weight.dtype == torch.float32
    theirs = in_transformers("again", trust_remote_code=True)
    assert distance(again, theirs, 64) < 1e-10 and distance(again, hf, 64) < 1e-10


# Training by others.


@both_families
def test_a_trainer_trains_it_on(family):
    model, hf = ragged(family)
    rows = [dict(input_ids=row, labels=row) for row in tokens(30)]
    how = TrainingArguments("trainer", max_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True,
                            save_strategy="no", disable_tqdm=True)
    trainer = Trainer(hf, how, train_dataset=rows)
    trainer.train()
    trainer.save_model("trained")
    trained = GPT.from_pretrained("trained")
    assert trained.config == model.config
    same = {name for (name, before), after in zip(model.named_parameters(), trained.parameters())
            if torch.equal(before, after)}
    assert same == {f"h.1.{name}" for name in (  # what no neuron reads, and what is empty
        "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight")}
    assert distance(trained, in_transformers("trained", trust_remote_code=True), 64) < 1e-10


@both_families
def test_lora_trains_it_on(family):
    model, hf = ragged(family)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["c_fc", "c_proj"], task_type="CAUSAL_LM",
                             fan_in_fan_out=family == "gpt2")
    adapted = peft.get_peft_model(hf, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer, idx = torch.optim.SGD(trained, lr=1e-3), tokens(30)
    losses = []
    for _ in range(2):
        losses.append(adapted(idx, labels=idx).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[1] < losses[0]
    with torch.no_grad():
        logits = adapted(tokens(64)).logits
    adapted.merge_and_unload().save_pretrained("merged")
    merged = GPT.from_pretrained("merged")
    assert merged.config == model.config
    for before, after in zip(model.h, merged.h):
        for layer in ("c_fc", "c_proj"):
            old, new = (getattr(block.mlp, layer).weight for block in (before, after))
            assert not old.numel() or not torch.equal(old, new)
    assert (merged(tokens(64))[0] - logits).abs().max() < 1e-4
    assert distance(merged, in_transformers("merged", trust_remote_code=True), 64) < 1e-10


# Tokenizers.


@pytest.mark.parametrize("vocab_size", [257, pytest.param(50257, marks=pytest.mark.skipif(
    not TIKTOKEN.exists(), reason=f"no GPT-2 tokenizer in {TIKTOKEN}"))])
@pytest.mark.parametrize("family", [None, *FAMILIES])
def test_the_tokenizer_is_tiktokens_or_bytes(vocab_size, family):
    if family:  # the same with a config.json beside it
        GPT(GPTConfig(vocab_size, 8, 4, 1, 1, family, qkv_bias=family == "gpt2",
                      attn_scaled=family == "gpt2")).save_pretrained("run")
    write_tokenizer("run", vocab_size, 77)
    tokenizer = AutoTokenizer.from_pretrained("run")
    texts = [TEXT, "", " ", "a", *re.split(r"(?<=\n)", TEXT)[:300]]
    gpt2 = vocab_size == 50257 and tiktoken.get_encoding("gpt2")
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids == (gpt2.encode(text) if gpt2 else list(text.encode()))
        assert tokenizer.decode(ids) == text
    end = vocab_size - 1
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == end
    assert tokenizer(f"a{END}")["input_ids"][-1] == end and len(tokenizer) == vocab_size
    assert tokenizer.decode([end, 66], skip_special_tokens=True) == tokenizer.decode([66])
    assert tokenizer.model_max_length == 77
    tokenizer.save_pretrained("again")  # as the Hub has them
    check_tokenizer("again", vocab_size)
    if gpt2:
        letters, ranks = bytes_to_unicode(), gpt2._mergeable_ranks
        vocab = {"".join(map(letters.get, token)): i for token, i in ranks.items()}
        Path("again/tokenizer.json").unlink()
        Path("again/vocab.json").write_text(json.dumps(vocab | {END: end}), encoding="utf-8")
        check_tokenizer("again", vocab_size)
        vocab["hello"], vocab["world"] = vocab["world"], vocab["hello"]
        Path("again/vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        with pytest.raises(ValueError, match="another tokenizer than GPT-2's"):
            check_tokenizer("again", vocab_size)


# Runs.

FLAGS = ("--dataset toysql --steps 6 --batch-size 2 --block-size 128 --lr 0.01 --device cpu "
         "--log-every 2").split()


def make(*flags):
    return train.run(train.parse([*FLAGS, *flags]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the model `small`, and runs from it: `gum`, ragged, and `dense`."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(1)
        small = dict(vocab_size=257, n_positions=128, n_embd=16, n_layer=3, n_head=2)
        GPT(GPTConfig(**small)).save_pretrained("small")
        make("--method", "gum", "--model", "small", "--out", "gum", "--leftover", "0.3")
        make("--method", "none", "--model", "small", "--out", "dense")
    assert len(set(GPT.from_pretrained(folder / "gum").config.mlp_widths)) > 1
    return folder


@pytest.mark.parametrize("name", ["gum", "dense"])
def test_a_runs_folder_is_a_whole_model(name, runs, caplog, capfd):
    extra = [CODE] * (name == "gum")
    assert sorted(os.listdir(runs / name)) == sorted([
        "README.md", "config.json", "generation_config.json", "log.jsonl", "metrics.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.png",
        *extra])
    with caplog.at_level(logging.WARNING):
        write = pipeline("text-generation", model=str(runs / name), trust_remote_code=bool(extra))
        [line] = write("select ", max_new_tokens=5, do_sample=False)
    ids = GPT.from_pretrained(runs / name).generate([list(b"select ")], 5, 0, eot=256)[0]
    assert line["generated_text"] == "select " + bytes(ids).decode(errors="replace")
    assert not caplog.records and "pad_token" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["gum", "dense"])
def test_the_card_is_true_and_its_code_runs_as_printed(name, runs, monkeypatch):
    monkeypatch.chdir(runs)
    monkeypatch.syspath_prepend(ROOT)
    card, metrics = ModelCard.load(f"{name}/README.md"), read_run(name).metrics
    about, result = card.data, metrics["result"]
    assert about.library_name == "transformers" and about.pipeline_tag == "text-generation"
    pruning = ["pruning", "structured-pruning", "gum"]
    assert about.tags == pruning * (name == "gum") + ["gpt2"]
    assert about.get("base_model") is about.get("datasets") is None
    assert {one.metric_type: one.metric_value for one in about.eval_results} == {
        "loss": result["val_loss"], "perplexity": result["val_perplexity"]}
    text = card.text
    for part in (f"{result['val_loss']:.4f}", f"{metrics['start']['val_perplexity']:.3f}",
                 f"{result['parameters']:,}", metrics["data"]["train"]["sha256"],
                 metrics["machine"], torch.__version__, "hf upload"):
        assert part in text, part
    for n, (m, k) in enumerate(zip(metrics["start"]["widths"], result["widths"]), 1):
        assert f"| {n} | {m} | {k} | {k / m:.2%} |" in text
    assert ("None of its 192 MLP neurons was pruned" in text) == (name == "dense")
    assert ("30.21% of its 192 neurons are left (30.00% wanted)" in text) == (name == "gum")
    assert ("trust_remote_code" in text) == (name == "gum")
    theirs, ours = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert "AutoModelForCausalLM" in theirs and "pipeline(" in theirs and "from model" in ours
    for code in theirs, ours:
        exec(code, {})
    assert validate_repo_id(re.search("hf upload ([^ ]+) ", text)[1]) is None
    [command] = re.findall(r"^```sh\npython train.py (.*)\n```$", text, re.MULTILINE)
    flags = train.parse(command.replace(f"--out {name}", "--out again").split())
    assert train.settings_of(train.resolve(flags)) == metrics["settings"]
    assert metrics["command"] == f"python train.py {command}"


def test_the_card_says_what_was_left_out(runs):
    ours().save_pretrained("gum")
    metrics = read_run(runs / "gum").metrics
    metrics["data"]["validation"] |= dict(rows=9, left_out=2)
    write_card("gum", metrics)
    assert "(2 examples, longer than a block, are left out)" in ModelCard.load("gum/README.md").text


@pytest.mark.parametrize("name", ["mit leer é 日本", "a--b..c", "-x.", "日", "gum=1_2-seed0.v2",
                                  "a" * 95 + "-b"])
def test_the_cards_name_for_the_hub_is_one(name, runs):
    ours().save_pretrained(name)
    write_card(name, read_run(runs / "gum").metrics)
    text = Path(name, "README.md").read_text(encoding="utf-8")
    hub_name = re.search(r"`hf upload (\S+) ", text)[1]
    validate_repo_id(f"me/{hub_name}")
    assert f'name = "{name}"' in text and (len(name) == 1 or set(hub_name) & set(name))


def test_the_card_names_data_set_and_model_where_the_hub_has_them(runs):
    metrics = read_run(runs / "gum").metrics
    ours().save_pretrained("gum")
    for dataset, model, base, hub in (
            ("wikitext", "gpt2", "gpt2", ["Salesforce/wikitext"]), ("e2e", "a/b", "a/b",
            ["tuetschek/e2e_nlg"]), ("stdlib", "tiny", None, None)):
        how = dict(dataset=dataset, model=model, distill=True, data_config=None, data_path=None)
        write_card("gum", metrics | dict(base_model=base, teacher="out/taught",
                                         settings=metrics["settings"] | how))
        card = ModelCard.load("gum/README.md")
        assert card.data.get("base_model") == base and card.data.get("datasets") == hub
        assert ", with distillation from out/taught, starting" in card.text
        assert f"from {base or 'a dense model of the same data'}." in card.text


def test_the_card_names_a_folder_of_data_by_its_name_alone_and_no_data_set_of_the_hub(runs):
    metrics = read_run(runs / "gum").metrics
    ours().save_pretrained("gum")
    how = dict(dataset="wikitext", data_config=None, data_path="/home/me/my notes")
    splits = {split: of | dict(source="/home/me/my notes") for split, of in metrics["data"].items()}
    write_card("gum", metrics | dict(settings=metrics["settings"] | how, data=splits))
    text = Path("gum/README.md").read_text(encoding="utf-8")
    assert "trained on my notes, with" in text and "train, my notes, " in text
    assert ModelCard.load("gum/README.md").data.get("datasets") is None
    assert "home" not in text and "wikitext" not in text


@pytest.mark.parametrize("damage", ["another's", "cut off"])
def test_a_runs_tokenizer_is_the_one_it_was_trained_with_whatever_was_beside_its_model(
        damage, runs):
    shutil.copytree(runs / "dense", "start")
    theirs = Path("start/tokenizer.json")
    text = theirs.read_text(encoding="utf-8")
    other = text.replace('"a": 97', '"a": 98').replace('"b": 98', '"b": 97')
    theirs.write_text(text[:99] if damage == "cut off" else other, encoding="utf-8")
    make("--method", "topv", "--model", "start", "--out", "run")
    export("start", "--out", "new")
    for folder in ("run", "new"):
        ids = AutoTokenizer.from_pretrained(folder)("ab\xff")["input_ids"]
        assert ids == list("ab\xff".encode())


def test_a_run_of_a_hubs_model_names_it(runs, monkeypatch):
    """The Hub itself is out of reach: the model is in the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(Path("hub").absolute()))
    repo = Path("hub/models--an--other")
    snapshot = repo / "snapshots" / ("0123456789" * 4)
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(snapshot.name)
    GPT.from_pretrained(runs / "small").save_pretrained(snapshot)
    make("--method", "topv", "--model", "an/other", "--out", "run")
    assert ModelCard.load("run/README.md").data.base_model == "an/other"
    make("--method", "topv", "--model", "run", "--out", "next")
    assert ModelCard.load("next/README.md").data.get("base_model") is None


# Export.


def export(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["measure.py", "export", *map(str, words)])
        cli.call(*measure.read_flags())


@pytest.mark.parametrize("name", ["gum", "small"])  # a run, and a folder with only a model
def test_an_export_needs_no_code_and_is_the_same_function(name, runs):
    export(runs / name, "--out", "new")
    card = ["README.md"] * (name == "gum")
    assert sorted(os.listdir("new")) == card + [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"]
    model, idx = GPT.from_pretrained(runs / name), torch.randint(257, (2, 128))
    hf, theirs = in_transformers("new").double(), model.double()(idx)[0]
    assert (hf(idx).logits - theirs).abs().max() < 1e-10
    assert AutoTokenizer.from_pretrained("new")("ab")["input_ids"] == [97, 98]
    if card:
        text, widths = ModelCard.load("new/README.md").text, model.config.mlp_widths
        assert "trust_remote_code" not in text and f"zero neurons to {max(widths)}" in text


def test_an_export_to_a_multiple_is_ragged_and_the_same_function(runs):
    export(runs / "gum", "--out", "new", "--multiple-of", "8")
    model, idx = GPT.from_pretrained(runs / "gum"), torch.randint(257, (2, 128))
    widths = GPT.from_pretrained("new").config.mlp_widths
    assert widths == tuple(-(-k // 8) * 8 for k in model.config.mlp_widths) and len({*widths}) > 1
    hf, theirs = in_transformers("new", trust_remote_code=True).double(), model.double()(idx)[0]
    assert (hf(idx).logits - theirs).abs().max() < 1e-10


def test_an_export_refuses_what_it_can_not_do(runs, capsys):
    Path("full").mkdir()
    Path("full/file").write_text("mine")
    Path("file").write_text("mine")
    for words, says in (([runs / "gum", "--out", "full"], "full is there, and no empty folder"),
                        ([runs / "gum", "--out", "file"], "file is there, and no empty folder"),
                        ([runs / "gum", "another"], "arguments: another"),
                        (["nowhere", "--out", "new"], "nowhere is not a folder")):
        with pytest.raises(SystemExit) as stopped:
            export(*words)
        assert stopped.value.code == 2 and says in capsys.readouterr().err
    assert sorted(os.listdir()) == ["file", "full"] and os.listdir("full") == ["file"]
    os.mkdir("empty")
    randomise(ours()).save_pretrained("odd")  # has a vocabulary that no tokenizer here has
    for out in ("new", "further/down", "empty"):
        with pytest.raises(SystemExit):
            export("odd", "--out", out)
        assert "vocabulary is 257" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["empty", "file", "full", "odd"] and not os.listdir("empty")


def test_of_two_exports_into_one_folder_at_once_one_is_told_and_the_other_stays(
        runs, capsys, monkeypatch):
    os.mkdir("new")  # an empty folder will do
    export(runs / "gum", "--out", "one")
    hook(monkeypatch, GPT, "save_pretrained", 1,
         lambda *_: export(runs / "gum", "--out", "new"))  # is faster
    with pytest.raises(SystemExit) as stopped:
        export(runs / "dense", "--out", "new")
    assert stopped.value.code == 2 and "can't be put at new" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["new", "one"]
    assert sorted(os.listdir("new")) == sorted(os.listdir("one"))
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert Path("new", name).read_bytes() == Path("one", name).read_bytes()
    assert 'from_pretrained("new")' in Path("new/README.md").read_text(encoding="utf-8")
