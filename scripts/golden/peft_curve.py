"""Makes engine/tests/golden/peft_curve: what stock PyTorch and PEFT compute when they train the tiny model.

    cargo build --release --workspace --example tiny_model
    target/release/examples/tiny_model /tmp/tiny.gguf
    python3 -m venv /tmp/golden && /tmp/golden/bin/pip install torch transformers peft gguf
    /tmp/golden/bin/python scripts/golden/peft_curve.py /tmp/tiny.gguf

writes, beside each other,
    start/, final/   the adapter before and after, saved by PEFT itself
    curve.json       rows, recipe, and the curves of loss, accuracy, learning rate and gradient norm (before clipping)

The recipe: 20 rows in file order, 8 a step as 4 micro-batches of 2 (the third step of an epoch has the 4 that are left), 30
steps, loss = sum of token losses / trained tokens of the step, AdamW, linear schedule with warm-up as Hugging Face defines it,
clipping by global norm. The run is made a second time in f64; the differences printed at the end are what f32 itself costs.
"""

import copy
import hashlib
import json
import pathlib
import shutil
import sys

import gguf
import peft
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "lib"))
from gguf_llama import load_model

OUT = pathlib.Path(__file__).parents[2] / "engine/tests/golden/peft_curve"
RECIPE = {
    "max_steps": 30,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 5,
    "weight_decay": 0.01,
    "max_grad_norm": 0.5,
    "r": 4,
    "alpha": 8.0,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_rows():
    """20 rows of 7 to 45 tokens that count up in steps of their own; some with two trained spans, one trained from its start."""
    rows = []
    for index in range(20):
        length = 7 + (index * 11) % 39
        tokens = [(17 * index + (1 + index % 5) * place) % 97 for place in range(length)]
        trained = [place >= length // 3 for place in range(length)]
        if index % 4 == 1:
            trained = [length // 5 <= place < length // 2 or place >= length - 4 for place in range(length)]
        if index == 6:
            trained = [True] * length
        rows.append({"tokens": tokens, "trained": trained})
    return rows


def make_adapter(base):
    """A PEFT model with a seeded start in which B is not zero."""
    config = peft.LoraConfig(
        r=RECIPE["r"], lora_alpha=RECIPE["alpha"], lora_dropout=0.0, target_modules=TARGETS, bias="none", task_type="CAUSAL_LM"
    )
    torch.manual_seed(3407)
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def batch_of(rows):
    """Right-padded tokens, attention mask, and labels that are -100 where nothing is trained."""
    width = max(len(row["tokens"]) for row in rows)
    tokens = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    labels = torch.full_like(tokens, -100)
    for at, row in enumerate(rows):
        length = len(row["tokens"])
        tokens[at, :length] = torch.tensor(row["tokens"])
        mask[at, :length] = 1
        trained = torch.tensor(row["trained"])
        labels[at, :length] = torch.where(trained, tokens[at, :length], -100)
    return tokens, mask, labels[:, 1:].reshape(-1)


def train(model, rows):
    """Trains and returns the curves."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RECIPE["learning_rate"], weight_decay=RECIPE["weight_decay"])
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, RECIPE["warmup_steps"], RECIPE["max_steps"])
    size = RECIPE["micro_batch_size"] * RECIPE["gradient_accumulation_steps"]
    steps_per_epoch = -(-len(rows) // size)
    curves = {"loss": [], "token_accuracy": [], "learning_rate": [], "grad_norm": [], "trained_tokens": []}
    model.train()
    for step in range(RECIPE["max_steps"]):
        first = step % steps_per_epoch * size
        step_rows = rows[first : first + size]
        trained = sum(sum(row["trained"][1:]) for row in step_rows)
        loss_sum, right = 0.0, 0
        for at in range(0, len(step_rows), RECIPE["micro_batch_size"]):
            tokens, mask, labels = batch_of(step_rows[at : at + RECIPE["micro_batch_size"]])
            logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1].reshape(len(labels), -1)
            loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            (loss / trained).backward()
            loss_sum += loss.item()
            right += (logits.argmax(-1) == labels).sum().item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, RECIPE["max_grad_norm"])
        curves["loss"].append(loss_sum / trained)
        curves["token_accuracy"].append(right / trained)
        curves["learning_rate"].append(schedule.get_last_lr()[0])
        curves["grad_norm"].append(norm.item())
        curves["trained_tokens"].append(trained)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return curves


def save(model, name):
    """Saves the adapter as PEFT does, and takes out what depends on this machine."""
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "tiny"
    config["target_modules"] = TARGETS
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (folder / "README.md").unlink(missing_ok=True)


def report(single, double, model, exact):
    """Prints how far f32 and f64 are apart: the least that another f32 implementation can be off."""
    for name in ("loss", "grad_norm"):
        apart = max(abs(a - b) for a, b in zip(single[name], double[name]))
        print(f"{name}: {single[name][0]:.4f} -> {single[name][-1]:.4f}, f32 and f64 at most {apart:.1e} apart")
    pairs = [(a, b) for a, b in zip(model.parameters(), exact.parameters()) if a.requires_grad]
    apart = sum(((a.double() - b) ** 2).sum().item() for a, b in pairs) ** 0.5
    norm = sum((b**2).sum().item() for _, b in pairs) ** 0.5
    print(f"final weights: {apart / norm:.1e} of their norm apart")


def main():
    path = sys.argv[1]
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    rows = make_rows()
    model = make_adapter(load_model(path))
    exact = copy.deepcopy(model).double()
    save(model, "start")
    single = train(model, rows)
    save(model, "final")
    double = train(exact, rows)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    golden = {
        "made_by": "scripts/golden/peft_curve.py",
        "versions": versions,
        "base_sha256": hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest(),
        "recipe": RECIPE,
        "rows": rows,
        **single,
    }
    (OUT / "curve.json").write_text(json.dumps(golden) + "\n")
    print(versions, "gguf", getattr(gguf, "__version__", "without a version"))
    report(single, double, model, exact)


if __name__ == "__main__":
    main()
