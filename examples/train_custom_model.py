"""Train a model of your own on long sequences: a textbook GPT in a plain loop.

    torchrun --nproc-per-node 2 examples/train_custom_model.py --tiny
    torchrun --nproc-per-node 8 examples/train_custom_model.py --seq-len 131072 --strategy ulysses

The model knows nothing of ranks. `parallelize` shards the sequence of every activation over all of them; loss and
gradients are those of one device, so the loop is a loop for one device.
"""

import argparse

import meter
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

import sptransform


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, vocab: int, width: int, heads: int, layers: int, max_length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(max_length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        logits = self.head(self.norm(self.blocks(x)))
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", default="ulysses")
    parser.add_argument("--seq-len", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--output", help="a file to save the weights to; they load in the plain model")
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU")
    args = parser.parse_args()
    if args.tiny:
        args.seq_len, args.steps, args.backend = 256, 3, "aot_eager"
    width, heads, layers = (64, 4, 2) if args.tiny else (1024, 16, 12)

    device = meter.start()
    torch.manual_seed(0)  # the same weights on every rank
    model = GPT(256, width, heads, layers, args.seq_len).to(device)
    model = sptransform.parallelize(model, args.strategy, backend=args.backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    with meter.Meter(args.steps) as bar:
        for step in range(args.steps):
            ids = meter.tokens(args.seq_len, 1, offset=step).to(device)  # the same batch on every rank
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(ids)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.step(ids.numel(), loss=loss.item())
    if args.output and dist.get_rank() == 0:
        torch.save(model.state_dict(), args.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
