"""Answers prompts of very different lengths in one batch, greedily and by sampling.

    python examples/ragged_batch.py --model HuggingFaceTB/SmolLM2-135M-Instruct --scheme kivi-4

Prompts are padded on the left. Padding is never stored, so that a short prompt costs no more cache
than alone.
"""

import argparse

import torch

import kvquant

LONG = "The pass key is 40718. Remember it. " + "The grass is green. The sky is blue. " * 20


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of a model")
    parser.add_argument("--quantizer", help="folder or hub id of a quantizer")
    parser.add_argument("--scheme", help="a scheme without calibration, such as kivi-4")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    args = parser.parse_args()
    if not args.quantizer and not args.scheme:
        args.scheme = "int4-hadamard"

    qm = kvquant.load(args.model, args.scheme, quantizer=args.quantizer)
    prompts = ["Paris is", f"{LONG}What is the pass key? The pass key is", "One, two, three,"]
    greedy = kvquant.generate(qm, prompts, args.max_new_tokens)
    torch.manual_seed(0)
    sampled = kvquant.generate(qm, prompts, args.max_new_tokens, temperature=0.8, top_p=0.95)
    for prompt, one, other in zip(prompts, greedy, sampled, strict=True):
        print(f"> ...{prompt[-40:]}\n  greedy:  {one!r}\n  sampled: {other!r}")


if __name__ == "__main__":
    main()
