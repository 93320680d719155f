"""Writes a GGUF model of Llama-3-8B's shapes with random weights, f16 or q4_k, for timing quantization and training.

    make_8b_shaped.py OUT.gguf [LAYERS] [VOCABULARY] [f16|q4_k] [TOKENIZER.gguf]

Needs nothing but Python's standard library and numpy. Every matrix repeats one block of random rows, shifted: its values do not
matter for the time, only that no two neighbouring rows are alike. What a layer adds is small beside the embedding, as in a trained
model, so that rounding errors do not grow from layer to layer. Its tokenizer is that of another GGUF file (which has as many
tokens), or else names that no text has.
"""

import struct
import sys

import numpy

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 4096, 14336, 32, 8
F32, F16, Q4_K = 0, 1, 12
BLOCK = 256  # values of a block of q4_k
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


def size_of(shape, kind):
    """Bytes of a tensor."""
    count = int(numpy.prod(shape))
    return count // BLOCK * 144 if kind == Q4_K else count * (2 if kind == F16 else 4)


def read_string(file):
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(length)


def skip_value(file, kind):
    """Passes over a metadata value."""
    if kind == 8:
        read_string(file)
    elif kind == 9:
        element, count = struct.unpack("<IQ", file.read(12))
        for _ in range(count):
            skip_value(file, element)
    else:
        file.read({0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}[kind])


def tokenizer_of(path):
    """The metadata pairs `tokenizer.*` of a GGUF file, as they lie there."""
    pairs = []
    with open(path, "rb") as file:
        _, _, count = struct.unpack("<IQQ", file.read(24)[4:])
        for _ in range(count):
            start = file.tell()
            key = read_string(file)
            skip_value(file, struct.unpack("<I", file.read(4))[0])
            end = file.tell()
            if key.startswith(b"tokenizer."):
                file.seek(start)
                pairs.append(file.read(end - start))
    return pairs


def tensors(layers, vocabulary, kind):
    """Names, shapes (rows, columns; a vector has no rows) and types."""
    kv = HIDDEN // HEADS * KV_HEADS
    yield "token_embd.weight", (vocabulary, HIDDEN), kind
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
            yield f"blk.{layer}.{name}.weight", shape, kind if len(shape) > 1 else F32
    yield "output_norm.weight", (HIDDEN,), F32
    yield "output.weight", (vocabulary, HIDDEN), kind


def header(layers, vocabulary, kind, tokenizer):
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
        "general.file_type": 1 if kind == F16 else 15,
    }
    pairs = [pair(key, value) for key, value in metadata.items()]
    if tokenizer:
        pairs += tokenizer_of(tokenizer)
    else:
        names = [f"t{index}" for index in range(vocabulary)]
        tokens = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": names}
        pairs += [pair(key, value) for key, value in tokens.items()]
    listed = list(tensors(layers, vocabulary, kind))
    out = b"GGUF" + struct.pack("<IQQ", 3, len(listed), len(pairs)) + b"".join(pairs)
    offset = 0
    for name, shape, kind in listed:
        out += string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        out += struct.pack("<IQ", kind, offset)
        offset += -(-size_of(shape, kind) // ALIGNMENT) * ALIGNMENT
    return out + bytes(-len(out) % ALIGNMENT), listed


def deviation(name):
    """The standard deviation of a matrix's values."""
    if name.startswith("token_embd"):
        return 1.0
    return 0.0025 if "attn_output" in name or "ffn_down" in name else 0.02


def f16_values(source, deviation):
    return (source.standard_normal(1 << 24) * deviation).astype(numpy.float16).view(numpy.uint8)


def q4_k_blocks(source, deviation):
    """Blocks whose values are even around 0: each scale and minimum is 32 of 63, only d differs."""
    count = 1 << 17
    blocks = numpy.empty((count, 144), numpy.uint8)
    d = (source.uniform(0.5, 1.5, count) * deviation * 6.75e-3).astype(numpy.float16)
    blocks[:, 0:2] = d.view(numpy.uint8).reshape(count, 2)
    blocks[:, 2:4] = (d * numpy.float16(7.5)).view(numpy.uint8).reshape(count, 2)
    blocks[:, 4:12], blocks[:, 12:16] = 32 | 2 << 6, 0
    blocks[:, 16:] = source.integers(0, 256, (count, 128), numpy.uint8)
    return blocks.reshape(-1)


def main():
    path, *rest = sys.argv[1:]
    layers, vocabulary, kind, tokenizer = rest + ["32", "128256", "f16", ""][len(rest):]
    if kind not in ("f16", "q4_k"):
        sys.exit(f"make_8b_shaped.py: the type is f16 or q4_k, not {kind}")
    kind, make, unit = {"f16": (F16, f16_values, 2), "q4_k": (Q4_K, q4_k_blocks, 144)}[kind]
    source, pools = numpy.random.default_rng(1), {}
    out, listed = header(int(layers), int(vocabulary), kind, tokenizer)
    with open(path, "wb") as file:
        file.write(out)
        for name, shape, kind in listed:
            left = size_of(shape, kind)
            if kind == F32:
                file.write(numpy.ones(left // 4, numpy.float32).tobytes())
                continue
            if deviation(name) not in pools:
                pools[deviation(name)] = make(source, deviation(name))
            pool = pools[deviation(name)]
            while left:
                start = int(source.integers(0, 4096)) * unit
                part = pool[start : start + min(left, len(pool) - 4096 * unit)]
                file.write(part.tobytes())
                left -= len(part)


if __name__ == "__main__":
    main()
