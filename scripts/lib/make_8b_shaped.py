"""Writes a GGUF model of Llama-3-8B's shapes with random f16 weights, for timing quantization.

    make_8b_shaped.py OUT.gguf [LAYERS] [VOCABULARY]

Needs nothing but Python's standard library and numpy. Every matrix repeats one block of random rows, shifted: its values do not
matter for the time, only that no two neighbouring rows are alike.
"""

import struct
import sys

import numpy

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 4096, 14336, 32, 8
F32, F16 = 0, 1
ALIGNMENT = 32


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key, value):
    """A metadata pair: a text, an integer (u32), a float (f32) or a list of texts."""
    out = string(key)
    if isinstance(value, str):
        return out + struct.pack("<I", 8) + string(value)
    if isinstance(value, float):
        return out + struct.pack("<If", 6, value)
    if isinstance(value, list):
        return out + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value))
    return out + struct.pack("<II", 4, value)


def tensors(layers, vocabulary):
    """Names, shapes (rows, columns; a vector has no rows) and types."""
    kv = HIDDEN // HEADS * KV_HEADS
    yield "token_embd.weight", (vocabulary, HIDDEN), F16
    for layer in range(layers):
        for name, shape in (
            ("attn_norm", (HIDDEN,)),
            ("attn_q", (HIDDEN, HIDDEN)),
            ("attn_k", (kv, HIDDEN)),
            ("attn_v", (kv, HIDDEN)),
            ("attn_output", (HIDDEN, HIDDEN)),
            ("ffn_norm", (HIDDEN,)),
            ("ffn_gate", (INTERMEDIATE, HIDDEN)),
            ("ffn_up", (INTERMEDIATE, HIDDEN)),
            ("ffn_down", (HIDDEN, INTERMEDIATE)),
        ):
            yield f"blk.{layer}.{name}.weight", shape, F16 if len(shape) > 1 else F32
    yield "output_norm.weight", (HIDDEN,), F32
    yield "output.weight", (vocabulary, HIDDEN), F16


def header(layers, vocabulary):
    metadata = {
        "general.architecture": "llama",
        "general.name": "random",
        "llama.block_count": layers,
        "llama.context_length": 8192,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INTERMEDIATE,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": HIDDEN // HEADS,
        "llama.rope.freq_base": 500000.0,
        "llama.vocab_size": vocabulary,
        "general.file_type": 1,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [f"t{index}" for index in range(vocabulary)],
    }
    listed = list(tensors(layers, vocabulary))
    out = b"GGUF" + struct.pack("<IQQ", 3, len(listed), len(metadata))
    out += b"".join(pair(key, value) for key, value in metadata.items())
    offset = 0
    for name, shape, kind in listed:
        out += string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        out += struct.pack("<IQ", kind, offset)
        size = int(numpy.prod(shape)) * (2 if kind == F16 else 4)
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    return out + bytes(-len(out) % ALIGNMENT), listed


def main():
    path = sys.argv[1]
    layers, vocabulary = (int(text) for text in (sys.argv[2:4] + ["32", "128256"][len(sys.argv[2:4]):]))
    source = numpy.random.default_rng(1)
    pool = (source.standard_normal(1 << 24) * 0.02).astype(numpy.float16)
    out, listed = header(layers, vocabulary)
    with open(path, "wb") as file:
        file.write(out)
        for index, (_, shape, kind) in enumerate(listed):
            count = int(numpy.prod(shape))
            if kind == F32:
                file.write(numpy.ones(count, numpy.float32).tobytes())
                continue
            while count:
                start = int(source.integers(0, 4096))
                part = pool[start : start + min(count, len(pool) - 4096)]
                file.write(part.tobytes())
                count -= len(part)


if __name__ == "__main__":
    main()
