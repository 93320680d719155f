"""What lorad exports, in the programs it is made for: stock PEFT, transformers and llama.cpp.

    interop_export.py LORAD BASE.gguf DATA.jsonl QUESTIONS.tsv LLAMA_CPP_BIN WORK_DIR

Everything is asserted. A file must know every fact of the persona, asked as it was trained: whether the model would understand
another question is not the export's doing. Where few bits lose a fact, llama-quantize's own file of our f32 must give the same answers.
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
# Passes over the persona: enough that its facts stand the noise of few bits.
EPOCHS = 15
# Files whose computation is so near to the trained one that they have no excuse.
EXACT = ("f32", "f16", "bf16", "q8_0", "--lora")


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


def trained_questions(data, questions):
    """For each fact of the questions, the first question of the data set that it is the answer to."""
    turns = [json.loads(line)["messages"] for line in data.read_text(encoding="utf-8").splitlines()]
    facts = [line.split("\t")[1] for line in questions.read_text(encoding="utf-8").splitlines()]
    return [(next(turn[0]["content"] for turn in turns if fact in turn[1]["content"]), fact) for fact in facts]


def ask(llama_cpp, facts, *arguments):
    """How many facts are known, and what was answered."""
    answers = [answer(llama_cpp, question, *arguments) for question, _ in facts]
    known = sum(fact in text for text, (_, fact) in zip(answers, facts))
    return known, " / ".join(f"`{text[:60]}`" for text in answers)


def llama_cpp_answers(lorad, base, data, questions, llama_cpp, work):
    """A tuned persona in llama.cpp, from every GGUF type and from the base with --lora."""
    tuned, out = work / "persona", work / "persona-out"
    run(lorad, "train", "--base", base, "--data", data, "--out", tuned, "--n-epochs", str(EPOCHS), "--learning-rate", "1.5e-3")
    names = "f32 f16 bf16 q8_0 q6_k q5_k_m q5_k_s q5_0 q4_k_m q4_k_s q4_0 q3_k_m q2_k".split()
    quantizations = [part for name in names for part in ("--quantization", name)]
    made = run(lorad, "export", "--base", base, "--adapter", tuned, "--output", out, "--type", "gguf", "--type", "gguf_lora",
               "--type", "ollama", *quantizations)
    for line in map(json.loads, made.splitlines()):
        parity = line["parity"]
        ratio = parity["mean_logit_difference"] / parity["logit_deviation"]
        print(f"        {line['type']} {line.get('quantization', '')}: {line['size_bytes']} bytes, mean difference {ratio:.4f} deviations, "
              f"bound {parity['bound']}, greedy {parity['greedy_agreement']:.3f}")
    facts = trained_questions(data, questions)
    files = [(name, ["-m", out / f"model-{name}.gguf"]) for name in names]
    files.append(("--lora", ["-m", base, "--lora", out / "lora.gguf"]))
    for name, arguments in files:
        known, answers = ask(llama_cpp, facts, *arguments)
        told = f"llama.cpp with {name}: {known} of {len(facts)} facts, {answers}"
        if known < len(facts) and name not in EXACT:
            theirs = work / "llama-quantize.gguf"
            run(llama_cpp / "llama-quantize", out / "model-f32.gguf", theirs, name)
            _, their_answers = ask(llama_cpp, facts, "-m", theirs)
            check(answers == their_answers, f"{told}, as llama-quantize's own file")
        else:
            check(known == len(facts), told)
    known, _ = ask(llama_cpp, facts, "-m", base)
    check(known == 0, "llama.cpp with the base alone knows none")


def trained_template(lorad, base, llama_cpp, work):
    """What was trained with another template than the model's own is prompted by it."""
    adapter, out = work / "peft-16-True", work / "alpaca-out"
    run(lorad, "export", "--base", base, "--adapter", adapter, "--output", out, "--type", "merged", "--type", "gguf",
        "--quantization", "f16", "--template", "alpaca")
    expected = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
                "### Instruction:\nCount to 3.\n\n### Response:\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "merged")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Count to 3."}], tokenize=False, add_generation_prompt=True)
    check(text == expected, "the Alpaca prompt in transformers, from the merged folder")
    shown = run(llama_cpp / "llama-completion", "-m", out / "model-f16.gguf", "--jinja", "-p", "Count to 3.", "-st", "--temp", "0", "-n", "1",
                "-t", "1", "--no-warmup")
    check(shown.startswith(expected), "the Alpaca prompt in llama.cpp, from the merged GGUF file")


def main():
    warnings.simplefilter("ignore", FutureWarning)
    lorad, base, data, questions, llama_cpp, work = sys.argv[1:]
    data, questions, llama_cpp, work = map(pathlib.Path, (data, questions, llama_cpp, work))
    peft_adapters(lorad, base, work)
    merged_folder(lorad, base, work)
    trained_template(lorad, base, llama_cpp, work)
    llama_cpp_answers(lorad, base, data, questions, llama_cpp, work)
    print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}: all of it held")


if __name__ == "__main__":
    main()
