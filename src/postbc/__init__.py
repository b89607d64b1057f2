"""postbc: Posterior Behavioral Cloning (arXiv 2512.16911)."""
__version__ = "0.1.0"
