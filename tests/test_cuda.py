"""What a GPU computes against what the CPU does. Skipped where there is none."""

import pytest
import torch

import train
from model import GPT, GPTConfig
from prune import HeadLoss, Pruner, similarity
from test_prune import (HOW, NAMES, TRAININGS, a_fork, assert_same, expected,  # noqa: F401
                        make_batches, make_model, plain_loss, trained)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("number", range(len(TRAININGS)), ids=NAMES)
def test_training_on_a_gpu_is_the_reference(number):
    # In float64. The scores of a kept and a pruned neuron are never closer than 1e-7.
    method, scope, how = TRAININGS[number]
    how = how | (dict(teacher=make_model(seed=5).cuda()) if "teacher" in how else {})
    run = trained(method, make_batches(30), parts=2, model=make_model().cuda(), scope=scope, **how)
    assert_same(run, expected(number))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("k", [77, 600, 1300])
def test_the_similarity_of_low_precision_activations(k, dtype, tolerance):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2,
                          mlp_widths=(1500,))).cuda()
    pruner = Pruner(model, "gum", k / 1500, 10, lambda_sim=0.9)
    pruner.scores.data.normal_()
    assert pruner.select(10) == [k]
    h, keep = torch.randn(1, 500, k).relu().to(dtype), model.h[0].mlp.keep.cpu()
    with torch.autocast("cuda", torch.bfloat16, dtype == torch.bfloat16), pruner.recording():
        model.h[0].mlp.record(h.cuda())
    C, h = pruner.C[0].detach().cpu(), h[0].double()
    assert C.dtype == torch.float32 and C.count_nonzero() <= k * k
    ours, wanted = similarity(C[keep[:, None], keep].double()), similarity(h.T @ h)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=tolerance)
    scale = C.diagonal()[keep].double() / h.square().sum(0)
    torch.testing.assert_close(scale, torch.full_like(scale, 0.9), rtol=tolerance, atol=0)


@pytest.mark.parametrize("taught", [False, True])
def test_the_loss_and_its_gradients_in_bfloat16(taught):
    torch.manual_seed(0)
    x, head, *teacher = (torch.randn(rows, d, dtype=torch.float64, device="cuda") * 0.3
                         for d in (64, 32) for rows in (6000, 50257))
    targets, teacher = torch.randint(50257, (6000,), device="cuda"), teacher if taught else None
    ours = [leaf.float().requires_grad_() for leaf in (x, head)]
    with torch.autocast("cuda", torch.bfloat16):
        loss = HeadLoss.apply(*ours, targets, teacher, HOW)
    loss.backward()
    for a, b in zip([loss, *(leaf.grad for leaf in ours)], plain_loss(x, head, targets, teacher)):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("flags", [[], ["--dtype", "float32"], ["--compile"], ["--accumulate", "2"],
                                   ["--sim-tokens", "64"], ["--gradient-checkpointing"],
                                   ["--method", "obs"], ["--method", "obs", "--compile"]])
def test_runs_on_a_gpu(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    GPT(GPTConfig(vocab_size=257, n_positions=128, n_embd=64, n_layer=2, n_head=2)
        ).save_pretrained("small")
    words = ("--model small --steps 40 --batch-size 8 --block-size 64 --lr 1e-2 --method gum "
             "--device cuda --out run")
    metrics = train.run(train.parse([*words.split(), *flags]))
    assert metrics["leftover"] == 0.25
    assert metrics["result"]["val_loss"] < metrics["start"]["val_loss"] - 1
