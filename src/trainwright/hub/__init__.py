"""Publishing a model on the Hugging Face Hub.

Owns: the repository, pushes, and the model card. Leaves to others: writing the files that are pushed.
"""
