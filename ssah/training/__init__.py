"""Training a part of a model while everything else keeps its bits, and ablation."""
