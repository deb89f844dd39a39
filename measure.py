"""What the paper measures of a finished run, and why methods differ."""

import time
from itertools import islice

import torch
import torch.nn.functional as F


def batches(examples, tokens=8192):
    """Batches of a whole split for evaluation: neighbours in length together, at most `tokens` tokens (or one sequence)."""
    order, rows = examples.by_length(), max(1, tokens // examples.block_size)
    for first in range(0, len(order), rows):
        yield examples.batch(order[first : first + rows])


@torch.no_grad()
def mean_loss(model, examples, autocast, most=None):
    """The mean loss in nats per token that counts, over a split or its first `most` batches. exp() is the perplexity."""
    model.eval()
    device = model.wte.weight.device
    total, count = 0.0, 0
    for idx, targets, _ in islice(batches(examples), most):
        with autocast:
            logits, _ = model(idx.to(device))
        total += F.cross_entropy(logits.flatten(0, 1).float(), targets.to(device).flatten(), reduction="sum").item()
        count += int((targets != -100).sum())
    return total / count


@torch.no_grad()
def prefill_speed(models, idx, rounds=7):
    """Tokens per second with which each of `models` reads `idx` [B, T]: the median of `rounds`, the models in turns."""
    idx = idx.to(models[0].wte.weight.device)
    seconds = [[] for _ in models]
    for _ in range(rounds + 1):  # the first round warms up
        for model, times in zip(models, seconds):
            began = time.perf_counter()
            model(idx)
            if idx.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return [idx.numel() / sorted(times[1:])[rounds // 2] for times in seconds]
