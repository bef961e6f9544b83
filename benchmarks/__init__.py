"""The comparison harness: which algorithm is better, by how much, and how sure is that?"""
