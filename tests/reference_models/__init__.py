"""Tiny random models of every family, as folders and GGUF files, with recorded values of what they compute.

``configurations`` says which models there are, ``hub_configs`` how older files describe the same ones, ``folders``
writes them as Hugging Face folders and ``gguf_files`` as GGUF. ``infra/record_family_references.py`` records.
"""
