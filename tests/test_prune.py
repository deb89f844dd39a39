"""Fine-pruning against a reference written here from the equations alone.

The reference works in float64 with whole masks that multiply the weights, autograd through the mask
to the scores (straight through), sorting in Python, Gram matrices of all neurons and a uniqueness
summed by loops. `prune.py` skips the pruned neurons and writes the scores' gradient out by hand;
both must go through the same training.

Shapes: B sequences, T tokens each, d = n_embd, m neurons in an MLP of which k are kept, N = all
neurons of the network, V = the vocabulary.
"""

import copy
import io
import math
import weakref
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import data
import prune
import train
from model import ALIGNED, GPT, GPTConfig
from prune import HeadLoss, Method, Pruner

WIDTHS = (16, 12, 20)  # neurons per layer, unequal so that none is taken for another
N = sum(WIDTHS)
METHODS = ("magnitude", "random", "topv", "soft", "gum", "obs", "wanda")
LEARNED = ("topv", "soft", "gum")
MASK_LR = {"topv": 0.05, "soft": 1.0, "gum": 0.05}
# A method of somebody else's: S_j = |W2's column j| (running mean of h_j^2)^(1/2), as in Wanda.
WANDA = Method("Wanda", "the output weights' norm times the activations'", measure=torch.square,
               score=lambda mlp, square: mlp.c_proj.weight.norm(dim=0) * square.sqrt(),
               defaults=dict(lambda_sim=0.1))


@pytest.fixture(autouse=True)
def a_fork(monkeypatch):
    monkeypatch.setitem(prune.METHODS, "wanda", WANDA)


def make_model(dtype=torch.float64, seed=0, widths=WIDTHS):
    """A small GPT-2 whose weights and biases are all large enough to matter."""
    model = GPT(GPTConfig(vocab_size=11, n_positions=8, n_embd=8, n_layer=len(widths), n_head=2,
                          mlp_widths=widths)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.empty_like(parameter).normal_(0.0, 0.4, generator=generator)
    for layer, block in enumerate(model.h):  # of unequal strength, so that they lose unequal shares
        block.mlp.c_fc.weight.data *= 1 + layer / 2
    return model


def make_batches(steps, size=4, seed=2):
    """(idx, targets, real), each [B, T], for every step. Rows begin with tokens that are only read
    and end in padding, which is not `real`; both have the target -100."""
    generator, at, batches = torch.Generator().manual_seed(seed), torch.arange(7), []
    for _ in range(steps):
        tokens = torch.randint(11, (size, 8), generator=generator)  # [B, T + 1]
        real = at < torch.randint(4, 8, (size, 1), generator=generator)  # [B, T]
        asked = real & (at >= torch.randint(3, (size, 1), generator=generator))  # [B, T]
        batches.append((tokens[:, :-1], tokens[:, 1:].masked_fill(~asked, -100), real))
    return batches


def kept_neurons(model):
    """The indices of the kept neurons of each layer, as lists."""
    return [list(range(mlp.c_fc.out_features)) if mlp.keep is None else mlp.keep.tolist()
            for mlp in (block.mlp for block in model.h)]


def begin(method, steps, leftover=0.25, model=None, weight_decay=0.1, label_smoothing=0.0,
          rounds=None, **settings):
    """A run of `prune.py` before its first step."""
    model = make_model() if model is None else model
    args = SimpleNamespace(  # float32 means no autocast: the model's own precision
        device=model.wte.weight.device.type, dtype="float32", lr=0.02, mask_lr=MASK_LR.get(method),
        eps=1e-5, weight_decay=weight_decay, label_smoothing=label_smoothing, alpha_ce=0.3,
        alpha_kd=0.6, temperature=3.0, compile=False)
    pruner = Pruner(model, method, leftover, steps, **settings)
    pruner.when["rounds"] = rounds or pruner.when["rounds"]
    return SimpleNamespace(model=model, pruner=pruner, args=args, kept=[], losses=[], norms=[],
                           optimizer=train.make_optimizer(model, pruner, args))


def go_on(run, batches, steps=None, parts=1, sim_tokens=None, teacher=None):
    """Train, a step per batch; adds what each step came to. Returns the run."""
    for step in steps or range(1, len(batches) + 1):
        micro_batches = data.micro_batches(batches[step - 1], run.args.device, parts,
                                           sim_tokens=sim_tokens, seed=step)
        widths, loss, norm = train.fine_prune(run.model, run.pruner, run.optimizer, micro_batches,
                                              step, run.args, teacher)
        run.kept.append(kept_neurons(run.model))
        run.losses.append(float(loss))
        run.norms.append(float(norm))
        assert widths == list(map(len, run.kept[-1]))
    run.scores, run.C, run.measured = run.pruner.scores, list(run.pruner.C), run.pruner.measured
    return run


def trained(method, batches, leftover=0.25, parts=1, sim_tokens=None, teacher=None, **how):
    """`prune.py` at work from the first step to the last."""
    run = begin(method, len(batches), leftover, **how)
    return go_on(run, batches, None, parts, sim_tokens, teacher)


def numbers(run):
    """All numbers that a run has come to, by name."""
    told = torch.tensor([run.losses, run.norms], dtype=torch.float64)
    Cs = {f"C of layer {layer}": C for layer, C in enumerate(run.C)}
    return dict(run.model.named_parameters(), **Cs, scores=run.scores, measured=run.measured,
                losses_and_norms=told)


def assert_same(ours, theirs, atol=1e-9):
    """The same kept neurons at every step, and all numbers."""
    assert ours.kept == theirs.kept
    ours, theirs = numbers(ours), numbers(theirs)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name].detach().cpu(), theirs[name].detach(), rtol=0,
                                   atol=atol, msg=lambda text: f"{name}: {text}")


# The reference.


class MaskedMLP(nn.Module):
    """W1' = M * W1 (rows), b1' = M * b1, W2' = W2 * M (columns); every neuron is computed."""

    def __init__(self, mlp):
        super().__init__()
        self.c_fc, self.c_proj = mlp.c_fc, mlp.c_proj
        self.M = torch.ones(len(mlp.c_fc.bias), dtype=mlp.c_fc.weight.dtype)  # [m]
        self.h = None  # [B, T, m]

    def forward(self, x):
        w1, b1 = self.M[:, None] * self.c_fc.weight, self.M * self.c_fc.bias  # [m, d] [m]
        w2 = self.c_proj.weight * self.M  # [d, m]
        z = x @ w1.T + b1  # [B, T, m]
        self.h = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        return self.h @ w2.T + self.c_proj.bias  # [B, T, d]


def curve(t, T, since=0.1, until=0.7, rounds=None):
    """How far v_t still is from v, as a share of 1 - v (T and its shares multiples of 10)."""
    start, end = max(round(T * since), 1), round(T * until)
    if rounds:
        falls = range(end, start, -math.ceil((end - start) / rounds))
        t = max((fall for fall in falls if fall <= t), default=start)
    if t <= start:
        return 1.0
    return 0.0 if t > end else (1 - (t - start) / (end - start)) ** 3


def best(scores, count):
    """The indices of the `count` largest of a list of scores, of equal ones the lower first."""
    return set(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:count])


def reference_masks(S, method, scope, c_t, leftover):
    """A list of 0/1 masks [m], one per layer, for scores `S` [N], where `curve` is c_t."""
    v_t, tau_t = leftover + (1 - leftover) * c_t, 0.1 * (1 - c_t)
    layers, kept = [layer.tolist() for layer in S.detach().split(WIDTHS)], []
    everywhere, offset = best(sum(layers, []), round(v_t * N)), 0
    for scores in layers:
        if method == "soft":
            least = best(scores, round(leftover * len(scores)))
            above = {j for j, s in enumerate(scores) if 1 / (1 + math.exp(-s)) > tau_t}
            kept.append(above if len(above) >= len(least) else least)
        elif scope == "layer":
            kept.append(best(scores, round(v_t * len(scores))))
        elif scope == "global":
            kept.append({j for j in range(len(scores)) if offset + j in everywhere})
        else:  # from m to the width that is asked for
            k = int(scope.split(",")[len(kept)])
            kept.append(best(scores, round(k + (len(scores) - k) * c_t)))
        offset += len(scores)
    return [torch.tensor([float(j in neurons) for j in range(m)], dtype=S.dtype)
            for neurons, m in zip(kept, WIDTHS)]


def reference_uniqueness(C, kept):
    """U [m] of one layer: for kept j the mean over the kept i of |cos(h_j, h_i)|, to which i = j
    adds 0; for pruned j 0."""
    U, C = [0.0] * len(C), C.tolist()
    kept = [j for j in range(len(C)) if kept[j]]
    for j in kept:
        for i in kept:
            if i != j and C[i][i] > 0 and C[j][j] > 0:
                U[j] += abs(C[i][j]) / math.sqrt(C[i][i] * C[j][j]) / len(kept)
    return torch.tensor(U, dtype=torch.float64)


def least_squares(D, columns, targets):
    """The a [k, l] for which the `columns` [k] of D [rows, m] come nearest to its `targets` [l], by
    least squares with a penalty of 0.01 times the columns' mean square on |a|^2."""
    penalty = math.sqrt(0.01 * D[:, columns].square().sum(0).mean()) * torch.eye(len(columns)).to(D)
    aims = torch.cat([D[:, targets], torch.zeros(len(columns), len(targets)).to(D)])
    return torch.linalg.lstsq(torch.cat([D[:, columns], penalty]), aims).solution


def reference_surgeon(D, slope, here):
    """S [m] of one layer: for j in `here` slope_j times the least |h_j - sum a_i h_i|^2 over the
    rows of D [rows, m], penalised by |(1, a)|^2; else -1."""
    S = torch.full_like(slope, -1.0)
    ridge = 0.01 * D[:, here].square().sum(0).mean()
    rows = torch.cat([D[:, here], ridge.sqrt() * torch.eye(len(here)).to(D)])  # [rows + k, k]
    for at, j in enumerate(here):
        others = [i for i in range(len(here)) if i != at]
        a = torch.linalg.lstsq(rows[:, others], rows[:, [at]]).solution
        S[j] = slope[j] * (rows[:, [at]] - rows[:, others] @ a).square().sum()
    return S


def reference_loss(model, batch, label_smoothing, teacher):
    """The mean over the tokens with a target, of the cross-entropy, or of 0.3 of it and 0.6 of the
    divergence from the teacher at temperature 3, times 9."""
    idx, targets, _ = batch
    logits = model(idx)[0][targets != -100]  # [n, V]
    log_p = logits - logits.logsumexp(1, keepdim=True)  # [n, V]
    right = log_p.gather(1, targets[targets != -100][:, None]).mean()
    loss = -(1 - label_smoothing) * right - label_smoothing * log_p.mean()
    if teacher is None:
        return loss
    p, q = ((x / 3).softmax(1) for x in (teacher(idx)[0][targets != -100], logits))  # [n, V]
    return 0.3 * loss + 0.6 * 9 * (p * (p / q).log()).sum(1).mean()


def reference(method, batches, leftover=0.25, scope=None, weight_decay=0.1, label_smoothing=0.0,
              teacher=None, sim_tokens=None, lambda_mvp=2.0, lambda_gum=None, lambda_sim=None,
              prune_from=None, prune_until=None, rounds=None):
    """What `trained` should come to, from the whole batch of every step at once."""
    T, learned = len(batches), method in LEARNED
    scope = scope or ("global" if method in ("gum", "obs") else "layer")
    when = (0.0, 0.1) if method == "obs" else (0.1, 0.7)
    when = when[0] if prune_from is None else prune_from, prune_until or when[1], rounds
    lambda_gum = (10.0 if method == "gum" else 0.0) if lambda_gum is None else lambda_gum
    if lambda_sim is None:
        lambda_sim = 0.1 if method in ("wanda", "obs") else 0.99
    model = make_model()
    for block in model.h:
        block.mlp = MaskedMLP(block.mlp)
    mlps = [block.mlp for block in model.h]
    S = torch.zeros(N, dtype=torch.float64, requires_grad=learned)  # [N]
    if method in ("random", "none", "obs"):
        S = Pruner(make_model(), "random", 1.0, 10).scores.detach()  # as drawn
    groups = [dict(params=[p for p in model.parameters() if p.dim() > 1], peak=0.02, eps=1e-5,
                   weight_decay=weight_decay),
              dict(params=[p for p in model.parameters() if p.dim() == 1], peak=0.02, eps=1e-5)]
    if learned:
        groups.append(dict(params=[S], peak=MASK_LR[method], eps=1e-4))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.0, fused=False)
    Cs = [torch.zeros(m, m, dtype=torch.float64) for m in WIDTHS]
    square = torch.zeros(N, dtype=torch.float64)  # the running mean of h_j^2, or of (dL/dh_j)^2
    mean_costs = [None] * len(WIDTHS)  # those of |dL/dh|^2
    seen_so_far = [torch.zeros(0, m, dtype=torch.float64) for m in WIDTHS]  # h, older ones fading
    here = [list(range(m)) for m in WIDTHS]  # what is not gone
    run = SimpleNamespace(model=model, kept=[], losses=[], norms=[])
    for t, batch in enumerate(batches, 1):
        if method == "magnitude":
            S = torch.cat([torch.cat([mlp.c_fc.weight, mlp.c_fc.bias[:, None], mlp.c_proj.weight.T],
                                     1).norm(dim=1) for mlp in mlps])
        if method == "wanda":
            S = (torch.cat([mlp.c_proj.weight.square().sum(0) for mlp in mlps]) * square).sqrt()
        c_t = curve(t, T, *when)
        if method == "obs" and leftover < 1 > c_t and curve(t - 1, T, *when) > 0:
            S = torch.cat(list(map(reference_surgeon, seen_so_far, square.split(WIDTHS), here)))
        masks = reference_masks(S, method, scope, c_t, leftover)
        run.kept.append([mask.nonzero().flatten().tolist() for mask in masks])
        for mlp, mask, s in zip(mlps, masks, S.split(WIDTHS)):
            mlp.M = mask + s - s.detach() if learned else mask
        offset = 0
        for layer, (mlp, mask, D) in enumerate(zip(mlps, masks, seen_so_far)):
            stay = mask.nonzero().flatten().tolist()
            leave = [j for j in here[layer] if j not in stay]
            if method == "obs" and leave and stay:
                a = least_squares(D, stay, leave)  # h_leave = h_stay a
                mlp.c_proj.weight.data[:, stay] += mlp.c_proj.weight.data[:, leave] @ a.T
            here[layer] = stay
            if method == "obs":
                S[offset : offset + len(mask)][leave] = -1.0
            offset += len(mask)
        optimizer.zero_grad()
        loss = reference_loss(model, batch, label_smoothing, teacher)
        run.losses.append(loss.item())
        seen = batch[2].flatten()
        if sim_tokens is not None:  # which ones is the data's choice
            whole, = data.micro_batches(batch, "cpu", sim_tokens=sim_tokens, seed=t)
            seen = whole.similar
        hs = [mlp.h.detach().flatten(0, 1)[seen] for mlp in mlps]  # [tokens, m] each
        weights = [torch.ones_like(h[:, 0]) for h in hs]  # [tokens] each
        if method != "obs" or c_t > 0:
            fresh = torch.cat(hs, 1)  # [tokens, N]
            if method == "obs":
                slopes = torch.autograd.grad(loss, [mlp.h for mlp in mlps], retain_graph=True)
                slopes = [g.flatten(0, 1)[seen] * mask for g, mask in zip(slopes, masks)]
                fresh = torch.cat(slopes, 1)
                costs = [g.norm(dim=1)**2 for g in slopes]  # [tokens] each
                if t > 1:
                    weights = [1 + cost / mean for cost, mean in zip(costs, mean_costs)]
                mean_costs = [cost.mean() if t == 1 else
                              (1 - lambda_sim) * mean + lambda_sim * cost.mean()
                              for cost, mean in zip(costs, mean_costs)]
                rows = [(lambda_sim * weight)[:, None].sqrt() * h for weight, h in zip(weights, hs)]
                seen_so_far = [torch.cat([math.sqrt(1 - lambda_sim) * D, new])
                               for D, new in zip(seen_so_far, rows)]
            fresh = fresh.square().mean(0)
            square = (1 - lambda_sim) * square + lambda_sim * fresh if t > 1 else fresh
            Cs = [(1 - lambda_sim) * C + lambda_sim * torch.einsum("t,ti,tj->ij", weight, h, h)
                  for C, weight, h in zip(Cs, weights, hs)]
        if learned:
            scale = c_t * (1 - leftover) / leftover + 1  # v_t / v
            scale = 1 - c_t if method == "soft" else scale  # tau_t / tau
            U = torch.cat([reference_uniqueness(C, mask) for C, mask in zip(Cs, masks)])  # [N]
            loss = loss + lambda_mvp * scale / N * ((1 + lambda_gum * U) * torch.sigmoid(S)).sum()
        loss.backward()
        run.norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters())))
        for parameter in model.parameters():
            parameter.grad *= min(1.0, 1 / (run.norms[-1] + 1e-6))
        for group in optimizer.param_groups:
            factor = t / (T // 10) if t <= T // 10 else (T - t) / (T - T // 10)
            group["lr"] = group["peak"] * factor
        optimizer.step()
    run.scores, run.C = S, Cs if learned and lambda_gum or method == "obs" else []
    run.measured = square if method in ("wanda", "obs") else torch.zeros_like(square)
    return run


def assert_same_training(method, batches, leftover=0.25, **how):
    """Run both and compare all. Returns the kept neurons of every step."""
    ours = trained(method, batches, leftover, **how)
    assert_same(ours, reference(method, batches, leftover, **how))
    return ours.kept


def comebacks(history):
    """How many times a neuron is kept right after a step in which it was pruned."""
    return sum(len(set(now) - set(before))
               for a, b in zip(history, history[1:]) for before, now in zip(a, b))


# The whole training.

TEACHER = make_model(seed=5).requires_grad_(False)
SCOPES = [(method, scope, {}) for method in METHODS for scope in ("layer", "global")]
TRAININGS = [*SCOPES, ("none", None, dict(leftover=1.0, label_smoothing=0.2)),
             ("gum", "global", dict(teacher=TEACHER)), ("gum", "layer", dict(sim_tokens=3)),
             ("wanda", "global", dict(teacher=TEACHER, sim_tokens=3)),
             ("obs", "global", dict(teacher=TEACHER, sim_tokens=3, lambda_sim=0.3)),
             ("obs", "1,8,3", dict(prune_until=0.7)), ("obs", "global", dict(prune_until=0.5)),
             ("obs", "global", dict(prune_until=0.7, rounds=4, sim_tokens=3)),
             ("obs", "layer", dict(prune_from=0.2, prune_until=0.4)),
             ("random", "global", dict(prune_from=0.0)),
             ("topv", "layer", dict(teacher=TEACHER, label_smoothing=0.2)),
             ("gum", "1,8,3", {}), ("random", "0,0,12", {}),
             *((method, None, dict(prune_until=0.4)) for method in ("gum", "soft", "magnitude"))]
NAMES = ["-".join([method, str(scope), *how]) for method, scope, how in TRAININGS]


@lru_cache
def expected(number):
    method, scope, how = TRAININGS[number]
    return reference(method, make_batches(30), scope=scope, **how)


@pytest.mark.parametrize("way", [1, 2, 4, "checkpointed", "aligned"])
@pytest.mark.parametrize("number", range(len(TRAININGS)), ids=NAMES)
def test_training_is_the_reference_however_a_step_is_cut_up(number, way, monkeypatch):
    # Three tokens for the similarity of four micro-batches: one has none.
    (method, scope, how), model = TRAININGS[number], make_model()
    model.gradient_checkpointing = way == "checkpointed"
    if way == "aligned":  # as on a GPU
        monkeypatch.setitem(prune.ALIGNED, "cpu", 8)
    parts = way if isinstance(way, int) else 2
    run = trained(method, make_batches(30), model=model, parts=parts, scope=scope, **how)
    assert_same(run, expected(number))
    assert comebacks(run.kept) > 0 or method not in LEARNED
    assert comebacks(run.kept) == 0 or method != "obs"
    if method not in ("none", "soft"):  # which may leave more
        assert sum(map(len, run.kept[-1])) == N // 4
        shares = {len(kept) / m for kept, m in zip(run.kept[-1], WIDTHS)}
        if method != "obs" or run.pruner.scope == "layer":  # OBS's may be equal by chance
            assert (len(shares) == 1) == (run.pruner.scope == "layer")
    if scope and "," in scope:
        assert [len(kept) for kept in run.kept[-1]] == [int(k) for k in scope.split(",")]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("method, lambda_gum",
                         [("gum", 0.0), ("gum", 100.0), ("topv", 10.0), ("soft", 10.0)])
def test_uniqueness_is_a_switch_of_its_own(method, lambda_gum, scope):
    kept = assert_same_training(method, make_batches(30), scope=scope, lambda_gum=lambda_gum,
                                lambda_sim=0.4, lambda_mvp=5.0)
    assert comebacks(kept) > 0


def test_magnitude_lets_a_neuron_back_in_when_a_kept_one_shrinks_below_it():
    kept = assert_same_training("magnitude", make_batches(60), 0.5, scope="global",
                                weight_decay=5.0)
    assert comebacks(kept) > 0


def test_training_through_emptied_layers_is_the_reference():
    kept = assert_same_training("gum", make_batches(40, seed=4), 0.05, lambda_mvp=0.1,
                                lambda_gum=100.0, lambda_sim=0.05)
    empty = [[not neurons for neurons in layers] for layers in kept]  # by step and layer
    assert any(sum(layers) == 2 for layers in empty)
    assert all(layers[1] for layers in empty[-10:])  # for good
    assert any(a[2] and not b[2] for a, b in zip(empty, empty[1:]))  # and another comes back


@pytest.mark.parametrize("method", ["gum", "obs"])
def test_training_goes_on_when_the_whole_network_is_emptied(method):
    kept = assert_same_training(method, make_batches(30), 0.01, lambda_mvp=0.1)
    assert kept[-1] == kept[-9] == [[], [], []]


def test_of_two_equal_neurons_one_leaves_and_the_other_does_the_work_of_both():
    run, batch = begin("obs", 10, (N - 1) / N, scope="16,11,20"), make_batches(1, size=64)[0]
    mlp = run.model.h[1].mlp
    with torch.no_grad():  # the fourth fires as the ninth, loudly, and weighs more
        for weight in (mlp.c_fc.weight, mlp.c_fc.bias):
            weight[8] *= 5
            weight[3] = weight[8]
        mlp.c_proj.weight[:, 8] /= 8
        mlp.c_proj.weight[:, 3] = 2 * mlp.c_proj.weight[:, 8]
    pruner, column = run.pruner, mlp.c_proj.weight[:, 8].detach().clone()
    before = reference_loss(run.model, batch, 0.0, None)
    pruner.select(1)
    with pruner.recording(batch[2].flatten().nonzero().squeeze(1)):
        reference_loss(run.model, batch, 0.0, None).backward()
    pruner.update(1)
    pruner.select(2)
    # The one of less weight leaves; by the ridge the other does a little less than both did.
    assert kept_neurons(run.model)[1] == [j for j in range(12) if j != 8]
    torch.testing.assert_close(mlp.c_proj.weight[:, 3], 3 * column, rtol=0.05, atol=0.01)
    assert abs(reference_loss(run.model, batch, 0.0, None) - before) < 1e-3


def test_equations_are_solved_in_full_precision(monkeypatch):
    seen, real = [], prune.cholesky
    monkeypatch.setattr(prune, "cholesky", lambda C: (
        seen.append(torch.get_float32_matmul_precision()), real(C))[1])
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        trained("obs", make_batches(10))
        assert {*seen} == {"highest"} and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(usual)


@pytest.mark.parametrize("where", [..., (3, 3)], ids=["everywhere", "in one place"])
@pytest.mark.parametrize("C", [math.inf, math.nan, -1.0])
def test_what_diverges_is_told_by_the_loss(C, where):
    run = begin("obs", 10, scope="16,6,20", leftover=42 / N)
    run.pruner.C[1][where] = C
    run.pruner.select(2)
    assert run.model.h[1].mlp.c_proj.weight.isnan().any()
    assert not run.model.h[0].mlp.c_proj.weight.isnan().any()


@pytest.mark.parametrize("steps", range(1, 10))
def test_few_steps_leave_what_they_should(steps):
    run = trained("obs", make_batches(steps))
    assert sum(map(len, run.kept[-1])) == N // 4 and comebacks(run.kept) == 0
    assert all(math.isfinite(loss) for loss in run.losses)


def test_the_surgeons_C_is_exact_where_products_are_in_bfloat16():
    run, (h, grad) = begin("obs", 10, model=make_model(torch.float32)), torch.randn(2, 1, 50, 16)
    run.pruner.measured[:] = 0.5
    run.pruner.select(1)
    h, grad = h.bfloat16().requires_grad_(), grad.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        run.pruner.record(0, None, h)
        h.backward(grad)
    weights = 1 + grad[0].double().square().sum(1) / 8
    exact = h[0].detach().double().T @ (weights[:, None] * h[0].detach().double())
    torch.testing.assert_close(run.pruner.C[0].double(), 0.1 * exact, rtol=0, atol=1e-4)
    assert exact.abs().max() > 100


def test_all_tokens_weigh_alike_where_no_error_costs_anything():
    run = begin("obs", 10, 1.0, prune_until=0.9)
    x = torch.randn(1, 50, 16, dtype=torch.float64, requires_grad=True)
    for step in 1, 2:
        run.pruner.select(step)
        h = x * 1
        run.pruner.record(0, None, h)
        (h * 0).sum().backward()
        run.pruner.update(step)
    exact = x[0].detach().T @ x[0].detach()
    torch.testing.assert_close(run.pruner.C[0].data, (0.9 * 0.1 + 0.1) * exact)


def test_what_a_layer_computes_is_held_until_its_gradient_is_there_and_no_longer(monkeypatch):
    held, real = [], prune.chosen

    def watched(values, tokens):
        rows = real(values, tokens)
        held.append(weakref.ref(rows))
        return rows

    monkeypatch.setattr(prune, "chosen", watched)
    run = begin("obs", 10)
    run.pruner.select(1)
    h = torch.randn(1, 50, 16, dtype=torch.float64, requires_grad=True) * 1
    run.pruner.record(0, None, h)
    loss = h.sum()
    assert held[0]() is not None
    loss.backward()
    assert [rows() for rows in held] == [None, None] and run.pruner.C[0].any()


def test_the_weights_of_an_emptied_layer_still_decay_and_move_on():
    run, batches = begin("topv", 10, 0.5, scope="global", lambda_mvp=0.0), make_batches(10)
    go_on(run, batches, [1])  # everything is kept, and gathers momentum
    run.scores.data[: WIDTHS[0]] = -1.0
    fc, state = run.model.h[0].mlp.c_fc, run.optimizer.state
    before = copy.deepcopy([(p, state[p]["exp_avg"], state[p]["exp_avg_sq"])
                            for p in (fc.weight, fc.bias)])
    assert go_on(run, batches, [9]).kept[-1][0] == []
    lr = 0.02 * (10 - 9) / (10 - 1)
    for after, (weight, m, v), decay in zip((fc.weight, fc.bias), before, (0.1, 0.0)):
        # Adam's moments after a second gradient, of 0
        m, v = 0.9 * m / (1 - 0.9**2), 0.999 * v / (1 - 0.999**2)
        wanted = weight * (1 - lr * decay) - lr * m / (v.sqrt() + 1e-5)
        torch.testing.assert_close(after, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_where_all_stay_nothing_is_skipped_and_that_equals_masks_of_ones(method):
    run, batches = begin(method, 20, 1.0), make_batches(20)
    run.model.h[1].mlp.keep = torch.arange(3)  # from before
    for step in range(1, 21):
        go_on(run, batches, [step])
        assert all(block.mlp.keep is None for block in run.model.h)
    assert_same(run, reference(method, batches, 1.0))


@pytest.mark.parametrize("method, until, rounds", [
    *((method, 0.7, None) for method in METHODS),
    ("obs", 0.1, None), ("obs", 0.7, 4)])  # where v is reached before; between two rounds
def test_a_saved_state_goes_on_bit_identically(method, until, rounds):
    def new(seed):
        return begin(method, 30, model=make_model(torch.float32, seed), seed=seed, lambda_gum=10.0,
                     lambda_sim=0.3, prune_until=until, rounds=rounds)

    batches, file = make_batches(30), io.BytesIO()
    whole = go_on(new(0), batches, range(1, 14))
    parts = ("model", "pruner", "optimizer")
    torch.save({part: getattr(whole, part).state_dict() for part in parts}, file)
    file.seek(0)
    resumed = new(7)
    for part, state in torch.load(file, weights_only=True).items():
        getattr(resumed, part).load_state_dict(state)
    whole.kept, whole.losses, whole.norms = [], [], []
    assert_same(go_on(resumed, batches, range(14, 31)), go_on(whole, batches, range(14, 31)), 0)
    assert len(whole.C) == 3 * (method in (*LEARNED, "obs"))


# The schedule.


def test_leftover_follows_the_cubic_curve_through_its_corners():
    v = {t: prune.v_at(t, 0.2, steps=100) for t in range(1, 101)}
    assert v[1] == v[10] == pytest.approx(1.0, abs=1e-15)
    assert v[11] == pytest.approx(0.2 + 0.8 * (59 / 60) ** 3, abs=1e-15)
    assert v[40] == pytest.approx(0.2 + 0.8 / 8, abs=1e-15)
    assert v[69] == pytest.approx(0.2 + 0.8 / 60**3, abs=1e-15)
    assert v[70] == v[71] == v[100] == 0.2


@pytest.mark.parametrize("until, end", [(0.3, 30), (1.0, 100), (0.15, 15), (0.11, 11)])
def test_leftover_is_reached_when_it_is_asked_for(until, end):
    v = {t: prune.v_at(t, 0.2, steps=100, prune_until=until) for t in range(1, 101)}
    assert v[10] == 1.0 > v[11] and v[end - 1] > v[end] == v[100] == 0.2
    assert v[11] == pytest.approx(0.2 + 0.8 * ((end - 11) / (end - 10)) ** 3, abs=1e-15)


def test_pruning_begins_when_it_is_asked_to():
    v = {t: prune.v_at(t, 0.2, steps=100, prune_from=0.0, prune_until=0.1) for t in range(1, 101)}
    assert v[1] == 1.0 and v[10] == v[100] == 0.2
    assert v[2] == pytest.approx(0.2 + 0.8 * (8 / 9) ** 3, abs=1e-15)
    v = {t: prune.v_at(t, 0.2, steps=100, prune_from=0.3) for t in range(1, 101)}
    assert v[30] == 1.0 and v[31] == pytest.approx(0.2 + 0.8 * (39 / 40) ** 3, abs=1e-15)
    assert v[69] > v[70] == 0.2


@pytest.mark.parametrize("steps", [15, 26, 35, 55, 75, 95, 250, 1005])
def test_shares_are_of_the_steps_also_where_these_are_no_tens(steps):
    for since, until in ((0.0, 0.1), (0.1, 0.7), (0.3, 0.5), (0.5, 1.0)):
        v = [prune.v_at(t, 0.0, steps=steps, prune_from=since, prune_until=until)
             for t in range(1, steps + 1)]
        begun, ended = sum(share == 1.0 for share in v), v.index(0.0) + 1
        assert begun == pytest.approx(max(since * steps, 1), abs=1)
        assert ended == pytest.approx(until * steps, abs=1.5)  # the last three tenths are rounded
    v = [prune.v_at(t, 0.2, steps=95) for t in range(1, 96)]  # the paper's: 10, and 3 times 10
    assert v[9] == 1.0 > v[10] and v[63] > v[64] == 0.2


@pytest.mark.parametrize("steps, every", [(100, 1), (400, 1), (420, 2), (1000, 3), (3000, 8)])
def test_surgery_takes_at_most_forty_rounds_evenly_spread(steps, every, monkeypatch):
    pruner, examined = Pruner(make_model(), "obs", 0.25, steps), []
    when, real = pruner.when, pruner.examine
    monkeypatch.setattr(pruner, "examine", lambda: (examined.append(step), real()))
    for step in range(1, steps // 10 + 3):
        pruner.select(step)
    v = {t: prune.v_at(t, 0.25, **when) for t in range(1, steps + 1)}
    falls = [t for t in range(2, steps + 1) if v[t] < v[t - 1]]
    assert examined == falls == [*range(steps // 10, 1, -every)][::-1] and len(falls) <= 40
    smooth = when | dict(rounds=0)
    assert all(v[t] == prune.v_at(t, 0.25, **smooth) for t in falls) and v[1] == 1.0 > v[falls[0]]


def test_leftover_is_reached_at_once_if_it_should_be_before_the_warm_up_ends():
    assert [prune.v_at(t, 0.2, steps=100, prune_until=0.05) for t in (1, 10, 11, 100)
            ] == [1.0, 1.0, 0.2, 0.2]


@pytest.mark.parametrize("since, until", [(0.0, 0.1), (0.0, 1.0), (0.1, 0.1), (0.1, 0.3),
                                          (0.1, 0.7), (0.1, 1.0), (0.5, 0.7), (0.99, 0.2)])
@pytest.mark.parametrize("steps", [*range(1, 13), 15, 35, 55, 95, 250])
def test_leftover_never_rises_and_the_shortest_trainings_reach_it(steps, since, until):
    v = [prune.v_at(t, 0.25, steps=steps, prune_from=since, prune_until=until)
         for t in range(1, steps + 1)]
    assert v[-1] == 0.25 and (v[0] == 1.0 or steps == 1)  # at first nothing is known
    assert all(0.25 <= later <= earlier <= 1.0 for earlier, later in zip(v, v[1:]))
    factors = [prune.lr_factor(t, steps) for t in range(1, steps + 1)]
    assert factors[-1] == 0.0 and all(0.0 <= factor <= 1.0 for factor in factors)


def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_zero():
    factors = [prune.lr_factor(t, 100) for t in (1, 5, 10, 11, 55, 99, 100)]
    assert factors == pytest.approx([0.1, 0.5, 1, 89 / 90, 0.5, 1 / 90, 0])


def test_soft_movements_threshold_rises_along_the_same_curve():
    # sigmoid(S_j) = (j + 1/3) / 200: the number pruned tells the threshold, which goes from 0 to
    # 0.1 and comes to none of them closer than 1e-5.
    model, shares = make_model(widths=(200,)), [(j + 1 / 3) / 200 for j in range(200)]
    pruner = Pruner(model, "soft", 0.1, 100)
    pruner.scores.data.copy_(torch.tensor(shares, dtype=torch.float64).logit())
    for t in range(1, 101):
        pruned = sum(share < 0.1 * (1 - curve(t, 100)) for share in shares)
        assert pruner.select(t) == [200 - pruned]
        assert kept_neurons(model) == [list(range(pruned, 200))]


# The kept sets.


def scored(method, leftover, at=(), value=0.0, others=0.0, **settings):
    """A pruner, its scores `value` at the places `at` and `others` elsewhere, and its model."""
    model = make_model()
    pruner = Pruner(model, method, leftover, 10, **settings)
    pruner.scores.data.fill_(others)
    pruner.scores.data[list(at)] = torch.as_tensor(value, dtype=torch.float64)
    return pruner, model


@pytest.mark.parametrize("leftover", [0.1, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_exactly_its_share_of_every_layer_or_of_the_network_is_kept(scope, tied, leftover):
    pruner = Pruner(make_model(), "topv", leftover, 40, scope=scope)
    if not tied:
        pruner.scores.data.normal_(generator=torch.Generator().manual_seed(3))
    for t in range(1, 41):
        v_t, widths = leftover + (1 - leftover) * curve(t, 40), pruner.select(t)
        assert sum(widths) == round(v_t * N) or scope == "layer"
        assert widths == [round(v_t * m) for m in WIDTHS] or scope == "global"


def test_a_scope_needs_a_width_for_each_layer():
    with pytest.raises(ValueError):
        Pruner(make_model(), "topv", 0.25, 10, scope="9,3").select(10)


def test_the_papers_settings_are_the_defaults():
    paper = {method: dict(scope="layer", lambda_mvp=2.0, lambda_gum=0.0, lambda_sim=0.99, tau=0.1,
                          prune_from=0.1, prune_until=0.7)
             for method in ("magnitude", "random", "topv")}
    paper["gum"] = paper["topv"] | dict(scope="global", lambda_gum=10.0)
    paper["obs"] = dict(scope="global", lambda_sim=0.1, prune_from=0.0, prune_until=0.1)
    paper["soft"], paper["wanda"] = dict(tau=0.1, lambda_gum=0.0), dict(lambda_sim=0.1)
    for method, settings in paper.items():
        assert vars(Pruner(make_model(), method, 0.25, 10)).items() >= settings.items()
        given = dict(scope="global", lambda_mvp=0.0, lambda_gum=0.0, lambda_sim=0.5, tau=0.3,
                     prune_from=0.2, prune_until=0.3)
        assert vars(Pruner(make_model(), method, 0.25, 10, **given)).items() >= given.items()
    with pytest.raises(TypeError, match="lambda_gun"):
        Pruner(make_model(), "gum", 0.25, 10, lambda_gun=1.0)
    rates = dict(topv=1e-2, gum=1e-2, soft=10.0)
    assert {method: prune.defaults_of(method)["mask_lr"] for method in LEARNED} == rates


def test_ties_within_a_layer_go_to_the_lower_index():
    pruner, model = scored("topv", 0.25, [3, 15, 17, 19, 20, 21, 27], 1.0)
    pruner.select(10)
    assert kept_neurons(model) == [[0, 1, 3, 15], [1, 3, 4], [0, 1, 2, 3, 4]]


def test_ties_across_the_network_go_to_the_earlier_layer():
    pruner, model = scored("gum", 0.5, [2, 47], [-1.0, 1.0])
    pruner.select(10)
    assert kept_neurons(model) == [[j for j in range(16) if j != 2], list(range(8)), [19]]


def test_soft_movement_falls_back_on_the_best_where_too_few_are_above():
    # In layer 0 two are above tau = 0.1, in layer 1 one (sigmoid(-2) = 0.12), in layer 2 none.
    pruner, model = scored("soft", 0.25, [7, 9, 12, 4, 18], [3.0, 3.0, -5.0, -4.0, -2.0], -9.0)
    pruner.select(10)
    assert kept_neurons(model) == [[4, 7, 9, 12], [0, 1, 2], [0, 1, 2, 3, 4]]


def test_soft_movement_keeps_only_what_is_strictly_above():
    assert scored("soft", 0.25, tau=0.5)[0].select(10) == [4, 3, 5]  # sigmoid(0) is 0.5


# The scores.


def test_magnitude_is_the_norm_of_the_group():
    model = make_model(widths=(3, 2))
    mlp = model.h[0].mlp
    for parameter in (mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight):
        parameter.data.zero_()
    mlp.c_fc.weight.data[0, 5], mlp.c_fc.bias.data[0], mlp.c_proj.weight.data[6, 0] = -3, 4, -12
    mlp.c_fc.weight.data[1, :4] = 1.0
    mlp.c_proj.weight.data[:, 2] = 0.5
    pruner = Pruner(model, "magnitude", 0.5, 10)
    pruner.select(1)
    assert pruner.scores[:3].tolist() == pytest.approx([13, 2, math.sqrt(2)], rel=1e-12)


def test_random_scores_are_uniform_follow_the_seed_and_never_change():
    scores = Pruner(make_model(widths=(2000, 2000)), "random", 0.25, 10, seed=5).scores
    assert 0 <= scores.min() and scores.max() <= 1
    shares = torch.histc(scores, bins=10, min=0, max=1) / 4000
    torch.testing.assert_close(shares, torch.full_like(shares, 0.1), rtol=0, atol=0.03)
    a, b, c = (begin("random", 30, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(a.pruner.scores, b.pruner.scores)
    assert not torch.equal(a.pruner.scores, c.pruner.scores)
    go_on(a, make_batches(30))
    assert torch.equal(a.scores, b.pruner.scores) and a.scores.grad is None
    assert not a.scores.requires_grad and comebacks(a.kept) == 0


def test_the_regulariser_is_equation_4():
    S, U = [0.3, -2.0, 5.0], [0.0, 0.2, 0.7]
    terms = [(1 + 7.0 * u) / (1 + math.exp(-s)) for s, u in zip(S, U)]
    ours = prune.regulariser(*torch.tensor([S, U], dtype=torch.float64), 1.5, 7.0)
    assert ours.item() == pytest.approx(1.5 * sum(terms) / 3, rel=1e-12)


# The running similarity.


def test_copies_and_opposites_are_alike_and_orthogonal_or_dead_neurons_are_not():
    h = torch.tensor([[1.0, 2, -3, 0, 0], [0, 0, 0, 5, 0]], dtype=torch.float64)  # [tokens, k]
    alike = [0, 1, 1, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 0, 0], [0] * 5, [0] * 5
    ours = prune.similarity(h.T @ h)
    torch.testing.assert_close(ours, torch.tensor(alike, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [0, 1])
def test_a_layer_of_one_neuron_or_none_has_nothing_to_be_like(width):
    C = torch.full((width, width), 9.0)
    assert prune.similarity(C).shape == (width, width) and not prune.similarity(C).any()


def test_similarity_of_bfloat16_activations_is_summed_up_in_float32():
    # Summed up in bfloat16, 400 equal terms would stop growing at 256.
    model, held = make_model(torch.float32), []
    pruner, idx = Pruner(model, "gum", 1.0, 10, lambda_sim=0.3), make_batches(1)[0][0]
    pruner.select(10)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(400):
            with pruner.recording():
                model(idx)
        for block in model.h:
            block.mlp.record = held.append
        model(idx)
    for C, h in zip(pruner.C, held):
        h = h.detach().double().flatten(0, 1)  # [tokens, m]
        off = (C - 400 * 0.3 * h.T @ h).abs() / (400 * 0.3 * h.norm(dim=0)[:, None] * h.norm(dim=0))
        assert off.max() < 0.01


def test_what_is_measured_of_bfloat16_activations_is_summed_up_in_float32():
    model = GPT(GPTConfig(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    pruner, h = prune.Pruner(model, "obs", 0.5, 10), torch.randn(1, 500, 32).bfloat16()
    pruner.add(0, torch.zeros_like(h[0]), h[0])
    torch.testing.assert_close(pruner.sums[:-1].double(), h[0].double().square().sum(0),
                               rtol=1e-5, atol=0)


# The loss.

HOW = SimpleNamespace(label_smoothing=0.1, alpha_ce=0.3, alpha_kd=0.6, temperature=3.0,
                      compile=False)


def plain_loss(x, head, targets, teacher):
    """The loss of `HOW`, summed over n tokens, and its gradients; 61 at a time, for memory."""
    leaves, total = [leaf.clone().requires_grad_() for leaf in (x, head)], 0.0
    for some in torch.arange(len(x)).split(61):
        logits = leaves[0][some] @ leaves[1].T  # [61, V]
        log_p = logits.log_softmax(1)
        loss = -0.9 * log_p.gather(1, targets[some][:, None]).sum() - 0.1 * log_p.mean(1).sum()
        if teacher:
            p = (teacher[0][some] @ teacher[1].T / 3).softmax(1)  # [61, V]
            loss = 0.3 * loss + 5.4 * (p * (p.log() - (logits / 3).log_softmax(1))).sum()
        loss.backward()
        total += loss.detach()
    return total, *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("aligned", [1, 64])  # as on a CPU, as on a GPU
@pytest.mark.parametrize("n, taught, dtype, tolerance", [
    (0, False, torch.float64, 1e-12), (1, True, torch.float64, 1e-12),
    (340, False, torch.float64, 1e-12), (340, True, torch.float64, 1e-12),
    (340, True, torch.bfloat16, 0.02)])
def test_the_loss_of_a_large_vocabulary_goes_chunk_by_chunk(n, taught, dtype, tolerance, aligned,
                                                            monkeypatch):
    monkeypatch.setitem(prune.ALIGNED, "cpu", aligned)
    generator, V, sizes = torch.Generator().manual_seed(0), 50257, []
    x, head, *teacher = (torch.randn(rows, d, dtype=torch.float64, generator=generator)
                         for d in (4, 3) for rows in (n, V))
    targets, teacher = torch.randint(V, (n,), generator=generator), teacher if taught else None
    wanted = plain_loss(x, head, targets, teacher)

    def counted(logits, *rest, true=prune.token_loss):
        sizes.append(len(logits))
        return true(logits, *rest)

    monkeypatch.setattr(prune, "token_loss", counted)
    exact = torch.promote_types(dtype, torch.float32)
    ours = [leaf.to(exact).requires_grad_() for leaf in (x, head)]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = HeadLoss.apply(*ours, targets, teacher, HOW)
    (loss * 3 / 7).backward()
    assert sum(sizes) == n and max(sizes, default=0) < 200
    for ours, plain in zip([loss, *(leaf.grad * 7 / 3 for leaf in ours)], wanted):
        assert ours.dtype == exact and (ours - plain).norm() <= tolerance * plain.norm()


def test_the_loss_keeps_no_gradients_once_they_are_passed_on():
    leaf, head = torch.randn(5, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    loss = HeadLoss.apply(leaf, head, torch.arange(5), None, HOW)
    held = [weakref.ref(grad) for grad in loss.grad_fn.grads]
    loss.backward()
    leaf.grad = head.grad = None
    assert loss.isfinite() and [grad() for grad in held] == [None, None]


@pytest.mark.parametrize("method", ["gum", "obs"])
def test_compiled_layers_share_their_graphs(method, monkeypatch):
    # Each graph is a kernel to make, which takes seconds on a GPU. Traced is as there, with zeros
    # up to a multiple, but run as traced.
    real, counts = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **how: real(
        block, backend="eager", **how))
    monkeypatch.setitem(ALIGNED, "cpu", 8)
    for layers in (2, 8):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = make_model(widths=(24,) * layers)
        model.compile_blocks()
        trained(method, make_batches(30), model=model)
        found = torch._dynamo.utils.counters
        counts.append(found["stats"]["unique_graphs"])
        # Only there; older releases of torch do not say why.
        assert all("disable" in reason or "MLP.tell" in reason for reason in found["graph_break"])
    torch._dynamo.reset()
    # A width of 1 has graphs of its own, and here or there a layer comes to it.
    assert 0 < counts[1] < counts[0] + 3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.bfloat16, 0.01)])
def test_the_loss_that_is_compiled_is_the_same(dtype, tolerance):
    # Compiled, it is to read and write logits once, in their own dtype and at their full width.
    generator, V = torch.Generator().manual_seed(0), 11
    student, teacher = torch.randn(2, 7, V + 5, dtype=torch.float64, generator=generator).to(dtype)
    targets, head = torch.arange(7), torch.eye(V, dtype=torch.float64)  # leaves logits as they are
    taught = teacher[:, :V].double(), head
    wanted, wanted_grad, _ = plain_loss(student[:, :V].double(), head, targets, taught)
    for function in prune.token_loss, prune.compiled(prune.token_loss):
        leaf = student.clone().requires_grad_()
        loss = function(leaf, targets, teacher, V, HOW)
        grad, = torch.autograd.grad(loss, leaf)
        assert loss.dtype == torch.promote_types(dtype, torch.float32) and grad.dtype == dtype
        assert loss.item() == pytest.approx(wanted.item(), rel=min(tolerance, 1e-5))
        torch.testing.assert_close(grad[:, :V].double(), wanted_grad, rtol=tolerance, atol=1e-14)
        assert grad.shape == leaf.shape and not grad[:, V:].any()


def test_the_compiled_loss_serves_any_number_of_tokens(monkeypatch):
    # Of all sizes that alone varies: V, by which places are divided, is faster as a constant.
    real, shapes = torch.compile, []

    def backend(graph, inputs):
        values = (node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder"))
        shapes.append([size for x in values if isinstance(x, torch.Tensor) for size in x.shape])
        return graph.forward

    monkeypatch.setattr(torch, "compile",
                        lambda function, **how: real(function, backend=backend, **how))
    torch._dynamo.reset()
    function = prune.compiled.__wrapped__(prune.token_loss)
    for n in 5, 7, 9, 11:
        function(torch.randn(n, 16), torch.arange(n), torch.randn(n, 16), 13, HOW)
    torch._dynamo.reset()
    assert len(shapes) == 2 and shapes[0] == [5, 16, 5, 5, 16]
    assert [type(size) is int for size in shapes[1]] == [False, True, False, False, True]


def test_the_compiled_loss_keeps_nothing_of_the_logits_size_but_themselves():
    # In float32 they, and what is kept for the gradient, would be written and read again.
    logits, kept = torch.randn(128, 1027).bfloat16().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        how = SimpleNamespace(**vars(HOW) | dict(label_smoothing=0.0))
        loss = prune.compiled(prune.token_loss)(logits, torch.arange(128), None, 1021, how)
    assert loss.isfinite()
    large = [x for x in kept if x.numel() >= 128 * 1021]
    assert [x.dtype for x in large] == [torch.bfloat16] and large[0].shape == logits.shape


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
def test_distillation_is_the_divergence_from_teacher_to_student(temperature):
    generator, wanted = torch.Generator().manual_seed(0), 0.0
    student, teacher = 3 * torch.randn(2, 6, 11, dtype=torch.float64, generator=generator)  # [n, V]
    for s, t in zip(student.tolist(), teacher.tolist()):
        s, t = ([math.exp(x / temperature) for x in logits] for logits in (s, t))
        p, q = [x / sum(t) for x in t], [x / sum(s) for x in s]
        wanted += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q))
    ours = prune.distillation_loss(student, teacher, temperature).item()
    assert ours == pytest.approx(wanted, rel=1e-12)
    assert abs(prune.distillation_loss(student, student.clone(), temperature)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the model's
@pytest.mark.parametrize("taught, share", [(False, 1.0), (True, 0.3)])
def test_in_bfloat16_the_loss_is_not_rounded(taught, share, dtype):
    # All logits are 0, which is exact, and log(257) is not: bfloat16 has 8 bits.
    x, head = torch.ones(300, 1, dtype=dtype), torch.zeros(257, 1, dtype=dtype, requires_grad=True)
    how = SimpleNamespace(**vars(HOW) | dict(label_smoothing=0.0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = HeadLoss.apply(x, head, torch.zeros(300, dtype=torch.long),
                              (x, head.detach()) if taught else None, how)
    assert loss.item() == pytest.approx(share * 300 * math.log(257), rel=1e-5)


def test_the_heads_gradient_is_summed_up_in_float32():
    # In bfloat16 256 + 1 is 256: what the later blocks of 128 tokens add would be lost.
    x, head = torch.ones(9 * 128, 1), torch.zeros(50257, 1, requires_grad=True)
    x[:128] = 256
    how = SimpleNamespace(**vars(HOW) | dict(label_smoothing=0.0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = HeadLoss.apply(x, head, torch.zeros(len(x), dtype=torch.long), None, how)
    loss.backward()
    assert head.grad[0].item() == pytest.approx(-128 * (256 + 8), rel=1e-3)


# The end.


def pruned_to(sets):
    """A model whose layers keep the neurons in `sets`, and its pruner."""
    starts = [sum(WIDTHS[:layer]) for layer in range(3)]
    above = [start + j for start, neurons in zip(starts, sets) for j in neurons]
    pruner, model = scored("soft", 0.0, above, 9.0, -9.0)
    assert pruner.select(10) == list(map(len, sets))
    return pruner, model


SETS = {"some": [[0, 3, 4, 9, 15], [2], list(range(1, 18))],
        "all of a layer": [list(range(16)), [5, 6], [0, 19]],
        "none of a layer": [[], [0, 11], []],
        "none at all": [[], [], []]}


@pytest.mark.parametrize("multiple_of", [1, 8])
@pytest.mark.parametrize("sets", SETS.values(), ids=SETS.keys())
def test_a_shrunk_model_is_the_same_function(sets, multiple_of):
    _, model = pruned_to(sets)
    whole = [(block.mlp.c_fc.weight, block.mlp.c_fc.bias, block.mlp.c_proj.weight)
             for block in model.h]
    idx, _, _ = make_batches(1)[0]
    before, _ = model(idx)
    assert prune.shrink(model, multiple_of) is model
    torch.testing.assert_close(model(idx)[0], before, rtol=0, atol=1e-12)
    widths = [-(-len(neurons) // multiple_of) * multiple_of for neurons in sets]
    assert list(model.config.mlp_widths) == widths
    for block, width, (w1, b1, w2), kept in zip(model.h, widths, whole, sets):
        fc, proj, k = block.mlp.c_fc, block.mlp.c_proj, len(kept)
        assert fc.weight.shape == (width, 8) and fc.bias.shape == (width,)
        assert proj.weight.shape == (8, width) and fc.out_features == proj.in_features == width
        assert torch.equal(fc.weight[:k], w1[kept]) and torch.equal(fc.bias[:k], b1[kept])
        assert torch.equal(proj.weight[:, :k], w2[:, kept]) and not proj.weight[:, k:].any()
        assert not fc.weight[k:].any() and not fc.bias[k:].any()


def test_a_shrunk_model_skips_nothing_and_trains_on():
    model = prune.shrink(pruned_to(SETS["none of a layer"])[1])
    assert kept_neurons(model) == [[], [0, 1], []]
    run = go_on(begin("none", 10, 1.0, model), make_batches(1) * 10)
    assert run.losses[-1] < run.losses[0]
