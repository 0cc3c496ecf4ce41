"""One model in one process, decoding plainly or with drafts. Any Python that has the library will do.

    python benchmarks/_drafting.py plain|aded[,option=value]|llama|llama-lookup MODEL THREADS DTYPE

A command is a line {"ids": prompt, "tokens": most, "temperature": t, "fresh": forget what was learnt}; the answer is
{"tokens": after the first, "seconds": from the first to the last, "said": what the drafter says of itself}.
"""

import json
import sys
import time
from functools import partial

CONTEXT = 2048


def ours(plugs, model, threads, dtype):
    from shoestring.engine.engine import Engine
    from shoestring.engine.hooks import Hooks
    from shoestring.engine.open import open_model
    from shoestring.engine.plug import plugged
    from shoestring.engine.request import Sampling

    opened = open_model(model, runner="native", threads=threads, dtype=dtype)
    how = dict(context=CONTEXT, max_sequences=1, prefix_cache=False)
    held = {}

    def answer(ids, tokens, temperature, fresh):
        if fresh or not held:
            hooks = plugged(plugs, opened) if plugs else Hooks()
            held["engine"] = Engine((opened.runner, opened.tokenizer), hooks=hooks, **how)
        sampling = Sampling(max_tokens=tokens, ignore_eos=True, temperature=temperature, seed=1)
        ((found,),) = held["engine"].generate([ids], sampling)
        said = dict(held["engine"].counts().plugged)
        return len(found.tokens) - 1, found.usage.last_token - found.usage.first_token, said

    return answer


def llama(lookup, model, threads, dtype):
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    draft = LlamaPromptLookupDecoding(num_pred_tokens=lookup) if lookup else None
    loaded = Llama(
        model, n_ctx=CONTEXT, n_batch=CONTEXT, n_threads=threads, n_threads_batch=threads, draft_model=draft,
        logits_all=bool(draft), verbose=False,
    )  # fmt: skip

    def answer(ids, tokens, temperature, fresh):
        loaded.reset()
        count, first = 0, 0.0
        for _ in loaded.generate(ids, temp=temperature):
            now = time.perf_counter()
            count += 1
            first = first or now
            if count == tokens:
                break
        return count - 1, now - first, {}

    return answer


KINDS = {
    "plain": lambda *given: ours([], *given),
    "llama": lambda *given: llama(0, *given),
    "llama-lookup": lambda *given: llama(2, *given),  # as its makers advise on a CPU
}


def main():
    kind, model, threads, dtype = sys.argv[1:5]
    made = KINDS.get(kind, partial(ours, [kind]))
    answer = made(model, int(threads), dtype)
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        tokens, seconds, said = answer(**json.loads(line))
        print(json.dumps({"tokens": tokens, "seconds": seconds, "said": said}), flush=True)


if __name__ == "__main__":
    main()
