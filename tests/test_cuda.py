"""What a GPU computes against what the CPU does. Skipped where there is none."""

import copy

import pytest
import torch
import torch.nn.functional as F

import data
import prune
import train
from model import GPT, GPTConfig, HeadLoss
from prune import Pruner
from test_prune import ARGS, kept_neurons, make_optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
METHODS = ("none", "magnitude", "random", "topv", "soft", "gum")


def make_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=61, n_positions=32, n_embd=32, n_layer=3, n_head=2, mlp_widths=(200, 130, 100)))


@pytest.mark.parametrize("method", METHODS)
def test_training_on_a_gpu_is_training_on_the_cpu(method):
    generator = torch.Generator().manual_seed(0)
    batches, ends = [torch.randint(61, (4, 33), generator=generator) for _ in range(20)], []
    for device in ("cpu", "cuda"):
        model = make_model().double().to(device)
        pruner = Pruner(model, method, 0.25, 20)
        optimizer, history = make_optimizer(model, pruner.scores, 0.03), []
        for step, tokens in enumerate(batches, 1):
            batch = tokens[:, :-1], tokens[:, 1:], torch.ones(4, 32, dtype=torch.bool)
            prune.fine_prune(model, pruner, optimizer, data.micro_batches(batch, device), step, ARGS)
            history.append(kept_neurons(model))
        ends.append((history, [p.detach().cpu() for p in (*model.parameters(), pruner.scores)]))
    assert ends[0][0] == ends[1][0]
    for ours, theirs in zip(ends[0][1], ends[1][1]):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [77, 600, 1300])
def test_the_similarity_of_low_precision_activations_is_summed_in_float32(k, dtype):
    torch.manual_seed(0)
    h, C = torch.randn(500, k).relu().to(dtype), torch.zeros(1500, 1500)
    keep = torch.randperm(1500)[:k].sort().values
    on_gpu = C.cuda()
    U = prune.update_gram(on_gpu, h.cuda(), keep.cuda(), 0.9)
    expected = prune.update_gram(C.double(), h.double(), keep, 0.9)
    torch.testing.assert_close(U.cpu().double(), expected, rtol=2e-3, atol=0)


def test_the_loss_and_its_gradients_in_bfloat16():
    torch.manual_seed(0)
    targets, grads = torch.randint(50257, (6000,)), []
    x, weight = torch.randn(6000, 64), torch.randn(50257, 64) * 0.1
    for device in ("cpu", "cuda"):
        leaves, there = [leaf.to(device).requires_grad_() for leaf in (x, weight)], targets.to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            loss = HeadLoss.apply(*leaves, lambda logits, some: F.cross_entropy(logits, there[some], reduction="sum"))
        loss.backward()
        grads.append([loss.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)])
    for ours, theirs in zip(*grads):
        assert (ours - theirs).norm() < 0.01 * ours.norm()


@pytest.mark.parametrize("flags", [[], ["--dtype", "float32"], ["--compile"], ["--gradient-checkpointing"],
                                   ["--sim-tokens", "64"], ["--accumulate", "2"]])
def test_runs_on_a_gpu(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = GPT(GPTConfig(vocab_size=257, n_positions=128, n_embd=64, n_layer=2, n_head=2))
    copy.deepcopy(small).save_pretrained("small")
    words = "--model small --steps 40 --batch-size 8 --block-size 64 --lr 1e-2 --method gum --device cuda --out run"
    metrics = train.run(train.parse([*words.split(), *flags]))
    assert metrics["leftover"] == 0.25 and metrics["result"]["val_loss"] < metrics["start"]["val_loss"] - 1
