"""Names that the command line shows; imports nothing."""

EMBEDDERS = ("hash768", "minilm", "mean:DIR", "st:DIR")  # see `embedders`
