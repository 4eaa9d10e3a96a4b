"""Tiny real models and their inputs, each as a user would write or import it, unaware of any parallelism.

`build("llama")` gives a model in training mode and its keyword inputs, the same at every call. What they have
in common is chosen so that mistakes show:

- float64 parameters; dropout is zero, so that a run on one device is a specification.
- Every parameter gets noise. At the usual initialisation biases are zero, scores are near zero and attention
  is near uniform, and a wrong position or mask would hardly move the loss.
- Labels are -100 in a block (a prompt) and at random, so that ranks have different numbers of labels and the
  mean over them is not the mean of the ranks' means.
- Where there is padding, it is longer than a rank's share at four ranks, so that some rank owns padding only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB, HIDDEN, HEADS, LAYERS, MLP = 97, 64, 8, 2, 128
MAX_LENGTH = 256
IGNORED = -100
Inputs = dict[str, torch.Tensor]

# Rounding at float64, and at float32 where a model computes in it whatever the dtype of its parameters.
FLOAT64, FLOAT32_PARTS = 1e-12, 1e-6


@dataclass(frozen=True)
class ModelEntry:
    """How to make a model of so many layers, its inputs from (batch, seq_len), and how closely runs must agree."""

    make: Callable[[int], nn.Module]
    make_inputs: Callable[[int, int], Inputs]
    tolerance: float


def build(
    name: str, *, batch: int = 2, seq_len: int = 64, layers: int = LAYERS, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Inputs]:
    """The named model, in training mode, and its inputs. Leaves the global random state as it was."""
    entry = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = entry.make(layers).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        torch.manual_seed(1)  # the same inputs whatever the model took of the random numbers
        return model.to(dtype).train(), entry.make_inputs(batch, seq_len)


class CausalTransformer(nn.Module):
    """A decoder written by hand, float64 throughout; returns its loss."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, HIDDEN)
        self.positions = nn.Embedding(MAX_LENGTH, HIDDEN)
        self.blocks = nn.ModuleList(CausalBlock() for _ in range(layers))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))[:, :-1]
        return functional.cross_entropy(logits.reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


class CausalBlock(nn.Module):
    """Attention and a GELU MLP, each behind a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.projection = nn.Linear(HIDDEN, HIDDEN)
        self.mlp_norm = nn.LayerNorm(HIDDEN)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, MLP), nn.GELU(), nn.Linear(MLP, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, seq_len, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, seq_len, 3, HEADS, HIDDEN // HEADS)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, seq_len, HIDDEN))
        return x + self.mlp(self.mlp_norm(x))


class TokenClassifier(nn.Module):
    """torch's own encoder under a head for each token; returns its loss."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, HIDDEN)
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, MLP, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.encoder(self.tokens(input_ids)))
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _llama(layers: int, *, kv_heads: int = 4, use_cache: bool = True) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=MLP,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=kv_heads,
            max_position_embeddings=MAX_LENGTH,
            use_cache=use_cache,
            attn_implementation="sdpa",
        )
    )


def _qwen3(layers: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=MLP,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=4,
            head_dim=HIDDEN // HEADS,
            max_position_embeddings=MAX_LENGTH,
            attn_implementation="sdpa",
        )
    )


def _gpt2(layers: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=HIDDEN,
            n_inner=MLP,
            n_layer=layers,
            n_head=HEADS,
            n_positions=MAX_LENGTH,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",
        )
    )


def _gpt_neox(layers: int) -> GPTNeoXForCausalLM:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=MLP,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            max_position_embeddings=MAX_LENGTH,
            attn_implementation="sdpa",
        )
    )


def _opt(layers: int) -> OPTForCausalLM:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            word_embed_proj_dim=HIDDEN,
            ffn_dim=MLP,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            max_position_embeddings=MAX_LENGTH,
            dropout=0.0,
            attn_implementation="sdpa",
        )
    )


def _bert(layers: int) -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=MLP,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            max_position_embeddings=MAX_LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        )
    )


def _causal_inputs(batch: int, seq_len: int) -> Inputs:
    """Random tokens, with labels on all but a prompt in the first row and a tenth of the rest."""
    input_ids = torch.randint(VOCAB, (batch, seq_len))
    labels = input_ids.masked_fill(torch.rand(batch, seq_len) < 0.1, IGNORED)
    labels[0, : seq_len // 3] = IGNORED
    return {"input_ids": input_ids, "labels": labels}


def _padding_mask(batch: int, seq_len: int, *, left: bool) -> torch.Tensor:
    """The first row is padded on the right and, with `left`, the last one on the left."""
    mask = torch.ones(batch, seq_len, dtype=torch.long)
    mask[0, seq_len - seq_len // 3 :] = 0
    if left:
        mask[-1, : seq_len // 3] = 0
    return mask


def _padded_causal_inputs(batch: int, seq_len: int) -> Inputs:
    inputs = _causal_inputs(batch, seq_len)
    mask = _padding_mask(batch, seq_len, left=True)
    labels = inputs["labels"].masked_fill(mask == 0, IGNORED)
    return {"input_ids": inputs["input_ids"], "attention_mask": mask, "labels": labels}


def _masked_lm_inputs(batch: int, seq_len: int) -> Inputs:
    """Labels on a fifth of the tokens, none on padding."""
    input_ids = torch.randint(VOCAB, (batch, seq_len))
    mask = _padding_mask(batch, seq_len, left=False)
    unlabelled = (torch.rand(batch, seq_len) < 0.8) | (mask == 0)
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": input_ids.masked_fill(unlabelled, IGNORED),
    }


MODELS = {
    "bert": ModelEntry(_bert, _masked_lm_inputs, FLOAT64),
    "gpt2": ModelEntry(_gpt2, _causal_inputs, FLOAT32_PARTS),
    "gpt_neox": ModelEntry(_gpt_neox, _causal_inputs, FLOAT32_PARTS),
    "llama": ModelEntry(_llama, _causal_inputs, FLOAT32_PARTS),
    "llama_mha_kv2": ModelEntry(partial(_llama, kv_heads=2), _causal_inputs, FLOAT32_PARTS),
    "llama_nocache": ModelEntry(partial(_llama, use_cache=False), _causal_inputs, FLOAT32_PARTS),
    "llama_padded": ModelEntry(_llama, _padded_causal_inputs, FLOAT32_PARTS),
    "opt": ModelEntry(_opt, _causal_inputs, FLOAT32_PARTS),
    "qwen3": ModelEntry(_qwen3, _causal_inputs, FLOAT32_PARTS),
    "sdpa_transformer": ModelEntry(CausalTransformer, _causal_inputs, FLOAT64),
    "torch_encoder": ModelEntry(TokenClassifier, _causal_inputs, FLOAT64),
}
