"""OBS in parts: what each method's scores are, and whether anybody takes over."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import save_small

from model import GPT
from prune import METHODS
from results.parts import PARTS, PartPruner, one_by_one, registered

ROOT = Path(__file__).parents[1]


def solve(h, j, others, ridge):
    """The a that has the least E[(h_j - sum_i a_i h_i)^2] + ridge (1 + |a|^2), and that, by least
    squares of the tokens and of one more equation for each a_i."""
    A = np.vstack([h[:, others] / len(h) ** 0.5, ridge**0.5 * np.eye(len(others))])
    b = np.concatenate([h[:, j] / len(h) ** 0.5, np.zeros(len(others))])
    a = np.linalg.lstsq(A, b, rcond=None)[0]
    return a, np.square(A @ a - b).sum() + ridge


@pytest.mark.parametrize("m", [1, 7])
def test_scores_are_what_none_one_or_all_of_the_others_cannot_give(m):
    numbers = np.random.default_rng(0)
    h = numbers.normal(size=(50, m)) @ numbers.normal(size=(m, m))
    ridge, slope = 0.01 * np.square(h).mean(), numbers.random(m)
    C = torch.from_numpy(h.T @ h / len(h))
    asked = {"alone": lambda others: [[]], "obs": lambda others: [others],
             "pairs": lambda others: [[i] for i in others] or [[]]}
    found = {}
    for name, groups in asked.items():
        wanted = [slope[j] * min(solve(h, j, group, ridge)[1] for group in groups(
            [i for i in range(m) if i != j])) for j in range(m)]
        found[name] = (PARTS | METHODS)[name].score(torch.from_numpy(slope), C)
        np.testing.assert_allclose(found[name].numpy(), wanted, rtol=1e-6)
    assert m == 1 or (found["obs"] < found["pairs"]).all() and (
        found["pairs"] < found["alone"]).all()


@pytest.mark.parametrize("hand_on", [False, True])
@pytest.mark.parametrize("m", [1, 90])
def test_one_by_one_each_is_asked_what_those_that_are_left_cannot_give(m, hand_on):
    numbers = np.random.default_rng(0)
    h, g = (numbers.normal(size=(200, m)) @ numbers.normal(size=(m, m)) for _ in range(2))
    C, G = (torch.from_numpy(x.T @ x / len(x)) for x in (h, g))
    ridge, here, wanted, last = 0.01 * np.square(h).mean(), [*range(m)], np.empty(m), 0.0
    while here:  # with the tokens themselves, each time anew
        best = []
        for j in here:
            a, rest = solve(h, j, [i for i in here if i != j], ridge)
            best.append((np.square(g[:, j]).mean() * rest, j, a))
        S, j, a = min(best, key=lambda found: found[0])
        here.remove(j)
        wanted[j] = last = max(last, S)
        if hand_on:
            g[:, here] += g[:, [j]] * a
    found = one_by_one(G, C) if hand_on else PARTS["greedy"].score(G.diagonal(), C)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)


def test_copies_leave_first_and_change_nothing_if_what_the_loss_minds_is_handed_on():
    numbers = np.random.default_rng(0)
    h, g = (numbers.normal(size=(100, 20)) @ numbers.normal(size=(20, 20)) for _ in range(2))
    share = numbers.uniform(0.25, 0.75, 20)
    twice = np.hstack([h, h]), np.hstack([g * share, g * (1 - share)])
    C, G, C2, G2 = (torch.from_numpy(x.T @ x / len(x)) for x in (h, g, *twice))
    once, both = one_by_one(G, C), one_by_one(G2, C2).view(2, 20)
    assert both.min(0).values.max() < once.min()  # one of each has left before
    torch.testing.assert_close(both.max(0).values, once, rtol=0.2, atol=0)  # but for the ridge
    greedy = PARTS["greedy"].score(G2.diagonal(), C2).view(2, 20).max(0).values
    assert (greedy / once).min() < 0.5  # as if the loss minded a share of it only


@pytest.mark.parametrize("method", ["chance", "chance-only"])
def test_chance_is_that_of_random_whatever_else_is_drawn(method, tmp_path):
    _, model, kept = pruned(method, tmp_path)
    scores = PartPruner(model, "random", 0.25, 30).scores
    wanted = scores.topk(32).indices.sort().values
    assert torch.equal(torch.cat([kept[-1][0], 64 + kept[-1][1]]), wanted)


@registered()
def pruned(method, tmp_path, steps=30):
    """A model that neurons leave in two rounds while nothing else changes it: as it was, as it is,
    and which it kept at each step."""
    save_small(tmp_path / "small")
    start, model = (GPT.from_pretrained(tmp_path / "small").double() for _ in range(2))
    pruner, kept = PartPruner(model, method, 0.25, steps), []
    torch.manual_seed(0)
    for step in range(1, 4):
        pruner.select(step)
        kept.append([mlp.keep for mlp in pruner.mlps])
        with pruner.recording():
            out = model(torch.randint(256, (4, 30)))[0]
        out.square().mean().backward()
        pruner.update(step)
    assert sum(map(len, kept[-1])) == 32 < sum(map(len, kept[1])) and kept[0] == [None, None]
    return start, model, kept


@pytest.mark.parametrize("method", [*PARTS, "obs"])
def test_others_take_over_unless_nobody_is_to(method, tmp_path):
    start, model, kept = pruned(method, tmp_path)
    for old, new, first, last in zip(start.h, model.h, *kept[1:]):
        assert {*last.tolist()} < {*first.tolist()}  # what has left is gone
        w2, was = (block.mlp.c_proj.weight[:, last] for block in (new, old))
        assert torch.equal(w2, was) == method.endswith("-only")
        assert torch.equal(new.mlp.c_fc.weight, old.mlp.c_fc.weight)


@pytest.mark.parametrize("only, full", [("obs-only", "obs"), ("alone-only", "alone")])
def test_the_first_to_leave_are_the_same_whether_others_take_over_or_not(only, full, tmp_path):
    one, other, pairs = (pruned(name, tmp_path)[2][1] for name in (only, full, "pairs"))
    assert all(map(torch.equal, one, other)) and not all(map(torch.equal, one, pairs))


@registered()
def test_what_the_loss_minds_is_handed_on_with_the_columns_of_w2(tmp_path):
    save_small(tmp_path / "small")
    model = GPT.from_pretrained(tmp_path / "small").double()
    pruner, mlp = PartPruner(model, "handed", 0.25, 30), model.h[0].mlp
    torch.manual_seed(0)
    h, error = torch.randn(100, 64).double(), torch.randn(100, 16).double()  # dL/d(layer's output)
    pruner.C[0].copy_(h.T @ h), pruner.C[1].copy_(torch.eye(64))
    gradient = error @ mlp.c_proj.weight.detach()
    pruner.G[0].copy_(gradient.T @ gradient)
    stays = torch.arange(64) % 3 > 0
    with torch.no_grad():
        pruner.operate(torch.cat([stays, torch.ones(64, dtype=torch.bool)]))
    gradient = error @ mlp.c_proj.weight.detach()[:, stays]  # of those columns as they are now
    torch.testing.assert_close(pruner.G[0][stays][:, stays], gradient.T @ gradient)


def test_a_part_is_a_method_of_its_program_only(tmp_path):
    assert not {*PARTS} & {*METHODS}
    save_small(tmp_path / "small")
    words = "--steps 20 --batch-size 2 --block-size 32 --lr 0.01 --leftover 0.25".split()
    subprocess.run([sys.executable, "-m", "results.parts", "--method", "alone-only", "--model",
                    tmp_path / "small", "--out", tmp_path / "run", *words], cwd=ROOT, check=True)
    assert sum(GPT.from_pretrained(tmp_path / "run").config.mlp_widths) == 32
