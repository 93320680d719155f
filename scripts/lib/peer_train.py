"""What `lorad train` is measured against: stock PyTorch and PEFT, the same weights, rows and steps, in a plain loop.

    peer_train.py BASE.gguf ROWS TOKENS STEPS RANK f32|bf16

prints the milliseconds of each step as JSON. In bf16 both model and adapter are bf16, which is the fastest of PEFT's ways.
"""

import json
import sys
import time

import peft
import torch

from gguf_llama import load_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main():
    path = sys.argv[1]
    rows, tokens, steps, rank = map(int, sys.argv[2:6])
    bf16 = sys.argv[6] == "bf16"
    config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = load_model(path)
    if bf16:
        model = model.to(torch.bfloat16)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=not bf16).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.01)
    torch.manual_seed(1)
    milliseconds = []
    for _ in range(steps):
        batch = torch.randint(3, 49000, (rows, tokens))
        started = time.perf_counter()
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        milliseconds.append((time.perf_counter() - started) * 1000)
    print(json.dumps(milliseconds))


if __name__ == "__main__":
    main()
