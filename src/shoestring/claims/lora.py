"""LoRA beside full fine-tuning: what it saves, and whether it learns as much."""

from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.jobs.evaluate import heldout
from shoestring.lab.arms import Arms

_HERE = "SmolLM2-135M-Instruct, Python documentation, 16 steps of 4 examples of at most 192 tokens, AdamW both"
CLAIMS = (
    Claim(
        "parameters",
        paper="the number of trainable parameters falls 10,000 times (GPT-3 175B)",
        here=_HERE,
        measure="trainable_parameters",
        arm="lora",
        against="full",
        expect="<= 0.05",
        cannot="175B parameters",
    ),
    Claim(
        "memory",
        paper="the GPU memory requirement falls 3 times (GPT-3 175B, Adam)",
        here=_HERE + "; peak memory above the idle process",
        measure="peak_memory_above_floor",
        arm="lora",
        against="full",
        expect="<= 0.5",
        cannot="GPU memory; 175B parameters",
    ),
    Claim(
        "quality",
        paper="performs on-par or better than fine-tuning in model quality on RoBERTa, DeBERTa, GPT-2, and GPT-3",
        here=_HERE
        + "; held-out loss of the answers, nats a token, learning rate 1e-3 for LoRA and 1e-4 for all weights",
        measure="heldout_loss",
        arm="lora",
        against="full",
        expect="<= 0.05",
        by="difference",
    ),
)


def run(arms: Arms) -> None:
    from shoestring.training import TrainOptions, train

    steps = arms.size(3, 16)
    for name, rate in (("lora", 1e-3), ("full", 1e-4)):
        with arms.arm(name) as stage:
            loaded = arms.load()
            rows = arms.docs(loaded.tokenizer, {"train": 4 * steps, "test": arms.size(8, 48)}, max_length=192)
            model = loaded.model
            if name == "lora":
                model = catalog.contract("adapters").wrap(catalog.module("lora"), model, {})
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            stage.record("trainable_parameters", trained, "parameter", "counted")
            options = TrainOptions(
                learning_rate=rate, max_steps=steps, per_device_train_batch_size=4, seed=arms.seed, save_steps=10_000
            )
            train(model, rows["train"].rows, [], options, arms.folder / name, tokenizer=loaded.tokenizer)
            model.eval()
            loss = heldout(model, rows["test"].rows).loss.value
            stage.record("heldout_loss", loss, "nat", "measured")
        del loaded, model
