"""8-bit weights and activations beside bfloat16: size, quality and speed."""

from shoestring.claims._weigh import weigh
from shoestring.core.claim import Claim
from shoestring.lab.arms import Arms

_HERE = "SmolLM2-135M-Instruct, groups of 32, as `shoestring compress` has them"
CLAIMS = (
    Claim(
        "storage",
        paper="2x (INT8) memory reduction against FP16",
        here=_HERE + "; bytes of the folder",
        measure="storage",
        arm="int8",
        against="bf16",
        expect="<= 0.56",
    ),
    Claim(
        "quality",
        paper="minimal accuracy impact with INT8 for both weights and activations (BERT, GPT-3-style)",
        here=_HERE + "; perplexity on the answers of 48 held-out examples",
        measure="perplexity",
        arm="int8",
        against="bf16",
        expect="<= 1.01",
        cannot="BERT and GPT-3-style models of the paper",
    ),
    Claim(
        "speed",
        paper="up to 5.19x/4.16x speedup on BERT/GPT-3-style models against FP16",
        here=_HERE + "; decode tokens/s of `generate` at batch 1 in processes of their own",
        measure="decode_tokens_per_s",
        arm="int8",
        against="bf16",
        expect=">= 1.5",
        cannot="GPU speed",
    ),
)


def run(arms: Arms) -> None:
    weigh(arms, {"int8": ("int8", {"group_size": 32}), "bf16": None}, examples=arms.size(8, 48))
