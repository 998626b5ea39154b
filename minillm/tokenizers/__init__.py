"""Own tokenizers: byte-level BPE and WordPiece, their files, their training."""
