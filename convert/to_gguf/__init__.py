"""GGUF files for an unmodified llama.cpp: the decoder in ``text``, the tower and projector in ``vision``."""
