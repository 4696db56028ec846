"""Text on the client's side of the wire: tokenizer, chat template, detokenizer, stop strings. Imports no torch."""
