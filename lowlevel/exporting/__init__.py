"""`lowlevel export`: a trained model for llama.cpp (GGUF), Ollama and vLLM."""
