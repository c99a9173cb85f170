"""Transformers, looked into. Nothing outside imports transformers, but for what generates and embeds.

structure.py      where a model has its blocks, embeddings and limits
architecture.py   modules, blocks, widths and limits, from the config alone
sites.py          what a module takes or returns, read and replaced
tokenizer.py      the tokenizer, and the frame it puts around a row
special_tokens.py  special tokens that a text writes out
chat.py           conversations as text, by a chat template, with the place of each message
model.py          LanguageModel: activations captured, or changed within a forward pass
site_roles.py     what is at a site: the residual stream, what is added to it, …
cached.py         the model of a store, checked to be the one that was cached
unembedding.py    which tokens a direction of the residual stream writes, from two of the weights
"""
