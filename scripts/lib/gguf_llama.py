"""Builds Hugging Face's LlamaForCausalLM in f32 from a `llama` GGUF file, so that stock PyTorch and PEFT compute on the very weights that lorad computes on."""

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from transformers import LlamaConfig, LlamaForCausalLM

PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def half_split_rows(weight, heads):
    """Reorders the rows of a q or k projection from GGUF's interleaved pairs to Hugging Face's two halves of each head."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(0, 2, 1, 3).reshape(rows, columns)


def read_config(reader, tensors):
    """The LlamaConfig that the file's metadata stands for."""

    def value(key, default=None):
        field = reader.fields.get(f"llama.{key}")
        if field is not None:
            return field.contents()
        if default is None:
            raise SystemExit(f"the GGUF file has no llama.{key}")
        return default

    hidden, heads = value("embedding_length"), value("attention.head_count")
    return LlamaConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=value("attention.head_count_kv", heads),
        head_dim=value("attention.key_length", hidden // heads),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base", 10000.0)},
        tie_word_embeddings="output.weight" not in tensors,
    )


def read_tensors(reader):
    """Every tensor of the file, dequantized to f32."""
    return {tensor.name: dequantize(tensor.data, tensor.tensor_type).astype(np.float32) for tensor in reader.tensors}


def hugging_face_name(name):
    """The name that Hugging Face gives to a GGUF tensor."""
    outside = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in outside:
        return outside[name]
    _, layer, kind, _ = name.split(".")
    norms = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    return f"model.layers.{layer}.{PROJECTIONS.get(kind) or norms[kind]}.weight"


def load_model(path):
    """The model of the GGUF file at `path`, in f32, on the CPU, with plain attention."""
    reader = GGUFReader(path)
    tensors = read_tensors(reader)
    config = read_config(reader, tensors)
    config._attn_implementation = "sdpa"
    rope_factors = tensors.pop("rope_freqs.weight", None)
    state = {}
    for name, weight in tensors.items():
        if ".attn_q." in name:
            weight = half_split_rows(weight, config.num_attention_heads)
        if ".attn_k." in name:
            weight = half_split_rows(weight, config.num_key_value_heads)
        state[hugging_face_name(name)] = torch.from_numpy(np.ascontiguousarray(weight))
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config).to(torch.float32)
    model.load_state_dict(state, strict=True)
    if rope_factors is not None:
        model.model.rotary_emb.inv_freq /= torch.from_numpy(rope_factors)
    return model.eval()
