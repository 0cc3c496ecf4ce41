"""One model held by one process, which reads commands and answers with times. Any Python that has the library will do.

    python benchmarks/_arm.py ours|llama|transformers MODEL THREADS

A command is a line {"prompt": tokens, "tokens": tokens}; the answer is a line {"first": seconds from the prompt to the
first token, "each": [seconds of each token after it], "bytes": of weights, where known}. Greedy, the same token ids.
"""

import json
import sys
import time

CONTEXT = 1024


def ours(model, threads):
    from shoestring.engine.engine import Engine
    from shoestring.engine.request import Request, Sampling

    engine = Engine(model, runner="native", threads=threads, context=CONTEXT, max_sequences=1, prefix_cache=False)

    def answer(prompt, tokens):
        engine.submit(Request(prompt, Sampling(max_tokens=tokens, ignore_eos=True)))
        times, before = [], time.perf_counter()
        while not engine.idle:
            produced = engine.counts().generation_tokens
            engine.step()
            if engine.counts().generation_tokens > produced:
                now = time.perf_counter()
                times.append(now - before)
                before = now
        return times

    return answer, engine.facts.weight_bytes


def llama(model, threads):
    import ctypes

    import llama_cpp as llama
    import numpy as np

    llama.llama_backend_init()
    llama.llama_log_set(ctypes.cast(_silent, llama.llama_log_callback), None)
    loaded = llama.llama_model_load_from_file(model.encode(), llama.llama_model_default_params())
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = CONTEXT
    params.n_threads = params.n_threads_batch = threads
    context = llama.llama_init_from_model(loaded, params)
    vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(loaded))

    def answer(prompt, tokens):
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        times, ids = [], prompt
        for _ in range(tokens):
            before = time.perf_counter()
            array = (llama.llama_token * len(ids))(*ids)
            if llama.llama_decode(context, llama.llama_batch_get_one(array, len(ids))):
                raise RuntimeError("llama_decode failed")
            logits = llama.llama_get_logits_ith(context, -1)
            ids = [int(np.ctypeslib.as_array(logits, (vocab,)).argmax())]
            times.append(time.perf_counter() - before)
        return times

    return answer, 0


def transformers(model, threads):
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, local_files_only=True).eval()

    @torch.inference_mode()
    def answer(prompt, tokens):
        cache, ids, times = DynamicCache(config=loaded.config), torch.tensor([prompt]), []
        for _ in range(tokens):
            before = time.perf_counter()
            out = loaded(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            times.append(time.perf_counter() - before)
        return times

    return answer, 0


def _quiet():
    import ctypes

    @ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    def silent(level, text, data):
        pass

    return silent


_silent = _quiet()

if __name__ == "__main__":
    kind, model, threads = sys.argv[1:]
    answer, size = {"ours": ours, "llama": llama, "transformers": transformers}[kind](model, int(threads))
    answer([1000, 1001], 2)
    print(json.dumps({"bytes": size}), flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        first, *each = answer([1000 + i for i in range(wanted["prompt"])], wanted["tokens"])
        print(json.dumps({"first": first, "each": each}), flush=True)
