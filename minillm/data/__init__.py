"""Data pipeline: text or token files, tokenizers, training and evaluation batches."""

from minillm.data.corpus import Corpus, load_corpus
from minillm.data.tokenizers import Tokenizer, make_tokenizer, tokenizer_from_json

__all__ = ["Corpus", "Tokenizer", "load_corpus", "make_tokenizer", "tokenizer_from_json"]
