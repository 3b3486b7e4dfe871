"""Calibrates a model on a text, saves the quantizer, and answers questions over a 3-bit KV cache.

    python examples/quickstart.py --model HuggingFaceTB/SmolLM2-135M-Instruct --text book.txt

A second call with the same folder uses the quantizer that the first one saved.
"""

import argparse
from pathlib import Path

import kvquant


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of a model")
    parser.add_argument("--text", type=Path, help="text file to calibrate on")
    parser.add_argument("--quantizer", default="build/quickstart", help="folder of the quantizer")
    parser.add_argument("--bits", type=int, default=3, choices=(4, 3, 2))
    parser.add_argument("--windows", type=int, default=16, help="windows of text; fewer are faster")
    parser.add_argument("--window", type=int, help="tokens per window; default: up to 2048")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    args = parser.parse_args()

    if not Path(args.quantizer, "quantizer.json").exists():
        if args.text is None:
            parser.error(f"{args.quantizer} holds no quantizer yet: give --text to make one")
        quantizer = kvquant.calibrate(
            args.model, texts=args.text, bits=args.bits, windows=args.windows, window=args.window
        )
        quantizer.save(args.quantizer)  # or quantizer.push_to_hub("you/model-3bit")

    qm = kvquant.load(args.model, quantizer=args.quantizer)
    questions = ["What is a KV cache?", "Name three rivers in Europe."]
    chat = qm.tokenizer.chat_template is not None  # base models have none
    answers = kvquant.generate(qm, questions, args.max_new_tokens, chat=chat)
    for question, answer in zip(questions, answers, strict=True):
        print(f"> {question}\n{answer}\n")


if __name__ == "__main__":
    main()
