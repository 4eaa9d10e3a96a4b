"""Train one small Llama twice, on one device and sequence-parallel, and compare the losses.

    python examples/quickstart.py --steps 20 --world-size 4 --backend inductor

The script starts its own processes (gloo, CPU). Every rank holds the same model and sees the same full batch;
the model comes from transformers and is not modified. Rank 0 also trains an identical copy on one device.
Exits with status 1 if the two loss curves differ by more than 1e-3, relative.
"""

import argparse
import copy
import itertools
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from rich import progress
from rich.console import Console
from rich.table import Table

import sptransform

TEXT = Path(__file__).with_name("declaration.txt")  # the US Declaration of Independence, public domain
BATCH_SIZE = 2
TOLERANCE = 1e-3

console = Console()


def build_model(seq_len):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=seq_len,
    )
    return transformers.LlamaForCausalLM(config)


def batches(seq_len):
    """Consecutive windows of the text, one token a byte, starting over at the end."""
    tokens = torch.tensor(list(TEXT.read_bytes()))
    size = BATCH_SIZE * seq_len
    if size > len(tokens):
        raise ValueError(f"seq_len {seq_len} is too long: a batch needs {size} of {len(tokens)} tokens")
    for index in itertools.count():
        start = (index * size) % (len(tokens) - size + 1)
        yield tokens[start : start + size].view(BATCH_SIZE, seq_len)


def train_step(model, optimizer, ids):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(rank, args, directory):
    """Runs on every rank; rank 0 saves (one-device losses, sequence-parallel losses)."""
    torch.set_num_threads(1)
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=args.world_size)

    model = build_model(args.seq_len)
    reference = copy.deepcopy(model) if rank == 0 else None
    model = sptransform.parallelize(model, args.strategy, backend=args.backend)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    reference_optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3) if rank == 0 else None

    reference_losses, losses = [], []
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=console, disable=rank != 0) as bar:
        task = bar.add_task("compiling", total=args.steps)
        for ids in itertools.islice(batches(args.seq_len), args.steps):
            if rank == 0:
                reference_losses.append(train_step(reference, reference_optimizer, ids))
            losses.append(train_step(model, optimizer, ids))
            bar.update(task, advance=1, description=f"loss {losses[-1]:.4f}")

    if rank == 0:
        torch.save((reference_losses, losses), f"{directory}/losses.pt")
    dist.destroy_process_group()


def show_losses(reference_losses, losses, world_size):
    """Prints both curves; returns the largest relative difference."""
    table = Table(title="Loss", title_justify="left")
    for name in ("step", "1 device", f"{world_size} ranks", "relative difference"):
        table.add_column(name, justify="right")
    differences = [abs(b - a) / abs(a) for a, b in zip(reference_losses, losses, strict=True)]
    for step, (a, b, difference) in enumerate(zip(reference_losses, losses, differences, strict=True)):
        table.add_row(str(step), f"{a:.6f}", f"{b:.6f}", f"{difference:.1e}")
    console.print(table)
    return max(differences)


def rewritten_model(args):
    """What the transform makes of the model. Needs no processes: the world size is an argument."""
    ids = next(batches(args.seq_len))
    inputs = {"input_ids": ids, "labels": ids}
    model = build_model(args.seq_len)
    return sptransform.rewrite(model, args.strategy, inputs, world_size=args.world_size)


def show_collectives(rewritten):
    """Prints what the transform inserted."""
    table = Table(title="Collectives of one training step, on each rank", title_justify="left")
    table.add_column("module", overflow="fold")
    for name in ("direction", "collective"):
        table.add_column(name)
    for name in ("count", "bytes sent"):
        table.add_column(name, justify="right")
    for record in sptransform.explanation_of(rewritten).collectives:
        bytes_sent = f"{record.bytes_sent:,}"
        table.add_row(record.layer, record.direction, record.kind, str(record.count), bytes_sent)
    console.print(table)


def show_layer(rewritten, world_size):
    """Prints the graph of the first attention."""
    layer = "model.layers.0.self_attn"
    console.print(f"\n{layer}, rewritten for {world_size} ranks:\n")
    console.print(rewritten.text(layer=layer), markup=False, highlight=False, soft_wrap=True)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--world-size", type=int, default=4, help="number of ranks (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--strategy", default="ulysses", help="default: %(default)s")
    parser.add_argument("--backend", default="inductor", help="e.g. aot_eager (default: %(default)s)")
    return parser.parse_args()


def main():
    args = parse_args()
    console.print(
        f"Llama, 2 layers, 8 heads (4 key/value heads), float32, {BATCH_SIZE} x {args.seq_len} tokens\n"
        f"strategy {args.strategy}, {args.world_size} ranks, backend {args.backend}\n",
        highlight=False,
    )
    # Compile inside each rank's process: one pool of compile workers a rank is too much for one machine.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(train, args=(args, directory), nprocs=args.world_size)
        reference_losses, losses = torch.load(f"{directory}/losses.pt")

    difference = show_losses(reference_losses, losses, args.world_size)
    rewritten = rewritten_model(args)
    show_collectives(rewritten)
    show_layer(rewritten, args.world_size)

    passed = difference <= TOLERANCE
    console.print(
        f"\n{'ok' if passed else 'FAILED'}: the losses differ by at most {difference:.1e}, relative "
        f"(tolerance {TOLERANCE:.0e})",
        highlight=False,
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
