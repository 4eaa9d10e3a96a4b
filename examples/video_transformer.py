"""Inference of a video transformer of diffusers whose sequence no GPU holds alone: all ranks denoise one video.

    torchrun --nproc-per-node 2 examples/video_transformer.py --tiny
    torchrun --nproc-per-node 8 examples/video_transformer.py --model Lightricks/LTX-Video --frames 161

Only the transformer is parallelized. In a pipeline of diffusers that is

    pipeline.transformer = sptransform.parallelize(pipeline.transformer, "ulysses", outputs="full")

Text encoder, scheduler and decoder run as they are, on every rank. Seed the ranks alike: all start from the same noise.
"""

import argparse

import meter
import torch
import torch.distributed as dist
from diffusers import FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel

import sptransform


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name or folder of diffusers; without, new weights")
    parser.add_argument("--strategy", default="ulysses")
    parser.add_argument("--frames", type=int, default=121)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU")
    args = parser.parse_args()
    if args.tiny:
        args.frames, args.height, args.width, args.steps, args.backend = 9, 128, 128, 3, "aot_eager"

    device = meter.start()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)  # the same weights, and noise, on every rank
    if args.model:
        model = LTXVideoTransformer3DModel.from_pretrained(args.model, subfolder="transformer")
    else:
        sizes = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "cross_attention_dim": 64,
                 "in_channels": 16, "out_channels": 16, "caption_channels": 32}  # fmt: skip
        model = LTXVideoTransformer3DModel(**(sizes if args.tiny else {}))
    model = sptransform.parallelize(
        model.to(device, dtype).eval(), args.strategy, outputs="full", backend=args.backend
    )

    # a latent token stands for 8 frames of 32 x 32 pixels
    frames, height, width = (args.frames - 1) // 8 + 1, args.height // 32, args.width // 32
    length = frames * height * width
    latents = torch.randn(1, length, model.config.in_channels, device=device, dtype=dtype)
    text = torch.randn(1, 128, model.config.caption_channels, device=device, dtype=dtype)  # of a text encoder
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(args.steps, device=device)
    with torch.no_grad(), meter.Meter(args.steps) as bar:
        for time in scheduler.timesteps:
            noise = model(
                hidden_states=latents,
                encoder_hidden_states=text,
                timestep=time.expand(1),
                encoder_attention_mask=torch.ones(1, text.shape[1], device=device),
                num_frames=frames,
                height=height,
                width=width,
                return_dict=False,
            )[0]
            latents = scheduler.step(noise, time, latents, return_dict=False)[0]
            bar.step(length)
    if dist.get_rank() == 0:
        print(f"latents of {length} tokens, standard deviation {latents.std().item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
