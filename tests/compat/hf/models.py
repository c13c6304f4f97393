# SPDX-License-Identifier: Apache-2.0
"""Tiny models of many architectures, made from their configurations with random weights, and data for each. Nothing is downloaded.

Widths are odd multiples of small numbers on purpose: slices of parameters then end in the middle of rows.
"""
from typing import NamedTuple

VOCABULARY = 97
WORDS = 12      # tokens a sample
IMAGE = 8       # pixels a side
CLASSES = 3

_CAUSAL = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0)
_LLAMA = dict(_CAUSAL, hidden_size=24, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
              head_dim=6, max_position_embeddings=64)
_ENCODER = dict(vocab_size=VOCABULARY, pad_token_id=0, hidden_size=24, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=CLASSES)


class Architecture(NamedTuple):
    model: str       # class names in transformers
    config: str
    settings: dict
    data: str        # "causal" | "seq2seq" | "classes" | "image"


def _without(settings, *names):
    return {key: value for key, value in settings.items() if key not in names}


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", _LLAMA, "causal"),
    "llama-tied": Architecture("LlamaForCausalLM", "LlamaConfig", dict(_LLAMA, tie_word_embeddings=True), "causal"),
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config",
                         dict(_CAUSAL, n_embd=24, n_layer=3, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
                         "causal"),
    "mistral": Architecture("MistralForCausalLM", "MistralConfig", dict(_LLAMA, sliding_window=8), "causal"),
    "qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config", _without(_LLAMA, "head_dim"), "causal"),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", dict(_LLAMA, tie_word_embeddings=True), "causal"),
    "gemma2": Architecture("Gemma2ForCausalLM", "Gemma2Config", dict(_LLAMA, query_pre_attn_scalar=6, sliding_window=8), "causal"),
    "gemma3": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", dict(_LLAMA, query_pre_attn_scalar=6, sliding_window=8), "causal"),
    "phi": Architecture("PhiForCausalLM", "PhiConfig",
                        dict(_without(_LLAMA, "head_dim", "num_key_value_heads"), resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0,
                             partial_rotary_factor=0.5, hidden_size=32), "causal"),
    "phi3": Architecture("Phi3ForCausalLM", "Phi3Config", _without(_LLAMA, "head_dim"), "causal"),
    "opt": Architecture("OPTForCausalLM", "OPTConfig",
                        dict(_CAUSAL, hidden_size=24, ffn_dim=44, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=20,
                             max_position_embeddings=64, dropout=0.0), "causal"),
    "gpt-neox": Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig",
                             dict(_without(_LLAMA, "head_dim", "num_key_value_heads", "hidden_size"), hidden_size=32, hidden_dropout=0.0,
                                  attention_dropout=0.0), "causal"),
    "falcon": Architecture("FalconForCausalLM", "FalconConfig",
                           dict(_CAUSAL, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, hidden_dropout=0.0,
                                attention_dropout=0.0), "causal"),
    "bloom": Architecture("BloomForCausalLM", "BloomConfig",
                          dict(_CAUSAL, hidden_size=24, n_layer=3, n_head=4, hidden_dropout=0.0, attention_dropout=0.0), "causal"),
    "mixtral": Architecture("MixtralForCausalLM", "MixtralConfig",
                            dict(_LLAMA, num_local_experts=4, num_experts_per_tok=2, sliding_window=None, output_router_logits=True), "causal"),
    "qwen2-moe": Architecture("Qwen2MoeForCausalLM", "Qwen2MoeConfig",
                              dict(_without(_LLAMA, "head_dim"), num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20,
                                   shared_expert_intermediate_size=28, decoder_sparse_step=1), "causal"),
    "qwen3-moe": Architecture("Qwen3MoeForCausalLM", "Qwen3MoeConfig",
                              dict(_LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20), "causal"),
    "t5": Architecture("T5ForConditionalGeneration", "T5Config",
                       dict(vocab_size=VOCABULARY, d_model=24, d_kv=6, d_ff=44, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0,
                            eos_token_id=2, decoder_start_token_id=0), "seq2seq"),
    "bart": Architecture("BartForConditionalGeneration", "BartConfig",
                         dict(_CAUSAL, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                              encoder_ffn_dim=44, decoder_ffn_dim=44, max_position_embeddings=64, dropout=0.0, decoder_start_token_id=2,
                              forced_eos_token_id=None), "seq2seq"),
    "bert": Architecture("BertForSequenceClassification", "BertConfig", _ENCODER, "classes"),
    "roberta": Architecture("RobertaForSequenceClassification", "RobertaConfig", _ENCODER, "classes"),
    "distilbert": Architecture("DistilBertForSequenceClassification", "DistilBertConfig",
                               dict(vocab_size=VOCABULARY, pad_token_id=0, dim=24, hidden_dim=44, n_layers=2, n_heads=4, dropout=0.0,
                                    attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=CLASSES, max_position_embeddings=64), "classes"),
    "vit": Architecture("ViTForImageClassification", "ViTConfig",
                        dict(hidden_size=24, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, image_size=IMAGE, patch_size=4,
                             num_labels=CLASSES), "image"),
}


def configuration(name):
    import transformers
    architecture = ARCHITECTURES[name]
    return getattr(transformers, architecture.config)(**architecture.settings)


def model_class(name):
    import transformers
    return getattr(transformers, ARCHITECTURES[name].model)


def build(name, seed=0):
    """The model on the CPU in fp32, the same for every caller with the same seed."""
    import torch
    torch.manual_seed(seed)
    return model_class(name)(configuration(name))


def dataset(name, samples, seed=1):
    """A list of samples as a Trainer's collator takes them."""
    import torch
    generator = torch.Generator().manual_seed(seed)
    kind = ARCHITECTURES[name].data

    def words():
        return torch.randint(3, VOCABULARY, (WORDS,), generator=generator)

    rows = []
    for _ in range(samples):
        label = torch.randint(0, CLASSES, (1,), generator=generator).item()
        if kind == "image":
            rows.append({"pixel_values": torch.randn(3, IMAGE, IMAGE, generator=generator), "labels": label})
            continue
        row = {"input_ids": words(), "attention_mask": torch.ones(WORDS, dtype=torch.long)}
        row["labels"] = row["input_ids"].clone() if kind == "causal" else words() if kind == "seq2seq" else label
        rows.append(row)
    return rows
