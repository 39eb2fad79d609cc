"""llama.cpp as a side of bench/compare_llama_cpp.py, by llama-cpp-python's C functions.

    python bench/llama_cpp_side.py FILE.gguf --threads 2 --flash --repack

Runs in any interpreter that has llama-cpp-python. With --first-token TEXT it prints that token's
text instead of serving.
"""

from __future__ import annotations

import argparse

from side_process import Run, Timing, clock_of, serve


def load(options: argparse.Namespace, context: int) -> object:
    import llama_cpp
    from llama_cpp import llama_cpp as c

    defaults = c.llama_model_default_params

    def model_params() -> object:
        params = defaults()
        params.use_extra_bufts = options.repack
        return params

    c.llama_model_default_params = model_params
    return llama_cpp.Llama(
        options.file,
        n_ctx=context,
        n_batch=options.batch,
        n_ubatch=options.batch,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        flash_attn=options.flash,
        verbose=False,
    )


def runner(options: argparse.Namespace) -> Run:
    import numpy as np
    from llama_cpp import llama_cpp as c

    llama = load(options, options.context)
    clock = clock_of(options.cpu_time)
    vocab = llama.n_vocab()

    def step(tokens: list[int]) -> int:
        context = llama.ctx
        ids = (c.llama_token * len(tokens))(*tokens)
        if c.llama_decode(context, c.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError("llama_decode failed")
        return int(np.ctypeslib.as_array(c.llama_get_logits_ith(context, -1), (vocab,)).argmax())

    def run(prompt: list[int], new_tokens: int) -> Timing:
        c.llama_memory_clear(c.llama_get_memory(llama.ctx), True)
        started = clock()
        for at in range(0, len(prompt), options.batch):
            token = step(prompt[at : at + options.batch])
        prefilled = clock()
        for _ in range(new_tokens):
            token = step([token])
        ended = clock()
        return len(prompt) / (prefilled - started), new_tokens / (ended - prefilled)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--flash", action="store_true", help="flash attention")
    parser.add_argument("--repack", action="store_true", help="weights in an order of its own")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--first-token", metavar="TEXT")
    options = parser.parse_args()
    if options.first_token is None:
        serve(lambda: runner(options))
    else:
        llama = load(options, 512)
        print(llama(options.first_token, max_tokens=1, temperature=0)["choices"][0]["text"])


if __name__ == "__main__":
    main()
