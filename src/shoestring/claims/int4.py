"""4-bit weights beside bfloat16: size, quality, speed, and whether small groups are the better ones."""

from shoestring.claims._weigh import weigh
from shoestring.core.claim import Claim
from shoestring.lab.arms import Arms

_HERE = "SmolLM2-135M-Instruct (its file was 4-bit in groups of 32 once, so groups of 64 here), 8-bit embeddings"
CLAIMS = (
    Claim(
        "storage",
        paper="4-bit precision is almost universally optimal for total model bits and zero-shot accuracy (19M to 176B)",
        here=_HERE + "; bytes of the folder",
        measure="storage",
        arm="int4",
        against="bf16",
        expect="<= 0.36",
        cannot="the scaling law itself: it needs many sizes of one family",
    ),
    Claim(
        "quality",
        paper="4-bit precision is almost universally optimal for total model bits and zero-shot accuracy (19M to 176B)",
        here=_HERE + "; perplexity on the answers of 48 held-out examples",
        measure="perplexity",
        arm="int4",
        against="bf16",
        expect="<= 1.10",
        cannot="zero-shot accuracy at 19M to 176B",
    ),
    Claim(
        "groups",
        paper="small block sizes improve bit-level scaling",
        here=_HERE + "; KL divergence from the bfloat16 model, groups of 64 against groups of 128",
        measure="kl",
        arm="int4",
        against="int4-128",
        expect="< 1.0",
    ),
    Claim(
        "speed",
        paper="no figure; latency follows model bits when memory-bound",
        here=_HERE + "; decode tokens/s of `generate` at batch 1 in processes of their own",
        measure="decode_tokens_per_s",
        arm="int4",
        against="bf16",
        expect=">= 2.0",
    ),
)


def run(arms: Arms) -> None:
    weigh(
        arms,
        {"int4": ("int4", {"group_size": 64}), "int4-128": ("int4", {"group_size": 128}), "bf16": None},
        examples=arms.size(8, 48),
    )
