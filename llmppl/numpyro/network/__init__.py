"""The decoder in JAX: text arrays, the law of the next token, reading, scoring, adapters."""
