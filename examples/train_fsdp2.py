"""Data parallelism over sequence parallelism: FSDP2, bfloat16, activation checkpointing, checkpoints that resume.

    torchrun --nproc-per-node 4 examples/train_fsdp2.py --tiny --dp 2
    torchrun --nproc-per-node 8 examples/train_fsdp2.py --model meta-llama/Llama-3.1-8B --dp 2 --seq-len 65536

Ranks form a mesh of dp x sp. Ranks along `sp` share each sequence and get the same batch; ranks along `dp` get
different ones. FSDP2 shards parameters, gradients and optimizer states over all of them. Run the command again with the
same `--checkpoint`, and with another number of ranks if you like, and it goes on from the last step that was saved.
"""

import argparse
from pathlib import Path

import meter
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig

import sptransform


def make_model(args: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)  # the same weights on every rank
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    else:
        config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    return model.to(device).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name or folder of transformers; without, a small Llama with new weights")
    parser.add_argument("--strategy", default="ulysses")
    parser.add_argument("--dp", type=int, default=1, help="ranks of data parallelism")
    parser.add_argument("--seq-len", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--checkpoint", type=Path, help="a folder to save to, and to go on from")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU")
    args = parser.parse_args()
    if args.tiny:
        args.seq_len, args.steps, args.backend = 128, min(args.steps, 4), "aot_eager"

    device = meter.start()
    sp = dist.get_world_size() // args.dp
    mesh = init_device_mesh(device.type, (args.dp, sp), mesh_dim_names=("dp", "sp"))
    model = make_model(args, device)
    # With grad_sync=False gradients are terms of a sum over sp, which FSDP2 sums up anyway
    model = sptransform.parallelize(
        model, args.strategy, mesh=mesh["sp"], grad_sync=False, outputs="loss", backend=args.backend
    )
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=mesh["dp", "sp"]._flatten("dp_sp"), mp_policy=policy)
    model.set_gradient_divide_factor(float(args.dp))  # a mean over dp, a sum over sp
    if device.type == "cpu":
        model.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that divides
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    first = load(args.checkpoint, model, optimizer)
    with meter.Meter(args.steps, start=first) as bar:
        for step in range(first, args.steps):
            at = step * args.dp + mesh["dp"].get_local_rank()  # ranks of one sp group read the same
            ids = meter.tokens(args.seq_len, 1, offset=at).to(device)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.step(ids.numel() * args.dp, loss=loss.item())
            if args.checkpoint and (step + 1) % 2 == 0:
                save(args.checkpoint, step + 1, model, optimizer)
    dist.destroy_process_group()


def save(folder: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder / f"step-{step}")


def load(folder: Path | None, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on from."""
    whole = [] if folder is None else [found.parent for found in folder.glob("step-*/.metadata")]
    steps = {int(found.name.removeprefix("step-")): found for found in whole}
    if not steps:
        return 0
    weights, states = get_state_dict(model, optimizer)
    found = {"model": weights, "optimizer": states}
    dcp.load(found, checkpoint_id=steps[max(steps)])
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    return max(steps)


if __name__ == "__main__":
    main()
