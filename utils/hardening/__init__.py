"""What can go wrong before it does: files from strangers, memory and disk that do not suffice.

Each module is one call from the code that it protects, so that the reading path stays short.
"""
