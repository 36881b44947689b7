"""Other libraries, where they are present.

Owns: detecting what is installed or in use, and building objects of other libraries.
Leaves to others: what to do with them. Importing this package imports no other library.
"""
