"""Other libraries, where they are present.

Owns: finding out what is installed or in use, and building what only another library can build.
Leaves to others: what to do with it. Importing this package imports no other library.
"""
