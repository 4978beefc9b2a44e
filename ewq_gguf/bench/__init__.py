"""What a model is worth: perplexity, divergence from its base, speed and memory.

Every model is loaded in a child process. The tasks see it through `Scorer`, so that
they do not know which engine computes.
"""
