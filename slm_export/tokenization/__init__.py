"""The source's tokenizer, the tokenizers of apps, and where they part."""
