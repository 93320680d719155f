#!/usr/bin/env python3
"""Writes Llama 3's tokenizer as a GGUF file without a model: llama3_vocabulary.py OUT.gguf [PRE].

Needs: pip install gguf, and the package llama-models (`pip install --no-deps llama-models`, or LORAD_LLAMA_MODELS naming its
wheel), whose tokenizer.model lists the tokens' bytes by rank. The merges are found from the ranks: a token is the merge of
the two that its bytes become when only tokens of lower rank are made.
"""

import base64
import importlib.util
import os
import pathlib
import sys
import zipfile

import gguf

RESERVED = "<|reserved_special_token_{}|>"
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", RESERVED.format(0), RESERVED.format(1), "<|finetune_right_pad_id|>", "<|step_id|>",
            "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
SPECIALS += [RESERVED.format(2 + index) for index in range(256 - len(SPECIALS))]


def ranked_tokens():
    """The bytes of each token, by rank."""
    wheel = os.environ.get("LORAD_LLAMA_MODELS")
    if wheel:
        text = zipfile.ZipFile(wheel).read("llama_models/llama3/tokenizer.model")
    else:
        package = pathlib.Path(importlib.util.find_spec("llama_models").origin).parent
        text = (package / "llama3/tokenizer.model").read_bytes()
    tokens = [base64.b64decode(line.split()[0]) for line in text.splitlines() if line]
    assert len(set(tokens)) == len(tokens) == 128_000
    return tokens


def alphabet():
    """The character that stands for each byte in a byte-level vocabulary."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + at) for at, byte in enumerate(hidden)}


def last_merge(token, ranks):
    """The two parts that the bytes of a token become below its own rank."""
    parts, limit = [token[at:at + 1] for at in range(len(token))], ranks[token]
    while len(parts) > 2:
        pairs = [(ranks.get(parts[at] + parts[at + 1], limit), at) for at in range(len(parts) - 1)]
        rank, at = min(pairs)
        if rank >= limit:
            return None  # No merge makes it: it is found as a whole word only.
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts


def main():
    out, pre = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "llama-bpe"
    tokens, letters = ranked_tokens(), alphabet()
    ranks = {token: rank for rank, token in enumerate(tokens)}
    written = lambda token: "".join(letters[byte] for byte in token)  # noqa: E731
    merges = [last_merge(token, ranks) for token in tokens if len(token) > 1]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_block_count(1), writer.add_context_length(512), writer.add_embedding_length(32), writer.add_feed_forward_length(32)
    writer.add_head_count(1), writer.add_head_count_kv(1), writer.add_layer_norm_rms_eps(1e-5)
    texts = [written(token) for token in tokens] + SPECIALS
    writer.add_vocab_size(len(texts)), writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre(pre), writer.add_token_list(texts)
    writer.add_token_types([1] * len(tokens) + [3] * len(SPECIALS))
    writer.add_token_merges([" ".join(map(written, merge)) for merge in merges if merge])
    writer.add_bos_token_id(len(tokens)), writer.add_eos_token_id(len(tokens) + 9)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.close()
    print(f"{out}: {len(texts)} tokens, {sum(map(bool, merges))} merges")


if __name__ == "__main__":
    main()
