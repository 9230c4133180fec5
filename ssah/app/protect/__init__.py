"""For a model of one's own: measure its refusals, fine-tune it without losing them, say whether
that worked. Needs neither Hydra nor notebooks (``pip install 'ssah[protect]'``)."""
