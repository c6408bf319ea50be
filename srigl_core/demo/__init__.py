"""The demonstration: handwritten digits, dense and sparse, trained, saved, loaded and timed.

``srigl demo`` runs it. It uses the public API only, and needs the extra ``demo``; nothing else in
the library imports it.
"""
