"""A language model with orthogonal attention outputs, trained by the Trainer of Hugging Face.

pip install transformers accelerate
python docs/examples/hf_trainer.py
"""

from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import riemann_unn as ru


def main(steps: int = 40) -> None:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    ru.tag_(model, {"*.o_proj.weight": ru.Orthogonal()})
    ru.init.warm_start_(model)
    groups = ru.param_groups(model, lr=3e-3, tagged_lr=1e-3)
    optimizer = ru.optim.ProjUNNT(groups, lr=3e-3, rank=4, base=torch.optim.AdamW)

    text = torch.tensor(list("".join(topics.values()).encode("ascii", "replace")))
    rows = text[: 64 * 1000].view(-1, 64)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir="trained",
            max_steps=steps,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            logging_steps=10,
            save_steps=steps,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizers=(optimizer, None),  # None: the Trainer's own schedule, on our optimizer
    )
    trainer.train()
    print(f"loss {trainer.state.log_history[0]['loss']} at first")
    print(f"orthogonality error {max(e.max() for e in ru.orthogonality_error(model).values()):.0e}")


if __name__ == "__main__":
    main()
