"""Published systems read anew, for scripts/compare_authors.py: by formulas in NumPy, or by the authors' own code."""
