"""Fine-pruning against a reference written here from the equations alone.

The reference works in float64 with whole masks that multiply the weights, autograd through the mask to the scores
(straight through), sorting in Python, Gram matrices of all neurons and a uniqueness summed by loops. `prune.py` skips
the pruned neurons and writes the scores' gradient out by hand; both must go through the same training.

Shapes: B sequences, T tokens each, d = n_embd, m neurons in an MLP of which k are kept, N = all neurons of the network.
"""

import copy
import io
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import prune
from model import GPT, GPTConfig, HeadLoss
from prune import Pruner

WIDTHS = (16, 12, 20)  # neurons per layer, unequal so that none is taken for another
N = sum(WIDTHS)
METHODS = ("magnitude", "random", "topv", "soft", "gum")
CLIP = 1.0  # the largest gradient norm: some steps exceed it, some do not
ARGS = SimpleNamespace(dtype="float32", label_smoothing=0.0)  # no autocast: the model's own precision


def make_model(dtype=torch.float64, seed=0, widths=WIDTHS):
    """A small GPT-2 whose weights and biases are all large enough to matter."""
    config = GPTConfig(vocab_size=11, n_positions=8, n_embd=8, n_layer=len(widths), n_head=2, mlp_widths=widths)
    model = GPT(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.empty_like(parameter).normal_(0.0, 0.4, generator=generator)
    for layer, block in enumerate(model.h):  # layers of unequal strength, so that they lose unequal shares
        block.mlp.c_fc.weight.data *= 1 + layer / 2
    return model


def make_batches(steps, size=4, seed=2):
    """(idx, targets, real), each [B, T], for every step. Rows end in padding: not `real`, with the target -100."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(steps):
        tokens = torch.randint(11, (size, 8), generator=generator)  # [B, T + 1]
        lengths = torch.randint(4, 8, (size, 1), generator=generator)  # [B, 1]
        real = torch.arange(7) < lengths  # [B, T]
        batches.append((tokens[:, :-1], tokens[:, 1:].masked_fill(~real, -100), real))
    return batches


def task_loss(logits, targets):
    """The model's own loss, but in the logits' precision."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_optimizer(model, scores=None, mask_lr=0.0, lr=0.02, weight_decay=0.1):
    """AdamW with decay on matrices, none on biases, norms and scores; the scores have a learning rate of their own."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "lr": lr, "weight_decay": weight_decay}, {"params": vectors, "lr": lr}]
    if scores is not None and scores.requires_grad:
        groups.append({"params": [scores], "lr": mask_lr})
    for group in groups:
        group["peak"] = group["lr"]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-4, weight_decay=0.0)


def kept_neurons(model):
    """The indices of the kept neurons of each layer, as lists."""
    mlps = [block.mlp for block in model.h]
    return [list(range(mlp.c_fc.out_features)) if mlp.keep is None else mlp.keep.tolist() for mlp in mlps]


def fine_prune(model, pruner, optimizer, batches, steps=None, parts=1):
    """`prune.py` at work, a step per batch. Returns the kept neurons at every step."""
    history = []
    for step in steps or range(1, len(batches) + 1):
        micro_batches = data.micro_batches(batches[step - 1], "cpu", parts)
        widths, _, _ = prune.fine_prune(model, pruner, optimizer, micro_batches, step, ARGS)
        history.append(kept_neurons(model))
        assert widths == [len(kept) for kept in history[-1]]
    return history


# The reference.


class MaskedMLP(nn.Module):
    """An MLP with W1' = M * W1 (rows), b1' = M * b1, W2' = W2 * M (columns); every neuron is computed."""

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


def masked_copy(model):
    model = copy.deepcopy(model)
    for block in model.h:
        block.mlp = MaskedMLP(block.mlp)
    return model


def curve(t, T):
    """How far v_t still is from v, as a share of 1 - v (T a multiple of 10)."""
    w = T // 10
    if t <= w:
        return 1.0
    return 0.0 if t > T - 3 * w else (1 - (t - w) / (T - 4 * w)) ** 3


def best(scores, count):
    """The `count` largest of a list of scores, the lower index first among ties, as a set of indices."""
    return set(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:count])


def reference_kept(S, method, scope, t, T, leftover, tau, widths=WIDTHS):
    """A list of 0/1 masks [m], one per layer, for scores `S` [N] at step t of T."""
    v_t = leftover + (1 - leftover) * curve(t, T)
    layers = [layer.tolist() for layer in S.detach().split(widths)]
    if method == "soft":
        kept = []
        for scores in layers:
            above = {j for j, s in enumerate(scores) if 1 / (1 + math.exp(-s)) > tau * (1 - curve(t, T))}
            kept.append(above if len(above) >= leftover * len(scores) else best(scores, round(leftover * len(scores))))
    elif scope == "layer":
        kept = [best(scores, round(v_t * len(scores))) for scores in layers]
    else:
        everywhere = best(sum(layers, []), round(v_t * len(S)))
        kept = [{j - sum(widths[:i]) for j in everywhere if 0 <= j - sum(widths[:i]) < m} for i, m in enumerate(widths)]
    return [torch.tensor([float(j in neurons) for j in range(m)], dtype=S.dtype) for neurons, m in zip(kept, widths)]


def running(pruner):
    """Each layer's C [m, m], from its upper triangle and its scale."""
    return [pruner.gram_scale * (C.triu() + C.triu(1).T) for C in pruner.gram]


def reference_uniqueness(C, kept):
    """U [m] of one layer: for kept j the mean over the kept of |cos(h_j, h_i)|, i = j left out; 0 for pruned j."""
    U, C = [0.0] * len(C), C.tolist()
    kept = [j for j in range(len(C)) if kept[j]]
    for j in kept:
        for i in kept:
            if i != j and C[i][i] > 0 and C[j][j] > 0:
                U[j] += abs(C[i][j]) / math.sqrt(C[i][i] * C[j][j]) / len(kept)
    return torch.tensor(U, dtype=torch.float64)


def reference_regulariser(S, grams, masks, scale, lambda_mvp, lambda_gum):
    """R(S), or R_sim(S) where lambda_gum > 0, for scores `S` [N]; autograd does the rest."""
    U = torch.cat([reference_uniqueness(C, kept) for C, kept in zip(grams, masks)])  # [N]
    return lambda_mvp * scale / len(S) * ((1 + lambda_gum * U) * torch.sigmoid(S)).sum()


def reference_run(model, scores, method, scope, batches, leftover, mask_lr, weight_decay=0.1, lambda_mvp=2.0,
                  lambda_gum=0.0, lambda_sim=0.99, tau=0.1):
    """Fine-prune a masked copy of `model`. Returns it, the scores [N] and the kept neurons at every step."""
    T, learned = len(batches), method in ("topv", "soft", "gum")
    model, S = masked_copy(model), scores.detach().clone().requires_grad_(learned)  # [N]
    mlps = [block.mlp for block in model.h]
    widths = [len(mlp.M) for mlp in mlps]
    optimizer = make_optimizer(model, S, mask_lr, weight_decay=weight_decay)
    grams = [torch.zeros(m, m, dtype=torch.float64) for m in widths]
    history = []
    for t, (idx, targets, real) in enumerate(batches, 1):
        if method == "magnitude":
            groups = [torch.cat([mlp.c_fc.weight, mlp.c_fc.bias[:, None], mlp.c_proj.weight.T], 1) for mlp in mlps]
            S = torch.cat([group.norm(dim=1) for group in groups])
        masks = reference_kept(S, method, scope, t, T, leftover, tau, widths)
        history.append([mask.nonzero().flatten().tolist() for mask in masks])
        for mlp, mask, s in zip(mlps, masks, S.split(widths)):
            mlp.M = mask + s - s.detach() if learned else mask
        optimizer.zero_grad()
        loss = task_loss(model(idx)[0], targets)
        hs = [mlp.h.detach()[real] for mlp in mlps]  # [tokens, m] each
        grams = [(1 - lambda_sim) * C + lambda_sim * h.T @ h for C, h in zip(grams, hs)]
        if learned:
            v_t = leftover + (1 - leftover) * curve(t, T)
            scale = 1 - curve(t, T) if method == "soft" else v_t / leftover
            loss = loss + reference_regulariser(S, grams, masks, scale, lambda_mvp, lambda_gum)
        loss.backward()
        norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in model.parameters()))
        for parameter in model.parameters():
            parameter.grad *= min(1.0, CLIP / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (t / (T // 10) if t <= T // 10 else (T - t) / (T - T // 10))
        optimizer.step()
    return model, S.detach(), history


def assert_same_training(model, method, batches, leftover, mask_lr, scope, weight_decay=0.1, **settings):
    """Run both, compare kept neurons at every step, parameters and scores; returns the kept neurons of every step."""
    start = copy.deepcopy(model)
    pruner = Pruner(model, method, leftover, len(batches), scope=scope, **settings)
    optimizer = make_optimizer(model, pruner.scores, mask_lr, weight_decay=weight_decay)
    drawn = pruner.scores.detach().clone()  # zero, or what `random` has drawn
    history = fine_prune(model, pruner, optimizer, batches)
    settings.setdefault("lambda_gum", 10.0 if method == "gum" else 0.0)
    expected, scores, expected_history = reference_run(
        start, drawn, method, scope, batches, leftover, mask_lr, weight_decay, **settings)
    assert history == expected_history
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=lambda text: f"{name}: {text}")
    if method != "magnitude":  # whose scores are of the last selection
        torch.testing.assert_close(pruner.scores.detach(), scores, rtol=0, atol=1e-9)
    return history


def comebacks(history):
    """How many times a neuron is kept right after a step in which it was pruned."""
    return sum(len(set(now) - set(before)) for a, b in zip(history, history[1:]) for before, now in zip(a, b))


# The whole training.

MASK_LR = {"magnitude": 0.0, "random": 0.0, "topv": 0.05, "soft": 1.0, "gum": 0.05}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("method", METHODS)
def test_training_is_the_reference(method, scope):
    history = assert_same_training(make_model(), method, make_batches(40), 0.25, MASK_LR[method], scope)
    if method != "soft":  # which may leave more
        assert sum(map(len, history[-1])) == N // 4
    assert sum(map(len, history[-1])) < N
    if method in ("topv", "soft", "gum"):
        assert comebacks(history) > 0
    if scope == "global" and method != "soft":
        assert len({len(kept) / m for kept, m in zip(history[-1], WIDTHS)}) > 1


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("method, lambda_gum", [("gum", 0.0), ("gum", 100.0), ("topv", 10.0), ("soft", 10.0)])
def test_uniqueness_is_a_switch_of_its_own(method, lambda_gum, scope):
    history = assert_same_training(make_model(), method, make_batches(30), 0.25, MASK_LR[method], scope,
                                   lambda_gum=lambda_gum, lambda_sim=0.4, lambda_mvp=5.0)
    assert comebacks(history) > 0


def test_gum_without_uniqueness_is_global_hard_movement():
    runs = []
    for method, settings in (("gum", {"lambda_gum": 0.0}), ("topv", {"scope": "global"})):
        model = make_model()
        pruner = Pruner(model, method, 0.25, 20, **settings)
        fine_prune(model, pruner, make_optimizer(model, pruner.scores, 0.03), make_batches(20))
        runs.append([*model.parameters(), pruner.scores])
    assert all(map(torch.equal, *runs))


def test_magnitude_lets_a_neuron_back_in_when_a_kept_one_shrinks_below_it():
    history = assert_same_training(make_model(), "magnitude", make_batches(60), 0.5, 0.0, "global", weight_decay=5.0)
    assert comebacks(history) > 0


def test_training_through_emptied_layers_is_the_reference():
    history = assert_same_training(make_model(), "gum", make_batches(40), 0.05, 0.05, "global", lambda_mvp=0.1,
                                   lambda_gum=100.0, lambda_sim=0.05)
    empty = [[not kept for kept in sets] for sets in history]  # at each step, for each layer
    assert any(sum(layers) == 2 for layers in empty)
    assert all(layers[1] for layers in empty[-10:])  # for good
    assert any(before[0] and not after[0] for before, after in zip(empty, empty[1:]))  # and another that comes back


def test_training_goes_on_when_the_whole_network_is_emptied():
    history = assert_same_training(make_model(), "gum", make_batches(30), 0.01, 0.03, "global", lambda_mvp=0.1)
    assert history[-1] == history[-9] == [[], [], []]


def test_the_weights_of_an_emptied_layer_still_decay_and_move_on():
    model, batches = make_model(), make_batches(10)
    pruner = Pruner(model, "topv", 0.5, 10, scope="global", lambda_mvp=0.0)
    optimizer = make_optimizer(model, pruner.scores)
    fine_prune(model, pruner, optimizer, batches, [1])  # everything is kept, and gathers momentum
    pruner.scores.data[: WIDTHS[0]] = -1.0
    fc = model.h[0].mlp.c_fc
    state = optimizer.state
    before = copy.deepcopy([(p, state[p]["exp_avg"], state[p]["exp_avg_sq"]) for p in (fc.weight, fc.bias)])
    assert fine_prune(model, pruner, optimizer, batches, [9])[0][0] == []
    lr = 0.02 * (10 - 9) / (10 - 1)
    for after, (weight, m, v), decay in zip((fc.weight, fc.bias), before, (0.1, 0.0)):
        m, v = 0.9 * m / (1 - 0.9**2), 0.999 * v / (1 - 0.999**2)  # Adam's moments after a second gradient, of 0
        expected = weight * (1 - lr * decay) - lr * m / (v.sqrt() + 1e-4)
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_leftover_one_trains_the_weights_of_plain_training(method):
    batches = make_batches(20)
    plain = make_model()
    optimizer = make_optimizer(plain)
    for t, (idx, targets, _) in enumerate(batches, 1):
        optimizer.zero_grad()
        task_loss(plain(idx)[0], targets).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (t / 2 if t <= 2 else (20 - t) / 18)
        optimizer.step()
    model = make_model()
    pruner = Pruner(model, method, 1.0, 20)
    fine_prune(model, pruner, make_optimizer(model, pruner.scores, MASK_LR[method]), batches)
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_two_half_batches_make_the_step_of_the_whole_batch():
    batches, (one, halves) = make_batches(20), (make_model(), make_model())
    pruner = Pruner(one, "topv", 0.25, 20)
    fine_prune(one, pruner, make_optimizer(one, pruner.scores, 0.03), batches)
    expected = pruner.scores
    pruner = Pruner(halves, "topv", 0.25, 20)
    fine_prune(halves, pruner, make_optimizer(halves, pruner.scores, 0.03), batches, parts=2)
    assert kept_neurons(one) == kept_neurons(halves)
    for ours, theirs in zip([*halves.parameters(), pruner.scores], [*one.parameters(), expected]):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_state_goes_on_bit_identically(method):
    batches = make_batches(30)
    settings = {"leftover": 0.25, "steps": 30, "lambda_gum": 10.0, "lambda_sim": 0.3}
    whole = make_model(torch.float32)
    pruner = Pruner(whole, method, **settings)
    optimizer = make_optimizer(whole, pruner.scores, MASK_LR[method])
    fine_prune(whole, pruner, optimizer, batches, range(1, 14))
    file = io.BytesIO()
    torch.save({part: thing.state_dict() for part, thing in
                (("model", whole), ("optimizer", optimizer), ("pruner", pruner))}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    history = fine_prune(whole, pruner, optimizer, batches, range(14, 31))

    resumed = make_model(torch.float32, seed=7)
    resumed.load_state_dict(saved["model"])
    resumed_pruner = Pruner(resumed, method, **settings, seed=7)
    resumed_pruner.load_state_dict(saved["pruner"])
    optimizer = make_optimizer(resumed, resumed_pruner.scores, MASK_LR[method])
    optimizer.load_state_dict(saved["optimizer"])
    assert fine_prune(resumed, resumed_pruner, optimizer, batches, range(14, 31)) == history
    assert all(map(torch.equal, [*resumed.parameters(), resumed_pruner.scores], [*whole.parameters(), pruner.scores]))


# The schedule.


def test_leftover_follows_the_cubic_curve_through_its_corners():
    v = {t: prune.leftover_at(t, 100, 0.2) for t in range(1, 101)}
    assert v[1] == v[10] == pytest.approx(1.0, abs=1e-15)
    assert v[11] == pytest.approx(0.2 + 0.8 * (59 / 60) ** 3, abs=1e-15)
    assert v[40] == pytest.approx(0.2 + 0.8 / 8, abs=1e-15)
    assert v[69] == pytest.approx(0.2 + 0.8 / 60**3, abs=1e-15)
    assert v[70] == v[71] == v[100] == 0.2


def test_leftover_never_rises():
    v = [prune.leftover_at(t, 250, 0.1) for t in range(1, 251)]
    assert all(later <= earlier for earlier, later in zip(v, v[1:]))


@pytest.mark.parametrize("steps", range(1, 13))
def test_the_shortest_trainings_end_at_the_wanted_leftover(steps):
    v = [prune.leftover_at(t, steps, 0.25) for t in range(1, steps + 1)]
    assert v[-1] == 0.25
    assert all(0.25 <= later <= earlier <= 1.0 for earlier, later in zip(v, v[1:]))
    factors = [prune.lr_factor(t, steps) for t in range(1, steps + 1)]
    assert factors[-1] == 0.0 and all(0.0 <= factor <= 1.0 for factor in factors)


def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_zero():
    factors = {t: prune.lr_factor(t, 100) for t in range(1, 101)}
    assert [factors[t] for t in (1, 5, 10, 11, 55, 99, 100)] == pytest.approx([0.1, 0.5, 1, 89 / 90, 0.5, 1 / 90, 0])


def test_soft_movements_threshold_rises_along_the_same_curve():
    # sigmoid(S) of neuron j is (j + 1/2) / 200, so the number pruned tells the threshold: 0 to 0.1 in steps of 1/200.
    model = make_model(widths=(200,))
    pruner = Pruner(model, "soft", 0.1, 100)
    pruner.scores.data.copy_(torch.logit((torch.arange(200) + 0.5) / 200))
    for t in range(1, 101):
        pruned = sum((j + 0.5) / 200 <= 0.1 * (1 - curve(t, 100)) for j in range(200))
        assert pruner.select(t) == [200 - pruned]
        assert kept_neurons(model) == [list(range(pruned, 200))]


# The kept sets.


@pytest.mark.parametrize("leftover", [0.1, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("tied", [True, False])
def test_layer_scope_keeps_exactly_its_share_of_every_layer_at_every_step(leftover, tied):
    pruner = Pruner(make_model(), "topv", leftover, 40)
    if not tied:
        pruner.scores.data.normal_(generator=torch.Generator().manual_seed(3))
    for t in range(1, 41):
        v_t = leftover + (1 - leftover) * curve(t, 40)
        assert pruner.select(t) == [round(v_t * m) for m in WIDTHS]


@pytest.mark.parametrize("leftover", [0.1, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("tied", [True, False])
def test_global_scope_keeps_exactly_its_share_of_the_network_at_every_step(leftover, tied):
    pruner = Pruner(make_model(), "gum", leftover, 40)
    if not tied:
        pruner.scores.data.normal_(generator=torch.Generator().manual_seed(3))
    for t in range(1, 41):
        assert sum(pruner.select(t)) == round((leftover + (1 - leftover) * curve(t, 40)) * N)


@pytest.mark.parametrize("method, scope",
                         [("magnitude", "layer"), ("random", "layer"), ("topv", "layer"), ("gum", "global")])
def test_the_papers_scope_is_the_default(method, scope):
    sets = []
    for chosen in (None, scope):
        model = make_model()
        pruner = Pruner(model, method, 0.25, 10, scope=chosen)
        if method in ("topv", "gum"):
            pruner.scores.data.normal_(generator=torch.Generator().manual_seed(3))
        pruner.select(10)
        sets.append(kept_neurons(model))
    assert sets[0] == sets[1]
    assert (list(map(len, sets[0])) == [4, 3, 5]) == (scope == "layer")


def test_ties_within_a_layer_go_to_the_lower_index():
    model = make_model()
    pruner = Pruner(model, "topv", 0.25, 10)
    pruner.scores.data[[3, 15]] = 1.0  # of layer 0, where all others are 0
    pruner.scores.data[16:28] = torch.tensor([0, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1])  # layer 1
    pruner.select(10)
    assert kept_neurons(model) == [[0, 1, 3, 15], [1, 3, 4], [0, 1, 2, 3, 4]]


def test_ties_across_the_network_go_to_the_earlier_layer():
    model = make_model()
    pruner = Pruner(model, "gum", 0.5, 10)
    pruner.scores.data[2], pruner.scores.data[47] = -1.0, 1.0
    pruner.select(10)
    assert kept_neurons(model) == [[j for j in range(16) if j != 2], list(range(8)), [19]]


def test_soft_movement_falls_back_on_the_best_where_too_few_are_above():
    model = make_model()
    pruner = Pruner(model, "soft", 0.25, 10)
    pruner.scores.data.fill_(-9.0)  # sigmoid < tau = 0.1
    pruner.scores.data[[7, 9, 12, 4]] = torch.tensor([3.0, 3.0, -5.0, -4.0], dtype=torch.float64)  # layer 0: two above
    pruner.scores.data[16 + 2] = -2.0  # layer 1: one above; sigmoid(-2) = 0.12
    pruner.select(10)
    assert kept_neurons(model) == [[4, 7, 9, 12], [0, 1, 2], [0, 1, 2, 3, 4]]


def test_soft_movement_may_leave_more_than_wanted():
    model = make_model()
    pruner = Pruner(model, "soft", 0.25, 10)
    pruner.scores.data.fill_(-9.0)
    above = [list(range(1, 16, 2)), [0, 1, 2, 11], list(range(20))]
    for scores, neurons in zip(pruner.scores.data.split(WIDTHS), above):
        scores[neurons] = -2.0  # all equal, all above the threshold: all stay
    assert pruner.select(10) == [8, 4, 20]
    assert kept_neurons(model) == above


def test_soft_movement_keeps_only_what_is_strictly_above():
    pruner = Pruner(make_model(), "soft", 0.25, 10, tau=0.5)  # sigmoid(0) is 0.5
    assert pruner.select(10) == [4, 3, 5]


# The scores.


def test_learned_scores_start_at_zero():
    for method in ("topv", "soft", "gum"):
        scores = Pruner(make_model(), method, 0.5, 10).scores
        assert scores.shape == (N,) and not scores.any()


def test_magnitude_is_the_norm_of_the_group():
    model = make_model(widths=(3, 2))
    mlp = model.h[0].mlp
    for parameter in (mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight):
        parameter.data.zero_()
    mlp.c_fc.weight.data[0, 5], mlp.c_fc.bias.data[0], mlp.c_proj.weight.data[6, 0] = -3.0, 4.0, -12.0
    mlp.c_fc.weight.data[1, :4] = 1.0
    mlp.c_proj.weight.data[:, 2] = 0.5
    pruner = Pruner(model, "magnitude", 0.5, 10)
    pruner.select(1)
    torch.testing.assert_close(pruner.scores.data[:3], torch.tensor([13.0, 2.0, math.sqrt(2)], dtype=torch.float64))


def test_magnitude_is_taken_anew_at_every_step():
    model = make_model(widths=(4,))
    pruner = Pruner(model, "magnitude", 0.25, 10)
    for j in (3, 1):
        for parameter in (model.h[0].mlp.c_fc.weight, model.h[0].mlp.c_fc.bias):
            parameter.data[j] *= 100
        pruner.select(10)
        assert kept_neurons(model) == [[j]]
        for parameter in (model.h[0].mlp.c_fc.weight, model.h[0].mlp.c_fc.bias):
            parameter.data[j] /= 100


def test_random_scores_stay_bit_equal_and_only_lose_neurons():
    model = make_model(torch.float32)
    pruner = Pruner(model, "random", 0.25, 30)
    drawn = pruner.scores.detach().clone()
    history = fine_prune(model, pruner, make_optimizer(model, pruner.scores, 1.0), make_batches(30))
    assert torch.equal(pruner.scores, drawn) and not pruner.scores.requires_grad and pruner.scores.grad is None
    assert comebacks(history) == 0


def test_random_scores_are_uniform_and_follow_the_seed():
    scores = Pruner(make_model(widths=(2000, 2000)), "random", 0.25, 10, seed=5).scores
    assert 0 <= scores.min() and scores.max() <= 1
    shares = torch.histc(scores, bins=10, min=0, max=1) / 4000
    torch.testing.assert_close(shares, torch.full((10,), 0.1, dtype=shares.dtype), rtol=0, atol=0.03)
    draws = [Pruner(make_model(), "random", 0.25, 10, seed=seed).scores for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_pruned_neuron_feels_the_regulariser_and_nothing_else():
    model = make_model()
    pruner = Pruner(model, "gum", 0.25, 20, lambda_mvp=3.0)
    generator = torch.Generator().manual_seed(3)
    pruner.scores.data.normal_(generator=generator)
    pruner.select(20)
    idx, targets, _ = make_batches(1)[0]
    with pruner.observing():
        logits, _ = model(idx)
    task_loss(logits, targets).backward()
    pruner.score_gradient(20)
    sigmoid = 1 / (1 + torch.exp(-pruner.scores.detach()))
    alone = 3.0 / N * sigmoid * (1 - sigmoid)  # lambda_t = lambda_mvp v / v, U = 0
    grads = pruner.scores.grad.split(WIDTHS)
    for block, kept, grad, regulariser in zip(model.h, kept_neurons(model), grads, alone.split(WIDTHS)):
        pruned = [j for j in range(len(grad)) if j not in kept]
        fc, proj = block.mlp.c_fc, block.mlp.c_proj
        assert not fc.weight.grad[pruned].any() and not fc.bias.grad[pruned].any()
        assert not proj.weight.grad[:, pruned].any()
        torch.testing.assert_close(grad[pruned], regulariser[pruned], rtol=0, atol=1e-15)
        assert ((grad - regulariser)[kept].abs() > 1e-6).all()


@pytest.mark.parametrize("method", ["topv", "soft", "gum"])
@pytest.mark.parametrize("t", [1, 4, 9, 15, 20])
def test_the_regularisers_gradient_is_autograds(method, t):
    model = make_model()
    pruner = Pruner(model, method, 0.25, 20, lambda_mvp=1.5, lambda_gum=7.0, lambda_sim=0.5)
    pruner.scores.data.normal_(generator=torch.Generator().manual_seed(3))
    pruner.select(t)
    kept = kept_neurons(model)
    masks = [torch.tensor([float(j in neurons) for j in range(m)]) for neurons, m in zip(kept, WIDTHS)]
    with pruner.observing():
        model(make_batches(1)[0][0])
    pruner.score_gradient(t)  # without a backward pass there is no task gradient
    S = pruner.scores.detach().clone().requires_grad_()
    scale = 1 - curve(t, 20) if method == "soft" else 1 + 3 * curve(t, 20)  # tau_t / tau, or v_t / v
    reference_regulariser(S, running(pruner), masks, scale, 1.5, 7.0).backward()
    torch.testing.assert_close(pruner.scores.grad, S.grad, rtol=0, atol=1e-15)


# The running similarity.


def prune_at_random(pruner, seed):
    """Keep a random half of the network's neurons."""
    pruner.scores.data.normal_(generator=torch.Generator().manual_seed(seed))
    pruner.select(pruner.steps)


def masked_activations(model, idx):
    """h [B, T, m] of each layer, 0 where pruned, by multiplying with masks."""
    masked = masked_copy(model)
    for block, kept in zip(masked.h, kept_neurons(model)):
        block.mlp.M = torch.tensor([float(j in kept) for j in range(len(block.mlp.M))], dtype=torch.float64)
    masked(idx)
    return [block.mlp.h.detach() for block in masked.h]


def test_running_similarity_is_an_average_of_gram_matrices():
    # Neurons come and go between steps, and each step has two forward passes, each of which counts.
    model = make_model()
    pruner = Pruner(model, "gum", 0.5, 10, lambda_sim=0.3)
    terms, kept = [[], [], []], []  # the Gram matrices of each layer; the kept neurons at each step
    batches = iter(make_batches(12))
    for step in range(6):
        prune_at_random(pruner, seed=step)
        kept.append(kept_neurons(model))
        for _ in range(2):
            idx, _, _ = next(batches)
            for layer, h in enumerate(masked_activations(model, idx)):
                terms[layer].append(torch.einsum("bti,btj->ij", h, h))  # [m, m]
            with pruner.observing():
                model(idx)
    assert comebacks(kept) > 10
    for C, grams in zip(running(pruner), terms):
        direct = sum(0.3 * 0.7 ** (11 - s) * gram for s, gram in enumerate(grams))  # [m, m]
        torch.testing.assert_close(C, direct, rtol=0, atol=1e-12)


def test_padding_is_left_out_of_the_similarity():
    model = make_model()
    pruner = Pruner(model, "gum", 0.5, 10, lambda_sim=0.3)
    prune_at_random(pruner, seed=0)
    idx, _, real = make_batches(1)[0]
    real = real.flip(1)  # padding on the left
    with pruner.observing(real.flatten().nonzero().squeeze(1)):
        model(idx)
    for C, h in zip(running(pruner), masked_activations(model, idx)):
        direct = sum(0.3 * torch.outer(h[b, t], h[b, t]) for b, t in real.nonzero().tolist())  # [m, m]
        torch.testing.assert_close(C, direct, rtol=0, atol=1e-12)


def test_uniqueness_is_the_mean_absolute_cosine_to_the_other_kept_neurons():
    model = make_model()
    pruner = Pruner(model, "gum", 0.5, 10, lambda_sim=0.3)
    signs = set()
    for step, (idx, _, real) in enumerate(make_batches(4)):
        prune_at_random(pruner, seed=step)
        with pruner.observing(real.flatten().nonzero().squeeze(1)):
            model(idx)
        for U, C, kept, m in zip(pruner.uniqueness_penalty.split(WIDTHS), running(pruner), kept_neurons(model), WIDTHS):
            expected = reference_uniqueness(C, [j in kept for j in range(m)])
            torch.testing.assert_close(U, expected, rtol=0, atol=1e-13)
            assert U.any() and not U[[j for j in range(m) if j not in kept]].any()
            signs |= set(C[kept][:, kept].sign().flatten().tolist())
    assert {-1.0, 1.0} <= signs  # opposite neurons are alike too


def test_copies_and_opposites_count_fully_and_orthogonal_neurons_not_at_all():
    h = torch.tensor([[1.0, 2.0, -3.0, 0.0], [0.0, 0.0, 0.0, 5.0]], dtype=torch.float64)  # [tokens, k]
    expected = torch.tensor([0.5, 0.5, 0.5, 0.0], dtype=torch.float64)  # two of four others, itself left out
    torch.testing.assert_close(prune.update_gram(torch.zeros(4, 4, dtype=torch.float64), h, None, 0.99), expected)


@pytest.mark.parametrize("width", [0, 1])
def test_a_layer_of_one_neuron_or_none_has_nothing_to_be_like(width):
    C = torch.zeros(5, 5, dtype=torch.float64)
    U = prune.update_gram(C, torch.full((7, width), 3.0, dtype=torch.float64), torch.arange(width), 0.99)
    assert U.tolist() == pytest.approx([0.0] * width, abs=1e-15)


def test_a_dead_neuron_is_like_nothing():
    model = make_model()
    model.h[1].mlp.c_fc.bias.data[4] = -1000.0  # gelu gives 0 for every token
    pruner = Pruner(model, "gum", 1.0, 10)
    pruner.select(10)
    with pruner.observing():
        model(make_batches(1)[0][0])
    pruner.score_gradient(10)
    U = pruner.uniqueness_penalty.split(WIDTHS)[1]
    assert U[4] == 0 and (U[[j for j in range(12) if j != 4]] > 0).all()
    assert pruner.scores.grad.isfinite().all()


def test_similarity_of_bfloat16_activations_is_accumulated_in_float32():
    model = make_model(torch.float32)
    pruner = Pruner(model, "gum", 1.0, 10, lambda_sim=0.3)
    pruner.select(10)
    held = []
    with torch.autocast("cpu", torch.bfloat16):
        with pruner.observing():
            model(make_batches(1)[0][0])
        for block in model.h:
            block.mlp.observer = held.append
        model(make_batches(1)[0][0])
    for C, h in zip(running(pruner), held):
        assert C.dtype == torch.float32 and h.dtype == torch.bfloat16
        h = h.detach().double().flatten(0, 1)  # [tokens, m]
        torch.testing.assert_close(C.double(), 0.3 * h.T @ h, rtol=0, atol=1e-5)


def test_the_scale_of_the_similarity_goes_back_into_it_before_it_vanishes():
    model = make_model()
    pruner = Pruner(model, "gum", 0.5, 10, lambda_sim=0.99)
    prune_at_random(pruner, seed=0)
    scales, direct = [], 0.0
    for idx, _, _ in make_batches(15):
        h = masked_activations(model, idx)[0].flatten(0, 1)
        direct = 0.01 * direct + 0.99 * h.T @ h
        with pruner.observing():
            model(idx)
        scales.append(pruner.gram_scale)
        torch.testing.assert_close(running(pruner)[0], direct, rtol=1e-12, atol=1e-14)
    assert min(scales) < 1e-9 and scales.count(1.0) == 2


@pytest.mark.parametrize("k", [511, 512, 1300, 2048])
def test_wide_layers_go_panel_by_panel(k):
    # From 512 columns on, a device may round the products to fewer digits, as long as it sums in float32.
    generator = torch.Generator().manual_seed(0)
    h, m = torch.randn(300, k, generator=generator).relu(), 2048
    C = torch.randn(500, m, generator=generator)
    C = C.T @ C
    keep = None if k == m else torch.randperm(m, generator=generator)[:k].sort().values
    at, direct = torch.arange(m) if keep is None else keep, C.double()
    direct[at[:, None], at] += 0.7 * h.double().T @ h.double()
    exact = reference_uniqueness(direct[at][:, at], [True] * k) if k < 600 else None
    U = prune.update_gram(C, h, keep, 0.7)
    torch.testing.assert_close(C.triu().double(), direct.triu(), rtol=0.01, atol=1.0)  # C_ii is around 600
    cos = (direct / (direct.diagonal()[:, None] * direct.diagonal()).sqrt()).abs()[at][:, at].fill_diagonal_(0)
    torch.testing.assert_close(U.double(), cos.mean(1), rtol=0.002, atol=0)
    assert exact is None or torch.allclose(exact, cos.mean(1))
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_similarity_sees_the_chosen_tokens_alone():
    idx, targets, real = make_batches(1, size=8)[0]
    chosen = [data.micro_batches((idx, targets, real), "cpu", parts=2, similar=6, seed=seed) for seed in (1, 1, 2)]
    assert all(a.similar.equal(b.similar) for a, b in zip(*chosen[:2]))
    assert not all(a.similar.equal(b.similar) for a, b in zip(*chosen[1:]))
    for part, batch in enumerate(chosen[0]):
        assert len(set(batch.similar.tolist())) == 3 and real[4 * part : 4 * part + 4].flatten()[batch.similar].all()
    model = make_model()
    pruner = Pruner(model, "gum", 0.5, 10, lambda_sim=0.3)
    prune_at_random(pruner, seed=0)
    with pruner.observing(chosen[0][0].similar):
        model(idx[:4])
    for C, h in zip(running(pruner), masked_activations(model, idx[:4])):
        h = h.flatten(0, 1)[chosen[0][0].similar]
        torch.testing.assert_close(C, 0.3 * h.T @ h, rtol=0, atol=1e-12)


# What makes it fast changes nothing.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", ["multiple_of", "gradient_checkpointing"])
def test_what_is_faster_or_smaller_trains_the_same(method, change):
    runs = []
    for changed in (False, True):
        model = make_model()
        model.gradient_checkpointing = changed and change == "gradient_checkpointing"
        pruner = Pruner(model, method, 0.25, 20, multiple_of=8 if changed and change == "multiple_of" else 1)
        history = fine_prune(model, pruner, make_optimizer(model, pruner.scores, 0.03), make_batches(20))
        padded = [block.mlp.padded for block in model.h]
        shrunk = prune.shrink(copy.deepcopy(model))
        runs.append((history, [*model.parameters(), pruner.scores, *running(pruner), *shrunk.parameters()]))
    assert runs[0][0] == runs[1][0]
    # Soft movement prunes nothing in so few steps.
    assert any(indices is not None for indices in padded) == (change == "multiple_of" and method != "soft")
    for ours, theirs in zip(runs[0][1], runs[1][1]):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("n", [0, 1, 400])
def test_the_loss_of_a_long_vocabulary_goes_chunk_by_chunk(n):
    generator, V, seen = torch.Generator().manual_seed(0), 50257, []
    x = torch.randn(n, 4, dtype=torch.float64, generator=generator)
    weight = torch.randn(V, 4, dtype=torch.float64, generator=generator)
    targets = torch.randint(V, (n,), generator=generator)

    def loss_of(logits, some):
        seen.append(len(logits))
        return F.cross_entropy(logits, targets[some], reduction="sum", label_smoothing=0.1) / 7

    def whole(x, weight):
        return F.cross_entropy(x @ weight.T, targets, reduction="sum", label_smoothing=0.1) * 3 / 7

    grads = []
    for loss in (lambda x, weight: HeadLoss.apply(x, weight, loss_of) * 3, whole):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        value = loss(*leaves)
        if n:
            value.backward()
        grads.append([torch.as_tensor(value), *(leaf.grad for leaf in leaves)] if n else [torch.as_tensor(value)])
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-9, atol=1e-12)
    assert sum(seen) == n and max(seen, default=0) < 200


def test_the_step_is_its_equations_with_a_teacher_and_label_smoothing():
    batch, teacher = make_batches(1)[0], make_model(seed=5)
    for how in (dict(label_smoothing=0.2), dict(label_smoothing=0.0, alpha_ce=0.3, alpha_kd=0.6, temperature=3.0)):
        taught, model = "temperature" in how, make_model()
        pruner = Pruner(model, "none", 1.0, 20)
        optimizer = make_optimizer(model, None, lr=0.0, weight_decay=0.0)
        _, loss, norm = prune.fine_prune(model, pruner, optimizer, data.micro_batches(batch, "cpu"), 5,
                                         SimpleNamespace(dtype="float32", **how), teacher if taught else None)
        idx, targets, _ = batch
        logits = model(idx)[0]
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=how["label_smoothing"])
        if taught:
            p, q = ((x[targets != -100] / 3).softmax(-1) for x in (teacher(idx)[0], logits))  # [tokens, V]
            expected = 0.3 * expected + 0.6 * 9 * (p * (p / q).log()).sum(1).mean()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)  # the KL is computed in float32
        expected.backward()
        wanted = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        torch.testing.assert_close(norm, wanted, rtol=1e-5, atol=0)


# Distillation.


def make_logits(seed=0):
    """Student's and teacher's logits [B, T, V] and targets [B, T] of which some do not count."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 2, 5, 11, dtype=torch.float64, generator=generator) * 3
    targets = torch.randint(11, (2, 5), generator=generator)
    targets[0, 3:] = targets[1, 1] = -100
    return student, teacher, targets


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
def test_distillation_is_the_mean_divergence_from_teacher_to_student(temperature):
    student, teacher, targets = make_logits()
    losses = []
    for s, t, target in zip(student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), targets.flatten().tolist()):
        if target != -100:
            s, t = ([math.exp(x / temperature) for x in logits] for logits in (s, t))
            p, q = [x / sum(t) for x in t], [x / sum(s) for x in s]
            losses.append(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q)))
    ours = prune.distillation_loss(student, teacher, targets, temperature).item()
    assert ours == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_equal_logits_have_nothing_to_distil():
    student, _, targets = make_logits()
    assert prune.distillation_loss(student, student.clone(), targets, 2.0).item() == pytest.approx(0, abs=1e-6)


def test_distillation_makes_up_for_the_temperature():
    student, teacher, targets = make_logits()
    cold = prune.distillation_loss(student, teacher, targets, 1.0)
    warm = prune.distillation_loss(3 * student, 3 * teacher, targets, 3.0)
    torch.testing.assert_close(warm, 9 * cold, rtol=1e-5, atol=0)


def test_tokens_without_a_target_are_not_distilled():
    student, teacher, targets = make_logits()
    student.requires_grad_()
    loss = prune.distillation_loss(student, teacher, targets, 2.0)
    elsewhere = torch.where((targets == -100)[..., None], 5 - teacher, teacher)  # [B, T, V]
    assert torch.equal(loss, prune.distillation_loss(student, elsewhere, targets, 2.0))
    loss.backward()
    assert ((student.grad != 0).any(-1) == (targets != -100)).all()


# The end.


def pruned_model(dtype, sets):
    """A model whose layers keep the neurons in `sets`."""
    model = make_model(dtype)
    pruner = Pruner(model, "soft", 0.0, 10)  # keeps whatever is above the threshold
    pruner.scores.data.fill_(-9.0)
    for scores, neurons in zip(pruner.scores.data.split(WIDTHS), sets):
        scores[neurons] = 9.0
    assert pruner.select(10) == [len(neurons) for neurons in sets]
    return model


SETS = {"some": [[0, 3, 4, 9, 15], [2], list(range(1, 18))],
        "all of a layer": [list(range(16)), [5, 6], [0, 19]],
        "none of a layer": [[], [0, 11], []],
        "none at all": [[], [], []]}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("multiple_of", [1, 8])
@pytest.mark.parametrize("sets", SETS.values(), ids=SETS.keys())
def test_a_shrunk_model_is_the_same_function(sets, multiple_of, dtype, tolerance):
    model = pruned_model(dtype, sets)
    whole = [(block.mlp.c_fc.weight, block.mlp.c_fc.bias, block.mlp.c_proj.weight) for block in model.h]
    idx, _, _ = make_batches(1)[0]
    before, _ = model(idx)
    assert prune.shrink(model, multiple_of) is model
    after, _ = model(idx)
    torch.testing.assert_close(after, before, rtol=0, atol=tolerance)
    widths = [-(-len(neurons) // multiple_of) * multiple_of for neurons in sets]
    assert list(model.config.mlp_widths) == widths
    for block, width, (w1, b1, w2), kept in zip(model.h, widths, whole, sets):
        fc, proj = block.mlp.c_fc, block.mlp.c_proj
        assert fc.weight.shape == (width, 8) and fc.bias.shape == (width,) and proj.weight.shape == (8, width)
        assert fc.out_features == proj.in_features == width
        k = len(kept)
        assert torch.equal(fc.weight[:k], w1[kept]) and torch.equal(fc.bias[:k], b1[kept])
        assert torch.equal(proj.weight[:, :k], w2[:, kept])
        assert not fc.weight[k:].any() and not fc.bias[k:].any() and not proj.weight[:, k:].any()


def test_a_shrunk_model_skips_nothing_and_trains_on():
    model = prune.shrink(pruned_model(torch.float64, SETS["none of a layer"]))
    assert kept_neurons(model) == [[], [0, 1], []]
    idx, targets, _ = make_batches(1)[0]
    optimizer = make_optimizer(model)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = task_loss(model(idx)[0], targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_shrunk_model_fits_a_fresh_model_of_its_configuration():
    model = prune.shrink(pruned_model(torch.float64, SETS["some"]))
    fresh = GPT(model.config).to(torch.float64)
    fresh.load_state_dict(model.state_dict())
    idx, _, _ = make_batches(1)[0]
    assert torch.equal(fresh(idx)[0], model(idx)[0])
