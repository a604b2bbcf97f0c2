"""The words of a SentencePiece model file."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # what a piece is
MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
SPACE = "▁"  # how a space is written in pieces
