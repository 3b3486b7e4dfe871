"""Compares schemes on one text: bits per element, and what quantizing costs in likelihood.

    python examples/compare_schemes.py --model MODEL --quantizer FOLDER --text report.txt

The first half of the text goes into the cache of each scheme; the loss is that of the second half,
whose tokens read the first half from the cache. Bits count all that is allocated, so that short
texts take more of them: the latest tokens are in 16 bits. The model is in memory once and unwrapped
after each scheme. This is an illustration on one text; the workflow measures with seeds and tests.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvquant
from kvquant.cache.footprint import cache_elements, cache_nbytes

SCHEMES = ("fp16", "fp8", "int4-hadamard", "kivi-4", "kivi-2")


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of a model")
    parser.add_argument("--quantizer", action="append", default=[], help="may be repeated")
    parser.add_argument("--schemes", nargs="*", default=SCHEMES, help="schemes without calibration")
    parser.add_argument("--text", type=Path, required=True, help="text file to read")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the text to read")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = args.text.read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : args.tokens].to(args.device)
    half = ids.shape[1] // 2

    table = Table("scheme", "bits per element", "loss")
    cases = [{"scheme": name} for name in args.schemes]
    cases += [{"quantizer": folder} for folder in args.quantizer]
    for case in cases:
        name = next(iter(case.values()))
        try:
            qm = kvquant.load(model, **case)
        except kvquant.UserError as error:  # one line: what does not fit, and the fix
            table.add_row(name, "-", str(error))
            continue
        with qm, torch.inference_mode():
            cache = qm.new_cache()
            model(input_ids=ids[:, :half], past_key_values=cache, use_cache=True, logits_to_keep=1)
            bits = 8 * cache_nbytes(cache) / cache_elements(cache)
            # the logits of a token tell the next one
            logits = model(input_ids=ids[:, half:], past_key_values=cache, use_cache=True).logits
            loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, half + 1 :])
        table.add_row(name, f"{bits:.2f}", f"{loss:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
