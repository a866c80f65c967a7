"""Names that the command line shows; imports nothing."""

EMBEDDERS = ("hash768", "minilm", "mean:MODEL", "st:MODEL")  # see `embedders`
DECODERS = ("retrieval", "inverter:DIR", "corrector:DIR", "vec2text", "vec2text:DIR")  # see `decoders.registry`
