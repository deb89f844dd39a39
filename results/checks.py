"""What `train.py` makes sure of before it trains: mistakes of which its flags alone do not tell."""

import os
import re


def check_leftover(args, widths):
    """ValueError if what should be left, and when, does not fit a model of these `widths`."""
    total, asked = sum(widths), [int(k) for k in re.findall(r"\d+", args.scope or "")]
    if args.method != "none" and args.prune_from > args.prune_until:
        raise ValueError(f"--prune-from {args.prune_from:g} is after --prune-until "
                         f"{args.prune_until:g}: give a later --prune-until, or an earlier "
                         "--prune-from (the same: all leave at once)")
    if args.method != "none" and not total:
        raise ValueError(f"{args.model} has no MLP neurons left to prune")
    if asked and (len(asked) != len(widths) or any(k > m for k, m in zip(asked, widths))):
        raise ValueError(f"--scope {args.scope} does not fit the layers' widths: "
                         f"{','.join(map(str, widths))}")
    if asked and not sum(asked):
        raise ValueError(f"--scope {args.scope} leaves no neuron at all: give a width above 0, of "
                         f"at most {','.join(map(str, widths))}")
    if asked and sum(asked) != round(args.leftover * total):
        raise ValueError(f"--scope {args.scope} leaves {sum(asked):,} of {total:,} neurons: add "
                         f"--leftover {sum(asked) / total:.8g}")
    pools = [total] if args.scope == "global" else widths  # each of which the best are kept of
    if total and not asked and not any(round(args.leftover * m) for m in pools):
        raise ValueError(f"--leftover {args.leftover:g} of {total:,} neurons is none at all")


def check_batch(args, processes, config, train_data):
    """ValueError if a batch can't be cut as it should, or has no room in the data or memory."""
    parts = args.accumulate * processes
    if args.batch_size < parts:
        raise ValueError(f"--batch-size {args.batch_size} can't be cut into {parts}, --accumulate "
                         f"{args.accumulate} times {processes} processes")
    if args.batch_size > len(train_data):
        raise ValueError(f"--batch-size {args.batch_size} is more than there are sequences to "
                         f"train on, {len(train_data)}")
    if args.device == "cpu" and hasattr(os, "sysconf"):  # elsewhere torch itself tells
        tokens = args.batch_size / parts * train_data.about["tokens"] / len(train_data)
        least = 2 * tokens * sum(8 * config.n_embd + 2 * m for m in config.mlp_widths)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if least > memory and not args.gradient_checkpointing:
            raise ValueError(f"a step takes over {least / 1e9:.0f} GB, and this machine has "
                             f"{memory / 1e9:.0f}: raise --accumulate")
