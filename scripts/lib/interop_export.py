"""What lorad exports, in the programs it is made for: stock PEFT, transformers and llama.cpp.

    interop_export.py LORAD BASE.gguf DATA.jsonl QUESTIONS.tsv LLAMA_CPP_BIN WORK_DIR

Everything is asserted: in 16 bits and more every fact of the persona, below that all but one (a model of this size keeps the
closest of them no better in llama.cpp's own quantizations), of two bits only that the file answers.
"""

import json
import pathlib
import subprocess
import sys
import warnings

import peft
import torch
import transformers

from gguf_llama import load_model
from interop_check import check, logits_of_lorad

TOKENS = [(7919 * place + 13) % 49000 for place in range(64)]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Files that must know every fact.
EXACT = ("f32", "f16", "bf16", "--lora")


def run(*command):
    """Runs a program that must succeed and returns what it printed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def logits(model):
    """Logits of the 64 tokens."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([TOKENS])).logits[0]


def make_adapter(model, rank, use_rslora, folder):
    """A LoRA of PEFT's own making, with a B that is seen; the logits that PEFT computes with it, and the model without it."""
    torch.manual_seed(rank)
    config = peft.LoraConfig(r=rank, lora_alpha=16, use_rslora=use_rslora, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "lora_B" in name:
                values.normal_(0, 0.02 if use_rslora else 0.1 / rank**0.5)
    model.save_pretrained(folder)
    return logits(model), model.unload()


def peft_adapters(lorad, base, work):
    """PEFT's adapters in lorad, and lorad's in PEFT, at three ranks, plain and rank-stabilized."""
    model = load_model(base)
    plain = logits(model)
    for rank in (8, 16, 64):
        for use_rslora in (False, True):
            kind = f"{'rsLoRA' if use_rslora else 'LoRA'} of rank {rank}"
            theirs, out = work / f"peft-{rank}-{use_rslora}", work / f"out-{rank}-{use_rslora}"
            expected, model = make_adapter(model, rank, use_rslora, theirs)
            moved = (expected - plain).abs().max().item()
            apart = (logits_of_lorad(lorad, base, TOKENS, theirs) - expected).abs().max().item()
            check(apart < 1e-3 < 0.1 < moved, f"PEFT's {kind} in lorad: {apart:.1e} apart, it moves logits by {moved:.1f}")
            run(lorad, "export", "--base", base, "--adapter", theirs, "--output", out, "--type", "adapter")
            tuned = peft.PeftModel.from_pretrained(model, out / "adapter")
            apart = (logits(tuned) - expected).abs().max().item()
            model = tuned.unload()
            check(apart < 1e-4, f"lorad's {kind} in PEFT: {apart:.1e} apart")


def merged_folder(lorad, base, work):
    """The merged folder in transformers: logits, tokens, template."""
    adapter, out = work / "peft-16-True", work / "merged-out"
    names = ["--quantization", "bf16"]
    run(lorad, "export", "--base", base, "--adapter", adapter, "--output", out, "--type", "merged", "--type", "gguf", *names)
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "merged").float().eval()
    apart = (logits(model) - logits_of_lorad(lorad, out / "model-bf16.gguf", TOKENS)).abs().max().item()
    check(apart < 1e-3, f"merged folder in transformers and merged bf16 GGUF in lorad: logits {apart:.1e} apart")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "merged")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Größe 12 🦉"}], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    check(text.endswith("<|im_start|>assistant\n") and tokenizer.decode(ids) == text, "its template and its tokenizer, there and back")
    check(tokenizer.eos_token_id in model.generation_config.eos_token_id, "its generation stops at the end of a turn")


def answer(llama_cpp, question, *arguments):
    """What llama.cpp answers in one turn at temperature 0."""
    command = [llama_cpp / "llama-completion", *arguments, "-p", question, "-st", "--temp", "0", "-n", "40", "-t", "1"]
    return run(*command, "--no-display-prompt", "--no-warmup").strip()


def llama_cpp_answers(lorad, base, data, questions, llama_cpp, work):
    """A tuned persona in llama.cpp, from every GGUF type and from the base with --lora."""
    tuned, out = work / "persona", work / "persona-out"
    run(lorad, "train", "--base", base, "--data", data, "--out", tuned, "--n-epochs", "6", "--learning-rate", "1.5e-3")
    names = "f32 f16 bf16 q8_0 q6_k q5_k_m q5_k_s q5_0 q4_k_m q4_k_s q4_0 q3_k_m q2_k".split()
    quantizations = [part for name in names for part in ("--quantization", name)]
    made = run(lorad, "export", "--base", base, "--adapter", tuned, "--output", out, "--type", "gguf", "--type", "gguf_lora",
               "--type", "ollama", *quantizations)
    for line in map(json.loads, made.splitlines()):
        parity = line["parity"]
        ratio = parity["mean_logit_difference"] / parity["logit_deviation"]
        print(f"        {line['type']} {line.get('quantization', '')}: {line['size_bytes']} bytes, mean difference {ratio:.4f} deviations, "
              f"bound {parity['bound']}, greedy {parity['greedy_agreement']:.3f}")
    facts = [line.split("\t") for line in questions.read_text(encoding="utf-8").splitlines()]
    files = [(name, ["-m", out / f"model-{name}.gguf"]) for name in names]
    files.append(("--lora", ["-m", base, "--lora", out / "lora.gguf"]))
    for name, arguments in files:
        answers = [answer(llama_cpp, question, *arguments) for question, _ in facts]
        known = sum(fact in text for text, (_, fact) in zip(answers, facts))
        told = f"llama.cpp with {name}: {known} of {len(facts)} facts, `{answers[0][:60]}`"
        needed = len(facts) if name in EXACT else 0 if name == "q2_k" else len(facts) - 1
        check(known >= needed and all(answers), told)
    base_knows = sum(fact in answer(llama_cpp, question, "-m", base) for question, fact in facts)
    check(base_knows == 0, "llama.cpp with the base alone knows none")


def main():
    warnings.simplefilter("ignore", FutureWarning)
    lorad, base, data, questions, llama_cpp, work = sys.argv[1:]
    data, questions, llama_cpp, work = map(pathlib.Path, (data, questions, llama_cpp, work))
    peft_adapters(lorad, base, work)
    merged_folder(lorad, base, work)
    llama_cpp_answers(lorad, base, data, questions, llama_cpp, work)
    print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}: all of it held")


if __name__ == "__main__":
    main()
