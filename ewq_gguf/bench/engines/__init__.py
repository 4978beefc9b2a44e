"""Engines: llama.cpp and transformers behind one protocol, `Model` and `Scorer`."""
