"""Packs: any source as a few large files that are read at random, in constant memory."""
