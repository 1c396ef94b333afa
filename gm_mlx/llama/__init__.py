"""The engine on llama.cpp, for GGUF files: ours and anybody's. All that touches llama.cpp's library is in here."""
