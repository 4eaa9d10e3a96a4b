"""Fine-tune adapters on long documents: PEFT's LoRA under TRL's stock `SFTTrainer`.

    torchrun --nproc-per-node 2 examples/lora_sft.py --tiny
    torchrun --nproc-per-node 8 examples/lora_sft.py --model Qwen/Qwen3-8B --data my.jsonl --seq-len 65536

The data are JSON lines with a `text` each. Adapters are saved as PEFT saves them, and load in the plain model.
"""

import argparse
import tempfile

import meter
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from trainer_meter import TrainerMeter
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from sptransform.integrations.transformers import prepare


def tiny_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A token a word."""
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name or folder of transformers")
    parser.add_argument("--data", help="JSON lines with a `text` each")
    parser.add_argument("--strategy", default="ulysses")
    parser.add_argument("--seq-len", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", help="where to save the adapters; without, nowhere")
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU; needs neither model nor data")
    args = parser.parse_args()
    if not args.tiny and not (args.model and args.data):
        parser.error("give --model and --data, or --tiny")

    training = SFTConfig(
        output_dir=args.output or tempfile.mkdtemp(),
        save_strategy="no",
        max_steps=3 if args.tiny else args.steps,
        max_length=64 if args.tiny else args.seq_len,
        pad_to_multiple_of=64,  # lengths that the ranks share evenly are one graph
        per_device_train_batch_size=1,  # of all ranks together
        gradient_accumulation_steps=2,
        gradient_checkpointing=not args.tiny,
        bf16=not args.tiny,
        include_num_input_tokens_seen=True,
        logging_steps=1,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    torch.manual_seed(0)  # the same weights, and adapters, on every rank
    if args.tiny:
        words = meter.TEXT.read_text().split()
        data = Dataset.from_list([{"text": " ".join(words[i : i + 60])} for i in range(0, 600, 60)])
        tokenizer = tiny_tokenizer(words)
        config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1)  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
    else:
        data = load_dataset("json", data_files=args.data, split="train")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="sptransform")
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    model = prepare(model, args.strategy, backend="aot_eager" if args.tiny else "inductor")
    trainer = SFTTrainer(
        model=model, args=training, train_dataset=data, processing_class=tokenizer, callbacks=[TrainerMeter()]
    )
    trainer.train()
    if args.output:
        trainer.save_model()


if __name__ == "__main__":
    main()
