"""The demo's tokenizer: byte-level BPE trained on the demo's text. It adds <bos>, as most released tokenizers do."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


def train_tokenizer(documents: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a BPE tokenizer.

    Ids 0, 1, 2 are <|bos|>, <|eos|>, <|pad|>; any string can be encoded, because the 256 bytes are in the alphabet.

    Args:
        documents: text to train on.
        vocab_size: number of ids; there are fewer if the text is too short.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    # Indentation is most of Python's white space: keep runs of blanks together, split words and numbers as GPT-4 does.
    pattern = Regex(r"[^\S\n]*\n+|[^\S\n]+(?=[^\S\n]\S)| ?[A-Za-z]+| ?\d{1,3}| ?[^\sA-Za-z\d]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
