"""GRPO on rationales, by trl, in an environment that has it; :mod:`reasoning` starts it.

    TRL_ENVIRONMENT/bin/python benchmarks/grpo_worker.py REQUEST.json

The request names the model's folder, the prompts with their labels, and where the trained model goes. The policy
writes a rationale, whose reward is the probability that the frozen model then gives to the right label: the same
choice, of the same texts, as in the program. LoRA of rank 8, merged when it is saved.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer


def main(request: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    frozen = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32).eval()
    options = [tokenizer.encode(option, add_special_tokens=False) for option in request["options"]]
    assert all(len(option) == len(options[0]) for option in options), "options of one length"

    @torch.no_grad()
    def right(prompts: list[str], completions: list[str], label: list[int], **more: Any) -> list[float]:
        rewards = []
        for prompt, completion, own in zip(prompts, completions, label, strict=True):
            ids = tokenizer.encode(prompt + completion + request["between"], add_special_tokens=False)
            rows = torch.tensor([ids + option for option in options])
            log_probs = frozen(rows).logits.log_softmax(-1)
            scores = torch.stack(
                [
                    sum(log_probs[n, len(ids) - 1 + t, token] for t, token in enumerate(option))
                    for n, option in enumerate(options)
                ]
            )
            rewards.append(float(scores.softmax(0)[own]))
        return rewards

    settings = GRPOConfig(
        output_dir=str(Path(request["out"]) / "runs"),
        per_device_train_batch_size=20,
        num_generations=4,
        max_completion_length=request["max_tokens"],
        max_steps=request["steps"],
        learning_rate=3e-4,
        warmup_steps=10,
        seed=request["seed"],
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=20,
        gradient_checkpointing=False,
        bf16=False,
    )
    trainer = GRPOTrainer(
        model=request["model"],
        reward_funcs=right,
        args=settings,
        train_dataset=Dataset(InMemoryTable.from_pylist(request["rows"]), fingerprint="rows"),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    start = time.process_time()
    trainer.train()
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(request["out"])
    tokenizer.save_pretrained(request["out"])
    (Path(request["out"]) / "seconds.json").write_text(json.dumps(time.process_time() - start))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
