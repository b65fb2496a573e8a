"""Where bytes come from: the loader protocol, and the loader for Hugging Face safetensors directories."""
