"""Text to rows of tokens: readers, chat templates, tokenizing with a cache, packing, streams, mixtures."""
