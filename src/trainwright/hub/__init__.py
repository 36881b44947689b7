"""Publishing a model on the Hugging Face Hub.

Owns: the repository, what is pushed when, and the model card. Leaves to others: writing the files that are pushed.
"""
