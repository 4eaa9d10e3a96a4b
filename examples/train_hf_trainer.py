"""A stock `transformers.Trainer` on long sequences: `prepare` is the only line that is not of Transformers.

    torchrun --nproc-per-node 2 examples/train_hf_trainer.py --tiny
    torchrun --nproc-per-node 8 examples/train_hf_trainer.py --model meta-llama/Llama-3.1-8B --seq-len 131072

All ranks share each sequence. Losses, gradient norms and saved files are those of one process.
"""

import argparse
import tempfile

import meter
import torch
from trainer_meter import TrainerMeter
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from sptransform.integrations.transformers import prepare


class Windows(torch.utils.data.Dataset):
    """Windows of a text, a token a byte. Put your own dataset here."""

    def __init__(self, length: int, number: int) -> None:
        self.ids = meter.tokens(length, number)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name or folder of transformers; without, a small Llama with new weights")
    parser.add_argument("--strategy", default="ulysses")
    parser.add_argument("--seq-len", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", help="where to save; without, nowhere")
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU")
    args = parser.parse_args()
    if args.tiny:
        args.seq_len, args.steps = 256, 4

    training = TrainingArguments(
        output_dir=args.output or tempfile.mkdtemp(),
        save_strategy="steps" if args.output else "no",
        max_steps=args.steps,
        per_device_train_batch_size=1,  # of all ranks together
        gradient_accumulation_steps=2,
        gradient_checkpointing=not args.tiny,
        bf16=not args.tiny,
        eval_strategy="steps",
        eval_steps=max(args.steps // 2, 1),
        prediction_loss_only=True,
        include_num_input_tokens_seen=True,
        logging_steps=1,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    torch.manual_seed(0)  # the same weights on every rank
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="sptransform")
    else:
        config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
    model = prepare(model, args.strategy, backend="aot_eager" if args.tiny else "inductor")
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=Windows(args.seq_len, 64),
        eval_dataset=Windows(args.seq_len, 3),
        callbacks=[TrainerMeter()],
    )
    trainer.train()
    if args.output:
        trainer.save_model()


if __name__ == "__main__":
    main()
