"""What reading data takes unless told otherwise; imports nothing, for arguments of the command."""

MAX_LINE_BYTES = 32_000_000  # of a .jsonl or .txt file, held and tokenized as a whole
# What templates with `strftime_now` take for today: the day that those of Llama 3 fall back to.
DATE = "2024-07-26"
