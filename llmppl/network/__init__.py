"""One transformer, packed: text tensors, the law of the next token, scoring, drawing, unmasking, adapters."""
