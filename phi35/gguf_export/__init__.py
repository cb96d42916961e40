"""Models of the family as GGUF files for llama.cpp: architectures "phi3" and "phimoe"."""
