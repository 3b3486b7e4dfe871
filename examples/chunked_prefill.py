"""Reads a long text into a quantized cache chunk by chunk, and asks several questions about it.

    python examples/chunked_prefill.py --model MODEL --quantizer FOLDER --text report.txt

The text is read once. Each question gets a copy of the cache, which shares its packed blocks, and
goes on where the text ends. This is plain transformers code: the cache is a transformers cache.
"""

import argparse
import copy
from pathlib import Path

import torch

import kvquant
from kvquant.cache.footprint import cache_elements, cache_nbytes

QUESTIONS = ("In short, the text above says that", "A good title of the text above is")


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of a model")
    parser.add_argument("--quantizer", help="folder or hub id of a quantizer")
    parser.add_argument("--scheme", help="a scheme without calibration, such as kivi-4")
    parser.add_argument("--text", type=Path, required=True, help="text file to read")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the text to read")
    parser.add_argument("--chunk", type=int, default=512, help="tokens per call of the model")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args()
    if not args.quantizer and not args.scheme:
        args.scheme = "int4-hadamard"

    qm = kvquant.load(args.model, args.scheme, quantizer=args.quantizer)
    text = args.text.read_text(encoding="utf-8")
    ids = qm.tokenizer(text, return_tensors="pt").input_ids[:, : args.tokens].to(qm.device)

    cache = qm.new_cache()
    with torch.inference_mode():
        for chunk in ids.split(args.chunk, dim=1):  # peak memory is that of one chunk
            qm.model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    bits = 8 * cache_nbytes(cache) / cache_elements(cache)
    print(f"{ids.shape[1]} tokens in {cache_nbytes(cache):,} bytes: {bits:.2f} bits per element")

    for question in QUESTIONS:
        asked = qm.tokenizer(f"\n\n{question}", return_tensors="pt", add_special_tokens=False)
        both = torch.cat([ids, asked.input_ids.to(qm.device)], dim=1)  # generate skips the past
        answer = qm.model.generate(
            input_ids=both,
            attention_mask=torch.ones_like(both),
            past_key_values=copy.deepcopy(cache),
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            pad_token_id=qm.tokenizer.eos_token_id,
        )
        print(f"> {question}\n{qm.tokenizer.decode(answer[0, both.shape[1] :])}\n")


if __name__ == "__main__":
    main()
