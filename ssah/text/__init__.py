"""From chat messages to tokens, batches and logits."""
