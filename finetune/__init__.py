"""Fine-tune the LayerNorm out of a GPT-2-type model."""
