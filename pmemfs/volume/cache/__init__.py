"""Mode `cache`: the stored side. Its format is declared in `media/cache.py`."""
